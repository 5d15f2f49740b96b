//! The repository `two_points` as an earlier build left it: two disks and a side file, a map that is shared, a point that
//! was forgotten, a session that was aborted. It is read, verified, restored, added to and pruned.

use std::path::Path;

use vmkeep::id::PointId;
use vmkeep::monitor::Recorder;
use vmkeep::ops::RequestedLevel;
use vmkeep::ops::backup::{ImageBackupOptions, ImageInput, backup_image};
use vmkeep::ops::prune::{PruneOptions, prune};
use vmkeep::ops::restore::{ImageFormat, OnDamage, RestoreOptions, RestoreOutput, restore};
use vmkeep::ops::verify::{VerifyLevel, VerifyOptions, verify};
use vmkeep::repo::Repository;
use vmkeep::source::image::ImageFileFormat;

use crate::decoder::content::{nvram, vda, vdb};
use crate::fixtures;

fn assert_sound(repository: &Repository) {
    for level in [VerifyLevel::Structure, VerifyLevel::Packs, VerifyLevel::Data, VerifyLevel::Restore] {
        let options = VerifyOptions { level, ..VerifyOptions::default() };
        assert_eq!(verify(repository, &options, &Recorder::new()).unwrap().findings, [], "{level:?}");
    }
}

/// Restores a point; returns its disks and its side file.
fn restored(repository: &Repository, id: PointId, names: &[&str]) -> Vec<Vec<u8>> {
    let target = tempfile::tempdir().unwrap();
    let options = RestoreOptions {
        output: RestoreOutput::Directory(target.path().into()),
        disks: Vec::new(),
        format: ImageFormat::Raw,
        force: false,
        on_damage: OnDamage::Fail,
        dry_run: false,
    };
    let catalog = repository.catalog(&Recorder::new()).unwrap();
    let record = &catalog.point(id).unwrap().record;
    restore(repository, record, &options, &Recorder::new()).unwrap();
    names.iter().map(|name| std::fs::read(target.path().join(name)).unwrap()).collect()
}

/// The points of the fixture that were not forgotten hold what they held.
fn assert_old_points(repository: &Repository) {
    let catalog = repository.catalog(&Recorder::new()).unwrap();
    let old = catalog.points().iter().filter(|entry| entry.record.disks.len() == 2);
    let old: Vec<PointId> = old.map(|entry| entry.record.id).collect();
    assert_eq!(old.len(), 2);
    for (number, id) in old.into_iter().enumerate() {
        let found = restored(repository, id, &["vda.raw", "vdb.raw", "nvram"]);
        assert!(found == [vda(number), vdb(number), nvram(number)], "point {number}");
    }
}

fn back_up(repository: &Repository, image: &Path, content: &[u8]) -> PointId {
    std::fs::write(image, content).unwrap();
    let options = ImageBackupOptions {
        domain: "web".into(),
        disk: "vda".into(),
        input: ImageInput::File { path: image.into(), format: Some(ImageFileFormat::Raw) },
        level: RequestedLevel::Auto,
        tags: Vec::new(),
        read_limit: None,
        dry_run: false,
    };
    backup_image(repository, &options, &Recorder::new()).unwrap().record.id
}

#[test]
fn an_older_repository_is_read_added_to_and_pruned() {
    let root = fixtures::copy("two_points");
    let repository = fixtures::open(root.path());
    assert_sound(&repository);
    assert_old_points(&repository);
    // what its forgotten point had is stored still, and found again
    let image = tempfile::NamedTempFile::new().unwrap();
    let new = back_up(&repository, image.path(), &vda(2));
    assert!(restored(&repository, new, &["vda.raw"]) == [vda(2)]);
    let options = PruneOptions { max_unused_permille: 0, ..PruneOptions::default() };
    let report = prune(&repository, &options, &Recorder::new()).unwrap();
    assert_eq!(report.dropped_points.len(), 1, "{report:?}");
    assert!(report.repacked_packs > 0, "{report:?}");
    drop(repository);
    let repository = fixtures::open(root.path());
    assert_sound(&repository);
    assert_old_points(&repository);
    assert!(restored(&repository, new, &["vda.raw"]) == [vda(2)]);
    // a page more, on what the prune has written anew
    let mut content = vda(2);
    content[12 << 20..][..4096].fill(0xab);
    let newest = back_up(&repository, image.path(), &content);
    assert!(restored(&repository, newest, &["vda.raw"]) == [content]);
    assert_sound(&repository);
}

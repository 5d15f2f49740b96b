//! Whole works on an image: backups, restore, verify, prune.

use std::fs::File;
use std::io::{Read, Write};

use divan::Bencher;
use divan::counter::BytesCount;
use vmkeep::format::point::PointRecord;
use vmkeep::monitor::Recorder;
use vmkeep::ops::forget::forget;
use vmkeep::ops::prune::{PruneOptions, prune};
use vmkeep::ops::restore::{ImageFormat, OnDamage, RestoreOptions, RestoreOutput, restore};
use vmkeep::ops::verify::{VerifyLevel, VerifyOptions, verify};
use vmkeep::repo::Repository;

use super::{MIB, Place, disk_content, keep};

fn newest(repository: &Repository) -> std::sync::Arc<PointRecord> {
    repository.catalog(&Recorder::new()).unwrap().points().last().unwrap().record.clone()
}

#[divan::bench(sample_count = 3, sample_size = 1)]
fn bare_read_and_blake3(bencher: Bencher<'_, '_>) {
    let place = Place::new();
    bencher.counter(BytesCount::new(place.len)).bench_local(|| {
        let (mut file, mut hasher) = (File::open(place.image()).unwrap(), blake3::Hasher::new());
        let mut buffer = vec![0; MIB as usize];
        loop {
            match file.read(&mut buffer).unwrap() {
                0 => return hasher.finalize(),
                len => hasher.update(&buffer[..len]),
            };
        }
    });
}

#[divan::bench(sample_count = 3, sample_size = 1)]
fn first_backup(bencher: Bencher<'_, '_>) {
    let place = Place::new();
    let mut number = 0;
    bencher.counter(BytesCount::new(place.len)).bench_local(|| {
        number += 1;
        keep(&place.create(&format!("first-{number}")), &place.image());
    });
}

/// What is read, from the page cache, is hashed and compared with the map.
#[divan::bench(sample_count = 3, sample_size = 1)]
fn unchanged_again(bencher: Bencher<'_, '_>) {
    let place = Place::new();
    let repository = place.filled();
    bencher.counter(BytesCount::new(place.len)).bench_local(|| keep(&repository, &place.image()));
}

/// Read in full; one block of 4 KiB in a hundred differs.
#[divan::bench(sample_count = 3, sample_size = 1)]
fn one_percent_changed(bencher: Bencher<'_, '_>) {
    let place = Place::new();
    let mut number = 0;
    bencher
        .counter(BytesCount::new(place.len))
        .with_inputs(|| {
            number += 1;
            let repository = place.create(&format!("changed-{number}"));
            keep(&repository, &place.image());
            repository
        })
        .bench_local_values(|repository| keep(&repository, &place.changed()));
}

/// The image once more, as a restore writes it: synced at the end.
#[divan::bench(sample_count = 3, sample_size = 1)]
fn bare_copy_and_sync(bencher: Bencher<'_, '_>) {
    let place = Place::new();
    let target = place.dir.path().join("copy");
    bencher.counter(BytesCount::new(place.len)).bench_local(|| {
        let (mut from, mut to) = (File::open(place.image()).unwrap(), File::create(&target).unwrap());
        let mut buffer = vec![0; MIB as usize];
        loop {
            match from.read(&mut buffer).unwrap() {
                0 => return to.sync_all().unwrap(),
                len => to.write_all(&buffer[..len]).unwrap(),
            }
        }
    });
}

#[divan::bench(sample_count = 3, sample_size = 1)]
fn restore_to_raw(bencher: Bencher<'_, '_>) {
    let place = Place::new();
    let repository = place.filled();
    let record = newest(&repository);
    let options = RestoreOptions {
        output: RestoreOutput::Directory(place.dir.path().join("restored")),
        disks: Vec::new(),
        format: ImageFormat::Raw,
        force: true,
        on_damage: OnDamage::Fail,
        dry_run: false,
    };
    bencher
        .counter(BytesCount::new(place.len))
        .bench_local(|| restore(&repository, &record, &options, &Recorder::new()).unwrap());
}

/// Packs and map are looked through; then all that a restore writes is put in order, and hashed instead.
#[divan::bench(sample_count = 3, sample_size = 1)]
fn restore_without_writing(bencher: Bencher<'_, '_>) {
    verify_at(VerifyLevel::Restore, bencher);
}

#[divan::bench(sample_count = 3, sample_size = 1)]
fn verify_data(bencher: Bencher<'_, '_>) {
    verify_at(VerifyLevel::Data, bencher);
}

fn verify_at(level: VerifyLevel, bencher: Bencher<'_, '_>) {
    let place = Place::new();
    let repository = place.filled();
    let options = VerifyOptions { level, ..VerifyOptions::default() };
    bencher.counter(BytesCount::new(place.len)).bench_local(|| {
        let report = verify(&repository, &options, &Recorder::new()).unwrap();
        assert!(report.findings.is_empty());
    });
}

/// Of the image and of one with something else in every second MiB the image is forgotten; nothing unused stays.
#[divan::bench(sample_count = 3, sample_size = 1)]
fn prune_to_the_last_byte(bencher: Bencher<'_, '_>) {
    let place = Place::new();
    let mut content = std::fs::read(place.image()).unwrap();
    for (part, seed) in content.chunks_mut(MIB as usize).zip(1000..).step_by(2) {
        part.copy_from_slice(&disk_content(part.len() as u64, seed));
    }
    let (other, mut number) = (place.dir.path().join("other"), 0);
    std::fs::write(&other, content).unwrap();
    bencher
        .counter(BytesCount::new(place.len))
        .with_inputs(|| {
            number += 1;
            let (repository, silent) = (place.create(&format!("pruned-{number}")), Recorder::new());
            keep(&repository, &place.image());
            let first = newest(&repository).id;
            keep(&repository, &other);
            forget(&repository, &[first], "", false, &silent).unwrap();
            repository
        })
        .bench_local_values(|repository| {
            let all = PruneOptions { max_unused_permille: 0, ..PruneOptions::default() };
            assert!(prune(&repository, &all, &Recorder::new()).unwrap().repacked_packs > 0);
        });
}

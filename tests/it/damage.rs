//! One flipped bit, cut, extension, swap or loss, anywhere in a small repository: found, and never restored as if nothing
//! had happened.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use vmkeep::error::{Error, Result};
use vmkeep::extent::{ByteRange, RangeSet};
use vmkeep::format::name::{Folder, ObjectName};
use vmkeep::format::pack::{PACK_HEADER_LEN, PackHeader, PackKind};
use vmkeep::format::point::PointRecord;
use vmkeep::format::session::{Damage, Mark, OUTSIDE_CHUNKS, SessionKind, SessionRecord};
use vmkeep::id::{PackId, PointId, SegmentId, SessionId};
use vmkeep::monitor::Recorder;
use vmkeep::ops::RequestedLevel;
use vmkeep::ops::backup::{ImageBackupOptions, ImageInput, backup_image};
use vmkeep::ops::forget::{forget, hold};
use vmkeep::ops::prune::{PruneOptions, prune};
use vmkeep::ops::repair::{repair_index, repair_points};
use vmkeep::ops::restore::{ImageFormat, OnDamage, RestoreOptions, RestoreOutput, restore};
use vmkeep::ops::verify::{VerifyLevel, VerifyOptions, verify};
use vmkeep::repo::catalog::Ended;
use vmkeep::repo::{CreateOptions, Environment, Repository};
use vmkeep::source::image::ImageFileFormat;
use vmkeep::storage::Storage;
use vmkeep::storage::local::LocalStorage;
use vmkeep::storage::memory::MemoryStorage;

use crate::fixtures;
use crate::support::is_long;

pub fn environment() -> Environment {
    Environment {
        host: "host".into(),
        boot_id: "boot".into(),
        process_id: 1,
        program: "test".into(),
        now_ms: || 1_700_000_000_000,
        timing: vmkeep::repo::Timing::default(),
    }
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// A small repository, what its points hold, and what can be done to it.
pub struct Small {
    pub storage: MemoryStorage,
    /// By point, oldest first.
    contents: Vec<Vec<u8>>,
    points: Vec<PointId>,
    directory: tempfile::TempDir,
}

impl Small {
    fn new() -> Self {
        let storage = MemoryStorage::new();
        Repository::create(Box::new(storage.clone()), &CreateOptions::default(), &environment()).unwrap();
        // in memory where that can be had: thousands of restores are synced
        let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let mut small = Self { storage, contents: Vec::new(), points: Vec::new(), directory };
        small.back_up(0);
        small.back_up(1);
        small
    }

    /// Besides, one object of every other kind that a repository can have: a prune has written packs anew, and a repair has
    /// made a segment.
    pub fn full() -> Self {
        let mut small = Self::new();
        small.back_up(2);
        small.back_up(3);
        let (repository, silent) = (small.open().unwrap(), Recorder::new());
        // what the first point alone stored the others need, too
        forget(&repository, &small.points[..1], "a test", false, &silent).unwrap();
        let options = PruneOptions { max_unused_permille: 0, ..PruneOptions::default() };
        assert!(prune(&repository, &options, &silent).unwrap().repacked_packs > 0);
        let segment = repository.segments().unwrap()[0];
        small.storage.delete(ObjectName::Segment(segment)).unwrap();
        let repository = small.open().unwrap();
        assert!(repair_index(&repository, false, &silent).unwrap().packs > 0);
        let (held, forgotten) = (small.points[1], small.points[3]);
        forget(&repository, &[forgotten], "a test", false, &silent).unwrap();
        hold(&repository, held, None, "a test", &silent).unwrap();
        let options = VerifyOptions { record: true, ..VerifyOptions::default() };
        assert_eq!(verify(&repository, &options, &silent).unwrap().findings, []);
        // what others leave that are at work, or were killed
        let dead = SessionId::from_bytes([7; 16]);
        let pack = small.objects().into_iter().find_map(|name| match name {
            ObjectName::Pack(id) if small.right_without(name) == 0 => Some(id),
            _ => None,
        });
        let pack = pack.unwrap();
        let session = SessionRecord {
            kind: SessionKind::Prune,
            host: "host".into(),
            boot_id: "boot".into(),
            process_id: u32::MAX,
            started_ms: 0,
            program: "test".into(),
        };
        let damage = Damage { pack, chunks: vec![OUTSIDE_CHUNKS] };
        let mark = Mark { packs: vec![pack], points: vec![forgotten] };
        for (name, bytes) in [
            (ObjectName::Session(dead), session.to_object(repository.id())),
            (ObjectName::Damage(pack, dead), damage.to_object(repository.id())),
            (ObjectName::Mark(dead), mark.to_object(repository.id())),
        ] {
            small.storage.put_new(name, &bytes.unwrap()).unwrap();
        }
        small
    }

    fn back_up(&mut self, point: u64) {
        let path = self.directory.path().join("image");
        let mut content = noise(1, 24 << 10);
        content.resize((1 << 20) + (40 << 10), 0);
        content[4096..8192].copy_from_slice(&noise(2 + point, 4096));
        content[(1 << 20) + 8192..(1 << 20) + 8192 + 5000].copy_from_slice(&noise(10, 5000));
        std::fs::write(&path, &content).unwrap();
        let options = ImageBackupOptions {
            domain: "d".into(),
            disk: "vda".into(),
            input: ImageInput::File { path, format: Some(ImageFileFormat::Raw) },
            level: RequestedLevel::Auto,
            tags: Vec::new(),
            read_limit: None,
            dry_run: false,
        };
        let made = backup_image(&self.open().unwrap(), &options, &Recorder::new()).unwrap();
        self.points.push(made.record.id);
        self.contents.push(content);
    }

    /// Everything but the reserve, whose bytes mean nothing.
    pub fn objects(&self) -> Vec<ObjectName> {
        let mut objects = vec![ObjectName::Config, ObjectName::ConfigCopy];
        for folder in Folder::ALL {
            objects.extend(self.storage.list(folder).unwrap().into_iter().map(|listed| listed.name));
        }
        objects
    }

    pub fn open(&self) -> Result<Repository> {
        self.open_with(&Recorder::new())
    }

    fn open_with(&self, monitor: &Recorder) -> Result<Repository> {
        Repository::open(Box::new(self.storage.clone()), None, &environment(), monitor)
    }

    /// Returns true if a whole verify, or already opening, says that something is wrong.
    fn is_found(&self) -> bool {
        let options = VerifyOptions { level: VerifyLevel::Data, ..VerifyOptions::default() };
        let monitor = Recorder::new();
        match self.open().and_then(|repository| verify(&repository, &options, &monitor)) {
            Ok(report) => !report.findings.is_empty(),
            Err(_) => true,
        }
    }

    /// Returns true if a whole verify, or already opening, says that something is wrong with this object. Of a config that
    /// is not there the repository's URL is said.
    fn is_named(&self, name: ObjectName) -> bool {
        let options = VerifyOptions { level: VerifyLevel::Data, ..VerifyOptions::default() };
        let monitor = Recorder::new();
        match self.open().and_then(|repository| verify(&repository, &options, &monitor)) {
            Ok(report) => report.findings.iter().any(|finding| finding.object == name.to_string()),
            Err(Error::NoRepository { .. }) => name == ObjectName::Config,
            Err(error) => {
                let causes =
                    std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source());
                causes.into_iter().any(|cause| cause.to_string().contains(&name.to_string()))
            }
        }
    }

    /// Returns true if it is noticed that this object is not there. What a segment says is missed, not the segment: nobody
    /// knows the names of those that there were. So it is with the outcome of a prune or a repair.
    fn is_missed(&self, name: ObjectName) -> bool {
        self.is_named(name)
            || (matches!(name, ObjectName::Segment(_) | ObjectName::Outcome(_)) && self.is_found())
    }

    /// Returns how many of the two points that are shown can be restored whatever became of an object.
    pub fn right_without(&self, name: ObjectName) -> usize {
        match name {
            ObjectName::Outcome(session) => {
                let catalog = self.open().unwrap().catalog(&Recorder::new()).unwrap();
                2 - usize::from(catalog.point(PointId::from(session)).is_some())
            }
            ObjectName::Pack(_) => {
                let header = self.storage.get_range(name, 0, PACK_HEADER_LEN as u64).unwrap();
                match PackHeader::decode(&header).unwrap().kind {
                    PackKind::Metadata => 2,
                    PackKind::Data => 0,
                }
            }
            _ => 2,
        }
    }

    /// Returns true for what the protocol itself takes away: a session that ends, a tombstone that is undone, a hold
    /// that is released, a mark of a prune that is over. Nobody can tell that from a loss, and no point is lost by it.
    pub fn may_go(&self, name: ObjectName) -> bool {
        match name {
            ObjectName::Session(_)
            | ObjectName::Mark(_)
            | ObjectName::Tombstone(_)
            | ObjectName::Damage(..)
            // older repositories have none
            | ObjectName::ConfigCopy => true,
            ObjectName::Outcome(session) => {
                let catalog = self.open().unwrap().catalog(&Recorder::new()).unwrap();
                let mut points = catalog.points().iter().chain(catalog.forgotten());
                !points.any(|entry| SessionId::from(entry.record.id) == session) && self.prunes_without(name)
            }
            ObjectName::Segment(_) => self.prunes_without(name),
            _ => false,
        }
    }

    /// Returns true if no point that is shown needs what an object lists, or makes count: a prune would go on without it.
    fn prunes_without(&self, name: ObjectName) -> bool {
        let storage = self.storage.snapshot();
        storage.tamper(name, |_| None);
        let without = Repository::open(Box::new(storage), None, &environment(), &Recorder::new());
        let options = PruneOptions { dry_run: true, ..PruneOptions::default() };
        prune(&without.unwrap(), &options, &Recorder::new()).is_ok()
    }

    /// Returns true for the outcome of a session that committed something else than a point.
    fn is_done(&self, name: ObjectName) -> bool {
        let ObjectName::Outcome(session) = name else { return false };
        let catalog = self.open().unwrap().catalog(&Recorder::new()).unwrap();
        let mut points = catalog.points().iter().chain(catalog.forgotten());
        let is_point = points.any(|entry| SessionId::from(entry.record.id) == session);
        !is_point && catalog.ended(session) == Some(Ended::Committed)
    }

    /// Restores all points there are; each is right or an error. Returns how many were right.
    pub fn check_restores(&self) -> usize {
        self.open().map_or(0, |repository| self.check_restores_of(&repository))
    }

    /// As [`Small::check_restores`], from a repository like this one.
    pub fn check_restores_of(&self, repository: &Repository) -> usize {
        let Ok(catalog) = repository.catalog(&Recorder::new()) else { return 0 };
        let target = self.directory.path().join("restored");
        let mut right = 0;
        for entry in catalog.points() {
            let options = RestoreOptions {
                output: RestoreOutput::Targets(vec![("vda".into(), target.clone())]),
                disks: Vec::new(),
                format: ImageFormat::Raw,
                force: true,
                on_damage: OnDamage::Fail,
                dry_run: false,
            };
            if restore(repository, &entry.record, &options, &Recorder::new()).is_ok() {
                let found = std::fs::read(&target).unwrap();
                assert!(self.contents.contains(&found), "a restore ended well and gave something else");
                right += 1;
            }
        }
        right
    }

    /// Restores with zeroes for what is lost; returns those ranges. The rest has to be right.
    fn lost_by_force(&self, repository: &Repository, record: &PointRecord) -> Vec<(u64, u64)> {
        let target = self.directory.path().join("forced");
        let options = RestoreOptions {
            output: RestoreOutput::Targets(vec![("vda".into(), target.clone())]),
            disks: Vec::new(),
            format: ImageFormat::Raw,
            force: true,
            on_damage: OnDamage::Zero,
            dry_run: false,
        };
        let report = restore(repository, record, &options, &Recorder::new()).unwrap();
        let found = std::fs::read(&target).unwrap();
        let missing = report.disks[0].missing.clone();
        let is_right = |content: &Vec<u8>| {
            let mut content = content.clone();
            missing.iter().for_each(|(start, len)| content[*start as usize..][..*len as usize].fill(0));
            content == found
        };
        assert!(self.contents.iter().any(is_right), "what is not said to be lost is wrong");
        missing
    }

    /// Damages an object, looks, and mends it.
    fn with(
        &self,
        name: ObjectName,
        what: &str,
        damage: impl FnOnce(&mut Vec<u8>) -> bool,
        look: impl FnOnce(),
    ) {
        let original = self.storage.get(name, u64::MAX).unwrap();
        let mut damaged = original.clone();
        let stays = damage(&mut damaged);
        self.storage.tamper(name, |_| stays.then_some(damaged));
        let looked = catch_unwind(AssertUnwindSafe(look));
        if !stays {
            self.storage.put_new(name, &original).unwrap();
        }
        self.storage.tamper(name, |_| Some(original));
        assert!(looked.is_ok(), "{name}: {what}");
    }
}

#[test]
fn a_flipped_bit_is_found_wherever_it_is() {
    let small = Small::full();
    assert!(!small.is_found());
    let mut flips = 0u32;
    let mut kinds = HashSet::new();
    for name in small.objects() {
        kinds.insert(std::mem::discriminant(&name));
        let len = small.storage.len(name).unwrap();
        for at in 0..len as usize {
            let bit = 1 << (at % 8);
            let flip = |bytes: &mut Vec<u8>| {
                bytes[at] ^= bit;
                true
            };
            let look = || assert!(small.is_named(name));
            small.with(name, &format!("bit {bit:#x} of byte {at}"), flip, look);
            flips += 1;
        }
    }
    assert!(flips > 25_000, "{flips}");
    // all but keys, which no repository has yet, heartbeats, of which only a change matters, and the reserve
    assert_eq!(kinds.len(), 9);
    assert!(!small.is_found());
}

#[test]
fn no_damage_is_restored_as_if_it_were_content() {
    let small = Small::full();
    assert_eq!(small.check_restores(), 2);
    for name in small.objects() {
        let right = small.right_without(name);
        let len = small.storage.len(name).unwrap() as usize;
        for at in (0..len).step_by((len / 40).max(1)) {
            let flip = |bytes: &mut Vec<u8>| {
                bytes[at] ^= 0x10;
                true
            };
            small.with(name, &format!("a flip at {at}"), flip, || {
                assert!(small.check_restores() >= right);
            });
        }
        for keep in [0, 1, len / 2, len - 1] {
            let cut = |bytes: &mut Vec<u8>| {
                bytes.truncate(keep);
                true
            };
            small.with(name, &format!("cut to {keep}"), cut, || {
                assert!(small.is_named(name));
                assert!(small.check_restores() >= right);
            });
        }
        let extend = |bytes: &mut Vec<u8>| {
            bytes.push(0);
            true
        };
        small.with(name, "extended", extend, || {
            assert!(small.is_named(name));
            assert!(small.check_restores() >= right);
        });
        let may_go = small.may_go(name);
        small.with(
            name,
            "lost",
            |_| false,
            || {
                assert!(may_go || small.is_missed(name));
                assert!(small.check_restores() >= right);
            },
        );
    }
    assert_eq!(small.check_restores(), 2);
}

/// Names that an object could have instead: one of its own kind, and one in another folder.
fn other_names(name: ObjectName) -> [ObjectName; 2] {
    let session = SessionId::from_bytes([9; 16]);
    let pack = ObjectName::Pack(PackId::from_bytes([9; 32]));
    let segment = ObjectName::Segment(SegmentId::from_bytes([9; 32]));
    let (outcome, tombstone) = (ObjectName::Outcome(session), ObjectName::Tombstone(session));
    match name {
        ObjectName::Pack(_) => [pack, segment],
        ObjectName::Segment(_) => [segment, pack],
        ObjectName::Outcome(_) => [outcome, tombstone],
        ObjectName::Tombstone(_) => [tombstone, outcome],
        ObjectName::Session(_) => [ObjectName::Session(session), outcome],
        ObjectName::Mark(_) => [ObjectName::Mark(session), tombstone],
        ObjectName::Damage(..) => {
            [ObjectName::Damage(PackId::from_bytes([9; 32]), session), ObjectName::Mark(session)]
        }
        _ => [ObjectName::Key(session), ObjectName::Reserve],
    }
}

#[test]
fn a_renamed_object_is_found() {
    let small = Small::full();
    for name in small.objects() {
        for other in other_names(name) {
            let may_go = small.may_go(name);
            let original = small.storage.get(name, u64::MAX).unwrap();
            let taken = small.storage.get(other, u64::MAX).ok();
            small.storage.tamper(name, |_| None);
            small.storage.replace(other, &original).unwrap();
            // of one that only stands for something that is over, nothing is missed
            assert!(may_go || small.is_missed(name), "{name} as {other}");
            small.check_restores();
            small.storage.tamper(other, |_| taken);
            small.storage.put_new(name, &original).unwrap();
        }
    }
    assert!(!small.is_found());
    assert_eq!(small.check_restores(), 2);
}

#[test]
fn the_loss_of_any_one_object_of_metadata_loses_no_point() {
    let small = Small::new();
    for name in small.objects() {
        let repository = small.open().unwrap();
        let is_metadata = match name {
            ObjectName::Config | ObjectName::Segment(_) => true,
            ObjectName::Pack(id) => {
                let len = small.storage.len(name).unwrap();
                let (header, _) = repository.read_pack_table(id, len).unwrap();
                header.kind == vmkeep::format::pack::PackKind::Metadata
            }
            _ => false,
        };
        if is_metadata {
            small.with(
                name,
                "lost",
                |_| false,
                || {
                    assert!(small.is_found());
                    assert_eq!(small.check_restores(), 2);
                },
            );
        }
    }
}

/// A repository is opened by either of its two configs, whatever is wrong with the other one, and `repair index` puts it
/// anew.
#[test]
fn one_config_is_enough() {
    let small = Small::new();
    let original = small.storage.get(ObjectName::Config, u64::MAX).unwrap();
    for (name, other) in
        [(ObjectName::Config, ObjectName::ConfigCopy), (ObjectName::ConfigCopy, ObjectName::Config)]
    {
        let damages = [None, Some(0), Some(original.len() / 2), Some(original.len() - 1)];
        let flips = (0..original.len()).map(|at| {
            let mut bytes = original.clone();
            bytes[at] ^= 1 << (at % 8);
            Some(bytes)
        });
        let cuts = damages.map(|keep| keep.map(|keep| original[..keep].to_vec()));
        for damaged in cuts.into_iter().chain(flips) {
            let is_lost = damaged.is_none();
            small.storage.delete(name).unwrap();
            damaged.iter().for_each(|bytes| small.storage.put_new(name, bytes).unwrap());
            // a copy that is not there is none that is damaged: repositories began without one
            assert_eq!(small.is_found(), name == ObjectName::Config || !is_lost);
            let monitor = Recorder::new();
            let repository = small.open_with(&monitor).unwrap();
            assert_eq!(!monitor.warnings().is_empty(), name == ObjectName::Config, "{name}");
            let planned = repair_index(&repository, true, &Recorder::new()).unwrap();
            assert_eq!(small.storage.len(name).is_err(), is_lost, "a dry run put something");
            let report = repair_index(&repository, false, &Recorder::new()).unwrap();
            assert_eq!((planned.configs, report.configs), (vec![name.to_string()], vec![name.to_string()]));
            assert_eq!(small.storage.get(name, u64::MAX).unwrap(), original);
            assert!(!small.is_found());
        }
        // without either, or with both damaged, it is not opened, and nothing is made in its place
        small.storage.delete(name).unwrap();
        let again =
            || Repository::create(Box::new(small.storage.clone()), &CreateOptions::default(), &environment());
        assert!(matches!(again(), Err(Error::Exists { .. })));
        small.storage.tamper(other, |bytes| Some(bytes[1..].to_vec()));
        assert!(matches!(small.open(), Err(Error::Malformed { .. })));
        assert!(matches!(again(), Err(Error::Exists { .. })));
        small.storage.delete(other).unwrap();
        assert!(matches!(small.open(), Err(Error::NoRepository { .. })));
        assert!(matches!(again(), Err(Error::Refused { .. })));
        assert!(small.storage.len(ObjectName::Config).is_err(), "made over a repository");
        small.storage.put_new(name, &original).unwrap();
        // the next prune puts the other one
        prune(&small.open().unwrap(), &PruneOptions::default(), &Recorder::new()).unwrap();
        assert_eq!(small.storage.get(other, u64::MAX).unwrap(), original);
        assert_eq!(small.check_restores(), 2);
    }
}

/// Version 1 began without the copy: that it is not there is no damage.
#[test]
fn a_repository_without_a_copy_of_config_is_sound_and_gets_one() {
    for name in ["smallest", "two_points"] {
        let root = fixtures::copy(name);
        let copy = root.path().join("config.copy");
        assert!(!copy.exists(), "a golden repository has changed");
        let storage = Box::new(LocalStorage::open(root.path()).unwrap());
        let monitor = Recorder::new();
        let repository = Repository::open(storage, None, &fixtures::environment(), &monitor).unwrap();
        let options = VerifyOptions { level: VerifyLevel::Restore, ..VerifyOptions::default() };
        let report = verify(&repository, &options, &monitor).unwrap();
        assert_eq!((report.findings, monitor.warnings()), (vec![], vec![]), "{name}");
        prune(&repository, &PruneOptions { dry_run: true, ..PruneOptions::default() }, &monitor).unwrap();
        assert!(!copy.exists(), "a dry run put it");
        prune(&repository, &PruneOptions::default(), &monitor).unwrap();
        assert_eq!(std::fs::read(copy).unwrap(), std::fs::read(root.path().join("config")).unwrap());
        assert_eq!(verify(&repository, &options, &monitor).unwrap().findings, []);
    }
}

/// Of two that are sound and differ nobody but its owner knows which one is wrong.
#[test]
fn a_config_of_another_repository_is_found_and_not_taken_away() {
    let (small, other) = (Small::new(), Small::new());
    for name in [ObjectName::ConfigCopy, ObjectName::Config] {
        let original = small.storage.get(name, u64::MAX).unwrap();
        let foreign = other.storage.get(name, u64::MAX).unwrap();
        small.storage.tamper(name, |_| Some(foreign.clone()));
        assert!(small.is_found(), "{name}");
        let repository = small.open().unwrap();
        assert!(matches!(repair_index(&repository, false, &Recorder::new()), Err(Error::Malformed { .. })));
        drop(prune(&repository, &PruneOptions::default(), &Recorder::new()));
        assert_eq!(small.storage.get(name, u64::MAX).unwrap(), foreign);
        small.storage.tamper(name, |_| Some(original));
        assert_eq!(small.check_restores(), 2);
    }
}

/// An outcome that is gone leaves a point that nobody lists. It is noticed, and made anew from a copy of the record.
#[test]
fn a_lost_outcome_is_noticed_and_made_anew() {
    let small = Small::new();
    let outcomes: Vec<ObjectName> =
        small.objects().into_iter().filter(|name| name.folder() == Some(Folder::Outcomes)).collect();
    for name in outcomes {
        small.storage.tamper(name, |_| None);
        assert_eq!(small.check_restores(), 1);
        assert!(small.is_found(), "{name} is gone, and nobody notices");
        let repository = small.open().unwrap();
        // whoever does not look first loses nothing by a prune either
        assert!(prune(&repository, &PruneOptions::default(), &Recorder::new()).is_err());
        let report = repair_points(&repository, false, &Recorder::new()).unwrap();
        assert_eq!(report.brought_back.len(), 1);
        assert_eq!(small.check_restores(), 2);
        assert!(!small.is_found());
    }
}

/// An outcome that cannot be read is found and made anew from the copy of the record; what made no point is put away, so that
/// a prune can go on.
#[test]
fn an_unreadable_outcome_is_made_anew_or_removed() {
    let small = Small::new();
    let points: Vec<ObjectName> =
        small.objects().into_iter().filter(|name| name.folder() == Some(Folder::Outcomes)).collect();
    let break_it = |name| {
        small.storage.tamper(name, |mut bytes| {
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            Some(bytes)
        });
        assert!(small.is_found(), "{name}");
        let repository = small.open().unwrap();
        assert!(prune(&repository, &PruneOptions::default(), &Recorder::new()).is_err(), "{name}");
        repair_points(&repository, false, &Recorder::new()).unwrap()
    };
    for name in points {
        assert_eq!(break_it(name).brought_back.len(), 1, "{name}");
        assert_eq!(small.check_restores(), 2);
    }
    // a session that stored nothing: of a tombstone, that is, and the tombstone itself
    let repository = small.open().unwrap();
    let before: Vec<ObjectName> = small.objects();
    let oldest = repository.catalog(&Recorder::new()).unwrap().points()[0].record.id;
    forget(&repository, &[oldest], "a test", false, &Recorder::new()).unwrap();
    let new: Vec<ObjectName> = small.objects().into_iter().filter(|name| !before.contains(name)).collect();
    assert_eq!(new.len(), 2, "{new:?}");
    let tombstone = new.iter().find(|name| name.folder() == Some(Folder::Tombstones)).unwrap();
    assert_eq!(break_it(*tombstone).removed, [tombstone.to_string()]);
    let outcome = new.iter().find(|name| name.folder() == Some(Folder::Outcomes)).unwrap();
    assert_eq!(break_it(*outcome).removed, [outcome.to_string()]);
    let ObjectName::Outcome(session) = *outcome else { panic!("{outcome}") };
    let ended = small.open().unwrap().catalog(&Recorder::new()).unwrap().ended(session);
    assert_eq!(ended, Some(Ended::Aborted), "somebody else could use the name");
    assert_eq!(small.check_restores(), 2);
    prune(&small.open().unwrap(), &PruneOptions::default(), &Recorder::new()).unwrap();
    assert!(!small.is_found());
}

/// What a verify says is lost is what cannot be restored: no less and no more. What only a segment knew is found in the
/// tables of packs.
#[test]
fn damage_is_localised_as_a_restore_by_force_finds_it() {
    let small = Small::new();
    let mut compared = 0;
    let is_pack = |name: ObjectName| matches!(name, ObjectName::Pack(_));
    let content = |name: &ObjectName| is_pack(*name) || matches!(name, ObjectName::Segment(_));
    for name in small.objects().into_iter().filter(content) {
        // whichever byte it is, a segment cannot be read
        let step = if is_long() || is_pack(name) { 1 } else { 31 };
        let len = small.storage.len(name).unwrap() as usize;
        for at in (0..len).step_by(step).map(Some).chain([None]) {
            let damage = |bytes: &mut Vec<u8>| {
                if let Some(at) = at {
                    bytes[at] ^= 0x20;
                }
                at.is_some()
            };
            small.with(name, &format!("{at:?}"), damage, || {
                let repository = small.open().unwrap();
                let options = VerifyOptions { level: VerifyLevel::Data, ..VerifyOptions::default() };
                let report = verify(&repository, &options, &Recorder::new()).unwrap();
                assert!(!report.findings.is_empty());
                let catalog = repository.catalog(&Recorder::new()).unwrap();
                for entry in catalog.points() {
                    let lost = small.lost_by_force(&repository, &entry.record);
                    let mut said: Vec<(u64, u64)> = report
                        .findings
                        .iter()
                        .flat_map(|finding| &finding.affected)
                        .filter(|affected| affected.point == entry.record.id)
                        .flat_map(|affected| affected.ranges.clone())
                        .collect();
                    said.sort_unstable();
                    assert_eq!(joined(&said), joined(&lost), "{name} at {at:?}");
                }
            });
            compared += 1;
        }
    }
    assert!(compared > 12_000, "{compared}");
}

fn joined(ranges: &[(u64, u64)]) -> RangeSet {
    ranges.iter().filter_map(|(start, len)| ByteRange::new(*start, *len)).collect()
}

#[test]
fn swapped_objects_are_found() {
    let small = Small::full();
    let objects = small.objects();
    let mut swapped = 0;
    for (number, a) in objects.iter().copied().enumerate() {
        for b in objects[number + 1..].iter().copied() {
            // the two configs are the same
            let is_config = a == ObjectName::Config && b == ObjectName::ConfigCopy;
            // two that may both go say nothing of a point, nor do two that only say that their sessions have committed
            let says_nothing = (small.may_go(a) && small.may_go(b)) || (small.is_done(a) && small.is_done(b));
            if is_config || a.folder() != b.folder() || says_nothing {
                continue;
            }
            let (bytes_a, bytes_b) =
                (small.storage.get(a, u64::MAX).unwrap(), small.storage.get(b, u64::MAX).unwrap());
            small.storage.tamper(a, |_| Some(bytes_b.clone()));
            small.storage.tamper(b, |_| Some(bytes_a.clone()));
            assert!(small.is_missed(a) || small.is_missed(b), "{a} and {b}");
            small.check_restores();
            small.storage.tamper(a, |_| Some(bytes_a));
            small.storage.tamper(b, |_| Some(bytes_b));
            swapped += 1;
        }
    }
    assert!(swapped > 20, "{swapped}");
    assert!(!small.is_found());
}

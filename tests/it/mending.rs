//! What is done about damage: an object that the disk does not give any more, repairs and the prune behind them, and an
//! index that remembers what was there.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmkeep::error::{Error, Result};
use vmkeep::format::name::{Folder, ObjectName};
use vmkeep::id::PointId;
use vmkeep::monitor::Recorder;
use vmkeep::ops::forget::{forget, unhold};
use vmkeep::ops::prune::{PruneOptions, prune};
use vmkeep::ops::repair::{PacksOptions, repair_index, repair_packs, repair_points};
use vmkeep::ops::verify::{VerifyLevel, VerifyOptions, VerifyReport, verify};
use vmkeep::repo::Repository;
use vmkeep::storage::memory::MemoryStorage;
use vmkeep::storage::{Listed, Storage};

use crate::damage::{Small, environment};

/// A storage on a disk with a bad sector: one object cannot be read until it is written anew.
#[derive(Debug, Clone)]
struct BadSector {
    inner: MemoryStorage,
    object: ObjectName,
    is_bad: Arc<AtomicBool>,
}

impl BadSector {
    fn new(inner: MemoryStorage, object: ObjectName) -> Self {
        Self { inner, object, is_bad: Arc::new(AtomicBool::new(true)) }
    }

    fn check(&self, name: ObjectName) -> Result<()> {
        match name == self.object && self.is_bad.load(Ordering::SeqCst) {
            true => Err(Error::io("read", name.to_string(), std::io::Error::from_raw_os_error(5))),
            false => Ok(()),
        }
    }

    /// It lies elsewhere now, or not at all.
    fn moved(&self, name: ObjectName) {
        if name == self.object {
            self.is_bad.store(false, Ordering::SeqCst);
        }
    }
}

impl Storage for BadSector {
    fn url(&self) -> String {
        "bad sector:".into()
    }

    fn put_new(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        self.inner.put_new(name, bytes)
    }

    fn replace(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        self.inner.replace(name, bytes)?;
        self.moved(name);
        Ok(())
    }

    fn get(&self, name: ObjectName, max_len: u64) -> Result<Vec<u8>> {
        self.check(name)?;
        self.inner.get(name, max_len)
    }

    fn get_range(&self, name: ObjectName, offset: u64, len: u64) -> Result<Vec<u8>> {
        self.check(name)?;
        self.inner.get_range(name, offset, len)
    }

    fn len(&self, name: ObjectName) -> Result<u64> {
        self.inner.len(name)
    }

    fn list(&self, folder: Folder) -> Result<Vec<Listed>> {
        self.inner.list(folder)
    }

    fn delete(&self, name: ObjectName) -> Result<()> {
        self.inner.delete(name)?;
        self.moved(name);
        Ok(())
    }

    fn sync_deletes(&self, folder: Folder) -> Result<()> {
        self.inner.sync_deletes(folder)
    }
}

fn open(storage: impl Storage + 'static, cache: Option<&Path>) -> Repository {
    Repository::open(Box::new(storage), cache, &environment(), &Recorder::new()).unwrap()
}

fn look(repository: &Repository) -> VerifyReport {
    let options = VerifyOptions { level: VerifyLevel::Data, ..VerifyOptions::default() };
    verify(repository, &options, &Recorder::new()).unwrap()
}

/// Mends, once more if the mark of the killed prune was in the way: the first prune takes it away.
fn mend(storage: impl Storage + Clone + 'static) -> Result<()> {
    let is_marked = !storage.list(Folder::Marks)?.is_empty();
    match mend_once(storage.clone()) {
        Err(_) if is_marked => {
            drop(prune(&open(storage.clone(), None), &PruneOptions::default(), &Recorder::new()));
            mend_once(storage)
        }
        mended => mended,
    }
}

/// Has every repair done, then a prune to the last byte. What a repair cannot bring back is forgotten first, as it says.
fn mend_once(storage: impl Storage + Clone + 'static) -> Result<()> {
    let (repository, silent) = (open(storage, None), Recorder::new());
    let options = VerifyOptions { level: VerifyLevel::Data, record: true, ..VerifyOptions::default() };
    verify(&repository, &options, &silent)?;
    repair_index(&repository, false, &silent)?;
    let lost =
        repair_packs(&repository, &PacksOptions { from: None, from_disk: None, dry_run: false }, &silent)?
            .lost;
    let report = repair_points(&repository, false, &silent)?;
    // what the index did not know is known now
    if let Some(left) = report.left.first() {
        return Err(Error::Damaged(format!("{left} is left")));
    }
    if lost > 0 {
        let damaged: Vec<PointId> = report.points.iter().map(|point| point.point).collect();
        damaged.iter().for_each(|id| drop(unhold(&repository, *id, &silent)));
        forget(&repository, &damaged, "lost something", false, &silent)?;
    }
    let options = PruneOptions { max_unused_permille: 0, ..PruneOptions::default() };
    let planned = prune(&repository, &PruneOptions { dry_run: true, ..options.clone() }, &silent);
    let pruned = prune(&repository, &options, &silent)?;
    let planned = planned?;
    assert_eq!((planned.packs, planned.dropped_points), (pruned.packs, pruned.dropped_points));
    let findings = look(&repository).findings;
    // a repaired point says what is lost of it, for ever
    assert!(findings.is_empty() || lost > 0, "{findings:?}");
    Ok(())
}

/// No command fails for an object that cannot be read as long as it can do without; verify names it; it can be repaired.
#[test]
fn a_bad_sector_is_named_and_harms_one_object_only() {
    let small = Small::full();
    for name in small.objects() {
        let right = small.right_without(name);
        let storage = BadSector::new(small.storage.snapshot(), name);
        let report = look(&open(storage.clone(), None));
        assert!(
            report.findings.iter().any(|finding| finding.object == name.to_string()),
            "{name} is not named"
        );
        assert!(small.check_restores_of(&open(storage.clone(), None)) >= right, "{name}");
        if let Err(error) = mend(storage.clone()) {
            panic!("{name} cannot be repaired: {error:?}");
        }
        assert!(small.check_restores_of(&open(storage, None)) >= right, "{name}, once repaired");
    }
}

#[test]
fn whatever_was_damaged_a_prune_goes_on_once_all_is_repaired() {
    let small = Small::full();
    for name in small.objects() {
        let (right, original) = (small.right_without(name), small.storage.get(name, u64::MAX).unwrap());
        let mut flipped = original.clone();
        flipped[original.len() / 2] ^= 1;
        let cut = original[..original.len() / 2].to_vec();
        let mut grown = original.clone();
        grown.resize(original.len() + (20 << 20), 0);
        for (how, damaged) in
            [("flipped", Some(flipped)), ("cut", Some(cut)), ("grown", Some(grown)), ("lost", None)]
        {
            let storage = small.storage.snapshot();
            storage.tamper(name, |_| damaged);
            if let Err(error) = mend(storage.clone()) {
                panic!("{name}, {how}, cannot be repaired: {error:?}");
            }
            let found = small.check_restores_of(&open(storage, None));
            assert!(found >= right, "{name}, {how}: {found} points are right");
        }
    }
}

/// An index on disk remembers what is damaged since. What is found, and what is said to be lost, is the same.
#[test]
fn a_warm_index_hides_no_damage() {
    let small = Small::full();
    let (warm, used) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    open(small.storage.clone(), Some(warm.path())).refresh(&Recorder::new()).unwrap();
    let cache = used.path().join("cache");
    let mut compared = 0;
    let mut compare = |storage: &MemoryStorage, what: &str| {
        std::fs::remove_dir_all(&cache).ok();
        let copied =
            std::process::Command::new("cp").arg("-r").arg(warm.path()).arg(&cache).status().unwrap();
        assert!(copied.success());
        let (cold, warm) = (look(&open(storage.clone(), None)), look(&open(storage.clone(), Some(&cache))));
        assert_eq!(cold.damaged_points, warm.damaged_points, "{what}");
        assert_eq!(cold.findings, warm.findings, "{what}");
        compared += 1;
    };
    let flip = |storage: &MemoryStorage, name: ObjectName| {
        storage.tamper(name, |mut bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            Some(bytes)
        });
    };
    let segments: Vec<ObjectName> =
        small.objects().into_iter().filter(|name| matches!(name, ObjectName::Segment(_))).collect();
    for name in small.objects() {
        for lost in [false, true] {
            let storage = small.storage.snapshot();
            if lost {
                storage.tamper(name, |_| None)
            } else {
                flip(&storage, name)
            }
            compare(&storage, &format!("{name}, {}", if lost { "lost" } else { "flipped" }));
        }
        // a segment that listed the pack does not tell any more what it held
        for segment in segments.iter().filter(|_| matches!(name, ObjectName::Pack(_))) {
            let storage = small.storage.snapshot();
            flip(&storage, name);
            flip(&storage, *segment);
            compare(&storage, &format!("{name} and {segment}"));
        }
    }
    assert!(compared > 50, "{compared}");
}

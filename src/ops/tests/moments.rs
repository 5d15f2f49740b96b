//! Moments that random schedules hardly meet, made by hand, and what no schedule can show: damage, a failed sync, a
//! listing that lags. Each is survived, and is not once the rule for it is taken away.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::dead_environment;
use super::schedule::{before, environment_of, prune_all, text_of};
use crate::error::{Error, Result};
use crate::format::name::{Folder, ObjectName};
use crate::format::pack::{PACK_HEADER_LEN, PackHeader, PackKind};
use crate::format::point::Level;
use crate::id::SessionId;
use crate::monitor::Recorder;
use crate::ops::RequestedLevel;
use crate::ops::backup::tests::{Kept, World, write};
use crate::ops::forget::{forget, undelete};
use crate::ops::prune::{PruneOptions, prune};
use crate::ops::repair::repair_points;
use crate::ops::verify::{VerifyLevel, VerifyOptions, verify};
use crate::repo::rules::Rule;
use crate::repo::{Environment, Repository, Timing};
use crate::storage::fault::{CrashStorage, Flaw, Survival};
use crate::storage::hooked::HookedStorage;
use crate::storage::memory::MemoryStorage;
use crate::storage::{Listed, Storage};

fn open(storage: impl Storage + 'static, rule: Option<Rule>) -> Repository {
    Repository::open(Box::new(storage), None, &environment_of(rule), &Recorder::new()).unwrap()
}

/// Reads points as another process would.
fn read(storage: &MemoryStorage, kept: Vec<Kept>) -> Result<()> {
    World::resume(open(storage.clone(), None), &BTreeMap::new(), kept).try_reads()
}

/// Returns what a prune leaves that is killed while its mark is there: the last such moment of which `holds` is true.
fn killed_prune(storage: &MemoryStorage, holds: impl Fn(&MemoryStorage) -> bool) -> MemoryStorage {
    let cut = CrashStorage::on(storage, Flaw::None);
    // it takes whoever is at work for dead
    let impatient = Timing { dead_after: Duration::ZERO, ..environment_of(None).timing };
    let environment = Environment { timing: impatient, ..dead_environment() };
    let pruning = Repository::open(Box::new(cut.clone()), None, &environment, &Recorder::new()).unwrap();
    prune_all(&pruning).unwrap();
    let is_marked = |image: &MemoryStorage| !image.list(Folder::Marks).unwrap().is_empty();
    let mut images = (0..cut.len()).rev().map(|at| cut.image(at, Survival::All));
    images.find(|image| is_marked(image) && holds(image)).unwrap()
}

/// Returns what a prune leaves that is killed when its sweep is decided and nothing is deleted yet.
fn decided(storage: &MemoryStorage) -> MemoryStorage {
    let folders = [Folder::Packs, Folder::Segments];
    let old: Vec<Listed> = folders.into_iter().flat_map(|folder| storage.list(folder).unwrap()).collect();
    killed_prune(storage, |image| old.iter().all(|listed| image.len(listed.name).is_ok()))
}

fn packs_of(storage: &MemoryStorage, kind: PackKind) -> Vec<ObjectName> {
    let is_kind = |listed: &Listed| {
        let header = storage.get_range(listed.name, 0, PACK_HEADER_LEN as u64).unwrap();
        PackHeader::decode(&header).unwrap().kind == kind
    };
    storage.list(Folder::Packs).unwrap().into_iter().filter(is_kind).map(|listed| listed.name).collect()
}

/// A sweep is decided when a backup begins, and is over when the backup has looked at packs and put one of its own.
fn sweep_meets_backup(rule: Option<Rule>) -> Result<()> {
    let before = before();
    let inner = decided(&before.storage);
    let pruning = inner.clone();
    let storage = HookedStorage::new(&inner).behind_put(move |name| {
        if let ObjectName::Pack(_) = name {
            carry_out(&pruning);
        }
        Ok(())
    });
    let mut world = World::resume(open(storage, rule), &before.forgotten[0].contents, Vec::new());
    world.try_backup(RequestedLevel::Auto)?;
    read(&inner, world.kept)
}

/// A sweep is decided when a backup begins, and is over when the backup has seen all but the packs.
#[test]
fn a_sweep_that_ends_behind_the_listings_is_noticed() {
    let before = before();
    let inner = decided(&before.storage);
    let pruning = inner.clone();
    let storage = HookedStorage::new(&inner).on_list(move |folder, listed| {
        if folder == Folder::Damage {
            carry_out(&pruning);
        }
        listed
    });
    let mut world = World::resume(open(storage, None), &before.forgotten[0].contents, Vec::new());
    world.try_backup(RequestedLevel::Auto).unwrap();
    read(&inner, world.kept).unwrap();
}

/// A sweep is decided when a backup begins, and is over when the backup lists the marks.
fn sweep_precedes_marks(rule: Option<Rule>) -> Result<()> {
    let before = before();
    let inner = decided(&before.storage);
    let pruning = inner.clone();
    let storage = HookedStorage::new(&inner).before_list(move |folder| {
        if folder == Folder::Marks {
            carry_out(&pruning);
        }
    });
    let mut world = World::resume(open(storage, rule), &before.forgotten[0].contents, Vec::new());
    world.try_backup(RequestedLevel::Auto)?;
    read(&inner, world.kept)
}

/// Ends a sweep that was decided.
fn carry_out(storage: &MemoryStorage) {
    // what is left to choose is too little to choose it: it does not wait for anybody
    drop(prune(&open(storage.clone(), None), &PruneOptions::default(), &Recorder::new()));
}

/// A prune comes as soon as an undelete has its outcome, before anything else is done.
fn prune_meets_undelete(rule: Option<Rule>) -> Result<()> {
    let storage = MemoryStorage::new();
    let mut world = World::on(storage.clone(), &[256 << 10]);
    for day in 0..2 {
        write(&mut world, 0, 160 << 10, day);
        world.backup(RequestedLevel::Auto);
    }
    let back = world.kept.remove(0);
    forget(&world.repository, &[back.id], "test", false, &Recorder::new())?;
    let pruning = storage.clone();
    let hooked = HookedStorage::new(&storage).behind_put(move |name| match name {
        ObjectName::Outcome(_) => prune_all(&open(pruning.clone(), None)).map(drop),
        _ => Ok(()),
    });
    undelete(&open(hooked, rule), back.id, &Recorder::new())?;
    read(&storage, vec![back])
}

/// A storage whose listings lag: a mark is there and its fence has passed, and a backup that begins does not see it.
fn listing_of_marks_lags(rule: Option<Rule>) -> Result<()> {
    let before = before();
    let inner = decided(&before.storage);
    let looks = AtomicU32::new(0);
    let storage = HookedStorage::new(&inner).on_list(move |folder, listed| {
        let lags = folder == Folder::Marks && looks.fetch_add(1, Ordering::SeqCst) == 0;
        if lags { Vec::new() } else { listed }
    });
    let mut world = World::resume(open(storage, rule), &before.forgotten[0].contents, Vec::new());
    match world.try_backup(RequestedLevel::Auto) {
        Err(Error::Busy { .. }) => {}
        made => drop(made?),
    }
    prune_all(&open(inner.clone(), None))?;
    read(&inner, world.kept)
}

/// A point is about to be swept and is not hidden any more: an undelete that was taken for dead has woken up, and takes
/// the tombstone away before it finds out.
fn swept_point_is_back(rule: Option<Rule>) -> Result<()> {
    let storage = MemoryStorage::new();
    let mut world = World::on(storage.clone(), &[256 << 10]);
    for day in 0..2 {
        write(&mut world, 0, 160 << 10, day);
        world.backup(RequestedLevel::Auto);
    }
    let newest = world.kept[1].id;
    forget(&world.repository, &[newest], "test", false, &Recorder::new())?;
    let inner = decided(&storage);
    for listed in inner.list(Folder::Tombstones)? {
        inner.delete(listed.name)?;
    }
    let mut world = World::resume(open(inner.clone(), rule), &world.contents(), Vec::new());
    world.try_backup(RequestedLevel::Auto)?;
    prune_all(&open(inner.clone(), None))?;
    read(&inner, world.kept)
}

/// Another prune was killed when it had deleted packs and not yet the points; an undelete comes as soon as its mark is
/// gone.
fn undelete_meets_half_a_sweep(rule: Option<Rule>) -> Result<()> {
    let before = before();
    let inner = killed_prune(&before.storage, |image| {
        let name = |kept: &Kept| ObjectName::Outcome(SessionId::from(kept.id));
        before.forgotten.iter().all(|kept| image.len(name(kept)).is_ok())
    });
    let back: Arc<Mutex<Vec<Kept>>> = Arc::default();
    let (other, found) = (inner.clone(), Arc::clone(&back));
    let storage = HookedStorage::new(&inner).on_list(move |folder, listed| {
        if folder == Folder::Marks && listed.is_empty() && found.lock().unwrap().is_empty() {
            let repository = open(other.clone(), None);
            let undeleted = before
                .forgotten
                .iter()
                .filter(|kept| undelete(&repository, kept.id, &Recorder::new()).is_ok());
            found.lock().unwrap().extend(undeleted.cloned());
        }
        listed
    });
    let pruned = prune_all(&open(storage, rule));
    read(&inner, std::mem::take(&mut *back.lock().unwrap()))?;
    pruned.map(drop)
}

/// Content comes back whose only copy is recorded as damaged, on a disk that is compared with nothing.
fn damaged_content_comes_back(rule: Option<Rule>) -> Result<()> {
    let storage = MemoryStorage::new();
    let mut world = World::on(storage.clone(), &[256 << 10]);
    write(&mut world, 0, 160 << 10, 1);
    world.backup(RequestedLevel::Is(Level::Full));
    for name in packs_of(&storage, PackKind::Data) {
        storage.tamper(name, |mut bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            Some(bytes)
        });
    }
    let options = VerifyOptions { level: VerifyLevel::Data, record: true, ..VerifyOptions::default() };
    assert!(!verify(&world.repository, &options, &Recorder::new())?.damaged_points.is_empty());
    let contents = [("vdb".to_owned(), world.content(0).to_vec())].into_iter().collect();
    let mut world = World::resume(open(storage.clone(), rule), &contents, Vec::new());
    world.try_backup(RequestedLevel::Auto)?;
    read(&storage, world.kept)
}

/// Content comes back whose pack is gone, on a disk that is compared with nothing.
fn lost_content_comes_back(rule: Option<Rule>) -> Result<()> {
    let storage = MemoryStorage::new();
    let mut world = World::on(storage.clone(), &[256 << 10]);
    write(&mut world, 0, 160 << 10, 1);
    world.backup(RequestedLevel::Is(Level::Full));
    for name in packs_of(&storage, PackKind::Data) {
        storage.tamper(name, |_| None);
    }
    let contents = [("vdb".to_owned(), world.content(0).to_vec())].into_iter().collect();
    let mut world = World::resume(open(storage.clone(), rule), &contents, Vec::new());
    world.try_backup(RequestedLevel::Auto)?;
    read(&storage, world.kept)
}

/// The outcome of a prune is lost, which makes count what lists content that comes back; the index knows that still.
fn outcome_of_a_prune_is_lost(rule: Option<Rule>) -> Result<()> {
    let before = before();
    let storage = before.storage.snapshot();
    let repository = open(storage.clone(), rule);
    prune_all(&repository)?;
    repository.refresh(&Recorder::new())?;
    let catalog = repository.catalog(&Recorder::new())?;
    let ids: Vec<_> = catalog.points().iter().map(|entry| entry.record.id).collect();
    forget(&repository, &ids, "test", false, &Recorder::new())?;
    for id in repository.segments()? {
        let owner = repository.load_segment(id)?.owner;
        if !ids.iter().any(|id| SessionId::from(*id) == owner) {
            storage.tamper(ObjectName::Outcome(owner), |_| None);
        }
    }
    let contents = &before.kept.last().unwrap().contents;
    let mut world = World::resume(repository, contents, Vec::new());
    world.try_backup(RequestedLevel::Auto)?;
    prune_all(&open(storage.clone(), None))?;
    read(&storage, world.kept)
}

/// Each pack of metadata is lost in turn.
fn pack_of_metadata_is_lost(rule: Option<Rule>) -> Result<()> {
    let storage = MemoryStorage::new();
    let mut world = World::on(storage.clone(), &[256 << 10]);
    write(&mut world, 0, 160 << 10, 1);
    let mut world = World::resume(open(storage.clone(), rule), &world.contents(), Vec::new());
    world.try_backup(RequestedLevel::Auto)?;
    let packs = packs_of(&storage, PackKind::Metadata);
    assert!(!packs.is_empty());
    packs.into_iter().try_for_each(|name| {
        let image = storage.snapshot();
        image.tamper(name, |_| None);
        read(&image, world.kept.clone())
    })
}

/// The sync of an outcome fails, and then the power does.
fn sync_of_outcome_fails(rule: Option<Rule>) -> Result<()> {
    let before = before();
    let inner = before.storage.snapshot();
    let storage = HookedStorage::new(&inner).behind_put(|name| match name {
        ObjectName::Outcome(_) => Err(Error::io("sync", name.to_string(), std::io::Error::other("injected"))),
        _ => Ok(()),
    });
    let mut world = World::resume(open(storage, rule), &before.forgotten[0].contents, Vec::new());
    match world.try_backup(RequestedLevel::Auto) {
        Err(error) if error.is_failed_sync() => {}
        made => drop(made?),
    }
    for kept in &world.kept {
        inner.tamper(ObjectName::Outcome(SessionId::from(kept.id)), |_| None);
    }
    read(&inner, world.kept)
}

/// A repair that slept: behind its look at the points the damaged one is forgotten, and a prune that took the repair for
/// dead has decided to delete all that the point had.
fn prune_meets_repair(rule: Option<Rule>) -> Result<()> {
    let inner = MemoryStorage::new();
    let mut world = World::on(inner.clone(), &[4 << 20]);
    for day in 0..3u64 {
        write(&mut world, 0, 4 << 20, day);
        world.backup(RequestedLevel::Is(if day == 0 { Level::Full } else { Level::Incremental }));
        if day == 0 {
            // one frame of several
            let packs = inner.list(Folder::Packs)?;
            inner.tamper(packs.iter().max_by_key(|listed| listed.len).unwrap().name, |mut bytes| {
                bytes[4096] ^= 1;
                Some(bytes)
            });
        }
    }
    let silent = Recorder::new();
    let options = VerifyOptions { level: VerifyLevel::Data, record: true, ..VerifyOptions::default() };
    assert_eq!(verify(&world.repository, &options, &silent)?.damaged_points, [world.kept[0].id]);
    let damaged = world.kept.remove(0).id;
    let (storage, slept) = (inner.clone(), AtomicBool::new(false));
    let hooked = HookedStorage::new(&inner).on_list(move |folder, listed| {
        if folder == Folder::Packs && !slept.swap(true, Ordering::SeqCst) {
            let forgetting = open(storage.clone(), None);
            forget(&forgetting, &[damaged], "test", false, &Recorder::new()).unwrap();
            let image = decided(&storage);
            storage.set_for_test(image.objects_for_test().into_iter());
        }
        listed
    });
    let repaired = repair_points(&open(hooked, rule), false, &silent);
    assert!(matches!(repaired, Err(Error::Fenced { .. })), "it was registered: {repaired:?}");
    let after = open(inner, None);
    prune(&after, &PruneOptions::default(), &silent)?;
    let damaged = verify(&after, &VerifyOptions::default(), &silent)?.damaged_points;
    if !damaged.is_empty() {
        return Err(Error::Damaged(format!("points {damaged:?} rely on what is gone")));
    }
    let world = World::resume(after, &BTreeMap::new(), world.kept);
    assert_eq!(world.repository.catalog(&silent)?.points().len(), world.kept.len());
    world.try_reads()
}

type Moment = fn(Option<Rule>) -> Result<()>;

const MOMENTS: [(Rule, Moment); 12] = [
    (Rule::HeedMarks, sweep_meets_backup),
    (Rule::HeedMarkedBases, swept_point_is_back),
    (Rule::MarksBeforeSegments, sweep_precedes_marks),
    (Rule::AppliedMustCount, outcome_of_a_prune_is_lost),
    (Rule::HitMustBeThere, lost_content_comes_back),
    (Rule::HeedDamage, damaged_content_comes_back),
    (Rule::MetadataTwice, pack_of_metadata_is_lost),
    (Rule::LookAgain, listing_of_marks_lags),
    (Rule::DoubtFailedSync, sync_of_outcome_fails),
    (Rule::FinishSweeps, undelete_meets_half_a_sweep),
    (Rule::RepairOfPointsThatStay, prune_meets_repair),
    (Rule::UndeleteBeforeOutcome, prune_meets_undelete),
];

/// The rules that these moments miss.
pub(super) const RULES: [Rule; MOMENTS.len()] = {
    let mut rules = [Rule::LookAgain; MOMENTS.len()];
    let mut at = 0;
    while at < rules.len() {
        rules[at] = MOMENTS[at].0;
        at += 1;
    }
    rules
};

#[test]
fn each_moment_is_survived_by_its_rule_only() {
    for (rule, moment) in MOMENTS {
        if let Err(error) = moment(None) {
            panic!("the moment of {rule:?} is not survived: {error:?}");
        }
        let Err(panic) = catch_unwind(AssertUnwindSafe(|| moment(Some(rule)).unwrap())) else {
            panic!("{rule:?} was taken away, and nothing went wrong");
        };
        let how = text_of(panic.as_ref());
        println!("{rule:?}: {}", how.lines().next().unwrap_or_default());
    }
}

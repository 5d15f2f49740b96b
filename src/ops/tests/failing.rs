//! The n-th operation of the storage goes wrong, for every n and in every way: nothing that succeeded is untrue, nothing
//! that was there is lost, and the next run is fine.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::dead_environment;
use super::schedule::text_of;
use crate::error::{Error, Result};
use crate::format::name::{Folder, ObjectName};
use crate::format::pack::{PACK_HEADER_LEN, PackHeader, PackKind};
use crate::format::point::Level;
use crate::id::PointId;
use crate::monitor::Recorder;
use crate::ops::RequestedLevel;
use crate::ops::backup::tests::{Kept, World, environment, write};
use crate::ops::forget::{forget, hold, undelete, unhold};
use crate::ops::prune::{PruneOptions, prune};
use crate::ops::repair::{PacksOptions, repair_index, repair_packs, repair_points};
use crate::ops::verify::{VerifyLevel, VerifyOptions, VerifyReport, verify};
use crate::repo::rules::Rule;
use crate::repo::{CreateOptions, Environment, Repository, Timing};
use crate::storage::Storage;
use crate::storage::fault::{FailingStorage, Fault};
use crate::storage::memory::MemoryStorage;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Create,
    Backup,
    Forget,
    Hold,
    Unhold,
    Undelete,
    Prune,
    Verify,
    Restore,
    RepairIndex,
    RepairPacks,
    RepairPoints,
}

const OPERATIONS: [Operation; 12] = [
    Operation::Create,
    Operation::Backup,
    Operation::Forget,
    Operation::Hold,
    Operation::Unhold,
    Operation::Undelete,
    Operation::Prune,
    Operation::Verify,
    Operation::Restore,
    Operation::RepairIndex,
    Operation::RepairPacks,
    Operation::RepairPoints,
];

/// A repository of four points, one of them forgotten, one held.
struct Before {
    storage: MemoryStorage,
    contents: BTreeMap<String, Vec<u8>>,
    kept: Vec<Kept>,
    forgotten: Kept,
}

fn before() -> Before {
    let storage = MemoryStorage::new();
    let mut world = World::on(storage.clone(), &[512 << 10]);
    for day in 0..4u64 {
        write(&mut world, (day % 3) * (90 << 10), 70 << 10, day);
        // of the first point's pack the first kept point alone needs a part: a prune writes that anew
        if day < 2 {
            write(&mut world, 300 << 10, 40 << 10, 50 + day);
        }
        if day % 2 == 0 && day < 3 {
            write(&mut world, 420 << 10, 80 << 10, 60 + day);
        }
        world.backup(RequestedLevel::Is(if day == 0 { Level::Full } else { Level::Incremental }));
    }
    let silent = Recorder::new();
    let forgotten = world.kept.remove(0);
    forget(&world.repository, &[forgotten.id], "test", false, &silent).unwrap();
    hold(&world.repository, world.kept[1].id, None, "test", &silent).unwrap();
    write(&mut world, 300 << 10, 40 << 10, 9);
    Before { storage, contents: world.contents(), kept: world.kept, forgotten }
}

/// What an operation said that it did.
enum Done {
    Made(Box<Kept>),
    Verified(Box<VerifyReport>),
    Other,
}

fn run(operation: Operation, before: &Before, storage: FailingStorage, rule: Option<Rule>) -> Result<Done> {
    let silent = Recorder::new();
    let timing = Timing { broken: rule, ..Timing::default() };
    let environment = Environment { timing, ..dead_environment() };
    let failing = storage.clone();
    let repository = Repository::open(Box::new(storage), None, &environment, &silent)?;
    let (newest, held) = (before.kept[2].id, before.kept[1].id);
    match operation {
        // has a storage of its own
        Operation::Create => {}
        Operation::Backup => {
            let mut world = World::resume(repository, &before.contents, Vec::new());
            world.try_backup(RequestedLevel::Auto)?;
            return Ok(Done::Made(Box::new(world.kept.remove(0))));
        }
        Operation::Forget => drop(forget(&repository, &[before.kept[0].id], "test", false, &silent)?),
        Operation::Hold => hold(&repository, newest, None, "test", &silent)?,
        Operation::Unhold => drop(unhold(&repository, held, &silent)?),
        Operation::Undelete => undelete(&repository, before.forgotten.id, &silent)?,
        Operation::Prune => {
            let options = PruneOptions { max_unused_permille: 0, ..PruneOptions::default() };
            let report = prune(&repository, &options, &silent)?;
            // where space seems to be short it writes nothing anew
            assert!(report.repacked_packs > 0 || failing.has_failed(), "nothing was written anew");
        }
        Operation::Verify => {
            let options =
                VerifyOptions { level: VerifyLevel::Restore, record: true, ..VerifyOptions::default() };
            return Ok(Done::Verified(Box::new(verify(&repository, &options, &silent)?)));
        }
        Operation::Restore => World::resume(repository, &before.contents, before.kept.clone()).try_reads()?,
        Operation::RepairIndex => drop(repair_index(&repository, false, &silent)?),
        Operation::RepairPacks => {
            repair_packs(&repository, &PacksOptions::default(), &silent)?;
        }
        Operation::RepairPoints => drop(repair_points(&repository, false, &silent)?),
    }
    Ok(Done::Other)
}

/// Returns the points that have to be there after an operation, and checks that a success is true.
fn expected(operation: Operation, before: &Before, world: &World, done: Option<Done>) -> Vec<Kept> {
    let catalog = world.repository.catalog(&Recorder::new()).unwrap();
    let is_there = |id: PointId| catalog.point(id).is_some();
    let mut kept = before.kept.clone();
    let succeeded = done.is_some();
    if let Some(Done::Made(made)) = done {
        assert!(is_there(made.id), "the point that was made is not there");
        kept.push(*made);
    }
    let first = before.kept[0].id;
    match operation {
        Operation::Forget => {
            assert!(!(succeeded && is_there(first)), "it was not forgotten");
            kept.retain(|kept| kept.id != first || is_there(first));
        }
        Operation::Undelete => {
            assert!(!succeeded || is_there(before.forgotten.id), "it is not back");
            if is_there(before.forgotten.id) {
                kept.push(before.forgotten.clone());
            }
        }
        Operation::Hold if succeeded => {
            assert!(catalog.held(before.kept[2].id, i64::MAX - 1).is_some(), "it is not held");
        }
        Operation::Unhold if succeeded => {
            assert!(catalog.held(before.kept[1].id, 0).is_none(), "it is held still");
        }
        Operation::Prune if succeeded => assert!(catalog.forgotten().is_empty(), "it was not dropped"),
        _ => {}
    }
    kept
}

/// What could not be read is not called sound, and what could be is not called bad.
fn check_verdict(storage: &MemoryStorage, faulty: Option<&str>, done: Option<&Done>) {
    let could_not_be_read = |name: &str| faulty == Some(name);
    for listed in storage.list(Folder::Damage).unwrap() {
        let ObjectName::Damage(pack, _) = listed.name else { panic!("{} is listed", listed.name) };
        assert!(could_not_be_read(&ObjectName::Pack(pack).to_string()), "{} is false", listed.name);
    }
    let Some(Done::Verified(report)) = done else { return };
    for finding in &report.findings {
        assert!(faulty.is_some(), "{finding:?} is false");
    }
    // a part that could not be read was read from its second copy, and the whole pack besides
    if let Some(name) = faulty.filter(|name| name.starts_with("packs/")) {
        assert!(!report.findings.is_empty(), "{name} could not be read, and nobody says so");
    }
}

/// A repository that was not made can be made; one that was, or whose maker does not know, is whole.
fn check_create(fault: Fault, at: u64) -> bool {
    let (inner, silent, options) = (MemoryStorage::new(), Recorder::new(), CreateOptions::default());
    let storage = FailingStorage::new(inner.clone(), at, fault);
    let made = Repository::create(Box::new(storage.clone()), &options, &environment()).is_ok();
    assert!(made || storage.has_failed(), "init fails without a fault");
    let open = || Repository::open(Box::new(inner.clone()), None, &environment(), &silent);
    let repository = match open() {
        Err(Error::NoRepository { .. }) if !made => {
            Repository::create(Box::new(inner.clone()), &options, &environment()).unwrap()
        }
        other => other.unwrap(),
    };
    assert!(inner.len(ObjectName::Reserve).is_ok(), "there is no reserve");
    let contents = BTreeMap::from([("vda".to_owned(), vec![0; 64 << 10])]);
    let mut world = World::resume(repository, &contents, Vec::new());
    write(&mut world, 0, 30 << 10, 1);
    world.backup(RequestedLevel::Auto);
    world.check_reads();
    storage.has_failed()
}

/// Returns false if there is no operation number `at`.
fn check(operation: Operation, fault: Fault, at: u64, before: &Before, rule: Option<Rule>) -> bool {
    if operation == Operation::Create {
        return check_create(fault, at);
    }
    let inner = before.storage.snapshot();
    let storage = FailingStorage::new(inner.clone(), at, fault);
    let done = run(operation, before, storage.clone(), rule);
    let failed = storage.has_failed();
    assert!(failed || done.is_ok(), "{operation:?} fails without a fault");
    if operation == Operation::Verify {
        check_verdict(&inner, storage.failed_read().as_deref(), done.as_ref().ok());
    }
    let repository = Repository::open(Box::new(inner), None, &environment(), &Recorder::new()).unwrap();
    let mut world = World::resume(repository, &before.contents, Vec::new());
    world.kept = expected(operation, before, &world, done.ok());
    world.check_reads();
    // the next run of everything
    world.backup(RequestedLevel::Auto);
    let options = PruneOptions { max_unused_permille: 0, ..PruneOptions::default() };
    prune(&world.repository, &options, &Recorder::new()).unwrap();
    world.check_reads();
    let options = VerifyOptions { level: VerifyLevel::Data, ..VerifyOptions::default() };
    assert_eq!(verify(&world.repository, &options, &Recorder::new()).unwrap().findings, []);
    failed
}

#[test]
fn whichever_operation_fails_and_however() {
    let before = before();
    let count = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        for part in 0..2 {
            let (before, count) = (&before, &count);
            scope.spawn(move || {
                let faults = OPERATIONS.into_iter().flat_map(|op| Fault::ALL.map(|fault| (op, fault)));
                for (_, (operation, fault)) in faults.enumerate().filter(|(no, _)| no % 2 == part) {
                    for at in 0.. {
                        let checked = || check(operation, fault, at, before, None);
                        let checked = catch_unwind(AssertUnwindSafe(checked)).unwrap_or_else(|panic| {
                            panic!("{operation:?}, {fault:?} at {at}: {}", text_of(panic.as_ref()))
                        });
                        if !checked {
                            break;
                        }
                        count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let count = count.into_inner();
    println!("{count} faults");
    assert!(count > 2000, "only {count} faults");
}

/// The rules that failing operations miss.
pub(super) const RULES: [Rule; 1] = [Rule::StopIfMissing];

/// A prune that goes on without what it cannot read at the moment loses it.
#[test]
fn a_prune_that_does_not_stop_is_noticed() {
    let before = before();
    let lost = (0..).map_while(|at| {
        let check = || check(Operation::Prune, Fault::Eio, at, &before, Some(Rule::StopIfMissing));
        match catch_unwind(AssertUnwindSafe(check)) {
            Ok(true) => Some(None),
            Ok(false) => None,
            Err(panic) => Some(Some((at, text_of(panic.as_ref())))),
        }
    });
    let Some((at, how)) = lost.flatten().next() else { panic!("nothing went wrong") };
    println!("operation {at}: {}", how.lines().next().unwrap_or_default());
}

/// A repair, and what it is to mend.
type Damaged = (fn(&Repository) -> Result<bool>, fn(&Before, &MemoryStorage));

const REPAIRS: [Damaged; 4] = [
    (
        |repository| {
            let report = repair_index(repository, false, &Recorder::new())?;
            Ok(report.packs > 0 && !report.configs.is_empty())
        },
        |_, storage| {
            storage.tamper(storage.list(Folder::Segments).unwrap()[0].name, |_| None);
            storage.tamper(ObjectName::ConfigCopy, |bytes| Some(bytes[1..].to_vec()));
        },
    ),
    (
        |repository| {
            let report = repair_packs(repository, &PacksOptions::default(), &Recorder::new())?;
            Ok(report.lacking > 0 && report.lost == 0)
        },
        |_, storage| {
            let is_metadata = |name| {
                let header = storage.get_range(name, 0, PACK_HEADER_LEN as u64).unwrap();
                PackHeader::decode(&header).unwrap().kind == PackKind::Metadata
            };
            let mut packs = storage.list(Folder::Packs).unwrap().into_iter();
            storage.tamper(packs.find(|listed| is_metadata(listed.name)).unwrap().name, |_| None);
        },
    ),
    (brings_back, |before, storage| {
        storage.tamper(ObjectName::Outcome(before.kept[0].id.into()), |_| None);
    }),
    (brings_back, |before, storage| {
        storage.tamper(ObjectName::Outcome(before.kept[0].id.into()), |bytes| Some(bytes[1..].to_vec()));
    }),
];

fn brings_back(repository: &Repository) -> Result<bool> {
    Ok(!repair_points(repository, false, &Recorder::new())?.brought_back.is_empty())
}

/// Returns false if there is no operation number `at`.
fn check_repair((repair, damage): Damaged, fault: Fault, at: u64, before: &Before) -> bool {
    let inner = before.storage.snapshot();
    damage(before, &inner);
    let storage = FailingStorage::new(inner.clone(), at, fault);
    let silent = Recorder::new();
    let opened = Repository::open(Box::new(storage.clone()), None, &dead_environment(), &silent);
    let repaired = opened.and_then(|repository| repair(&repository));
    assert!(storage.has_failed() || repaired.is_ok_and(|mended| mended), "there was nothing to mend");
    let repository = Repository::open(Box::new(inner), None, &environment(), &silent).unwrap();
    repair(&repository).unwrap();
    let mut world = World::resume(repository, &before.contents, Vec::new());
    world.kept = before.kept.clone();
    world.check_reads();
    world.backup(RequestedLevel::Auto);
    let options = PruneOptions { max_unused_permille: 0, ..PruneOptions::default() };
    prune(&world.repository, &options, &silent).unwrap();
    world.check_reads();
    let options = VerifyOptions { level: VerifyLevel::Data, ..VerifyOptions::default() };
    assert_eq!(verify(&world.repository, &options, &silent).unwrap().findings, []);
    storage.has_failed()
}

/// A repair that fails has made nothing worse, and is done once more.
#[test]
fn whichever_operation_of_a_repair_fails() {
    let (before, mut faults) = (before(), 0);
    for (no, damaged) in REPAIRS.into_iter().enumerate() {
        for fault in Fault::ALL {
            let checked = |at: &u64| {
                catch_unwind(AssertUnwindSafe(|| check_repair(damaged, fault, *at, &before))).unwrap_or_else(
                    |panic| panic!("repair {no}, {fault:?} at {at}: {}", text_of(panic.as_ref())),
                )
            };
            faults += (0..).take_while(checked).count();
        }
    }
    println!("{faults} faults");
    assert!(faults > 500, "only {faults} faults");
}

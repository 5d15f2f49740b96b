//! The n-th operation of the storage goes wrong, for every n and in every way: nothing that succeeded is untrue, nothing
//! that was there is lost, and the next run is fine.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::dead_environment;
use super::schedule::text_of;
use crate::error::Result;
use crate::format::point::Level;
use crate::id::PointId;
use crate::monitor::Recorder;
use crate::ops::RequestedLevel;
use crate::ops::backup::tests::{Kept, World, environment, write};
use crate::ops::forget::{forget, hold, undelete, unhold};
use crate::ops::prune::{PruneOptions, prune};
use crate::ops::repair::{PacksOptions, repair_index, repair_packs, repair_points};
use crate::ops::verify::{VerifyLevel, VerifyOptions, verify};
use crate::repo::rules::Rule;
use crate::repo::{Environment, Repository, Timing};
use crate::storage::fault::{FailingStorage, Fault};
use crate::storage::memory::MemoryStorage;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
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

const OPERATIONS: [Operation; 11] = [
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
            let report = verify(&repository, &options, &silent)?;
            // one that was interrupted may report what it could not read, but not as sound
            let _ = report;
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

/// Returns false if there is no operation number `at`.
fn check(operation: Operation, fault: Fault, at: u64, before: &Before, rule: Option<Rule>) -> bool {
    let inner = before.storage.snapshot();
    let storage = FailingStorage::new(inner.clone(), at, fault);
    let done = run(operation, before, storage.clone(), rule);
    let failed = storage.has_failed();
    assert!(failed || done.is_ok(), "{operation:?} fails without a fault");
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
                        if !check(operation, fault, at, before, None) {
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

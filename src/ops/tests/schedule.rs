//! Schedules: writers, prunes, forgets and restores on one storage, where a seed decides whose operation is next; and
//! each rule of the protocol taken away, to see that it is missed.
//!
//! Every actor runs the real code in threads of its own. Its storage holds each operation back until the scheduler lets
//! it go, and the scheduler waits until every actor that is at work wants something. What is left to chance is only in
//! which order one actor's own threads ask.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::is_long;
use crate::error::{Error, Result};
use crate::format::name::{Folder, ObjectName};
use crate::format::point::Level;
use crate::format::session::SessionKind;
use crate::id::PointId;
use crate::monitor::Recorder;
use crate::ops::RequestedLevel;
use crate::ops::backup::tests::{Kept, World, environment, write};
use crate::ops::forget::{forget, undelete};
use crate::ops::prune::{PruneOptions, prune};
use crate::ops::repair::repair_points;
use crate::ops::verify::{VerifyLevel, VerifyOptions, verify};
use crate::repo::rules::Rule;
use crate::repo::session::Session;
use crate::repo::{Environment, Repository, Timing};
use crate::storage::fault::{CrashStorage, Flaw, Survival};
use crate::storage::memory::MemoryStorage;
use crate::storage::{Listed, Storage};

/// Who is next.
#[derive(Debug)]
struct State {
    /// Operations that each actor at work wants to do; `None` once it has ended.
    wanted: Vec<Option<u32>>,
    current: usize,
    granted: bool,
    random: u64,
    /// Chance in 256 that the same actor goes on.
    persistence: u64,
}

#[derive(Debug)]
struct Scheduler {
    state: Mutex<State>,
    wake: Condvar,
}

impl Scheduler {
    fn new(actors: usize, seed: u64) -> Self {
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let persistence = [128, 230, 250][(next(&mut random) % 3) as usize];
        let state = State { wanted: vec![Some(0); actors], current: 0, granted: false, random, persistence };
        Self { state: Mutex::new(state), wake: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets one operation go, if everybody at work wants one.
    fn grant(&self, state: &mut State) {
        let at_work = || state.wanted.iter().enumerate().filter_map(|(no, wanted)| Some((no, (*wanted)?)));
        if state.granted || at_work().any(|(_, wanted)| wanted == 0) {
            return;
        }
        let actors: Vec<usize> = at_work().map(|(no, _)| no).collect();
        if actors.is_empty() {
            return;
        }
        let stays = next(&mut state.random) % 256 < state.persistence;
        if !stays || !actors.contains(&state.current) {
            state.current = actors[(next(&mut state.random) % actors.len() as u64) as usize];
        }
        state.granted = true;
        self.wake.notify_all();
    }

    fn run<T>(&self, actor: usize, operation: impl FnOnce() -> T) -> T {
        let mut state = self.state();
        if let Some(wanted) = &mut state.wanted[actor] {
            *wanted += 1;
        }
        self.grant(&mut state);
        while !(state.granted && state.current == actor) {
            state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(wanted) = &mut state.wanted[actor] {
            *wanted -= 1;
        }
        state.granted = false;
        let done = operation();
        self.grant(&mut state);
        done
    }

    fn end(&self, actor: usize) {
        let mut state = self.state();
        state.wanted[actor] = None;
        self.grant(&mut state);
    }
}

fn next(random: &mut u64) -> u64 {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    *random >> 8
}

#[derive(Debug, Clone)]
struct Scheduled {
    inner: MemoryStorage,
    scheduler: Arc<Scheduler>,
    actor: usize,
}

impl Storage for Scheduled {
    fn url(&self) -> String {
        format!("actor {}:", self.actor)
    }

    fn put_new(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        self.scheduler.run(self.actor, || self.inner.put_new(name, bytes))
    }

    fn replace(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        // heartbeats come when they like
        self.inner.replace(name, bytes)
    }

    fn get(&self, name: ObjectName, max_len: u64) -> Result<Vec<u8>> {
        self.scheduler.run(self.actor, || self.inner.get(name, max_len))
    }

    fn get_range(&self, name: ObjectName, offset: u64, len: u64) -> Result<Vec<u8>> {
        self.scheduler.run(self.actor, || self.inner.get_range(name, offset, len))
    }

    fn len(&self, name: ObjectName) -> Result<u64> {
        self.scheduler.run(self.actor, || self.inner.len(name))
    }

    fn list(&self, folder: Folder) -> Result<Vec<Listed>> {
        self.scheduler.run(self.actor, || self.inner.list(folder))
    }

    fn delete(&self, name: ObjectName) -> Result<()> {
        self.scheduler.run(self.actor, || self.inner.delete(name))
    }

    fn sync_deletes(&self, folder: Folder) -> Result<()> {
        self.scheduler.run(self.actor, || self.inner.sync_deletes(folder))
    }
}

type Contents = BTreeMap<String, Vec<u8>>;

/// Two points that stay, two that are forgotten, and what a session left that was aborted.
struct Before {
    storage: MemoryStorage,
    kept: Vec<Kept>,
    forgotten: Vec<Kept>,
    /// What was stored and never committed.
    aborted: Contents,
}

fn before() -> Before {
    let storage = MemoryStorage::new();
    let mut world = World::on(storage.clone(), &[256 << 10]);
    for day in 0..4u64 {
        write(&mut world, 0, 160 << 10, day);
        world.backup(RequestedLevel::Is(if day == 0 { Level::Full } else { Level::Incremental }));
    }
    write(&mut world, 0, 160 << 10, 77);
    let aborted = world.contents();
    world.abort_backup();
    let forgotten: Vec<Kept> = world.kept.drain(..2).collect();
    let ids: Vec<PointId> = forgotten.iter().map(|kept| kept.id).collect();
    forget(&world.repository, &ids, "test", false, &Recorder::new()).unwrap();
    Before { storage, kept: world.kept, forgotten, aborted }
}

/// What an actor did.
enum Done {
    Made(Result<Kept>),
    Undeleted(Kept, Result<()>),
    Forgot(PointId, Result<()>),
    Restored(Result<()>),
    Pruned,
}

fn environment_of(rule: Option<Rule>, impatient: bool) -> Environment {
    let dead_after = if impatient { Duration::ZERO } else { Duration::from_secs(600) };
    // soon enough for a prune that waits to see that the other one lives
    let (heartbeat, poll) = (Duration::from_millis(5), Duration::from_micros(50));
    let timing = Timing { heartbeat, dead_after, poll, broken: rule };
    Environment { timing, ..environment() }
}

fn act(actor: usize, before: &Before, repository: Repository) -> Done {
    let silent = Recorder::new();
    let options = PruneOptions { max_unused_permille: 0, ..PruneOptions::default() };
    let back_up = |repository, contents: &Contents| {
        let mut world = World::resume(repository, contents, Vec::new());
        Done::Made(world.try_backup(RequestedLevel::Auto).map(|_| world.kept.remove(0)))
    };
    match actor {
        // the content of a forgotten point comes back, and what nobody committed
        0 => back_up(repository, &before.forgotten[0].contents),
        1 => back_up(repository, &before.aborted),
        2 => {
            let kept = before.forgotten[1].clone();
            let back = undelete(&repository, kept.id, &silent);
            Done::Undeleted(kept, back)
        }
        3 => {
            let id = before.kept[0].id;
            Done::Forgot(id, forget(&repository, &[id], "test", false, &silent).map(drop))
        }
        4 => {
            let world = World::resume(repository, &BTreeMap::new(), before.kept[1..].to_vec());
            Done::Restored(world.try_reads())
        }
        _ => {
            drop(prune(&repository, &options, &silent));
            Done::Pruned
        }
    }
}

const ACTORS: usize = 7;

/// Runs one schedule; panics with what is wrong.
fn run(seed: u64, rule: Option<Rule>, before: &Before) {
    let inner = before.storage.snapshot();
    let scheduler = Arc::new(Scheduler::new(ACTORS, seed));
    let impatient = seed.is_multiple_of(4);
    let done: Vec<Done> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ACTORS)
            .map(|actor| {
                let scheduler = Arc::clone(&scheduler);
                let storage = Scheduled { inner: inner.clone(), scheduler: Arc::clone(&scheduler), actor };
                scope.spawn(move || {
                    let environment = environment_of(rule, impatient);
                    let opened = Repository::open(Box::new(storage), None, &environment, &Recorder::new());
                    let done = catch_unwind(AssertUnwindSafe(|| act(actor, before, opened.unwrap())));
                    scheduler.end(actor);
                    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let repository =
        Repository::open(Box::new(inner), None, &environment_of(None, true), &Recorder::new()).unwrap();
    let mut world = World::resume(repository, &before.aborted, before.kept[1..].to_vec());
    let mut forgotten = None;
    for done in done {
        match done {
            Done::Made(Ok(kept)) | Done::Undeleted(kept, Ok(())) => world.kept.push(kept),
            Done::Made(Err(error)) => {
                // what a prune marks meanwhile is stored again: no reason to give up, with all rules kept
                let refused = rule.is_some() && matches!(error, Error::Busy { .. });
                assert!(impatient || refused, "a backup failed: {error:?}");
            }
            Done::Restored(restored) => assert!(restored.is_ok(), "a restore failed: {restored:?}"),
            Done::Forgot(id, Ok(())) => forgotten = Some(id),
            Done::Forgot(_, Err(error)) => assert!(impatient, "forget failed: {error:?}"),
            Done::Undeleted(_, Err(_)) | Done::Pruned => {}
        }
    }
    check(&mut world, forgotten);
}

fn check(world: &mut World, forgotten: Option<PointId>) {
    world.check_reads();
    let silent = Recorder::new();
    let options = VerifyOptions { level: VerifyLevel::Structure, ..VerifyOptions::default() };
    assert_eq!(verify(&world.repository, &options, &silent).unwrap().damaged_points, [], "damaged");
    let catalog = world.repository.catalog(&silent).unwrap();
    assert!(forgotten.is_none_or(|id| catalog.point(id).is_none()), "a forgotten point is back");
    let options = PruneOptions { max_unused_permille: 0, ..PruneOptions::default() };
    prune(&world.repository, &options, &silent).unwrap();
    world.check_reads();
    let options = VerifyOptions { level: VerifyLevel::Data, ..VerifyOptions::default() };
    assert_eq!(verify(&world.repository, &options, &silent).unwrap().findings, []);
}

fn seeds() -> u64 {
    if is_long() { 10_000 } else { 500 }
}

/// Returns the first seed whose schedule went wrong, and how.
fn first_failure(rule: Option<Rule>, before: &Before, seeds: u64) -> Option<(u64, String)> {
    (0..seeds).find_map(|seed| {
        let panic = catch_unwind(AssertUnwindSafe(|| run(seed, rule, before))).err()?;
        Some((seed, panic.downcast_ref::<String>().cloned().unwrap_or_default()))
    })
}

#[test]
fn no_schedule_loses_anything() {
    let before = before();
    assert_eq!(first_failure(None, &before, seeds()), None);
    println!("{} schedules, nothing lost", seeds());
}

#[test]
fn each_rule_that_is_taken_away_is_missed() {
    let before = before();
    for rule in [
        Rule::RegisterFirst,
        Rule::HeedMarks,
        Rule::SegmentsNeedOutcomes,
        Rule::ExclusiveOutcome,
        Rule::MarkBeforeFence,
        Rule::Fence,
        Rule::RecomputeLive,
        Rule::HeedMarkedPoints,
        Rule::UndeleteBeforeOutcome,
    ] {
        // one that needs a rare moment gets time for it
        let Some((seed, how)) = first_failure(Some(rule), &before, 4000) else {
            panic!("{rule:?} was taken away, and nothing went wrong");
        };
        println!("{rule:?}: seed {seed}: {}", how.lines().next().unwrap_or_default());
    }
}

/// A storage that does something as soon as the packs were listed.
#[derive(Clone)]
struct Hooked {
    inner: MemoryStorage,
    hook: Arc<dyn Fn() + Send + Sync>,
}

impl std::fmt::Debug for Hooked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hooked")
    }
}

impl Storage for Hooked {
    fn url(&self) -> String {
        "hooked:".into()
    }

    fn put_new(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        self.inner.put_new(name, bytes)
    }

    fn replace(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        self.inner.replace(name, bytes)
    }

    fn get(&self, name: ObjectName, max_len: u64) -> Result<Vec<u8>> {
        self.inner.get(name, max_len)
    }

    fn get_range(&self, name: ObjectName, offset: u64, len: u64) -> Result<Vec<u8>> {
        self.inner.get_range(name, offset, len)
    }

    fn len(&self, name: ObjectName) -> Result<u64> {
        self.inner.len(name)
    }

    fn list(&self, folder: Folder) -> Result<Vec<Listed>> {
        let listed = self.inner.list(folder);
        if folder == Folder::Packs {
            (self.hook)();
        }
        listed
    }

    fn delete(&self, name: ObjectName) -> Result<()> {
        self.inner.delete(name)
    }

    fn sync_deletes(&self, folder: Folder) -> Result<()> {
        self.inner.sync_deletes(folder)
    }
}

/// The moment that random schedules hardly meet: a sweep is decided when a backup begins, and is over between the
/// listing of the packs and whatever the backup reads next.
fn sweep_meets_backup(rule: Option<Rule>) -> Result<()> {
    let before = before();
    let inner = before.storage.snapshot();
    // a prune that stops behind its outcome: its mark is still there
    let cut = CrashStorage::on(&inner, Flaw::None);
    let silent = Recorder::new();
    let pruning = Repository::open(Box::new(cut.clone()), None, &super::dead_environment(), &silent)?;
    prune(&pruning, &PruneOptions { max_unused_permille: 0, ..PruneOptions::default() }, &silent)?;
    let marked = |image: &MemoryStorage| image.list(Folder::Marks).is_ok_and(|marks| !marks.is_empty());
    let decided = (0..cut.len()).rev().map(|at| cut.image(at, Survival::All)).filter(marked);
    let inner = decided.last_with_all_packs(&before.storage);
    let hook = {
        let storage = inner.clone();
        move || {
            let other = Repository::open(Box::new(storage.clone()), None, &environment(), &Recorder::new());
            drop(prune(&other.unwrap(), &PruneOptions::default(), &Recorder::new()));
        }
    };
    let storage = Hooked { inner: inner.clone(), hook: Arc::new(hook) };
    let writing = Repository::open(Box::new(storage), None, &environment_of(rule, false), &silent)?;
    let mut world = World::resume(writing, &before.forgotten[0].contents, Vec::new());
    world.try_backup(RequestedLevel::Auto)?;
    let after = Repository::open(Box::new(inner), None, &environment(), &silent)?;
    World::resume(after, &BTreeMap::new(), world.kept).try_reads()
}

/// Picks the image in which the sweep is decided and nothing is deleted yet.
trait LastWithAllPacks {
    fn last_with_all_packs(self, original: &MemoryStorage) -> MemoryStorage;
}

impl<I: Iterator<Item = MemoryStorage>> LastWithAllPacks for I {
    fn last_with_all_packs(mut self, original: &MemoryStorage) -> MemoryStorage {
        let old: Vec<Listed> = [Folder::Packs, Folder::Segments]
            .into_iter()
            .flat_map(|folder| original.list(folder).unwrap())
            .collect();
        self.find(|image| old.iter().all(|listed| image.len(listed.name).is_ok())).unwrap()
    }
}

#[test]
fn a_sweep_that_ends_while_a_backup_begins() {
    sweep_meets_backup(None).unwrap();
    assert!(
        sweep_meets_backup(Some(Rule::MarksBeforeSegments)).is_err(),
        "the order of reading is not missed"
    );
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
    let options = PruneOptions { max_unused_permille: 0, ..PruneOptions::default() };
    let (storage, slept) = (inner.clone(), AtomicBool::new(false));
    let hook = move || {
        if slept.swap(true, Ordering::SeqCst) {
            return;
        }
        let impatient = environment_of(None, true);
        let open = |storage: Box<dyn Storage>| Repository::open(storage, None, &impatient, &Recorder::new());
        let forgetting = open(Box::new(storage.clone())).unwrap();
        forget(&forgetting, &[damaged], "test", false, &Recorder::new()).unwrap();
        let cut = CrashStorage::on(&storage, Flaw::None);
        prune(&open(Box::new(cut.clone())).unwrap(), &options, &Recorder::new()).unwrap();
        let marked = |image: &MemoryStorage| image.list(Folder::Marks).is_ok_and(|marks| !marks.is_empty());
        let decided = (0..cut.len()).rev().map(|at| cut.image(at, Survival::All)).filter(marked);
        let decided = decided.last_with_all_packs(&storage);
        storage.set_for_test(decided.objects_for_test().into_iter());
    };
    let storage = Hooked { inner: inner.clone(), hook: Arc::new(hook) };
    let repairing = Repository::open(Box::new(storage), None, &environment_of(rule, false), &silent)?;
    let repaired = repair_points(&repairing, false, &silent);
    assert!(matches!(repaired, Err(Error::Fenced { .. })), "it was registered: {repaired:?}");
    let after = Repository::open(Box::new(inner), None, &environment(), &silent)?;
    prune(&after, &PruneOptions::default(), &silent)?;
    let damaged = verify(&after, &VerifyOptions::default(), &silent)?.damaged_points;
    if !damaged.is_empty() {
        return Err(Error::Damaged(format!("points {damaged:?} rely on what is gone")));
    }
    let world = World::resume(after, &BTreeMap::new(), world.kept);
    assert_eq!(world.repository.catalog(&silent)?.points().len(), world.kept.len());
    world.try_reads()
}

#[test]
fn a_repair_does_not_rely_on_a_point_that_is_going() {
    prune_meets_repair(None).unwrap();
    let rule = Some(Rule::RepairOfPointsThatStay);
    let missed = prune_meets_repair(rule).is_err();
    assert!(missed, "nobody misses the look at what is there still");
}

/// A session of a kind that a fence does not wait for must not be mistaken for a writer.
#[test]
fn a_fence_does_not_wait_for_readers() {
    let before = before();
    let repository =
        Repository::open(Box::new(before.storage), None, &environment_of(None, false), &Recorder::new())
            .unwrap();
    let reader = Session::begin(&repository, SessionKind::Restore).unwrap();
    prune(&repository, &PruneOptions::default(), &Recorder::new()).unwrap();
    drop(reader);
}

//! Schedules: writers, prunes, forgets and restores on one storage, where a seed decides whose operation is next; and
//! each rule of the protocol taken away, to see that it is missed.
//!
//! Every actor runs the real code in threads of its own. Its storage holds each operation back until the scheduler lets
//! it go, and the scheduler waits until every actor that is at work wants something. So operations come one by one, and
//! a seed decides whose is next, but not which: in what order one actor's own threads ask is left to chance, ids are
//! random and so is the order of listings, and heartbeats come when they like. A seed that fails may have to be run
//! again to fail again.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
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
use crate::ops::prune::{PruneOptions, PruneReport, prune};
use crate::ops::verify::{VerifyLevel, VerifyOptions, verify};
use crate::repo::rules::Rule;
use crate::repo::session::Session;
use crate::repo::{Environment, Repository, Timing};
use crate::storage::memory::MemoryStorage;
use crate::storage::{Listed, Storage};

/// A schedule of more operations is one in which somebody waits for ever.
const MOST_OPERATIONS: u32 = 50_000;

/// Who is next.
#[derive(Debug)]
struct State {
    /// Operations that each actor at work wants to do; `None` once it has ended.
    wanted: Vec<Option<u32>>,
    current: usize,
    granted: bool,
    /// So many operations may still be done.
    left: u32,
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
        let (wanted, left) = (vec![Some(0); actors], MOST_OPERATIONS);
        let state = State { wanted, current: 0, granted: false, left, random, persistence };
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

    fn run<T>(&self, actor: usize, operation: impl FnOnce() -> Result<T>) -> Result<T> {
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
        state.left = state.left.saturating_sub(1);
        // not a panic: what is told to stop puts an abort first
        let stuck = || Error::io("reach", "the storage", std::io::Error::other("the schedule does not end"));
        let done = if state.left == 0 { Err(stuck()) } else { operation() };
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
pub(super) struct Before {
    pub storage: MemoryStorage,
    pub(super) kept: Vec<Kept>,
    pub forgotten: Vec<Kept>,
    /// What was stored and never committed.
    aborted: Contents,
}

pub(super) fn before() -> Before {
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
    Pruned(Result<PruneReport>),
}

/// How the actors of a schedule are set up.
#[derive(Debug, Clone, Copy)]
struct Temper {
    /// Whoever waits takes the others for dead at once, as if it had slept itself.
    impatient: bool,
    /// Each actor is on a host of its own: nobody sees whether the others' processes are there.
    apart: bool,
}

impl Temper {
    fn of(seed: u64) -> Self {
        Self { impatient: seed.is_multiple_of(4), apart: seed % 8 == 2 || seed % 8 == 4 }
    }

    fn environment(self, rule: Option<Rule>, actor: usize) -> Environment {
        let mut environment = environment_of(rule);
        if self.impatient {
            environment.timing.dead_after = Duration::ZERO;
        }
        if self.apart {
            environment.host = format!("host {actor}");
        }
        environment
    }
}

pub(super) fn environment_of(rule: Option<Rule>) -> Environment {
    let timing = Timing {
        // soon enough for a prune that waits to see that the other one lives
        heartbeat: Duration::from_millis(5),
        dead_after: Duration::from_secs(600),
        poll: Duration::from_micros(50),
        broken: rule,
    };
    Environment { timing, ..environment() }
}

fn act(actor: usize, before: &Before, repository: Repository) -> Done {
    let silent = Recorder::new();
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
        _ => Done::Pruned(prune_all(&repository)),
    }
}

/// Prunes to the last byte.
pub(super) fn prune_all(repository: &Repository) -> Result<PruneReport> {
    prune(repository, &PruneOptions { max_unused_permille: 0, ..PruneOptions::default() }, &Recorder::new())
}

const ACTORS: usize = 7;

/// What came about in schedules: that it did is worth as much as that nothing was lost.
#[derive(Debug, Default, Clone, Copy)]
struct Met {
    schedules: u32,
    /// Schedules in which a prune succeeded.
    pruned: u32,
    /// Prunes that withdrew because there was another.
    withdrew: u32,
    /// Prunes that another had taken for dead, and that woke up.
    taken_over: u32,
    most_operations: u32,
}

/// Runs one schedule; panics with what is wrong.
fn run(seed: u64, rule: Option<Rule>, before: &Before, met: &mut Met) {
    let inner = before.storage.snapshot();
    let scheduler = Arc::new(Scheduler::new(ACTORS, seed));
    let temper = Temper::of(seed);
    let done: Vec<Done> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ACTORS)
            .map(|actor| {
                let scheduler = Arc::clone(&scheduler);
                let storage = Scheduled { inner: inner.clone(), scheduler: Arc::clone(&scheduler), actor };
                scope.spawn(move || {
                    let environment = temper.environment(rule, actor);
                    let opened = Repository::open(Box::new(storage), None, &environment, &Recorder::new());
                    let done = catch_unwind(AssertUnwindSafe(|| act(actor, before, opened.unwrap())));
                    scheduler.end(actor);
                    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let operations = MOST_OPERATIONS - scheduler.state().left;
    assert!(operations < MOST_OPERATIONS, "the schedule does not end");
    met.schedules += 1;
    met.most_operations = met.most_operations.max(operations);
    let after = Temper { impatient: true, ..temper }.environment(None, 0);
    let repository = Repository::open(Box::new(inner), None, &after, &Recorder::new()).unwrap();
    let mut world = World::resume(repository, &before.aborted, before.kept[1..].to_vec());
    let forgotten = judge(done, &mut world, rule, temper.impatient, met);
    check(&mut world, forgotten);
}

/// Checks what the actors say that they did. Returns the point that was forgotten.
fn judge(
    done: Vec<Done>,
    world: &mut World,
    rule: Option<Rule>,
    impatient: bool,
    met: &mut Met,
) -> Option<PointId> {
    let mut forgotten = None;
    let mut pruned = false;
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
            Done::Undeleted(_, Err(_)) => {}
            Done::Pruned(Ok(_)) => pruned = true,
            Done::Pruned(Err(error)) => match innermost(&error) {
                Error::Busy { .. } => met.withdrew += 1,
                Error::Fenced { .. } if impatient => met.taken_over += 1,
                _ => panic!("a prune failed: {error:?}"),
            },
        }
    }
    met.pruned += u32::from(pruned);
    forgotten
}

fn innermost(error: &Error) -> &Error {
    match error {
        Error::Context { source, .. } => innermost(source),
        other => other,
    }
}

fn check(world: &mut World, forgotten: Option<PointId>) {
    world.check_reads();
    let silent = Recorder::new();
    let options = VerifyOptions { level: VerifyLevel::Structure, ..VerifyOptions::default() };
    assert_eq!(verify(&world.repository, &options, &silent).unwrap().damaged_points, [], "damaged");
    let catalog = world.repository.catalog(&silent).unwrap();
    assert!(forgotten.is_none_or(|id| catalog.point(id).is_none()), "a forgotten point is back");
    prune_all(&world.repository).unwrap();
    world.check_reads();
    let options = VerifyOptions { level: VerifyLevel::Data, ..VerifyOptions::default() };
    assert_eq!(verify(&world.repository, &options, &silent).unwrap().findings, []);
}

fn seeds() -> u64 {
    if is_long() { 10_000 } else { 500 }
}

/// Returns the first seed whose schedule went wrong, and how.
fn first_failure(rule: Option<Rule>, before: &Before, seeds: u64, met: &mut Met) -> Option<(u64, String)> {
    (0..seeds).find_map(|seed| {
        let panic = catch_unwind(AssertUnwindSafe(|| run(seed, rule, before, met))).err()?;
        Some((seed, text_of(panic.as_ref())))
    })
}

/// Returns what a panic said.
pub(super) fn text_of(panic: &(dyn std::any::Any + Send)) -> String {
    let fixed = || panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    panic.downcast_ref::<String>().cloned().or_else(fixed).unwrap_or_default()
}

#[test]
fn no_schedule_loses_anything() {
    let before = before();
    let mut met = Met::default();
    assert_eq!(first_failure(None, &before, seeds(), &mut met), None);
    println!("nothing lost: {met:?}");
    assert!(met.pruned > met.schedules / 2, "few prunes succeeded: {met:?}");
    assert!(met.withdrew > met.schedules / 20, "few prunes met another: {met:?}");
    assert!(met.taken_over > met.schedules / 50, "few prunes were taken over: {met:?}");
}

/// The rules that schedules miss.
pub(super) const RULES: [Rule; 10] = [
    Rule::RegisterFirst,
    Rule::SegmentsNeedOutcomes,
    Rule::ExclusiveOutcome,
    Rule::OnePrune,
    Rule::MarkBeforeFence,
    Rule::Fence,
    Rule::RecomputeLive,
    Rule::ListSurvivors,
    Rule::MarkLast,
    Rule::HeedMarkedPoints,
];

#[test]
fn each_rule_that_is_taken_away_is_missed() {
    let before = before();
    for rule in RULES {
        // one that needs a rare moment gets time for it
        let Some((seed, how)) = first_failure(Some(rule), &before, 4000, &mut Met::default()) else {
            panic!("{rule:?} was taken away, and nothing went wrong");
        };
        println!("{rule:?}: seed {seed}: {}", how.lines().next().unwrap_or_default());
    }
}

/// A session of a kind that a fence does not wait for must not be mistaken for a writer.
#[test]
fn a_fence_does_not_wait_for_readers() {
    let before = before();
    let repository =
        Repository::open(Box::new(before.storage), None, &environment_of(None), &Recorder::new()).unwrap();
    let reader = Session::begin(&repository, SessionKind::Restore).unwrap();
    prune(&repository, &PruneOptions::default(), &Recorder::new()).unwrap();
    drop(reader);
}

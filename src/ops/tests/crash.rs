//! Crash enumeration: a history is cut off after every step of its storage, with several after-images each.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{dead_environment, is_long};
use crate::format::limits::MAX_PACK_LEN;
use crate::format::name::{Folder, ObjectName};
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
use crate::repo::{CreateOptions, Environment, Repository, Timing};
use crate::storage::Storage;
use crate::storage::fault::{CrashStorage, Flaw, Survival};
use crate::storage::memory::MemoryStorage;

/// Random subsets beside all and nothing.
const SUBSETS: u64 = 8;

type Contents = BTreeMap<String, Vec<u8>>;

/// What was promised once an operation had returned.
struct Promise {
    /// So many steps had been taken.
    steps: usize,
    kept: Vec<Kept>,
    contents: Contents,
    /// Something was broken by hand and not repaired yet: findings are expected, damaged points are not.
    broken: bool,
}

/// A life of a repository with every step of its storage.
struct History {
    storage: CrashStorage,
    promises: Vec<Promise>,
}

/// Goes through a life and notes what is promised after each operation.
struct Writer {
    world: World,
    storage: CrashStorage,
    promises: Vec<Promise>,
    broken: bool,
}

impl Writer {
    fn promise(&mut self) {
        self.promises.push(Promise {
            steps: self.storage.len(),
            kept: self.world.kept.clone(),
            contents: self.world.contents(),
            broken: self.broken,
        });
    }

    fn backup(&mut self, day: u64, level: Level) {
        write(&mut self.world, (day % 5) * (90 << 10), 70 << 10, day);
        write(&mut self.world, 448 << 10, 8 << 10, 100 + day);
        self.world.backup(RequestedLevel::Is(level));
        self.promise();
    }

    fn forget(&mut self, numbers: &[usize]) {
        let ids: Vec<PointId> = numbers.iter().map(|no| self.world.kept[*no].id).collect();
        forget(&self.world.repository, &ids, "test", false, &Recorder::new()).unwrap();
        self.world.kept.retain(|kept| !ids.contains(&kept.id));
        self.promise();
    }

    /// Returns how many packs were written anew.
    fn prune(&mut self) -> u64 {
        let options = PruneOptions { max_unused_permille: 0, ..PruneOptions::default() };
        let report = prune(&self.world.repository, &options, &Recorder::new()).unwrap();
        self.promise();
        report.repacked_packs
    }

    fn verify(&mut self) {
        let options = VerifyOptions { level: VerifyLevel::Data, record: true, ..VerifyOptions::default() };
        verify(&self.world.repository, &options, &Recorder::new()).unwrap();
        self.promise();
    }

    /// Loses one object, durably, as no operation would.
    fn lose(&mut self, name: ObjectName) {
        self.broken = true;
        self.promise();
        self.storage.delete(name).unwrap();
        self.storage.sync_deletes(name.folder().unwrap()).unwrap();
        self.promise();
    }

    fn mended(&mut self) {
        self.broken = false;
        self.promise();
    }
}

fn history(flaw: Flaw, rule: Option<Rule>) -> History {
    let storage = CrashStorage::on(&MemoryStorage::new(), flaw);
    let timing = Timing { broken: rule, ..Timing::default() };
    let environment = Environment { timing, ..dead_environment() };
    let repository =
        Repository::create(Box::new(storage.clone()), &CreateOptions::default(), &environment).unwrap();
    let contents: Contents = [("vda".to_owned(), vec![0; 512 << 10])].into_iter().collect();
    let world = World::resume(repository, &contents, Vec::new());
    let mut writer = Writer { world, storage: storage.clone(), promises: Vec::new(), broken: false };
    writer.promise();
    writer.backup(0, Level::Full);
    for day in 1..4 {
        writer.backup(day, Level::Incremental);
    }
    writer.backup(4, Level::Differential);
    writer.forget(&[0, 2]);
    let mut repacked = vec![writer.prune()];
    writer.verify();
    writer.backup(5, Level::Full);
    let (first, silent) = (writer.world.kept[0].id, Recorder::new());
    hold(&writer.world.repository, first, None, "test", &silent).unwrap();
    writer.promise();
    writer.forget(&[1, 2]);
    let other = undeletable(&writer.world.repository);
    undelete(&writer.world.repository, other, &silent).unwrap();
    // which of the two it is does not matter: its content is not promised again
    forget(&writer.world.repository, &[other], "test", false, &silent).unwrap();
    unhold(&writer.world.repository, first, &silent).unwrap();
    writer.promise();
    repacked.push(writer.prune());
    repairs(&mut writer);
    for day in 6..9 {
        writer.backup(day, Level::Incremental);
    }
    writer.forget(&[0]);
    repacked.push(writer.prune());
    assert!(repacked.iter().all(|packs| *packs > 0), "a prune wrote no pack anew: {repacked:?}");
    History { storage, promises: writer.promises }
}

fn undeletable(repository: &Repository) -> PointId {
    repository.catalog(&Recorder::new()).unwrap().forgotten()[0].record.id
}

fn repairs(writer: &mut Writer) {
    let silent = Recorder::new();
    let segments = writer.storage.list(Folder::Segments).unwrap();
    writer.lose(segments[0].name);
    repair_index(&writer.world.repository, false, &silent).unwrap();
    writer.mended();
    let metadata = writer.storage.list(Folder::Packs).unwrap().into_iter().find(|listed| {
        let bytes = writer.storage.get(listed.name, MAX_PACK_LEN).unwrap();
        crate::format::pack::PackHeader::decode(&bytes[..crate::format::pack::PACK_HEADER_LEN]).unwrap().kind
            == crate::format::pack::PackKind::Metadata
    });
    writer.lose(metadata.unwrap().name);
    writer.verify();
    repair_packs(&writer.world.repository, &PacksOptions::default(), &silent).unwrap();
    // the lost pack is still named by its segment
    writer.prune();
    writer.mended();
    for is_spoilt in [false, true] {
        let point = writer.world.kept.remove(0);
        let name = ObjectName::Outcome(point.id.into());
        writer.lose(name);
        if is_spoilt {
            writer.storage.put_new(name, b"spoilt").unwrap();
            writer.promise();
        }
        let report = repair_points(&writer.world.repository, false, &silent).unwrap();
        assert_eq!(report.brought_back, [point.id]);
        writer.world.kept.insert(0, point);
        writer.mended();
    }
}

impl History {
    /// Checks one after-image; panics with what is wrong.
    fn check(&self, cut: usize, survival: Survival) {
        let image = self.storage.image(cut, survival);
        if image.len(ObjectName::Config).is_err() {
            assert!(self.promises[0].steps > cut, "the repository is gone");
            // what an attempt that was cut short left is no obstacle
            Repository::create(Box::new(image), &CreateOptions::default(), &environment()).unwrap();
            return;
        }
        // as it was: what is opened here is worked on
        let again = is_long().then(|| image.snapshot());
        let repository = Repository::open(Box::new(image), None, &environment(), &Recorder::new()).unwrap();
        let mut world = self.promised(cut, repository, &[]);
        world.check_reads();
        self.recover(&mut world, cut, again.as_ref());
    }

    /// Returns what has to be there, with what may be there and is: `more` too.
    fn promised(&self, cut: usize, repository: Repository, more: &[Kept]) -> World {
        let next = self.promises.iter().position(|promise| promise.steps > cut);
        let (before, after) = match next {
            Some(0) => (None, self.promises.first()),
            Some(next) => (self.promises.get(next - 1), self.promises.get(next)),
            None => (self.promises.last(), None),
        };
        let catalog = repository.catalog(&Recorder::new()).unwrap();
        let found: BTreeSet<PointId> = catalog.points().iter().map(|entry| entry.record.id).collect();
        let old = before.map(|promise| promise.kept.as_slice()).unwrap_or_default();
        let new = after.map_or(old, |promise| promise.kept.as_slice());
        // an operation that was under way may have made a point, or forgotten some
        let promised = old.iter().filter(|kept| new.iter().any(|other| other.id == kept.id));
        for kept in promised {
            assert!(found.contains(&kept.id), "a committed point is gone");
        }
        let mut kept: Vec<Kept> = Vec::new();
        for candidate in old.iter().chain(new).chain(more) {
            if found.contains(&candidate.id) && kept.iter().all(|known| known.id != candidate.id) {
                kept.push(candidate.clone());
            }
        }
        let in_doubt = self.promises.iter().flat_map(|promise| &promise.kept).chain(more);
        for id in &found {
            assert!(in_doubt.clone().any(|kept| kept.id == *id), "a point that nobody made");
        }
        let contents = before.or(after).map(|promise| promise.contents.clone()).unwrap_or_default();
        World::resume(repository, &contents, kept)
    }

    fn is_broken(&self, cut: usize) -> bool {
        let next =
            self.promises.iter().position(|promise| promise.steps > cut).unwrap_or(self.promises.len());
        let before = next.checked_sub(1).and_then(|before| self.promises.get(before));
        before.is_some_and(|promise| promise.broken)
    }

    /// The next backup, verify and prune succeed without a manual step.
    fn recover(&self, world: &mut World, cut: usize, again: Option<&MemoryStorage>) {
        let broken = self.is_broken(cut);
        if broken {
            repair_index(&world.repository, false, &Recorder::new()).unwrap();
            repair_points(&world.repository, false, &Recorder::new()).unwrap();
        }
        look(world, broken);
        world.backup(RequestedLevel::Auto);
        if broken {
            repair_packs(&world.repository, &PacksOptions::default(), &Recorder::new()).unwrap();
        }
        prune(&world.repository, &PruneOptions::default(), &Recorder::new()).unwrap();
        world.check_reads();
        look(world, broken);
        let Some(image) = again else { return };
        // and a kill inside the recovery is no more than another crash
        let storage = CrashStorage::on(image, Flaw::None);
        // another process than the one that was killed before, and killed as well
        let another = Environment { process_id: u32::MAX - 1, ..dead_environment() };
        let repository =
            Repository::open(Box::new(storage.clone()), None, &another, &Recorder::new()).unwrap();
        let mut second = self.promised(cut, repository, &[]);
        second.backup(RequestedLevel::Auto);
        let made = second.kept.last().cloned();
        if broken {
            repair_index(&second.repository, false, &Recorder::new()).unwrap();
            repair_points(&second.repository, false, &Recorder::new()).unwrap();
        }
        prune(&second.repository, &PruneOptions::default(), &Recorder::new()).unwrap();
        for part in 0..4u64 {
            let at = storage.len() * (1 + part as usize * 2 + cut % 2) / 9;
            let image = storage.image(at, Survival::Some(cut as u64 * 4 + part));
            let repository =
                Repository::open(Box::new(image), None, &environment(), &Recorder::new()).unwrap();
            let mut third = self.promised(cut, repository, made.as_slice());
            third.check_reads();
            self.recover(&mut third, cut, None);
        }
    }
}

fn look(world: &World, broken: bool) {
    let options = VerifyOptions { level: VerifyLevel::Data, ..VerifyOptions::default() };
    let report = verify(&world.repository, &options, &Recorder::new()).unwrap();
    assert_eq!(report.damaged_points, [], "{:?}", report.findings);
    if !broken {
        assert_eq!(report.findings, []);
    }
}

/// Returns how many after-images were checked, and the first that was not in order.
fn enumerate(history: &History, every: usize) -> (usize, Option<String>) {
    let survivals = [Survival::All, Survival::Nothing].into_iter().chain((0..SUBSETS).map(Survival::Some));
    let survivals: Vec<Survival> = survivals.collect();
    let cuts: Vec<usize> = (0..=history.storage.len()).step_by(every).collect();
    let (next, checked) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let failure: Mutex<Option<String>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, std::num::NonZero::get) {
            scope.spawn(|| {
                while failure.lock().unwrap().is_none() {
                    let Some(cut) = cuts.get(next.fetch_add(1, Ordering::Relaxed)) else { return };
                    for survival in &survivals {
                        checked.fetch_add(1, Ordering::Relaxed);
                        let result = catch_unwind(AssertUnwindSafe(|| history.check(*cut, *survival)));
                        if let Err(panic) = result {
                            let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
                            let text =
                                format!("cut after {cut} of {}, {survival:?}: {text}", history.storage.len());
                            failure.lock().unwrap().get_or_insert(text);
                            return;
                        }
                    }
                }
            });
        }
    });
    (checked.into_inner(), failure.into_inner().unwrap())
}

#[test]
fn no_crash_at_any_step_loses_anything() {
    let history = history(Flaw::None, None);
    let (states, failure) = enumerate(&history, 1);
    assert_eq!(failure, None, "{states} states");
    println!("{states} states after {} steps, nothing lost", history.storage.len());
    assert!(states >= 5000, "only {states} states");
}

/// A directory that does not keep a rule is noticed: so the enumeration can fail.
#[test]
fn a_directory_that_does_not_sync_is_noticed() {
    for flaw in [Flaw::NoFileSync, Flaw::NoDirectorySync, Flaw::NoDeleteSync] {
        let (_, failure) = enumerate(&history(flaw, None), 3);
        assert!(failure.is_some(), "{flaw:?} was not noticed");
    }
}

/// The rules that the enumeration misses.
pub(super) const RULES: [Rule; 3] = [Rule::CommitLast, Rule::DecideBeforeSweep, Rule::SegmentsBeforePacks];

/// Nor does a backup or a prune go unnoticed that does things in another order.
#[test]
fn an_order_that_is_not_kept_is_noticed() {
    for rule in RULES {
        let (_, failure) = enumerate(&history(Flaw::None, Some(rule)), 1);
        let Some(failure) = failure else { panic!("{rule:?} was not noticed") };
        println!("{rule:?}: {}", failure.lines().next().unwrap_or_default());
    }
}

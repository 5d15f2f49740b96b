use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::Duration;

use super::*;
use crate::chunk::{FramedChunk, open_frame, read_pack_table};
use crate::format::node::ChunkKind;
use crate::format::pack::{PackHeader, PackKind, PackTable, TableChunk};
use crate::format::point::Level;
use crate::id::{ChunkId, SessionId};
use crate::monitor::{Recorder, TaskId};
use crate::ops::RequestedLevel;
use crate::ops::backup::tests::{World, environment, write, write_text};
use crate::ops::forget::forget;
use crate::ops::verify::{VerifyLevel, VerifyOptions, verify};
use crate::repo::Timing;
use crate::repo::writer::{FrameCopy, write_session};
use crate::storage::fault::{FailingStorage, Fault};
use crate::storage::hooked::HookedStorage;
use crate::storage::memory::MemoryStorage;
use crate::storage::{Listed, Storage};

fn options() -> PruneOptions {
    PruneOptions { max_unused_permille: 0, ..PruneOptions::default() }
}

fn forget_but_last(world: &mut World) {
    let last = world.kept.len() - 1;
    let ids: Vec<PointId> = world.kept.drain(..last).map(|kept| kept.id).collect();
    forget(&world.repository, &ids, "test", false, &Recorder::new()).unwrap();
}

/// Three points; each but the last has something of its own.
fn history(storage: MemoryStorage) -> World {
    let mut world = World::on(storage, &[8 << 20]);
    for day in 0..3 {
        write(&mut world, 0, 1 << 20, day);
        write(&mut world, (2 << 20) + day * (1 << 20), 100 << 10, 100 + day);
        world.backup(RequestedLevel::Is(if day == 0 { Level::Full } else { Level::Incremental }));
    }
    world
}

#[test]
fn what_only_forgotten_points_had_is_gone() {
    let mut world = history(MemoryStorage::new());
    let idle = prune(&world.repository, &options(), &Recorder::new()).unwrap();
    assert_eq!((idle.deleted_packs, idle.dropped_points.len()), (0, 0));
    forget_but_last(&mut world);
    let dry = PruneOptions { dry_run: true, ..options() };
    let planned = prune(&world.repository, &dry, &Recorder::new()).unwrap();
    let report = prune(&world.repository, &options(), &Recorder::new()).unwrap();
    assert_eq!(
        (planned.deleted_packs, planned.repacked_packs, planned.live_chunks),
        (report.deleted_packs, report.repacked_packs, report.live_chunks)
    );
    assert_eq!(report.dropped_points.len(), 2);
    // two times 1 MiB of noise went, 1 MiB and 300 KiB stay
    assert!(report.stored_before_bytes - report.stored_after_bytes >= 2 << 20, "{report:?}");
    assert!(report.stored_after_bytes < (1 << 20) + (500 << 10), "{report:?}");
    world.check_all();
    world.reopen();
    world.check_all();
    let catalog = world.repository.catalog(&Recorder::new()).unwrap();
    assert_eq!((catalog.points().len(), catalog.forgotten().len()), (1, 0));
    // the next backup finds its chunks, and prune has nothing left to do
    let quiet = world.backup(RequestedLevel::Auto);
    assert_eq!(quiet.stats.new_bytes, 0);
    let idle = prune(&world.repository, &options(), &Recorder::new()).unwrap();
    assert_eq!(idle.deleted_bytes, 0, "{idle:?}");
}

/// A storage whose process is cut off: from the n-th change on nothing works any more.
#[derive(Debug, Clone)]
struct CutOff {
    inner: MemoryStorage,
    left: Arc<AtomicU64>,
}

impl CutOff {
    fn step(&self) -> Result<()> {
        let left = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        match left {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::io("reach", "the storage", std::io::Error::other("cut off"))),
        }
    }

    fn is_cut(&self) -> Result<()> {
        match self.left.load(Ordering::SeqCst) {
            0 => Err(Error::io("reach", "the storage", std::io::Error::other("cut off"))),
            _ => Ok(()),
        }
    }
}

impl Storage for CutOff {
    fn url(&self) -> String {
        "cut off".into()
    }

    fn put_new(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        self.step()?;
        self.inner.put_new(name, bytes)
    }

    fn replace(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        self.step()?;
        self.inner.replace(name, bytes)
    }

    fn get(&self, name: ObjectName, max_len: u64) -> Result<Vec<u8>> {
        self.is_cut()?;
        self.inner.get(name, max_len)
    }

    fn get_range(&self, name: ObjectName, offset: u64, len: u64) -> Result<Vec<u8>> {
        self.is_cut()?;
        self.inner.get_range(name, offset, len)
    }

    fn len(&self, name: ObjectName) -> Result<u64> {
        self.is_cut()?;
        self.inner.len(name)
    }

    fn list(&self, folder: Folder) -> Result<Vec<Listed>> {
        self.is_cut()?;
        self.inner.list(folder)
    }

    fn delete(&self, name: ObjectName) -> Result<()> {
        self.step()?;
        self.inner.delete(name)
    }

    fn sync_deletes(&self, folder: Folder) -> Result<()> {
        self.is_cut()?;
        self.inner.sync_deletes(folder)
    }
}

/// A process of this host that is not there any more.
fn dead_environment() -> crate::repo::Environment {
    crate::repo::Environment { process_id: u32::MAX, ..environment() }
}

#[test]
fn cut_off_after_any_change_it_loses_nothing_and_the_next_one_succeeds() {
    let mut cuts = 0;
    for left in 0.. {
        let storage = MemoryStorage::new();
        let mut world = history(storage.clone());
        forget_but_last(&mut world);
        let cut = CutOff { inner: storage.clone(), left: Arc::new(AtomicU64::new(u64::MAX)) };
        let repository =
            Repository::open(Box::new(cut.clone()), None, &dead_environment(), &Recorder::new()).unwrap();
        cut.left.store(left, Ordering::SeqCst);
        let ended = prune(&repository, &options(), &Recorder::new());
        drop(repository);
        world.reopen();
        world.check_all_but_findings();
        let report = prune(&world.repository, &options(), &Recorder::new()).unwrap();
        world.check_all();
        let after = if ended.is_ok() { report.stored_before_bytes } else { report.stored_after_bytes };
        assert!(after < (1 << 20) + (500 << 10), "cut after {left}: {report:?}");
        let quiet = world.backup(RequestedLevel::Auto);
        assert_eq!(quiet.stats.new_bytes, 0);
        if ended.is_ok() {
            break;
        }
        cuts += 1;
    }
    assert!(cuts > 15, "only {cuts} changes");
}

/// A sweep of which it is not known whether it would survive a power cut is decided for whoever sees it: its mark stays.
#[test]
fn a_mark_goes_only_behind_an_abort() {
    for (fault, stays) in [(Fault::FailedSync, true), (Fault::FailedSyncAndGone, false)] {
        let storage = MemoryStorage::new();
        let mut world = history(storage.clone());
        forget_but_last(&mut world);
        let failing = FailingStorage::at_put(storage.clone(), Folder::Outcomes, 0, fault);
        let repository =
            Repository::open(Box::new(failing.clone()), None, &dead_environment(), &Recorder::new()).unwrap();
        assert!(prune(&repository, &options(), &Recorder::new()).is_err(), "{fault:?}");
        assert!(failing.has_failed());
        let marks = storage.list(Folder::Marks).unwrap();
        assert_eq!(!marks.is_empty(), stays, "{fault:?}");
        drop(repository);
        world.reopen();
        world.check_all_but_findings();
        let planning = Recorder::new();
        prune(&world.repository, &PruneOptions { dry_run: true, ..options() }, &planning).unwrap();
        assert_eq!(planning.warnings().len(), usize::from(stays), "a plan says what comes before it");
        let finishing = Recorder::new();
        prune(&world.repository, &options(), &finishing).unwrap();
        let finished = finishing.notes().iter().any(|note| note.contains("an earlier prune had decided"));
        assert_eq!(finished, stays, "{fault:?}: {:?}", finishing.notes());
        assert_eq!(storage.list(Folder::Marks).unwrap(), []);
        world.check_all();
    }
}

#[test]
fn a_running_backup_is_waited_for_and_loses_nothing() {
    let storage = MemoryStorage::new();
    let mut world = history(storage.clone());
    // what the forgotten points had is what the backup is about to rely on
    write(&mut world, 6 << 20, 1 << 20, 0);
    forget_but_last(&mut world);
    let other = Repository::open(Box::new(storage), None, &environment(), &Recorder::new()).unwrap();
    let session = Session::begin(&world.repository, SessionKind::Backup).unwrap();
    let report = std::thread::scope(|scope| {
        let pruning = scope.spawn(|| prune(&other, &options(), &Recorder::new()).unwrap());
        std::thread::sleep(std::time::Duration::from_millis(300));
        assert!(!pruning.is_finished(), "prune did not wait");
        drop(session);
        // this one begins behind the mark, or behind the sweep
        world.backup(RequestedLevel::Auto);
        pruning.join().unwrap()
    });
    assert_eq!(report.dropped_points.len(), 2);
    world.check_all();
}

fn patient_for(millis: u64) -> crate::repo::Environment {
    let (dead_after, poll) = (Duration::from_millis(millis), Duration::from_millis(5));
    let timing = Timing { heartbeat: Duration::from_millis(20), dead_after, poll, ..Timing::default() };
    crate::repo::Environment { timing, ..environment() }
}

/// One that was killed, and whose process id another program has now, is in nobody's way; nor is one that hangs.
#[test]
fn a_prune_that_shows_no_sign_of_life_is_ended_whatever_process_there_is() {
    let storage = MemoryStorage::new();
    let mut world = history(storage.clone());
    forget_but_last(&mut world);
    // process 1 is there, and this session's first heartbeat is a minute away
    let silent = Session::begin(&world.repository, SessionKind::Prune).unwrap();
    let open = |environment| {
        Repository::open(Box::new(storage.clone()), None, &environment, &Recorder::new()).unwrap()
    };
    let report = prune(&open(patient_for(200)), &options(), &Recorder::new()).unwrap();
    assert_eq!(report.dropped_points.len(), 2);
    assert!(matches!(silent.commit(&Outcome::Done), Err(Error::Fenced { .. })));
    let alive = Session::begin(&open(patient_for(60_000)), SessionKind::Prune).unwrap();
    let second = prune(&open(patient_for(60_000)), &options(), &Recorder::new());
    assert!(matches!(second, Err(Error::Busy { .. })), "{second:?}");
    alive.commit(&Outcome::Done).unwrap();
    world.check_all();
}

/// Once for the index, and once to go through them, however often.
#[test]
fn segments_are_read_twice_at_most() {
    let storage = MemoryStorage::new();
    let mut world = history(storage.clone());
    forget_but_last(&mut world);
    let reads: Arc<Mutex<HashMap<SegmentId, u32>>> = Arc::default();
    let counted = Arc::clone(&reads);
    let hooked = HookedStorage::new(&storage).before_read(move |name| {
        if let ObjectName::Segment(id) = name {
            *counted.lock().unwrap().entry(id).or_default() += 1;
        }
    });
    let listed = world.repository.segments().unwrap();
    let repository = Repository::open(Box::new(hooked), None, &environment(), &Recorder::new()).unwrap();
    let report = prune(&repository, &options(), &Recorder::new()).unwrap();
    assert!(report.repacked_packs > 0 && report.deleted_segments > 0, "{report:?}");
    let reads = reads.lock().unwrap();
    assert!(listed.iter().all(|id| (1..=2).contains(reads.get(id).unwrap())), "{reads:?}");
    world.check_all();
}

/// Where nothing is copied, no map is read again behind the mark.
#[test]
fn copying_ends_when_nothing_is_left_to_copy() {
    let reads_of = |max_unused_permille: u64| {
        let storage = MemoryStorage::new();
        let mut world = history(storage.clone());
        forget_but_last(&mut world);
        let (marked, reads) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (is_marked, counted) = (Arc::clone(&marked), Arc::clone(&reads));
        let hooked = HookedStorage::new(&storage)
            .behind_put(move |name| {
                marked.fetch_or(matches!(name, ObjectName::Mark(_)), Ordering::SeqCst);
                Ok(())
            })
            .before_read(move |name| {
                let counts = is_marked.load(Ordering::SeqCst) && matches!(name, ObjectName::Pack(_));
                counted.fetch_add(u64::from(counts), Ordering::SeqCst);
            });
        let repository = Repository::open(Box::new(hooked), None, &environment(), &Recorder::new()).unwrap();
        let options = PruneOptions { max_unused_permille, ..PruneOptions::default() };
        let report = prune(&repository, &options, &Recorder::new()).unwrap();
        assert!(report.dropped_points.len() == 2 && report.deleted_segments > 0, "{report:?}");
        world.check_all();
        (report.repacked_packs, reads.load(Ordering::SeqCst))
    };
    assert_eq!(reads_of(1000), (0, 0));
    let (repacked, reads) = reads_of(0);
    assert!(repacked > 0 && reads > 0, "{repacked} {reads}");
}

/// Of two that see one another before either has begun to work, one goes on.
#[test]
fn one_of_two_prunes_at_the_same_moment_succeeds() {
    let storage = MemoryStorage::new();
    let mut world = history(storage.clone());
    forget_but_last(&mut world);
    let calm = crate::repo::Environment {
        timing: Timing { heartbeat: Duration::from_millis(250), ..patient_for(60_000).timing },
        ..environment()
    };
    let meeting = Arc::new(Barrier::new(2));
    let meets = HookedStorage::new(&storage).behind_put(move |name| {
        if matches!(name, ObjectName::Session(_)) {
            meeting.wait();
        }
        Ok(())
    });
    let run = || {
        let repository = Repository::open(Box::new(meets.clone()), None, &calm, &Recorder::new()).unwrap();
        prune(&repository, &options(), &Recorder::new())
    };
    let both = std::thread::scope(|scope| [scope.spawn(run), scope.spawn(run)].map(|it| it.join().unwrap()));
    assert_eq!(both.iter().filter(|pruned| pruned.is_ok()).count(), 1, "{both:?}");
    assert!(both.iter().any(|pruned| matches!(pruned, Err(Error::Busy { .. }))), "{both:?}");
    assert_eq!(storage.list(Folder::Marks).unwrap(), []);
    world.check_all();
}

/// Two machines may have one name: only of this machine another boot says that the process is gone.
#[test]
fn a_session_is_dead_only_on_the_machine_that_knows_it() {
    let world = World::new(&[1 << 20]);
    let on = |host: &str, boot_id: &str| crate::repo::Environment {
        host: host.into(),
        boot_id: boot_id.into(),
        ..dead_environment()
    };
    let here = on("localhost", "m1/boot2");
    let open = |environment: &crate::repo::Environment| {
        Repository::open(Box::new(world.storage.clone()), None, environment, &Recorder::new()).unwrap()
    };
    let looking = Repository::open(
        Box::new(world.storage.clone()),
        None,
        &crate::repo::Environment { process_id: 1, ..here.clone() },
        &Recorder::new(),
    )
    .unwrap();
    for (environment, is_dead) in [
        (on("localhost", "m1/boot1"), true),
        (here, true),
        (on("localhost", "m2/boot1"), false),
        (on("localhost", "boot1"), false),
        (on("other", "m1/boot1"), false),
    ] {
        let session = Session::begin(&open(&environment), SessionKind::Backup).unwrap();
        let found = looking.open_sessions().unwrap();
        let dead: Vec<bool> = found.iter().map(|session| looking.is_dead_here(session)).collect();
        assert_eq!(dead, [is_dead], "{environment:?}");
        session.abort("test").unwrap();
    }
}

/// What a killed backup had stored is in the plan of a dry run, which ends nobody.
#[test]
fn the_plan_of_a_dry_run_is_the_plan_that_runs() {
    let storage = MemoryStorage::new();
    let mut world = history(storage.clone());
    let cut = CutOff { inner: storage.clone(), left: Arc::new(AtomicU64::new(u64::MAX)) };
    let killed =
        Repository::open(Box::new(cut.clone()), None, &dead_environment(), &Recorder::new()).unwrap();
    let known = storage.list(Folder::Packs).unwrap();
    let mut other = World::resume(killed, &world.contents(), Vec::new());
    write(&mut other, 4 << 20, 300 << 10, 77);
    // its registration, a pack of data, two of metadata, a segment; no outcome
    cut.left.store(5, Ordering::SeqCst);
    assert!(other.try_backup(RequestedLevel::Auto).is_err());
    drop(other);
    let stored = storage.list(Folder::Packs).unwrap();
    let left: Vec<PackId> = stored
        .iter()
        .filter_map(|listed| match listed.name {
            ObjectName::Pack(id) if !known.contains(listed) => Some(id),
            _ => None,
        })
        .collect();
    assert_eq!((left.len(), storage.list(Folder::Sessions).unwrap().len()), (3, 1));
    // whatever becomes of them: no point needs them, and a verify says that it did not read them
    storage.tamper(ObjectName::Pack(left[0]), |mut bytes| {
        bytes[100] ^= 1;
        Some(bytes)
    });
    let verified = verify(&world.repository, &VerifyOptions::default(), &Recorder::new()).unwrap();
    assert_eq!((verified.findings.len(), verified.unlisted_packs), (0, 3));
    assert!(verified.unlisted_bytes > 300 << 10, "{verified:?}");
    forget_but_last(&mut world);
    let dry = PruneOptions { dry_run: true, ..options() };
    let planned = prune(&world.repository, &dry, &Recorder::new()).unwrap();
    let is_planned = |id: &PackId| planned.packs.iter().any(|planned| planned.pack == *id);
    assert!(left.iter().all(is_planned), "what a killed backup left is not in the plan");
    let before = storage.list(Folder::Packs).unwrap();
    assert_eq!(before, stored, "a dry run changed something");
    let report = prune(&world.repository, &options(), &Recorder::new()).unwrap();
    assert_eq!(
        (&planned.packs, &planned.dropped_points, planned.merged_segments, planned.live_chunks),
        (&report.packs, &report.dropped_points, report.merged_segments, report.live_chunks)
    );
    let after = storage.list(Folder::Packs).unwrap();
    let gone = before.iter().filter(|listed| !after.contains(listed)).map(|listed| listed.name);
    let planned: HashSet<ObjectName> =
        planned.packs.iter().map(|planned| ObjectName::Pack(planned.pack)).collect();
    assert_eq!(gone.collect::<HashSet<_>>(), planned, "what went is what was planned");
    world.check_all();
}

/// Something happens while a prune waits in its fence.
struct WhileWaiting<F>(F);

impl<F: Fn() + Send + Sync> Monitor for WhileWaiting<F> {
    fn start(&self, _name: &str, _total_bytes: u64) -> TaskId {
        TaskId(0)
    }

    fn advance(&self, _task: TaskId, _bytes: u64) {}

    fn finish(&self, _task: TaskId) {}

    fn warn(&self, _message: &str) {}

    fn note(&self, message: &str) {
        if message.starts_with("waiting for session") {
            (self.0)();
        }
    }

    fn is_cancelled(&self) -> bool {
        false
    }
}

/// A point that loses its outcome behind the choice looks like what a killed session left, and is not.
#[test]
fn an_outcome_that_is_lost_meanwhile_stops_it() {
    let storage = MemoryStorage::new();
    let mut world = history(storage.clone());
    forget_but_last(&mut world);
    let lost = ObjectName::Outcome(SessionId::from(world.kept[0].id));
    let before = storage.list(Folder::Packs).unwrap();
    let session =
        std::sync::Mutex::new(Some(Session::begin(&world.repository, SessionKind::Backup).unwrap()));
    let meanwhile = WhileWaiting(|| {
        storage.tamper(lost, |_| None);
        drop(session.lock().unwrap().take());
    });
    let stopped = prune(&world.repository, &options(), &meanwhile);
    assert!(stopped.is_err_and(|error| error.to_string().contains(&lost.to_string())));
    assert!(storage.len(lost).is_err());
    let after = storage.list(Folder::Packs).unwrap();
    assert!(before.iter().all(|listed| after.contains(listed)), "something was deleted");
    let back = crate::ops::repair::repair_points(&world.repository, false, &Recorder::new()).unwrap();
    assert_eq!(back.brought_back, [world.kept[0].id]);
    world.check_reads();
}

#[test]
fn a_missing_live_chunk_stops_it() {
    let storage = MemoryStorage::new();
    let mut world = history(storage.clone());
    forget_but_last(&mut world);
    let packs = storage.list(Folder::Packs).unwrap();
    let largest = packs.iter().max_by_key(|listed| listed.len).unwrap();
    for listed in packs.iter().filter(|listed| listed.len == largest.len) {
        storage.tamper(listed.name, |_| None);
    }
    let before = storage.list(Folder::Packs).unwrap();
    let last = &world.kept[0];
    let lost = prune(&world.repository, &options(), &Recorder::new());
    assert!(lost.is_err(), "{lost:?} with {:?}", last.id);
    let after = storage.list(Folder::Packs).unwrap();
    assert!(before.iter().all(|listed| after.contains(listed)), "something was deleted");
}

/// Returns the packs of data, each with its table and its bytes.
fn data_packs(storage: &MemoryStorage) -> Vec<(PackId, PackTable, Vec<u8>)> {
    let listed = storage.list(Folder::Packs).unwrap();
    let packs = listed.iter().filter_map(|listed| {
        let ObjectName::Pack(id) = listed.name else { return None };
        let bytes = storage.get(listed.name, listed.len).unwrap();
        let mut read = |offset: u64, len: u64| Ok(bytes[offset as usize..(offset + len) as usize].to_vec());
        let table = read_pack_table(id, listed.len, &mut read).unwrap();
        let is_data = PackHeader::decode(&bytes).unwrap().kind == PackKind::Data;
        is_data.then_some((id, table, bytes))
    });
    packs.collect()
}

/// Returns the frames of data as they are stored.
fn stored_frames(storage: &MemoryStorage) -> HashSet<Vec<u8>> {
    let of_pack = |(_, table, bytes): &(PackId, PackTable, Vec<u8>)| -> Vec<Vec<u8>> {
        table.frames.iter().map(|frame| bytes[frame.offset as usize..frame.end() as usize].to_vec()).collect()
    };
    data_packs(storage).iter().flat_map(of_pack).collect()
}

/// A pack of 6 frames or so, of which the first one is not needed as a whole any more.
fn mostly_live(storage: &MemoryStorage) -> World {
    let mut world = World::on(storage.clone(), &[8 << 20]);
    write_text(&mut world, 0, 6 << 20, 1);
    world.backup(RequestedLevel::Is(Level::Full));
    write_text(&mut world, 200 << 10, 300 << 10, 2);
    world.backup(RequestedLevel::Auto);
    forget_but_last(&mut world);
    world
}

#[test]
fn frames_of_which_everything_stays_are_copied_as_they_are() {
    let storage = MemoryStorage::new();
    let world = mostly_live(&storage);
    let before = stored_frames(&storage);
    let report = prune(&world.repository, &options(), &Recorder::new()).unwrap();
    assert!(report.repacked_packs > 0, "{report:?}");
    let after = stored_frames(&storage);
    let copied = before.intersection(&after).count();
    // what is left of the first frame, and the short one of the second point, are put together: compressed anew in their
    // order, all others would begin somewhere else
    assert_eq!((before.len() - copied, after.len() - copied), (2, 1), "{} {}", before.len(), after.len());
    assert!(copied >= 5, "{copied}");
    world.check_all();
}

#[test]
fn a_frame_that_is_copied_is_checked() {
    let storage = MemoryStorage::new();
    let world = mostly_live(&storage);
    let before = storage.list(Folder::Packs).unwrap();
    let (pack, table, _) = data_packs(&storage).into_iter().max_by_key(|(.., bytes)| bytes.len()).unwrap();
    let last = table.frames.last().unwrap();
    storage.tamper(ObjectName::Pack(pack), |mut bytes| {
        bytes[last.end() as usize - 100] ^= 1;
        Some(bytes)
    });
    let lost = prune(&world.repository, &options(), &Recorder::new()).unwrap_err();
    assert!(lost.is_damage() && lost.to_string().contains("nothing was deleted"), "{lost}");
    let after = storage.list(Folder::Packs).unwrap();
    assert!(before.iter().all(|listed| after.contains(listed)), "something was deleted");
}

/// A frame cannot be copied where it is said to be: what is in it is somewhere else.
#[test]
fn what_a_bad_frame_has_is_copied_from_elsewhere() {
    let storage = MemoryStorage::new();
    let world = mostly_live(&storage);
    let (_, table, _) = data_packs(&storage).into_iter().max_by_key(|(.., bytes)| bytes.len()).unwrap();
    let chunks = table.chunks.iter().filter(|chunk| chunk.frame == 1);
    let framed = |chunk: &TableChunk| FramedChunk {
        kind: chunk.kind,
        id: chunk.id,
        offset: chunk.offset,
        len: chunk.len,
    };
    let mut chunks: Vec<FramedChunk> = chunks.map(framed).collect();
    chunks.sort_unstable_by_key(|chunk| chunk.offset);
    let (catalog, view) = world.repository.refresh(&Recorder::new()).unwrap();
    let reader = ChunkReader::new(&world.repository, &view);
    let session = Session::begin(&world.repository, SessionKind::Prune).unwrap();
    let known = data_packs(&storage);
    let copy = |chunks: &[FramedChunk]| {
        let pack = PackId::from_bytes([1; 32]);
        let copy = FrameCopy { pack, entry: table.frames[1], chunks: chunks.to_vec(), failing: "oh no" };
        write_session(&world.repository, &reader, session.id(), |writer| writer.copy_frame(copy))
    };
    copy(&chunks).unwrap();
    let new = data_packs(&storage).into_iter().find(|(id, ..)| known.iter().all(|(known, ..)| known != id));
    let (_, copied, bytes) = new.unwrap();
    let frame = copied.frames[0];
    let plain = open_frame(&bytes[frame.offset as usize..frame.end() as usize], &frame).unwrap();
    for chunk in &chunks {
        let content = &plain[chunk.offset as usize..(chunk.offset + chunk.len) as usize];
        assert!(world.repository.hasher().chunk_id(ChunkKind::Data, content) == chunk.id);
    }
    assert_eq!(copied.chunks.len(), chunks.len());
    chunks[1].id = ChunkId::from_bytes([2; 32]);
    let lost = copy(&chunks).unwrap_err();
    assert!(lost.to_string().contains("oh no"), "{lost}");
    drop(catalog);
}

/// Of two copies the damaged one goes, whichever segment comes first in their order, which is random.
#[test]
fn the_copy_that_healed_stays() {
    for _ in 0..6 {
        let storage = MemoryStorage::new();
        let mut world = World::on(storage.clone(), &[8 << 20]);
        write(&mut world, 0, 1 << 20, 1);
        world.backup(RequestedLevel::Is(Level::Full));
        let before = storage.list(Folder::Packs).unwrap();
        let largest = before.iter().max_by_key(|listed| listed.len).unwrap();
        storage.tamper(largest.name, |mut bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            Some(bytes)
        });
        let options = VerifyOptions { level: VerifyLevel::Data, record: true, ..VerifyOptions::default() };
        assert!(!verify(&world.repository, &options, &Recorder::new()).unwrap().damaged_points.is_empty());
        assert!(world.backup(RequestedLevel::Auto).stats.new_bytes > 0, "nothing healed");
        let is_new = |listed: &&Listed| !before.contains(listed);
        let new: Vec<Listed> = storage.list(Folder::Packs).unwrap().iter().filter(is_new).copied().collect();
        let thrifty = PruneOptions { max_repack_bytes: 0, ..PruneOptions::default() };
        prune(&world.repository, &thrifty, &Recorder::new()).unwrap();
        let after = storage.list(Folder::Packs).unwrap();
        assert!(new.iter().all(|listed| after.contains(listed)), "what healed was deleted");
        world.check_reads();
    }
}

//! Backups that a prune does not see, because its listing of sessions lags behind.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use super::*;
use crate::format::name::{Folder, ObjectName};
use crate::format::point::Level;
use crate::format::session::Mark;
use crate::id::SessionId;
use crate::monitor::Recorder;
use crate::ops::RequestedLevel;
use crate::ops::backup::tests::{World, environment, write};
use crate::ops::forget::forget;
use crate::ops::prune::{PruneOptions, prune};
use crate::ops::verify::{VerifyLevel, VerifyOptions, verify};
use crate::repo::{Environment, Timing};
use crate::storage::hooked::HookedStorage;
use crate::storage::memory::MemoryStorage;
use crate::storage::{Listed, Storage};

const SIZE: u64 = 4 << 20;

fn open(storage: HookedStorage, rule: Option<Rule>) -> Repository {
    let environment = Environment { timing: Timing { broken: rule, ..Timing::default() }, ..environment() };
    Repository::open(Box::new(storage), None, &environment, &Recorder::new()).unwrap()
}

/// A disk of which a first point had what it has again; the point between them is the predecessor.
fn before(storage: &MemoryStorage) -> World {
    let mut world = World::on(storage.clone(), &[SIZE]);
    for (day, level) in [Level::Full, Level::Incremental].into_iter().enumerate() {
        write(&mut world, 0, SIZE / 2, day as u64);
        world.backup(RequestedLevel::Is(level));
    }
    write(&mut world, 0, SIZE / 2, 0);
    world
}

/// Has a prune decide its sweep while a backup, of which it knows nothing, is about to commit; it deletes behind that.
/// Forgets so many points, and returns what the backup stored, and whether everything can be read.
fn prune_that_sees_no_session(forgotten: usize, rule: Option<Rule>) -> (u64, Result<()>) {
    let storage = MemoryStorage::new();
    let mut world = before(&storage);
    let ids: Vec<PointId> = world.kept.drain(..forgotten).map(|kept| kept.id).collect();
    let (begin, begun): (Sender<()>, Receiver<()>) = channel();
    let (decide, decided): (Sender<()>, Receiver<()>) = channel();
    // nothing is sent: it ends
    let (go_on, goes_on): (Sender<()>, Receiver<()>) = channel();
    let made = std::thread::scope(|scope| {
        let goes_on = Mutex::new(goes_on);
        let is_blind = |folder, listed| if folder == Folder::Sessions { Vec::new() } else { listed };
        let blind = HookedStorage::new(&storage).on_list(is_blind).behind_put(move |name| {
            if matches!(name, ObjectName::Outcome(_)) {
                decide.send(()).unwrap();
                goes_on.lock().unwrap().recv().unwrap_err();
            }
            Ok(())
        });
        let pruning = scope.spawn({
            let storage = storage.clone();
            move || {
                begun.recv().unwrap();
                forget(&open(HookedStorage::new(&storage), None), &ids, "test", false, &Recorder::new())
                    .unwrap();
                let options = PruneOptions { max_unused_permille: 0, ..PruneOptions::default() };
                prune(&open(blind, None), &options, &Recorder::new()).unwrap()
            }
        });
        let (looks, decided) = (AtomicUsize::new(0), Mutex::new(decided));
        let look = Arc::new(move || {
            // the first look is when the backup begins
            if looks.fetch_add(1, Ordering::SeqCst) == 1 {
                begin.send(()).unwrap();
                decided.lock().unwrap().recv().unwrap();
            }
        });
        // a backup that does not look again has the prune begin behind its last read
        let late = rule.is_some().then(|| Arc::clone(&look));
        let seeing = HookedStorage::new(&storage)
            .before_list(move |folder| {
                if folder == Folder::Marks {
                    look()
                }
            })
            .behind_put(move |name| {
                let is_segment = matches!(name, ObjectName::Segment(_));
                late.iter().filter(|_| is_segment).for_each(|late| late());
                Ok(())
            });
        world.repository = open(seeing, rule);
        let made = world.try_backup(RequestedLevel::Auto);
        // with it the senders: where one has sent nothing, nobody waits for ever
        world.repository = open(HookedStorage::new(&storage), None);
        drop(go_on);
        let pruned = pruning.join().unwrap();
        assert_eq!(pruned.dropped_points.len(), forgotten);
        made
    });
    let (made, read) = (made.unwrap(), world.try_reads());
    if read.is_ok() {
        // it took the backup's first packs for a killed session's: its segments speak of packs that are gone
        let options = VerifyOptions { level: VerifyLevel::Data, ..VerifyOptions::default() };
        let found = verify(&world.repository, &options, &Recorder::new()).unwrap();
        assert_eq!(found.damaged_points, [], "{:?}", found.findings);
        prune(&world.repository, &PruneOptions::default(), &Recorder::new()).unwrap();
        world.check_all();
    }
    assert_eq!(made.stats.new_bytes, 0, "the first point had it");
    (made.stats.stored_bytes, read)
}

#[test]
fn what_a_prune_marks_meanwhile_is_stored_again() {
    let (stored, read) = prune_that_sees_no_session(1, None);
    read.unwrap();
    // half of the disk is the first point's, which goes; the rest is zero
    assert!((SIZE / 2..SIZE * 5 / 8).contains(&stored), "{stored} bytes");
    let (stored, lost) = prune_that_sees_no_session(1, Some(Rule::LookAgain));
    assert!(lost.is_err() && stored == 0, "not to look again is not missed: {lost:?}");
}

/// Then maps go too, and what the backup only took over.
#[test]
fn a_predecessor_may_be_marked_meanwhile() {
    let (stored, read) = prune_that_sees_no_session(2, None);
    read.unwrap();
    assert!(stored >= SIZE / 2, "{stored} bytes");
    assert!(prune_that_sees_no_session(2, Some(Rule::LookAgain)).1.is_err());
}

#[test]
fn what_an_unmarked_predecessor_shares_is_not_stored_again() {
    let storage = MemoryStorage::new();
    let mut world = before(&storage);
    world.backup(RequestedLevel::Auto);
    write(&mut world, SIZE / 2, 64 << 10, 5);
    // the beginning of what the disk has elsewhere
    write(&mut world, SIZE * 3 / 4, 256 << 10, 0);
    let (looks, packs) = (AtomicUsize::new(0), storage.list(Folder::Packs).unwrap());
    let inner = storage.clone();
    let hooked = HookedStorage::new(&storage).before_list(move |folder| {
        if folder == Folder::Marks && looks.fetch_add(1, Ordering::SeqCst) == 1 {
            mark(&inner, &packs, &[PointId::from_bytes([9; 16])]);
        }
    });
    world.repository = open(hooked, None);
    let made = world.backup(RequestedLevel::Auto);
    assert!((64 << 10..160 << 10).contains(&made.stats.new_bytes), "{:?}", made.stats);
    // what was changed, and no byte of the 2 MiB beside it
    assert!((320 << 10..400 << 10).contains(&made.stats.stored_bytes), "{:?}", made.stats);
}

fn mark(storage: &MemoryStorage, packs: &[Listed], points: &[PointId]) {
    let packs = packs.iter().filter_map(|listed| match listed.name {
        ObjectName::Pack(id) => Some(id),
        _ => None,
    });
    let mark = Mark { packs: packs.collect(), points: points.to_vec() };
    let repository = open(HookedStorage::new(storage), None);
    let name = ObjectName::Mark(SessionId::from_bytes(crate::repo::random().unwrap()));
    storage.put_new(name, &mark.to_object(repository.id()).unwrap()).unwrap();
}

#[test]
fn marks_without_end_make_it_busy() {
    let storage = MemoryStorage::new();
    let mut world = before(&storage);
    let (looks, inner) = (Arc::new(AtomicUsize::new(0)), storage.clone());
    let hooked = {
        let looks = Arc::clone(&looks);
        HookedStorage::new(&storage).before_list(move |folder| {
            let look = looks.load(Ordering::SeqCst);
            if folder == Folder::Marks {
                looks.fetch_add(1, Ordering::SeqCst);
            }
            if folder == Folder::Marks && look > 0 {
                // what the backup has put is named too
                let packs = inner.list(Folder::Packs).unwrap();
                mark(&inner, &packs, &[PointId::from_bytes([look as u8; 16])]);
            }
        })
    };
    world.repository = open(hooked, None);
    let packs = storage.list(Folder::Packs).unwrap().len();
    let refused = world.try_backup(RequestedLevel::Auto);
    assert!(matches!(refused, Err(Error::Busy { .. })), "{refused:?}");
    // one look when it begins, two in each round, and one behind the last
    assert_eq!(looks.load(Ordering::SeqCst), 2 + 2 * MAX_ROUNDS);
    assert!(storage.list(Folder::Packs).unwrap().len() <= packs + 3 * (1 + MAX_ROUNDS));
    // the marks are of no session: a prune clears them
    world.repository = open(HookedStorage::new(&storage), None);
    prune(&world.repository, &PruneOptions::default(), &Recorder::new()).unwrap();
    world.backup(RequestedLevel::Auto);
    let options = VerifyOptions { level: VerifyLevel::Data, ..VerifyOptions::default() };
    assert_eq!(verify(&world.repository, &options, &Recorder::new()).unwrap().findings, []);
    world.check_all();
}

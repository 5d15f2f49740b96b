use std::time::Duration;

use super::*;
use crate::format::point::Level;
use crate::monitor::Recorder;
use crate::ops::RequestedLevel;
use crate::ops::backup::tests::{World, environment, write};
use crate::ops::prune::{PruneOptions, prune};
use crate::storage::memory::MemoryStorage;

fn history(storage: MemoryStorage, points: u64) -> World {
    let mut world = World::on(storage, &[2 << 20]);
    for day in 0..points {
        write(&mut world, day << 16, 64 << 10, day);
        world.backup(RequestedLevel::Is(if day == 0 { Level::Full } else { Level::Incremental }));
    }
    world
}

fn ids(world: &World) -> Vec<PointId> {
    world.kept.iter().map(|kept| kept.id).collect()
}

fn shown(world: &World) -> Vec<PointId> {
    let catalog = world.repository.catalog(&Recorder::new()).unwrap();
    catalog.points().iter().map(|entry| entry.record.id).collect()
}

fn prune_all(world: &World) {
    let options = PruneOptions { max_unused_permille: 0, ..PruneOptions::default() };
    prune(&world.repository, &options, &Recorder::new()).unwrap();
}

#[test]
fn a_held_point_is_neither_forgotten_nor_dropped() {
    let world = history(MemoryStorage::new(), 4);
    let (ids, silent) = (ids(&world), Recorder::new());
    hold(&world.repository, ids[0], None, "audit", &silent).unwrap();
    let refused = forget(&world.repository, &ids[..2], "test", false, &silent);
    assert!(refused.unwrap_err().to_string().contains("it is held: audit"));
    assert_eq!(shown(&world), ids, "all or none");
    assert_eq!(unhold(&world.repository, ids[0], &silent).unwrap(), 1);
    forget(&world.repository, &ids[..2], "test", false, &silent).unwrap();
    assert!(
        hold(&world.repository, ids[0], None, "late", &silent).is_err(),
        "a forgotten one cannot be held"
    );
    undelete(&world.repository, ids[0], &silent).unwrap();
    assert_eq!(shown(&world), [ids[0], ids[2], ids[3]]);
    hold(&world.repository, ids[0], Some(i64::MAX), "audit", &silent).unwrap();
    // as two programs at once can leave it: forgotten and held
    bury(&world.repository, Tombstone { points: vec![ids[0]], reason: String::new(), time_ms: 0 }).unwrap();
    prune_all(&world);
    undelete(&world.repository, ids[0], &silent).unwrap();
    assert_eq!(shown(&world), [ids[0], ids[2], ids[3]]);
    assert!(undelete(&world.repository, ids[1], &silent).is_err(), "swept");
    assert!(undelete(&world.repository, ids[2], &silent).is_err(), "not forgotten");
}

#[test]
fn an_expired_hold_holds_nothing() {
    let world = history(MemoryStorage::new(), 3);
    let (ids, silent) = (ids(&world), Recorder::new());
    hold(&world.repository, ids[0], Some(0), "audit", &silent).unwrap();
    forget(&world.repository, &ids[..1], "test", false, &silent).unwrap();
    prune_all(&world);
    assert_eq!(shown(&world), ids[1..]);
    let catalog = world.repository.catalog(&silent).unwrap();
    assert!(catalog.spent().is_empty() && catalog.holds(ids[0]).is_empty(), "a hold goes with its point");
}

#[test]
fn bringing_one_back_leaves_the_others_forgotten() {
    let world = history(MemoryStorage::new(), 5);
    let (ids, silent) = (ids(&world), Recorder::new());
    forget(&world.repository, &ids[..3], "test", false, &silent).unwrap();
    forget(&world.repository, &ids[3..4], "test", false, &silent).unwrap();
    undelete(&world.repository, ids[1], &silent).unwrap();
    assert_eq!(shown(&world), [ids[1], ids[4]]);
    undelete(&world.repository, ids[3], &silent).unwrap();
    assert_eq!(shown(&world), [ids[1], ids[3], ids[4]]);
    let catalog = world.repository.catalog(&silent).unwrap();
    assert_eq!(catalog.tombstones().len(), 1);
    prune_all(&world);
    assert_eq!(shown(&world), [ids[1], ids[3], ids[4]]);
}

#[test]
fn guards_refuse_what_is_likely_a_mistake() {
    let world = history(MemoryStorage::new(), 6);
    let ids = ids(&world);
    let catalog = world.repository.catalog(&Recorder::new()).unwrap();
    check_guards(&catalog, &ids[..3], i64::MAX).unwrap();
    let text = |points: &[PointId]| check_guards(&catalog, points, i64::MAX).unwrap_err().to_string();
    assert!(text(&ids[4..5]).contains("newest two"));
    assert!(text(&ids[..4]).contains("more than half"));
    // by a clock that is behind, all of them are of the future
    let refused = check_guards(&catalog, &ids[3..], 0).unwrap_err().to_string();
    assert!(refused.contains("newest two"), "{refused}");
}

#[test]
fn a_planned_prune_is_the_one_that_follows() {
    let storage = MemoryStorage::new();
    let world = history(storage.clone(), 6);
    let (ids, silent) = (ids(&world), Recorder::new());
    let options = PruneOptions { max_unused_permille: 0, ..PruneOptions::default() };
    let before = storage.objects_for_test();
    let below = Box::new(storage.clone());
    let planned = plan_prune(below, None, &environment(), &ids[..4], &options, &silent).unwrap();
    assert!(storage.objects_for_test() == before, "nothing is changed");
    forget(&world.repository, &ids[..4], "test", false, &silent).unwrap();
    let dry = PruneOptions { dry_run: true, ..options.clone() };
    assert_eq!(planned, prune(&world.repository, &dry, &silent).unwrap());
    let done = prune(&world.repository, &options, &silent).unwrap();
    let dropped = |report: &PruneReport| report.dropped_points.iter().copied().collect::<BTreeSet<_>>();
    assert_eq!((dropped(&planned), &planned.packs), (dropped(&done), &done.packs));
    assert_eq!(done.dropped_points.len(), 4);
}

#[test]
fn a_prune_waits_for_one_that_is_being_brought_back() {
    let storage = MemoryStorage::new();
    let world = history(storage.clone(), 4);
    let (ids, silent) = (ids(&world), Recorder::new());
    forget(&world.repository, &ids[..2], "test", false, &silent).unwrap();
    let other = Repository::open(Box::new(storage), None, &environment(), &silent).unwrap();
    let session = Session::begin(&world.repository, SessionKind::Forget).unwrap();
    std::thread::scope(|scope| {
        let pruning = scope.spawn(|| prune(&other, &PruneOptions::default(), &Recorder::new()).unwrap());
        std::thread::sleep(Duration::from_millis(300));
        let marked = undelete(&world.repository, ids[0], &silent);
        assert!(matches!(marked, Err(Error::Busy { .. })), "it is marked: {marked:?}");
        // what a slower one does that looked before there was a mark
        for id in world.repository.catalog(&silent).unwrap().tombstones().keys() {
            world.repository.storage().delete(ObjectName::Tombstone(*id)).unwrap();
        }
        session.commit(&Outcome::Done).unwrap();
        assert!(pruning.join().unwrap().dropped_points.is_empty());
    });
    assert_eq!(shown(&world), ids);
}

use super::*;
use crate::error::Error;
use crate::format::name::{Folder, ObjectName};
use crate::format::point::Level;
use crate::format::session::Mark;
use crate::id::SessionId;
use crate::monitor::Recorder;
use crate::ops::RequestedLevel;
use crate::ops::backup::tests::{World, environment, write};
use crate::ops::prune::{PruneOptions, prune};
use crate::ops::verify::{VerifyLevel, VerifyOptions, VerifyReport, verify};
use crate::repo::Repository;
use crate::repo::catalog::Ended;
use crate::storage::Storage;
use crate::storage::fault::{CrashStorage, Flaw, Survival};
use crate::storage::memory::MemoryStorage;

fn history(storage: MemoryStorage) -> World {
    let mut world = World::on(storage, &[4 << 20]);
    for day in 0..3u64 {
        write(&mut world, (1 << 20) + day * (256 << 10), 256 << 10, day);
        world.backup(RequestedLevel::Is(if day == 0 { Level::Full } else { Level::Incremental }));
    }
    world
}

fn check(world: &World) -> VerifyReport {
    let options = VerifyOptions { level: VerifyLevel::Data, record: true, ..VerifyOptions::default() };
    verify(&world.repository, &options, &Recorder::new()).unwrap()
}

/// Names of packs of data, and of metadata.
fn packs(world: &World) -> (Vec<ObjectName>, Vec<ObjectName>) {
    let mut found = (Vec::new(), Vec::new());
    for id in world.repository.segments().unwrap() {
        for pack in world.repository.load_segment(id).unwrap().packs {
            let list =
                if pack.kind == crate::format::pack::PackKind::Data { &mut found.0 } else { &mut found.1 };
            list.push(ObjectName::Pack(pack.id));
        }
    }
    found
}

fn segments(storage: &MemoryStorage) -> Vec<ObjectName> {
    storage.list(Folder::Segments).unwrap().into_iter().map(|listed| listed.name).collect()
}

#[test]
fn a_lost_segment_is_made_anew_and_prune_goes_on() {
    let storage = MemoryStorage::new();
    let mut world = history(storage.clone());
    let names = segments(&storage);
    storage.tamper(names[0], |_| None);
    storage.tamper(names[1], |mut bytes| {
        bytes[70] ^= 1;
        Some(bytes)
    });
    world.reopen();
    let options = PruneOptions { max_unused_permille: 0, ..PruneOptions::default() };
    assert!(prune(&world.repository, &options, &Recorder::new()).is_err(), "a pack might be spoken of there");
    // what it listed is found in the tables of its packs
    let report = check(&world);
    assert!(report.damaged_points.is_empty() && !report.findings.is_empty(), "{report:?}");
    let dry = repair_index(&world.repository, true, &Recorder::new()).unwrap();
    let report = repair_index(&world.repository, false, &Recorder::new()).unwrap();
    assert_eq!((dry.packs, dry.chunks), (report.packs, report.chunks));
    // a data pack and two of metadata each
    assert_eq!((report.packs, report.unreadable_segments, report.skipped.len()), (6, 1, 0));
    assert_eq!(repair_index(&world.repository, false, &Recorder::new()).unwrap().packs, 0);
    assert!(check(&world).damaged_points.is_empty());
    world.check_all_but_findings();
    prune(&world.repository, &options, &Recorder::new()).unwrap();
    // the segment that could not be read is gone
    world.check_all();
}

#[test]
fn what_a_truncated_pack_still_holds_is_salvaged() {
    let storage = MemoryStorage::new();
    let mut world = history(storage.clone());
    let (data, _) = packs(&world);
    let longest = data.into_iter().max_by_key(|name| storage.len(*name).unwrap()).unwrap();
    storage.tamper(longest, |mut bytes| {
        bytes.truncate(bytes.len() * 2 / 3);
        Some(bytes)
    });
    world.reopen();
    assert!(!check(&world).damaged_points.is_empty());
    let report = repair_packs(&world.repository, &PacksOptions::default(), &Recorder::new()).unwrap();
    assert_eq!(report.lacking, report.from_copies + report.salvaged + report.lost);
    assert!(report.lost > 0, "{report:?}");
    let made = repair_points(&world.repository, false, &Recorder::new()).unwrap();
    assert_eq!(made.points.is_empty(), report.lost == 0);
}

#[test]
fn a_truncated_pack_that_no_segment_lists_is_salvaged() {
    let storage = MemoryStorage::new();
    let mut world = World::on(storage.clone(), &[8 << 20]);
    write(&mut world, 0, 8 << 20, 1);
    world.backup(RequestedLevel::Is(Level::Full));
    let (data, _) = packs(&world);
    assert_eq!(data.len(), 1);
    storage.tamper(data[0], |mut bytes| {
        bytes.truncate(bytes.len() / 2);
        Some(bytes)
    });
    for segment in world.repository.segments().unwrap() {
        storage.tamper(ObjectName::Segment(segment), |_| None);
    }
    world.reopen();
    let listed = repair_index(&world.repository, false, &Recorder::new()).unwrap();
    assert_eq!((listed.packs, listed.skipped.len()), (2, 1));
    assert!(!listed.skipped[0].1.contains("packs/"), "{:?}", listed.skipped);
    let lost = |report: &VerifyReport| -> u64 {
        let affected = report.findings.iter().flat_map(|finding| &finding.affected);
        affected.flat_map(|affected| &affected.ranges).map(|(_, len)| len).sum()
    };
    let before = lost(&check(&world));
    assert!(
        before > 2 << 20 && before < 6 << 20,
        "{before} bytes are lost: frames that stand before the cut open"
    );
    let report = repair_packs(&world.repository, &PacksOptions::default(), &Recorder::new()).unwrap();
    assert!(report.from_copies + report.salvaged > 0 && report.lost > 0, "{report:?}");
    assert_eq!(report.lacking, report.from_copies + report.salvaged + report.lost);
    assert_eq!(lost(&check(&world)), before, "what is left of it is stored anew, and nothing else");
    storage.tamper(data[0], |_| None);
    world.reopen();
    assert_eq!(lost(&check(&world)), before);
}

#[test]
fn a_copy_of_the_repository_gives_everything_back() {
    let storage = MemoryStorage::new();
    let mut world = history(storage.clone());
    let copy = storage.snapshot();
    let (data, metadata) = packs(&world);
    for name in data.iter().chain(&metadata) {
        storage.tamper(*name, |_| None);
    }
    world.reopen();
    check(&world);
    let other = Repository::open(Box::new(copy), None, &environment(), &Recorder::new()).unwrap();
    let options = PacksOptions { from: Some(&other), ..PacksOptions::default() };
    let report = repair_packs(&world.repository, &options, &Recorder::new()).unwrap();
    assert_eq!(report.lost, 0, "{report:?}");
    assert!(check(&world).damaged_points.is_empty());
    prune(&world.repository, &PruneOptions::default(), &Recorder::new()).unwrap();
    world.check_all();
    let foreign = World::new(&[1 << 20]);
    let options = PacksOptions { from: Some(&foreign.repository), ..PacksOptions::default() };
    assert!(repair_packs(&world.repository, &options, &Recorder::new()).is_err());
}

#[test]
fn one_lost_copy_of_metadata_is_made_again() {
    let storage = MemoryStorage::new();
    let mut world = history(storage.clone());
    let (_, metadata) = packs(&world);
    storage.tamper(metadata[0], |_| None);
    world.reopen();
    assert!(check(&world).damaged_points.is_empty(), "the other copy is there");
    let report = repair_packs(&world.repository, &PacksOptions::default(), &Recorder::new()).unwrap();
    assert!(report.from_copies > 0 && report.lost == 0, "{report:?}");
    prune(&world.repository, &PruneOptions::default(), &Recorder::new()).unwrap();
    world.check_all();
}

#[test]
fn an_image_gives_back_what_it_has() {
    let storage = MemoryStorage::new();
    let mut world = history(storage.clone());
    let (data, _) = packs(&world);
    for name in &data {
        storage.tamper(*name, |_| None);
    }
    world.reopen();
    check(&world);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, world.content(0)).unwrap();
    let input = crate::ops::backup::ImageInput::File { path, format: None };
    let options = PacksOptions { from_disk: Some(input), ..PacksOptions::default() };
    let report = repair_packs(&world.repository, &options, &Recorder::new()).unwrap();
    // all but the small file that every point has beside its disk
    assert!(report.from_disk > 0 && report.lost <= 1, "{report:?}");
}

#[test]
fn a_damaged_point_gets_a_copy_that_says_what_is_lost() {
    let storage = MemoryStorage::new();
    let mut world = history(storage.clone());
    let (data, _) = packs(&world);
    let shortest = data.into_iter().min_by_key(|name| storage.len(*name).unwrap()).unwrap();
    storage.tamper(shortest, |_| None);
    world.reopen();
    let damaged = check(&world).damaged_points;
    assert!(!damaged.is_empty());
    let dry = repair_points(&world.repository, true, &Recorder::new()).unwrap();
    let report = repair_points(&world.repository, false, &Recorder::new()).unwrap();
    assert_eq!(report.points.len(), damaged.len());
    assert!(dry.points.iter().zip(&report.points).all(|(a, b)| a.lost_bytes == b.lost_bytes));
    assert!(repair_points(&world.repository, false, &Recorder::new()).unwrap().points.is_empty(), "once");
    let found = check(&world);
    for point in &report.points {
        let ranges: u64 = found
            .findings
            .iter()
            .flat_map(|finding| &finding.affected)
            .filter(|affected| Some(affected.point) == point.repaired)
            .flat_map(|affected| &affected.ranges)
            .map(|(_, len)| len)
            .sum();
        assert_eq!(ranges, point.lost_bytes, "what is lost is said");
    }
}

fn spoil(storage: &MemoryStorage, name: ObjectName) {
    storage.tamper(name, |mut bytes| {
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        Some(bytes)
    });
}

/// What cannot be read may be the abort of a session that slept: until an abort that can be read is there, and behind any
/// crash, nobody can take the name.
#[test]
fn the_name_of_an_unreadable_outcome_is_never_free() {
    let storage = MemoryStorage::new();
    let mut world = history(storage.clone());
    world.abort_backup();
    let silent = Recorder::new();
    // the segment that the session left is gone with a prune, and its outcome stays
    prune(&world.repository, &PruneOptions::default(), &silent).unwrap();
    let aborted = storage.list(Folder::Outcomes).unwrap().into_iter().find_map(|listed| {
        let ObjectName::Outcome(session) = listed.name else { return None };
        let ended = world.repository.catalog(&silent).unwrap().ended(session);
        (ended == Some(Ended::Aborted)).then_some(session)
    });
    let (session, name) = (aborted.unwrap(), ObjectName::Outcome(aborted.unwrap()));
    spoil(&storage, name);
    let crashing = CrashStorage::on(&storage, Flaw::None);
    let open = |storage: Box<dyn Storage>| Repository::open(storage, None, &environment(), &silent).unwrap();
    let repository = open(Box::new(crashing.clone()));
    assert_eq!(repair_points(&repository, false, &silent).unwrap().removed, [name.to_string()]);
    assert_eq!(repository.catalog(&silent).unwrap().ended(session), Some(Ended::Aborted));
    for at in 0..=crashing.len() {
        let survivals = [Survival::All, Survival::Nothing].into_iter().chain((0..8).map(Survival::Some));
        for survival in survivals {
            let image = crashing.image(at, survival);
            assert!(image.len(name).is_ok(), "cut after {at}, {survival:?}: the name is free");
            let again = open(Box::new(image));
            repair_points(&again, false, &silent).unwrap();
            assert_eq!(again.catalog(&silent).unwrap().ended(session), Some(Ended::Aborted));
        }
    }
    world.reopen();
    world.check_reads();
}

/// The segments of a point may be a prune's by now: that its session owns none does not say that it made no point.
#[test]
fn the_outcome_of_a_point_that_is_not_whole_stays() {
    let storage = MemoryStorage::new();
    let mut world = World::on(storage.clone(), &[1 << 20]);
    for day in 0..20u64 {
        write(&mut world, (day % 5) * (100 << 10), 60 << 10, day);
        world.backup(RequestedLevel::Is(if day == 0 { Level::Full } else { Level::Incremental }));
    }
    let merged = prune(&world.repository, &PruneOptions::default(), &Recorder::new()).unwrap();
    assert!(merged.merged_segments >= 20, "{merged:?}");
    let session = SessionId::from(world.kept[3].id);
    for name in packs(&world).0 {
        storage.tamper(name, |_| None);
    }
    spoil(&storage, ObjectName::Outcome(session));
    world.reopen();
    check(&world);
    let report = repair_points(&world.repository, false, &Recorder::new()).unwrap();
    assert_eq!((report.removed.len(), report.brought_back.len()), (0, 0), "{report:?}");
    let catalog = world.repository.catalog(&Recorder::new()).unwrap();
    assert_eq!(catalog.ended(session), Some(Ended::Unreadable));
}

/// A prune that marked something before the repair began does not wait for it.
#[test]
fn no_point_is_brought_back_beside_a_mark() {
    let storage = MemoryStorage::new();
    let mut world = history(storage.clone());
    let name = ObjectName::Outcome(SessionId::from(world.kept[0].id));
    storage.tamper(name, |_| None);
    let packs = packs(&world).0.into_iter().filter_map(|name| match name {
        ObjectName::Pack(id) => Some(id),
        _ => None,
    });
    let mark = Mark { packs: packs.collect(), points: Vec::new() };
    let bytes = mark.to_object(world.repository.id()).unwrap();
    storage.put_new(ObjectName::Mark(SessionId::from_bytes([7; 16])), &bytes).unwrap();
    world.reopen();
    let silent = Recorder::new();
    let refused = repair_points(&world.repository, false, &silent);
    assert!(matches!(refused, Err(Error::Busy { .. })), "{refused:?}");
    assert!(storage.len(name).is_err());
    // a prune clears the mark that nobody stands behind, and deletes nothing
    assert!(prune(&world.repository, &PruneOptions::default(), &silent).is_err());
    assert_eq!(repair_points(&world.repository, false, &silent).unwrap().brought_back.len(), 1);
    world.check_reads();
}

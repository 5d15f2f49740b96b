use super::*;
use crate::extent::RangeSet;
use crate::format::config::CutterParams;
use crate::format::node::ChunkKind;
use crate::format::point::{Level, Manifest};
use crate::manifest::{EntryRef, NodeAt, Visitor, walk};
use crate::monitor::Recorder;
use crate::ops::RequestedLevel;
use crate::ops::backup::tests::{World, environment, spoil, spoil_longest_pack, write};
use crate::repo::CreateOptions;
use crate::repo::heal::find_lost;
use crate::storage::Storage;
use crate::storage::fault::{FailingStorage, Fault};
use crate::storage::memory::MemoryStorage;

/// Reads every chunk that it meets, one by one.
struct Reading<'a> {
    reader: &'a ChunkReader<'a>,
    lost: Vec<ByteRange>,
    chunks: usize,
}

impl Visitor for Reading<'_> {
    fn node(&mut self, _node: NodeAt) -> Result<bool> {
        Ok(true)
    }

    fn entry(&mut self, range: ByteRange, entry: EntryRef) -> Result<()> {
        if let EntryRef::Chunk { id, .. } = entry {
            self.chunks += 1;
            if self.reader.read(ChunkKind::Data, id).is_err() {
                self.lost.push(range);
            }
        }
        Ok(())
    }
}

fn read_all(repository: &Repository, reader: &ChunkReader<'_>, manifest: &Manifest) -> (RangeSet, usize) {
    let mut reading = Reading { reader, lost: Vec::new(), chunks: 0 };
    walk(repository.geometry(), manifest, reader, &mut reading).unwrap();
    (reading.lost.into_iter().collect(), reading.chunks)
}

fn affected(report: &VerifyReport, point: PointId) -> RangeSet {
    let affected = report.findings.iter().flat_map(|finding| &finding.affected);
    let ranges = affected.filter(|affected| affected.point == point).flat_map(|affected| &affected.ranges);
    ranges.filter_map(|(start, len)| ByteRange::new(*start, *len)).collect()
}

/// More chunks than are judged at once, in two points that share most of them; what stands at several places of a disk
/// is met again before it was judged.
#[test]
fn findings_of_a_large_map_are_what_cannot_be_read() {
    const SIZE: u64 = 96 << 20;
    let storage = MemoryStorage::new();
    let mut world = World::on(MemoryStorage::new(), &[SIZE]);
    let cutter =
        CutterParams { min_len: 4 << 10, average_len: 4 << 10, max_len: 8 << 10, ..CutterParams::default() };
    let options = CreateOptions { cutter, ..CreateOptions::default() };
    world.repository = Repository::create(Box::new(storage.clone()), &options, &environment()).unwrap();
    let leaf = world.repository.geometry().leaf_len();
    for at in (0..SIZE).step_by(leaf as usize) {
        // towards the end, each fourth leaf is the one before it once more
        let number = at / leaf;
        let is_repeated = number % 4 == 3 && at > SIZE / 4 * 3;
        write(&mut world, at, leaf, number - u64::from(is_repeated));
    }
    world.backup(RequestedLevel::Is(Level::Full));
    write(&mut world, SIZE / 2, 256 << 10, 1_000_000);
    world.backup(RequestedLevel::Is(Level::Incremental));

    let packs: Vec<ObjectName> =
        storage.list(Folder::Packs).unwrap().into_iter().map(|listed| listed.name).collect();
    let mut data: Vec<_> = packs.iter().map(|name| (storage.len(*name).unwrap(), *name)).collect();
    data.sort_unstable();
    let (_, longest) = data.pop().unwrap();
    let (_, second) = data.pop().unwrap();
    spoil(&storage, longest);
    storage.tamper(second, |_| None);

    let repository = Repository::open(Box::new(storage), None, &environment(), &Recorder::new()).unwrap();
    let options = VerifyOptions { record: true, ..VerifyOptions::default() };
    let report = verify(&repository, &options, &Recorder::new()).unwrap();
    assert_eq!((report.points, report.damaged_points.len()), (2, 2));
    let (catalog, view) = repository.refresh(&Recorder::new()).unwrap();
    let reader = ChunkReader::new(&repository, &view);
    for entry in catalog.points() {
        let manifest = entry.record.disks[0].manifest;
        let (lost, chunks) = read_all(&repository, &reader, &manifest);
        assert!(chunks > points::BATCH_EVENTS, "{chunks}");
        assert!(!lost.is_empty() && lost.total_bytes() < SIZE, "{lost:?}");
        assert_eq!(affected(&report, entry.record.id), lost);
        assert_eq!(find_lost(&repository, &reader, &manifest, &Recorder::new()).unwrap().ranges, lost);
    }
    let again = verify(&repository, &VerifyOptions::default(), &Recorder::new()).unwrap();
    assert_eq!((again.findings, again.chunks), (report.findings, report.chunks));
}

/// A world of six points on a storage, and the storage.
fn six_points() -> (World, MemoryStorage) {
    let storage = MemoryStorage::new();
    let mut world = World::on(MemoryStorage::new(), &[4 << 20]);
    world.repository =
        Repository::create(Box::new(storage.clone()), &CreateOptions::default(), &environment()).unwrap();
    for number in 0..6 {
        write(&mut world, number << 19, 256 << 10, number + 1);
        world.backup(RequestedLevel::Auto);
    }
    (world, storage)
}

/// A host whose clock is ten days ahead of every other.
fn ahead(storage: &MemoryStorage) -> Repository {
    let environment = crate::repo::Environment { now_ms: || 864_000_000, ..environment() };
    Repository::open(Box::new(storage.clone()), None, &environment, &Recorder::new()).unwrap()
}

#[test]
fn a_verify_of_the_future_hides_nothing() {
    let (world, storage) = six_points();
    let options = VerifyOptions { record: true, ..VerifyOptions::default() };
    verify(&ahead(&storage), &options, &Recorder::new()).unwrap();
    spoil_longest_pack(&storage);
    let found = verify(&world.repository, &options, &Recorder::new()).unwrap();
    assert!(!found.damaged_points.is_empty());
    let (catalog, _) = world.repository.refresh(&Recorder::new()).unwrap();
    for id in &found.damaged_points {
        let state = catalog.verified_state(*id, VerifiedLevel::Data).unwrap();
        assert!(!state.sound, "{state:?}");
    }
    assert!(catalog.is_anything_lost());
    let newest = catalog.verified().last().unwrap().session;
    assert!(!catalog.spent().contains(&newest));
    let lately = VerifyOptions { older_than_ms: Some(0), record: false, ..VerifyOptions::default() };
    let said = verify(&world.repository, &lately, &Recorder::new()).unwrap();
    assert_eq!(said.skipped_points, 6 - found.damaged_points.len() as u64, "the verify of now counts");
}

#[test]
fn a_verify_of_the_future_spares_no_point() {
    let (world, storage) = six_points();
    let options = VerifyOptions { record: true, ..VerifyOptions::default() };
    verify(&ahead(&storage), &options, &Recorder::new()).unwrap();
    let lately = VerifyOptions { older_than_ms: Some(0), record: false, ..VerifyOptions::default() };
    let said = verify(&world.repository, &lately, &Recorder::new()).unwrap();
    assert_eq!((said.points, said.skipped_points), (6, 0));
    let said = verify(&ahead(&storage), &lately, &Recorder::new()).unwrap();
    assert_eq!(said.skipped_points, 6);
}

#[test]
fn samples_go_on_whatever_clocks_and_other_samples_do() {
    let (world, storage) = six_points();
    let sample = Sample::Parts { parts: 1, of: 5 };
    let all = VerifyOptions { sample: Some(sample), record: true, ..VerifyOptions::default() };
    verify(&ahead(&storage), &all, &Recorder::new()).unwrap();
    let packs = VerifyOptions { level: VerifyLevel::Packs, ..all.clone() };
    let (catalog, view) = world.repository.refresh(&Recorder::new()).unwrap();
    let points = catalog.points().iter().map(|entry| entry.record.id).collect();
    let named = VerifyOptions { points, ..all.clone() };
    let listed: Vec<(PackId, u64)> = view.pack_lens().unwrap();
    assert!(listed.len() >= 18, "{}", listed.len());
    let mut expected = choose(listed.clone(), sample, None).pop();
    for _ in 0..5 {
        for others in [&packs, &named] {
            verify(&world.repository, others, &Recorder::new()).unwrap();
        }
        let sampled = verify(&world.repository, &all, &Recorder::new()).unwrap().sample.unwrap();
        expected = choose(listed.clone(), sample, expected).pop();
        assert_eq!(sampled.cursor, expected, "it goes on where the last one of its scope stopped");
    }
    let spent = world.repository.refresh(&Recorder::new()).unwrap().0.spent();
    assert_eq!(spent.len(), 13, "of 16 the newest of each of three scopes stays");
}

#[test]
fn what_cannot_be_recorded_is_reported() {
    for folder in [Folder::Damage, Folder::Outcomes] {
        let (_, storage) = six_points();
        let options = VerifyOptions { record: true, ..VerifyOptions::default() };
        let failing = FailingStorage::at_put(storage.clone(), folder, 0, Fault::NoSpace);
        let open = |failing: FailingStorage| {
            Repository::open(Box::new(failing), None, &environment(), &Recorder::new()).unwrap()
        };
        if folder == Folder::Outcomes {
            let error = verify(&open(failing.clone()), &options, &Recorder::new()).unwrap_err();
            assert!(error.is_storage_full(), "nothing was found, and nothing recorded: {error}");
        }
        spoil_longest_pack(&storage);
        let failing = FailingStorage::at_put(storage, folder, 0, Fault::NoSpace);
        let monitor = Recorder::new();
        let report = verify(&open(failing.clone()), &options, &monitor).unwrap();
        assert!(failing.has_failed() && !report.damaged_points.is_empty());
        assert!(
            monitor.warnings().iter().any(|said| said.contains("not recorded")),
            "{:?}",
            monitor.warnings()
        );
    }
}

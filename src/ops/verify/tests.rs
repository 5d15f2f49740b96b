use super::*;
use crate::extent::RangeSet;
use crate::format::config::CutterParams;
use crate::format::node::ChunkKind;
use crate::format::point::{Level, Manifest};
use crate::manifest::{EntryRef, NodeAt, Visitor, walk};
use crate::monitor::Recorder;
use crate::ops::RequestedLevel;
use crate::ops::backup::tests::{World, environment, write};
use crate::repo::CreateOptions;
use crate::repo::heal::find_lost;
use crate::storage::Storage;
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
    storage.tamper(longest, |mut bytes| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        Some(bytes)
    });
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

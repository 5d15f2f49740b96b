//! How vmkeep made the fixture `two_points`. Run it once per version of the format, never to make a test pass:
//! that this version's repositories stay readable is what the fixture is for.

use vmkeep::buffer::Payload;
use vmkeep::error::Result;
use vmkeep::extent::{ByteRange, RangeSet};
use vmkeep::format::codec;
use vmkeep::format::name::ObjectName;
use vmkeep::format::node::ChunkKind;
use vmkeep::format::point::{
    Consistency, DiskRecord, FileRecord, Level, PointRecord, PointStats, SourceKind,
};
use vmkeep::format::session::{Outcome, SessionKind};
use vmkeep::id::PointId;
use vmkeep::monitor::{Monitor, Recorder};
use vmkeep::ops::forget::forget;
use vmkeep::repo::ingest::{IngestInput, ingest, ingest_bytes};
use vmkeep::repo::reader::ChunkReader;
use vmkeep::repo::session::Session;
use vmkeep::repo::writer::write_session;
use vmkeep::repo::{CreateOptions, Repository};
use vmkeep::source::{DiskSource, READ_WINDOW};
use vmkeep::storage::local::LocalStorage;

use super::content::{nvram, vda, vdb};
use crate::fixtures;

/// Bytes as a disk; blocks of 64 KiB that are zero are holes.
struct Disk(Vec<u8>);

impl DiskSource for Disk {
    fn label(&self) -> String {
        "a disk".into()
    }

    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn dirty(&mut self, _monitor: &dyn Monitor) -> Result<Option<RangeSet>> {
        Ok(None)
    }

    fn data(&mut self, within: &RangeSet, _monitor: &dyn Monitor) -> Result<RangeSet> {
        let blocks = (0u64..).step_by(64 << 10).zip(self.0.chunks(64 << 10));
        let held = blocks.filter(|(_, block)| block.iter().any(|byte| *byte != 0));
        let held: RangeSet =
            held.filter_map(|(start, block)| ByteRange::new(start, block.len() as u64)).collect();
        Ok(held.intersection(within))
    }

    fn read(
        &mut self,
        ranges: &RangeSet,
        _monitor: &dyn Monitor,
        sink: &mut dyn FnMut(ByteRange, Payload) -> Result<()>,
    ) -> Result<()> {
        for range in ranges.iter() {
            let mut start = range.start();
            while start < range.end() {
                let end = range.end().min((start / READ_WINDOW + 1) * READ_WINDOW);
                let bytes = self.0[start as usize..end as usize].to_vec();
                sink(ByteRange::between(start, end).unwrap(), Payload::Data(bytes.into()))?;
                start = end;
            }
        }
        Ok(())
    }
}

fn record(id: PointId, number: usize, disks: Vec<DiskRecord>, files: Vec<FileRecord>) -> PointRecord {
    PointRecord {
        id,
        domain: "web".into(),
        domain_uuid: Some("6695eb01-f6a4-8304-79aa-97f2502e193f".into()),
        time_ms: 1_767_225_600_000 + 86_400_000 * i64::try_from(number).unwrap(),
        level: if number == 0 { Level::Full } else { Level::Incremental },
        base: None,
        predecessor: None,
        checkpoint: Some(format!("vmkeep-{number}")),
        source: SourceKind::Running,
        consistency: Consistency::Frozen,
        disks,
        files,
        xml_inactive: Some("<domain type='kvm'><name>web</name></domain>".into()),
        xml_live: None,
        tags: vec!["fixture".into()],
        host: "host".into(),
        program: "vmkeep fixture".into(),
    }
}

fn back_up(repository: &Repository, number: usize, predecessor: Option<&PointRecord>) -> PointRecord {
    let monitor = Recorder::new();
    let session = Session::begin(repository, SessionKind::Backup).unwrap();
    let (_, view) = repository.refresh(&monitor).unwrap();
    let reader = ChunkReader::new(repository, &view);
    let (record, _) = write_session(repository, &reader, session.id(), |writer| {
        let mut disks = Vec::new();
        for (index, (target, bytes)) in [("vda", vda(number)), ("vdb", vdb(number))].into_iter().enumerate() {
            let mut source = Disk(bytes);
            let mut input = IngestInput {
                source: &mut source,
                predecessor: predecessor.map(|point| point.disks[index].manifest),
                trust_bitmap: false,
                lost: RangeSet::default(),
                recut: false,
                read_limit: None,
            };
            let taken = ingest(repository, &reader, writer, &mut input, &monitor)?;
            disks.push(DiskRecord {
                target: target.into(),
                manifest: taken.manifest,
                format: "qcow2".into(),
                level: Level::Full,
                full_reason: (number > 0).then(|| "no bitmap".into()),
                has_bitmap: number == 0,
            });
        }
        let manifest = ingest_bytes(repository, &reader, writer, "nvram", nvram(number), &monitor)?;
        let files = vec![FileRecord { name: "nvram".into(), manifest }];
        let record = record(session.id().into(), number, disks, files);
        writer.put_metadata(ChunkKind::Point, &codec::encode(&record).unwrap())?;
        Ok(record)
    })
    .unwrap();
    let stats = PointStats { since_base_bytes: (number > 0).then_some(1), ..PointStats::default() };
    session.commit(&Outcome::Point { record: record.clone().into(), stats }).unwrap();
    record
}

#[test]
#[ignore = "writes a fixture with new random ids"]
fn regenerate_two_points() {
    let root = fixtures::path("two_points");
    let _ = std::fs::remove_dir_all(&root);
    let storage = Box::new(LocalStorage::create(&root).unwrap());
    let options = CreateOptions { zstd_level: 19, ..CreateOptions::default() };
    let repository = Repository::create(storage, &options, &fixtures::environment()).unwrap();
    let first = back_up(&repository, 0, None);
    let second = back_up(&repository, 1, Some(&first));
    let third = back_up(&repository, 2, Some(&second));
    forget(&repository, &[third.id], "not wanted", false, &Recorder::new()).unwrap();
    let aborted = Session::begin(&repository, SessionKind::Backup).unwrap();
    aborted.abort("the host was shut down").unwrap();
    repository.storage().delete(ObjectName::Reserve).unwrap();
    // version 1 began without it
    repository.storage().delete(ObjectName::ConfigCopy).unwrap();
}

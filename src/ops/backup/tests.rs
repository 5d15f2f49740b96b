//! A domain in memory, with dirty bitmaps that work as QEMU's do, against a `Vec<u8>` model.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::*;
use crate::buffer::Payload;
use crate::error::{Error, Result};
use crate::extent::{ByteRange, RangeSet};
use crate::format::name::{Folder, ObjectName};
use crate::format::point::{Consistency, Level, SourceKind};
use crate::format::session::SessionKind;
use crate::id::PointId;
use crate::manifest::{EntryRef, NodeAt, Visitor, walk};
use crate::monitor::{Monitor, Recorder};
use crate::ops::content::{DiskBytes, Limits, OnDamage, Sink, read_disk, read_disk_by};
use crate::ops::levels::{self, disk_manifest, newest_manifest};
use crate::ops::prune::{PruneOptions, prune};
use crate::ops::record::{DiskJob, PointJob, record_point};
use crate::ops::restore::{ImageFormat, RestoreOptions, RestoreOutput, restore};
use crate::ops::verify::{VerifyLevel, VerifyOptions, verify};
use crate::ops::{RequestedLevel, diff, forget};
use crate::repo::ingest::ingest_bytes;
use crate::repo::reader::ChunkReader;
use crate::repo::session::Session;
use crate::repo::writer::write_session;
use crate::repo::{CreateOptions, Environment, Repository, Timing};
use crate::source::{DiskSource, READ_WINDOW};
use crate::storage::Storage;
use crate::storage::memory::MemoryStorage;

/// What one bit of a dirty bitmap stands for.
const GRANULARITY: u64 = 65536;
const BLOCK: u64 = 4096;
const DOMAIN: &str = "model";

mod model;
mod scattered;
mod together;

static CLOCK: AtomicI64 = AtomicI64::new(1_000_000);

pub(in crate::ops) fn environment() -> Environment {
    Environment {
        host: "host".into(),
        boot_id: "boot".into(),
        process_id: 1,
        program: "test".into(),
        now_ms: || CLOCK.fetch_add(1000, Ordering::Relaxed),
        timing: Timing::default(),
    }
}

/// A disk of the model.
#[derive(Debug, Clone, Default)]
struct Disk {
    content: Vec<u8>,
    /// By checkpoint, what was written since.
    bitmaps: BTreeMap<String, RangeSet>,
}

impl Disk {
    fn change(&mut self, offset: u64, len: u64, change: impl FnOnce(&mut [u8])) {
        let size = self.content.len() as u64;
        let (start, end) = (offset.min(size), (offset + len).min(size));
        let Some(range) = ByteRange::between(start, end) else { return };
        change(&mut self.content[start as usize..end as usize]);
        for bitmap in self.bitmaps.values_mut() {
            *bitmap = bitmap.union(&[range].into_iter().collect()).aligned_out(GRANULARITY, size);
        }
    }
}

/// A disk's content at one instant.
struct Frozen {
    content: Vec<u8>,
    dirty: Option<RangeSet>,
    read_bytes: u64,
}

impl DiskSource for Frozen {
    fn label(&self) -> String {
        "model".into()
    }

    fn size(&self) -> u64 {
        self.content.len() as u64
    }

    fn dirty(&mut self, _monitor: &dyn Monitor) -> Result<Option<RangeSet>> {
        Ok(self.dirty.clone())
    }

    fn data(&mut self, within: &RangeSet, _monitor: &dyn Monitor) -> Result<RangeSet> {
        // as coarse as an image's clusters
        let clusters = self.content.chunks(GRANULARITY as usize).enumerate();
        let data: RangeSet = clusters
            .filter(|(_, cluster)| cluster.iter().any(|byte| *byte != 0))
            .filter_map(|(no, cluster)| ByteRange::new(no as u64 * GRANULARITY, cluster.len() as u64))
            .collect();
        Ok(data.intersection(within))
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
                let part = ByteRange::between(start, end).unwrap();
                self.read_bytes += part.len();
                sink(part, Payload::Data(self.content[start as usize..end as usize].to_vec().into()))?;
                start = end;
            }
        }
        Ok(())
    }
}

/// Takes a disk's content.
struct Buffer(Mutex<Vec<u8>>);

impl Sink for Buffer {
    fn write(&self, contents: Vec<DiskBytes>) -> Result<()> {
        for DiskBytes { offset, bytes } in contents {
            let start = offset as usize;
            self.0.lock().unwrap()[start..start + bytes.len()].copy_from_slice(&bytes);
        }
        Ok(())
    }

    fn zero(&self, range: ByteRange) -> Result<()> {
        self.0.lock().unwrap()[range.start() as usize..range.end() as usize].fill(0);
        Ok(())
    }
}

/// The file that every point has.
const NVRAM: &[u8] = &[7; 3000];

/// A point of the model: what a restore must give.
#[derive(Debug, Clone)]
pub(in crate::ops) struct Kept {
    pub id: PointId,
    /// In the order in which points were made.
    number: u32,
    level: Level,
    pub contents: BTreeMap<String, Vec<u8>>,
}

pub(in crate::ops) struct World {
    pub storage: MemoryStorage,
    pub repository: Repository,
    disks: BTreeMap<String, Disk>,
    pub kept: Vec<Kept>,
    checkpoints: u32,
    /// Where the local index is; else it is in memory.
    cache: Option<PathBuf>,
}

impl World {
    pub fn new(sizes: &[u64]) -> Self {
        Self::on(MemoryStorage::new(), sizes)
    }

    pub fn on(storage: MemoryStorage, sizes: &[u64]) -> Self {
        let options = CreateOptions::default();
        let repository = Repository::create(Box::new(storage.clone()), &options, &environment()).unwrap();
        let disks = sizes.iter().enumerate().map(|(no, size)| {
            let content = vec![0; *size as usize];
            (format!("vd{}", char::from(b'a' + no as u8)), Disk { content, bitmaps: BTreeMap::new() })
        });
        Self { storage, repository, disks: disks.collect(), kept: Vec::new(), checkpoints: 0, cache: None }
    }

    /// Goes on with disks and points of another world on what is left of its repository; bitmaps are gone.
    pub fn resume(repository: Repository, contents: &BTreeMap<String, Vec<u8>>, kept: Vec<Kept>) -> Self {
        let disk = |content: &Vec<u8>| Disk { content: content.clone(), bitmaps: BTreeMap::new() };
        let disks = contents.iter().map(|(target, content)| (target.clone(), disk(content))).collect();
        let (storage, checkpoints) = (MemoryStorage::new(), 1_000_000);
        Self { storage, repository, disks, kept, checkpoints, cache: None }
    }

    /// Returns what all disks hold now.
    pub fn contents(&self) -> BTreeMap<String, Vec<u8>> {
        self.disks.iter().map(|(target, disk)| (target.clone(), disk.content.clone())).collect()
    }

    /// Reads every point, and compares.
    pub fn check_reads(&self) {
        self.try_reads().unwrap();
    }

    /// As [`World::check_reads`]; what cannot be read is an error.
    pub fn try_reads(&self) -> Result<()> {
        let silent = Recorder::new();
        let (catalog, view) = self.repository.refresh(&silent)?;
        let reader = ChunkReader::new(&self.repository, &view);
        for kept in &self.kept {
            let Some(entry) = catalog.point(kept.id) else {
                // a fault that a test has made
                let problem = catalog.problems().iter().find(|(_, problem)| problem.contains("injected"));
                let Some((name, _)) = problem else { panic!("point {} is gone", kept.id) };
                return Err(Error::Damaged(format!("{name} cannot be read")));
            };
            let record = &entry.record;
            let disks =
                record.disks.iter().map(|disk| (&disk.target, &disk.manifest, &*kept.contents[&disk.target]));
            let files = record.files.iter().map(|file| (&file.name, &file.manifest, NVRAM));
            for (name, manifest, content) in disks.chain(files) {
                for limits in [Limits::default(), Limits::EVERYTHING] {
                    let sink = Buffer(Mutex::new(vec![0xee; content.len()]));
                    let fail = OnDamage::Fail;
                    read_disk_by(&reader, manifest, &sink, fail, &silent, &|_| {}, limits)?;
                    assert!(sink.0.into_inner().unwrap() == *content, "{name} of {}", kept.id);
                }
            }
        }
        Ok(())
    }

    /// Returns what a disk holds now.
    pub fn content(&self, no: usize) -> &[u8] {
        &self.disks.values().nth(no).unwrap().content
    }

    fn disk(&mut self, no: usize) -> &mut Disk {
        let no = no % self.disks.len();
        self.disks.values_mut().nth(no).unwrap()
    }

    /// Opens the repository anew: what only the process knew is gone.
    pub fn reopen(&mut self) {
        let storage = Box::new(self.storage.clone());
        let cache = self.cache.as_deref();
        self.repository = Repository::open(storage, cache, &environment(), &Recorder::new()).unwrap();
    }

    pub fn backup(&mut self, level: RequestedLevel) -> BackupReport {
        self.try_backup(level).unwrap()
    }

    /// Backs up; after a failure the domain is as it was.
    pub fn try_backup(&mut self, level: RequestedLevel) -> Result<BackupReport> {
        let before: Vec<_> = self.disks.values().map(|disk| disk.bitmaps.clone()).collect();
        let made = self.back_up(level);
        if made.is_err() {
            for (disk, bitmaps) in self.disks.values_mut().zip(before) {
                disk.bitmaps = bitmaps;
            }
        }
        made
    }

    /// Stores what the disks hold, and aborts.
    pub fn abort_backup(&mut self) {
        let session = Session::begin(&self.repository, SessionKind::Backup).unwrap();
        let (_, view) = self.repository.refresh(&Recorder::new()).unwrap();
        let reader = ChunkReader::new(&self.repository, &view);
        let contents = self.contents();
        write_session(&self.repository, &reader, session.id(), |writer| {
            for content in contents.into_values() {
                let name = "content";
                ingest_bytes(&self.repository, &reader, writer, name, content, &Recorder::new())?;
            }
            Ok(())
        })
        .unwrap();
        session.abort("test").unwrap();
    }

    /// Fixes an instant: what each disk holds, and the checkpoint whose bitmap serves. Begins the new checkpoint's bitmaps.
    fn freeze(
        &mut self,
        plan: &levels::LevelPlan,
        checkpoint: Option<&str>,
    ) -> Vec<(String, Frozen, Option<String>)> {
        let mut sources = Vec::new();
        for (target, disk) in &mut self.disks {
            let served = plan.tracked.iter().filter_map(|entry| entry.record.checkpoint.clone());
            let served = served.into_iter().find(|name| disk.bitmaps.contains_key(name));
            let dirty = served.as_ref().map(|name| disk.bitmaps[name].clone());
            sources.push((
                target.clone(),
                Frozen { content: disk.content.clone(), dirty, read_bytes: 0 },
                served,
            ));
            if let Some(name) = checkpoint {
                disk.bitmaps.insert(name.to_owned(), RangeSet::new());
            }
        }
        sources
    }

    fn back_up(&mut self, level: RequestedLevel) -> Result<BackupReport> {
        let monitor = Recorder::new();
        let (session, catalog, view) =
            Session::begin_and_look(&self.repository, SessionKind::Backup, &monitor)?;
        let points = usable_points(&catalog, &view, DOMAIN);
        let mut plan = levels::plan(&points, level, false, None).unwrap();
        self.checkpoints += 1;
        let checkpoint = plan.leaves_checkpoint.then(|| format!("c{}", self.checkpoints));
        let mut sources = self.freeze(&plan, checkpoint.as_deref());
        plan.settle(sources.iter().any(|(_, _, served)| served.is_some()));
        let job = PointJob {
            domain: DOMAIN.into(),
            domain_uuid: None,
            time_ms: (self.repository.environment().now_ms)(),
            level: plan.level,
            base: plan.base.clone(),
            predecessor: points.last().map(|entry| entry.record.id),
            checkpoint: checkpoint.clone(),
            source: SourceKind::Running,
            consistency: Consistency::Crash,
            files: vec![("nvram".into(), NVRAM.to_vec())],
            xml_inactive: Some("<domain/>".into()),
            xml_live: None,
            tags: Vec::new(),
            read_limit: None,
        };
        let disks = sources.iter_mut().map(|(target, source, served)| {
            let owner = served.as_deref().and_then(|name| plan.owner_of(name));
            let predecessor = match owner {
                Some(entry) => disk_manifest(entry, target),
                None => newest_manifest(&points, target),
            };
            DiskJob {
                target: target.clone(),
                format: "qcow2".into(),
                level: plan.level,
                full_reason: None,
                has_bitmap: checkpoint.is_some(),
                source,
                predecessor,
                trust_bitmap: served.is_some(),
                recut: plan.is_full_by_wish(),
            }
        });
        let disks = disks.collect();
        let report = record_point(&self.repository, session, &view, job, disks, &mut || Ok(()), &monitor)?;
        let keep = levels::checkpoints_to_keep(&points, plan.level, checkpoint.as_deref());
        for disk in self.disks.values_mut() {
            disk.bitmaps.retain(|name, _| keep.contains(name));
        }
        let contents = self.disks.iter().map(|(target, disk)| (target.clone(), disk.content.clone()));
        let number = self.checkpoints;
        self.kept.push(Kept {
            id: report.record.id,
            number,
            level: plan.level,
            contents: contents.collect(),
        });
        // a fault that a test has made is said and passed over where that harms nothing
        let unasked =
            |text: &&String| !text.contains("the map of its last point") && !text.contains("injected");
        assert_eq!(monitor.warnings().iter().filter(unasked).count(), 0, "{:?}", monitor.warnings());
        Ok(report)
    }

    fn check_restore(&self, no: usize) {
        let kept = &self.kept[no];
        let directory = tempfile::tempdir().unwrap();
        let catalog = self.repository.catalog(&Recorder::new()).unwrap();
        let options = RestoreOptions {
            output: RestoreOutput::Directory(directory.path().into()),
            disks: Vec::new(),
            format: ImageFormat::Raw,
            force: false,
            on_damage: OnDamage::Fail,
            dry_run: false,
        };
        let record = &catalog.point(kept.id).unwrap().record;
        restore(&self.repository, record, &options, &Recorder::new()).unwrap();
        for (target, content) in &kept.contents {
            let found = std::fs::read(directory.path().join(format!("{target}.raw"))).unwrap();
            assert_eq!(found.len(), content.len(), "size of {target}");
            let wrong = found.iter().zip(content).position(|(a, b)| a != b);
            assert_eq!(wrong, None, "{target} of point {no} differs");
        }
        assert_eq!(std::fs::read(directory.path().join("nvram")).unwrap(), NVRAM);
    }

    /// Whatever differs is in the diff.
    fn check_diff(&self, a: usize, b: usize) {
        let monitor = Recorder::new();
        let catalog = self.repository.catalog(&monitor).unwrap();
        let record = |no: usize| &catalog.point(self.kept[no].id).unwrap().record;
        let found = diff::diff_points(&self.repository, record(a), record(b), None, &monitor).unwrap();
        for (target, after) in &self.kept[b].contents {
            let before = &self.kept[a].contents[target];
            let ranges: &[(u64, u64)] =
                found.iter().find(|disk| disk.disk == *target).map_or(&[], |disk| &disk.ranges);
            let listed: RangeSet =
                ranges.iter().filter_map(|(start, len)| ByteRange::new(*start, *len)).collect();
            let size = before.len().max(after.len());
            for start in (0..size).step_by(BLOCK as usize) {
                let end = (start + BLOCK as usize).min(size);
                let block = |content: &[u8]| {
                    let mut block = vec![0; end - start];
                    let have = content.get(start..end.min(content.len())).unwrap_or_default();
                    block[..have.len()].copy_from_slice(have);
                    block
                };
                let range: RangeSet = ByteRange::between(start as u64, end as u64).into_iter().collect();
                if block(before) != block(after) {
                    assert!(!listed.intersection(&range).is_empty(), "{target}: {start} is missing");
                }
            }
        }
    }

    /// Every point restores, whatever verify says.
    pub fn check_all_but_findings(&self) {
        (0..self.kept.len()).for_each(|no| self.check_restore(no));
    }

    pub fn check_all(&self) {
        self.check_all_but_findings();
        let options = VerifyOptions { level: VerifyLevel::Data, ..VerifyOptions::default() };
        let report = verify(&self.repository, &options, &Recorder::new()).unwrap();
        assert_eq!(report.findings, []);
    }
}

fn noise(seed: u64, bytes: &mut [u8]) {
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(bytes);
}

pub(in crate::ops) fn write(world: &mut World, offset: u64, len: u64, seed: u64) {
    world.disk(0).change(offset, len, |bytes| noise(seed, bytes));
}

/// As [`write`], something that compresses.
pub(in crate::ops) fn write_text(world: &mut World, offset: u64, len: u64, seed: u64) {
    world.disk(0).change(offset, len, |bytes| {
        noise(seed, bytes);
        bytes.iter_mut().for_each(|byte| *byte %= 61);
    });
}

/// Changes a byte in the middle of an object.
pub(in crate::ops) fn spoil(storage: &MemoryStorage, name: ObjectName) {
    storage.tamper(name, |mut bytes| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        Some(bytes)
    });
}

/// Spoils the longest pack, which is one of data. Returns its length in bytes.
pub(in crate::ops) fn spoil_longest_pack(storage: &MemoryStorage) -> u64 {
    let packs = storage.list(Folder::Packs).unwrap();
    let longest = packs.iter().max_by_key(|listed| listed.len).unwrap();
    spoil(storage, longest.name);
    longest.len
}

#[test]
fn a_week_of_levels_stores_nothing_twice() {
    let mut world = World::new(&[64 << 20]);
    let level = RequestedLevel::Is;
    write(&mut world, 0, 8 << 20, 1);
    let full = world.backup(level(Level::Full));
    assert_eq!(full.stats.new_bytes, 8 << 20);
    for (day, wanted) in [Level::Incremental, Level::Incremental, Level::Differential, Level::Incremental]
        .into_iter()
        .enumerate()
    {
        // a day writes 40 KiB of its own
        write(&mut world, (16 << 20) + day as u64 * (1 << 20), 40 << 10, 100 + day as u64);
        let report = world.backup(level(wanted));
        assert_eq!(report.record.level, wanted);
        assert_eq!(report.stats.new_bytes, 40 << 10, "day {day}");
        assert_eq!(report.stats.dirty_bytes, 64 << 10, "day {day} reads what its own day wrote");
        assert_eq!(report.stats.changed_bytes, 40 << 10);
        if wanted == Level::Differential {
            assert_eq!(report.stats.since_base_bytes, Some(3 * (40 << 10)));
        }
    }
    let quiet = world.backup(level(Level::Differential));
    assert_eq!((quiet.stats.dirty_bytes, quiet.stats.new_bytes, quiet.stats.stored_bytes), (0, 0, 0));
    assert_eq!(quiet.stats.since_base_bytes, Some(4 * (40 << 10)));
    assert_eq!(quiet.record.base, Some(full.record.id));
    // a database's page inside a dirty extent
    world.disk(0).change((16 << 20) + 8192, 4096, |bytes| noise(9, bytes));
    let page = world.backup(level(Level::Incremental));
    assert_eq!((page.stats.dirty_bytes, page.stats.changed_bytes), (65536, 4096));
    assert!(page.stats.new_bytes <= 40 << 10, "{:?}", page.stats);
    for point in world.kept.drain(..6).collect::<Vec<_>>() {
        forget::forget(&world.repository, &[point.id], "test", false, &Recorder::new()).unwrap();
    }
    world.check_all();
}

#[test]
fn the_same_content_elsewhere_is_stored_once() {
    let mut world = World::new(&[16 << 20, 16 << 20]);
    write(&mut world, 0, 8 << 20, 1);
    world.backup(RequestedLevel::Auto);
    let copy = world.disk(0).content[..8 << 20].to_vec();
    world.disk(1).change(2 << 20, 8 << 20, |bytes| bytes.copy_from_slice(&copy));
    let report = world.backup(RequestedLevel::Auto);
    assert_eq!(report.record.level, Level::Incremental);
    assert_eq!(report.stats.changed_bytes, 8 << 20);
    assert_eq!(report.stats.new_bytes, 0);
    assert_eq!(world.kept[0].level, Level::Full);
    world.check_all();
}

/// Counts what a map names.
struct Pieces(usize);

impl Visitor for Pieces {
    fn node(&mut self, _node: NodeAt) -> Result<bool> {
        Ok(true)
    }

    fn entry(&mut self, _range: ByteRange, _entry: EntryRef) -> Result<()> {
        self.0 += 1;
        Ok(())
    }
}

fn pieces(world: &World, report: &BackupReport) -> usize {
    let (_, view) = world.repository.refresh(&Recorder::new()).unwrap();
    let reader = ChunkReader::new(&world.repository, &view);
    let mut pieces = Pieces(0);
    let manifest = report.record.disks.first().map(|disk| disk.manifest).unwrap();
    walk(world.repository.geometry(), &manifest, &reader, &mut pieces).unwrap();
    pieces.0
}

#[test]
fn a_full_cuts_anew_what_small_writes_have_left_in_pieces() {
    let mut world = World::new(&[4 << 20]);
    write(&mut world, 0, 4 << 20, 1);
    let first = world.backup(RequestedLevel::Auto);
    // three leaves of four
    (0..3 * 128).for_each(|block| write(&mut world, block * 2 * BLOCK, BLOCK, 100 + block));
    let pieced = world.backup(RequestedLevel::Auto);
    assert_eq!((pieced.record.level, pieced.stats.changed_bytes), (Level::Incremental, 3 * 128 * BLOCK));
    assert!(pieces(&world, &pieced) > 3 * 128);
    world.disk(0).bitmaps.clear();
    let unasked = world.backup(RequestedLevel::Auto);
    assert_eq!((unasked.record.level, unasked.stats.new_bytes), (Level::Full, 0), "it stores what differs");
    let full = world.backup(RequestedLevel::Is(Level::Full));
    assert_eq!(full.stats.changed_bytes, 0, "nothing was written");
    assert_eq!(full.stats.new_bytes, 3 << 20, "the fourth leaf is as it was");
    assert!(pieces(&world, &full) < 2 * pieces(&world, &first), "{}", pieces(&world, &full));
    let again = world.backup(RequestedLevel::Is(Level::Full));
    assert_eq!((again.stats.new_bytes, again.record.disks[0].manifest), (0, full.record.disks[0].manifest));
    world.check_all();
}

#[test]
fn what_stands_between_changes_is_as_it_was() {
    let mut world = World::new(&[4 << 20]);
    write(&mut world, 0, 4 << 20, 1);
    world.backup(RequestedLevel::Auto);
    // so that what stands behind a chunk on the disk does not in its frame
    write(&mut world, 1 << 20, 64 * BLOCK, 2);
    world.backup(RequestedLevel::Auto);
    for round in 0..4 {
        let places = [0, 5, 6, 40, 200, 256, 257, 290, 319, 320, 321, 700, 1023];
        world.disk(0).bitmaps.values_mut().for_each(|bitmap| {
            *bitmap = std::iter::once(ByteRange::new(0, 4 << 20).unwrap()).collect();
        });
        for place in places {
            write(&mut world, (place + 3 * round) % 1024 * BLOCK, BLOCK, 1000 * (round + 1) + place);
        }
        let report = world.backup(RequestedLevel::Auto);
        assert_eq!(report.record.level, Level::Incremental);
        assert_eq!(report.stats.read_bytes, 4 << 20);
        assert_eq!(report.stats.changed_bytes, places.len() as u64 * BLOCK);
    }
    world.check_all();
}

/// Every third block is written, and so is, with a damaged chunk, what was to stay of it.
#[test]
fn nothing_of_a_damaged_chunk_is_kept() {
    let mut world = World::new(&[4 << 20]);
    write(&mut world, 0, 4 << 20, 1);
    world.backup(RequestedLevel::Auto);
    let len = spoil_longest_pack(&world.storage);
    assert!(len > 4 << 20, "noise is stored as it is, in one pack");
    world.reopen();
    let written = 1024 / 3 * BLOCK;
    (0..1024 / 3).for_each(|block| write(&mut world, block * 3 * BLOCK, BLOCK, 100 + block));
    let report = world.backup(RequestedLevel::Auto);
    assert_eq!(report.record.level, Level::Incremental);
    let more = report.stats.changed_bytes - written;
    assert!((BLOCK..=64 << 10).contains(&more), "one chunk more: {more}");
    world.check_restore(1);
}

/// A chunk of one block is damaged: as its frame is at hand, it is compared before it is checked.
#[test]
fn what_is_damaged_and_still_on_the_disk_is_stored_again() {
    let mut world = World::new(&[4 << 20]);
    let (changed, damaged) = (100 * BLOCK, 120 * BLOCK);
    write(&mut world, changed, BLOCK, 2);
    write(&mut world, damaged, BLOCK, 3);
    world.backup(RequestedLevel::Auto);
    let content = world.disk(0).content[damaged as usize..][..BLOCK as usize].to_vec();
    let mut spoilt = 0;
    for listed in world.storage.list(Folder::Packs).unwrap() {
        world.storage.tamper(listed.name, |mut bytes| {
            if let Some(at) = bytes.windows(content.len()).position(|window| window == content) {
                bytes[at] ^= 1;
                spoilt += 1;
            }
            Some(bytes)
        });
    }
    assert_eq!(spoilt, 1, "noise is stored as it is");
    world.reopen();
    write(&mut world, changed, BLOCK, 4);
    write(&mut world, damaged + 5 * BLOCK, BLOCK, 5);
    let report = world.backup(RequestedLevel::Auto);
    assert_eq!(report.stats.changed_bytes, 3 * BLOCK);
    world.check_restore(1);
}

/// Takes a disk's content, and counts how often.
struct Counted(Buffer, AtomicUsize);

impl Sink for Counted {
    fn write(&self, contents: Vec<DiskBytes>) -> Result<()> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.write(contents)
    }

    fn zero(&self, range: ByteRange) -> Result<()> {
        self.0.zero(range)
    }
}

#[test]
fn pieces_that_come_from_all_over_are_written_together() {
    const LEN: u64 = 8 << 20;
    let mut world = World::new(&[LEN]);
    write(&mut world, 0, LEN, 1);
    world.backup(RequestedLevel::Auto);
    (0..LEN / BLOCK / 2).for_each(|block| write(&mut world, block * 2 * BLOCK, BLOCK, 100 + block));
    let report = world.backup(RequestedLevel::Auto);
    assert_eq!(report.record.level, Level::Incremental);
    let (_, view) = world.repository.refresh(&Recorder::new()).unwrap();
    let reader = ChunkReader::new(&world.repository, &view);
    let sink = Counted(Buffer(Mutex::new(vec![0xee; LEN as usize])), AtomicUsize::new(0));
    let manifest = &report.record.disks[0].manifest;
    read_disk(&reader, manifest, &sink, OnDamage::Fail, &Recorder::new(), &|_| {}).unwrap();
    assert!(*sink.0.0.lock().unwrap() == *world.content(0));
    // each piece is of another frame than the one before it; a MiB at a time is 8
    assert!(sink.1.into_inner() <= 16);
}

#[test]
fn points_share_the_definition_of_their_domain() {
    let mut world = World::new(&[1 << 20]);
    (0..3).for_each(|_| drop(world.backup(RequestedLevel::Auto)));
    let catalog = world.repository.catalog(&Recorder::new()).unwrap();
    let mut definitions = catalog.points().iter().map(|entry| entry.record.xml_inactive.as_ref().unwrap());
    let first = definitions.next().unwrap();
    assert_eq!(definitions.filter(|other| Arc::ptr_eq(first, other)).count(), 2);
}

#[test]
fn outcomes_are_read_once_where_that_is_wanted() {
    let mut world = World::new(&[1 << 20]);
    let first = world.backup(RequestedLevel::Auto).record.id;
    let points = |world: &World| world.repository.catalog(&Recorder::new()).unwrap().points().len();
    world.repository.keep_outcomes();
    assert_eq!(points(&world), 1);
    world.storage.tamper(ObjectName::Outcome(first.into()), |bytes| Some(bytes[1..].to_vec()));
    world.backup(RequestedLevel::Auto);
    assert_eq!(points(&world), 2, "the first one is known");
    let outcome = ObjectName::Outcome(world.kept[1].id.into());
    world.storage.tamper(outcome, |_| None);
    assert_eq!(points(&world), 1, "what is gone is not known any more");
    world.reopen();
    assert_eq!(points(&world), 0);
}

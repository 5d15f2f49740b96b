//! From a disk's extents to a manifest.
//!
//! ```text
//! source ── LeafWork ──► compare and cut × cores ── LeafResult ──► assembler (caller's thread): new chunks
//! (reader thread)                                                  to the writer, entries to the tree
//! ```
//!
//! One leaf's range is the unit of work. Results are put in order before they reach the tree and the
//! packs, so that content stands in packs as it stands on the disk.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::Repository;
use super::compare::{Comparer, LeafResult, LeafWork, neighbour_gone};
use super::reader::ChunkReader;
use super::share::{Permits, Portion};
use super::writer::{SessionWriter, worker_count};
use crate::buffer::Payload;
use crate::error::{Error, Result};
use crate::extent::{ByteRange, RangeSet};
use crate::format::limits::{BLOCK_LEN, MAX_DISK_LEN};
use crate::format::point::Manifest;
use crate::id::ChunkId;
use crate::manifest::{Cursor, EntryRef, Geometry, NodeWriter, TreeWriter};
use crate::monitor::Monitor;
use crate::source::DiskSource;

/// Leaves that wait for a worker, and results that wait for the assembler: 1 MiB each by default.
const LEAF_QUEUE: usize = 4;
/// Leaves between reader and assembler in all, so that one slow leaf does not let the others pile up: 24 MiB.
const LEAVES_IN_FLIGHT: Portion = Portion { most: 24, least: 4 };

/// What to take in.
pub struct IngestInput<'a> {
    pub source: &'a mut dyn DiskSource,
    /// The newest map of the same disk; `None`: everything was zero.
    pub predecessor: Option<Manifest>,
    /// Look only at what the dirty bitmap says (and at what the disk grew by), because the bitmap began at
    /// the predecessor's instant.
    pub trust_bitmap: bool,
    /// Ranges of the predecessor whose content is lost: they are read whatever the bitmap says.
    pub lost: RangeSet,
    /// Cut leaves anew that many small writes have left in small pieces.
    pub recut: bool,
    /// Bytes per second that the source is read at, at most.
    pub read_limit: Option<u64>,
}

/// What was taken in. Bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ingested {
    pub manifest: Manifest,
    pub dirty_bytes: u64,
    pub read_bytes: u64,
    pub changed_bytes: u64,
}

/// What of a disk has to be looked at.
#[derive(Debug)]
pub struct Candidates {
    /// Has to be read.
    data: RangeSet,
    /// Reads as zero.
    zero: RangeSet,
    dirty_bytes: u64,
}

/// Finds out what has to be read and what reads as zero.
///
/// # Errors
/// Those of the source; [`Error::Refused`] for a disk that is larger than any may be.
pub fn candidates(input: &mut IngestInput<'_>, monitor: &dyn Monitor) -> Result<Candidates> {
    let size = input.source.size();
    if size > MAX_DISK_LEN {
        let reason = format!("it says that it has {size} bytes, at most {MAX_DISK_LEN} are possible");
        return Err(Error::Refused { object: input.source.label(), reason, hint: None });
    }
    let dirty = if input.trust_bitmap { input.source.dirty(monitor)? } else { None };
    let whole = RangeSet::whole(size);
    let wanted = match (&dirty, &input.predecessor) {
        (Some(dirty), Some(predecessor)) => {
            // what a disk grew by is not in the bitmap unless it was written
            let grown: RangeSet = ByteRange::between(predecessor.size.min(size), size).into_iter().collect();
            dirty.union(&grown).union(&input.lost).intersection(&whole).aligned_out(BLOCK_LEN, size)
        }
        _ => whole,
    };
    let data = input.source.data(&wanted, monitor)?.intersection(&wanted).aligned_out(BLOCK_LEN, size);
    let zero = wanted.difference(&data);
    let dirty_bytes = match &dirty {
        // what is read again because it was lost is not dirty
        Some(dirty) => wanted.difference(&input.lost.difference(dirty)).total_bytes(),
        None => data.total_bytes(),
    };
    Ok(Candidates { data, zero, dirty_bytes })
}

impl Candidates {
    /// Returns the bytes that will be read.
    pub fn read_bytes(&self) -> u64 {
        self.data.total_bytes()
    }

    /// Returns what the bitmap said, or what is allocated where there was none. Bytes.
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty_bytes
    }
}

/// Takes in one disk: the new map is the predecessor's with what differs replaced.
///
/// # Errors
/// Those of source, repository and storage; [`Error::Cancelled`].
pub fn ingest(
    repository: &Repository,
    reader: &ChunkReader<'_>,
    writer: &mut SessionWriter<'_>,
    input: &mut IngestInput<'_>,
    monitor: &dyn Monitor,
) -> Result<Ingested> {
    let candidates = candidates(input, monitor)?;
    let size = input.source.size();
    let task = monitor.start(&input.source.label(), candidates.read_bytes());
    let geometry = repository.geometry();
    let (predecessor, recut) = (input.predecessor, input.recut);
    let limit = input.read_limit;
    let source = &mut *input.source;
    let (zero, data) = (&candidates.zero, &candidates.data);
    let permits = &Permits::new(&repository.share, LEAVES_IN_FLIGHT);
    let result = std::thread::scope(|scope| {
        let (work_sender, work_receiver) = bounded::<LeafWork>(LEAF_QUEUE);
        let (result_sender, result_receiver) = bounded::<Result<LeafResult>>(LEAF_QUEUE);
        let producer = scope.spawn(move || {
            let old_leaves = OldLeaves::new(geometry, predecessor.as_ref(), reader, zero)?;
            let mut leaves = LeafMaker::new(geometry, size, old_leaves, work_sender, permits);
            let mut feed = |range: ByteRange, payload: Payload| {
                throttle(limit, range.len());
                monitor.advance(task, range.len());
                leaves.push(range, payload)
            };
            source.read(data, monitor, &mut feed)?;
            leaves.finish()
        });
        for _ in 0..worker_count() {
            let (work, results) = (work_receiver.clone(), result_sender.clone());
            scope.spawn(move || compare_leaves(repository, reader, (predecessor, recut), &work, &results));
        }
        drop((work_receiver, result_sender));
        let map = NewMap { geometry, size, predecessor };
        let assembled = assemble(&map, reader, writer, result_receiver, permits, monitor);
        let produced = producer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        match (produced, assembled) {
            // `Cancelled` of one side may only mean that the other side has failed
            (Err(error), Err(Error::Cancelled)) | (Err(error), Ok(_)) | (_, Err(error)) => Err(error),
            (Ok(()), Ok(assembled)) => Ok(assembled),
        }
    });
    monitor.finish(task);
    let (manifest, changed_bytes) = result?;
    Ok(Ingested {
        manifest,
        dirty_bytes: candidates.dirty_bytes,
        read_bytes: candidates.data.total_bytes(),
        changed_bytes,
    })
}

/// Keeps the average rate below the limit: the pause is what reading alone would take at that rate.
fn throttle(limit: Option<u64>, bytes: u64) {
    if let Some(limit) = limit.filter(|limit| *limit > 0) {
        let micros = u128::from(bytes) * 1_000_000 / u128::from(limit);
        std::thread::sleep(Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX)));
    }
}

/// The leaves of the predecessor that hold something where there is zero now, in order.
struct OldLeaves<'a> {
    geometry: Geometry,
    cursor: Option<Cursor<'a>>,
    zero: std::slice::Iter<'a, ByteRange>,
    current: Option<ByteRange>,
    peeked: Option<(u64, ByteRange)>,
}

impl<'a> OldLeaves<'a> {
    fn new(
        geometry: Geometry,
        predecessor: Option<&Manifest>,
        reader: &'a ChunkReader<'a>,
        zero: &'a RangeSet,
    ) -> Result<Self> {
        let cursor = predecessor.map(|manifest| Cursor::new(geometry, manifest, reader)).transpose()?;
        let mut zero = zero.as_slice().iter();
        Ok(Self { geometry, cursor, current: zero.next().copied(), zero, peeked: None })
    }

    /// Returns the next such leaf, and the range of it that is zero now.
    fn next(&mut self) -> Result<Option<(u64, ByteRange)>> {
        if let Some(peeked) = self.peeked.take() {
            return Ok(Some(peeked));
        }
        let Some(cursor) = self.cursor.as_mut() else { return Ok(None) };
        while let Some(range) = self.current {
            let held = cursor.entries(range).find(|piece| !matches!(piece, Ok((_, EntryRef::Zero))));
            let Some((held, _)) = held.transpose()? else {
                self.current = self.zero.next().copied();
                continue;
            };
            let leaf = held.start() / self.geometry.leaf_len();
            let leaf_end = (leaf + 1).saturating_mul(self.geometry.leaf_len());
            self.current = match ByteRange::between(leaf_end, range.end()) {
                Some(rest) => Some(rest),
                None => self.zero.next().copied(),
            };
            if let Some(hit) = ByteRange::between(held.start(), range.end().min(leaf_end)) {
                return Ok(Some((leaf, hit)));
            }
        }
        Ok(None)
    }

    /// As [`OldLeaves::next`], but only for leaves up to `last`.
    fn next_up_to(&mut self, last: u64) -> Result<Option<(u64, ByteRange)>> {
        match self.next()? {
            Some((leaf, range)) if leaf > last => {
                self.peeked = Some((leaf, range));
                Ok(None)
            }
            other => Ok(other),
        }
    }
}

/// Makes leaves' work of buffers in the order of the disk.
struct LeafMaker<'a> {
    geometry: Geometry,
    size: u64,
    old_leaves: OldLeaves<'a>,
    work: Sender<LeafWork>,
    permits: &'a Permits<'a>,
    sequence: u64,
    open: Option<LeafWork>,
}

impl<'a> LeafMaker<'a> {
    fn new(
        geometry: Geometry,
        size: u64,
        old_leaves: OldLeaves<'a>,
        work: Sender<LeafWork>,
        permits: &'a Permits<'a>,
    ) -> Self {
        Self { geometry, size, old_leaves, work, permits, sequence: 0, open: None }
    }

    /// Takes a buffer; buffers come in order. It is split where it crosses into another leaf.
    fn push(&mut self, range: ByteRange, payload: Payload) -> Result<()> {
        let leaf = range.start() / self.geometry.leaf_len();
        let leaf_end = (leaf + 1).saturating_mul(self.geometry.leaf_len());
        let Some(rest) = ByteRange::between(leaf_end, range.end()) else {
            return self.push_piece(leaf, range, payload);
        };
        let Some(head) = ByteRange::between(range.start(), leaf_end) else { return Ok(()) };
        let (first, second) = match payload {
            Payload::Zero => (Payload::Zero, Payload::Zero),
            Payload::Data(mut bytes) => {
                let at = usize::try_from(head.len()).unwrap_or(usize::MAX).min(bytes.len());
                let tail = bytes.split_off(at);
                (Payload::Data(bytes), Payload::Data(tail))
            }
        };
        self.push_piece(leaf, head, first)?;
        self.push(rest, second)
    }

    fn push_piece(&mut self, leaf: u64, range: ByteRange, payload: Payload) -> Result<()> {
        if self.open.as_ref().is_some_and(|work| work.leaf != leaf) {
            self.close()?;
        }
        if self.open.is_none() {
            self.zero_leaves_before(leaf)?;
        }
        let work = self.leaf(leaf)?;
        work.pieces.push((range, payload));
        Ok(())
    }

    /// Returns the open work of `leaf`, begun if need be.
    fn leaf(&mut self, leaf: u64) -> Result<&mut LeafWork> {
        let start = leaf.saturating_mul(self.geometry.leaf_len());
        let end = start.saturating_add(self.geometry.leaf_len()).min(self.size);
        let range = ByteRange::between(start, end).ok_or_else(|| Error::Refused {
            object: format!("leaf {leaf}"),
            reason: format!("it begins behind the disk's end at {}", self.size),
            hint: None,
        })?;
        let sequence = self.sequence;
        Ok(self.open.get_or_insert_with(|| LeafWork { sequence, leaf, range, pieces: Vec::new() }))
    }

    /// Emits the leaves before `leaf` that only have zeroes to take in.
    fn zero_leaves_before(&mut self, leaf: u64) -> Result<()> {
        let Some(last) = leaf.checked_sub(1) else { return Ok(()) };
        while let Some((old, range)) = self.old_leaves.next_up_to(last)? {
            if self.open.as_ref().is_some_and(|work| work.leaf != old) {
                self.emit()?;
            }
            self.leaf(old)?.pieces.push((range, Payload::Zero));
        }
        self.emit()
    }

    /// Ends the open leaf: zero ranges in it join its data.
    fn close(&mut self) -> Result<()> {
        if let Some(leaf) = self.open.as_ref().map(|work| work.leaf) {
            while let Some((old, range)) = self.old_leaves.next_up_to(leaf)? {
                debug_assert_eq!(old, leaf);
                self.leaf(leaf)?.pieces.push((range, Payload::Zero));
            }
        }
        self.emit()
    }

    fn emit(&mut self) -> Result<()> {
        let Some(mut work) = self.open.take() else { return Ok(()) };
        work.pieces.sort_unstable_by_key(|(range, _)| *range);
        self.sequence += 1;
        if !self.permits.take() {
            return Err(Error::Cancelled);
        }
        self.work.send(work).map_err(neighbour_gone)
    }

    fn finish(mut self) -> Result<()> {
        self.close()?;
        self.zero_leaves_before(u64::MAX)
    }
}

fn compare_leaves(
    repository: &Repository,
    reader: &ChunkReader<'_>,
    (predecessor, recut): (Option<Manifest>, bool),
    work: &Receiver<LeafWork>,
    results: &Sender<Result<LeafResult>>,
) {
    let comparer = Comparer {
        reader,
        hasher: repository.hasher(),
        cutter: repository.cutter(),
        recut,
        last: Cell::new(None),
        unchecked: RefCell::default(),
    };
    let cursor = predecessor.map(|manifest| Cursor::new(repository.geometry(), &manifest, reader));
    let mut cursor = match cursor.transpose() {
        Ok(cursor) => cursor,
        Err(error) => {
            // the assembler reports it; if it is gone, it has failed itself
            let _ = results.send(Err(error));
            return;
        }
    };
    for leaf in work {
        let old = cursor.as_mut().map_or(Ok(None), |cursor| cursor.leaf(leaf.leaf));
        let result = old.and_then(|old| comparer.compare(leaf, old.as_ref().map(|leaf| leaf.entries())));
        if results.send(result).is_err() {
            return;
        }
    }
}

/// The map to make.
struct NewMap {
    geometry: Geometry,
    size: u64,
    predecessor: Option<Manifest>,
}

/// The tree and the assembler store through one writer, in turn.
struct Nodes<'a, 'w>(&'a RefCell<&'a mut SessionWriter<'w>>);

impl NodeWriter for Nodes<'_, '_> {
    fn write_node(&mut self, plain: Vec<u8>) -> Result<ChunkId> {
        self.0.borrow_mut().write_node(plain)
    }
}

/// Puts results in order and hands them to the tree and the writer; returns the map and the changed bytes.
fn assemble(
    map: &NewMap,
    reader: &ChunkReader<'_>,
    writer: &mut SessionWriter<'_>,
    results: Receiver<Result<LeafResult>>,
    permits: &Permits<'_>,
    monitor: &dyn Monitor,
) -> Result<(Manifest, u64)> {
    let _closing = permits.close_at_end();
    let writer = RefCell::new(writer);
    let mut nodes = Nodes(&writer);
    let predecessor = map.predecessor;
    let mut tree = TreeWriter::new(map.geometry, map.size, predecessor, reader, &mut nodes)?;
    let mut early = BTreeMap::new();
    let mut next = 0;
    let mut changed_bytes = 0;
    for result in results {
        monitor.check()?;
        let result = result?;
        early.insert(result.work.sequence, result);
        while let Some(result) = early.remove(&next) {
            next += 1;
            permits.give_back();
            changed_bytes += result.changed.iter().map(ByteRange::len).sum::<u64>();
            for chunk in &result.chunks {
                let bytes = match result.work.pieces.get(chunk.piece) {
                    Some((_, Payload::Data(bytes))) => bytes.get(chunk.range.clone()).unwrap_or_default(),
                    _ => continue,
                };
                writer.borrow_mut().put_data(chunk.id, bytes, chunk.known)?;
            }
            if let Some(entries) = result.entries {
                tree.put_leaf(result.work.leaf, &entries)?;
            }
        }
    }
    Ok((tree.finish()?, changed_bytes))
}

/// Takes in a small file that is kept beside the disks.
///
/// # Errors
/// Those of repository and storage.
pub fn ingest_bytes(
    repository: &Repository,
    reader: &ChunkReader<'_>,
    writer: &mut SessionWriter<'_>,
    label: &str,
    bytes: Vec<u8>,
    monitor: &dyn Monitor,
) -> Result<Manifest> {
    let mut source = BytesSource { label, bytes };
    let mut input = IngestInput {
        source: &mut source,
        predecessor: None,
        trust_bitmap: false,
        lost: RangeSet::default(),
        recut: false,
        read_limit: None,
    };
    Ok(ingest(repository, reader, writer, &mut input, monitor)?.manifest)
}

struct BytesSource<'a> {
    label: &'a str,
    bytes: Vec<u8>,
}

impl DiskSource for BytesSource<'_> {
    fn label(&self) -> String {
        self.label.to_owned()
    }

    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn dirty(&mut self, _monitor: &dyn Monitor) -> Result<Option<RangeSet>> {
        Ok(None)
    }

    fn data(&mut self, within: &RangeSet, _monitor: &dyn Monitor) -> Result<RangeSet> {
        Ok(within.clone())
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
                let end =
                    range.end().min((start / crate::source::READ_WINDOW + 1) * crate::source::READ_WINDOW);
                let (from, to) = (usize::try_from(start), usize::try_from(end));
                if let (Ok(from), Ok(to), Some(part)) = (from, to, ByteRange::between(start, end)) {
                    sink(part, Payload::Data(self.bytes.get(from..to).unwrap_or_default().to_vec().into()))?;
                }
                start = end;
            }
        }
        Ok(())
    }
}

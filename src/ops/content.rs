//! Reading a whole disk of a point: several batches at once, every chunk checked against its id.

use std::sync::Mutex;

use crossbeam_channel::{Receiver, bounded};

use crate::error::{Context, Error, Result};
use crate::extent::{ByteRange, RangeSet};
use crate::format::node::ChunkKind;
use crate::format::point::Manifest;
use crate::id::ChunkId;
use crate::manifest::{EntryRef, NodeAt, Visitor, walk};
use crate::monitor::Monitor;
use crate::repo::Repository;
use crate::repo::reader::{ChunkBytes, ChunkReader};

/// Disk content in one batch of look-ups, bytes.
const BATCH_LEN: u64 = 4 << 20;
/// Entries in one batch.
const BATCH_ENTRIES: usize = 1024;
/// Batches that wait for a worker; a batch holds ids, not content.
const BATCH_QUEUE: usize = 4;

/// Takes a disk's content in any order, from several threads: every byte once.
pub(super) trait Sink: Sync {
    /// Takes bytes.
    fn write(&self, offset: u64, bytes: &[u8]) -> Result<()>;
    /// Takes a range that reads as zero.
    fn zero(&self, range: ByteRange) -> Result<()>;
}

/// What to do where content is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnDamage {
    /// Fail, naming the range.
    #[default]
    Fail,
    /// Give zeroes and go on.
    Zero,
}

/// What was read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct DiskRead {
    /// Bytes that are not zero by the map.
    pub data_bytes: u64,
    /// What was given as zeroes because it is lost.
    pub missing: RangeSet,
}

/// A piece of a disk.
type Piece = (ByteRange, EntryRef);

/// Reads a disk into a sink; the first failure ends it.
pub(super) fn read_disk(
    repository: &Repository,
    reader: &ChunkReader<'_>,
    manifest: &Manifest,
    sink: &dyn Sink,
    on_damage: OnDamage,
    monitor: &dyn Monitor,
    advance: &(dyn Fn(u64) + Sync),
) -> Result<DiskRead> {
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let missing: Mutex<Vec<ByteRange>> = Mutex::new(Vec::new());
    let result = std::thread::scope(|scope| {
        let (sender, receiver) = bounded::<Vec<Piece>>(BATCH_QUEUE);
        for _ in 0..std::thread::available_parallelism().map_or(2, std::num::NonZero::get).clamp(1, 16) {
            let worker = Worker { reader, sink, on_damage, monitor, advance, missing: &missing };
            let (receiver, failure) = (receiver.clone(), &failure);
            scope.spawn(move || {
                if let Err(error) = worker.run(&receiver)
                    && let Ok(mut slot) = failure.lock()
                {
                    slot.get_or_insert(error);
                }
            });
        }
        drop(receiver);
        let mut batches = Batches {
            on_damage,
            monitor,
            sender: &sender,
            batch: Vec::new(),
            batch_len: 0,
            position: 0,
            data_bytes: 0,
        };
        walk(repository.geometry(), manifest, reader, &mut batches)?;
        batches.zero_until(manifest.size)?;
        batches.send()?;
        Ok(batches.data_bytes)
    });
    if let Ok(Some(error)) = failure.into_inner() {
        return Err(error);
    }
    let mut missing = missing.into_inner().unwrap_or_default();
    missing.sort_unstable();
    Ok(DiskRead { data_bytes: result?, missing: missing.into_iter().collect() })
}

/// Collects what the walk meets into batches; absent subtrees are zeroes.
struct Batches<'a> {
    on_damage: OnDamage,
    monitor: &'a dyn Monitor,
    sender: &'a crossbeam_channel::Sender<Vec<Piece>>,
    batch: Vec<Piece>,
    batch_len: u64,
    position: u64,
    data_bytes: u64,
}

impl Batches<'_> {
    fn send(&mut self) -> Result<()> {
        self.batch_len = 0;
        // the workers are gone only after a failure, which is in its slot
        self.sender.send(std::mem::take(&mut self.batch)).map_err(|_| Error::Cancelled)
    }

    fn push(&mut self, range: ByteRange, entry: EntryRef) -> Result<()> {
        match self.batch.last_mut() {
            Some((last, EntryRef::Zero)) if entry == EntryRef::Zero && last.end() == range.start() => {
                if let Some(joined) = ByteRange::between(last.start(), range.end()) {
                    *last = joined;
                }
            }
            _ => self.batch.push((range, entry)),
        }
        if entry != EntryRef::Zero {
            self.data_bytes += range.len();
            self.batch_len += range.len();
        }
        self.position = range.end();
        if self.batch_len >= BATCH_LEN || self.batch.len() >= BATCH_ENTRIES { self.send() } else { Ok(()) }
    }

    fn zero_until(&mut self, end: u64) -> Result<()> {
        match ByteRange::between(self.position, end) {
            Some(gap) => self.push(gap, EntryRef::Zero),
            None => Ok(()),
        }
    }
}

impl Visitor for Batches<'_> {
    fn node(&mut self, _node: NodeAt) -> Result<bool> {
        self.monitor.check()?;
        Ok(true)
    }

    fn entry(&mut self, range: ByteRange, entry: EntryRef) -> Result<()> {
        self.zero_until(range.start())?;
        self.push(range, entry)
    }

    fn fault(&mut self, node: NodeAt, error: Error) -> Result<()> {
        if self.on_damage == OnDamage::Fail || !error.is_damage() {
            return Err(error).context(|| format!("bytes {} cannot be read", node.range));
        }
        self.zero_until(node.range.start())?;
        self.push(node.range, EntryRef::Unreadable)
    }
}

struct Worker<'a, 'r> {
    reader: &'a ChunkReader<'r>,
    sink: &'a dyn Sink,
    on_damage: OnDamage,
    monitor: &'a dyn Monitor,
    advance: &'a (dyn Fn(u64) + Sync),
    missing: &'a Mutex<Vec<ByteRange>>,
}

impl Worker<'_, '_> {
    fn run(&self, batches: &Receiver<Vec<Piece>>) -> Result<()> {
        for batch in batches {
            self.monitor.check()?;
            let ids: Vec<ChunkId> = batch
                .iter()
                .filter_map(|(_, entry)| match entry {
                    EntryRef::Chunk { id, .. } => Some(*id),
                    _ => None,
                })
                .collect();
            let mut places = self.reader.locate(&ids)?.into_iter();
            for (range, entry) in &batch {
                match entry {
                    EntryRef::Zero => self.sink.zero(*range)?,
                    EntryRef::Unreadable => {
                        let what =
                            "could not be recovered when this point was repaired, or their map is lost";
                        self.lost(*range, Error::Damaged(format!("bytes {range} {what}")))?;
                    }
                    EntryRef::Chunk { id, offset } => {
                        let chunk =
                            self.reader.read_at(ChunkKind::Data, *id, &places.next().unwrap_or_default());
                        self.chunk(*range, *id, *offset as usize, chunk)?;
                    }
                }
                (self.advance)(range.len());
            }
        }
        Ok(())
    }

    fn chunk(&self, range: ByteRange, id: ChunkId, start: usize, chunk: Result<ChunkBytes>) -> Result<()> {
        let chunk = match chunk.context(|| format!("bytes {range} cannot be read")) {
            Ok(chunk) => chunk,
            Err(error) => return self.lost(range, error),
        };
        let len = usize::try_from(range.len()).unwrap_or(usize::MAX);
        match chunk.get(start..start.saturating_add(len)) {
            Some(content) => self.sink.write(range.start(), content),
            None => {
                let what = format!("bytes {range} are beyond the end of chunk {id}");
                self.lost(range, Error::Damaged(what))
            }
        }
    }

    fn lost(&self, range: ByteRange, error: Error) -> Result<()> {
        if self.on_damage == OnDamage::Fail || !error.is_damage() {
            return Err(error);
        }
        if let Ok(mut missing) = self.missing.lock() {
            missing.push(range);
        }
        self.sink.zero(range)
    }
}

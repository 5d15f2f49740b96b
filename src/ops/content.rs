//! Reading a whole disk of a point: several batches at once, every chunk checked against its id.

mod scattered;

use std::sync::{Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::error::{Context, Error, Result};
use crate::extent::{ByteRange, RangeSet};
use crate::format::node::ChunkKind;
use crate::format::point::Manifest;
use crate::id::ChunkId;
use crate::index::Location;
use crate::manifest::{EntryRef, NodeAt, Visitor, walk};
use crate::monitor::Monitor;
use crate::repo::reader::{ChunkBytes, ChunkReader};
use crate::source::READ_WINDOW;
pub(super) use scattered::Limits;
use scattered::Scattered;

/// Disk content in one batch of look-ups, bytes.
const BATCH_LEN: u64 = 4 << 20;
/// Entries in one batch.
const BATCH_ENTRIES: usize = 1024;
/// Batches that wait for a worker; a batch holds ids and, where its content is scattered, what of it was read ahead: that may be
/// all of it.
const BATCH_QUEUE: usize = 4;
/// DiskBytes that is handed to a sink at once, bytes.
const WRITE_LEN: usize = 1 << 20;
/// Memory that it may keep: of small pieces that come from all over the repository, each keeps a frame, and they are copied
/// out of those. Bytes.
const HELD_LEN: usize = 4 << 20;

/// DiskBytes of a disk.
pub(super) struct DiskBytes {
    /// Where on the disk, bytes.
    pub offset: u64,
    pub bytes: ChunkBytes,
}

/// Takes a disk's content from several threads: every byte once, in any order. Yet what comes later on the disk is taken up
/// later, so that one who puts it in order need not keep much.
pub(super) trait Sink: Sync {
    /// Takes bytes; what follows on the disk follows in `contents` for the most part.
    fn write(&self, contents: Vec<DiskBytes>) -> Result<()>;
    /// Takes a range that reads as zero.
    fn zero(&self, range: ByteRange) -> Result<()>;
    /// Told when reading has failed: nothing more comes, and nobody may wait for it.
    fn stop(&self) {}
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

impl OnDamage {
    /// Goes on where content is lost, or fails with what it is lost by.
    fn tolerate(self, error: Error) -> Result<()> {
        if self == Self::Fail || !error.is_damage() { Err(error) } else { Ok(()) }
    }
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
struct Piece {
    range: ByteRange,
    entry: EntryRef,
    /// If it was looked up already.
    place: Option<Location>,
    /// If it was read ahead.
    content: Option<ChunkBytes>,
}

/// Returns a piece's content, which begins at byte `start` of its chunk.
fn part_of(chunk: Result<ChunkBytes>, range: ByteRange, id: ChunkId, start: usize) -> Result<ChunkBytes> {
    let chunk = chunk.context(|| format!("bytes {range} cannot be read"))?;
    let part = chunk.part(start, usize::try_from(range.len()).unwrap_or(usize::MAX));
    part.ok_or_else(|| Error::Damaged(format!("bytes {range} are beyond the end of chunk {id}")))
}

/// Reads a disk into a sink; the first failure ends it.
pub(super) fn read_disk(
    reader: &ChunkReader<'_>,
    manifest: &Manifest,
    sink: &dyn Sink,
    on_damage: OnDamage,
    monitor: &dyn Monitor,
    advance: &(dyn Fn(u64) + Sync),
) -> Result<DiskRead> {
    read_disk_by(reader, manifest, sink, on_damage, monitor, advance, Limits::default())
}

/// As [`read_disk`], by other limits.
pub(super) fn read_disk_by(
    reader: &ChunkReader<'_>,
    manifest: &Manifest,
    sink: &dyn Sink,
    on_damage: OnDamage,
    monitor: &dyn Monitor,
    advance: &(dyn Fn(u64) + Sync),
    limits: Limits,
) -> Result<DiskRead> {
    let failure = Failure::default();
    let missing: Mutex<Vec<ByteRange>> = Mutex::new(Vec::new());
    let data_bytes = std::thread::scope(|scope| {
        let (sender, receiver) = bounded::<Vec<Piece>>(BATCH_QUEUE);
        for _ in 0..std::thread::available_parallelism().map_or(2, std::num::NonZero::get).clamp(1, 16) {
            let mut worker = Worker {
                reader,
                sink,
                on_damage,
                monitor,
                advance,
                missing: &missing,
                gathered: Vec::new(),
                copied: 0,
                gathered_len: 0,
                held_len: 0,
                last_held: None,
                last: None,
            };
            let (receiver, failure) = (receiver.clone(), &failure);
            scope.spawn(move || {
                if let Err(error) = worker.run(&receiver) {
                    sink.stop();
                    failure.note(error);
                }
            });
        }
        drop(receiver);
        let mut batches = Batches {
            on_damage,
            monitor,
            failure: &failure,
            sender: &sender,
            scattered: Scattered::new(reader, monitor, limits),
            batch: Vec::new(),
            batch_len: 0,
            position: 0,
            data_bytes: 0,
        };
        let walked = walk(reader.geometry(), manifest, reader, &mut batches)
            .and_then(|()| batches.zero_until(manifest.size))
            .and_then(|()| batches.send())
            .and_then(|()| batches.send_scattered());
        if let Err(error) = walked {
            sink.stop();
            failure.note(error);
        }
        batches.data_bytes
    });
    failure.into_result()?;
    let mut missing = missing.into_inner().unwrap_or_default();
    missing.sort_unstable();
    Ok(DiskRead { data_bytes, missing: missing.into_iter().collect() })
}

/// What reading failed with: the first failure, but for cancellations that may only have followed from it.
#[derive(Default)]
struct Failure(Mutex<Option<Error>>);

impl Failure {
    fn note(&self, error: Error) {
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*slot, None | Some(Error::Cancelled)) {
            *slot = Some(error);
        }
    }

    fn is_noted(&self) -> bool {
        self.0.lock().is_ok_and(|slot| slot.is_some())
    }

    fn into_result(self) -> Result<()> {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }
}

/// Collects what the walk meets into batches; absent subtrees are zeroes.
struct Batches<'a, 'r> {
    on_damage: OnDamage,
    monitor: &'a dyn Monitor,
    failure: &'a Failure,
    sender: &'a Sender<Vec<Piece>>,
    scattered: Scattered<'a, 'r>,
    batch: Vec<Piece>,
    batch_len: u64,
    position: u64,
    data_bytes: u64,
}

impl Batches<'_, '_> {
    fn send(&mut self) -> Result<()> {
        self.batch_len = 0;
        let mut batch = std::mem::take(&mut self.batch);
        if self.scattered.take(&mut batch)? {
            return if self.scattered.is_full() { self.send_scattered() } else { Ok(()) };
        }
        // nothing of what is later on the disk may be taken up before it
        self.send_scattered()?;
        self.hand_over(batch)
    }

    fn send_scattered(&mut self) -> Result<()> {
        self.scattered.read()?.into_iter().try_for_each(|batch| self.hand_over(batch))
    }

    fn hand_over(&self, batch: Vec<Piece>) -> Result<()> {
        // one worker's failure is enough: the others would go on to the end of the disk
        if self.failure.is_noted() {
            return Err(Error::Cancelled);
        }
        // the workers are gone only after a failure
        self.sender.send(batch).map_err(|_| Error::Cancelled)
    }

    fn push(&mut self, range: ByteRange, entry: EntryRef) -> Result<()> {
        match self.batch.last_mut() {
            Some(Piece { range: last, entry: EntryRef::Zero, .. })
                if entry == EntryRef::Zero && last.end() == range.start() =>
            {
                if let Some(joined) = ByteRange::between(last.start(), range.end()) {
                    *last = joined;
                }
            }
            _ => self.batch.push(Piece { range, entry, place: None, content: None }),
        }
        if entry != EntryRef::Zero {
            self.data_bytes += range.len();
            self.batch_len += range.len();
        }
        self.position = range.end();
        // where two leaves meet is the best place: sinks write whole blocks
        let at_leaf = range.end().is_multiple_of(READ_WINDOW);
        let (len, entries) =
            if at_leaf { (BATCH_LEN, BATCH_ENTRIES) } else { (2 * BATCH_LEN, 2 * BATCH_ENTRIES) };
        if self.batch_len >= len || self.batch.len() >= entries { self.send() } else { Ok(()) }
    }

    fn zero_until(&mut self, end: u64) -> Result<()> {
        match ByteRange::between(self.position, end) {
            Some(gap) => self.push(gap, EntryRef::Zero),
            None => Ok(()),
        }
    }
}

impl Visitor for Batches<'_, '_> {
    fn node(&mut self, _node: NodeAt) -> Result<bool> {
        self.monitor.check()?;
        Ok(true)
    }

    fn entry(&mut self, range: ByteRange, entry: EntryRef) -> Result<()> {
        self.zero_until(range.start())?;
        self.push(range, entry)
    }

    fn fault(&mut self, node: NodeAt, error: Error) -> Result<()> {
        self.on_damage.tolerate(error).context(|| format!("bytes {} cannot be read", node.range))?;
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
    gathered: Vec<DiskBytes>,
    /// How many of them, from the first on, keep no frame.
    copied: usize,
    gathered_len: usize,
    held_len: usize,
    /// What was gathered last of what holds a frame.
    last_held: Option<ChunkBytes>,
    /// The chunk that was read last.
    last: Option<ChunkBytes>,
}

impl Worker<'_, '_> {
    fn run(&mut self, batches: &Receiver<Vec<Piece>>) -> Result<()> {
        for batch in batches {
            self.monitor.check()?;
            for Piece { range, entry, place, content } in batch {
                match (entry, content) {
                    (EntryRef::Zero, _) => self.sink.zero(range)?,
                    (EntryRef::Unreadable, _) => {
                        let what =
                            "could not be recovered when this point was repaired, or their map is lost";
                        self.lost(range, Error::Damaged(format!("bytes {range} {what}")))?;
                    }
                    (EntryRef::Chunk { .. }, Some(bytes)) => self.gather(range, bytes, true)?,
                    (EntryRef::Chunk { id, offset }, None) => {
                        let chunk = self.read(id, range, offset, place);
                        match part_of(chunk, range, id, offset as usize) {
                            Ok(bytes) => self.gather(range, bytes, false)?,
                            Err(error) => self.lost(range, error)?,
                        }
                    }
                }
                (self.advance)(range.len());
            }
            self.write_gathered()?;
        }
        Ok(())
    }

    fn read(
        &mut self,
        id: ChunkId,
        range: ByteRange,
        offset: u32,
        place: Option<Location>,
    ) -> Result<ChunkBytes> {
        if place.is_some() {
            // nothing is looked for behind it, and it would keep its frame
            self.last = None;
            return self.reader.read_at(ChunkKind::Data, id, place.as_slice());
        }
        // where an entry is a part of a chunk, its end may be the chunk's or not
        let len = u64::from(offset) + range.len();
        let behind = self
            .last
            .as_ref()
            .zip(u32::try_from(len).ok())
            .and_then(|(last, len)| self.reader.read_behind(last, ChunkKind::Data, id, len));
        let chunk = match behind {
            Some(chunk) => Ok(chunk),
            None => self.reader.read(ChunkKind::Data, id),
        };
        self.last = chunk.as_ref().ok().cloned();
        chunk
    }

    fn write_gathered(&mut self) -> Result<()> {
        (self.copied, self.gathered_len, self.held_len, self.last_held) = (0, 0, 0, None);
        match std::mem::take(&mut self.gathered) {
            contents if contents.is_empty() => Ok(()),
            contents => self.sink.write(contents),
        }
    }

    /// Has what was gathered keep its own bytes alone: written at once, it would be a write for each few pieces.
    fn copy_gathered(&mut self) {
        let pieces = self.gathered.split_off(self.copied);
        let meets = |a: &DiskBytes, b: &DiskBytes| a.offset + a.bytes.len() as u64 == b.offset;
        self.gathered.extend(pieces.chunk_by(meets).map(|run| {
            let bytes = run.iter().map(|piece| &*piece.bytes).collect::<Vec<&[u8]>>().concat();
            DiskBytes { offset: run.first().map_or(0, |first| first.offset), bytes: ChunkBytes::of(bytes) }
        }));
        (self.copied, self.held_len, self.last_held) = (self.gathered.len(), self.gathered_len, None);
    }

    fn gather(&mut self, range: ByteRange, bytes: ChunkBytes, was_ahead: bool) -> Result<()> {
        self.gathered_len += bytes.len();
        // what was read ahead stays in memory until its batch is done
        if !was_ahead {
            self.held_len += bytes.held_beside(self.last_held.as_ref());
            self.last_held = Some(bytes.clone());
        }
        let meets = |last: &&mut DiskBytes| last.offset + last.bytes.len() as u64 == range.start();
        let last = self.gathered.last_mut().filter(meets);
        match last.and_then(|last| last.bytes.joined(&bytes).map(|joined| (last, joined))) {
            Some((last, joined)) => last.bytes = joined,
            None => self.gathered.push(DiskBytes { offset: range.start(), bytes }),
        }
        let at_leaf = range.end().is_multiple_of(READ_WINDOW);
        let enough = self.gathered_len >= if at_leaf { WRITE_LEN / 2 } else { 2 * WRITE_LEN };
        if enough {
            return self.write_gathered();
        }
        if self.held_len >= HELD_LEN {
            self.copy_gathered();
        }
        Ok(())
    }

    fn lost(&self, range: ByteRange, error: Error) -> Result<()> {
        self.on_damage.tolerate(error)?;
        if let Ok(mut missing) = self.missing.lock() {
            missing.push(range);
        }
        self.sink.zero(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_cancelled_for_a_failure_does_not_hide_it() {
        let damaged = || Error::Damaged("here".into());
        for order in [[Error::Cancelled, damaged()], [damaged(), Error::Cancelled]] {
            let failure = Failure::default();
            order.into_iter().for_each(|error| failure.note(error));
            assert!(failure.into_result().unwrap_err().is_damage());
        }
        Failure::default().into_result().unwrap();
    }
}

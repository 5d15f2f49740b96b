//! Reading what is scattered: content that was written to again and again, a little each time, stands in a frame of each of
//! those times. Read in the order of the disk, each of these frames would be opened over and over. So much of the disk is
//! gathered here, and what of it stands in such frames is read ahead, in their order.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use rayon::iter::{IntoParallelIterator, ParallelIterator};

use super::{Piece, part_of};
use crate::error::{Context, Result};
use crate::extent::ByteRange;
use crate::format::node::ChunkKind;
use crate::id::{ChunkId, PackId};
use crate::index::Location;
use crate::manifest::EntryRef;
use crate::monitor::Monitor;
use crate::repo::reader::{ChunkBytes, ChunkReader, in_parts};

/// When content counts as scattered, and how much of it is read ahead.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) struct Limits {
    /// Pieces of a batch that are longer than this on average are not scattered, bytes.
    pub piece_len: u64,
    /// Plaintext of the frames in which a batch stands, bytes: from here on they would not stay in a reader's cache beside
    /// those of the other batches that are read meanwhile.
    pub frames_len: u64,
    /// A frame's content is scattered if it stands in a stretch of the disk that is more than so many times as long. Where less
    /// is between it, the frame is opened once or twice in any case.
    pub spread: u64,
    /// Content that is read ahead at once, bytes. It is in memory until it is written: beside the next that is read ahead there
    /// is that of the batches that wait, or are written.
    pub content_len: u64,
    /// Pieces that are gathered, and what the last batch has more; about 400 bytes each.
    pub pieces: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { piece_len: 16 << 10, frames_len: 20 << 20, spread: 4, content_len: 96 << 20, pieces: 64 << 10 }
    }
}

#[cfg(test)]
impl Limits {
    /// By these everything is scattered.
    pub const EVERYTHING: Self =
        Self { piece_len: u64::MAX, frames_len: 0, spread: 0, content_len: 96 << 20, pieces: 64 << 10 };
}

/// Of so many pieces one is looked up to see in how many frames a batch stands.
const SAMPLED: usize = 8;
/// Content that is not scattered, between some that is, is gathered with it up to this length, bytes.
const MAX_BETWEEN: u64 = 16 << 20;

/// A frame: its pack, and its first byte there.
type FrameKey = (PackId, u32);

/// Which part of the disk has pieces in a frame, and how long they are; bytes.
#[derive(Debug, Clone, Copy)]
struct Use {
    start: u64,
    end: u64,
    len: u64,
}

impl Use {
    /// Returns how much of it is to be read ahead, bytes: all or nothing.
    fn ahead_len(&self, spread: u64) -> u64 {
        let span = self.end.saturating_sub(self.start);
        if span > self.len.saturating_mul(spread) { self.len } else { 0 }
    }
}

/// Batches of which some is read ahead.
pub(super) struct Scattered<'a, 'r> {
    reader: &'a ChunkReader<'r>,
    monitor: &'a dyn Monitor,
    limits: Limits,
    batches: Vec<Vec<Piece>>,
    frames: HashMap<FrameKey, Use>,
    /// What is to be read ahead, bytes.
    content_len: u64,
    pieces: usize,
    /// Content at the end that is not scattered, bytes.
    between: u64,
}

/// A piece that is to be read ahead.
struct Ahead {
    /// Which one of its batch.
    at: usize,
    range: ByteRange,
    id: ChunkId,
    /// Where in the chunk it begins, bytes.
    offset: usize,
    place: Location,
    is_read: bool,
}

impl Ahead {
    fn len(&self) -> usize {
        usize::try_from(self.range.len()).unwrap_or(usize::MAX)
    }
}

fn frame_of(place: &Location) -> FrameKey {
    (place.pack, place.frame.offset)
}

/// Returns the chunk that a piece is of.
fn chunk_of(piece: &Piece) -> Option<ChunkId> {
    match piece.entry {
        EntryRef::Chunk { id, .. } => Some(id),
        EntryRef::Zero | EntryRef::Unreadable => None,
    }
}

/// Returns the content of a batch, bytes.
fn content_len(batch: &[Piece]) -> u64 {
    batch.iter().filter(|piece| chunk_of(piece).is_some()).map(|piece| piece.range.len()).sum()
}

fn cannot_read(batch: &[Piece]) -> String {
    let ends = batch.first().zip(batch.last());
    let span = ends.and_then(|(first, last)| ByteRange::between(first.range.start(), last.range.end()));
    span.map_or_else(String::new, |span| format!("bytes {span} cannot be read"))
}

impl<'a, 'r> Scattered<'a, 'r> {
    pub fn new(reader: &'a ChunkReader<'r>, monitor: &'a dyn Monitor, limits: Limits) -> Self {
        Self {
            reader,
            monitor,
            limits,
            batches: Vec::new(),
            frames: HashMap::new(),
            content_len: 0,
            pieces: 0,
            between: 0,
        }
    }

    /// Takes a batch if it is to be gathered with others.
    ///
    /// # Errors
    /// Those of [`ChunkReader::good_places`].
    pub fn take(&mut self, batch: &mut Vec<Piece>) -> Result<bool> {
        let len = content_len(batch);
        if self.is_scattered(batch).context(|| cannot_read(batch))? {
            self.between = 0;
        } else if self.batches.is_empty() || self.between + len > MAX_BETWEEN {
            return Ok(false);
        } else {
            self.between += len;
        }
        self.look_up(batch).context(|| cannot_read(batch))?;
        self.pieces += batch.len();
        self.batches.push(std::mem::take(batch));
        Ok(true)
    }

    fn is_scattered(&self, batch: &[Piece]) -> Result<bool> {
        let ids: Vec<ChunkId> = batch.iter().filter_map(chunk_of).collect();
        let is_long = |count: u64| content_len(batch) > self.limits.piece_len.saturating_mul(count);
        if ids.is_empty() || is_long(ids.len() as u64) {
            return Ok(false);
        }
        let sample: Vec<ChunkId> = ids.iter().copied().step_by(SAMPLED).collect();
        let (count, len) = self.frames_of(&sample)?;
        if len >= self.limits.frames_len {
            return Ok(true);
        }
        // where most stand in frames of their own, what was left out does too
        let may_be_more = count > sample.len() / 2 && len * SAMPLED as u64 >= self.limits.frames_len;
        Ok(may_be_more && self.frames_of(&ids)?.1 >= self.limits.frames_len)
    }

    /// Returns in how many frames chunks stand, and the plaintext of those, bytes.
    fn frames_of(&self, ids: &[ChunkId]) -> Result<(usize, u64)> {
        let places = self.reader.good_places(ids)?;
        let frames: HashMap<FrameKey, u64> =
            places.iter().flatten().map(|place| (frame_of(place), u64::from(place.frame.raw_len))).collect();
        Ok((frames.len(), frames.values().sum()))
    }

    fn look_up(&mut self, batch: &mut [Piece]) -> Result<()> {
        let ids: Vec<ChunkId> = batch.iter().filter_map(chunk_of).collect();
        let places = in_parts(&ids, |part| self.reader.good_places(part))?;
        let pieces = batch.iter_mut().filter(|piece| chunk_of(piece).is_some());
        for (piece, place) in pieces.zip(places) {
            piece.place = place;
            let Some(place) = place else { continue };
            let range = piece.range;
            let new = Use { start: range.start(), end: range.start(), len: 0 };
            let frame = self.frames.entry(frame_of(&place)).or_insert(new);
            let before = *frame;
            *frame = Use { end: before.end.max(range.end()), len: before.len + range.len(), ..before };
            self.content_len -= before.ahead_len(self.limits.spread);
            self.content_len += frame.ahead_len(self.limits.spread);
        }
        Ok(())
    }

    /// Returns true if it is time to read.
    pub fn is_full(&self) -> bool {
        self.content_len >= self.limits.content_len || self.pieces >= self.limits.pieces
    }

    /// Reads ahead, on all cores, and returns what was gathered. At the first failure reading ahead ends: the rest is left to
    /// those who take it up, and they meet the failure too.
    ///
    /// # Errors
    /// [`crate::error::Error::Cancelled`].
    pub fn read(&mut self) -> Result<Vec<Vec<Piece>>> {
        let mut batches = std::mem::take(&mut self.batches);
        if batches.is_empty() {
            return Ok(batches);
        }
        // one batch can make many frames scattered at once
        let mut room = self.limits.content_len;
        let mut ahead: Vec<Vec<Ahead>> =
            batches.iter().map(|batch| self.ahead_of(batch, &mut room)).collect();
        let len = |pieces: &Vec<Ahead>| pieces.iter().map(Ahead::len).sum();
        let mut memory: Vec<Vec<u8>> = ahead.iter().map(|pieces| vec![0; len(pieces)]).collect();
        let mut wanted = Vec::new();
        for (pieces, room) in ahead.iter_mut().zip(&mut memory) {
            let mut room = room.as_mut_slice();
            for piece in pieces {
                let (own, behind) = std::mem::take(&mut room).split_at_mut(piece.len());
                room = behind;
                wanted.push((piece, own));
            }
        }
        self.read_wanted(wanted)?;
        (self.content_len, self.pieces, self.between) = (0, 0, 0);
        self.frames.clear();
        for ((batch, pieces), memory) in batches.iter_mut().zip(ahead).zip(memory) {
            give(batch, &pieces, memory);
        }
        Ok(batches)
    }

    /// Returns the pieces of a batch that are to be read ahead, as long as there is room for them; bytes.
    fn ahead_of(&self, batch: &[Piece], room: &mut u64) -> Vec<Ahead> {
        let mut ahead = Vec::new();
        for (at, piece) in batch.iter().enumerate() {
            let (EntryRef::Chunk { id, offset }, Some(place)) = (piece.entry, piece.place) else { continue };
            let frame = self.frames.get(&frame_of(&place));
            let is_wanted = frame.is_some_and(|frame| frame.ahead_len(self.limits.spread) > 0);
            if is_wanted && let Some(left) = room.checked_sub(piece.range.len()) {
                *room = left;
                let (range, offset) = (piece.range, offset as usize);
                ahead.push(Ahead { at, range, id, offset, place, is_read: false });
            }
        }
        ahead
    }

    fn read_wanted(&self, mut wanted: Vec<(&mut Ahead, &mut [u8])>) -> Result<()> {
        wanted.sort_unstable_by_key(|(piece, _)| (frame_of(&piece.place), piece.place.offset));
        let frames: Vec<_> =
            wanted.chunk_by_mut(|(a, _), (b, _)| frame_of(&a.place) == frame_of(&b.place)).collect();
        let has_failed = AtomicBool::new(false);
        frames.into_par_iter().try_for_each(|pieces| {
            for (piece, room) in pieces {
                self.monitor.check()?;
                if has_failed.load(Ordering::Relaxed) {
                    break;
                }
                let chunk = self.reader.read_at(ChunkKind::Data, piece.id, &[piece.place]);
                if let Ok(bytes) = part_of(chunk, piece.range, piece.id, piece.offset) {
                    room.copy_from_slice(&bytes);
                    piece.is_read = true;
                } else {
                    // a disk that does not answer takes its time for each try
                    has_failed.store(true, Ordering::Relaxed);
                }
            }
            Ok(())
        })
    }
}

/// Gives a batch what was read of it: it stands in `memory`, one piece behind the other.
fn give(batch: &mut [Piece], pieces: &[Ahead], memory: Vec<u8>) {
    let memory = ChunkBytes::of(memory);
    let mut position = 0;
    for ahead in pieces {
        if let (true, Some(piece)) = (ahead.is_read, batch.get_mut(ahead.at)) {
            piece.content = memory.part(position, ahead.len());
        }
        position += ahead.len();
    }
}

//! Reading what is scattered: content that was written to again and again, a little each time, stands in a frame of each of
//! those times. Read in the order of the disk, each of these frames would be opened over and over. So much of the disk is
//! gathered here, and read in the order of the frames.

use std::collections::HashMap;
use std::ops::Range;

use rayon::iter::{IntoParallelIterator, ParallelIterator};

use super::{DiskBytes, OnDamage, Piece, part_of};
use crate::error::Result;
use crate::extent::ByteRange;
use crate::format::node::ChunkKind;
use crate::id::{ChunkId, PackId};
use crate::index::Location;
use crate::manifest::EntryRef;
use crate::monitor::Monitor;
use crate::repo::reader::{ChunkBytes, ChunkReader, in_parts};

/// When content counts as scattered, and how much of it is read together.
#[derive(Debug, Clone, Copy)]
pub(in crate::ops) struct Limits {
    /// Pieces of a batch that are longer than this on average are not scattered, bytes.
    pub piece_len: u64,
    /// Plaintext of the frames in which a batch stands, bytes: from here on they would not stay in a reader's cache beside
    /// those of the other batches that are read meanwhile.
    pub frames_len: u64,
    /// Content that is read together, bytes: it is in memory until it is written.
    pub content_len: u64,
    /// Pieces that are read together, at most; about 300 bytes each.
    pub pieces: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { piece_len: 12 << 10, frames_len: 20 << 20, content_len: 128 << 20, pieces: 64 << 10 }
    }
}

#[cfg(test)]
impl Limits {
    /// By these all content is scattered, and little of it is read together.
    pub const TIGHT: Self = Self { piece_len: u64::MAX, frames_len: 0, content_len: 200 << 10, pieces: 40 };
}

/// Of so many pieces one is looked up to see in how many frames a batch stands.
const SAMPLED: usize = 8;

/// Batches that are read together.
pub(super) struct Scattered<'a, 'r> {
    reader: &'a ChunkReader<'r>,
    on_damage: OnDamage,
    monitor: &'a dyn Monitor,
    limits: Limits,
    batches: Vec<Vec<Piece>>,
    content_len: u64,
    pieces: usize,
    /// Turned each time: the frames that were read last are then the first ones, and still in the reader's cache.
    is_backwards: bool,
}

/// A batch that was read.
#[derive(Default)]
pub(super) struct ReadBatch {
    /// In the order of the disk; pieces that meet are one.
    pub contents: Vec<DiskBytes>,
    /// What reads as zero by the map, or is lost.
    pub zeroes: Vec<ByteRange>,
    pub lost: Vec<ByteRange>,
    /// Bytes of the disk.
    pub len: u64,
}

/// A piece on its way into memory.
struct Wanted<'b> {
    range: ByteRange,
    id: ChunkId,
    /// Where in the chunk it begins, bytes.
    offset: usize,
    place: Option<Location>,
    room: &'b mut [u8],
    is_lost: &'b mut bool,
}

impl Wanted<'_> {
    fn frame(&self) -> Option<(PackId, u32)> {
        self.place.map(|place| frame_of(&place))
    }
}

fn frame_of(place: &Location) -> (PackId, u32) {
    (place.pack, place.frame.offset)
}

/// Returns the chunk that a piece is of.
fn chunk_of((_, entry): &Piece) -> Option<ChunkId> {
    match entry {
        EntryRef::Chunk { id, .. } => Some(*id),
        EntryRef::Zero | EntryRef::Unreadable => None,
    }
}

/// Returns the content of a batch, bytes.
fn content_len(batch: &[Piece]) -> u64 {
    batch.iter().filter(|piece| chunk_of(piece).is_some()).map(|(range, _)| range.len()).sum()
}

impl<'a, 'r> Scattered<'a, 'r> {
    pub fn new(
        reader: &'a ChunkReader<'r>,
        on_damage: OnDamage,
        monitor: &'a dyn Monitor,
        limits: Limits,
    ) -> Self {
        let batches = Vec::new();
        Self { reader, on_damage, monitor, limits, batches, content_len: 0, pieces: 0, is_backwards: false }
    }

    /// Returns true if a batch is to be read together with others.
    ///
    /// # Errors
    /// Those of [`ChunkReader::good_places`].
    pub fn wants(&self, batch: &[Piece]) -> Result<bool> {
        // what follows is taken in any case: sinks expect the order of the disk, but for what is read at once
        if !self.batches.is_empty() {
            return Ok(true);
        }
        let ids: Vec<ChunkId> = batch.iter().filter_map(chunk_of).collect();
        let is_long = |count: u64| content_len(batch) > self.limits.piece_len.saturating_mul(count);
        if ids.is_empty() || is_long(ids.len() as u64) {
            return Ok(false);
        }
        let sample: Vec<ChunkId> = ids.into_iter().step_by(SAMPLED).collect();
        let places = self.reader.good_places(&sample)?;
        let frames: HashMap<(PackId, u32), u64> =
            places.iter().flatten().map(|place| (frame_of(place), u64::from(place.frame.raw_len))).collect();
        Ok(frames.values().sum::<u64>() >= self.limits.frames_len)
    }

    pub fn push(&mut self, batch: Vec<Piece>) {
        self.content_len += content_len(&batch);
        self.pieces += batch.len();
        self.batches.push(batch);
    }

    /// Returns true if it is time to read.
    pub fn is_full(&self) -> bool {
        self.content_len >= self.limits.content_len || self.pieces >= self.limits.pieces
    }

    /// Reads what was pushed, on all cores, in the order of the frames. Returns it in the order of the disk.
    ///
    /// # Errors
    /// Those of the repository; damage, if that is not to be given as zeroes.
    pub fn read(&mut self) -> Result<Vec<ReadBatch>> {
        (self.content_len, self.pieces) = (0, 0);
        let batches = std::mem::take(&mut self.batches);
        let ids: Vec<ChunkId> = batches.iter().flatten().filter_map(chunk_of).collect();
        let places = in_parts(&ids, |part| self.reader.good_places(part))?;
        let len = |batch: &Vec<Piece>| usize::try_from(content_len(batch)).unwrap_or(usize::MAX);
        let mut memory: Vec<Vec<u8>> = batches.iter().map(|batch| vec![0; len(batch)]).collect();
        let mut losses: Vec<Vec<bool>> = batches.iter().map(|batch| vec![false; batch.len()]).collect();
        let mut wanted = Vec::with_capacity(ids.len());
        let mut places = places.into_iter();
        for ((batch, room), lost) in batches.iter().zip(&mut memory).zip(&mut losses) {
            let mut room = room.as_mut_slice();
            for ((range, entry), is_lost) in batch.iter().zip(lost) {
                let EntryRef::Chunk { id, offset } = *entry else { continue };
                let len = usize::try_from(range.len()).unwrap_or(usize::MAX).min(room.len());
                let (own, behind) = std::mem::take(&mut room).split_at_mut(len);
                room = behind;
                let place = places.next().flatten();
                let (range, offset) = (*range, offset as usize);
                wanted.push(Wanted { range, id, offset, place, room: own, is_lost });
            }
        }
        self.read_wanted(wanted)?;
        let read = batches.into_iter().zip(memory).zip(losses);
        Ok(read.map(|((batch, memory), lost)| ReadBatch::new(&batch, memory, &lost)).collect())
    }

    fn read_wanted(&mut self, mut wanted: Vec<Wanted<'_>>) -> Result<()> {
        wanted.sort_unstable_by_key(|piece| (piece.frame(), piece.place.map(|place| place.offset)));
        let mut frames: Vec<&mut [Wanted<'_>]> = wanted.chunk_by_mut(|a, b| a.frame() == b.frame()).collect();
        if self.is_backwards {
            frames.reverse();
        }
        self.is_backwards = !self.is_backwards;
        let this = &*self;
        frames.into_par_iter().try_for_each(|pieces| {
            this.monitor.check()?;
            pieces.iter_mut().try_for_each(|piece| this.read_piece(piece))
        })
    }

    fn read_piece(&self, piece: &mut Wanted<'_>) -> Result<()> {
        let chunk = self.reader.read_at(ChunkKind::Data, piece.id, piece.place.as_slice());
        match part_of(chunk, piece.range, piece.id, piece.offset) {
            Ok(bytes) => piece.room.copy_from_slice(&bytes),
            Err(error) => {
                self.on_damage.tolerate(error)?;
                *piece.is_lost = true;
            }
        }
        Ok(())
    }
}

impl ReadBatch {
    /// Makes one of pieces whose content stands in `memory`, one behind the other, but for those that have none.
    fn new(pieces: &[Piece], memory: Vec<u8>, is_lost: &[bool]) -> Self {
        let memory = ChunkBytes::of(memory);
        let mut read = Self::default();
        // what of the memory was not yet given out: on the disk it begins at the offset
        let (mut offset, mut held) = (0, 0..0);
        for (piece, is_lost) in pieces.iter().zip(is_lost) {
            let (range, entry) = *piece;
            read.len += range.len();
            let len = chunk_of(piece).map_or(0, |_| usize::try_from(range.len()).unwrap_or(usize::MAX));
            let is_content = len > 0 && !is_lost;
            if !is_content || offset + held.len() as u64 != range.start() {
                read.give(&memory, offset, held.clone());
                (offset, held) = (range.start(), held.end..held.end);
            }
            if is_content {
                held.end += len;
                continue;
            }
            held = held.end + len..held.end + len;
            if entry == EntryRef::Zero { read.zeroes.push(range) } else { read.lost.push(range) }
        }
        read.give(&memory, offset, held);
        read
    }

    fn give(&mut self, memory: &ChunkBytes, offset: u64, held: Range<usize>) {
        let bytes = memory.part(held.start, held.len()).filter(|bytes| !bytes.is_empty());
        self.contents.extend(bytes.map(|bytes| DiskBytes { offset, bytes }));
    }
}

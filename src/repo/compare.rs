//! One leaf's range: what differs from the predecessor, cut into chunks.
//!
//! A dirty extent is 64 KiB because the bitmap is; what a database wrote of it is 4 or 8. So everything is
//! compared in blocks of 4 KiB with what the predecessor says is there, and only runs of blocks that
//! differ are cut. An unchanged range keeps the predecessor's entries, whatever they look like.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ops::Range;

use super::reader::{ChunkBytes, ChunkReader};
use crate::buffer::Payload;
use crate::chunk::{Cutter, IdHasher};
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::limits::BLOCK_LEN;
use crate::format::node::{ChunkKind, LeafEntry};
use crate::id::{ChunkId, PackId};
use crate::index::Location;

/// A run of zeroes inside changed data becomes an entry of its own from this length on; a shorter one
/// compresses to nothing and would only cut the chunk around it in two. Bytes.
const MIN_ZERO_RUN: usize = 16 << 10;

/// What was read of one leaf's range.
#[derive(Debug)]
pub(super) struct LeafWork {
    pub sequence: u64,
    pub leaf: u64,
    /// The leaf's range of the disk.
    pub range: ByteRange,
    /// In order, apart, inside the range, at block boundaries (but for the disk's end).
    pub pieces: Vec<(ByteRange, Payload)>,
}

/// A chunk of a changed run.
#[derive(Debug)]
pub(super) struct NewChunk {
    pub id: ChunkId,
    /// Which piece of the work, and where in it.
    pub piece: usize,
    pub range: Range<usize>,
    /// The older pack that has it.
    pub known: Option<PackId>,
}

/// What became of one leaf.
#[derive(Debug)]
pub(super) struct LeafResult {
    pub work: LeafWork,
    /// `None`: as in the predecessor.
    pub entries: Option<Vec<LeafEntry>>,
    pub chunks: Vec<NewChunk>,
    /// Ranges that differ from the predecessor.
    pub changed: Vec<ByteRange>,
}

/// A changed range of the leaf and its new entries.
struct Replacement {
    /// Relative to the leaf.
    range: Range<u64>,
    entries: Vec<LeafEntry>,
}

/// A chunk that an entry of the predecessor names.
struct OldChunk {
    /// Of the entry, relative to the leaf.
    range: Range<u64>,
    offset: u32,
    id: ChunkId,
    /// Where it can be read; `None`: it is lost.
    place: Option<Location>,
}

impl OldChunk {
    fn is_lost(&self) -> bool {
        self.place.is_none()
    }
}

/// A part of a changed run.
struct Part {
    /// Relative to the leaf.
    range: Range<u64>,
    /// The lost chunk that it is, if it is one.
    whole: Option<ChunkId>,
}

/// A leaf whose entries have fewer bytes on average is in pieces. Cutting makes no chunks so short, but at zeroes.
const RECUT_LEN: u64 = 8 << 10;

/// What the comparison works with.
pub(super) struct Comparer<'a> {
    pub reader: &'a ChunkReader<'a>,
    pub hasher: &'a IdHasher,
    pub cutter: &'a Cutter,
    /// Leaves with more entries than cutting makes are cut anew.
    pub recut: bool,
    /// The frame, by pack and first byte, that was read last: the next chunk of the predecessor mostly stands in it.
    pub last: Cell<Option<(PackId, u32)>>,
    /// Chunks of this leaf's predecessor that were not checked, since nothing of them was where it should be.
    pub unchecked: RefCell<HashMap<ChunkId, Location>>,
}

impl Comparer<'_> {
    /// Compares a leaf's work with the predecessor's entries (`None`: all zero).
    ///
    /// # Errors
    /// A failed look-up. Content of the predecessor that cannot be read counts as changed.
    pub(super) fn compare(&self, work: LeafWork, old: Option<&[LeafEntry]>) -> Result<LeafResult> {
        let old = old.unwrap_or_default();
        let known = self.old_chunks(old, &work)?;
        let mut replacements = Vec::new();
        let mut chunks = Vec::new();
        let mut changed = Vec::new();
        let recut = self.recut && old.len() as u64 > work.range.len() / RECUT_LEN;
        for (number, (range, payload)) in work.pieces.iter().enumerate() {
            let base = range.start() - work.range.start();
            let runs = match payload {
                Payload::Zero => nonzero_ranges(old, base..base + range.len()),
                Payload::Data(bytes) => self.changed_runs(old, &known, base, bytes),
            };
            changed.extend(runs.iter().filter_map(|run| {
                ByteRange::between(work.range.start() + run.start, work.range.start() + run.end)
            }));
            let whole = base..base + range.len();
            for run in if recut { vec![whole] } else { runs } {
                match payload {
                    Payload::Zero => replacements.push(zero_replacement(run)),
                    Payload::Data(bytes) => {
                        for part in self.split_at_lost(run, &known, base, bytes) {
                            self.replace_run(part, base, number, bytes, &mut replacements, &mut chunks);
                        }
                    }
                }
            }
        }
        self.check_what_comes_again(&chunks);
        if replacements.is_empty() {
            return Ok(LeafResult { work, entries: None, chunks, changed });
        }
        let ids: Vec<ChunkId> = chunks.iter().map(|chunk| chunk.id).collect();
        for (chunk, known) in chunks.iter_mut().zip(self.reader.known(ChunkKind::Data, &ids)?) {
            chunk.known = known;
        }
        let entries = splice(old, work.range.len(), replacements);
        Ok(LeafResult { work, entries: Some(entries), chunks, changed })
    }

    /// Checks the predecessor's chunks that were taken for changed as a whole, and are among the new ones all the same: what is
    /// stored of them is damaged, or elsewhere, and must not be relied on.
    fn check_what_comes_again(&self, chunks: &[NewChunk]) {
        let unchecked = self.unchecked.take();
        for (id, place) in chunks.iter().filter_map(|chunk| unchecked.get_key_value(&chunk.id)) {
            // the reader remembers which places are bad
            let _ = self.reader.read_at(ChunkKind::Data, *id, std::slice::from_ref(place));
        }
    }

    /// Returns the runs of blocks of a piece that differ from the predecessor, relative to the leaf.
    /// `base` is the piece's position in the leaf.
    fn changed_runs(
        &self,
        old: &[LeafEntry],
        known: &[OldChunk],
        base: u64,
        bytes: &[u8],
    ) -> Vec<Range<u64>> {
        let mut marks = Blocks::new(base, bytes.len());
        let end = base + bytes.len() as u64;
        let mut known = known.iter().peekable();
        for (range, entry) in with_ranges(old) {
            let common = range.start.max(base)..range.end.min(end);
            if common.start >= common.end {
                continue;
            }
            let Some(new) = slice(bytes, common.start - base, common.end - base) else { continue };
            match entry {
                LeafEntry::Zero { .. } => marks.mark_nonzero(new, common.start),
                LeafEntry::Unreadable { .. } => marks.mark(common),
                LeafEntry::Chunk { .. } => {
                    while known.next_if(|chunk| chunk.range.start < range.start).is_some() {}
                    match known.peek().filter(|chunk| chunk.range == range && !chunk.is_lost()) {
                        Some(chunk) => self.mark_against_chunk(chunk, new, common, &mut marks),
                        None => marks.mark(common),
                    }
                }
            }
        }
        // beyond the predecessor's end (a grown disk) everything was zero
        let position = old.iter().map(|entry| u64::from(entry.len())).sum::<u64>();
        let tail = position.max(base);
        if let Some(new) = tail.checked_sub(base).and_then(|from| slice(bytes, from, bytes.len() as u64)) {
            marks.mark_nonzero(new, tail);
        }
        marks.runs(end)
    }

    /// Returns the chunks that the predecessor has where data was read, in order: all looked up at once.
    fn old_chunks(&self, old: &[LeafEntry], work: &LeafWork) -> Result<Vec<OldChunk>> {
        let mut pieces =
            work.pieces.iter().filter(|(_, payload)| matches!(payload, Payload::Data(_))).peekable();
        let mut chunks = Vec::new();
        for (range, entry) in with_ranges(old) {
            let (start, end) = (work.range.start() + range.start, work.range.start() + range.end);
            while pieces.next_if(|(piece, _)| piece.end() <= start).is_some() {}
            let is_read = pieces.peek().is_some_and(|(piece, _)| piece.start() < end);
            if let (true, LeafEntry::Chunk { offset, id, .. }) = (is_read, entry) {
                chunks.push(OldChunk { range, offset: *offset, id: *id, place: None });
            }
        }
        let ids: Vec<ChunkId> = chunks.iter().map(|chunk| chunk.id).collect();
        for (chunk, place) in chunks.iter_mut().zip(self.reader.good_places(&ids)?) {
            chunk.place = place;
        }
        Ok(chunks)
    }

    /// Splits a changed run where a lost chunk began and ended whose content it has: cut there, it becomes the
    /// same chunk, and heals the points that name it.
    fn split_at_lost(&self, run: Range<u64>, known: &[OldChunk], base: u64, bytes: &[u8]) -> Vec<Part> {
        let mut parts = Vec::new();
        let mut position = run.start;
        for entry in known.iter().filter(|chunk| chunk.is_lost()) {
            let Range { start, end } = entry.range;
            if entry.offset != 0 || start < position || end > run.end {
                continue;
            }
            let heals = slice(bytes, start - base, end - base)
                .is_some_and(|content| self.hasher.chunk_id(ChunkKind::Data, content) == entry.id);
            if heals {
                parts.push(Part { range: position..start, whole: None });
                parts.push(Part { range: start..end, whole: Some(entry.id) });
                position = end;
            }
        }
        parts.push(Part { range: position..run.end, whole: None });
        parts.retain(|part| part.range.start < part.range.end);
        parts
    }

    /// Marks the blocks of `new`, which is what was read of the chunk's entry at `at`, that differ from the chunk.
    fn mark_against_chunk(&self, chunk: &OldChunk, new: &[u8], at: Range<u64>, marks: &mut Blocks) {
        let id = chunk.id;
        let frame = chunk.place.map(|place| (place.pack, place.frame.offset));
        // a chunk that is still there as a whole need not be read from the repository
        let is_whole = at == chunk.range && chunk.offset == 0;
        // where a chunk of its frame differed the frame is at hand: what else stands there is compared as it is, since hashing
        // the new content tells less and takes as long as checking the old
        let is_at_hand = frame.is_some() && self.last.get() == frame;
        if is_whole && !is_at_hand && self.hasher.chunk_id(ChunkKind::Data, new) == id {
            return;
        }
        let skip = u64::from(chunk.offset) + (at.start - chunk.range.start);
        let found = chunk.place.and_then(|place| self.reader.peek(&place).ok());
        self.last.set(frame.filter(|_| found.is_some()));
        let old = found.as_ref().and_then(|found| slice(found, skip, skip + new.len() as u64));
        if old.is_some_and(|old| marks.all_differ(old, new, at.start)) {
            // nothing of it is kept, so it need not be checked; what is damaged may differ as well, and come again
            self.unchecked.borrow_mut().extend(chunk.place.map(|place| (id, place)));
            return marks.mark(at);
        }
        let is_sound = |found: &ChunkBytes| self.reader.is_chunk(ChunkKind::Data, id, found);
        let found = found.filter(is_sound);
        let found = found.or_else(|| self.reader.read_at(ChunkKind::Data, id, chunk.place.as_slice()).ok());
        match found.as_ref().and_then(|found| slice(found, skip, skip + new.len() as u64)) {
            Some(old) => marks.mark_differing(old, new, at.start),
            None => marks.mark(at),
        }
    }

    /// Splits a changed run of a data piece at its zeroes and cuts the rest.
    fn replace_run(
        &self,
        part: Part,
        base: u64,
        piece: usize,
        bytes: &[u8],
        replacements: &mut Vec<Replacement>,
        chunks: &mut Vec<NewChunk>,
    ) {
        let run = part.range;
        if let Some(id) = part.whole {
            let range = to_usize(run.start - base)..to_usize(run.end - base);
            let entries = vec![LeafEntry::Chunk { len: to_u32(run.end - run.start), offset: 0, id }];
            chunks.push(NewChunk { id, piece, range, known: None });
            replacements.push(Replacement { range: run, entries });
            return;
        }
        let Some(content) = slice(bytes, run.start - base, run.end - base) else { return };
        for (range, zero) in split_zero_runs(content) {
            let start = run.start + range.start as u64;
            let end = run.start + range.end as u64;
            if zero {
                replacements.push(zero_replacement(start..end));
                continue;
            }
            let mut entries = Vec::new();
            let mut position = start;
            let Some(data) = content.get(range) else { continue };
            for len in self.cutter.cut(data) {
                let Some(plain) = slice(bytes, position - base, position - base + len as u64) else {
                    continue;
                };
                let id = self.hasher.chunk_id(ChunkKind::Data, plain);
                let from = to_usize(position - base);
                chunks.push(NewChunk { id, piece, range: from..from + len, known: None });
                entries.push(LeafEntry::Chunk { len: to_u32(len as u64), offset: 0, id });
                position += len as u64;
            }
            replacements.push(Replacement { range: start..end, entries });
        }
    }
}

/// Returns entries with their ranges, relative to the leaf.
fn with_ranges(entries: &[LeafEntry]) -> impl Iterator<Item = (Range<u64>, &LeafEntry)> {
    entries.iter().scan(0, |position: &mut u64, entry| {
        let start = *position;
        *position += u64::from(entry.len());
        Some((start..*position, entry))
    })
}

/// Positions inside a leaf fit: a leaf has at most 64 MiB.
fn to_u32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

fn slice(bytes: &[u8], start: u64, end: u64) -> Option<&[u8]> {
    bytes.get(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
}

fn zero_replacement(range: Range<u64>) -> Replacement {
    let entries = vec![LeafEntry::Zero { len: to_u32(range.end - range.start) }];
    Replacement { range, entries }
}

/// Returns the parts of `within` that the entries do not say to be zero.
fn nonzero_ranges(old: &[LeafEntry], within: Range<u64>) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let mut position = 0;
    for entry in old {
        let start = position;
        position += u64::from(entry.len());
        let common = start.max(within.start)..position.min(within.end);
        if common.start >= common.end || matches!(entry, LeafEntry::Zero { .. }) {
            continue;
        }
        match ranges.last_mut() {
            Some(last) if last.end == common.start => last.end = common.end,
            _ => ranges.push(common),
        }
    }
    ranges
}

/// Which blocks of a piece differ.
struct Blocks {
    base: u64,
    changed: Vec<bool>,
}

impl Blocks {
    fn new(base: u64, len: usize) -> Self {
        let count = (len as u64).div_ceil(BLOCK_LEN);
        Self { base, changed: vec![false; to_usize(count)] }
    }

    /// Marks every block that the range touches.
    fn mark(&mut self, range: Range<u64>) {
        let first = to_usize((range.start - self.base) / BLOCK_LEN);
        let last = to_usize((range.end - self.base).div_ceil(BLOCK_LEN));
        for block in self.changed.iter_mut().take(last).skip(first) {
            *block = true;
        }
    }

    /// Returns the parts of `len` bytes at `start` that lie within one block each.
    fn parts(&self, start: u64, len: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let (base, mut done) = (self.base, 0_usize);
        std::iter::from_fn(move || {
            let to_boundary = BLOCK_LEN - (start + done as u64 - base) % BLOCK_LEN;
            let part = done..len.min(done.saturating_add(to_usize(to_boundary)));
            done = part.end;
            (!part.is_empty()).then_some(part)
        })
    }

    /// Marks the blocks of `len` bytes at `start` of which `differs` says so.
    fn mark_if(&mut self, start: u64, len: usize, differs: impl Fn(Range<usize>) -> bool) {
        for part in self.parts(start, len) {
            let range = start + part.start as u64..start + part.end as u64;
            if differs(part) {
                self.mark(range);
            }
        }
    }

    /// Returns true if none of the blocks of `new`, which is at `start`, is as it was.
    fn all_differ(&self, old: &[u8], new: &[u8], start: u64) -> bool {
        self.parts(start, new.len()).all(|part| old.get(part.clone()) != new.get(part))
    }

    fn mark_nonzero(&mut self, new: &[u8], start: u64) {
        self.mark_if(start, new.len(), |part| new.get(part).is_some_and(|part| !is_zero(part)));
    }

    fn mark_differing(&mut self, old: &[u8], new: &[u8], start: u64) {
        self.mark_if(start, new.len(), |part| old.get(part.clone()) != new.get(part));
    }

    /// Returns the runs of marked blocks, relative to the leaf, ending at `end` at most.
    fn runs(&self, end: u64) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (number, _) in self.changed.iter().enumerate().filter(|(_, changed)| **changed) {
            let start = self.base + number as u64 * BLOCK_LEN;
            let stop = end.min(start + BLOCK_LEN);
            match runs.last_mut() {
                Some(last) if last.end == start => last.end = stop,
                _ => runs.push(start..stop),
            }
        }
        runs
    }
}

/// Returns true if every byte is zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<32>();
    // 32 bytes at a time: the compiler makes one vector comparison of it
    words.iter().all(|word| word == &[0; 32]) && rest.iter().all(|byte| *byte == 0)
}

/// Splits at zeroes: at both ends whole blocks of them, inside runs from [`MIN_ZERO_RUN`] on.
/// Returns ranges that cover `content` and whether each is zero.
fn split_zero_runs(content: &[u8]) -> Vec<(Range<usize>, bool)> {
    let block = to_usize(BLOCK_LEN);
    let mut parts: Vec<(Range<usize>, bool)> = Vec::new();
    for (number, bytes) in content.chunks(block).enumerate() {
        let start = number * block;
        let (range, zero) = (start..start + bytes.len(), is_zero(bytes));
        match parts.last_mut() {
            Some((last, kind)) if *kind == zero => last.end = range.end,
            _ => parts.push((range, zero)),
        }
    }
    let mut joined: Vec<(Range<usize>, bool)> = Vec::new();
    for (range, zero) in parts {
        let at_end = range.start == 0 || range.end == content.len();
        let apart = zero && (at_end || range.len() >= MIN_ZERO_RUN);
        match joined.last_mut() {
            Some((last, false)) if !apart => last.end = range.end,
            _ => joined.push((range, apart)),
        }
    }
    joined
}

/// Returns the old entries of a leaf of `len` bytes with the replaced ranges put in their place.
fn splice(old: &[LeafEntry], len: u64, replacements: Vec<Replacement>) -> Vec<LeafEntry> {
    let mut entries = Vec::with_capacity(old.len() + 2 * replacements.len());
    let mut position = 0;
    for replacement in replacements {
        copy_entries(old, position..replacement.range.start, &mut entries);
        entries.extend(replacement.entries);
        position = replacement.range.end;
    }
    copy_entries(old, position..len, &mut entries);
    entries
}

/// Copies what the entries say about a range; beyond their end everything is zero.
fn copy_entries(old: &[LeafEntry], wanted: Range<u64>, entries: &mut Vec<LeafEntry>) {
    let mut position = 0;
    for entry in old {
        let start = position;
        position += u64::from(entry.len());
        let common = start.max(wanted.start)..position.min(wanted.end);
        if common.start >= common.end {
            continue;
        }
        let len = to_u32(common.end - common.start);
        entries.push(match entry {
            LeafEntry::Zero { .. } => LeafEntry::Zero { len },
            LeafEntry::Unreadable { .. } => LeafEntry::Unreadable { len },
            LeafEntry::Chunk { offset, id, .. } => {
                LeafEntry::Chunk { len, offset: offset + to_u32(common.start - start), id: *id }
            }
        });
    }
    let rest = position.max(wanted.start)..wanted.end;
    if rest.start < rest.end {
        entries.push(LeafEntry::Zero { len: to_u32(rest.end - rest.start) });
    }
}

/// An error of a stage whose neighbour is gone: the neighbour's own error is the one that counts.
pub(super) fn neighbour_gone<T>(_: T) -> Error {
    Error::Cancelled
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(byte: u8) -> ChunkId {
        ChunkId::from_bytes([byte; 32])
    }

    #[test]
    fn short_zero_runs_stay_inside_and_long_ones_and_ends_split() {
        let mut content = vec![1u8; 64 << 10];
        content[..4096].fill(0);
        content[8192..12288].fill(0);
        content[32 << 10..48 << 10].fill(0);
        let parts = split_zero_runs(&content);
        assert_eq!(
            parts,
            vec![
                (0..4096, true),
                (4096..32 << 10, false),
                (32 << 10..48 << 10, true),
                (48 << 10..64 << 10, false)
            ]
        );
        assert_eq!(split_zero_runs(&[0; 4096]), vec![(0..4096, true)]);
    }

    #[test]
    fn splicing_keeps_what_is_around() {
        let old = [LeafEntry::Chunk { len: 32768, offset: 0, id: id(1) }];
        let new = vec![Replacement {
            range: 8192..12288,
            entries: vec![LeafEntry::Chunk { len: 4096, offset: 0, id: id(2) }],
        }];
        assert_eq!(
            splice(&old, 65536, new),
            vec![
                LeafEntry::Chunk { len: 8192, offset: 0, id: id(1) },
                LeafEntry::Chunk { len: 4096, offset: 0, id: id(2) },
                LeafEntry::Chunk { len: 20480, offset: 12288, id: id(1) },
                LeafEntry::Zero { len: 32768 },
            ]
        );
    }

    #[test]
    fn blocks_run_together_and_end_with_the_disk() {
        let mut blocks = Blocks::new(65536, 10000);
        blocks.mark(65536 + 4096..65536 + 10000);
        assert_eq!(blocks.runs(75536), vec![69632..75536]);
    }

    #[test]
    fn zero_is_seen_at_any_length() {
        for len in [0, 1, 31, 32, 33, 4096] {
            let mut bytes = vec![0u8; len];
            assert!(is_zero(&bytes));
            if let Some(last) = bytes.last_mut() {
                *last = 1;
                assert!(!is_zero(&bytes));
            }
        }
    }
}

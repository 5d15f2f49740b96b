//! Frames that were read: what stands in them, those that were read last, and their memory.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::Repository;
use crate::buffer::Buffer;
use crate::chunk::{IdHasher, Plaintext, frame_memory, open_frame_into};
use crate::error::{Error, FormatFault, Result};
use crate::format::limits::MAX_FRAME_RAW_LEN;
use crate::format::name::ObjectName;
use crate::format::node::ChunkKind;
use crate::format::pack::{FRAME_HEADER_LEN, FrameChunk, FrameEntry, frame_chunks};
use crate::id::{ChunkId, PackId};

/// Plaintext of frames that the readers of a repository keep together, bytes.
const FRAME_CACHE_LEN: usize = 40 << 20;
/// Of a reader that spares memory: enough for what is read in the order in which it was written.
const SMALL_FRAME_CACHE_LEN: usize = 8 << 20;

/// Memory of so many frames is kept for the next ones: as many as the cache has of the default length, and some that are in
/// use besides.
const MAX_SPARE_FRAMES: usize = 48;
/// Memory for frames, bytes: those of the default length fit in, with what stands around their chunks.
const SPARE_LEN: usize = (1 << 20) + (64 << 10);

/// Memory of frames that nobody has any more. It lives as long as the repository is open: what each of many sessions gives
/// back and takes anew stays with the allocator, in pieces that belong to threads that are gone.
#[derive(Debug, Default)]
pub(super) struct SpareFrames(Mutex<Vec<Vec<u8>>>);

impl SpareFrames {
    /// Returns the memory that one for `len` bytes takes.
    fn room(len: usize) -> usize {
        if (SPARE_LEN / 2..=SPARE_LEN).contains(&len) { SPARE_LEN } else { len }
    }

    /// Returns memory of `len` bytes that hold anything.
    fn take(&self, len: usize) -> Vec<u8> {
        let room = Self::room(len);
        let take = || self.0.lock().ok().and_then(|mut spare| spare.pop());
        let spare = if room == SPARE_LEN { take() } else { None };
        let mut memory = spare.unwrap_or_else(|| Vec::with_capacity(room));
        memory.resize(len, 0);
        memory
    }

    fn give(&self, memory: Vec<u8>) {
        if let Ok(mut spare) = self.0.lock()
            && spare.len() < MAX_SPARE_FRAMES
            && memory.capacity() == SPARE_LEN
        {
            spare.push(memory);
        }
    }
}

/// The plaintext of a frame.
#[derive(Debug)]
pub(super) struct Frame {
    memory: Vec<u8>,
    /// Where in `memory` the plaintext begins.
    front: usize,
    /// The list at its front, once somebody has asked what stands where; empty if it cannot be read. 12 bytes a chunk.
    chunks: OnceLock<Vec<FrameChunk>>,
    /// The chunks that are what they should be. Small writes leave pieces of one chunk apart from each other, and each piece is
    /// read for itself. 56 bytes a chunk.
    checked: Mutex<Vec<Checked>>,
    spare: Option<Arc<SpareFrames>>,
}

/// A chunk whose bytes were checked against its id: where it stands, what it is.
type Checked = (Range<usize>, ChunkKind, ChunkId);

/// Refuses impossible lengths: a hint says how long a frame is, and memory is taken for it.
fn check_lens(pack: ObjectName, entry: &FrameEntry) -> Result<()> {
    for (what, len) in [("a frame", entry.stored_len), ("a frame's plaintext", entry.raw_len)] {
        if len > MAX_FRAME_RAW_LEN {
            let (found, max) = (u64::from(len), u64::from(MAX_FRAME_RAW_LEN));
            return Err(Error::malformed(pack, FormatFault::TooLarge { what, found, max }));
        }
    }
    Ok(())
}

/// Reads a frame as it is stored. `before` is called first. What is read so is read once: no cache keeps it.
pub(super) fn read_stored(
    repository: &Repository,
    pack: PackId,
    entry: &FrameEntry,
    before: impl FnOnce(),
) -> Result<Buffer> {
    let name = ObjectName::Pack(pack);
    check_lens(name, entry)?;
    before();
    let mut bytes = frame_memory(FRAME_HEADER_LEN + entry.stored_len as usize);
    repository.storage().get_range_into(name, u64::from(entry.offset), &mut bytes)?;
    Ok(bytes)
}

impl Frame {
    fn new(memory: Vec<u8>, front: usize, spare: Option<Arc<SpareFrames>>) -> Self {
        Self { memory, front, chunks: OnceLock::new(), checked: Mutex::default(), spare }
    }

    fn read(repository: &Repository, pack: PackId, entry: &FrameEntry) -> Result<Self> {
        let name = ObjectName::Pack(pack);
        check_lens(name, entry)?;
        let spare = Arc::clone(&repository.share.spare_frames);
        let mut bytes = spare.take(FRAME_HEADER_LEN + entry.stored_len as usize);
        repository.storage().get_range_into(name, u64::from(entry.offset), &mut bytes)?;
        let mut plain = Vec::new();
        if entry.stored_len != entry.raw_len {
            plain = spare.take(entry.raw_len as usize);
        }
        let opened =
            open_frame_into(&bytes, entry, &mut plain).map_err(|fault| Error::malformed(name, fault))?;
        match opened {
            Plaintext::Stored(front) => Ok(Self::new(bytes, front, Some(spare))),
            Plaintext::Unpacked => {
                spare.give(bytes);
                Ok(Self::new(plain, 0, Some(spare)))
            }
        }
    }

    fn plain(&self) -> &[u8] {
        self.memory.get(self.front..).unwrap_or_default()
    }

    /// Returns the chunk that begins at byte `start` of the plaintext.
    fn chunk_at(&self, start: usize) -> Option<&FrameChunk> {
        let chunks = self.chunks.get_or_init(|| frame_chunks(self.plain()).unwrap_or_default());
        let at = chunks.binary_search_by_key(&start, |chunk| chunk.offset as usize).ok()?;
        chunks.get(at)
    }

    /// Returns true if the chunk stands there. Its bytes are hashed once.
    fn has(&self, hasher: &IdHasher, range: &Range<usize>, kind: ChunkKind, id: ChunkId) -> bool {
        let Some(bytes) = self.plain().get(range.clone()) else { return false };
        let wanted: Checked = (range.clone(), kind, id);
        let checked = || self.checked.lock().unwrap_or_else(PoisonError::into_inner);
        if checked().contains(&wanted) {
            return true;
        }
        let is_whole = hasher.chunk_id(kind, bytes) == id;
        if is_whole {
            checked().push(wanted);
        }
        is_whole
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        if let Some(spare) = &self.spare {
            spare.give(std::mem::take(&mut self.memory));
        }
    }
}

/// The bytes of a chunk, inside the frame that they came in.
#[derive(Debug, Clone)]
pub struct ChunkBytes {
    frame: Arc<Frame>,
    range: Range<usize>,
}

impl ChunkBytes {
    /// Bytes that stand alone.
    pub(crate) fn of(bytes: Vec<u8>) -> Self {
        Self { range: 0..bytes.len(), frame: Arc::new(Frame::new(bytes, 0, None)) }
    }

    /// Returns `len` bytes of a frame's plaintext from `start` on.
    ///
    /// # Errors
    /// [`FormatFault::Truncated`] if it has not so many.
    pub(super) fn within(frame: Arc<Frame>, start: usize, len: usize) -> Result<Self, FormatFault> {
        let range = start..start.saturating_add(len);
        let found = frame.plain().len();
        if range.end > found {
            return Err(FormatFault::Truncated { found: found as u64, needed: range.end as u64 });
        }
        Ok(Self { frame, range })
    }

    /// Returns true if these bytes are the chunk.
    pub(super) fn is_chunk(&self, hasher: &IdHasher, kind: ChunkKind, id: ChunkId) -> bool {
        self.frame.has(hasher, &self.range, kind, id)
    }

    /// Returns the chunk that stands behind this one in its frame if that is the wanted one, of `len` bytes.
    pub(super) fn chunk_behind(
        &self,
        hasher: &IdHasher,
        kind: ChunkKind,
        id: ChunkId,
        len: u32,
    ) -> Option<Self> {
        let start = self.range.end;
        // another chunk's length is mostly another one, which is cheaper to see than another hash
        self.frame.chunk_at(start).filter(|chunk| chunk.len == len && chunk.kind == kind)?;
        let range = start..start.checked_add(len as usize)?;
        let behind = Self { frame: Arc::clone(&self.frame), range };
        behind.is_chunk(hasher, kind, id).then_some(behind)
    }

    /// Returns `len` bytes of it from `start` on; `None` if it has not so many.
    pub fn part(&self, start: usize, len: usize) -> Option<Self> {
        let from = self.range.start.checked_add(start)?;
        let to = from.checked_add(len).filter(|to| *to <= self.range.end)?;
        Some(Self { frame: Arc::clone(&self.frame), range: from..to })
    }

    /// Returns it and `behind` as one, if that stands right behind it in the same frame.
    pub fn joined(&self, behind: &Self) -> Option<Self> {
        let meets = Arc::ptr_eq(&self.frame, &behind.frame) && self.range.end == behind.range.start;
        let range = self.range.start..behind.range.end;
        meets.then(|| Self { frame: Arc::clone(&self.frame), range })
    }

    /// Returns the memory that it keeps beside `other`, which shares a frame with it or not. Bytes.
    pub fn held_beside(&self, other: Option<&Self>) -> usize {
        match other {
            Some(other) if Arc::ptr_eq(&self.frame, &other.frame) => 0,
            _ => self.frame.plain().len(),
        }
    }
}

impl std::ops::Deref for ChunkBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.frame.plain().get(self.range.clone()).unwrap_or_default()
    }
}

/// A cache that drops what was used longest ago.
#[derive(Debug)]
pub(super) struct Recent<K, V> {
    entries: HashMap<K, (V, u64, usize)>,
    /// Keys by when they were used.
    ages: BTreeMap<u64, K>,
    clock: u64,
    weight: usize,
    limit: usize,
}

impl<K: std::hash::Hash + Eq + Copy, V: Clone> Recent<K, V> {
    pub(super) fn new(limit: usize) -> Self {
        Self { entries: HashMap::new(), ages: BTreeMap::new(), clock: 0, weight: 0, limit }
    }

    pub(super) fn get(&mut self, key: &K) -> Option<V> {
        self.clock += 1;
        let (value, used, _) = self.entries.get_mut(key)?;
        self.ages.remove(used);
        *used = self.clock;
        self.ages.insert(self.clock, *key);
        Some(value.clone())
    }

    /// Returns what had to make room.
    pub(super) fn put(&mut self, key: K, value: V, weight: usize) -> Vec<V> {
        self.clock += 1;
        let mut dropped = Vec::new();
        if let Some((old, used, weight)) = self.entries.insert(key, (value, self.clock, weight)) {
            self.ages.remove(&used);
            self.weight -= weight;
            dropped.push(old);
        }
        self.ages.insert(self.clock, key);
        self.weight += weight;
        while self.weight > self.limit
            && let Some((_, key)) = self.ages.pop_first()
        {
            if let Some((old, _, weight)) = self.entries.remove(&key) {
                self.weight -= weight;
                dropped.push(old);
            }
        }
        dropped
    }
}

/// A frame's plaintext, once somebody has read it: who else wants it waits for that and does not do the same work. Leaves
/// and batches of neighbouring workers mostly share a frame.
type Slot = Arc<Mutex<Option<Arc<Frame>>>>;
/// By pack and first byte of the frame.
type RecentFrames = Recent<(PackId, u32), Slot>;

/// The frames that were read last.
#[derive(Debug)]
pub(super) struct FrameCache {
    recent: Mutex<RecentFrames>,
}

impl FrameCache {
    /// Returns the one that the readers of now share. It is gone with the last of them, so that who begins to read then
    /// reads what is stored.
    pub(super) fn of(repository: &Repository) -> Arc<Self> {
        let mut shared = repository.share.frames.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let new = Arc::new(Self::new(FRAME_CACHE_LEN));
            *shared = Arc::downgrade(&new);
            new
        })
    }

    /// Returns one of somebody's own who spares memory.
    pub(super) fn small() -> Arc<Self> {
        Arc::new(Self::new(SMALL_FRAME_CACHE_LEN))
    }

    fn new(len: usize) -> Self {
        Self { recent: Mutex::new(Recent::new(len)) }
    }

    /// Returns a frame that was read lately, or reads it; `before` is called if it has to.
    pub(super) fn read(
        &self,
        repository: &Repository,
        pack: PackId,
        entry: &FrameEntry,
        before: impl FnOnce(),
    ) -> Result<Arc<Frame>> {
        let slot = self.slot(pack, entry);
        let mut place = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(frame) = place.as_ref() {
            return Ok(Arc::clone(frame));
        }
        before();
        let frame = Arc::new(Frame::read(repository, pack, entry)?);
        *place = Some(Arc::clone(&frame));
        Ok(frame)
    }

    /// Returns the place of a frame's plaintext in the cache.
    fn slot(&self, pack: PackId, entry: &FrameEntry) -> Slot {
        let key = (pack, entry.offset);
        let Ok(mut cache) = self.recent.lock() else { return Slot::default() };
        if let Some(slot) = cache.get(&key) {
            return slot;
        }
        let slot = Slot::default();
        let dropped = cache.put(key, Arc::clone(&slot), SpareFrames::room(entry.raw_len as usize));
        // what had to make room gives its memory back behind the lock
        drop(cache);
        drop(dropped);
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_frames_is_used_again_and_bounded() {
        let spare = SpareFrames::default();
        let mut memory = spare.take(1 << 20);
        assert_eq!((memory.len(), memory.capacity()), (1 << 20, SPARE_LEN));
        memory.fill(7);
        let place = memory.as_ptr();
        spare.give(memory);
        let again = spare.take(700 << 10);
        assert_eq!((again.as_ptr(), again.len()), (place, 700 << 10));
        spare.give(again);
        // longer than it was: all of it can be written to
        assert_eq!(spare.take(SPARE_LEN).len(), SPARE_LEN);
        for len in [0, 100, SPARE_LEN / 2 - 1, SPARE_LEN + 1] {
            let other = spare.take(len);
            assert_eq!((other.len(), other.capacity() < SPARE_LEN || len > SPARE_LEN), (len, true), "{len}");
            spare.give(other);
        }
        assert_eq!(spare.0.lock().unwrap().len(), 0, "of another length");
        for _ in 0..MAX_SPARE_FRAMES + 3 {
            spare.give(Vec::with_capacity(SPARE_LEN));
        }
        assert_eq!(spare.0.lock().unwrap().len(), MAX_SPARE_FRAMES);
    }

    #[test]
    fn a_frame_of_impossible_length_takes_no_memory() {
        let storage = crate::storage::memory::MemoryStorage::new();
        let created = Repository::create(
            Box::new(storage),
            &crate::repo::CreateOptions::default(),
            &crate::repo::Environment::of_a_test(),
        );
        let repository = created.unwrap();
        for (stored_len, raw_len) in [(u32::MAX - 64, 100), (100, u32::MAX)] {
            let entry = FrameEntry { offset: 64, stored_len, raw_len };
            let read = Frame::read(&repository, PackId::from_bytes([1; 32]), &entry);
            let Err(Error::Malformed { fault, .. }) = read else { panic!("{read:?}") };
            assert!(matches!(fault, FormatFault::TooLarge { .. }), "{fault}");
        }
    }
}

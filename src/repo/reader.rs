//! Reading chunks: index, pack range, decompression, and the check of every chunk against its id.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

use super::Repository;
use super::rules::Rule;
use super::view::View;
use crate::chunk;
use crate::error::{Error, FormatFault, Result};
use crate::format::name::ObjectName;
use crate::format::node::{ChunkKind, Node};
use crate::format::pack::{FRAME_HEADER_LEN, FrameEntry, frame_chunks};
use crate::id::{ChunkId, PackId, RepositoryId, SegmentId};
use crate::index::{Index, Location, MemoryIndex};
use crate::manifest::NodeReader;

/// Plaintext of frames that a reader keeps, bytes.
const FRAME_CACHE_LEN: usize = 48 << 20;
/// Decoded nodes that a reader keeps; a leaf has about 2 KiB.
const NODE_CACHE_COUNT: usize = 4096;

/// The bytes of a chunk, inside the frame that they came in.
#[derive(Debug, Clone)]
pub struct ChunkBytes {
    frame: Arc<Vec<u8>>,
    range: Range<usize>,
}

impl ChunkBytes {
    /// Bytes that stand alone.
    #[cfg(test)]
    pub(crate) fn of(bytes: Vec<u8>) -> Self {
        Self { range: 0..bytes.len(), frame: Arc::new(bytes) }
    }

    /// Returns `len` bytes of it from `start` on; `None` if it has not so many.
    pub fn part(&self, start: usize, len: usize) -> Option<Self> {
        let from = self.range.start.checked_add(start)?;
        let to = from.checked_add(len).filter(|to| *to <= self.range.end)?;
        Some(Self { frame: Arc::clone(&self.frame), range: from..to })
    }

    /// Returns the memory that it keeps beside `other`, which shares a frame with it or not. Bytes.
    pub fn held_beside(&self, other: Option<&Self>) -> usize {
        match other {
            Some(other) if Arc::ptr_eq(&self.frame, &other.frame) => 0,
            _ => self.frame.len(),
        }
    }
}

impl std::ops::Deref for ChunkBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.frame.get(self.range.clone()).unwrap_or_default()
    }
}

/// A cache that drops what was used longest ago.
#[derive(Debug)]
struct Recent<K, V> {
    entries: HashMap<K, (V, u64, usize)>,
    clock: u64,
    weight: usize,
    limit: usize,
}

impl<K: std::hash::Hash + Eq + Copy, V: Clone> Recent<K, V> {
    fn new(limit: usize) -> Self {
        Self { entries: HashMap::new(), clock: 0, weight: 0, limit }
    }

    fn get(&mut self, key: &K) -> Option<V> {
        self.clock += 1;
        let (value, used, _) = self.entries.get_mut(key)?;
        *used = self.clock;
        Some(value.clone())
    }

    fn put(&mut self, key: K, value: V, weight: usize) {
        self.clock += 1;
        if let Some((_, _, old)) = self.entries.insert(key, (value, self.clock, weight)) {
            self.weight -= old;
        }
        self.weight += weight;
        if self.weight > self.limit {
            self.shrink();
        }
    }

    /// Drops the older half at once, so that the scan is paid for by many puts.
    fn shrink(&mut self) {
        let mut ages: Vec<u64> = self.entries.values().map(|(_, used, _)| *used).collect();
        ages.sort_unstable();
        let Some(middle) = ages.get(ages.len() / 2).copied() else { return };
        self.entries.retain(|_, (_, used, _)| *used > middle);
        self.weight = self.entries.values().map(|(_, _, weight)| *weight).sum();
    }
}

/// Plaintexts by pack and first byte of the frame.
type RecentFrames = Recent<(PackId, u32), Arc<Vec<u8>>>;

/// Reads chunks of one repository; shared by threads.
pub struct ChunkReader<'a> {
    repository: &'a Repository,
    view: &'a View,
    frames: Mutex<RecentFrames>,
    nodes: Mutex<Recent<ChunkId, Arc<Node>>>,
    last_resort: OnceLock<MemoryIndex>,
    /// Chunks of a running session, whose packs are not in the view.
    own: Option<MemoryIndex>,
    /// Places that this reader found to be bad: nothing new may rely on them, recorded or not.
    met: Mutex<HashSet<(PackId, ChunkId)>>,
}

impl std::fmt::Debug for ChunkReader<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChunkReader").field("repository", &self.repository.id()).finish_non_exhaustive()
    }
}

/// Refuses an object of another repository.
pub(super) fn check_owner(name: ObjectName, found: RepositoryId, expected: RepositoryId) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let fault = FormatFault::ForeignRepository { found: found.to_hex(), expected: expected.to_hex() };
    Err(Error::malformed(name, fault))
}

/// A pack that is not there makes a chunk missing; anything else is a fault of its own.
fn fault_of_place(error: Error) -> Option<Error> {
    if matches!(error, Error::NotFound { .. }) { None } else { Some(error) }
}

impl<'a> ChunkReader<'a> {
    /// Begins reading what `view` saw.
    pub fn new(repository: &'a Repository, view: &'a View) -> Self {
        Self {
            repository,
            view,
            frames: Mutex::new(Recent::new(FRAME_CACHE_LEN)),
            nodes: Mutex::new(Recent::new(NODE_CACHE_COUNT)),
            last_resort: OnceLock::new(),
            own: None,
            met: Mutex::new(HashSet::new()),
        }
    }

    /// Returns what it reads from.
    pub fn view(&self) -> &View {
        self.view
    }

    /// Returns the places from which each chunk can be read, in the order asked.
    ///
    /// # Errors
    /// Those of [`Repository::refresh`], where the index had to be rebuilt.
    pub fn locate(&self, ids: &[ChunkId]) -> Result<Vec<Vec<Location>>> {
        let mut found = self.repository.lookup(ids)?;
        for places in &mut found {
            places.retain(|place| self.view.is_readable(place));
        }
        if let Some(own) = &self.own {
            for (places, more) in found.iter_mut().zip(own.lookup(ids)?) {
                places.extend(more);
            }
        }
        Ok(found)
    }

    /// Returns a pack in which a chunk should be, whether or not it can be read from there.
    ///
    /// # Errors
    /// As [`ChunkReader::locate`].
    pub fn hinted_pack(&self, id: ChunkId) -> Result<Option<PackId>> {
        let places = self.repository.lookup(&[id])?.pop().unwrap_or_default();
        Ok(places.first().map(|place| place.pack))
    }

    /// Returns a reader that also finds what a session has put and not yet committed.
    ///
    /// # Errors
    /// Those of the storage.
    pub fn with_own_segments(&self, segments: &[SegmentId]) -> Result<Self> {
        let own = MemoryIndex::default();
        for id in segments {
            own.apply(&[(*id, self.repository.load_segment(*id)?)])?;
        }
        Ok(Self { own: Some(own), ..Self::new(self.repository, self.view) })
    }

    /// Returns for each chunk whether a new point may rely on it.
    ///
    /// # Errors
    /// As [`ChunkReader::locate`].
    pub fn known(&self, kind: ChunkKind, ids: &[ChunkId]) -> Result<Vec<Option<PackId>>> {
        let found = self.repository.lookup(ids)?;
        let met = self.met.lock().map(|met| met.clone()).unwrap_or_default();
        let usable = |id: &ChunkId, places: Vec<Location>| {
            places
                .into_iter()
                .filter(|place| !met.contains(&(place.pack, *id)))
                .find(|place| place.kind == kind && self.may_rely_on(id, place))
                .map(|place| place.pack)
        };
        Ok(ids.iter().zip(found).map(|(id, places)| usable(id, places)).collect())
    }

    fn may_rely_on(&self, id: &ChunkId, place: &Location) -> bool {
        let spares_marked = self.view.is_good(id, place) && self.repository.breaks(Rule::HeedMarks);
        let spares_damaged = self.view.is_readable(place) && self.repository.breaks(Rule::HeedDamage);
        self.view.is_usable(id, place) || spares_marked || spares_damaged
    }

    /// Returns for each chunk whether it is lost as far as is known: in no pack that is there and not recorded as damaged.
    /// A chunk that is recorded as damaged counts as lost even if it could be read.
    ///
    /// # Errors
    /// As [`ChunkReader::locate`].
    pub fn lost(&self, ids: &[ChunkId]) -> Result<Vec<bool>> {
        let found = self.locate(ids)?;
        let is_lost = |(id, places): (&ChunkId, Vec<Location>)| {
            !places.iter().any(|place| self.view.is_good(id, place))
        };
        Ok(ids.iter().zip(found).map(is_lost).collect())
    }

    /// Returns for each chunk whether it has a place anywhere at all, in segments that do not count too. Whether it can be
    /// read there is not tried.
    ///
    /// # Errors
    /// As [`ChunkReader::locate`]; those of the storage.
    pub fn is_somewhere(&self, ids: &[ChunkId]) -> Result<Vec<bool>> {
        let anywhere = self.last_resort()?.lookup(ids)?;
        let is_there =
            |(id, places): (&ChunkId, Vec<Location>)| places.iter().any(|place| self.view.is_good(id, place));
        Ok(ids.iter().zip(anywhere).map(is_there).collect())
    }

    /// Returns a chunk whose content was checked against its id.
    ///
    /// # Errors
    /// [`Error::MissingChunk`] if it is nowhere; the fault of its last place if it is nowhere whole.
    pub fn read(&self, kind: ChunkKind, id: ChunkId) -> Result<ChunkBytes> {
        let places = self.locate(&[id])?.pop().unwrap_or_default();
        self.read_at(kind, id, &places)
    }

    /// Returns the chunk that stands behind `before` in its frame if that is the wanted one. Content stands in frames as
    /// it stood on the disk, so that most chunks are found without a look-up; `len` is the wanted one's length.
    pub fn read_behind(
        &self,
        before: &ChunkBytes,
        kind: ChunkKind,
        id: ChunkId,
        len: u32,
    ) -> Option<ChunkBytes> {
        let start = before.range.end;
        let chunks = frame_chunks(&before.frame).ok()?;
        // another chunk's length is mostly another one, which is cheaper to see than another hash
        chunks
            .iter()
            .find(|chunk| chunk.offset as usize == start && chunk.len == len && chunk.kind == kind)?;
        let range = start..start.checked_add(len as usize)?;
        let bytes = before.frame.get(range.clone())?;
        (self.repository.hasher().chunk_id(kind, bytes) == id)
            .then(|| ChunkBytes { frame: Arc::clone(&before.frame), range })
    }

    /// Returns a chunk from the first of `places` that has it whole, else from wherever it can be found.
    ///
    /// # Errors
    /// As [`ChunkReader::read`].
    pub fn read_at(&self, kind: ChunkKind, id: ChunkId, places: &[Location]) -> Result<ChunkBytes> {
        let mut first_fault = None;
        for place in places {
            match self.read_place(kind, id, place) {
                Ok(bytes) => return Ok(bytes),
                Err(error) => {
                    if let Ok(mut met) = self.met.lock() {
                        met.insert((place.pack, id));
                    }
                    first_fault = first_fault.or_else(|| fault_of_place(error));
                }
            }
        }
        let index = self.last_resort()?;
        let others = index.lookup(&[id])?.pop().unwrap_or_default();
        for place in others.iter().filter(|place| !places.contains(place)) {
            match self.read_place(kind, id, place) {
                Ok(bytes) => return Ok(bytes),
                Err(error) => first_fault = first_fault.or_else(|| fault_of_place(error)),
            }
        }
        Err(first_fault.unwrap_or(Error::MissingChunk { id, wanted_by: format!("{kind:?}").to_lowercase() }))
    }

    fn last_resort(&self) -> Result<&MemoryIndex> {
        if let Some(index) = self.last_resort.get() {
            return Ok(index);
        }
        let index = self.repository.index_of_last_resort(&crate::monitor::Recorder::new())?;
        Ok(self.last_resort.get_or_init(|| index))
    }

    fn read_place(&self, kind: ChunkKind, id: ChunkId, place: &Location) -> Result<ChunkBytes> {
        let frame = self.frame(place.pack, &place.frame)?;
        let start = place.offset as usize;
        let range = start..start.saturating_add(place.len as usize);
        let name = ObjectName::Pack(place.pack);
        let Some(bytes) = frame.get(range.clone()) else {
            let fault = FormatFault::Truncated { found: frame.len() as u64, needed: range.end as u64 };
            return Err(Error::malformed(name, fault));
        };
        if self.repository.hasher().chunk_id(kind, bytes) != id {
            return Err(Error::malformed(name, FormatFault::ChunkId { expected: id }));
        }
        Ok(ChunkBytes { frame, range })
    }

    /// Returns the plaintext of a frame.
    ///
    /// # Errors
    /// Those of the storage; [`Error::Malformed`] naming the pack.
    pub fn frame(&self, pack: PackId, entry: &FrameEntry) -> Result<Arc<Vec<u8>>> {
        let key = (pack, entry.offset);
        if let Ok(mut cache) = self.frames.lock()
            && let Some(frame) = cache.get(&key)
        {
            return Ok(frame);
        }
        let name = ObjectName::Pack(pack);
        let len = FRAME_HEADER_LEN as u64 + u64::from(entry.stored_len);
        let bytes = self.repository.storage().get_range(name, u64::from(entry.offset), len)?;
        let plain = chunk::open_frame(&bytes, entry).map_err(|fault| Error::malformed(name, fault))?;
        let frame = Arc::new(plain);
        if let Ok(mut cache) = self.frames.lock() {
            cache.put(key, Arc::clone(&frame), frame.len());
        }
        Ok(frame)
    }
}

impl NodeReader for ChunkReader<'_> {
    fn read_node(&self, id: ChunkId) -> Result<Arc<Node>> {
        if let Ok(mut cache) = self.nodes.lock()
            && let Some(node) = cache.get(&id)
        {
            return Ok(node);
        }
        let bytes = self.read(ChunkKind::Node, id)?;
        let node =
            Node::decode(&bytes).map_err(|fault| Error::malformed(format!("manifest node {id}"), fault))?;
        let node = Arc::new(node);
        if let Ok(mut cache) = self.nodes.lock() {
            cache.put(id, Arc::clone(&node), 1);
        }
        Ok(node)
    }
}

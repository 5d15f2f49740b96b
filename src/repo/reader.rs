//! Reading chunks: index, pack range, decompression, and the check of every chunk against its id.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rayon::iter::ParallelIterator;
use rayon::slice::ParallelSlice;

use super::Repository;
pub use super::frames::ChunkBytes;
use super::frames::{Frame, FrameCache, Recent, read_stored};
use super::near::Near;
use super::resort::LastResort;
use super::rules::Rule;
use super::view::View;
use crate::chunk::{EncodedFrame, FramedChunk};
use crate::error::{Error, FormatFault, Result};
use crate::format::name::ObjectName;
use crate::format::node::{ChunkKind, Node};
use crate::format::pack::FrameEntry;
use crate::id::{ChunkId, PackId, RepositoryId, SegmentId};
use crate::index::{Index, Location, MemoryIndex};
use crate::manifest::{Geometry, NodeReader};

/// Decoded nodes that a reader keeps; a leaf has about 2 KiB.
const NODE_CACHE_COUNT: usize = 4096;

/// What of a pack is fetched ahead of a reader that reads it in order, bytes.
const AHEAD_LEN: u64 = 4 << 20;
/// Packs of which it is known how far they were read; 48 bytes each.
const MAX_AHEAD_PACKS: usize = 4096;

/// Chunks that one core looks up at a time: enough of them for the index to find neighbours together.
const PART_CHUNKS: usize = 256;

/// Looks up many chunks on all cores, and returns what `work` gave for the parts in the order of `items`. For one part, no
/// other thread is woken.
///
/// # Errors
/// One of those of `work`.
pub(crate) fn in_parts<T: Sync, U: Send>(
    items: &[T],
    work: impl Fn(&[T]) -> Result<Vec<U>> + Send + Sync,
) -> Result<Vec<U>> {
    if items.len() <= PART_CHUNKS {
        return work(items);
    }
    let parts: Vec<Vec<U>> = items.par_chunks(PART_CHUNKS).map(work).collect::<Result<_>>()?;
    Ok(parts.into_iter().flatten().collect())
}

/// How far a pack was read and fetched, bytes.
#[derive(Debug, Default)]
struct Ahead {
    /// Frames that were read in order.
    frames: u32,
    read_to: u64,
    fetched_to: u64,
}

/// Reads chunks of one repository; shared by threads.
pub struct ChunkReader<'a> {
    repository: &'a Repository,
    view: &'a View,
    frames: Arc<FrameCache>,
    ahead: Mutex<HashMap<PackId, Ahead>>,
    nodes: Mutex<Recent<ChunkId, Arc<Node>>>,
    near: Near,
    last_resort: OnceLock<LastResort>,
    making_last_resort: Mutex<()>,
    /// Chunks of a running session, whose segments do not count yet.
    own: Option<MemoryIndex>,
    /// Places that this reader found to be bad: nothing new may rely on them, recorded or not.
    met: Mutex<Arc<HashSet<(PackId, ChunkId)>>>,
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
        Self::with_frames(repository, view, FrameCache::of(repository), Near::new(false))
    }

    /// Begins reading for one who holds much in memory besides.
    pub fn sparing(repository: &'a Repository, view: &'a View) -> Self {
        Self::with_frames(repository, view, FrameCache::small(), Near::new(true))
    }

    fn with_frames(repository: &'a Repository, view: &'a View, frames: Arc<FrameCache>, near: Near) -> Self {
        Self {
            repository,
            view,
            frames,
            ahead: Mutex::default(),
            nodes: Mutex::new(Recent::new(NODE_CACHE_COUNT)),
            near,
            last_resort: OnceLock::new(),
            making_last_resort: Mutex::default(),
            own: None,
            met: Mutex::default(),
        }
    }

    /// Returns what it reads from.
    pub fn view(&self) -> &View {
        self.view
    }

    /// Returns how the manifests that it reads are divided into nodes.
    pub fn geometry(&self) -> Geometry {
        self.repository.geometry()
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

    /// Returns a place of each chunk at which it is good as far as is known, in the order asked; none: it has none, but
    /// perhaps among what the session of this reader has put. Cheaper than [`ChunkReader::locate`] where what stands together
    /// is asked for together.
    ///
    /// # Errors
    /// As [`ChunkReader::locate`].
    pub fn good_places(&self, ids: &[ChunkId]) -> Result<Vec<Option<Location>>> {
        self.places(ids, |id, place| self.view.is_good(id, place))
    }

    /// Returns a place of each chunk that `accept` agrees to.
    fn places(
        &self,
        ids: &[ChunkId],
        accept: impl Fn(&ChunkId, &Location) -> bool,
    ) -> Result<Vec<Option<Location>>> {
        let mut found = self.near.find(ids, &accept);
        let is_unknown = |(id, place): (&ChunkId, &Option<Location>)| place.is_none().then_some(*id);
        let unknown: Vec<ChunkId> = ids.iter().zip(&found).filter_map(is_unknown).collect();
        if unknown.is_empty() {
            return self.view.check_looks().map(|()| found);
        }
        let looked_up = self.repository.lookup(&unknown)?;
        let looked_up = unknown
            .iter()
            .zip(looked_up)
            .map(|(id, places)| places.into_iter().find(|place| accept(id, place)));
        let mut met = Vec::with_capacity(unknown.len());
        for ((slot, place), id) in found.iter_mut().filter(|slot| slot.is_none()).zip(looked_up).zip(&unknown)
        {
            met.extend(place.map(|place| (*id, place)));
            *slot = place;
        }
        for pack in self.near.meet(&met, self.view) {
            let len = self.view.pack_len(pack)?.unwrap_or(0);
            let table = self.repository.read_short_pack_table(pack, len, self.near.max_table_len());
            // without it there is still the index
            if let Ok((_, table)) = table {
                self.near.keep(pack, table, &met);
            }
        }
        self.view.check_looks().map(|()| found)
    }

    /// Returns the packs in which a chunk should be, whether or not it can be read from there.
    ///
    /// # Errors
    /// As [`ChunkReader::locate`].
    pub fn hinted_packs(&self, id: ChunkId) -> Result<Vec<PackId>> {
        let places = self.repository.lookup(&[id])?.pop().unwrap_or_default();
        Ok(places.iter().map(|place| place.pack).collect())
    }

    /// Returns a reader that also finds the metadata that a session has put and not yet committed. It reads what `view`
    /// saw, and knows the places that this one found to be bad.
    ///
    /// # Errors
    /// Those of the storage.
    pub fn with_own_metadata<'v>(&self, view: &'v View, segments: &[SegmentId]) -> Result<ChunkReader<'v>>
    where
        'a: 'v,
    {
        let own = MemoryIndex::default();
        for id in segments {
            let mut segment = self.repository.load_segment(*id)?;
            // of a large disk, data would take much memory, and maps are what is read
            segment.chunks.retain(|chunk| chunk.kind != ChunkKind::Data);
            own.apply(&[(*id, segment)])?;
        }
        let met = self.met_as_bad();
        Ok(ChunkReader { own: Some(own), met: Mutex::new(met), ..ChunkReader::new(self.repository, view) })
    }

    /// Returns for each chunk whether a new point may rely on it.
    ///
    /// # Errors
    /// As [`ChunkReader::locate`].
    pub fn known(&self, kind: ChunkKind, ids: &[ChunkId]) -> Result<Vec<Option<PackId>>> {
        let met = self.met_as_bad();
        let usable = |id: &ChunkId, place: &Location| {
            place.kind == kind && !met.contains(&(place.pack, *id)) && self.may_rely_on(id, place)
        };
        Ok(self.places(ids, usable)?.into_iter().map(|place| place.map(|place| place.pack)).collect())
    }

    fn met_as_bad(&self) -> Arc<HashSet<(PackId, ChunkId)>> {
        Arc::clone(&self.met.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn may_rely_on(&self, id: &ChunkId, place: &Location) -> bool {
        let spares_marked = self.view.is_good(id, place) && self.repository.breaks(Rule::HeedMarks);
        let spares_lost = self.repository.breaks(Rule::HitMustBeThere);
        let spares_damaged = self.view.is_readable(place) && self.repository.breaks(Rule::HeedDamage);
        self.view.is_usable(id, place) || spares_marked || spares_damaged || spares_lost
    }

    /// Returns for each chunk whether it is lost as far as is known: in no pack that is there and not recorded as damaged.
    /// A chunk that is recorded as damaged counts as lost even if it could be read.
    ///
    /// # Errors
    /// As [`ChunkReader::locate`].
    pub fn lost(&self, ids: &[ChunkId]) -> Result<Vec<bool>> {
        in_parts(ids, |part| Ok(self.good_places(part)?.iter().map(Option::is_none).collect()))
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
        let found = ids.iter().zip(anywhere).map(is_there).collect();
        self.view.check_looks().map(|()| found)
    }

    /// Returns a chunk whose content was checked against its id.
    ///
    /// # Errors
    /// [`Error::MissingChunk`] if it is nowhere; the fault of its last place if it is nowhere whole.
    pub fn read(&self, kind: ChunkKind, id: ChunkId) -> Result<ChunkBytes> {
        let place = match self.own {
            None => self.good_places(&[id])?.pop().flatten(),
            // what its session has put is not in the index
            Some(_) => None,
        };
        self.read_at(kind, id, place.as_slice())
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
        before.chunk_behind(self.repository.hasher(), kind, id, len)
    }

    /// Returns what stands at a place, unchecked: whoever relies on it asks [`ChunkReader::is_chunk`] first.
    ///
    /// # Errors
    /// The fault of the place.
    pub fn peek(&self, place: &Location) -> Result<ChunkBytes> {
        let frame = self.frame(place.pack, &place.frame)?;
        ChunkBytes::within(frame, place.offset as usize, place.len as usize)
            .map_err(|fault| Error::malformed(ObjectName::Pack(place.pack), fault))
    }

    /// Returns true if these bytes are the chunk.
    pub fn is_chunk(&self, kind: ChunkKind, id: ChunkId, bytes: &ChunkBytes) -> bool {
        bytes.is_chunk(self.repository.hasher(), kind, id)
    }

    /// Returns a chunk from the first of `places` that has it whole, else from wherever it can be found.
    ///
    /// # Errors
    /// As [`ChunkReader::read`].
    pub fn read_at(&self, kind: ChunkKind, id: ChunkId, places: &[Location]) -> Result<ChunkBytes> {
        let mut first_fault = None;
        let mut tried = Vec::new();
        if let Some(bytes) = self.read_from(kind, id, places, &mut tried, &mut first_fault) {
            return Ok(bytes);
        }
        let known = self.locate(&[id])?.pop().unwrap_or_default();
        if let Some(bytes) = self.read_from(kind, id, &known, &mut tried, &mut first_fault) {
            return Ok(bytes);
        }
        let others = self.last_resort()?.lookup(&[id])?.pop().unwrap_or_default();
        if let Some(bytes) = self.read_from(kind, id, &others, &mut tried, &mut first_fault) {
            return Ok(bytes);
        }
        let missing = || Error::MissingChunk { id, wanted_by: format!("{kind:?}").to_lowercase() };
        let fault = first_fault.unwrap_or_else(missing);
        // where the disk below cannot be read, the content is lost as if it were changed
        let is_unreadable = fault.is_io() && self.repository.is_of_object(&fault);
        Err(if is_unreadable { Error::Damaged(fault.cause()) } else { fault })
    }

    /// Returns a chunk from the first of `places` that has it whole; those in `tried` are left out.
    fn read_from(
        &self,
        kind: ChunkKind,
        id: ChunkId,
        places: &[Location],
        tried: &mut Vec<Location>,
        first_fault: &mut Option<Error>,
    ) -> Option<ChunkBytes> {
        for place in places {
            if tried.contains(place) {
                continue;
            }
            match self.read_place(kind, id, place) {
                Ok(bytes) => return Some(bytes),
                Err(error) => {
                    let mut met = self.met.lock().unwrap_or_else(PoisonError::into_inner);
                    Arc::make_mut(&mut met).insert((place.pack, id));
                    drop(met);
                    *first_fault = first_fault.take().or_else(|| fault_of_place(error));
                }
            }
            tried.push(*place);
        }
        None
    }

    fn last_resort(&self) -> Result<&LastResort> {
        if let Some(index) = self.last_resort.get() {
            return Ok(index);
        }
        // it is large, and takes long: one of those who miss something at once makes it
        let _turn = self.making_last_resort.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = self.last_resort.get() {
            return Ok(index);
        }
        let index = self.repository.index_of_last_resort(&crate::monitor::Recorder::new())?;
        Ok(self.last_resort.get_or_init(|| index))
    }

    /// Returns a frame as it is stored, which can be put into another pack. It has to hold just these chunks, in this order;
    /// each is checked against its id.
    ///
    /// # Errors
    /// The fault of the frame.
    pub fn whole_frame(
        &self,
        pack: PackId,
        entry: &FrameEntry,
        chunks: Vec<FramedChunk>,
    ) -> Result<EncodedFrame> {
        let bytes = read_stored(self.repository, pack, entry, || self.fetch_ahead(pack, entry))?;
        EncodedFrame::taken_up(bytes, entry, chunks, self.repository.hasher())
            .map_err(|fault| Error::malformed(ObjectName::Pack(pack), fault))
    }

    fn read_place(&self, kind: ChunkKind, id: ChunkId, place: &Location) -> Result<ChunkBytes> {
        let bytes = self.peek(place)?;
        if self.is_chunk(kind, id, &bytes) {
            return Ok(bytes);
        }
        Err(Error::malformed(ObjectName::Pack(place.pack), FormatFault::ChunkId { expected: id }))
    }

    /// Reads a frame, unless it was read lately.
    fn frame(&self, pack: PackId, entry: &FrameEntry) -> Result<Arc<Frame>> {
        self.frames.read(self.repository, pack, entry, || self.fetch_ahead(pack, entry))
    }

    /// Has the storage fetch what stands behind a frame, where frames are read one after the other.
    fn fetch_ahead(&self, pack: PackId, entry: &FrameEntry) {
        let Ok(mut packs) = self.ahead.lock() else { return };
        if packs.len() >= MAX_AHEAD_PACKS {
            packs.clear();
        }
        let (start, end) = (u64::from(entry.offset), entry.end());
        let ahead = packs.entry(pack).or_default();
        // several threads read near to each other
        if ahead.frames > 0 && !(ahead.read_to.saturating_sub(AHEAD_LEN)..=ahead.fetched_to).contains(&start)
        {
            *ahead = Ahead::default();
        }
        ahead.frames += 1;
        ahead.read_to = ahead.read_to.max(end);
        ahead.fetched_to = ahead.fetched_to.max(end);
        // the first frame that is read of a pack may be the only one
        if ahead.frames > 1 && ahead.fetched_to < ahead.read_to + AHEAD_LEN / 2 {
            let from = ahead.fetched_to;
            ahead.fetched_to = from + AHEAD_LEN;
            drop(packs);
            self.repository.storage().prefetch(ObjectName::Pack(pack), from, AHEAD_LEN);
        }
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

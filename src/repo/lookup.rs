//! Where chunks are: the local index, kept up to date, and what to do when it is no help.

use std::sync::{Arc, PoisonError};

use super::catalog::{Catalog, Ended};
use super::rules::Rule;
use super::view::{Marks, View};
use super::{Repository, reader};
use crate::chunk::{self, Salvage};
use crate::error::{Error, Result};
use crate::format::envelope::ObjectKind;
use crate::format::limits::{MAX_PACK_LEN, MAX_PACK_TABLE_LEN};
use crate::format::name::{Folder, ObjectName};
use crate::format::pack::{FrameChunk, PACK_HEADER_LEN, PackHeader, PackKind, PackTable, TableChunk};
use crate::format::segment::{Segment, SegmentChunk, SegmentPack};
use crate::id::{ChunkId, PackId, SegmentId, SessionId};
use crate::index::{self, Index, Location, MemoryIndex};
use crate::monitor::Monitor;

/// Of a pack without its table so many bytes are believed to hold no more than one chunk: what is known of one in memory.
const SALVAGED_CHUNK_LEN: usize = 48;

impl Repository {
    /// Opens the index in the cache directory, the first time; whatever is wrong with it, there is an index afterwards. Who
    /// only wants to know which points there are needs none.
    pub fn open_local_index(&self, monitor: &dyn Monitor) {
        self.index_opened.call_once(|| {
            let opened = index::open_index(self.cache_dir.as_deref(), self.id());
            for note in &opened.notes {
                monitor.note(note);
            }
            self.replace_index(opened.index.into());
        });
    }

    fn replace_index(&self, index: Arc<dyn Index>) {
        match self.index.write() {
            Ok(mut slot) => *slot = index,
            Err(poisoned) => *poisoned.into_inner() = index,
        }
    }

    fn current_index(&self) -> Arc<dyn Index> {
        // whoever looks something up has looked at the repository before, and has told then what there is to tell
        self.open_local_index(&crate::monitor::Recorder::new());
        match self.index.read() {
            Ok(slot) => Arc::clone(&slot),
            Err(poisoned) => Arc::clone(&poisoned.into_inner()),
        }
    }

    /// Reads marks, then outcomes, then segments, and brings the local index up to date: what a session
    /// or a reader sees from now on. The order is load-bearing: a pack that a segment places and no mark
    /// names stays until this session has ended.
    ///
    /// # Errors
    /// A failed listing or read of the storage; never the local index.
    pub fn refresh(&self, monitor: &dyn Monitor) -> Result<(Catalog, View)> {
        self.look(&mut |_, error| Err(error), monitor)
    }

    /// As [`Repository::refresh`], for those who judge all packs: each of them is looked at.
    ///
    /// # Errors
    /// As [`Repository::refresh`].
    pub fn refresh_and_look(&self, monitor: &dyn Monitor) -> Result<(Catalog, View)> {
        let (catalog, view) = self.refresh(monitor)?;
        view.pack_lens()?;
        Ok((catalog, view))
    }

    /// As [`Repository::refresh`], for those who store nothing: a mark that cannot be read does not concern them.
    ///
    /// # Errors
    /// A failed listing or read of the storage; never the local index.
    pub fn refresh_to_read(&self, monitor: &dyn Monitor) -> Result<(Catalog, View)> {
        let mut pass_over = |name, error: Error| match self.is_of_object(&error) {
            true => {
                monitor.warn(&format!("{name} cannot be read: {}; the next prune clears it", error.cause()));
                Ok(())
            }
            false => Err(error),
        };
        self.look(&mut pass_over, monitor)
    }

    fn look(
        &self,
        refuse: &mut dyn FnMut(ObjectName, Error) -> Result<()>,
        monitor: &dyn Monitor,
    ) -> Result<(Catalog, View)> {
        let marks_first = !self.breaks(Rule::MarksBeforeSegments);
        let mut marks = || {
            let mut marks = Marks::load_or(self.storage(), self.id(), refuse)?;
            if self.breaks(Rule::HeedMarkedBases) {
                marks.points.clear();
            }
            Result::Ok(marks)
        };
        let early = if marks_first { marks()? } else { Marks::default() };
        let catalog = std::thread::scope(|scope| {
            // both mostly wait for the disk
            (!self.index_opened.is_completed()).then(|| scope.spawn(|| self.open_local_index(monitor)));
            self.catalog(monitor)
        })?;
        let mut view = self.synchronize(&catalog, early, monitor)?;
        if !marks_first {
            // who has the order wrong has it wrong for all
            view.pack_lens()?;
            view.set_marks(marks()?);
        }
        view.set_lost(catalog.is_anything_lost());
        Ok((catalog, view))
    }

    /// Brings the index up to date, then reads what is known to be bad of what its segments place: `marks` were read before.
    ///
    /// One at a time: two would write one file, and to a listing that is older than the index it would look as if a prune
    /// had been there.
    fn synchronize(&self, catalog: &Catalog, marks: Marks, monitor: &dyn Monitor) -> Result<View> {
        let turn = self.updating.lock().unwrap_or_else(PoisonError::into_inner);
        self.update_index(&self.segments()?, catalog, monitor)?;
        drop(turn);
        View::load(&self.storage, self.id(), marks)
    }

    fn update_index(&self, listed: &[SegmentId], catalog: &Catalog, monitor: &dyn Monitor) -> Result<()> {
        let index = self.current_index();
        let mut filling = None;
        // sessions that look something up meanwhile wait: it would seem to be lost
        let mut before_clear =
            || filling = Some(self.filling.write().unwrap_or_else(PoisonError::into_inner));
        if let Err(error) = self.apply_segments(index.as_ref(), listed, catalog, &mut before_clear, monitor) {
            if matches!(error, Error::Cancelled) {
                return Err(error);
            }
            monitor.note(&format!("the local index is not usable and is rebuilt in memory: {error}"));
            let fresh = Arc::new(MemoryIndex::default());
            self.apply_segments(fresh.as_ref(), listed, catalog, &mut || (), monitor)?;
            self.replace_index(fresh);
        }
        drop(filling);
        Ok(())
    }

    /// Returns true if a session has committed whose segments are in the index; another session of this process may have
    /// added those of one that is newer than the catalog.
    fn counts(&self, owner: SessionId, catalog: &Catalog) -> bool {
        let has_committed = match catalog.ended(owner) {
            Some(ended) => ended == Ended::Committed,
            None => self.storage().len(ObjectName::Outcome(owner)).is_ok(),
        };
        has_committed || self.breaks(Rule::SegmentsNeedOutcomes) || self.breaks(Rule::AppliedMustCount)
    }

    fn apply_segments(
        &self,
        index: &dyn Index,
        listed: &[SegmentId],
        catalog: &Catalog,
        before_clear: &mut dyn FnMut(),
        monitor: &dyn Monitor,
    ) -> Result<()> {
        let mut load = |id: SegmentId| -> Result<Option<Segment>> {
            match self.load_segment(id) {
                Ok(segment) if catalog.ended(segment.owner) == Some(Ended::Committed) => Ok(Some(segment)),
                Ok(segment) if self.breaks(Rule::SegmentsNeedOutcomes) => Ok(Some(segment)),
                Ok(_) | Err(Error::NotFound { .. }) => Ok(None),
                Err(error) if self.is_of_object(&error) => {
                    monitor.warn(&format!("{}; what it lists is stored again where needed", error.cause()));
                    Ok(None)
                }
                Err(error) => Err(error),
            }
        };
        let counts = |owner| self.counts(owner, catalog);
        index::synchronize(index, listed, &counts, &mut load, before_clear, monitor)
    }

    /// Returns the ids of all segments that the storage lists.
    ///
    /// # Errors
    /// A failed listing.
    pub fn segments(&self) -> Result<Vec<SegmentId>> {
        let listed = self.storage().names(Folder::Segments)?;
        Ok(listed
            .into_iter()
            .filter_map(|name| match name {
                ObjectName::Segment(id) => Some(id),
                _ => None,
            })
            .collect())
    }

    /// Reads a segment and checks that its bytes are those that its name promises.
    ///
    /// # Errors
    /// Those of the storage; [`Error::Malformed`].
    pub fn load_segment(&self, id: SegmentId) -> Result<Segment> {
        let name = ObjectName::Segment(id);
        let bytes = self.storage().get(name, ObjectKind::Segment.max_object_len())?;
        if blake3::hash(&bytes).as_bytes() != id.as_bytes() {
            return Err(Error::malformed(name, crate::error::FormatFault::Checksum));
        }
        Segment::from_object(&bytes, self.id()).map_err(|fault| Error::malformed(name, fault))
    }

    /// Returns every place that the index knows for each chunk, in the order asked. A hint: the caller
    /// checks it against its [`View`].
    ///
    /// # Errors
    /// Those of the index, once a rebuild in memory failed too.
    pub(super) fn lookup(&self, ids: &[ChunkId]) -> Result<Vec<Vec<Location>>> {
        let index = {
            let _filled = self.filling.read().unwrap_or_else(PoisonError::into_inner);
            let index = self.current_index();
            match index.lookup(ids) {
                Ok(found) => return Ok(found),
                Err(_) => index,
            }
        };
        let _turn = self.updating.lock().unwrap_or_else(PoisonError::into_inner);
        let current = self.current_index();
        if !Arc::ptr_eq(&current, &index) {
            // another session has met the same
            return current.lookup(ids);
        }
        let silent = crate::monitor::Recorder::new();
        let fresh = Arc::new(MemoryIndex::default());
        let catalog = self.catalog(&silent)?;
        self.apply_segments(fresh.as_ref(), &self.segments()?, &catalog, &mut || (), &silent)?;
        let found = fresh.lookup(ids);
        self.replace_index(fresh);
        found
    }

    /// Adds what packs of the given lengths, in bytes, say of themselves to an index that is not kept: of one without its
    /// table, the frames that still open.
    ///
    /// # Errors
    /// A storage that fails for a reason other than a bad object; [`Error::Cancelled`].
    pub fn index_tables(
        &self,
        index: &dyn Index,
        packs: impl Iterator<Item = (PackId, u64)>,
        monitor: &dyn Monitor,
    ) -> Result<()> {
        let mut wasted = 0;
        for (id, len) in packs {
            monitor.check()?;
            let segment = match self.read_pack_table(id, len) {
                Ok((header, table)) => Some(segment_of_pack(id, len, header.kind, table)),
                Err(Error::NotFound { .. }) => None,
                Err(error) if self.is_of_object(&error) => self.salvage_pack(id, &mut wasted, monitor)?,
                Err(error) => return Err(error),
            };
            if let Some(segment) = segment {
                // any id will do: this index is not kept
                index.apply(&[(SegmentId::from_bytes(*id.as_bytes()), segment)])?;
            }
        }
        Ok(())
    }

    /// Looks for frames in a pack, one after the other. None: it cannot be read at all. `wasted`: bytes that were looked at
    /// in vain in this pack and those before it.
    fn salvage_pack(&self, id: PackId, wasted: &mut u64, monitor: &dyn Monitor) -> Result<Option<Segment>> {
        let bytes = match self.storage().get(ObjectName::Pack(id), MAX_PACK_LEN) {
            Ok(bytes) => bytes,
            Err(Error::NotFound { .. }) => return Ok(None),
            Err(error) if self.is_of_object(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        let len = bytes.len();
        // what a frame says of itself takes no more memory than the pack
        let most = (len / SALVAGED_CHUNK_LEN).min(MAX_PACK_TABLE_LEN as usize / SALVAGED_CHUNK_LEN);
        let mut table = PackTable { frames: Vec::new(), chunks: Vec::new() };
        let mut salvage = Salvage::new(&bytes).behind(*wasted);
        for frame in &mut salvage {
            monitor.check()?;
            if table.chunks.len() + frame.chunks.len() > most {
                monitor.note(&format!("{}: its frames claim too many chunks", ObjectName::Pack(id)));
                break;
            }
            let number = u32::try_from(table.frames.len()).unwrap_or(u32::MAX);
            for (&FrameChunk { kind, offset, len }, content) in frame.contents() {
                let id = self.hasher().chunk_id(kind, content);
                table.chunks.push(TableChunk { id, kind, frame: number, offset, len });
            }
            table.frames.push(frame.entry);
        }
        *wasted = salvage.wasted_bytes();
        if salvage.gave_up() {
            monitor.note(&format!("{}: the scan for frames gave up", ObjectName::Pack(id)));
        }
        Ok(Some(segment_of_pack(id, len as u64, PackKind::Data, table)))
    }

    /// Reads header and table of a pack of `len` bytes.
    ///
    /// # Errors
    /// Those of the storage; [`Error::Malformed`].
    pub fn read_pack_table(&self, id: PackId, len: u64) -> Result<(PackHeader, PackTable)> {
        self.read_short_pack_table(id, len, MAX_PACK_TABLE_LEN)
    }

    /// As [`Repository::read_pack_table`], but a table of more than `max_raw_len` bytes of plaintext is refused.
    ///
    /// # Errors
    /// As [`Repository::read_pack_table`].
    pub(super) fn read_short_pack_table(
        &self,
        id: PackId,
        len: u64,
        max_raw_len: u32,
    ) -> Result<(PackHeader, PackTable)> {
        let name = ObjectName::Pack(id);
        let mut read = |offset, len| self.storage().get_range(name, offset, len);
        let header = PackHeader::decode(&read(0, PACK_HEADER_LEN as u64)?)
            .map_err(|fault| Error::malformed(name, fault))?;
        reader::check_owner(name, header.repository, self.id())?;
        let table = chunk::read_short_pack_table(id, len, max_raw_len, &mut read)?;
        Ok((header, table))
    }
}

/// Says in a segment's words what a pack's table says.
fn segment_of_pack(id: PackId, len: u64, kind: PackKind, table: PackTable) -> Segment {
    let mut chunks: Vec<SegmentChunk> =
        table.chunks.iter().map(|chunk| SegmentChunk::in_pack(chunk, 0)).collect();
    chunks.sort_unstable_by_key(|chunk| chunk.id);
    chunks.dedup_by_key(|chunk| chunk.id);
    Segment {
        owner: SessionId::from_bytes([0; 16]),
        number: 0,
        packs: vec![SegmentPack { id, kind, stored_len: len, frames: table.frames }],
        chunks,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::time::Duration;

    use super::super::reader::ChunkReader;
    use super::super::session::Session;
    use super::super::writer::write_session;
    use super::super::{CreateOptions, Environment};
    use super::*;
    use crate::format::node::ChunkKind;
    use crate::format::session::{Outcome, SessionKind};
    use crate::monitor::Recorder;
    use crate::storage::memory::MemoryStorage;

    /// An index that takes its time, and can be given a segment that the repository does not have.
    #[derive(Debug, Default)]
    struct Slow {
        inner: MemoryIndex,
        stray: Mutex<Option<SegmentId>>,
        cleared: AtomicUsize,
    }

    impl Index for Slow {
        fn applied(&self) -> Result<HashMap<SegmentId, SessionId>> {
            let mut applied = self.inner.applied()?;
            applied.extend(self.stray.lock().unwrap().map(|id| (id, SessionId::from_bytes([0; 16]))));
            Ok(applied)
        }

        fn apply(&self, segments: &[(SegmentId, Segment)]) -> Result<()> {
            std::thread::sleep(Duration::from_millis(50));
            self.inner.apply(segments)
        }

        fn clear(&self) -> Result<()> {
            *self.stray.lock().unwrap() = None;
            self.cleared.fetch_add(1, Ordering::SeqCst);
            self.inner.clear()
        }

        fn lookup(&self, ids: &[ChunkId]) -> Result<Vec<Vec<Location>>> {
            self.inner.lookup(ids)
        }
    }

    #[test]
    fn nothing_seems_to_be_gone_while_the_index_is_filled_anew() {
        let storage = Box::new(MemoryStorage::new());
        let environment = Environment::of_a_test();
        let repository = Repository::create(storage, &CreateOptions::default(), &environment).unwrap();
        let silent = Recorder::new();
        let session = Session::begin(&repository, SessionKind::Repair).unwrap();
        let (_, view) = repository.refresh(&silent).unwrap();
        let reader = ChunkReader::new(&repository, &view);
        let id = repository.hasher().chunk_id(ChunkKind::Data, b"content");
        write_session(&repository, &reader, session.id(), |writer| writer.put_data(id, b"content", None))
            .unwrap();
        session.commit(&Outcome::Done).unwrap();
        let index = Arc::new(Slow::default());
        repository.replace_index(Arc::clone(&index) as Arc<dyn Index>);
        repository.refresh(&silent).unwrap();
        let (is_over, looked) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            let looking = scope.spawn(|| {
                while !is_over.load(Ordering::SeqCst) {
                    if repository.lookup(&[id]).unwrap()[0].is_empty() {
                        return false;
                    }
                    looked.fetch_add(1, Ordering::SeqCst);
                }
                true
            });
            for stray in 0..5 {
                *index.stray.lock().unwrap() = Some(SegmentId::from_bytes([stray; 32]));
                repository.refresh(&silent).unwrap();
            }
            is_over.store(true, Ordering::SeqCst);
            assert!(looking.join().unwrap());
        });
        assert_eq!(index.cleared.load(Ordering::SeqCst), 5);
        assert!(looked.load(Ordering::SeqCst) > 0);
    }

    /// Has a session store `contents`, whatever is known of them.
    fn store(repository: &Repository, contents: &[Vec<u8>]) {
        let session = Session::begin(repository, SessionKind::Repair).unwrap();
        let (_, view) = repository.refresh(&Recorder::new()).unwrap();
        let reader = ChunkReader::new(repository, &view);
        write_session(repository, &reader, session.id(), |writer| {
            contents.iter().try_for_each(|content| {
                let id = repository.hasher().chunk_id(ChunkKind::Data, content);
                writer.copy(ChunkKind::Data, id, content)
            })
        })
        .unwrap();
        session.commit(&Outcome::Done).unwrap();
    }

    #[test]
    fn what_stands_near_is_found_without_the_index_and_elsewhere_if_it_is_bad() {
        let memory = MemoryStorage::new();
        let environment = Environment::of_a_test();
        let repository =
            Repository::create(Box::new(memory.clone()), &CreateOptions::default(), &environment).unwrap();
        // does not compress: what is changed in the pack below is content
        let content = |number: u32| {
            let mut bytes = vec![0; 8192];
            blake3::Hasher::new().update(&number.to_le_bytes()).finalize_xof().fill(&mut bytes);
            bytes
        };
        let contents: Vec<Vec<u8>> = (0..100).map(content).collect();
        store(&repository, &contents);
        store(&repository, &contents);
        let silent = Recorder::new();
        let (_, view) = repository.refresh(&silent).unwrap();
        let reader = ChunkReader::new(&repository, &view);
        let ids: Vec<ChunkId> =
            contents.iter().map(|content| repository.hasher().chunk_id(ChunkKind::Data, content)).collect();
        let asked = reader.good_places(&ids[..50]).unwrap();
        let pack = asked[0].unwrap().pack;
        assert!(asked.iter().all(|place| place.is_some_and(|place| place.pack == pack)));
        let index = repository.current_index();
        repository.replace_index(Arc::new(MemoryIndex::default()));
        let near = reader.good_places(&ids).unwrap();
        assert!(near.iter().all(|place| place.is_some_and(|place| place.pack == pack)), "{near:?}");
        for (id, place) in ids.iter().zip(&near) {
            let known = index.lookup(&[*id]).unwrap().pop().unwrap();
            assert!(known.len() == 2 && known.contains(&place.unwrap()));
        }
        repository.replace_index(index);
        memory.tamper(ObjectName::Pack(pack), |mut bytes| {
            bytes[PACK_HEADER_LEN + 200..][..4096].fill(7);
            Some(bytes)
        });
        let read = |at: usize| reader.read(ChunkKind::Data, ids[at]).unwrap().to_vec();
        assert!(read(0) == contents[0] && read(99) == contents[99]);
        let reuse = reader.known(ChunkKind::Data, &ids).unwrap();
        assert!(reuse[0].is_some_and(|other| other != pack), "what was met as bad is not relied on");
        assert!(reuse.iter().all(Option::is_some));
    }
}

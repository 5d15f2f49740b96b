//! Index segments for one who goes through all of them several times.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::Repository;
use crate::error::Result;
use crate::format::pack::FrameEntry;
use crate::format::segment::Segment;
use crate::id::SegmentId;

/// So many bytes of decoded segments are kept: those of about 300,000 chunks.
const MAX_LEN: usize = 16 << 20;

/// Segments that were read and decoded before: their content is what their name says, so that none of them has to be read
/// twice. Of a larger repository nothing is kept: all of its segments are met before one of them is met again.
#[derive(Debug)]
pub struct SegmentCache<'a> {
    repository: &'a Repository,
    max_len: usize,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    segments: HashMap<SegmentId, Arc<Segment>>,
    /// Bytes in memory.
    len: usize,
    is_full: bool,
}

impl<'a> SegmentCache<'a> {
    /// Returns one that is empty.
    pub fn new(repository: &'a Repository) -> Self {
        Self { repository, max_len: MAX_LEN, kept: Mutex::default() }
    }

    /// Returns one that stays empty, for one who goes through all segments once.
    pub fn passing(repository: &'a Repository) -> Self {
        Self { max_len: 0, ..Self::new(repository) }
    }

    /// Returns the repository whose segments these are.
    pub fn repository(&self) -> &'a Repository {
        self.repository
    }

    /// Returns a segment. Whether it is still listed is for the caller to know.
    ///
    /// # Errors
    /// As [`Repository::load_segment`].
    pub fn load(&self, id: SegmentId) -> Result<Arc<Segment>> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(segment) = kept.segments.get(&id) {
            return Ok(Arc::clone(segment));
        }
        let segment = Arc::new(self.repository.load_segment(id)?);
        let len = len_in_memory(&segment);
        kept.is_full |= kept.len + len > self.max_len;
        if kept.is_full {
            kept.segments = HashMap::new();
        } else {
            kept.len += len;
            kept.segments.insert(id, Arc::clone(&segment));
        }
        Ok(segment)
    }
}

fn len_in_memory(segment: &Segment) -> usize {
    let frames: usize = segment.packs.iter().map(|pack| pack.frames.len()).sum();
    size_of_val(segment)
        + size_of_val(segment.packs.as_slice())
        + size_of_val(segment.chunks.as_slice())
        + frames * size_of::<FrameEntry>()
}

#[cfg(test)]
mod tests {
    use super::super::{CreateOptions, Environment};
    use super::*;
    use crate::error::Error;
    use crate::format::name::ObjectName;
    use crate::format::node::ChunkKind;
    use crate::format::pack::PackKind;
    use crate::format::segment::{SegmentChunk, SegmentPack};
    use crate::id::{ChunkId, PackId, SessionId};
    use crate::repo::writer::put_segment;
    use crate::storage::Storage;
    use crate::storage::memory::MemoryStorage;

    /// Puts a segment of so many chunks.
    fn put(repository: &Repository, number: u32, count: u8) -> SegmentId {
        let frame = FrameEntry { offset: 0, stored_len: 1, raw_len: 1 };
        let (id, kind) = (PackId::from_bytes([1; 32]), PackKind::Data);
        let pack = SegmentPack { id, kind, stored_len: 100, frames: vec![frame] };
        let chunk = |no: u8| SegmentChunk {
            id: ChunkId::from_bytes([no; 32]),
            kind: ChunkKind::Data,
            pack: 0,
            frame: 0,
            offset: 0,
            len: 1,
        };
        let owner = SessionId::from_bytes([2; 16]);
        put_segment(repository, owner, number, vec![pack], (0..count).map(chunk).collect()).unwrap().0
    }

    #[test]
    fn few_segments_are_read_once_and_of_many_none_is_kept() {
        let storage = MemoryStorage::new();
        let environment = Environment::of_a_test();
        let repository =
            Repository::create(Box::new(storage.clone()), &CreateOptions::default(), &environment).unwrap();
        let ids: Vec<SegmentId> = (0..3).map(|number| put(&repository, number, 40)).collect();
        let len = 3 * len_in_memory(&repository.load_segment(ids[0]).unwrap());
        assert!(len > 3 * 40 * size_of::<SegmentChunk>());
        let few = SegmentCache { max_len: len, ..SegmentCache::new(&repository) };
        let many = SegmentCache { max_len: len - 1, ..SegmentCache::new(&repository) };
        for id in &ids {
            assert_eq!(*few.load(*id).unwrap(), repository.load_segment(*id).unwrap());
            assert_eq!(many.load(*id).unwrap().chunks.len(), 40);
        }
        for id in &ids {
            storage.delete(ObjectName::Segment(*id)).unwrap();
            assert_eq!(few.load(*id).unwrap().chunks.len(), 40);
            assert!(matches!(many.load(*id), Err(Error::NotFound { .. })));
        }
        let kept = many.kept.into_inner().unwrap();
        assert!(kept.segments.is_empty() && kept.is_full);
    }
}

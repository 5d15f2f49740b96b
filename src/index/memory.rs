//! An index that lives as long as the process.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use super::{Index, Location, locate};
use crate::error::Result;
use crate::format::segment::Segment;
use crate::id::{ChunkId, SegmentId, SessionId};

/// For commands without a cache directory, for tests, and where the index on disk is no help: about 150 bytes of
/// memory per chunk.
#[derive(Debug, Default)]
pub struct MemoryIndex(RwLock<Known>);

#[derive(Debug, Default)]
struct Known {
    segments: HashMap<SegmentId, SessionId>,
    chunks: HashMap<ChunkId, Vec<Location>>,
}

impl Index for MemoryIndex {
    fn applied(&self) -> Result<HashMap<SegmentId, SessionId>> {
        Ok(self.0.read().unwrap_or_else(PoisonError::into_inner).segments.clone())
    }

    fn apply(&self, segments: &[(SegmentId, Segment)]) -> Result<()> {
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for (id, segment) in segments {
            if known.segments.insert(*id, segment.owner).is_some() {
                continue;
            }
            for chunk in &segment.chunks {
                let Some(location) = locate(segment, chunk) else { continue };
                // nearly all have one, and a list that grows begins with four
                let places = known.chunks.entry(chunk.id).or_insert_with(|| Vec::with_capacity(1));
                match places.iter_mut().find(|place| place.pack == location.pack) {
                    Some(place) => *place = location,
                    None => places.push(location),
                }
            }
        }
        Ok(())
    }

    fn clear(&self) -> Result<()> {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Known::default();
        Ok(())
    }

    fn lookup(&self, ids: &[ChunkId]) -> Result<Vec<Vec<Location>>> {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        Ok(ids.iter().map(|id| known.chunks.get(id).cloned().unwrap_or_default()).collect())
    }
}

//! The local index: where each chunk is. A cache on the user's machine, built from the index segments of the
//! repository; whatever happens to it, only speed suffers.
//!
//! An index answers with hints. What it names may have been pruned since, so callers check every location
//! against what the repository says now.

mod memory;
#[cfg(feature = "rocksdb")]
mod rocks;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt::Debug;
use std::path::Path;

pub use memory::MemoryIndex;

use crate::error::Result;
use crate::format::node::ChunkKind;
use crate::format::pack::FrameEntry;
use crate::format::segment::{Segment, SegmentChunk};
use crate::id::{ChunkId, PackId, RepositoryId, SegmentId, SessionId};
use crate::monitor::Monitor;

/// Chunks of segments that are applied together: enough for long sorted runs, about 40 MiB of memory.
const GROUP_CHUNKS: usize = 256 * 1024;

/// One place of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    pub pack: PackId,
    pub frame: FrameEntry,
    pub kind: ChunkKind,
    /// First byte in the frame's plaintext.
    pub offset: u32,
    /// Bytes of plaintext.
    pub len: u32,
}

/// Finds chunks. Shared by threads.
pub trait Index: Send + Sync + Debug {
    /// Returns the segments whose chunks are in the index, with their owners.
    ///
    /// # Errors
    /// The index cannot be read.
    fn applied(&self) -> Result<HashMap<SegmentId, SessionId>>;

    /// Adds the chunks of segments; all of a segment or nothing of it counts as applied. Doing it again
    /// changes nothing.
    ///
    /// # Errors
    /// The index cannot be written.
    fn apply(&self, segments: &[(SegmentId, Segment)]) -> Result<()>;

    /// Forgets everything.
    ///
    /// # Errors
    /// The index cannot be written.
    fn clear(&self) -> Result<()>;

    /// Returns the known places of each chunk, in the order asked; none where the chunk is not known.
    ///
    /// # Errors
    /// The index cannot be read.
    fn lookup(&self, ids: &[ChunkId]) -> Result<Vec<Vec<Location>>>;
}

/// An index, and what there is to say about how it came to be.
#[derive(Debug)]
pub struct OpenedIndex {
    pub index: Box<dyn Index>,
    /// For an interested user: why it is rebuilt, or is in memory only.
    pub notes: Vec<String>,
}

/// Opens the index of a repository below `cache_dir`, in a folder of the repository's id. Never fails: an index
/// that is broken is deleted, and where none can be kept there is one in memory.
pub fn open_index(cache_dir: Option<&Path>, repository: RepositoryId) -> OpenedIndex {
    let in_memory = |notes| OpenedIndex { index: Box::new(MemoryIndex::default()), notes };
    #[cfg(feature = "rocksdb")]
    if let Some(dir) = cache_dir {
        let dir = dir.join(repository.to_hex()).join("index");
        let mut notes = Vec::new();
        return match rocks::RocksIndex::open(&dir, repository, &mut notes) {
            Ok(index) => OpenedIndex { index: Box::new(index), notes },
            Err(error) => {
                let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
                notes.push(format!("{error}{}; it is built in memory", cause.unwrap_or_default()));
                in_memory(notes)
            }
        };
    }
    let _ = (cache_dir, repository);
    in_memory(Vec::new())
}

/// Brings an index up to date: applies the segments of `listed` that it lacks, as far as `load` returns them (it
/// returns none for those that do not count), and begins anew if it has some that are gone, or whose owners `counts` does
/// not take for committed any more; `before_clear` is called when it does.
///
/// # Errors
/// Those of the index and of `load`; [`crate::error::Error::Cancelled`].
pub fn synchronize(
    index: &dyn Index,
    listed: &[SegmentId],
    counts: &dyn Fn(SessionId) -> bool,
    load: &mut dyn FnMut(SegmentId) -> Result<Option<Segment>>,
    before_clear: &mut dyn FnMut(),
    monitor: &dyn Monitor,
) -> Result<()> {
    let mut applied = index.applied()?;
    if !is_within(&applied, listed, counts) {
        before_clear();
        index.clear()?;
        applied.clear();
    }
    let mut group = Vec::new();
    let mut chunks = 0;
    for id in listed.iter().filter(|id| !applied.contains_key(id)) {
        monitor.check()?;
        let Some(segment) = load(*id)? else { continue };
        chunks += segment.chunks.len();
        group.push((*id, segment));
        if chunks >= GROUP_CHUNKS {
            index.apply(&group)?;
            group.clear();
            chunks = 0;
        }
    }
    if group.is_empty() { Ok(()) } else { index.apply(&group) }
}

/// Returns true if the index has no segments but those of `listed`, each of them named once, and `counts` takes their owners
/// for committed.
fn is_within(
    applied: &HashMap<SegmentId, SessionId>,
    listed: &[SegmentId],
    counts: &dyn Fn(SessionId) -> bool,
) -> bool {
    let present = listed.iter().filter(|id| applied.contains_key(id)).count();
    present == applied.len() && applied.values().all(|owner| counts(*owner))
}

/// Returns where a chunk of a segment is; none if the segment contradicts itself, which a decoded one does not.
pub fn locate(segment: &Segment, chunk: &SegmentChunk) -> Option<Location> {
    let pack = segment.packs.get(chunk.pack as usize)?;
    let frame = *pack.frames.get(chunk.frame as usize)?;
    Some(Location { pack: pack.id, frame, kind: chunk.kind, offset: chunk.offset, len: chunk.len })
}

//! The index of last resort: of everything that can be found at all, for whoever misses a chunk.
//!
//! In a large repository it is large too, and one damaged chunk is enough to need it: then it is made on disk, beside the
//! local index, and goes with the process.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use tempfile::TempDir;

use super::Repository;
use crate::error::{Error, Result};
use crate::format::name::{Folder, ObjectName};
use crate::id::{ChunkId, PackId, RepositoryId};
use crate::index::{Index, Location, open_index};
use crate::monitor::Monitor;
use crate::storage::Listed;

/// Bytes of segments up to which it is made in memory: about 400,000 chunks.
const MAX_IN_MEMORY: u64 = 16 << 20;
/// What the names of its folders begin with; the id of their process comes then.
const PREFIX: &str = "last-resort-";

/// An index that is not kept.
#[derive(Debug)]
pub(super) struct LastResort {
    index: Box<dyn Index>,
    /// Removed when the index is closed.
    _folder: Option<TempDir>,
}

impl LastResort {
    pub(super) fn lookup(&self, ids: &[ChunkId]) -> Result<Vec<Vec<Location>>> {
        self.index.lookup(ids)
    }
}

/// Makes a folder of this process, and removes those of processes that were killed.
fn make_folder(parent: &Path) -> std::io::Result<TempDir> {
    fs::create_dir_all(parent)?;
    for entry in fs::read_dir(parent)?.filter_map(std::result::Result::ok) {
        let name = entry.file_name();
        let process =
            name.to_str().and_then(|name| name.strip_prefix(PREFIX)).and_then(|id| id.split('.').next());
        if process.is_some_and(|id| !Path::new("/proc").join(id).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    // several readers of one process have one each
    tempfile::Builder::new().prefix(&format!("{PREFIX}{}.", std::process::id())).tempdir_in(parent)
}

/// Opens an empty index, on disk where there is a place for it.
fn open(cache_dir: Option<&Path>, repository: RepositoryId) -> LastResort {
    let folder = cache_dir.and_then(|dir| make_folder(&dir.join(repository.to_hex())).ok());
    let index = open_index(folder.as_ref().map(TempDir::path), repository).index;
    LastResort { index, _folder: folder }
}

impl Repository {
    /// Builds an index of everything that can be found at all: segments whatever became of their owners,
    /// and the tables of packs that no segment speaks of. Good enough to read, since every chunk is checked
    /// against its id; never good enough to rely on in a new point.
    ///
    /// # Errors
    /// A failed listing, or a storage that fails for a reason other than a bad object.
    pub(super) fn index_of_last_resort(&self, monitor: &dyn Monitor) -> Result<LastResort> {
        let segments = self.storage().list(Folder::Segments)?;
        let is_large = segments.iter().map(|listed| listed.len).sum::<u64>() > MAX_IN_MEMORY;
        if is_large && self.cache_dir.is_some() {
            match self.fill_last_resort(open(self.cache_dir.as_deref(), self.id()), &segments, monitor) {
                // the disk may have no room for it
                Err(error) if !matches!(error, Error::Cancelled) => {
                    monitor.note(&format!("looking for what is lost in memory: {error}"));
                }
                filled => return filled,
            }
        }
        self.fill_last_resort(open(None, self.id()), &segments, monitor)
    }

    fn fill_last_resort(
        &self,
        resort: LastResort,
        segments: &[Listed],
        monitor: &dyn Monitor,
    ) -> Result<LastResort> {
        let mut spoken_of: HashSet<PackId> = HashSet::new();
        for listed in segments {
            let ObjectName::Segment(id) = listed.name else { continue };
            match self.load_segment(id) {
                Ok(segment) => {
                    spoken_of.extend(segment.packs.iter().map(|pack| pack.id));
                    resort.index.apply(&[(id, segment)])?;
                }
                Err(Error::NotFound { .. }) => {}
                Err(error) if self.is_of_object(&error) => {}
                Err(error) => return Err(error),
            }
        }
        let listed = self.storage().list(Folder::Packs)?;
        let packs = listed.iter().filter_map(|listed| match listed.name {
            ObjectName::Pack(id) if !spoken_of.contains(&id) => Some((id, listed.len)),
            _ => None,
        });
        self.index_tables(resort.index.as_ref(), packs, monitor)?;
        Ok(resort)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_killed_processes_go_and_those_of_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let (dead, alive, other) = ("last-resort-4294967295.a", "last-resort-1.b", "index");
        for name in [dead, alive, other] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let folder = make_folder(dir.path()).unwrap();
        let second = make_folder(dir.path()).unwrap();
        assert!(folder.path().exists() && second.path().exists() && folder.path() != second.path());
        drop((folder, second));
        let mut left: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort_unstable();
        assert_eq!(left, [other, alive]);
    }

    #[test]
    fn it_is_found_on_disk_and_in_memory() {
        use crate::format::pack::{FrameEntry, PackKind};
        use crate::format::segment::{Segment, SegmentChunk, SegmentPack};
        use crate::id::{SegmentId, SessionId};

        let dir = tempfile::tempdir().unwrap();
        let id = ChunkId::from_bytes([7; 32]);
        let frames = vec![FrameEntry { offset: 64, stored_len: 100, raw_len: 100 }];
        let kind = PackKind::Data;
        let pack = SegmentPack { id: PackId::from_bytes([1; 32]), kind, stored_len: 1000, frames };
        let kind = crate::format::node::ChunkKind::Data;
        let chunk = SegmentChunk { id, kind, pack: 0, frame: 0, offset: 3, len: 5 };
        let owner = SessionId::from_bytes([2; 16]);
        let segment = Segment { owner, number: 0, packs: vec![pack], chunks: vec![chunk] };
        for cache in [None, Some(dir.path())] {
            let resort = open(cache, RepositoryId::from_bytes([3; 16]));
            resort.index.apply(&[(SegmentId::from_bytes([4; 32]), segment.clone())]).unwrap();
            assert_eq!(resort.lookup(&[id]).unwrap()[0].len(), 1);
        }
        let below = dir.path().join(RepositoryId::from_bytes([3; 16]).to_hex());
        assert_eq!(fs::read_dir(below).unwrap().count(), 0, "nothing is left of it");
    }
}

//! Which chunks points need and have too few good copies of, as far as is recorded.

use std::collections::{HashMap, HashSet};

use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::codec;
use crate::format::limits::MAX_CHUNK_LEN;
use crate::format::node::ChunkKind;
use crate::format::point::PointRecord;
use crate::id::{ChunkId, PackId};
use crate::manifest::{EntryRef, NodeAt, Visitor, walk};
use crate::monitor::Monitor;
use crate::repo::Repository;
use crate::repo::reader::ChunkReader;

/// Entries that are looked up together.
const BATCH_ENTRIES: usize = 1024;
/// So many places on disks are kept of one chunk.
const MAX_PLACES: usize = 8;

/// A chunk that lacks copies.
#[derive(Debug, Clone)]
pub(super) struct Lack {
    pub kind: ChunkKind,
    /// Where on a disk all of its content stood: first byte and length. For data only.
    pub places: Vec<ByteRange>,
    /// Content of point records is known without reading.
    pub content: Option<Vec<u8>>,
}

/// Chunks that lack copies.
#[derive(Debug, Default)]
pub(super) struct Lacking {
    pub chunks: HashMap<ChunkId, Lack>,
    /// Nodes that cannot be read at all: what is below them is not known.
    pub unreadable_nodes: u64,
}

/// Walks points.
///
/// # Errors
/// Those of the storage; [`Error::Cancelled`].
pub(super) fn find(
    repository: &Repository,
    reader: &ChunkReader<'_>,
    points: &[&PointRecord],
    monitor: &dyn Monitor,
) -> Result<Lacking> {
    let mut finder =
        Finder { reader, monitor, seen: HashSet::new(), pending: Vec::new(), lacking: Lacking::default() };
    for record in points {
        for manifest in record.manifests() {
            match walk(repository.geometry(), manifest, reader, &mut finder) {
                Ok(()) | Err(Error::Malformed { .. }) => {}
                Err(error) => return Err(error),
            }
            finder.look_up()?;
        }
        let copy = codec::encode(*record)
            .map_err(|fault| Error::malformed(format!("the record of point {}", record.id), fault))?;
        for part in copy.chunks(MAX_CHUNK_LEN as usize) {
            let id = repository.hasher().chunk_id(ChunkKind::Point, part);
            finder.metadata(id, ChunkKind::Point, Some(part))?;
        }
    }
    Ok(finder.lacking)
}

struct Finder<'a, 'r> {
    reader: &'a ChunkReader<'r>,
    monitor: &'a dyn Monitor,
    seen: HashSet<ChunkId>,
    pending: Vec<(ByteRange, ChunkId, u32)>,
    lacking: Lacking,
}

impl Finder<'_, '_> {
    fn metadata(&mut self, id: ChunkId, kind: ChunkKind, content: Option<&[u8]>) -> Result<()> {
        let places = self.reader.locate(&[id])?.pop().unwrap_or_default();
        let view = self.reader.view();
        let good: HashSet<PackId> =
            places.iter().filter(|place| view.is_good(&id, place)).map(|place| place.pack).collect();
        if good.len() < 2 {
            let lack = Lack { kind, places: Vec::new(), content: content.map(<[u8]>::to_vec) };
            self.lacking.chunks.insert(id, lack);
        }
        Ok(())
    }

    fn look_up(&mut self) -> Result<()> {
        self.monitor.check()?;
        let pending = std::mem::take(&mut self.pending);
        let ids: Vec<ChunkId> = pending.iter().map(|(_, id, _)| *id).collect();
        for ((range, id, offset), places) in pending.into_iter().zip(self.reader.locate(&ids)?) {
            if places.iter().any(|place| self.reader.view().is_good(&id, place)) {
                continue;
            }
            // the length that a segment states; without one, the entry may be all of the chunk
            let len = places.first().map_or(range.len(), |place| u64::from(place.len));
            let start = range.start().checked_sub(u64::from(offset));
            let place = start.and_then(|start| ByteRange::new(start, len));
            let lack = self.lacking.chunks.entry(id).or_insert(Lack {
                kind: ChunkKind::Data,
                places: Vec::new(),
                content: None,
            });
            if let Some(place) = place.filter(|_| lack.places.len() < MAX_PLACES)
                && !lack.places.contains(&place)
            {
                lack.places.push(place);
            }
        }
        Ok(())
    }
}

impl Visitor for Finder<'_, '_> {
    fn node(&mut self, node: NodeAt) -> Result<bool> {
        self.monitor.check()?;
        if !self.seen.insert(node.id) {
            return Ok(false);
        }
        self.metadata(node.id, ChunkKind::Node, None)?;
        Ok(true)
    }

    fn entry(&mut self, range: ByteRange, entry: EntryRef) -> Result<()> {
        if let EntryRef::Chunk { id, offset } = entry {
            self.pending.push((range, id, offset));
            if self.pending.len() >= BATCH_ENTRIES {
                return self.look_up();
            }
        }
        Ok(())
    }

    fn fault(&mut self, node: NodeAt, error: Error) -> Result<()> {
        if matches!(error, Error::Cancelled) {
            return Err(error);
        }
        self.lacking.unreadable_nodes += 1;
        let lack = Lack { kind: ChunkKind::Node, places: Vec::new(), content: None };
        self.lacking.chunks.entry(node.id).or_insert(lack);
        Ok(())
    }
}

//! What the points reach: every chunk that may not be lost.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::codec;
use crate::format::limits::MAX_CHUNK_LEN;
use crate::format::node::ChunkKind;
use crate::format::point::PointRecord;
use crate::id::ChunkId;
use crate::manifest::{EntryRef, NodeAt, Visitor, walk};
use crate::monitor::Monitor;
use crate::repo::Repository;
use crate::repo::reader::ChunkReader;

/// The first half of a chunk id. Two ids that share it only keep one another alive.
type Key = u128;

/// How many copies of a chunk there have to be, and how many were found.
#[derive(Debug, Clone, Copy)]
struct Need {
    wanted: u8,
    found: u8,
}

/// Live chunks, about 30 bytes each.
#[derive(Debug, Default)]
pub(super) struct Live {
    chunks: HashMap<Key, Need>,
}

fn key(id: &ChunkId) -> Key {
    let bytes = id.as_bytes();
    let mut half = [0; 16];
    half.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    Key::from_le_bytes(half)
}

impl Live {
    /// Walks the manifests of points.
    ///
    /// # Errors
    /// Any node that cannot be read: what is below it is not known, so nothing may be deleted.
    pub(super) fn of<'p>(
        repository: &Repository,
        reader: &ChunkReader<'_>,
        points: impl Iterator<Item = &'p PointRecord>,
        monitor: &dyn Monitor,
    ) -> Result<Self> {
        let mut live = Self::default();
        for record in points {
            for manifest in record.manifests() {
                let mut collector = Collector { live: &mut live, monitor };
                walk(repository.geometry(), manifest, reader, &mut collector)?;
            }
            let copy = codec::encode(record)
                .map_err(|fault| Error::malformed(format!("the record of point {}", record.id), fault))?;
            for part in copy.chunks(MAX_CHUNK_LEN as usize) {
                live.add(&repository.hasher().chunk_id(ChunkKind::Point, part), 2);
            }
        }
        Ok(live)
    }

    fn add(&mut self, id: &ChunkId, wanted: u8) -> bool {
        self.chunks.insert(key(id), Need { wanted, found: 0 }).is_none()
    }

    pub(super) fn len(&self) -> usize {
        self.chunks.len()
    }

    /// Notes a good copy of a chunk. Returns true if it was needed: live, and not there often enough yet.
    pub(super) fn found(&mut self, id: &ChunkId) -> bool {
        match self.chunks.get_mut(&key(id)) {
            Some(need) if need.found < need.wanted => {
                need.found += 1;
                true
            }
            _ => false,
        }
    }

    /// Returns true if a chunk is live and still has fewer copies than it should.
    pub(super) fn lacks(&self, id: &ChunkId) -> bool {
        self.chunks.get(&key(id)).is_some_and(|need| need.found < need.wanted)
    }

    /// Notes that a chunk was written as often as it should be.
    pub(super) fn settle(&mut self, id: &ChunkId) {
        if let Some(need) = self.chunks.get_mut(&key(id)) {
            need.found = need.wanted;
        }
    }

    /// Returns how many live chunks were not found at all.
    pub(super) fn missing(&self) -> usize {
        self.chunks.values().filter(|need| need.found == 0).count()
    }

    /// Forgets what was found.
    pub(super) fn recount(&mut self) {
        self.chunks.values_mut().for_each(|need| need.found = 0);
    }
}

struct Collector<'a> {
    live: &'a mut Live,
    monitor: &'a dyn Monitor,
}

impl Visitor for Collector<'_> {
    fn node(&mut self, node: NodeAt) -> Result<bool> {
        self.monitor.check()?;
        Ok(self.live.add(&node.id, 2))
    }

    fn entry(&mut self, _range: ByteRange, entry: EntryRef) -> Result<()> {
        if let EntryRef::Chunk { id, .. } = entry {
            self.live.add(&id, 1);
        }
        Ok(())
    }
}

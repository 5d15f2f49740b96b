//! What the points reach: every chunk that may not be lost.

use std::collections::HashSet;

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
type Key = [u8; 16];

/// New ids are collected before they are put in their place: at least so many, or a quarter of those known.
const MIN_BATCH: usize = 1 << 18;

/// A live chunk: 17 bytes. The low half of the last byte counts copies that were found, the high half those wanted.
#[derive(Debug, Clone, Copy)]
struct Entry {
    key: Key,
    copies: u8,
}

impl Entry {
    fn wanted(self) -> u8 {
        self.copies >> 4
    }

    fn found(self) -> u8 {
        self.copies & 0xf
    }
}

/// Live chunks, about 22 bytes each while they are collected, 17 then.
#[derive(Debug, Default)]
pub(super) struct Live {
    /// Sorted and unique, once nothing is collected any more.
    entries: Vec<Entry>,
    /// So many of `entries` are sorted and unique.
    sorted: usize,
    /// Where the entries of each first two bytes begin; ids are spread evenly.
    starts: Vec<usize>,
}

fn key(id: &ChunkId) -> Key {
    let mut half = [0; 16];
    half.iter_mut().zip(id.as_bytes()).for_each(|(to, from)| *to = *from);
    half
}

fn bucket(key: &Key) -> usize {
    let [first, second, ..] = *key;
    usize::from(u16::from_be_bytes([first, second]))
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
        let mut nodes = HashSet::new();
        for record in points {
            for manifest in record.manifests() {
                let mut collector = Collector { live: &mut live, nodes: &mut nodes, monitor };
                walk(repository.geometry(), manifest, reader, &mut collector)?;
            }
            for (id, _) in record_copy(repository, record)? {
                live.add(&id, 2);
            }
        }
        live.settle_order();
        Ok(live)
    }

    fn add(&mut self, id: &ChunkId, wanted: u8) {
        let batch = MIN_BATCH.max(self.sorted / 4);
        if self.entries.len() - self.sorted >= batch {
            self.sort();
        }
        if self.entries.len() == self.entries.capacity() {
            // not twice as much at once: this is what prune's memory is
            self.entries.reserve_exact(batch);
        }
        self.entries.push(Entry { key: key(id), copies: wanted << 4 });
    }

    fn sort(&mut self) {
        // of a data chunk and a node with one key the node's need comes first
        self.entries.sort_unstable_by(|a, b| a.key.cmp(&b.key).then(b.copies.cmp(&a.copies)));
        self.entries.dedup_by_key(|entry| entry.key);
        self.sorted = self.entries.len();
    }

    fn settle_order(&mut self) {
        self.sort();
        self.entries.shrink_to_fit();
        let mut starts = Vec::with_capacity((1 << 16) + 1);
        for (at, entry) in self.entries.iter().enumerate() {
            let bucket = bucket(&entry.key);
            while starts.len() <= bucket {
                starts.push(at);
            }
        }
        starts.resize((1 << 16) + 1, self.entries.len());
        self.starts = starts;
    }

    fn entry(&mut self, id: &ChunkId) -> Option<&mut Entry> {
        let key = key(id);
        let bucket = bucket(&key);
        let range = *self.starts.get(bucket)?..*self.starts.get(bucket + 1)?;
        let within = self.entries.get_mut(range)?;
        let at = within.binary_search_by(|entry| entry.key.cmp(&key)).ok()?;
        within.get_mut(at)
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Notes a good copy of a chunk. Returns true if it was needed: live, and not there often enough yet.
    pub(super) fn found(&mut self, id: &ChunkId) -> bool {
        match self.entry(id) {
            Some(entry) if entry.found() < entry.wanted() => {
                entry.copies += 1;
                true
            }
            _ => false,
        }
    }

    /// Returns true if a chunk is live and still has fewer copies than it should.
    pub(super) fn lacks(&mut self, id: &ChunkId) -> bool {
        self.entry(id).is_some_and(|entry| entry.found() < entry.wanted())
    }

    /// Notes that a chunk was written as often as it should be.
    pub(super) fn settle(&mut self, id: &ChunkId) {
        if let Some(entry) = self.entry(id) {
            entry.copies = entry.wanted() << 4 | entry.wanted();
        }
    }

    /// Returns how many live chunks were not found at all.
    pub(super) fn missing(&self) -> usize {
        self.entries.iter().filter(|entry| entry.found() == 0).count()
    }

    /// Forgets what was found.
    pub(super) fn recount(&mut self) {
        self.entries.iter_mut().for_each(|entry| entry.copies &= 0xf0);
    }
}

/// Returns the chunks of the copy of its record that a point keeps among the metadata.
pub(super) fn record_copy(repository: &Repository, record: &PointRecord) -> Result<Vec<(ChunkId, Vec<u8>)>> {
    let copy = codec::encode(record)
        .map_err(|fault| Error::malformed(format!("the record of point {}", record.id), fault))?;
    let part = |part: &[u8]| (repository.hasher().chunk_id(ChunkKind::Point, part), part.to_vec());
    Ok(copy.chunks(MAX_CHUNK_LEN as usize).map(part).collect())
}

struct Collector<'a> {
    live: &'a mut Live,
    /// Nodes that were walked: one in about thirty chunks.
    nodes: &'a mut HashSet<Key>,
    monitor: &'a dyn Monitor,
}

impl Visitor for Collector<'_> {
    fn node(&mut self, node: NodeAt) -> Result<bool> {
        self.monitor.check()?;
        let is_new = self.nodes.insert(key(&node.id));
        if is_new {
            self.live.add(&node.id, 2);
        }
        Ok(is_new)
    }

    fn entry(&mut self, _range: ByteRange, entry: EntryRef) -> Result<()> {
        if let EntryRef::Chunk { id, .. } = entry {
            self.live.add(&id, 1);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u64) -> ChunkId {
        ChunkId::from_bytes(*blake3::hash(&number.to_le_bytes()).as_bytes())
    }

    #[test]
    fn copies_are_counted_and_memory_is_bounded() {
        let mut live = Live::default();
        let count = 1_500_000;
        let mut most = 0;
        for number in 0..count {
            live.add(&id(number), 1 + u8::from(number % 30 == 0));
            live.add(&id(number / 2), 1);
            most = most.max(live.entries.capacity() * size_of::<Entry>() / (live.sorted + MIN_BATCH));
        }
        live.settle_order();
        assert_eq!(live.len(), count as usize);
        let bytes = live.entries.capacity() * size_of::<Entry>();
        assert!(bytes as u64 <= 17 * count && most <= 40, "{bytes} bytes, {most} a chunk at most");
        assert!(live.lacks(&id(7)) && live.found(&id(7)) && !live.found(&id(7)) && !live.lacks(&id(7)));
        assert!(live.found(&id(30)) && live.lacks(&id(30)) && live.found(&id(30)) && !live.lacks(&id(30)));
        assert!(!live.lacks(&id(count)) && !live.found(&id(count)));
        live.settle(&id(60));
        assert!(!live.lacks(&id(60)));
        assert_eq!(live.missing(), count as usize - 3);
        live.recount();
        assert_eq!(live.missing(), count as usize);
    }
}

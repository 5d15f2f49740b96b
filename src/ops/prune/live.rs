//! What the points reach: every chunk that may not be lost.

use std::cmp::Ordering;
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

/// Bytes of a chunk id that are kept, but for the low bits of the last one.
const KEY_LEN: usize = 12;
/// The low bits of an entry's last byte: its state.
const STATE: u8 = 0x1f;
/// Bits of the state: copies that were found, copies that are wanted (at least one), and whether the node was walked.
const FOUND: u8 = 0x03;
const WANTED: u8 = 0x0c;
const WANTED_SHIFT: u32 = 2;
const WALKED: u8 = 0x10;

/// The first 91 bits of a chunk id, as a number. Of a dead and a live chunk that share them the copies could be taken for
/// one another's: of a thousand million chunks (20 TiB of content) the chance that any two do is one in 5,000 million.
type Key = u128;

/// New ids are collected before they are put in their place: a quarter as many as are known, but at least and at most so
/// many, or of very many known ones this part.
const MIN_BATCH: usize = 1 << 18;
const MAX_BATCH: usize = 1 << 20;
const LEAST_PART: usize = 32;

/// A live chunk: its key, and its state.
#[derive(Debug, Clone, Copy, Default)]
struct Entry([u8; KEY_LEN]);

impl Entry {
    fn new(id: &ChunkId, wanted: u8) -> Self {
        let mut bytes = front(id);
        let [.., last] = &mut bytes;
        *last = *last & !STATE | wanted << WANTED_SHIFT & WANTED;
        Self(bytes)
    }

    fn key(self) -> Key {
        number(self.0)
    }

    fn state(self) -> u8 {
        let [.., last] = self.0;
        last & STATE
    }

    fn set(&mut self, mask: u8, value: u8) {
        let [.., last] = &mut self.0;
        *last = *last & !mask | value;
    }

    fn wanted(self) -> u8 {
        (self.state() & WANTED) >> WANTED_SHIFT
    }

    fn found(self) -> u8 {
        self.state() & FOUND
    }

    /// Entries stand in this order: of a data chunk and a node with one key the node's need comes first.
    fn order(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key()).then(other.wanted().cmp(&self.wanted()))
    }
}

/// Live chunks, 12 bytes each; up to 25 MiB more while they are collected, of very many a sixteenth more.
#[derive(Debug, Default)]
pub(super) struct Live {
    /// Sorted and unique, once nothing is collected any more.
    entries: Vec<Entry>,
    /// So many of `entries` are sorted and unique.
    sorted: usize,
    /// Where the entries of each first two bytes begin; ids are spread evenly.
    starts: Vec<usize>,
    /// `None` before they are counted.
    wanting: Option<Wanting>,
}

/// How many chunks have fewer copies than they should.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Wanting {
    data: usize,
    metadata: usize,
}

impl Wanting {
    fn of(&mut self, entry: Entry) -> &mut usize {
        if entry.wanted() == 1 { &mut self.data } else { &mut self.metadata }
    }
}

fn front(id: &ChunkId) -> [u8; KEY_LEN] {
    let mut front = [0; KEY_LEN];
    front.iter_mut().zip(id.as_bytes()).for_each(|(to, from)| *to = *from);
    front
}

/// Numbers compare faster than bytes do.
fn number(front: [u8; KEY_LEN]) -> Key {
    let mut bytes = [0; size_of::<Key>()];
    if let Some(end) = bytes.last_chunk_mut() {
        *end = front;
    }
    Key::from_be_bytes(bytes) & !Key::from(STATE)
}

fn key(id: &ChunkId) -> Key {
    number(front(id))
}

fn bucket(key: Key) -> usize {
    (key >> (8 * (KEY_LEN - 2))) as usize
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
        let mut nodes: HashSet<[u8; KEY_LEN]> = HashSet::new();
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
        let batch = (self.sorted / 4).clamp(MIN_BATCH, MAX_BATCH.max(self.sorted / LEAST_PART));
        if self.entries.len() - self.sorted >= batch {
            self.sort();
        }
        if self.entries.len() == self.entries.capacity() {
            // not twice as much at once: this is what prune's memory is
            self.entries.reserve_exact(batch);
        }
        self.entries.push(Entry::new(id, wanted));
    }

    /// Puts what was collected in its place, from the end on.
    fn sort(&mut self) {
        let mut new = self.entries.split_off(self.sorted);
        new.sort_unstable_by(Entry::order);
        let (mut old_len, mut len) = (self.entries.len(), self.entries.len() + new.len());
        self.entries.resize(len, Entry::default());
        while let Some(last) = new.last().copied() {
            let old = old_len.checked_sub(1).and_then(|at| self.entries.get(at)).copied();
            let entry = match old.filter(|old| old.order(&last) == Ordering::Greater) {
                Some(old) => {
                    old_len -= 1;
                    old
                }
                None => {
                    new.pop();
                    last
                }
            };
            len -= 1;
            if let Some(place) = self.entries.get_mut(len) {
                *place = entry;
            }
        }
        self.entries.dedup_by_key(|entry| entry.key());
        self.sorted = self.entries.len();
    }

    fn settle_order(&mut self) {
        self.sort();
        self.entries.shrink_to_fit();
        let mut starts = Vec::with_capacity((1 << 16) + 1);
        for (at, entry) in self.entries.iter().enumerate() {
            let bucket = bucket(entry.key());
            while starts.len() <= bucket {
                starts.push(at);
            }
        }
        starts.resize((1 << 16) + 1, self.entries.len());
        self.starts = starts;
    }

    fn entry(&mut self, id: &ChunkId) -> Option<&mut Entry> {
        let key = key(id);
        let bucket = bucket(key);
        let range = *self.starts.get(bucket)?..*self.starts.get(bucket + 1)?;
        let within = self.entries.get_mut(range)?;
        let at = within.binary_search_by(|entry| entry.key().cmp(&key)).ok()?;
        within.get_mut(at)
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Notes a good copy of a chunk. Returns true if it was needed: live, and not there often enough yet.
    pub(super) fn found(&mut self, id: &ChunkId) -> bool {
        match self.entry(id) {
            Some(entry) if entry.found() < entry.wanted() => {
                entry.set(FOUND, entry.found() + 1);
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
        let Some(entry) = self.entry(id) else { return };
        let before = *entry;
        entry.set(FOUND, before.wanted());
        let was_wanting = before.found() < before.wanted();
        if let Some(wanting) = self.wanting.as_mut().filter(|_| was_wanting) {
            let wanting = wanting.of(before);
            *wanting = wanting.saturating_sub(1);
        }
    }

    /// Counts the chunks of which copies are wanting, once what is there was found; from then on `settle` counts. Returns
    /// how many there are.
    pub(super) fn count_wanting(&mut self) -> usize {
        let mut wanting = Wanting::default();
        for entry in self.entries.iter().filter(|entry| entry.found() < entry.wanted()) {
            *wanting.of(*entry) += 1;
        }
        self.wanting = Some(wanting);
        wanting.data + wanting.metadata
    }

    /// Returns true if copies of data chunks are wanting, or if that was not counted.
    pub(super) fn wants_data(&self) -> bool {
        self.wanting.is_none_or(|wanting| wanting.data > 0)
    }

    /// Returns true if copies of anything are wanting, or if that was not counted.
    pub(super) fn wants_any(&self) -> bool {
        self.wants_data() || self.wanting.is_none_or(|wanting| wanting.metadata > 0)
    }

    /// Notes that a live node was walked. Returns true for the first time.
    pub(super) fn walk(&mut self, id: &ChunkId) -> bool {
        self.entry(id).is_some_and(|entry| {
            let is_new = entry.state() & WALKED == 0;
            entry.set(WALKED, WALKED);
            is_new
        })
    }

    /// Returns how many live chunks were not found at all.
    pub(super) fn missing(&self) -> usize {
        self.entries.iter().filter(|entry| entry.found() == 0).count()
    }

    /// Forgets what was found.
    pub(super) fn recount(&mut self) {
        self.wanting = None;
        self.entries.iter_mut().for_each(|entry| entry.set(FOUND, 0));
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
    nodes: &'a mut HashSet<[u8; KEY_LEN]>,
    monitor: &'a dyn Monitor,
}

impl Visitor for Collector<'_> {
    fn node(&mut self, node: NodeAt) -> Result<bool> {
        self.monitor.check()?;
        let is_new = self.nodes.insert(front(&node.id));
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
        assert!(bytes as u64 <= 12 * count && most <= 24, "{bytes} bytes, {most} a chunk at most");
        assert!(live.lacks(&id(7)) && live.found(&id(7)) && !live.found(&id(7)) && !live.lacks(&id(7)));
        assert!(live.found(&id(30)) && live.lacks(&id(30)) && live.found(&id(30)) && !live.lacks(&id(30)));
        assert!(!live.lacks(&id(count)) && !live.found(&id(count)));
        live.settle(&id(60));
        assert!(!live.lacks(&id(60)));
        assert_eq!(live.missing(), count as usize - 3);
        live.recount();
        assert_eq!(live.missing(), count as usize);
        assert!(live.walk(&id(90)) && !live.walk(&id(90)) && live.lacks(&id(90)));
        assert!(!live.walk(&id(count)), "what is not live is not walked");
        assert!(live.entries.is_sorted_by_key(|entry| entry.key()));
    }

    /// Of 100 data chunks and 10 nodes, one of each is there as often as it should be, and one node once.
    #[test]
    fn what_copies_are_wanting_of_is_counted_down_once() {
        let mut live = Live::default();
        (0..100).for_each(|number| live.add(&id(number), 1));
        (100..110).for_each(|number| live.add(&id(number), 2));
        live.settle_order();
        assert!(live.wants_data() && live.wants_any(), "nothing was counted");
        for number in [0, 100, 100, 101] {
            assert!(live.found(&id(number)));
        }
        assert_eq!(live.count_wanting(), 108);
        assert_eq!(live.wanting, Some(Wanting { data: 99, metadata: 9 }));
        // what is there, what is not live, and one again and again
        [0, 100, 999, 50, 50, 50].iter().for_each(|number| live.settle(&id(*number)));
        assert_eq!(live.wanting, Some(Wanting { data: 98, metadata: 9 }));
        (0..99).for_each(|number| live.settle(&id(number)));
        assert!(live.wants_data());
        live.settle(&id(99));
        assert!(!live.wants_data() && live.wants_any());
        (102..110).for_each(|number| live.settle(&id(number)));
        assert!(live.wants_any(), "of a node the second copy");
        live.settle(&id(101));
        assert!(!live.wants_any() && live.count_wanting() == 0);
        live.recount();
        assert!(live.wants_data() && live.wants_any());
    }
}

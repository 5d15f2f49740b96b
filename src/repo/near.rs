//! The tables of packs of which much was asked for. Content stands in packs as it stood on the disk, and nodes as they were
//! made, so what is asked for next mostly stands in the same pack: found in its table, it costs no look-up in the index.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::view::View;
use crate::format::node::ChunkKind;
use crate::format::pack::PackTable;
use crate::id::{ChunkId, PackId};
use crate::index::Location;

/// Chunks that the tables of one reader have together; about 100 bytes each.
const MAX_CHUNKS: usize = 64 << 10;
/// Of one that spares memory: a long pack of nodes has 30,000.
const MAX_SPARING_CHUNKS: usize = 32 << 10;
/// Packs of which it is known how often they were met; 40 bytes each.
const MAX_MET_PACKS: usize = 4096;
/// A pack's table is read once so many of its chunks were looked up, and more of a long pack. By then the look-ups have
/// taken about as long as the table takes, so that at the worst it takes twice as long as without.
const MIN_MET: u64 = 32;
/// For so many stored bytes of a pack it has to be met once more, by what such a pack holds: a table of many small nodes
/// takes longer than one of few chunks.
const DATA_LEN_A_MEETING: u64 = 512 << 10;
const METADATA_LEN_A_MEETING: u64 = 32 << 10;

/// A table that is kept.
#[derive(Debug)]
struct Held {
    pack: PackId,
    table: PackTable,
    used: u64,
}

#[derive(Debug, Default)]
struct State {
    /// How often a pack was met that is not kept.
    met: HashMap<PackId, u64>,
    held: HashMap<u32, Held>,
    /// Which table a chunk is in, and where.
    chunks: HashMap<ChunkId, (u32, u32)>,
    clock: u64,
    next: u32,
}

/// Tables that were read lately. Shared by threads.
#[derive(Debug)]
pub(super) struct Near {
    state: Mutex<State>,
    limit: usize,
}

impl Near {
    pub(super) fn new(is_sparing: bool) -> Self {
        Self { state: Mutex::default(), limit: if is_sparing { MAX_SPARING_CHUNKS } else { MAX_CHUNKS } }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a place of each chunk, in the order asked, if one of the tables has one that `accept` agrees to.
    pub(super) fn find(
        &self,
        ids: &[ChunkId],
        accept: impl Fn(&ChunkId, &Location) -> bool,
    ) -> Vec<Option<Location>> {
        let mut state = self.state();
        if state.chunks.is_empty() {
            return vec![None; ids.len()];
        }
        ids.iter().map(|id| state.find(id).filter(|place| accept(id, place))).collect()
    }

    /// Notes where chunks were found by the index. Returns the packs whose tables are to be read.
    pub(super) fn meet<'l>(&self, places: impl Iterator<Item = &'l Location>, view: &View) -> Vec<PackId> {
        let mut state = self.state();
        let mut wanted = Vec::new();
        for place in places {
            if state.met.len() >= MAX_MET_PACKS {
                state.met.clear();
            }
            let stored_len = view.packs().get(&place.pack).copied().unwrap_or(0);
            let met = state.met.entry(place.pack).or_default();
            *met += 1;
            // once only: a table that cannot be read, or is too long, is not asked for again
            if *met == meetings(place.kind, stored_len) {
                wanted.push(place.pack);
            }
        }
        wanted
    }

    /// Keeps a table; those that were used longest ago make room.
    pub(super) fn keep(&self, pack: PackId, table: PackTable) {
        let mut state = self.state();
        if table.chunks.len() > self.limit {
            return;
        }
        while state.chunks.len() + table.chunks.len() > self.limit {
            let Some(oldest) = state.held.iter().min_by_key(|(_, held)| held.used).map(|(no, _)| *no) else {
                break;
            };
            state.drop_table(oldest);
        }
        state.clock += 1;
        let (number, used) = (state.next, state.clock);
        state.next = state.next.wrapping_add(1);
        for (at, chunk) in (0..).zip(&table.chunks) {
            state.chunks.insert(chunk.id, (number, at));
        }
        state.held.insert(number, Held { pack, table, used });
    }
}

/// Returns how often a pack is met before its table is read.
fn meetings(kind: ChunkKind, stored_len: u64) -> u64 {
    let len_a_meeting = match kind {
        ChunkKind::Data => DATA_LEN_A_MEETING,
        ChunkKind::Node | ChunkKind::Point => METADATA_LEN_A_MEETING,
    };
    MIN_MET + stored_len / len_a_meeting
}

impl State {
    fn find(&mut self, id: &ChunkId) -> Option<Location> {
        let (number, at) = self.chunks.get(id)?;
        let held = self.held.get_mut(number)?;
        let chunk = held.table.chunks.get(*at as usize)?;
        let frame = *held.table.frames.get(chunk.frame as usize)?;
        self.clock += 1;
        held.used = self.clock;
        Some(Location { pack: held.pack, frame, kind: chunk.kind, offset: chunk.offset, len: chunk.len })
    }

    fn drop_table(&mut self, number: u32) {
        let Some(held) = self.held.remove(&number) else { return };
        for chunk in &held.table.chunks {
            // of a chunk in several packs, the last one is known
            if self.chunks.get(&chunk.id).is_some_and(|(of, _)| *of == number) {
                self.chunks.remove(&chunk.id);
            }
        }
        self.met.remove(&held.pack);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::pack::{FrameEntry, TableChunk};

    const FRAME: FrameEntry = FrameEntry { offset: 60, stored_len: 100, raw_len: 200 };

    fn id(number: u32) -> ChunkId {
        ChunkId::from_bytes(*blake3::hash(&number.to_le_bytes()).as_bytes())
    }

    fn pack(number: u8) -> PackId {
        PackId::from_bytes([number; 32])
    }

    fn table(chunks: std::ops::Range<u32>) -> PackTable {
        let chunk =
            |number| TableChunk { id: id(number), kind: ChunkKind::Data, frame: 0, offset: number, len: 1 };
        PackTable { frames: vec![FRAME], chunks: chunks.map(chunk).collect() }
    }

    fn found(near: &Near, number: u32) -> Option<Location> {
        near.find(&[id(number)], |_, _| true).pop().unwrap()
    }

    #[test]
    fn a_table_is_wanted_once_enough_was_asked_of_its_pack() {
        let near = Near::new(false);
        let view = View::default();
        let place = Location { pack: pack(1), frame: FRAME, kind: ChunkKind::Data, offset: 0, len: 1 };
        for _ in 1..MIN_MET {
            assert!(near.meet([place].iter(), &view).is_empty());
        }
        assert_eq!(near.meet([place].iter(), &view), [pack(1)]);
        assert!(near.meet([place].iter(), &view).is_empty(), "it is asked for once");
        assert!(meetings(ChunkKind::Node, 32 << 20) > meetings(ChunkKind::Data, 32 << 20));
    }

    #[test]
    fn what_was_used_longest_ago_makes_room() {
        let near = Near { state: Mutex::default(), limit: 100 };
        near.keep(pack(1), table(0..40));
        near.keep(pack(2), table(40..80));
        let place = found(&near, 3).unwrap();
        assert_eq!((place.pack, place.frame, place.offset), (pack(1), FRAME, 3));
        assert_eq!(near.find(&[id(3)], |_, _| false), [None]);
        near.keep(pack(3), table(80..120));
        assert!(found(&near, 50).is_none() && found(&near, 3).is_some() && found(&near, 100).is_some());
        near.keep(pack(4), table(200..301));
        assert!(found(&near, 250).is_none(), "a table that is too long is not kept");
        assert!(near.state().chunks.len() <= 100);
    }

    #[test]
    fn a_chunk_in_two_packs_is_known_as_long_as_the_later_one() {
        let near = Near { state: Mutex::default(), limit: 100 };
        near.keep(pack(1), table(0..30));
        near.keep(pack(2), table(20..50));
        assert_eq!(found(&near, 25).unwrap().pack, pack(2));
        assert_eq!(found(&near, 5).unwrap().pack, pack(1));
        near.state().drop_table(0);
        assert_eq!(found(&near, 25).unwrap().pack, pack(2));
        near.state().drop_table(1);
        assert!(near.state().chunks.is_empty());
    }
}

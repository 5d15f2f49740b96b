//! The tables of packs of which much was asked for. Content stands in packs as it stood on the disk, and nodes as they were
//! made, so what is asked for next mostly stands in the same pack: found in its table, it costs no look-up in the index.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::view::View;
use crate::format::node::ChunkKind;
use crate::format::pack::PackTable;
use crate::id::{ChunkId, PackId};
use crate::index::Location;

/// Entries, of chunks and of frames, that the tables of one reader have together; about 100 bytes each.
const MAX_ENTRIES: usize = 128 << 10;
/// Of one that spares memory: a long pack of nodes has 30,000.
const MAX_SPARING_ENTRIES: usize = 32 << 10;
/// Plaintext of an entry in a table, bytes, at most.
const ENTRY_LEN: usize = 48;
/// A table that had to make room is read again once its pack was met for each so many of its entries: by then look-ups have
/// taken about as long as the table takes. Where more tables are in use than there is room for, few are read over and over.
const ENTRIES_A_MEETING: usize = 8;
/// Packs of which it is known how often they were met, and which tables made room; then all is forgotten. 48 bytes each.
const MAX_MET_PACKS: usize = 4096;
/// A pack's table is read once so many of its chunks were looked up, and more of a long pack: by then look-ups in an index
/// that is in memory have taken about as long as the table takes.
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

/// How often a pack was met, since the start or since its table made room.
#[derive(Debug, Clone, Copy, Default)]
struct Met {
    times: u64,
    /// Entries of its table, if that made room.
    entries: usize,
}

#[derive(Debug, Default)]
struct State {
    met: HashMap<PackId, Met>,
    held: HashMap<u32, Held>,
    /// Which table a chunk is in, and where.
    chunks: HashMap<ChunkId, (u32, u32)>,
    /// Entries of all tables.
    weight: usize,
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
        Self { state: Mutex::default(), limit: if is_sparing { MAX_SPARING_ENTRIES } else { MAX_ENTRIES } }
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

    /// Returns the plaintext of the longest table that would be kept, bytes.
    pub(super) fn max_table_len(&self) -> u32 {
        u32::try_from(self.limit * ENTRY_LEN).unwrap_or(u32::MAX)
    }

    /// Notes where chunks were found by the index. Returns the packs whose tables are to be read.
    pub(super) fn meet(&self, places: &[(ChunkId, Location)], view: &View) -> Vec<PackId> {
        let mut state = self.state();
        let mut wanted = Vec::new();
        for (_, place) in places {
            if state.met.len() >= MAX_MET_PACKS {
                state.met.clear();
            }
            let stored_len = view.pack_len(place.pack).ok().flatten().unwrap_or(0);
            let met = state.met.entry(place.pack).or_default();
            met.times += 1;
            // once only: a table that cannot be read, or is too long, is not asked for again
            if met.times == meetings(place.kind, stored_len) + (met.entries / ENTRIES_A_MEETING) as u64 {
                wanted.push(place.pack);
            }
        }
        wanted
    }

    /// Keeps a table; those that were used longest ago make room. One that has not the places of its pack that the index
    /// has is not that pack's: a segment vouches for what the index has, and nobody for what stands in a file.
    pub(super) fn keep(&self, pack: PackId, table: PackTable, known: &[(ChunkId, Location)]) {
        let weight = weight(&table);
        let mut state = self.state();
        if weight > self.limit {
            return;
        }
        while state.weight + weight > self.limit {
            let Some(oldest) = state.held.iter().min_by_key(|(_, held)| held.used).map(|(no, _)| *no) else {
                break;
            };
            if let Some(held) = state.drop_table(oldest) {
                state.met.insert(held.pack, Met { times: 0, entries: held.weight() });
            }
        }
        state.clock += 1;
        let (number, used) = (state.next, state.clock);
        state.next = state.next.wrapping_add(1);
        state.weight += weight;
        for (at, chunk) in (0..).zip(&table.chunks) {
            state.chunks.insert(chunk.id, (number, at));
        }
        state.held.insert(number, Held { pack, table, used });
        let mut of_pack = known.iter().filter(|(_, place)| place.pack == pack);
        if !of_pack.all(|(id, place)| state.find(id) == Some(*place)) {
            state.drop_table(number);
        }
    }
}

fn weight(table: &PackTable) -> usize {
    table.chunks.len() + table.frames.len()
}

impl Held {
    fn weight(&self) -> usize {
        weight(&self.table)
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

    /// Drops a table. Its pack's meetings stay: unless the caller forgets them, it is not asked for again.
    fn drop_table(&mut self, number: u32) -> Option<Held> {
        let held = self.held.remove(&number)?;
        self.weight -= held.weight();
        for chunk in &held.table.chunks {
            // of a chunk in several packs, the last one is known
            if self.chunks.get(&chunk.id).is_some_and(|(of, _)| *of == number) {
                self.chunks.remove(&chunk.id);
            }
        }
        Some(held)
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

    /// Where a table of pack 1 has a chunk.
    fn place(number: u32) -> Location {
        Location { pack: pack(1), frame: FRAME, kind: ChunkKind::Data, offset: number, len: 1 }
    }

    fn found(near: &Near, number: u32) -> Option<Location> {
        near.find(&[id(number)], |_, _| true).pop().unwrap()
    }

    #[test]
    fn a_table_is_wanted_once_enough_was_asked_of_its_pack() {
        let near = Near::new(false);
        let view = View::of_a_test();
        let met = [(id(7), place(7))];
        for _ in 1..MIN_MET {
            assert!(near.meet(&met, &view).is_empty());
        }
        assert_eq!(near.meet(&met, &view), [pack(1)]);
        assert!(near.meet(&met, &view).is_empty(), "it is asked for once");
        assert!(meetings(ChunkKind::Node, 32 << 20) > meetings(ChunkKind::Data, 32 << 20));
    }

    #[test]
    fn what_was_used_longest_ago_makes_room() {
        let near = Near { state: Mutex::default(), limit: 100 };
        near.keep(pack(1), table(0..40), &[]);
        near.keep(pack(2), table(40..80), &[]);
        let place = found(&near, 3).unwrap();
        assert_eq!((place.pack, place.frame, place.offset), (pack(1), FRAME, 3));
        assert_eq!(near.find(&[id(3)], |_, _| false), [None]);
        near.keep(pack(3), table(80..120), &[]);
        assert!(found(&near, 50).is_none() && found(&near, 3).is_some() && found(&near, 100).is_some());
        near.keep(pack(4), table(200..301), &[]);
        assert!(found(&near, 250).is_none(), "a table that is too long is not kept");
        assert!(near.state().weight <= 100);
    }

    #[test]
    fn a_table_that_made_room_is_wanted_again_the_later_the_longer_it_is() {
        let near = Near { state: Mutex::default(), limit: 1000 };
        let view = View::of_a_test();
        let met = [(id(7), place(7))];
        let until_wanted = || (1..).find(|_| !near.meet(&met, &view).is_empty());
        assert_eq!(until_wanted(), Some(MIN_MET));
        near.keep(pack(1), table(0..799), &[]);
        near.keep(pack(2), table(2000..2500), &[]);
        assert!(found(&near, 7).is_none());
        assert_eq!(until_wanted(), Some(MIN_MET + (800 / ENTRIES_A_MEETING) as u64));
    }

    #[test]
    fn tables_are_weighed_by_all_that_they_hold() {
        let near = Near { state: Mutex::default(), limit: 100 };
        let same = |count| PackTable { frames: vec![FRAME], chunks: vec![table(1..2).chunks[0]; count] };
        near.keep(pack(1), same(99), &[]);
        near.keep(pack(2), same(50), &[]);
        assert_eq!(near.state().weight, 51, "one id does not make a table short");
        assert_eq!(near.state().held.len(), 1);
        near.keep(pack(3), PackTable { frames: vec![FRAME; 100], chunks: table(5..6).chunks }, &[]);
        assert!(found(&near, 5).is_none());
        assert_eq!(near.max_table_len(), 4800);
    }

    #[test]
    fn the_table_of_another_pack_is_not_kept() {
        let near = Near { state: Mutex::default(), limit: 100 };
        near.keep(
            pack(1),
            table(0..30),
            &[(id(3), place(3)), (id(40), Location { pack: pack(2), ..place(40) })],
        );
        assert!(found(&near, 7).is_some());
        let near = Near { state: Mutex::default(), limit: 100 };
        near.keep(pack(1), table(0..30), &[(id(3), place(3)), (id(40), place(40))]);
        near.keep(pack(1), table(0..30), &[(id(3), place(4))]);
        assert!(found(&near, 7).is_none() && near.state().weight == 0);
    }

    #[test]
    fn a_chunk_in_two_packs_is_known_as_long_as_the_later_one() {
        let near = Near { state: Mutex::default(), limit: 100 };
        near.keep(pack(1), table(0..30), &[]);
        near.keep(pack(2), table(20..50), &[]);
        assert_eq!(found(&near, 25).unwrap().pack, pack(2));
        assert_eq!(found(&near, 5).unwrap().pack, pack(1));
        near.state().drop_table(0);
        assert_eq!(found(&near, 25).unwrap().pack, pack(2));
        near.state().drop_table(1);
        assert!(near.state().chunks.is_empty());
    }
}

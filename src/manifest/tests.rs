use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::error::{Error, FormatFault};
use crate::extent::ByteRange;
use crate::format::limits::MAX_DISK_LEN;
use crate::format::node::Child;
use crate::format::point::Manifest;
use crate::monitor::Recorder;

const LEAF: u64 = 1 << 16;
const BLOCK: u64 = 4096;
const BLOCKS: u64 = LEAF / BLOCK;

/// Nodes in memory, named by what they are.
#[derive(Default)]
struct Store {
    nodes: Mutex<HashMap<ChunkId, Vec<u8>>>,
    reads: Mutex<Vec<ChunkId>>,
    new_nodes: usize,
}

impl Store {
    fn add(&mut self, plain: Vec<u8>) -> ChunkId {
        let id = ChunkId::from_bytes(*blake3::hash(&plain).as_bytes());
        self.new_nodes += usize::from(self.nodes.lock().unwrap().insert(id, plain).is_none());
        id
    }

    fn add_node(&mut self, node: &Node) -> ChunkId {
        self.add(node.encode().unwrap())
    }

    fn take_reads(&self) -> usize {
        std::mem::take(&mut *self.reads.lock().unwrap()).len()
    }
}

impl NodeReader for Store {
    fn read_node(&self, id: ChunkId) -> Result<Arc<Node>> {
        self.reads.lock().unwrap().push(id);
        let missing = || Error::MissingChunk { id, wanted_by: "a test".into() };
        let plain = self.nodes.lock().unwrap().get(&id).cloned().ok_or_else(missing)?;
        Node::decode(&plain).map(Arc::new).map_err(|fault| Error::malformed(id, fault))
    }
}

/// Reads what was there before, writes elsewhere, then adds both up.
struct Sink(Vec<Vec<u8>>);

impl NodeWriter for Sink {
    fn write_node(&mut self, plain: Vec<u8>) -> Result<ChunkId> {
        let id = ChunkId::from_bytes(*blake3::hash(&plain).as_bytes());
        self.0.push(plain);
        Ok(id)
    }
}

/// What a block of 4 KiB is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    Zero,
    /// Block `1` of chunk `0`.
    Of(u8, u32),
    Bad,
}

/// A disk, block by block; the last block may be cut.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Disk {
    blocks: Vec<Block>,
    size: u64,
}

impl Disk {
    fn new(blocks: Vec<Block>, cut: u64) -> Self {
        let size = (blocks.len() as u64 * BLOCK).saturating_sub(cut);
        Self { blocks, size }
    }

    /// The same disk with another end; new bytes are zero.
    fn resized(&self, count: usize, cut: u64) -> Self {
        let mut blocks = self.blocks.clone();
        blocks.resize(count, Block::Zero);
        Self::new(blocks, cut)
    }

    fn leaf_entries(&self, number: u64) -> Vec<LeafEntry> {
        let start = number * BLOCKS;
        let end = (start + BLOCKS).min(self.blocks.len() as u64);
        (start..end)
            .map(|index| {
                let len = (self.size - index * BLOCK).min(BLOCK) as u32;
                match self.blocks[index as usize] {
                    Block::Zero => LeafEntry::Zero { len },
                    Block::Of(chunk, block) => {
                        LeafEntry::Chunk { len, offset: block * 4096, id: chunk_id(chunk) }
                    }
                    Block::Bad => LeafEntry::Unreadable { len },
                }
            })
            .collect()
    }

    fn leaf_count(&self) -> u64 {
        self.size.div_ceil(LEAF)
    }
}

fn chunk_id(chunk: u8) -> ChunkId {
    ChunkId::from_bytes([chunk; 32])
}

fn geometry(fanout: u32) -> Geometry {
    Geometry::new(LEAF, fanout).unwrap()
}

/// Makes a map of `size` bytes by putting the leaves given.
fn write(
    store: &mut Store,
    geometry: Geometry,
    size: u64,
    predecessor: Option<Manifest>,
    leaves: &[(u64, Vec<LeafEntry>)],
) -> Result<Manifest> {
    let mut sink = Sink(Vec::new());
    let mut writer = TreeWriter::new(geometry, size, predecessor, store, &mut sink)?;
    leaves.iter().try_for_each(|(number, entries)| writer.put_leaf(*number, entries))?;
    let manifest = writer.finish()?;
    for plain in sink.0 {
        store.add(plain);
    }
    Ok(manifest)
}

fn build(store: &mut Store, geometry: Geometry, disk: &Disk) -> Manifest {
    let leaves: Vec<_> = (0..disk.leaf_count()).map(|number| (number, disk.leaf_entries(number))).collect();
    write(store, geometry, disk.size, None, &leaves).unwrap()
}

/// Looks the whole disk up, as blocks.
fn look_up(store: &Store, geometry: Geometry, manifest: &Manifest) -> Disk {
    let mut cursor = Cursor::new(geometry, manifest, store).unwrap();
    let mut disk = Disk { blocks: Vec::new(), size: manifest.size };
    let Some(whole) = ByteRange::new(0, manifest.size) else { return disk };
    let mut position = 0;
    for piece in cursor.entries(whole) {
        let (range, entry) = piece.unwrap();
        assert_eq!(range.start(), position);
        position = range.end();
        for block in 0..range.len().div_ceil(BLOCK) as u32 {
            disk.blocks.push(match entry {
                EntryRef::Zero => Block::Zero,
                EntryRef::Chunk { id, offset } => Block::Of(id.as_bytes()[0], offset / 4096 + block),
                EntryRef::Unreadable => Block::Bad,
            });
        }
    }
    assert_eq!(position, manifest.size);
    disk
}

#[derive(Default)]
struct Collect {
    nodes: Vec<NodeAt>,
    entries: Vec<(ByteRange, EntryRef)>,
    faults: Vec<(NodeAt, String)>,
    go_on: bool,
}

impl Visitor for Collect {
    fn node(&mut self, node: NodeAt) -> Result<bool> {
        self.nodes.push(node);
        Ok(true)
    }

    fn entry(&mut self, range: ByteRange, entry: EntryRef) -> Result<()> {
        self.entries.push((range, entry));
        Ok(())
    }

    fn fault(&mut self, node: NodeAt, error: Error) -> Result<()> {
        self.faults.push((node, error.to_string()));
        if self.go_on { Ok(()) } else { Err(error) }
    }
}

fn collect(store: &Store, geometry: Geometry, manifest: &Manifest) -> Collect {
    let mut visitor = Collect::default();
    walk(geometry, manifest, store, &mut visitor).unwrap();
    visitor
}

fn differences(store: &Store, geometry: Geometry, a: &Manifest, b: &Manifest) -> Vec<ByteRange> {
    let mut ranges = Vec::new();
    diff(geometry, a, b, store, &Recorder::new(), &mut |range| ranges.push(range)).unwrap();
    ranges
}

/// The bytes that differ, found the slow way.
fn differences_of_disks(a: &Disk, b: &Disk) -> Vec<ByteRange> {
    let (short, long) = (a.size.min(b.size), a.size.max(b.size));
    let mut set = crate::extent::RangeSet::new();
    for (index, pair) in a.blocks.iter().zip(&b.blocks).enumerate() {
        let start = index as u64 * BLOCK;
        if pair.0 != pair.1 && start < short {
            set.push(ByteRange::between(start, (start + BLOCK).min(short)).unwrap());
        }
    }
    if let Some(rest) = ByteRange::between(short, long) {
        set.push(rest);
    }
    set.as_slice().to_vec()
}

fn any_block() -> impl Strategy<Value = Block> {
    prop_oneof![
        8 => Just(Block::Zero),
        4 => (1u8..4, 0u32..6).prop_map(|(chunk, block)| Block::Of(chunk, block)),
        1 => Just(Block::Bad),
    ]
}

/// Runs of blocks: zero for long, one chunk in order, or anything.
fn any_blocks() -> impl Strategy<Value = Vec<Block>> {
    let run = prop_oneof![
        (1usize..60).prop_map(|len| vec![Block::Zero; len]),
        (1u8..4, 1u32..20).prop_map(|(chunk, len)| (0..len).map(|block| Block::Of(chunk, block)).collect()),
        proptest::collection::vec(any_block(), 1..10),
    ];
    proptest::collection::vec(run, 0..12).prop_map(|runs| runs.concat())
}

fn any_disk() -> impl Strategy<Value = Disk> {
    (any_blocks(), prop_oneof![Just(0u64), 1u64..BLOCK]).prop_map(|(blocks, cut)| Disk::new(blocks, cut))
}

fn any_change() -> impl Strategy<Value = Vec<(prop::sample::Index, Block)>> {
    proptest::collection::vec((any::<prop::sample::Index>(), any_block()), 0..12)
}

fn any_end() -> impl Strategy<Value = Option<(usize, u64)>> {
    proptest::option::of((0usize..300, prop_oneof![Just(0u64), 1u64..BLOCK]))
}

/// Makes the map of `after` from that of `before`, putting only the leaves in which a block was changed.
fn patch(
    store: &mut Store,
    geometry: Geometry,
    before: Manifest,
    after: &Disk,
    changed: &BTreeSet<u64>,
) -> Manifest {
    let leaves: Vec<_> = changed.iter().map(|number| (*number, after.leaf_entries(*number))).collect();
    write(store, geometry, after.size, Some(before), &leaves).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_patch_is_what_a_rebuild_is(blocks in any_blocks(), change in any_change(), end in any_end(), fanout in 1u32..5) {
        let geometry = geometry(1 << fanout);
        let mut store = Store::default();
        let disk = Disk::new(blocks, 0);
        let before = build(&mut store, geometry, &disk);
        prop_assert_eq!(&look_up(&store, geometry, &before), &disk);
        let mut after = end.map_or(disk.clone(), |(count, cut)| disk.resized(count, cut));
        let mut changed = BTreeSet::new();
        if !after.blocks.is_empty() {
            for (index, block) in change {
                let index = index.index(after.blocks.len());
                after.blocks[index] = block;
                changed.insert(index as u64 / BLOCKS);
            }
        }
        let patched = patch(&mut store, geometry, before, &after, &changed);
        prop_assert_eq!(&look_up(&store, geometry, &patched), &after);
        prop_assert_eq!(patched, build(&mut store, geometry, &after));
        prop_assert_eq!(differences(&store, geometry, &before, &patched), differences_of_disks(&disk, &after));
        prop_assert_eq!(differences(&store, geometry, &patched, &before), differences_of_disks(&disk, &after));
    }

    #[test]
    fn a_walk_meets_what_is_reachable(disk in any_disk(), fanout in 1u32..5) {
        let geometry = geometry(1 << fanout);
        let mut store = Store::default();
        let manifest = build(&mut store, geometry, &disk);
        let met = collect(&store, geometry, &manifest);
        let stored: BTreeSet<ChunkId> = store.nodes.lock().unwrap().keys().copied().collect();
        prop_assert_eq!(met.nodes.iter().map(|node| node.id).collect::<BTreeSet<_>>(), stored);
        let mut blocks = vec![Block::Zero; disk.blocks.len()];
        for (range, entry) in &met.entries {
            for index in 0..range.len().div_ceil(BLOCK) {
                blocks[(range.start() / BLOCK + index) as usize] = match entry {
                    EntryRef::Zero => Block::Zero,
                    EntryRef::Chunk { id, offset } => Block::Of(id.as_bytes()[0], offset / 4096 + index as u32),
                    EntryRef::Unreadable => Block::Bad,
                };
            }
        }
        prop_assert_eq!(blocks, disk.blocks);
        // canonical: no leaf and no node is there for zeroes alone
        let leaves = met.nodes.iter().filter(|node| node.level == 0);
        for leaf in leaves {
            let inside = met.entries.iter().filter(|(range, _)| leaf.range.intersection(range).is_some());
            prop_assert!(inside.clone().any(|(_, entry)| *entry != EntryRef::Zero));
        }
    }

    #[test]
    fn a_part_is_looked_up_like_the_whole(disk in any_disk(), from: prop::sample::Index, len in 1u64..1_000_000) {
        let geometry = geometry(2);
        let mut store = Store::default();
        let manifest = build(&mut store, geometry, &disk);
        prop_assume!(disk.size > 0);
        let start = from.index(disk.size as usize) as u64;
        let range = ByteRange::new(start, len).unwrap();
        let mut cursor = Cursor::new(geometry, &manifest, &store).unwrap();
        let whole: Vec<_> = cursor.entries(ByteRange::new(0, disk.size).unwrap()).map(Result::unwrap).collect();
        let part: Vec<_> = cursor.entries(range).map(Result::unwrap).collect();
        let expected: Vec<_> = whole.iter().filter_map(|(piece, entry)| {
            let both = piece.intersection(&range)?;
            let skip = (both.start() - piece.start()) as u32;
            Some((both, match *entry {
                EntryRef::Chunk { id, offset } => EntryRef::Chunk { id, offset: offset + skip },
                other => other,
            }))
        }).collect();
        prop_assert_eq!(part, expected);
        for number in 0..disk.leaf_count() + 2 {
            let leaf = cursor.leaf(number).unwrap();
            let zero = number >= disk.leaf_count()
                || disk.leaf_entries(number).iter().all(|entry| matches!(entry, LeafEntry::Zero { .. }));
            prop_assert_eq!(leaf.is_none(), zero);
        }
    }

    #[test]
    fn hostile_trees_are_refused(seed in proptest::collection::vec((0u8..4, 0u16..6, 0usize..8), 1..20), size in 1u64..40, height in 0u8..6) {
        // nodes that point at earlier nodes, at any level: well encoded, and put together at random
        let mut store = Store::default();
        let mut ids = vec![store.add_node(&Node::Leaf { entries: vec![LeafEntry::Chunk { len: LEAF as u32, offset: 0, id: chunk_id(1) }] })];
        for (level, slot, target) in seed {
            let id = ids[target % ids.len()];
            let children = vec![Child { slot, id }, Child { slot: slot + 1, id: ids[0] }];
            ids.push(store.add_node(&match level {
                0 => Node::Leaf { entries: vec![LeafEntry::Zero { len: 4096 * u32::from(slot + 1) }] },
                level => Node::Inner { level, children },
            }));
        }
        let geometry = geometry(4);
        let manifest = Manifest { size: size * 30_000, height, root: ids.last().copied() };
        let sound = walk(geometry, &manifest, &store, &mut Collect::default()).is_ok();
        if let Ok(mut cursor) = Cursor::new(geometry, &manifest, &store) {
            let pieces: Result<Vec<_>> = cursor.entries(ByteRange::new(0, manifest.size).unwrap()).collect();
            prop_assert_eq!(pieces.is_ok(), sound);
        }
        let empty = Manifest { root: None, ..manifest };
        let diffed = diff(geometry, &manifest, &empty, &store, &Recorder::new(), &mut |_| {});
        prop_assert_eq!(diffed.is_ok(), sound);
        for other in [size * 10_000, size * 90_000] {
            let _ = write(&mut store, geometry, other, Some(manifest), &[]);
        }
        let mut visitor = Collect { go_on: true, ..Collect::default() };
        let walked = walk(geometry, &manifest, &store, &mut visitor);
        prop_assert_eq!(walked.is_ok() && visitor.faults.is_empty(), sound);
    }
}

/// One leaf in use per TiB disk.
fn chunk_leaf(chunk: u8) -> Vec<LeafEntry> {
    vec![LeafEntry::Chunk { len: LEAF as u32, offset: 0, id: chunk_id(chunk) }]
}

#[test]
fn costs_follow_what_is_there_not_the_size() {
    let geometry = geometry(16);
    let mut store = Store::default();
    let size = MAX_DISK_LEN;
    let last = geometry.leaf_count(size) - 1;
    let last_len = geometry.leaf_range(last, size).unwrap().len() as u32;
    let at_end = vec![LeafEntry::Chunk { len: last_len, offset: 0, id: chunk_id(2) }];
    let leaves = [(5, chunk_leaf(1)), (last, at_end)];
    let manifest = write(&mut store, geometry, size, None, &leaves).unwrap();
    assert_eq!(manifest.height, geometry.height_for(size));
    // two paths that share the root
    assert_eq!(store.new_nodes, 2 * (usize::from(manifest.height) + 1) - 1);
    let mut cursor = Cursor::new(geometry, &manifest, &store).unwrap();
    let pieces: Vec<_> = cursor.entries(ByteRange::new(0, size).unwrap()).map(Result::unwrap).collect();
    assert_eq!(pieces.len(), 4);
    assert_eq!(store.take_reads(), store.new_nodes);
    let empty = Manifest { root: None, ..manifest };
    assert_eq!(differences(&store, geometry, &manifest, &empty).len(), 2);
    let grown = write(&mut store, geometry, size, Some(Manifest { size: 1, height: 0, root: None }), &[]);
    assert_eq!(grown.unwrap().root, None);
}

#[test]
fn a_change_costs_its_path_and_shares_the_rest() {
    let geometry = geometry(4);
    let mut store = Store::default();
    let size = 4u64.pow(4) * LEAF;
    let leaves: Vec<_> = (0..256).map(|number| (number, chunk_leaf(number as u8))).collect();
    let before = write(&mut store, geometry, size, None, &leaves).unwrap();
    assert_eq!(store.new_nodes, 256 + 64 + 16 + 4 + 1);
    store.take_reads();
    store.new_nodes = 0;
    let after = write(&mut store, geometry, size, Some(before), &[(77, chunk_leaf(1))]).unwrap();
    // the leaf is one that is there already
    assert_eq!((store.new_nodes, store.take_reads()), (4, 4));
    assert_eq!(differences(&store, geometry, &before, &after), [ByteRange::new(77 * LEAF, LEAF).unwrap()]);
    assert_eq!(store.take_reads(), 2 * 5);
    // nothing put, or what was there: the same tree
    let same = write(&mut store, geometry, size, Some(before), &[(77, chunk_leaf(77))]).unwrap();
    assert_eq!((same, write(&mut store, geometry, size, Some(before), &[]).unwrap()), (before, before));
    assert_eq!(store.new_nodes, 4);
    assert!(differences(&store, geometry, &before, &same).is_empty());
}

#[test]
fn growing_and_shrinking_read_one_path() {
    let geometry = geometry(4);
    let mut store = Store::default();
    let leaves: Vec<_> = (0..64).map(|number| (number, chunk_leaf(number as u8))).collect();
    let before = write(&mut store, geometry, 64 * LEAF, None, &leaves).unwrap();
    store.take_reads();
    store.new_nodes = 0;
    let grown = write(&mut store, geometry, 4096 * LEAF, Some(before), &[]).unwrap();
    assert_eq!((grown.height, store.take_reads(), store.new_nodes), (6, 0, 3));
    let back = write(&mut store, geometry, 64 * LEAF, Some(grown), &[]).unwrap();
    assert_eq!(back, before);
    store.take_reads();
    store.new_nodes = 0;
    let half = write(&mut store, geometry, 31 * LEAF + 5, Some(before), &[]).unwrap();
    assert_eq!((store.take_reads(), store.new_nodes), (4, 4));
    let half_disk = differences(&store, geometry, &before, &half);
    assert_eq!(half_disk, [ByteRange::between(31 * LEAF + 5, 64 * LEAF).unwrap()]);
    let none = write(&mut store, geometry, 0, Some(before), &[]).unwrap();
    assert_eq!(none, Manifest { size: 0, height: 0, root: None });
}

#[test]
fn a_disk_that_grows_inside_a_block_is_zero_from_its_old_end() {
    let geometry = geometry(4);
    let mut store = Store::default();
    let chunk = LeafEntry::Chunk { len: 5001, offset: 0, id: chunk_id(1) };
    let before = write(&mut store, geometry, 5001, None, &[(0, vec![chunk])]).unwrap();
    let after = write(&mut store, geometry, 2 * LEAF, Some(before), &[]).unwrap();
    let mut cursor = Cursor::new(geometry, &after, &store).unwrap();
    let pieces: Vec<_> = cursor.entries(ByteRange::new(0, u64::MAX).unwrap()).map(Result::unwrap).collect();
    let expected = [
        (ByteRange::new(0, 5001).unwrap(), EntryRef::Chunk { id: chunk_id(1), offset: 0 }),
        (ByteRange::between(5001, 2 * LEAF).unwrap(), EntryRef::Zero),
    ];
    assert_eq!(pieces, expected);
}

#[test]
fn chunk_references_are_compared_byte_by_byte() {
    let geometry = geometry(4);
    let mut store = Store::default();
    let chunk = |len, offset| LeafEntry::Chunk { len, offset, id: chunk_id(1) };
    let half = LEAF as u32 / 2;
    // written past the writer, which would have joined the two
    let split = store.add_node(&Node::Leaf { entries: vec![chunk(half, 0), chunk(half, half)] });
    let whole = store.add_node(&Node::Leaf { entries: vec![chunk(2 * half, 0)] });
    let moved = store.add_node(&Node::Leaf { entries: vec![chunk(half, 0), chunk(half, half + 1)] });
    let of = |root| Manifest { size: LEAF, height: 0, root: Some(root) };
    assert!(differences(&store, geometry, &of(split), &of(whole)).is_empty());
    let second_half = ByteRange::between(u64::from(half), LEAF).unwrap();
    assert_eq!(differences(&store, geometry, &of(moved), &of(whole)), [second_half]);
}

#[test]
fn wrong_leaves_are_not_written() {
    let geometry = geometry(4);
    let mut store = Store::default();
    let size = 3 * LEAF + 100;
    let mut refused = |leaves: &[(u64, Vec<LeafEntry>)]| {
        matches!(write(&mut store, geometry, size, None, leaves), Err(Error::Malformed { .. }))
    };
    assert!(refused(&[(0, vec![])]));
    assert!(refused(&[(0, vec![LeafEntry::Zero { len: LEAF as u32 + 1 }])]));
    assert!(refused(&[(3, vec![LeafEntry::Zero { len: LEAF as u32 }])]), "the last leaf is cut");
    assert!(refused(&[(4, chunk_leaf(1))]), "beyond the end");
    assert!(refused(&[(u64::MAX, chunk_leaf(1))]), "far beyond the end");
    assert!(refused(&[(1, chunk_leaf(1)), (1, chunk_leaf(2))]), "twice");
    assert!(refused(&[(1, chunk_leaf(1)), (0, chunk_leaf(2))]), "out of order");
    assert!(write(&mut store, geometry, MAX_DISK_LEN + 1, None, &[]).is_err());
}

fn fault_of(store: &Store, manifest: Manifest) -> String {
    let mut visitor = Collect::default();
    let error = walk(geometry(4), &manifest, store, &mut visitor).unwrap_err();
    assert!(matches!(error, Error::Malformed { .. }), "{error}");
    error.to_string()
}

#[test]
fn faults_name_the_node_and_both_values() {
    let mut store = Store::default();
    let leaf = store.add_node(&Node::Leaf { entries: chunk_leaf(1) });
    let inner = |store: &mut Store, level, slot| {
        store.add_node(&Node::Inner { level, children: vec![Child { slot, id: leaf }] })
    };
    let of = |size, height, root| Manifest { size, height, root: Some(root) };
    let low = inner(&mut store, 1, 3);
    let expect = |manifest, parts: &[&str]| {
        let message = fault_of(&store, manifest);
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    };
    expect(of(4 * LEAF, 2, low), &["height is 2, expected 1"]);
    expect(of(0, 0, leaf), &["root of an empty disk"]);
    expect(of(u64::MAX, 48, leaf), &["a disk is", "at most"]);
    expect(of(LEAF, 0, low), &[&low.to_hex(), "level is 1, expected 0"]);
    expect(of(4 * LEAF, 1, leaf), &[&leaf.to_hex(), "level is 0, expected 1"]);
    expect(of(16 * LEAF, 2, low), &[&low.to_hex(), "level is 1, expected 2"]);
    expect(of(3 * LEAF, 1, low), &[&low.to_hex(), "slot 3 is beyond"]);
    expect(of(LEAF - 1, 0, leaf), &[&leaf.to_hex(), "cover is 65536, expected 65535"]);
    let wide = inner(&mut store, 1, 4);
    let message = fault_of(&store, of(4 * LEAF, 1, wide));
    assert!(message.contains("slot is 4, at most 3"), "{message}");
    let deep = store.add_node(&Node::Inner { level: 2, children: vec![Child { slot: 0, id: leaf }] });
    let message = fault_of(&store, of(16 * LEAF, 2, deep));
    assert!(message.contains("level is 0, expected 1"), "{message}");
}

#[test]
fn a_walk_goes_on_behind_a_fault_if_told_to() {
    let geometry = geometry(4);
    let mut store = Store::default();
    let leaves: Vec<_> = (0..16).map(|number| (number, chunk_leaf(number as u8))).collect();
    let manifest = write(&mut store, geometry, 16 * LEAF, None, &leaves).unwrap();
    let met = collect(&store, geometry, &manifest);
    let lost = met.nodes.iter().find(|node| node.level == 1 && node.range.start() > 0).copied().unwrap();
    store.nodes.lock().unwrap().remove(&lost.id);
    let mut visitor = Collect { go_on: true, ..Collect::default() };
    walk(geometry, &manifest, &store, &mut visitor).unwrap();
    assert_eq!(visitor.faults.iter().map(|(node, _)| *node).collect::<Vec<_>>(), [lost]);
    assert_eq!(visitor.entries.len(), 12);
    let error = walk(geometry, &manifest, &store, &mut Collect::default()).unwrap_err();
    assert!(matches!(error, Error::MissingChunk { id, .. } if id == lost.id));
    // a cursor ends at it, behind what it could read
    let mut cursor = Cursor::new(geometry, &manifest, &store).unwrap();
    let pieces: Vec<_> = cursor.entries(ByteRange::new(0, 16 * LEAF).unwrap()).collect();
    assert_eq!(pieces.len(), 5);
    assert!(pieces.last().unwrap().is_err());
}

#[test]
fn a_visitor_can_leave_out_what_it_has_seen() {
    struct Once(BTreeMap<ChunkId, u32>);
    impl Visitor for Once {
        fn node(&mut self, node: NodeAt) -> Result<bool> {
            let seen = self.0.entry(node.id).or_default();
            *seen += 1;
            Ok(*seen == 1)
        }
        fn entry(&mut self, _: ByteRange, _: EntryRef) -> Result<()> {
            Ok(())
        }
    }
    let geometry = geometry(4);
    let mut store = Store::default();
    let leaves: Vec<_> = (0..64).map(|number| (number, chunk_leaf(7))).collect();
    let manifest = write(&mut store, geometry, 64 * LEAF, None, &leaves).unwrap();
    // one leaf, one node a level
    assert_eq!(store.new_nodes, 4);
    store.take_reads();
    let mut visitor = Once(BTreeMap::new());
    walk(geometry, &manifest, &store, &mut visitor).unwrap();
    assert_eq!(store.take_reads(), 4);
    assert_eq!(visitor.0.values().copied().collect::<BTreeSet<_>>(), BTreeSet::from([1, 4]));
}

#[test]
fn a_walk_beside_another_map_meets_what_that_one_does_not_share() {
    let geometry = geometry(4);
    let mut store = Store::default();
    let leaves: Vec<_> = (0..64).map(|number| (number, chunk_leaf(number as u8))).collect();
    let before = write(&mut store, geometry, 64 * LEAF, None, &leaves).unwrap();
    let mut leaf = chunk_leaf(5);
    let kept = leaf.pop().unwrap();
    leaf.push(LeafEntry::Chunk { len: kept.len() / 2, offset: 0, id: chunk_id(200) });
    leaf.push(LeafEntry::Chunk { len: kept.len() / 2, offset: 0, id: chunk_id(5) });
    let after = write(&mut store, geometry, 64 * LEAF, Some(before), &[(5, leaf)]).unwrap();
    let met = |store: &Store, old: &Manifest, new: &Manifest| {
        let mut visitor = Collect::default();
        walk_new(geometry, old, new, store, &mut visitor).unwrap();
        let ids = visitor.entries.iter().filter_map(|(_, entry)| match entry {
            EntryRef::Chunk { id, .. } => Some(*id),
            EntryRef::Zero | EntryRef::Unreadable => None,
        });
        (visitor.nodes.len(), ids.collect::<Vec<_>>())
    };
    store.take_reads();
    // the path to one leaf, and of that what is not in the leaf that was there
    assert_eq!(met(&store, &before, &after), (4, vec![chunk_id(200)]));
    assert_eq!(store.take_reads(), 8);
    assert_eq!(met(&store, &after, &after), (0, vec![]));
    let none = Manifest { root: None, ..before };
    assert_eq!(met(&store, &none, &before).0, 64 + 16 + 4 + 1);
    // of a disk of another size, what covers its end
    let grown = write(&mut store, geometry, 4096 * LEAF, Some(before), &[]).unwrap();
    assert_eq!(met(&store, &before, &grown), (3, vec![]));
    assert_eq!(met(&store, &grown, &before), (0, vec![]));
    // a map that cannot be read shares nothing
    store.nodes.lock().unwrap().remove(&before.root.unwrap());
    assert_eq!(met(&store, &before, &after).1.len(), 65);
}

#[test]
fn a_cursor_reads_no_node_twice_in_a_row() {
    let geometry = geometry(4);
    let mut store = Store::default();
    let leaves: Vec<_> = (0..64).map(|number| (number, chunk_leaf(number as u8))).collect();
    let manifest = write(&mut store, geometry, 64 * LEAF, None, &leaves).unwrap();
    store.take_reads();
    let mut cursor = Cursor::new(geometry, &manifest, &store).unwrap();
    for number in 0..64 {
        for _ in 0..3 {
            assert!(cursor.leaf(number).unwrap().is_some());
        }
    }
    assert_eq!(store.take_reads(), 64 + 16 + 4 + 1);
}

#[test]
fn a_diff_can_be_cancelled() {
    let geometry = geometry(4);
    let mut store = Store::default();
    let a = write(&mut store, geometry, LEAF, None, &[(0, chunk_leaf(1))]).unwrap();
    let b = Manifest { root: None, ..a };
    let monitor = Recorder::new();
    monitor.cancel();
    let result = diff(geometry, &a, &b, &store, &monitor, &mut |_| {});
    assert!(matches!(result, Err(Error::Cancelled)));
}

#[test]
fn too_many_entries_are_refused() {
    let geometry = Geometry::new(1 << 26, 4).unwrap();
    let mut store = Store::default();
    let entries = |len: u32| {
        let count = (1 << 26) / len;
        (0..count)
            .map(|index| LeafEntry::Chunk { len, offset: 0, id: chunk_id(index as u8) })
            .collect::<Vec<_>>()
    };
    assert!(write(&mut store, geometry, 1 << 26, None, &[(0, entries(4096))]).is_ok());
    let result = write(&mut store, geometry, 1 << 26, None, &[(0, entries(2048))]);
    assert!(matches!(result, Err(Error::Malformed { fault: FormatFault::TooLarge { .. }, .. })));
}

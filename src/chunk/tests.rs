use proptest::prelude::*;

use super::*;
use crate::buffer::Buffer;
use crate::error::{Error, FormatFault, Result};
use crate::format::config::CutterParams;
use crate::format::limits::{MAX_CHUNK_LEN, MAX_FRAME_CHUNKS, MAX_FRAME_RAW_LEN, MAX_PACK_LEN};
use crate::format::node::ChunkKind;
use crate::format::pack::{
    FrameEntry, FrameHeader, PACK_FOOTER_LEN, PACK_HEADER_LEN, PackHeader, PackKind, PackTable, frame_chunks,
};
use crate::id::{ChunkId, PackId, RepositoryId};

const REPOSITORY: RepositoryId = RepositoryId::from_bytes([9; 16]);

/// Bytes that look random and are the same everywhere: the BLAKE3 output stream of a seed.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// Noise that compresses: every 64 bytes half noise, half text.
fn half_noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = noise(seed, len);
    bytes.chunks_mut(64).for_each(|line| line.iter_mut().skip(32).for_each(|byte| *byte = b'v'));
    bytes
}

fn cutter(min_len: u32, average_len: u32, max_len: u32) -> Cutter {
    Cutter::new(CutterParams { algorithm: 1, min_len, average_len, max_len }).unwrap()
}

fn lengths(cutter: &Cutter, run: &[u8]) -> Vec<usize> {
    cutter.cut(run).collect()
}

#[test]
fn golden_cuts() {
    // Changed numbers mean that the crate moved its cut points: every new backup would store its disks anew.
    let default = Cutter::new(CutterParams::default()).unwrap();
    assert_eq!(lengths(&default, &noise(1, 600_001)), GOLDEN_DEFAULT);
    assert_eq!(lengths(&cutter(4096, 16384, 65536), &noise(2, 300_000)), GOLDEN_16K);
    assert_eq!(lengths(&default, &[0; 300_000]), [131072, 131072, 37856]);
    let raw = fastcdc::v2020::FastCDC::new(&noise(1, 300_000), 8192, 32768, 131_072)
        .map(|c| c.length)
        .collect::<Vec<_>>();
    assert_eq!(raw, GOLDEN_RAW);
}

const GOLDEN_DEFAULT: [usize; 14] =
    [36864, 49152, 69632, 36864, 45056, 36864, 28672, 16384, 90112, 49152, 36864, 57344, 20480, 26561];
const GOLDEN_16K: [usize; 18] = [
    8192, 20480, 20480, 24576, 28672, 28672, 12288, 8192, 8192, 28672, 12288, 24576, 24576, 20480, 8192,
    8192, 8192, 5088,
];
const GOLDEN_RAW: [usize; 8] = [34830, 48574, 68346, 39685, 42356, 40534, 25542, 133];

#[test]
fn cutter_parameters_are_checked() {
    let wrong = CutterParams { average_len: 5000, ..CutterParams::default() };
    assert!(matches!(Cutter::new(wrong), Err(Error::Malformed { .. })));
    // the extremes of the format do not panic in the crate's mask table
    for (min, average, max) in [(4096, 4096, 4096), (1 << 20, 1 << 20, 1 << 20), (4096, 1 << 20, 1 << 20)] {
        let run = noise(3, 3 << 20);
        assert_eq!(lengths(&cutter(min, average, max), &run).iter().sum::<usize>(), run.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn chunks_cover_the_run_in_whole_blocks(seed: u64, len in 0usize..1_500_000, min in 12u32..15, up in 0u32..3, more in 0u32..3) {
        let cutter = cutter(1 << min, 1 << (min + up), 1 << (min + up + more));
        let run = noise(seed, len);
        let cuts = lengths(&cutter, &run);
        prop_assert_eq!(cuts.iter().sum::<usize>(), len);
        if let Some((last, others)) = cuts.split_last() {
            prop_assert!(*last > 0 && *last <= 1 << (min + up + more));
            for chunk in others {
                prop_assert!(chunk % 4096 == 0 && (1 << min..=1 << (min + up + more)).contains(chunk));
            }
        }
        prop_assert_eq!(cuts, lengths(&cutter, &run));
    }

    #[test]
    fn a_shift_by_blocks_is_forgotten(seed: u64, blocks in 1usize..64) {
        let cutter = Cutter::new(CutterParams::default()).unwrap();
        let ends = |run: &[u8], origin: usize| -> std::collections::BTreeSet<usize> {
            cutter.cut(run).scan(0, |end, len| { *end += len; Some(*end) })
                .filter_map(|end| end.checked_sub(origin)).collect()
        };
        let content = noise(seed, 4 << 20);
        let mut shifted = noise(!seed, blocks * 4096);
        shifted.extend_from_slice(&content);
        let (alone, moved) = (ends(&content, 0), ends(&shifted, blocks * 4096));
        // once both have cut at one place they stay together
        let meet = alone.intersection(&moved).next().copied().unwrap();
        prop_assert!(meet < 3 << 20, "they meet at {}", meet);
        prop_assert!(alone.range(meet..).eq(moved.range(meet..)));
    }
}

#[test]
fn ids_depend_on_key_kind_and_content() {
    let hasher = IdHasher::new([1; 32]);
    let id = hasher.chunk_id(ChunkKind::Data, b"abc");
    let expected = blake3::keyed_hash(&[1; 32], b"\0abc");
    assert_eq!(id.as_bytes(), expected.as_bytes());
    assert_ne!(id, hasher.chunk_id(ChunkKind::Node, b"abc"));
    assert_ne!(id, IdHasher::new([2; 32]).chunk_id(ChunkKind::Data, b"abc"));
    assert!(!format!("{hasher:?}").contains('1'));
}

#[test]
fn an_id_is_that_of_the_kind_and_the_plaintext_in_one_piece() {
    let key = [7; 32];
    let plain: Vec<u8> = (0..200_000_u32).map(|at| (at % 251) as u8).collect();
    for kib in [0, 1, 2, 8, 15, 16, 17, 31, 32, 33, 48, 64, 128_usize] {
        for len in (kib << 10).saturating_sub(2)..(kib << 10) + 2 {
            for kind in [ChunkKind::Data, ChunkKind::Node] {
                let whole = [&[kind.as_byte()], &plain[..len]].concat();
                let id = ChunkId::from_bytes(*blake3::keyed_hash(&key, &whole).as_bytes());
                assert_eq!(IdHasher::new(key).chunk_id(kind, &plain[..len]), id, "{len} bytes");
            }
        }
    }
}

/// Frames of the chunks given, of `target` bytes each.
fn frames_of(chunks: &[(ChunkKind, Vec<u8>)], target: u32, level: i32) -> Vec<EncodedFrame> {
    let hasher = IdHasher::new([1; 32]);
    let mut builder = FrameBuilder::new(target);
    let mut frames = Vec::new();
    for (kind, plain) in chunks {
        let id = hasher.chunk_id(*kind, plain);
        frames.extend(builder.push(*kind, id, plain).unwrap());
    }
    frames.extend(builder.flush());
    assert_eq!(builder.pending_bytes(), 0);
    frames.into_iter().map(|frame| frame.encode(level).unwrap()).collect()
}

fn pack_of(frames: &[EncodedFrame]) -> FinishedPack {
    let mut builder = PackBuilder::new(PackKind::Data, REPOSITORY, [3; 32]);
    assert!(builder.is_empty());
    frames.iter().for_each(|frame| builder.push(frame).unwrap());
    builder.finish().unwrap()
}

fn table_of(bytes: &[u8]) -> Result<PackTable> {
    read_pack_table(PackId::from_bytes([0; 32]), bytes.len() as u64, &mut |offset, len| {
        let (start, end) = (offset as usize, (offset + len) as usize);
        Ok(bytes[start..end].to_vec())
    })
}

/// Reads every chunk of a pack by its table and checks its id.
fn read_all(bytes: &[u8], table: &PackTable) -> Vec<(ChunkKind, Vec<u8>)> {
    let hasher = IdHasher::new([1; 32]);
    let plains: Vec<Vec<u8>> = table
        .frames
        .iter()
        .map(|frame| open_frame(&bytes[frame.offset as usize..frame.end() as usize], frame).unwrap())
        .collect();
    let mut listed = Vec::new();
    for (index, plain) in plains.iter().enumerate() {
        listed.extend(frame_chunks(plain).unwrap().iter().map(|c| (index as u32, c.kind, c.offset, c.len)));
    }
    let tabled: Vec<_> = table.chunks.iter().map(|c| (c.frame, c.kind, c.offset, c.len)).collect();
    assert_eq!(listed, tabled);
    let read = |chunk: &crate::format::pack::TableChunk| {
        let start = chunk.offset as usize;
        let plain = plains[chunk.frame as usize][start..start + chunk.len as usize].to_vec();
        assert_eq!(hasher.chunk_id(chunk.kind, &plain), chunk.id);
        (chunk.kind, plain)
    };
    table.chunks.iter().map(read).collect()
}

fn any_chunks() -> impl Strategy<Value = Vec<(ChunkKind, Vec<u8>)>> {
    let kinds = prop_oneof![Just(ChunkKind::Data), Just(ChunkKind::Node), Just(ChunkKind::Point)];
    let contents = (any::<u64>(), 1usize..40_000, any::<bool>())
        .prop_map(|(seed, len, dense)| if dense { noise(seed, len) } else { half_noise(seed, len) });
    proptest::collection::vec((kinds, contents), 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_pack_gives_back_its_chunks(chunks in any_chunks(), target in 1u32..300_000, level in -3i32..6) {
        let pack = pack_of(&frames_of(&chunks, target, level));
        prop_assert_eq!(pack.id, PackId::from_bytes(*blake3::hash(&pack.bytes).as_bytes()));
        let table = table_of(&pack.bytes).unwrap();
        prop_assert_eq!(&table, &pack.table);
        prop_assert_eq!(read_all(&pack.bytes, &table), chunks);
    }

    #[test]
    fn damaged_packs_are_refused_or_harmless(chunks in any_chunks(), place: prop::sample::Index, bit in 0u8..8, cut: prop::sample::Index) {
        let pack = pack_of(&frames_of(&chunks, 50_000, 1));
        let mut flipped = pack.bytes.clone();
        flipped[place.index(pack.bytes.len())] ^= 1 << bit;
        if let Ok(table) = table_of(&flipped) {
            prop_assert_eq!(&table, &pack.table);
            for frame in &table.frames {
                // zstd may not notice: the chunk ids do
                let _ = open_frame(&flipped[frame.offset as usize..frame.end() as usize], frame);
            }
        }
        let short = &pack.bytes[..cut.index(pack.bytes.len())];
        prop_assert!(table_of(short).is_err());
        let whole: Vec<FrameEntry> = pack.table.frames.iter().copied()
            .filter(|frame| frame.end() <= short.len() as u64).collect();
        let found: Vec<FrameEntry> = Salvage::new(short).map(|frame| frame.entry).collect();
        prop_assert_eq!(found, whole);
    }

    #[test]
    fn arbitrary_bytes_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..2000), entry: (u32, u32, u32)) {
        let _ = table_of(&bytes);
        let _ = open_frame(&bytes, &FrameEntry { offset: entry.0, stored_len: entry.1, raw_len: entry.2 });
        prop_assert_eq!(Salvage::new(&bytes).count(), 0);
    }
}

#[test]
fn lists_of_any_length_stand_in_front_of_their_chunks() {
    // about as long as the room for them: noise is stored where it was collected, the rest is compressed elsewhere
    for (count, is_dense) in
        [255, 256, 257, 300].into_iter().flat_map(|count| [(count, true), (count, false)])
    {
        let content = |seed| if is_dense { noise(seed, 4096) } else { half_noise(seed, 4096) };
        let chunks: Vec<_> = (0..count).map(|seed| (ChunkKind::Data, content(seed))).collect();
        let frames = frames_of(&chunks, 2 << 20, 3);
        assert_eq!((frames.len(), frames[0].stored_len == frames[0].raw_len), (1, is_dense));
        let pack = pack_of(&frames);
        assert_eq!(read_all(&pack.bytes, &pack.table), chunks, "{count}");
    }
}

#[test]
fn a_frame_is_taken_up_with_just_its_chunks() {
    let hasher = IdHasher::new([3; 32]);
    let contents: Vec<Vec<u8>> = (0..5).map(|seed| half_noise(seed, 20_000 + seed as usize)).collect();
    for (contents, is_stored) in [(contents, false), ((0..5).map(|seed| noise(seed, 20_000)).collect(), true)]
    {
        let ids = contents.iter().map(|content| hasher.chunk_id(ChunkKind::Data, content));
        let chunks = ids.zip(&contents).map(|(id, content)| Ok((ChunkKind::Data, id, content.as_slice())));
        let frame = RawFrame::of(chunks).unwrap().encode(3).unwrap();
        let entry = FrameEntry { offset: 64, stored_len: frame.stored_len, raw_len: frame.raw_len };
        assert_eq!(frame.raw_len == frame.stored_len, is_stored);
        assert!(FramedChunk::fill(&frame.chunks, frame.raw_len));
        assert!(!FramedChunk::fill(&frame.chunks[..4], frame.raw_len));
        assert!(!FramedChunk::fill(&frame.chunks[1..], frame.raw_len));
        let take = |bytes: &Buffer, chunks: Vec<FramedChunk>| {
            EncodedFrame::taken_up(bytes.clone(), &entry, chunks, &hasher)
        };
        assert_eq!(take(&frame.bytes, frame.chunks.clone()).unwrap(), frame);
        let mut damaged = frame.bytes.clone();
        damaged[frame.bytes.len() - 30] ^= 1;
        assert!(take(&damaged, frame.chunks.clone()).is_err());
        let (mut swapped, mut other) = (frame.chunks.clone(), frame.chunks.clone());
        swapped.swap(0, 1);
        other[2].id = ChunkId::from_bytes([7; 32]);
        for chunks in [swapped, other, frame.chunks[..4].to_vec(), Vec::new()] {
            assert!(take(&frame.bytes, chunks).is_err());
        }
    }
}

#[test]
fn a_frame_of_given_chunks_is_bounded() {
    let id = ChunkId::from_bytes([7; 32]);
    let frame = |len: usize, count: usize| {
        let content = vec![1; len];
        RawFrame::of((0..count).map(|_| Ok((ChunkKind::Data, id, content.as_slice()))))
    };
    let longest = MAX_CHUNK_LEN as usize;
    assert!(frame(longest, 2).is_ok() && frame(1, MAX_FRAME_CHUNKS as usize).is_ok());
    // no more is kept than a frame may have, however many there are
    let refused = [(0, 1), (longest + 1, 1), (longest, 1 << 30), (1, MAX_FRAME_CHUNKS as usize + 1)];
    for (len, count) in refused {
        assert!(matches!(frame(len, count), Err(Error::Malformed { .. })), "{count} of {len}");
    }
}

#[test]
fn a_twin_has_the_same_content_under_another_id() {
    let chunks = vec![(ChunkKind::Node, half_noise(1, 5000)), (ChunkKind::Point, half_noise(2, 9000))];
    let pack = pack_of(&frames_of(&chunks, 1 << 18, 3));
    let twin = pack.twin([4; 32]).unwrap();
    assert_ne!(twin.id, pack.id);
    assert_eq!(twin.id.as_bytes(), blake3::hash(&twin.bytes).as_bytes());
    assert_eq!(PackHeader::decode(&twin.bytes).unwrap().salt, [4; 32]);
    assert_eq!(read_all(&twin.bytes, &table_of(&twin.bytes).unwrap()), chunks);
}

#[test]
fn frames_end_at_their_target() {
    let chunks: Vec<_> = (0..10).map(|seed| (ChunkKind::Data, noise(seed, 10_000))).collect();
    let frames = frames_of(&chunks, 30_000, 1);
    assert_eq!(frames.iter().map(|frame| frame.chunks.len()).collect::<Vec<_>>(), [3, 3, 3, 1]);
    assert!(frames.iter().all(|frame| frame.stored_len == frame.raw_len), "noise is stored as it is");
    let tiny: Vec<_> = (0..MAX_FRAME_CHUNKS + 1).map(|_| (ChunkKind::Data, vec![7])).collect();
    let counts: Vec<_> = frames_of(&tiny, u32::MAX, 1).iter().map(|frame| frame.chunks.len()).collect();
    assert_eq!(counts, [MAX_FRAME_CHUNKS as usize, 1]);
}

#[test]
fn chunks_of_wrong_lengths_do_not_get_into_frames() {
    let mut builder = FrameBuilder::new(1 << 20);
    let id = ChunkId::from_bytes([0; 32]);
    for len in [0, MAX_CHUNK_LEN as usize + 1] {
        assert!(matches!(builder.push(ChunkKind::Data, id, &vec![1; len]), Err(Error::Malformed { .. })));
    }
    assert!(builder.flush().is_none());
}

#[test]
fn a_pack_stays_where_it_can_be_written_from() {
    let frames = frames_of(&[(ChunkKind::Data, noise(1, 100_000))], 1 << 20, 1);
    let mut memory = Buffer::with_room(1 << 20);
    let place = memory.as_ptr();
    for _ in 0..2 {
        let mut builder = PackBuilder::reusing(memory, PackKind::Metadata, REPOSITORY, [3; 32]);
        frames.iter().for_each(|frame| builder.push(frame).unwrap());
        let pack = builder.finish().unwrap();
        let twin = pack.twin([4; 32]).unwrap();
        assert_eq!(pack.bytes.as_ptr(), place);
        assert!(pack.bytes.has_room(1 << 20) && twin.bytes.has_room(twin.bytes.len()));
        memory = pack.bytes;
    }
}

#[test]
fn a_pack_refuses_what_exceeds_its_bounds() {
    let frame = frames_of(&[(ChunkKind::Data, noise(1, MAX_CHUNK_LEN as usize))], 1 << 20, 1).remove(0);
    let mut builder = PackBuilder::new(PackKind::Data, REPOSITORY, [3; 32]);
    let mut pushed = 0;
    while builder.push(&frame).is_ok() {
        pushed += 1;
    }
    assert!(builder.is_full(MAX_PACK_LEN / 2));
    let pack = builder.finish().unwrap();
    assert!(pack.bytes.len() as u64 <= MAX_PACK_LEN);
    assert_eq!(table_of(&pack.bytes).unwrap().frames.len(), pushed);

    // many tiny chunks: the table is what fills up
    let tiny: Vec<_> = (0..MAX_FRAME_CHUNKS).map(|_| (ChunkKind::Data, vec![7])).collect();
    let frame = frames_of(&tiny, 1 << 20, 1).remove(0);
    let mut builder = PackBuilder::new(PackKind::Data, REPOSITORY, [3; 32]);
    while !builder.is_full(MAX_PACK_LEN / 2) {
        builder.push(&frame).unwrap();
    }
    let fault = loop {
        if let Err(Error::Malformed { fault, .. }) = builder.push(&frame) {
            break fault;
        }
    };
    assert!(matches!(fault, FormatFault::TooLarge { what: "the table", .. }));
    let pack = builder.finish().unwrap();
    // longer than the first guess of the reader
    assert!(pack.table.chunks.len() > 100_000);
    assert_eq!(table_of(&pack.bytes).unwrap(), pack.table);
}

fn frame_bytes(codec: u8, raw_len: u32, content: &[u8]) -> (Vec<u8>, FrameEntry) {
    let stored_len = content.len() as u32;
    let mut bytes = FrameHeader { codec, raw_len, stored_len }.encode().to_vec();
    bytes.extend_from_slice(content);
    (bytes, FrameEntry { offset: 64, stored_len, raw_len })
}

#[test]
fn bombs_are_refused() {
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 3).unwrap();
    // it says 4 MiB and holds 64
    let (bytes, entry) = frame_bytes(1, MAX_FRAME_RAW_LEN, &bomb);
    assert!(matches!(open_frame(&bytes, &entry), Err(FormatFault::Decompress { .. })));
    // it says more than a frame may have
    let (bytes, entry) = frame_bytes(1, u32::MAX, &bomb);
    assert!(matches!(open_frame(&bytes, &entry), Err(FormatFault::TooLarge { .. })));
    // it says less, or more, than it holds
    let small = zstd::bulk::compress(&[1; 1000], 3).unwrap();
    for raw_len in [0, 999, 1001] {
        let (bytes, entry) = frame_bytes(1, raw_len, &small);
        assert!(matches!(open_frame(&bytes, &entry), Err(FormatFault::Decompress { .. })), "{raw_len}");
    }
    let (bytes, entry) = frame_bytes(1, 2000, &[&small[..], &small[..]].concat());
    assert!(open_frame(&bytes, &entry).is_err(), "two zstd frames in one");
    let (bytes, entry) = frame_bytes(7, 10, &[0; 10]);
    assert_eq!(open_frame(&bytes, &entry), Err(FormatFault::Codec(7)));
    let (bytes, entry) = frame_bytes(0, 11, &[0; 10]);
    assert!(matches!(open_frame(&bytes, &entry), Err(FormatFault::Decompress { .. })));
}

#[test]
fn header_and_entry_have_to_agree() {
    let (bytes, entry) = frame_bytes(0, 10, &[1; 10]);
    assert_eq!(open_frame(&bytes, &entry), Ok(vec![1; 10]));
    for wrong in [FrameEntry { raw_len: 11, ..entry }, FrameEntry { stored_len: 9, ..entry }] {
        assert!(matches!(open_frame(&bytes, &wrong), Err(FormatFault::Mismatch { .. })));
    }
    assert!(matches!(open_frame(&bytes[..20], &entry), Err(FormatFault::Truncated { .. })));
    assert!(matches!(open_frame(&[&bytes[..], &[0]].concat(), &entry), Err(FormatFault::Trailing { .. })));
}

#[test]
fn packs_of_impossible_lengths_are_not_read() {
    let id = PackId::from_bytes([0; 32]);
    for len in [0, (PACK_HEADER_LEN + PACK_FOOTER_LEN) as u64 - 1, MAX_PACK_LEN + 1, u64::MAX] {
        let result = read_pack_table(id, len, &mut |_, _| panic!("read of a pack of {len} bytes"));
        assert!(matches!(result, Err(Error::Malformed { .. })));
    }
    // a storage that returns too little
    assert!(read_pack_table(id, 1000, &mut |_, _| Ok(vec![0; 3])).is_err());
}

#[test]
fn salvage_steps_over_damage_and_false_frames() {
    // content that itself looks like a frame, stored as it is
    let (decoy, _) = frame_bytes(0, 9, &[1, 0, 0, 0, 1, 0, 0, 0, 42]);
    let mut noisy = noise(5, 20_000);
    noisy[5000..5000 + decoy.len()].copy_from_slice(&decoy);
    let chunks: Vec<_> =
        [noisy, noise(6, 20_000), half_noise(7, 20_000)].into_iter().map(|c| (ChunkKind::Data, c)).collect();
    let pack = pack_of(&frames_of(&chunks, 1, 3));
    let found: Vec<_> = Salvage::new(&pack.bytes).collect();
    assert_eq!(found.iter().map(|frame| frame.entry).collect::<Vec<_>>(), pack.table.frames);
    for (frame, (_, plain)) in found.iter().zip(&chunks) {
        let [only] = frame.chunks[..] else { panic!("{:?}", frame.chunks) };
        assert_eq!(&frame.plain[only.offset as usize..][..only.len as usize], plain);
    }
    // with its header gone, the first frame is lost and its decoy is found: only its id can tell
    let mut damaged = pack.bytes.clone();
    damaged[PACK_HEADER_LEN] ^= 1;
    let found: Vec<_> = Salvage::new(&damaged).map(|frame| frame.plain.len()).collect();
    assert_eq!(found, [9, 20_008, 20_008]);
}

#[test]
fn false_frames_do_not_hide_those_behind() {
    // a disk full of headers that claim much, laid bare by damage in front of them
    let mut header = FrameHeader { codec: 1, raw_len: MAX_FRAME_RAW_LEN, stored_len: 1000 }.encode().to_vec();
    header.extend_from_slice(&noise(1, 4));
    let hostile: Vec<u8> = header.iter().copied().cycle().take(1 << 20).collect();
    let frames = frames_of(&[(ChunkKind::Data, hostile), (ChunkKind::Data, half_noise(2, 10_000))], 1, -3);
    let mut stored = EncodedFrame { bytes: frames[0].bytes.clone(), ..frames[0].clone() };
    // as a stored frame, so that its content stands in the pack as it is
    let plain = open_frame(
        &stored.bytes,
        &FrameEntry { offset: 64, stored_len: stored.stored_len, raw_len: stored.raw_len },
    );
    let (bytes, entry) = frame_bytes(0, stored.raw_len, &plain.unwrap());
    (stored.bytes, stored.stored_len) = (bytes.into(), entry.stored_len);
    let mut bytes = pack_of(&[stored, frames[1].clone()]).bytes;
    bytes[PACK_HEADER_LEN] ^= 1;
    let mut salvage = Salvage::new(&bytes);
    assert_eq!(salvage.next().map(|frame| frame.plain.len()), Some(10_008));
    assert!(salvage.next().is_none() && !salvage.gave_up());
}

//! What each stage of vmkeep costs, with a bare loop beside it.
//!
//! `cargo bench` prints the tables. Ratios within one run are what counts: the machine is the same then.
//! `VMKEEP_BENCH_MIB` sets the size of the image that goes from end to end (default 256).

mod f_end_to_end;

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use vmkeep::buffer::Buffer;
use vmkeep::chunk::{
    Cutter, EncodedFrame, FinishedPack, FrameBuilder, IdHasher, PackBuilder, RawFrame, open_frame,
};
use vmkeep::error::{Error, Result};
use vmkeep::extent::{ByteRange, RangeSet};
use vmkeep::format::config::CutterParams;
use vmkeep::format::name::ObjectName;
use vmkeep::format::node::{ChunkKind, LeafEntry, Node};
use vmkeep::format::pack::{FrameEntry, PackKind};
use vmkeep::format::point::Manifest;
use vmkeep::format::segment::{Segment, SegmentChunk, SegmentPack};
use vmkeep::id::{ChunkId, PackId, RepositoryId, SegmentId, SessionId};
use vmkeep::index::{Index, MemoryIndex, open_index};
use vmkeep::manifest::{Cursor, Geometry, NodeReader, NodeWriter, TreeWriter, diff};
use vmkeep::monitor::Recorder;
use vmkeep::nbd::Address;
use vmkeep::ops::RequestedLevel;
use vmkeep::ops::backup::{ImageBackupOptions, ImageInput, backup_image};
use vmkeep::repo::{CreateOptions, Environment, Repository, is_zero};
use vmkeep::source::DiskSource;
use vmkeep::source::image::{ImageFileFormat, open_image};
use vmkeep::source::nbd::NbdDisk;
use vmkeep::source::qemu_nbd::QemuNbd;

const MIB: u64 = 1 << 20;
const KEY: [u8; 32] = [7; 32];

fn main() {
    divan::main();
}

/// Numbers without a pattern, the same in each run (xorshift64*, Vigna 2016).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// Content as disks have it: of 16 pieces of 64 KiB 8 are words, 4 records, 3 noise, 1 zeroes.
fn disk_content(len: u64, seed: u64) -> Vec<u8> {
    let words: Vec<String> =
        (0..2000u64).map(|n| format!("{:x} ", Random(n + 1).next() >> (20 + n % 30))).collect();
    let mut random = Random(seed);
    let mut content = Vec::with_capacity(len as usize + 64);
    while (content.len() as u64) < len {
        let end = content.len() + 65_536;
        let kind = random.next() % 16;
        while content.len() < end {
            match kind {
                0..8 => content.extend_from_slice(words[(random.next() % 2000) as usize].as_bytes()),
                8..12 => {
                    content.extend_from_slice(&(content.len() as u64).to_le_bytes());
                    content.extend_from_slice(&[0, 0, 1, 0, (random.next() % 7) as u8, 0, 0, 0]);
                }
                12..15 => content.extend_from_slice(&random.next().to_le_bytes()),
                _ => content.resize(end, 0),
            }
        }
        content.truncate(end);
    }
    content.truncate(len as usize);
    content
}

fn sample() -> &'static [u8] {
    static SAMPLE: OnceLock<Vec<u8>> = OnceLock::new();
    SAMPLE.get_or_init(|| disk_content(16 * MIB, 1))
}

fn cutter() -> Cutter {
    Cutter::new(CutterParams::default()).unwrap()
}

/// What the cutter makes of the sample.
fn sample_chunks() -> Vec<&'static [u8]> {
    let mut rest = sample();
    let mut next = |len| {
        let (chunk, behind) = rest.split_at(len);
        rest = behind;
        chunk
    };
    cutter().cut(sample()).map(&mut next).collect()
}

fn sample_frames() -> Vec<RawFrame> {
    let (hasher, mut builder, mut frames) = (IdHasher::new(KEY), FrameBuilder::new(1 << 20), Vec::new());
    for plain in sample_chunks() {
        frames.extend(builder.push(ChunkKind::Data, hasher.chunk_id(ChunkKind::Data, plain), plain).unwrap());
    }
    frames.extend(builder.flush());
    frames
}

mod a_bytes {
    use super::*;

    fn per_byte(bencher: Bencher<'_, '_>, work: impl Fn(&[u8]) -> u64 + Sync) {
        bencher.counter(BytesCount::of_slice(sample())).bench(|| work(divan::black_box(sample())));
    }

    #[divan::bench]
    fn bare_copy(bencher: Bencher<'_, '_>) {
        per_byte(bencher, |bytes| divan::black_box(bytes.to_vec()).len() as u64);
    }

    #[divan::bench]
    fn bare_compare(bencher: Bencher<'_, '_>) {
        let other = sample().to_vec();
        per_byte(bencher, |bytes| u64::from(bytes == divan::black_box(other.as_slice())));
    }

    /// Zeroes to the end.
    #[divan::bench]
    fn see_zeroes(bencher: Bencher<'_, '_>) {
        let zeroes = vec![0; sample().len()];
        bencher.counter(BytesCount::of_slice(&zeroes)).bench(|| is_zero(divan::black_box(&zeroes)));
    }

    #[divan::bench]
    fn cut(bencher: Bencher<'_, '_>) {
        let cutter = cutter();
        per_byte(bencher, |bytes| cutter.cut(bytes).count() as u64);
    }

    #[divan::bench]
    fn bare_blake3(bencher: Bencher<'_, '_>) {
        per_byte(bencher, |bytes| u64::from(blake3::hash(bytes).as_bytes()[0]));
    }

    /// As `name_chunks`, without the kinds that ids have in them.
    #[divan::bench]
    fn bare_blake3_per_chunk(bencher: Bencher<'_, '_>) {
        let chunks = sample_chunks();
        bencher.counter(BytesCount::of_slice(sample())).bench(|| {
            let hashes = chunks.iter().map(|chunk| blake3::keyed_hash(&KEY, divan::black_box(chunk)));
            hashes.map(|hash| u64::from(hash.as_bytes()[0])).sum::<u64>()
        });
    }

    #[divan::bench]
    fn name_chunks(bencher: Bencher<'_, '_>) {
        let (chunks, hasher) = (sample_chunks(), IdHasher::new(KEY));
        bencher.counter(BytesCount::of_slice(sample())).bench(|| {
            let ids = chunks.iter().map(|chunk| hasher.chunk_id(ChunkKind::Data, divan::black_box(chunk)));
            ids.map(|id| u64::from(id.as_bytes()[0])).sum::<u64>()
        });
    }

    #[divan::bench]
    fn cut_and_name(bencher: Bencher<'_, '_>) {
        let (cutter, hasher) = (cutter(), IdHasher::new(KEY));
        per_byte(bencher, |bytes| {
            let mut from = 0;
            let ids = cutter.cut(bytes).map(|len| {
                from += len;
                hasher.chunk_id(ChunkKind::Data, &bytes[from - len..from])
            });
            ids.map(|id| u64::from(id.as_bytes()[0])).sum()
        });
    }

    /// All of it, noise too, with the tables that frames are made with.
    #[divan::bench(sample_count = 20)]
    fn bare_zstd_3(bencher: Bencher<'_, '_>) {
        per_byte(bencher, |bytes| {
            let mut compressor = zstd::bulk::Compressor::new(3).unwrap();
            compressor.set_parameter(zstd::zstd_safe::CParameter::HashLog(16)).unwrap();
            compressor.set_parameter(zstd::zstd_safe::CParameter::ChainLog(14)).unwrap();
            bytes.chunks(1 << 20).map(|piece| compressor.compress(piece).unwrap().len() as u64).sum()
        });
    }

    /// Compressed, decompressed again and compared.
    #[divan::bench(sample_count = 20)]
    fn frame(bencher: Bencher<'_, '_>) {
        let bencher = bencher.counter(BytesCount::of_slice(sample())).with_inputs(sample_frames);
        bencher.bench_local_values(|frames| {
            frames.into_iter().map(|frame| frame.encode(3).unwrap().bytes.len()).sum::<usize>()
        });
    }

    #[divan::bench]
    fn open_frames(bencher: Bencher<'_, '_>) {
        let frames: Vec<_> = sample_frames()
            .into_iter()
            .map(|frame| {
                let encoded = frame.encode(3).unwrap();
                (
                    encoded.bytes,
                    FrameEntry { offset: 0, stored_len: encoded.stored_len, raw_len: encoded.raw_len },
                )
            })
            .collect();
        bencher.counter(BytesCount::of_slice(sample())).bench(|| {
            frames.iter().map(|(bytes, entry)| open_frame(bytes, entry).unwrap().len()).sum::<usize>()
        });
    }
}

/// Random content in frames, as it is stored: nothing compresses it.
fn stored_frames() -> Vec<EncodedFrame> {
    let (hasher, mut builder, mut random) = (IdHasher::new(KEY), FrameBuilder::new(1 << 20), Random(21));
    let mut raw = Vec::new();
    for _ in 0..16 * MIB / CHUNK {
        let plain: Vec<u8> = (0..CHUNK / 8).flat_map(|_| random.next().to_le_bytes()).collect();
        let id = hasher.chunk_id(ChunkKind::Data, &plain);
        raw.extend(builder.push(ChunkKind::Data, id, &plain).unwrap());
    }
    raw.extend(builder.flush());
    raw.into_iter().map(|frame| frame.encode(3).unwrap()).collect()
}

const CHUNK: u64 = 32 << 10;
const REPOSITORY: RepositoryId = RepositoryId::from_bytes([3; 16]);

/// A pack of 16 MiB.
fn pack(frames: &[EncodedFrame]) -> FinishedPack {
    // as a session's
    let mut builder = PackBuilder::reusing(Buffer::with_room(18 << 20), PackKind::Data, REPOSITORY, [9; 32]);
    frames.iter().for_each(|frame| builder.push(frame).unwrap());
    builder.finish().unwrap()
}

mod b_packs {
    use super::*;

    /// Lined up, hashed, with the table.
    #[divan::bench]
    fn build(bencher: Bencher<'_, '_>) {
        let frames = stored_frames();
        let len: usize = frames.iter().map(|frame| frame.bytes.len()).sum();
        bencher.counter(BytesCount::new(len)).bench(|| pack(&frames).id);
    }

    #[divan::bench(sample_count = 10, sample_size = 1)]
    fn bare_write_and_sync(bencher: Bencher<'_, '_>) {
        let (dir, pack) = (tempfile::tempdir().unwrap(), pack(&stored_frames()));
        let mut number = 0;
        bencher.counter(BytesCount::of_slice(&*pack.bytes)).bench_local(|| {
            number += 1;
            let mut file = File::create(dir.path().join(format!("{number}"))).unwrap();
            file.write_all(&pack.bytes).unwrap();
            file.sync_all().unwrap();
        });
    }

    /// Written past the page cache, named and durable, as all that backups store.
    #[divan::bench(sample_count = 10, sample_size = 1)]
    fn put(bencher: Bencher<'_, '_>) {
        let (dir, pack) = (tempfile::tempdir().unwrap(), pack(&stored_frames()));
        let url = dir.path().join("repository");
        let storage = vmkeep::storage::create_url(url.to_str().unwrap()).unwrap();
        let mut number = 0u64;
        bencher.counter(BytesCount::of_slice(&*pack.bytes)).bench_local(|| {
            number += 1;
            let id = PackId::from_bytes(*blake3::hash(&number.to_le_bytes()).as_bytes());
            storage.put_new(ObjectName::Pack(id), &pack.bytes).unwrap();
        });
    }
}

/// Nodes in memory.
#[derive(Default)]
struct Nodes(Mutex<HashMap<ChunkId, Vec<u8>>>);

impl NodeReader for Nodes {
    fn read_node(&self, id: ChunkId) -> Result<Arc<Node>> {
        let missing = || Error::MissingChunk { id, wanted_by: "a bench".into() };
        let nodes = self.0.lock().unwrap();
        let plain = nodes.get(&id).ok_or_else(missing)?;
        Node::decode(plain).map(Arc::new).map_err(|fault| Error::malformed(id, fault))
    }
}

/// New nodes, which are not read while the tree is made.
#[derive(Default)]
struct NewNodes(Vec<(ChunkId, Vec<u8>)>);

impl NodeWriter for NewNodes {
    fn write_node(&mut self, plain: Vec<u8>) -> Result<ChunkId> {
        let id = IdHasher::new(KEY).chunk_id(ChunkKind::Node, &plain);
        self.0.push((id, plain));
        Ok(id)
    }
}

/// The map of a disk of 1 TiB of which 64 GiB hold data, in chunks of 32 KiB.
struct Map {
    nodes: Nodes,
    manifest: Manifest,
}

const DISK: u64 = 1 << 40;
const LEAF: u64 = MIB;
const LEAVES: u64 = 65_536;

fn geometry() -> Geometry {
    Geometry::new(LEAF, CreateOptions::default().fanout).unwrap()
}

fn leaf(number: u64, salt: u64) -> Vec<LeafEntry> {
    let id = |n: u64| {
        IdHasher::new(KEY).chunk_id(ChunkKind::Data, &(number * 64 + n).wrapping_add(salt).to_le_bytes())
    };
    (0..32).map(|n| LeafEntry::Chunk { len: 32 << 10, offset: 0, id: id(n) }).collect()
}

fn patch(nodes: &Nodes, old: Option<Manifest>, leaves: &[u64], salt: u64) -> (Manifest, NewNodes) {
    let mut new = NewNodes::default();
    let mut writer = TreeWriter::new(geometry(), DISK, old, nodes, &mut new).unwrap();
    for number in leaves {
        writer.put_leaf(*number, &leaf(*number, salt)).unwrap();
    }
    let manifest = writer.finish().unwrap();
    (manifest, new)
}

fn map() -> &'static Map {
    static MAP: OnceLock<Map> = OnceLock::new();
    MAP.get_or_init(|| {
        let nodes = Nodes::default();
        let all: Vec<u64> = (0..LEAVES).map(|n| n * 16).collect();
        let (manifest, new) = patch(&nodes, None, &all, 0);
        nodes.0.lock().unwrap().extend(new.0);
        Map { nodes, manifest }
    })
}

/// Leaves that a nightly backup might touch, in order.
fn scattered(count: u64) -> Vec<u64> {
    let mut random = Random(9);
    let mut found: Vec<u64> = (0..count).map(|_| random.next() % LEAVES * 16).collect();
    found.sort_unstable();
    found.dedup();
    found
}

mod c_manifest {
    use super::*;

    #[divan::bench(args = [100, 4000], sample_count = 10)]
    fn patch_scattered_leaves(bencher: Bencher<'_, '_>, count: u64) {
        let (map, leaves) = (map(), scattered(count));
        bencher
            .counter(ItemsCount::new(leaves.len()))
            .bench(|| patch(&map.nodes, Some(map.manifest), &leaves, 1));
    }

    #[divan::bench(sample_count = 10)]
    fn look_up_scattered_leaves(bencher: Bencher<'_, '_>) {
        let (map, leaves) = (map(), scattered(4000));
        bencher.counter(ItemsCount::new(leaves.len())).bench(|| {
            let mut cursor = Cursor::new(geometry(), &map.manifest, &map.nodes).unwrap();
            leaves.iter().filter(|leaf| cursor.leaf(**leaf).unwrap().is_some()).count()
        });
    }

    #[divan::bench(sample_count = 10)]
    fn diff_of_scattered_leaves(bencher: Bencher<'_, '_>) {
        let (map, leaves) = (map(), scattered(4000));
        let (other, new) = patch(&map.nodes, Some(map.manifest), &leaves, 2);
        map.nodes.0.lock().unwrap().extend(new.0);
        bencher.counter(ItemsCount::new(leaves.len())).bench(|| {
            let mut bytes = 0;
            let mut sink = |range: ByteRange| bytes += range.len();
            diff(geometry(), &map.manifest, &other, &map.nodes, &Recorder::new(), &mut sink).unwrap();
            bytes
        });
    }
}

fn chunk_id(number: u64) -> ChunkId {
    IdHasher::new(KEY).chunk_id(ChunkKind::Data, &number.to_le_bytes())
}

/// A segment of 100,000 chunks.
fn segment(number: u64) -> (SegmentId, Segment) {
    let chunk = |n: u64| SegmentChunk {
        id: chunk_id(number * 100_000 + n),
        kind: ChunkKind::Data,
        pack: 0,
        frame: 0,
        offset: 0,
        len: 1,
    };
    let mut chunks: Vec<SegmentChunk> = (0..100_000).map(chunk).collect();
    chunks.sort_unstable_by_key(|chunk| chunk.id);
    let id = *blake3::hash(&number.to_le_bytes()).as_bytes();
    let pack = SegmentPack {
        id: PackId::from_bytes(id),
        kind: PackKind::Data,
        stored_len: 1 << 20,
        frames: vec![FrameEntry { offset: 64, stored_len: 100, raw_len: 100 }],
    };
    let owner = SessionId::from_bytes([1; 16]);
    (SegmentId::from_bytes(id), Segment { owner, number: 0, packs: vec![pack], chunks })
}

mod d_index {
    use super::*;

    const CHUNKS: u64 = 1_000_000;

    fn filled(index: Box<dyn Index>) -> Box<dyn Index> {
        for number in 0..CHUNKS / 100_000 {
            index.apply(&[segment(number)]).unwrap();
        }
        index
    }

    fn look_up(bencher: Bencher<'_, '_>, index: &dyn Index, from: u64) {
        let mut random = Random(5);
        let ids: Vec<ChunkId> = (0..10_000).map(|_| chunk_id(from + random.next() % CHUNKS)).collect();
        let known = if from == 0 { ids.len() } else { 0 };
        bencher.counter(ItemsCount::new(ids.len())).bench_local(|| {
            let found = index.lookup(&ids).unwrap();
            assert_eq!(found.iter().filter(|places| !places.is_empty()).count(), known);
        });
    }

    #[divan::bench(args = ["known", "new"], sample_count = 20)]
    fn in_memory(bencher: Bencher<'_, '_>, which: &str) {
        let index = filled(Box::new(MemoryIndex::default()));
        look_up(bencher, index.as_ref(), if which == "new" { CHUNKS } else { 0 });
    }

    #[divan::bench(args = ["known", "new"], sample_count = 20)]
    fn on_disk(bencher: Bencher<'_, '_>, which: &str) {
        let dir = tempfile::tempdir().unwrap();
        let index = filled(open_index(Some(dir.path()), REPOSITORY).index);
        look_up(bencher, index.as_ref(), if which == "new" { CHUNKS } else { 0 });
    }

    #[divan::bench(sample_count = 20)]
    fn encode_segment(bencher: Bencher<'_, '_>) {
        let (_, segment) = segment(1);
        let items = ItemsCount::new(segment.chunks.len());
        bencher.counter(items).bench(|| segment.to_object(REPOSITORY).unwrap().len());
    }

    /// Read from memory, opened and checked against itself.
    #[divan::bench(sample_count = 20)]
    fn decode_segment(bencher: Bencher<'_, '_>) {
        let (_, segment) = segment(1);
        let object = segment.to_object(REPOSITORY).unwrap();
        let items = ItemsCount::new(segment.chunks.len());
        bencher.counter(items).bench(|| Segment::from_object(&object, REPOSITORY).unwrap().chunks.len());
    }

    #[divan::bench(sample_count = 3)]
    fn rebuild_on_disk(bencher: Bencher<'_, '_>) {
        let segments: Vec<_> = (0..CHUNKS / 100_000).map(segment).collect();
        bencher.counter(ItemsCount::new(CHUNKS as usize)).bench_local(|| {
            let dir = tempfile::tempdir().unwrap();
            let index = open_index(Some(dir.path()), REPOSITORY).index;
            for pair in segments.chunks(2) {
                index.apply(pair).unwrap();
            }
        });
    }
}

/// A directory with an image, its changed copy, and a repository that holds the image.
struct Place {
    dir: tempfile::TempDir,
    len: u64,
}

fn image_len() -> u64 {
    let asked = std::env::var("VMKEEP_BENCH_MIB").ok().and_then(|text| text.parse().ok());
    asked.unwrap_or(256) * MIB
}

fn environment() -> Environment {
    Environment {
        host: "bench".into(),
        boot_id: "bench".into(),
        process_id: std::process::id(),
        program: "bench".into(),
        now_ms: || 1_700_000_000_000,
        timing: vmkeep::repo::Timing::default(),
    }
}

impl Place {
    fn new() -> Self {
        let place = Self { dir: tempfile::tempdir().unwrap(), len: image_len() };
        let mut file = File::create(place.image()).unwrap();
        for at in 0..place.len.div_ceil(16 * MIB) {
            let content = disk_content((place.len - at * 16 * MIB).min(16 * MIB), at + 100);
            file.write_all(&content).unwrap();
        }
        std::fs::copy(place.image(), place.changed()).unwrap();
        let changed = File::options().write(true).open(place.changed()).unwrap();
        let mut random = Random(77);
        for _ in 0..place.len / 4096 / 100 {
            let block: Vec<u8> = (0..512).flat_map(|_| random.next().to_le_bytes()).collect();
            changed.write_all_at(&block, random.next() % (place.len / 4096) * 4096).unwrap();
        }
        place
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn changed(&self) -> PathBuf {
        self.dir.path().join("changed")
    }

    fn create(&self, name: &str) -> Repository {
        let path = self.dir.path().join(name);
        let storage = vmkeep::storage::create_url(path.to_str().unwrap()).unwrap();
        Repository::create(storage, &CreateOptions::default(), &environment()).unwrap()
    }

    fn filled(&self) -> Repository {
        let repository = self.create("filled");
        keep(&repository, &self.image());
        repository
    }
}

fn keep(repository: &Repository, image: &Path) {
    let options = ImageBackupOptions {
        domain: "bench".into(),
        disk: "vda".into(),
        input: ImageInput::File { path: image.to_path_buf(), format: None },
        level: RequestedLevel::Auto,
        tags: Vec::new(),
        read_limit: None,
        dry_run: false,
    };
    backup_image(repository, &options, &Recorder::new()).unwrap();
}

/// Images that are read, without anything done with what they hold. They are in the page cache.
mod e_sources {
    use super::*;

    fn read_whole(source: &mut dyn DiskSource) {
        let whole = RangeSet::whole(source.size());
        let mut len = 0;
        source
            .read(&whole, &Recorder::new(), &mut |range, payload| {
                len += range.len();
                std::hint::black_box(payload);
                Ok(())
            })
            .unwrap();
        assert_eq!(len, source.size());
    }

    /// Returns a server of the image, unless there is no program for it.
    fn served(place: &Place) -> Option<QemuNbd> {
        match QemuNbd::readable(&place.image(), "raw", &[], &Recorder::new()) {
            Ok(server) => Some(server),
            Err(error) => {
                println!("left out: {error}");
                None
            }
        }
    }

    #[divan::bench(sample_count = 5, sample_size = 1)]
    fn bare_read(bencher: Bencher<'_, '_>) {
        let place = Place::new();
        bencher.counter(BytesCount::new(place.len)).bench_local(|| {
            let mut file = File::open(place.image()).unwrap();
            let mut buffer = vec![0; MIB as usize];
            while file.read(&mut buffer).unwrap() > 0 {}
        });
    }

    #[divan::bench(sample_count = 5, sample_size = 1)]
    fn read_a_raw_image(bencher: Bencher<'_, '_>) {
        let place = Place::new();
        bencher.counter(BytesCount::new(place.len)).bench_local(|| {
            let mut source = open_image(&place.image(), ImageFileFormat::Raw, &Recorder::new()).unwrap();
            read_whole(source.as_mut());
        });
    }

    /// libnbd's own program, which throws away what it reads.
    #[divan::bench(sample_count = 5, sample_size = 1)]
    fn bare_nbdcopy_to_nothing(bencher: Bencher<'_, '_>) {
        let place = Place::new();
        let copy = |server: &QemuNbd| {
            let Address::Unix(socket) = server.address() else { panic!("no socket") };
            let uri = format!("nbd+unix:///{}?socket={}", server.export(), socket.display());
            std::process::Command::new("nbdcopy").args(["--connections=1", "--", &uri, "null:"]).status()
        };
        match served(&place).as_ref().map(copy) {
            Some(Ok(_)) => {}
            Some(Err(error)) => return println!("left out: nbdcopy: {error}"),
            None => return,
        }
        bencher
            .counter(BytesCount::new(place.len))
            .with_inputs(|| served(&place).unwrap())
            .bench_local_values(|server| assert!(copy(&server).unwrap().success()));
    }

    #[divan::bench(sample_count = 5, sample_size = 1)]
    fn read_over_nbd(bencher: Bencher<'_, '_>) {
        let place = Place::new();
        if served(&place).is_none() {
            return;
        }
        // each serves one client
        bencher
            .counter(BytesCount::new(place.len))
            .with_inputs(|| served(&place).unwrap())
            .bench_local_values(|server| {
                let (silent, label) = (Recorder::new(), String::new());
                let mut source =
                    NbdDisk::open(&server.address(), server.export(), None, label, &silent).unwrap();
                read_whole(&mut source);
            });
    }
}

//! Invented and damaged bytes in every decoder: refused or harmless, without panic, hang or much memory.
//!
//! A hash in front would hide the decoders from random damage, so bodies are damaged first and wrapped again. What is
//! accepted must be the only encoding of its value: otherwise two programs could name one content twice.

use std::fmt::Debug;
use std::io::Write;

use proptest::prelude::*;
use vmkeep::chunk::{Salvage, open_frame, read_pack_table};
use vmkeep::error::{Error, FormatFault};
use vmkeep::format::codec;
use vmkeep::format::config::Config;
use vmkeep::format::envelope::{self, ObjectKind};
use vmkeep::format::limits::{MAX_FRAME_RAW_LEN, MAX_SEGMENT_LEN};
use vmkeep::format::name::ObjectName;
use vmkeep::format::node::Node;
use vmkeep::format::pack::{
    FRAME_HEADER_LEN, FrameEntry, FrameHeader, PACK_FOOTER_LEN, PACK_HEADER_LEN, PackFooter, PackHeader,
    PackTable, frame_chunks,
};
use vmkeep::format::point::PointRecord;
use vmkeep::format::segment::Segment;
use vmkeep::format::session::{Damage, Mark, Outcome, SessionKind, SessionRecord, Tombstone};
use vmkeep::id::{ChunkId, PackId, PointId, RepositoryId};

use crate::fixtures;

const REPOSITORY: RepositoryId = RepositoryId::from_bytes([0x11; 16]);

/// One decoder, to be given anything.
pub struct Decoder {
    pub name: &'static str,
    /// Bytes that it accepts.
    pub samples: Vec<Vec<u8>>,
    pub decode: fn(&[u8]),
}

/// Decodes an encoded value; one that is accepted encodes to the same bytes.
fn value<T: bincode::Encode + bincode::Decode<()>>(bytes: &[u8]) {
    if let Ok(value) = codec::decode::<T>(bytes) {
        assert!(codec::encode(&value).unwrap() == bytes, "another encoding of one value is accepted");
    }
}

/// Opens an object whose envelope is right around a body that may be wrong.
fn wrapped<T>(kind: ObjectKind, body: &[u8], open: fn(&[u8], RepositoryId) -> Result<T, FormatFault>) {
    if let Ok(object) = envelope::wrap(kind, REPOSITORY, body) {
        let _ = open(&object, REPOSITORY);
        assert!(open(&object, RepositoryId::from_bytes([0x12; 16])).is_err(), "another repository's object");
    }
}

fn node(bytes: &[u8]) {
    if let Ok(node) = Node::decode(bytes) {
        assert!(node.encode().unwrap() == bytes);
    }
}

fn table(plain: &[u8]) {
    let footer = PackFooter {
        table_offset: 1 << 20,
        table_raw_len: u32::try_from(plain.len()).unwrap(),
        table_stored_len: u32::try_from(plain.len()).unwrap(),
        table_codec: 0,
        table_hash: *blake3::hash(plain).as_bytes(),
    };
    if let Ok(table) = PackTable::decode(plain, &footer) {
        for chunk in &table.chunks {
            let frame = &table.frames[chunk.frame as usize];
            assert!(chunk.offset + chunk.len <= frame.raw_len && frame.end() <= footer.table_offset);
        }
    }
}

/// Reads a whole pack as the library does, by its table and by a scan.
fn pack(bytes: &[u8]) {
    let _ = PackHeader::decode(bytes);
    let mut read = |offset: u64, len: u64| {
        let (start, end) = (offset as usize, (offset + len) as usize);
        let range = bytes.get(start..end).ok_or_else(|| Error::malformed("a pack", FormatFault::Checksum))?;
        Ok(range.to_vec())
    };
    let id = PackId::from_bytes([0; 32]);
    if let Ok(table) = read_pack_table(id, bytes.len() as u64, &mut read) {
        for entry in &table.frames {
            if let Some(frame) = bytes.get(entry.offset as usize..entry.end() as usize) {
                let _ = open_frame(frame, entry).map(|plain| frame_chunks(&plain));
            }
        }
    }
    for found in Salvage::new(bytes) {
        assert!(found.entry.end() <= bytes.len() as u64);
        for chunk in found.chunks {
            assert!((chunk.offset + chunk.len) as usize <= found.plain.len());
        }
    }
}

fn frame(bytes: &[u8]) {
    if let Ok(header) = FrameHeader::decode(bytes) {
        let entry = FrameEntry { offset: 64, stored_len: header.stored_len, raw_len: header.raw_len };
        if let Ok(plain) = open_frame(bytes, &entry) {
            assert!(plain.len() <= MAX_FRAME_RAW_LEN as usize);
            let _ = frame_chunks(&plain);
        }
    }
}

fn whole_object(bytes: &[u8]) {
    let _ = Config::from_object(bytes);
    let _ = Segment::from_object(bytes, REPOSITORY);
    let _ = SessionRecord::from_object(bytes, REPOSITORY);
    let _ = Outcome::from_object(bytes, REPOSITORY);
    let _ = Mark::from_object(bytes, REPOSITORY);
    let _ = Tombstone::from_object(bytes, REPOSITORY);
    let _ = Damage::from_object(bytes, REPOSITORY);
}

fn name(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Some(name) = ObjectName::parse(&text) {
        assert_eq!(name.to_string(), text);
    }
}

/// Bodies of whole objects below a folder of the fixtures.
fn bodies(folder: &str, kind: ObjectKind) -> Vec<Vec<u8>> {
    let files = ["smallest", "two_points"].into_iter().flat_map(fixtures::files);
    let bodies = files.filter(|(name, _)| name.starts_with(folder));
    bodies.map(|(_, bytes)| envelope::open(kind, &bytes).unwrap().body).collect()
}

/// Packs of the fixtures that are not too long for many runs.
fn packs() -> Vec<Vec<u8>> {
    let files = ["smallest", "two_points"].into_iter().flat_map(fixtures::files);
    let packs = files.filter(|(name, bytes)| name.starts_with("packs/") && bytes.len() < 2000);
    packs.map(|(_, bytes)| bytes).collect()
}

/// Samples of one kind of bytes.
type Samples = Vec<Vec<u8>>;

fn parts_of_packs() -> (Samples, Samples, Samples, Samples) {
    let (mut frames, mut plains, mut tables, mut nodes) = (vec![], vec![], vec![], vec![]);
    for bytes in packs() {
        let footer = PackFooter::decode(&bytes[bytes.len() - PACK_FOOTER_LEN..], bytes.len() as u64).unwrap();
        let stored = &bytes[footer.table_offset as usize..bytes.len() - PACK_FOOTER_LEN];
        let table = PackTable::decode(stored, &footer).unwrap();
        for entry in &table.frames {
            let frame = &bytes[entry.offset as usize..entry.end() as usize];
            let plain = open_frame(frame, entry).unwrap();
            for chunk in frame_chunks(&plain).unwrap() {
                let chunk = &plain[chunk.offset as usize..(chunk.offset + chunk.len) as usize];
                nodes.extend(Node::decode(chunk).is_ok().then(|| chunk.to_vec()));
            }
            frames.push(frame.to_vec());
            plains.push(plain);
        }
        tables.push(codec::encode(&table).unwrap());
    }
    (frames, plains, tables, nodes)
}

fn small_objects() -> [Vec<u8>; 3] {
    let points = vec![PointId::from_bytes([1; 16]); 3];
    let session = SessionRecord {
        kind: SessionKind::Backup,
        host: "host".into(),
        boot_id: "boot".into(),
        process_id: 7,
        started_ms: 8,
        program: "vmkeep".into(),
    };
    let mark = Mark { packs: vec![PackId::from_bytes([2; 32]); 3], points: points.clone() };
    let damage = Damage { pack: PackId::from_bytes([2; 32]), chunks: vec![ChunkId::from_bytes([3; 32]); 2] };
    [codec::encode(&session).unwrap(), codec::encode(&mark).unwrap(), codec::encode(&damage).unwrap()]
}

pub fn decoders() -> Vec<Decoder> {
    let (frames, plains, tables, nodes) = parts_of_packs();
    let points = bodies("outcomes/", ObjectKind::Outcome);
    let records = points.iter().filter(|body| body[..4] == [0; 4]).map(|body| body[4..].to_vec()).collect();
    let [session, mark, damage] = small_objects().map(|body| vec![body]);
    let objects = ["smallest", "two_points"].into_iter().flat_map(fixtures::files);
    let objects = objects.filter(|(name, _)| !name.starts_with("packs/")).map(|(_, bytes)| bytes).collect();
    let decoder = |name, samples, decode| Decoder { name, samples, decode };
    vec![
        decoder("config", bodies("config", ObjectKind::Config), |b| {
            value::<Config>(b);
            let _ =
                envelope::wrap(ObjectKind::Config, REPOSITORY, b).map(|object| Config::from_object(&object));
        }),
        decoder("segment", bodies("index/", ObjectKind::Segment), |b| {
            value::<Segment>(b);
            wrapped(ObjectKind::Segment, b, Segment::from_object);
        }),
        decoder("outcome", points, |b| {
            value::<Outcome>(b);
            wrapped(ObjectKind::Outcome, b, Outcome::from_object);
        }),
        decoder("session", session, |b| {
            value::<SessionRecord>(b);
            wrapped(ObjectKind::Session, b, SessionRecord::from_object);
        }),
        decoder("mark", mark, |b| {
            value::<Mark>(b);
            wrapped(ObjectKind::Mark, b, Mark::from_object);
        }),
        decoder("tombstone", bodies("forget/", ObjectKind::Tombstone), |b| {
            value::<Tombstone>(b);
            wrapped(ObjectKind::Tombstone, b, Tombstone::from_object);
        }),
        decoder("damage record", damage, |b| {
            value::<Damage>(b);
            wrapped(ObjectKind::Damage, b, Damage::from_object);
        }),
        decoder("point record", records, value::<PointRecord>),
        decoder("node", nodes, node),
        decoder("table", tables, table),
        decoder("frame", frames, frame),
        decoder("plaintext of a frame", plains, |b| {
            let _ = frame_chunks(b);
        }),
        decoder("pack", packs(), pack),
        decoder("whole object", objects, whole_object),
        decoder("name", vec![b"packs/ab/cd".to_vec(), b"bad/00.11".to_vec(), b"config".to_vec()], name),
    ]
}

/// What is done to a sample.
#[derive(Debug, Clone)]
enum Change {
    Flip(prop::sample::Index, u8),
    /// A number becomes another one, at 4 or 8 bytes.
    Number(prop::sample::Index, u64, bool),
    Truncate(prop::sample::Index),
    Insert(prop::sample::Index, Vec<u8>),
    /// A part is repeated elsewhere.
    Copy(prop::sample::Index, prop::sample::Index, usize),
}

fn any_change() -> impl Strategy<Value = Change> {
    use any as a;
    type Index = prop::sample::Index;
    let number = prop_oneof![
        a::<u64>(),
        prop::sample::select(vec![0, 1, 2, 0xff, 1 << 16, 1 << 24, 1 << 31, u64::from(u32::MAX), 1 << 40]),
        Just(u64::MAX),
        Just(i64::MAX as u64)
    ];
    prop_oneof![
        (a::<Index>(), a::<u8>()).prop_map(|(at, bits)| Change::Flip(at, bits)),
        (a::<Index>(), number, a::<bool>()).prop_map(|(at, value, long)| Change::Number(at, value, long)),
        a::<Index>().prop_map(Change::Truncate),
        (a::<Index>(), prop::collection::vec(a::<u8>(), 1..40)).prop_map(|(at, b)| Change::Insert(at, b)),
        (a::<Index>(), a::<Index>(), 1usize..100).prop_map(|(from, to, len)| Change::Copy(from, to, len)),
    ]
}

fn overwrite(bytes: &mut [u8], at: usize, new: &[u8]) {
    for (byte, new) in bytes.iter_mut().skip(at).zip(new) {
        *byte = *new;
    }
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    if bytes.is_empty() {
        return;
    }
    match change {
        Change::Flip(at, bits) => {
            let at = at.index(bytes.len());
            bytes[at] ^= bits;
        }
        Change::Number(at, value, long) => {
            let width = if *long { 8 } else { 4 };
            let at = at.index(bytes.len());
            overwrite(bytes, at, &value.to_le_bytes()[..width]);
        }
        Change::Truncate(at) => bytes.truncate(at.index(bytes.len())),
        Change::Insert(at, new) => {
            let at = at.index(bytes.len());
            bytes.splice(at..at, new.iter().copied());
        }
        Change::Copy(from, to, len) => {
            let (from, to) = (from.index(bytes.len()), to.index(bytes.len()));
            let part = bytes[from..bytes.len().min(from + len)].to_vec();
            overwrite(bytes, to, &part);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn damaged_samples_do_no_harm(pick: prop::sample::Index, changes in prop::collection::vec(any_change(), 1..5)) {
        for decoder in decoders() {
            let mut bytes = pick.get(&decoder.samples).clone();
            changes.iter().for_each(|change| apply(&mut bytes, change));
            (decoder.decode)(&bytes);
        }
    }

    #[test]
    fn invented_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        for decoder in decoders() {
            (decoder.decode)(&bytes);
        }
    }
}

/// The samples are what they are said to be: otherwise the tests above would damage nothing.
#[test]
fn every_decoder_has_samples_that_it_accepts() {
    fn accepts<T: bincode::Decode<()> + Debug>(samples: &[Vec<u8>]) {
        samples.iter().for_each(|sample| drop(codec::decode::<T>(sample).unwrap()));
    }
    for decoder in decoders() {
        let samples = decoder.samples;
        assert!(!samples.is_empty(), "{}", decoder.name);
        match decoder.name {
            "config" => accepts::<Config>(&samples),
            "segment" => accepts::<Segment>(&samples),
            "outcome" => accepts::<Outcome>(&samples),
            "session" => accepts::<SessionRecord>(&samples),
            "mark" => accepts::<Mark>(&samples),
            "tombstone" => accepts::<Tombstone>(&samples),
            "damage record" => accepts::<Damage>(&samples),
            "node" => accepts::<Node>(&samples),
            "table" => accepts::<PackTable>(&samples),
            _ => {}
        }
    }
}

/// Every number of every sample in turn becomes one that would ask for far too much.
fn inflate(decoder: &Decoder) {
    for sample in &decoder.samples {
        for at in 0..sample.len() {
            for number in [1u64 << 16, 1 << 18, 1 << 20, 1 << 21, 1 << 22, 1 << 30, 1 << 40, u64::MAX] {
                let mut bytes = sample.clone();
                overwrite(&mut bytes, at, &number.to_le_bytes());
                (decoder.decode)(&bytes);
            }
        }
    }
}

/// Peak of the process's address space, bytes: what was asked for, touched or not.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[test]
#[ignore = "measures its own process: run by hostile_numbers_claim_little_memory"]
fn alone_hostile_numbers() {
    let decoders = decoders();
    // a first round over small things, so that the allocator has what it needs
    (decoders[0].decode)(&decoders[0].samples[0]);
    for decoder in decoders {
        let before = peak();
        inflate(&decoder);
        let claimed = peak() - before;
        println!("{}: {} KiB", decoder.name, claimed >> 10);
        // samples have a few hundred bytes; a frame may state 4 MiB, an object under its hash is not touched
        assert!(claimed <= 12 << 20, "{} claims {claimed} bytes", decoder.name);
    }
}

#[test]
#[ignore = "measures its own process: run by hostile_numbers_claim_little_memory"]
fn alone_bombs() {
    let packed = bomb();
    let before = peak();
    for raw_len in [1, MAX_SEGMENT_LEN, u32::MAX] {
        let mut object = envelope::wrap(ObjectKind::Segment, REPOSITORY, b"").unwrap();
        object.truncate(64);
        object[10] = envelope::CODEC_ZSTD;
        object[56..60].copy_from_slice(&raw_len.to_le_bytes());
        object[60..64].copy_from_slice(&u32::try_from(packed.len()).unwrap().to_le_bytes());
        object.extend_from_slice(&packed);
        let hash = blake3::hash(&object);
        object.extend_from_slice(hash.as_bytes());
        assert!(Segment::from_object(&object, REPOSITORY).is_err());
        let mut frame = FrameHeader { codec: 1, raw_len: raw_len.min(MAX_FRAME_RAW_LEN), stored_len: 0 }
            .encode()
            .to_vec();
        frame[12..16].copy_from_slice(&u32::try_from(packed.len()).unwrap().to_le_bytes());
        frame.extend_from_slice(&packed);
        let stored_len = u32::try_from(frame.len() - FRAME_HEADER_LEN).unwrap();
        let entry = FrameEntry {
            offset: PACK_HEADER_LEN as u32,
            stored_len,
            raw_len: raw_len.min(MAX_FRAME_RAW_LEN),
        };
        assert!(open_frame(&frame, &entry).is_err());
    }
    let claimed = peak() - before;
    // the plaintext that a segment may state, and copies of the small file
    assert!(claimed <= u64::from(MAX_SEGMENT_LEN) + (4 << 20), "a bomb claims {claimed} bytes");
}

/// 512 MiB of zeroes that say so, in some ten KiB.
fn bomb() -> Vec<u8> {
    let mut encoder = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
    encoder.set_pledged_src_size(Some(512 << 20)).unwrap();
    let zeroes = vec![0; 1 << 20];
    (0..512).for_each(|_| encoder.write_all(&zeroes).unwrap());
    encoder.finish().unwrap()
}

/// In processes of their own, because other tests run beside this one.
#[test]
fn hostile_numbers_claim_little_memory() {
    for test in ["alone_hostile_numbers", "alone_bombs"] {
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                &format!("hostile_bytes::{test}"),
                "--ignored",
                "--test-threads=1",
                "--nocapture",
            ])
            // a second arena would reserve 128 MiB for a moment, and nothing below that could be seen
            .env("MALLOC_ARENA_MAX", "1")
            .output()
            .unwrap();
        let said =
            format!("{}{}", String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
        assert!(child.status.success() && said.contains("1 passed"), "{said}");
    }
}

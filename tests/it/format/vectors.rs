//! Every encoding, byte by byte, as `repo-format.md` spells it.
//!
//! A vector that has to change means another format: raise the version.

use vmkeep::chunk::{Cutter, IdHasher};
use vmkeep::format::codec;
use vmkeep::format::config::{Config, CutterParams, StorageTraits};
use vmkeep::format::envelope::{self, CODEC_STORED, ObjectKind};
use vmkeep::format::node::{Child, ChunkKind, LeafEntry, Node};
use vmkeep::format::pack::{
    FrameEntry, FrameHeader, PACK_FOOTER_LEN, PackFooter, PackHeader, PackKind, PackTable, TableChunk,
    frame_chunks,
};
use vmkeep::format::point::{
    Consistency, DiskRecord, FileRecord, Level, Manifest, PointRecord, PointStats, SourceKind,
};
use vmkeep::format::segment::{Segment, SegmentChunk, SegmentPack};
use vmkeep::format::session::{
    Damage, Mark, Outcome, SampleScope, SessionKind, SessionRecord, Tombstone, VerifiedLevel, VerifiedRecord,
};
use vmkeep::id::{ChunkId, KeyDomainId, PackId, PointId, RepositoryId, SegmentId, SessionId};

use super::document;

const REPOSITORY: RepositoryId = RepositoryId::from_bytes([0x11; 16]);

/// Reads hexadecimal digits; `aa*16` repeats a byte, `"text"` is its bytes, `#` begins a comment.
fn hex(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in text.lines().flat_map(|line| line.split('#').next().unwrap().split_whitespace()) {
        if let Some(quoted) = word.strip_prefix('"') {
            bytes.extend_from_slice(quoted.strip_suffix('"').unwrap().as_bytes());
            continue;
        }
        let (digits, count) = word.split_once('*').unwrap_or((word, "1"));
        let once: Vec<u8> = digits
            .as_bytes()
            .chunks(2)
            .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
            .collect();
        bytes.extend(once.repeat(count.parse().unwrap()));
    }
    bytes
}

fn assert_encodes<T>(value: &T, expected: &str)
where
    T: bincode::Encode + bincode::Decode<()> + PartialEq + std::fmt::Debug,
{
    let expected = hex(expected);
    assert_eq!(codec::encode(value).unwrap(), expected);
    assert_eq!(&codec::decode::<T>(&expected).unwrap(), value);
    let longer = [expected.as_slice(), &[0]].concat();
    assert!(codec::decode::<T>(&longer).is_err(), "bytes that follow are refused");
    assert!(codec::decode::<T>(&expected[..expected.len() - 1]).is_err(), "a missing byte is noticed");
}

fn chunk_id(byte: u8) -> ChunkId {
    ChunkId::from_bytes([byte; 32])
}

fn pack_id(byte: u8) -> PackId {
    PackId::from_bytes([byte; 32])
}

#[test]
fn config() {
    let config = Config {
        format_version: 1,
        repository: REPOSITORY,
        key_domain: KeyDomainId::from_bytes([0x22; 16]),
        required_features: 0,
        optional_features: 5,
        plain_id_key: Some([0x33; 32]),
        created_ms: 0x0102_0304_0506,
        cutter: CutterParams::default(),
        leaf_len: 1 << 20,
        fanout: 16,
        frame_target_len: 512 << 10,
        pack_target_len: 32 << 20,
        zstd_level: -7,
        storage: StorageTraits { create_if_absent: true },
    };
    let body = "
        0100                # format_version
        11*16               # repository
        22*16               # key_domain
        00*8                # required_features
        0500000000000000    # optional_features
        01 33*32            # plain_id_key
        0605040302010000    # created_ms
        01                  # cutter.algorithm
        00200000 00800000 00000200
        0000100000000000    # leaf_len
        10000000            # fanout
        00000800            # frame_target_len
        0000000200000000    # pack_target_len
        f9ffffff            # zstd_level
        01                  # storage.create_if_absent";
    assert_encodes(&config, body);
    let object = envelope::wrap(ObjectKind::Config, REPOSITORY, &hex(body)).unwrap();
    assert_eq!(config.to_object().unwrap(), object);
    assert_eq!(Config::from_object(&object).unwrap(), config);
    let other = envelope::wrap(ObjectKind::Config, RepositoryId::from_bytes([0; 16]), &hex(body)).unwrap();
    assert!(Config::from_object(&other).is_err(), "the two repository ids have to agree");
}

#[test]
fn envelope_of_a_stored_body() {
    // six bytes do not get shorter by compression
    let object = envelope::wrap(ObjectKind::Mark, REPOSITORY, b"vmkeep").unwrap();
    let before = hex(r#"
        "vmkpMARK" 0100     # magic, version
        00 00 00*4          # codec, seal, zero
        11*16               # repository
        00*24               # nonce
        06000000 06000000   # raw_len, stored_len
        "vmkeep""#);
    let hash = blake3::hash(&before);
    assert_eq!(object, [before.as_slice(), hash.as_bytes()].concat());
    assert_eq!(object[10], CODEC_STORED);
    let kinds = [
        ObjectKind::Config,
        ObjectKind::Segment,
        ObjectKind::Session,
        ObjectKind::Outcome,
        ObjectKind::Tombstone,
        ObjectKind::Damage,
    ];
    for kind in kinds {
        assert!(envelope::open(kind, &object).is_err(), "a mark is no {kind:?}");
    }
}

#[test]
fn envelope_of_a_compressed_body() {
    let body = [7; 1000];
    let object = envelope::wrap(ObjectKind::Damage, REPOSITORY, &body).unwrap();
    assert_eq!((object[10], &object[56..60]), (1, hex("e8030000").as_slice()));
    let stored = &object[64..object.len() - 32];
    assert_eq!(&object[60..64], u32::try_from(stored.len()).unwrap().to_le_bytes());
    assert_eq!(zstd::bulk::decompress(stored, 1000).unwrap(), body);
    assert_eq!(envelope::open(ObjectKind::Damage, &object).unwrap().body, body);
}

#[test]
fn every_fixed_byte_of_an_envelope_is_checked() {
    let object = envelope::wrap(ObjectKind::Mark, REPOSITORY, b"vmkeep").unwrap();
    let sealed_again = |position: usize, byte: u8| {
        let mut bytes = object[..object.len() - 32].to_vec();
        bytes[position] = byte;
        let hash = blake3::hash(&bytes);
        [bytes.as_slice(), hash.as_bytes()].concat()
    };
    assert!(envelope::open(ObjectKind::Mark, &sealed_again(16, 0x12)).is_ok(), "another repository's mark");
    let positions = (0..16).chain(32..64);
    for position in positions {
        let changed = sealed_again(position, object[position] ^ 0x80);
        assert!(envelope::open(ObjectKind::Mark, &changed).is_err(), "byte {position}");
    }
    for seal in [1, 2, 0xff] {
        assert!(envelope::open(ObjectKind::Mark, &sealed_again(11, seal)).is_err(), "seal {seal}");
    }
}

fn segment() -> Segment {
    let frames = vec![FrameEntry { offset: 64, stored_len: 0x100, raw_len: 0x200 }];
    Segment {
        owner: SessionId::from_bytes([0x44; 16]),
        number: 2,
        packs: vec![
            SegmentPack { id: pack_id(0xa1), kind: PackKind::Data, stored_len: 0x1234, frames },
            SegmentPack { id: pack_id(0xa2), kind: PackKind::Metadata, stored_len: 0x80, frames: vec![] },
        ],
        chunks: vec![SegmentChunk {
            id: chunk_id(0xc1),
            kind: ChunkKind::Point,
            pack: 0,
            frame: 0,
            offset: 8,
            len: 0x10,
        }],
    }
}

#[test]
fn index_segment() {
    let body = "
        44*16 02000000                      # owner, number
        0200000000000000                    # packs
        a1*32 00000000 3412000000000000     # id, data, stored_len
        0100000000000000
        40000000 00010000 00020000          # offset, stored_len, raw_len
        a2*32 01000000 8000000000000000     # id, metadata, stored_len
        00*8
        0100000000000000                    # chunks
        c1*32 02000000                      # id, kind
        00000000 00000000 08000000 10000000 # pack, frame, offset, len";
    assert_encodes(&segment(), body);
    let object = segment().to_object(REPOSITORY).unwrap();
    assert_eq!(Segment::from_object(&object, REPOSITORY).unwrap(), segment());
    assert!(Segment::from_object(&object, RepositoryId::from_bytes([0x12; 16])).is_err());
}

#[test]
fn segments_that_contradict_themselves_are_refused() {
    type Change = fn(&mut Segment);
    let changes: [Change; 9] = [
        |segment| segment.chunks[0].pack = 1,
        |segment| segment.chunks[0].pack = 2,
        |segment| segment.chunks[0].frame = 1,
        |segment| segment.chunks[0].offset = 0x1f1,
        |segment| segment.chunks[0].len = 0,
        |segment| segment.chunks.push(segment.chunks[0]),
        |segment| segment.packs[0].stored_len = 0x14f,
        |segment| segment.packs[0].stored_len = 1 << 28,
        |segment| segment.packs[0].frames[0].raw_len = (4 << 20) + 1,
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut wrong = segment();
        change(&mut wrong);
        let object = wrong.to_object(REPOSITORY).unwrap();
        assert!(Segment::from_object(&object, REPOSITORY).is_err(), "change {number}");
    }
}

#[test]
fn session() {
    let session = SessionRecord {
        kind: SessionKind::Restore,
        host: "h".into(),
        boot_id: String::new(),
        process_id: 0x0102_0304,
        started_ms: -2,
        program: "vmkeep".into(),
    };
    let body = r#"
        06000000                    # restore
        0100000000000000 "h"
        00*8                        # boot_id
        04030201
        feffffffffffffff
        0600000000000000 "vmkeep""#;
    assert_encodes(&session, body);
    let kinds = [
        SessionKind::Backup,
        SessionKind::Prune,
        SessionKind::Forget,
        SessionKind::Copy,
        SessionKind::Repair,
        SessionKind::Verify,
        SessionKind::Restore,
    ];
    for (number, kind) in (0u32..).zip(kinds) {
        assert_eq!(codec::encode(&kind).unwrap(), number.to_le_bytes());
    }
}

fn point() -> PointRecord {
    PointRecord {
        id: PointId::from_bytes([0x44; 16]),
        domain: "web".into(),
        domain_uuid: Some("u".into()),
        time_ms: 0x0102,
        level: Level::Differential,
        base: Some(PointId::from_bytes([0x45; 16])),
        predecessor: None,
        checkpoint: Some("c".into()),
        source: SourceKind::Nbd,
        consistency: Consistency::Paused,
        disks: vec![DiskRecord {
            target: "vda".into(),
            manifest: Manifest { size: 0x0030_0200, height: 1, root: Some(chunk_id(0xc2)) },
            format: "qcow2".into(),
            level: Level::Incremental,
            full_reason: None,
            has_bitmap: true,
        }],
        files: vec![FileRecord {
            name: "nvram".into(),
            manifest: Manifest { size: 0, height: 0, root: None },
        }],
        xml_inactive: Some("<d/>".into()),
        xml_live: None,
        tags: vec!["t".into()],
        host: "h".into(),
        program: "p".into(),
    }
}

const POINT: &str = r#"
    44*16                           # id
    0300000000000000 "web"
    01 0100000000000000 "u"         # domain_uuid
    0201000000000000                # time_ms
    02000000                        # differential
    01 45*16                        # base
    00                              # predecessor
    01 0100000000000000 "c"         # checkpoint
    04000000                        # NBD server
    02000000                        # paused
    0100000000000000                # disks
    0300000000000000 "vda"
    0002300000000000 01 01 c2*32    # size, height, root
    0500000000000000 "qcow2"
    01000000                        # incremental
    00                              # full_reason
    01                              # has_bitmap
    0100000000000000                # files
    0500000000000000 "nvram"
    00*8 00 00                      # size, height, root
    01 0400000000000000 "<d/>"      # xml_inactive
    00                              # xml_live
    0100000000000000                # tags
    0100000000000000 "t"
    0100000000000000 "h"
    0100000000000000 "p"
"#;

#[test]
fn point_record() {
    assert_encodes(&point(), POINT);
    let levels = [Level::Full, Level::Incremental, Level::Differential, Level::Copy, Level::Latest];
    for (number, level) in (0u32..).zip(levels) {
        assert_eq!(codec::encode(&level).unwrap(), number.to_le_bytes());
    }
    let sources =
        [SourceKind::Running, SourceKind::Offline, SourceKind::File, SourceKind::Block, SourceKind::Nbd];
    for (number, source) in (0u32..).zip(sources) {
        assert_eq!(codec::encode(&source).unwrap(), number.to_le_bytes());
    }
    let states = [Consistency::Crash, Consistency::Frozen, Consistency::Paused, Consistency::Off];
    for (number, state) in (0u32..).zip(states) {
        assert_eq!(codec::encode(&state).unwrap(), number.to_le_bytes());
    }
}

#[test]
fn points_out_of_bounds_are_refused() {
    type Change = fn(&mut PointRecord);
    let changes: [Change; 13] = [
        |point| point.domain = "a".repeat(513),
        |point| point.host = "a\nb".into(),
        |point| point.checkpoint = Some("\u{85}".into()),
        |point| point.tags = vec![String::new(); 257],
        |point| point.disks[0].target = String::new(),
        |point| point.disks[0].target = "..".into(),
        |point| point.disks[0].target = "a/b".into(),
        |point| point.files[0].name = ".profile".into(),
        |point| point.disks.push(point.disks[0].clone()),
        |point| point.disks[0].manifest.size = i64::MAX as u64,
        |point| point.disks[0].manifest.height = 49,
        |point| point.xml_live = Some(" ".repeat((4 << 20) + 1).into()),
        |point| point.files = vec![point.files[0].clone(); 257],
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut record = point();
        change(&mut record);
        let outcome = Outcome::Point { record: record.into(), stats: PointStats::default() };
        let object = outcome.to_object(REPOSITORY).unwrap();
        assert!(Outcome::from_object(&object, REPOSITORY).is_err(), "change {number}");
    }
}

#[test]
fn outcomes() {
    let stats = PointStats {
        dirty_bytes: 1,
        read_bytes: 2,
        changed_bytes: 3,
        new_bytes: 4,
        stored_bytes: 5,
        metadata_bytes: 6,
        since_base_bytes: Some(7),
        duration_ms: 8,
    };
    let numbers = "
        0100000000000000 0200000000000000 0300000000000000 0400000000000000
        0500000000000000 0600000000000000 01 0700000000000000 0800000000000000";
    let outcome = Outcome::Point { record: point().into(), stats };
    assert_encodes(&outcome, &format!("00000000 {POINT} {numbers}"));
    let object = outcome.to_object(REPOSITORY).unwrap();
    assert_eq!(Outcome::from_object(&object, REPOSITORY).unwrap(), outcome);

    let points = vec![PointId::from_bytes([0x44; 16]), PointId::from_bytes([0x45; 16])];
    let segment_id = SegmentId::from_bytes([0xb1; 32]);
    assert_encodes(
        &Outcome::Sweep { packs: vec![pack_id(0xa1)], points, segments: vec![segment_id] },
        "01000000 0100000000000000 a1*32 0200000000000000 44*16 45*16 0100000000000000 b1*32",
    );
    assert_encodes(&Outcome::Done, "02000000");
    assert_encodes(
        &Outcome::Abort { by: SessionId::from_bytes([0x46; 16]), why: "no".into() },
        r#"03000000 46*16 0200000000000000 "no""#,
    );
    let point = PointId::from_bytes([0x47; 16]);
    assert_encodes(
        &Outcome::Hold { point, until_ms: Some(9), reason: "audit".into() },
        r#"04000000 47*16 01 0900000000000000 0500000000000000 "audit""#,
    );
    let record = VerifiedRecord {
        level: VerifiedLevel::Data,
        time_ms: 9,
        sound: vec![point],
        damaged: Vec::new(),
        cursor: Some(pack_id(0xa1)),
    };
    assert_encodes(
        &Outcome::Verified { record: record.clone() },
        "05000000 02000000 0900000000000000 0100000000000000 47*16 00*8 01 a1*32",
    );
    let scope = SampleScope { level: VerifiedLevel::Packs, domains: vec!["web".into()] };
    assert_encodes(
        &Outcome::Found { record, order: 3, scope: Some(scope) },
        r#"06000000 02000000 0900000000000000 0100000000000000 47*16 00*8 01 a1*32
           0300000000000000 01 01000000 0100000000000000 0300000000000000 "web""#,
    );
    assert!(codec::decode::<Outcome>(&hex("07000000")).is_err(), "an unknown variant");
}

#[test]
fn mark_tombstone_damage() {
    assert_encodes(
        &Mark { packs: vec![pack_id(0xa1), pack_id(0xa2)], points: vec![] },
        "0200000000000000 a1*32 a2*32 00*8",
    );
    assert_encodes(
        &Tombstone {
            points: vec![PointId::from_bytes([0x44; 16])],
            reason: "\u{e9}".into(),
            time_ms: 0x0102,
        },
        "0100000000000000 44*16 0200000000000000 c3a9 0201000000000000",
    );
    assert_encodes(
        &Damage { pack: pack_id(0xa1), chunks: vec![chunk_id(0xc1)] },
        "a1*32 0100000000000000 c1*32",
    );
}

#[test]
fn nodes() {
    let leaf = Node::Leaf {
        entries: vec![
            LeafEntry::Zero { len: 0x1000 },
            LeafEntry::Chunk { len: 0x2000, offset: 0x3000, id: chunk_id(0xc1) },
            LeafEntry::Unreadable { len: 0x200 },
        ],
    };
    assert_encodes(
        &leaf,
        "00000000 0300000000000000
         00000000 00100000
         01000000 00200000 00300000 c1*32
         02000000 00020000",
    );
    let children = vec![Child { slot: 1, id: chunk_id(0xc1) }, Child { slot: 0x0203, id: chunk_id(0xc2) }];
    let inner = Node::Inner { level: 2, children };
    assert_encodes(&inner, "01000000 02 0200000000000000 0100 c1*32 0302 c2*32");
    for node in [leaf, inner] {
        assert_eq!(Node::decode(&node.encode().unwrap()).unwrap(), node);
    }
}

#[test]
fn nodes_that_no_tree_has_are_refused() {
    let wrong = [
        "00000000 0100000000000000 00000000 00000000", // an entry of no length
        "00000000 0100000000000000 01000000 01001000 00000000 c1*32", // longer than a chunk
        "00000000 0100000000000000 01000000 ffffffff 01000000 c1*32", // wraps around
        "01000000 00 0100000000000000 0000 c1*32",     // level 0 is a leaf
        "01000000 31 0100000000000000 0000 c1*32",     // level 49
        "01000000 01 00*8",                            // no child
        "01000000 01 0200000000000000 0100 c1*32 0100 c2*32", // slots do not ascend
        "01000000 01 0100000000000000 0004 c1*32",     // slot 1024
        "02000000",
        "",
    ];
    for node in wrong {
        assert!(Node::decode(&hex(node)).is_err(), "{node}");
    }
}

/// What a decode may claim depends on the length of the input in steps; on both sides of each step the value with the
/// most memory for its bytes is still read.
#[test]
fn values_of_every_size_are_read() {
    let zero = LeafEntry::Zero { len: 4096 };
    for count in [1, 510, 511, 512, 8190, 8191, 8192, 16_384] {
        let node = Node::Leaf { entries: vec![zero; count] };
        assert_eq!(Node::decode(&node.encode().unwrap()).unwrap(), node, "{count} entries");
    }
    for count in [1u32, 77, 78, 79, 1259, 1260, 1261, 20_163, 20_164, 20_165, 200_000] {
        let pack = |number: u32| {
            let mut id = [0; 32];
            id[..4].copy_from_slice(&number.to_be_bytes());
            SegmentPack { id: PackId::from_bytes(id), kind: PackKind::Data, stored_len: 1, frames: vec![] }
        };
        let segment = Segment { packs: (0..count).map(pack).collect(), chunks: vec![], ..segment() };
        let object = segment.to_object(REPOSITORY).unwrap();
        assert!(Segment::from_object(&object, REPOSITORY).unwrap() == segment, "{count} packs");
    }
    let disks =
        (0..256).map(|number| DiskRecord { target: format!("{number:03}"), ..point().disks[0].clone() });
    let record = PointRecord { disks: disks.collect(), tags: vec![String::new(); 256], ..point() };
    record.check().unwrap();
    assert_eq!(codec::decode::<PointRecord>(&codec::encode(&record).unwrap()).unwrap(), record);
}

#[test]
fn pack_header_and_frame_header() {
    let header = PackHeader { kind: PackKind::Metadata, repository: REPOSITORY, salt: [0x55; 32] };
    let bytes = hex(r#""vmkpPACK" 0100 01 00 00*4 11*16 55*32"#);
    assert_eq!(header.encode(), bytes);
    assert_eq!(PackHeader::decode(&bytes).unwrap(), header);
    for position in 0..16 {
        let mut wrong = bytes.clone();
        wrong[position] ^= 0x80;
        assert!(PackHeader::decode(&wrong).is_err(), "byte {position}");
    }
    let frame = FrameHeader { codec: 1, raw_len: 0x0004_0000, stored_len: 0x0102 };
    let bytes = hex(r#""FRM1" 01 00 00*2 00000400 02010000"#);
    assert_eq!(frame.encode().as_slice(), bytes);
    assert_eq!(FrameHeader::decode(&bytes).unwrap(), frame);
    for wrong in [
        r#""FRM2" 01 00 00*2 00000400 02010000"#,
        r#""FRM1" 01 01 00*2 00000400 02010000"#,
        r#""FRM1" 01 00 0001 00000400 02010000"#,
        r#""FRM1" 01 00 00*2 01004000 02010000"#,
        r#""FRM1" 01 00 00*2 00000400 01004000"#,
    ] {
        assert!(FrameHeader::decode(&hex(wrong)).is_err(), "{wrong}");
    }
}

#[test]
fn plaintext_of_a_frame() {
    let plain = hex("03000000 02000000 01000001 03000002 aaaa bb cccccc");
    let chunks = frame_chunks(&plain).unwrap();
    let found: Vec<_> = chunks.iter().map(|chunk| (chunk.kind, chunk.offset, chunk.len)).collect();
    assert_eq!(found, [(ChunkKind::Data, 16, 2), (ChunkKind::Node, 18, 1), (ChunkKind::Point, 19, 3)]);
    for wrong in [
        "00000000",               // no chunk
        "01000000 02000000 aa",   // too short
        "01000000 01000000 aaaa", // too long
        "01000000 01000003 aa",   // an unknown kind
        "01000000 00000000",      // an empty chunk
        "01200000 01000000 aa",   // 8193 chunks
        "01000000",
    ] {
        assert!(frame_chunks(&hex(wrong)).is_err(), "{wrong}");
    }
}

#[test]
fn pack_table_and_footer() {
    let table = PackTable {
        frames: vec![FrameEntry { offset: 64, stored_len: 0x20, raw_len: 0x30 }],
        chunks: vec![TableChunk {
            id: chunk_id(0xc1),
            kind: ChunkKind::Node,
            frame: 0,
            offset: 8,
            len: 0x28,
        }],
    };
    assert_encodes(
        &table,
        "0100000000000000 40000000 20000000 30000000
         0100000000000000 c1*32 01000000 00000000 08000000 28000000",
    );
    let tail = table.encode_tail(0x70).unwrap();
    let (stored, footer) = tail.split_at(tail.len() - PACK_FOOTER_LEN);
    let raw_len = 8 + 12 + 8 + 48;
    let codec = if stored.len() < raw_len { "01" } else { "00" };
    let stored_len = u32::try_from(stored.len()).unwrap();
    let expected = [
        hex("7000000000000000 4c000000"),
        stored_len.to_le_bytes().to_vec(),
        hex(codec),
        hex("00 00*6"),
        blake3::hash(stored).as_bytes().to_vec(),
        b"vmkpTAIL".to_vec(),
    ]
    .concat();
    assert_eq!(footer, expected);
    let footer = PackFooter::decode(footer, 0x70 + tail.len() as u64).unwrap();
    assert_eq!(PackTable::decode(stored, &footer).unwrap(), table);
    assert!(PackFooter::decode(&expected, 0x71 + tail.len() as u64).is_err(), "a wrong length of the pack");
    assert!(table.check(0x6f).is_err(), "the frame would reach into the table");
}

#[test]
fn chunk_ids() {
    let key: Vec<u8> = (0..32).collect();
    let key: [u8; 32] = key.try_into().unwrap();
    let hasher = IdHasher::new(key);
    let ids = [ChunkKind::Data, ChunkKind::Node, ChunkKind::Point]
        .map(|kind| hasher.chunk_id(kind, b"abc").to_hex());
    assert_eq!(ids, CHUNK_IDS);
    let by_hand = blake3::keyed_hash(&key, b"\x01abc");
    assert_eq!(by_hand.to_hex().as_str(), ids[1]);
}

const CHUNK_IDS: [&str; 3] = [
    "a72547c98dfc4c63c93596444ac9a83c822580bd0ce8c0a5bfd19f647edd7f18",
    "703b5b6e935e6e9a89c80d3fc98fed47c660048e7a31c2b21c3a11155203a712",
    "9e1e763533237ecc6f9a989a3cf0d9c27f58a3bd64b439842291d369f3681399",
];

#[test]
fn masks_of_the_cutter() {
    let block = document::blocks().into_iter().find(|block| block.title == "text masks").unwrap();
    let words: Vec<&str> = block.lines.iter().flat_map(|line| line.split_whitespace()).collect();
    let numbers: Vec<usize> = words.iter().step_by(2).map(|number| number.parse().unwrap()).collect();
    assert_eq!(numbers, (11..=21).collect::<Vec<_>>());
    for pair in words.chunks(2) {
        let mask = u64::from_str_radix(pair[1], 16).unwrap();
        assert_eq!(mask, fastcdc::v2020::MASKS[pair[0].parse::<usize>().unwrap()]);
    }
    let chosen = fastcdc::v2020::select_masks(32 << 10, fastcdc::v2020::Normalization::Level1);
    assert_eq!(chosen, (fastcdc::v2020::MASKS[16], fastcdc::v2020::MASKS[14]));
}

#[test]
fn golden_cuts() {
    let mut run = vec![0; 600_001];
    blake3::Hasher::new().update(&1u64.to_le_bytes()).finalize_xof().fill(&mut run);
    let cutter = Cutter::new(CutterParams::default()).unwrap();
    assert_eq!(cutter.cut(&run).collect::<Vec<_>>(), document::numbers("text golden-cuts"));
}

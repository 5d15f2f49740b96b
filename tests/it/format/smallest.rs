//! The worked example of `repo-format.md`: the smallest repository that has a point.
//!
//! Ids and salts are fixed where a session would draw them at random; everything else is made by the library's own
//! encoders. `cargo test --test it -- --ignored regenerate_smallest` writes fixture and section anew.

use std::fmt::Write as _;

use vmkeep::chunk::{FinishedPack, FrameBuilder, IdHasher, PackBuilder};
use vmkeep::format::codec;
use vmkeep::format::config::{Config, CutterParams, StorageTraits};
use vmkeep::format::name::ObjectName;
use vmkeep::format::node::{ChunkKind, LeafEntry, Node};
use vmkeep::format::pack::{FRAME_HEADER_LEN, PACK_FOOTER_LEN, PACK_HEADER_LEN, PackKind};
use vmkeep::format::point::{Consistency, DiskRecord, Level, Manifest, PointRecord, PointStats, SourceKind};
use vmkeep::format::segment::{Segment, SegmentChunk, SegmentPack};
use vmkeep::format::session::Outcome;
use vmkeep::id::{KeyDomainId, RepositoryId, SegmentId, SessionId};
use vmkeep::monitor::Recorder;
use vmkeep::ops::restore::{ImageFormat, OnDamage, RestoreOptions, RestoreOutput, restore};
use vmkeep::ops::verify::{VerifyOptions, verify};

use super::document;
use crate::fixtures;

const NAME: &str = "smallest";
const REPOSITORY: RepositoryId = RepositoryId::from_bytes([0x11; 16]);
const ID_KEY: [u8; 32] = [0x33; 32];
const SESSION: SessionId = SessionId::from_bytes([0x44; 16]);
/// 2026-01-01T00:00:00Z
const TIME_MS: i64 = 1_767_225_600_000;
const BEGIN: &str = "<!-- the rest of this section is written by a test: tests/it/format/smallest.rs -->\n";
const END: &str = "<!-- end of what the test writes -->\n";

/// What the point's only disk reads as.
fn disk() -> Vec<u8> {
    let mut bytes = vec![b'v'; 4096];
    bytes.resize(8192, 0);
    bytes
}

struct Example {
    config: Vec<u8>,
    data: FinishedPack,
    metadata: FinishedPack,
    twin: FinishedPack,
    segment: Vec<u8>,
    outcome: Vec<u8>,
}

fn config() -> Config {
    Config {
        format_version: 1,
        repository: REPOSITORY,
        key_domain: KeyDomainId::from_bytes([0x22; 16]),
        required_features: 0,
        optional_features: 0,
        plain_id_key: Some(ID_KEY),
        created_ms: TIME_MS,
        cutter: CutterParams::default(),
        leaf_len: 1 << 20,
        fanout: 16,
        frame_target_len: 512 << 10,
        pack_target_len: 32 << 20,
        zstd_level: 3,
        storage: StorageTraits { create_if_absent: true },
    }
}

fn pack(kind: PackKind, salt: u8, chunks: &[(ChunkKind, &[u8])]) -> FinishedPack {
    let hasher = IdHasher::new(ID_KEY);
    let mut frame = FrameBuilder::new(64 << 10);
    for (kind, plain) in chunks {
        assert!(frame.push(*kind, hasher.chunk_id(*kind, plain), plain).unwrap().is_none());
    }
    let mut builder = PackBuilder::new(kind, REPOSITORY, [salt; 32]);
    builder.push(&frame.flush().unwrap().encode(3).unwrap()).unwrap();
    builder.finish().unwrap()
}

fn record(leaf: &[u8]) -> PointRecord {
    let root = IdHasher::new(ID_KEY).chunk_id(ChunkKind::Node, leaf);
    PointRecord {
        id: SESSION.into(),
        domain: "web".into(),
        domain_uuid: None,
        time_ms: TIME_MS,
        level: Level::Full,
        base: None,
        predecessor: None,
        checkpoint: None,
        source: SourceKind::File,
        consistency: Consistency::Crash,
        disks: vec![DiskRecord {
            target: "vda".into(),
            manifest: Manifest { size: 8192, height: 0, root: Some(root) },
            format: "raw".into(),
            level: Level::Full,
            full_reason: None,
            has_bitmap: false,
        }],
        files: vec![],
        xml_inactive: None,
        xml_live: None,
        tags: vec![],
        host: "h".into(),
        program: "vmkeep".into(),
    }
}

fn segment(packs: &[&FinishedPack]) -> Segment {
    let mut chunks = Vec::new();
    for (number, pack) in (0u32..).zip(packs) {
        chunks.extend(pack.table.chunks.iter().map(|chunk| SegmentChunk {
            id: chunk.id,
            kind: chunk.kind,
            pack: number,
            frame: chunk.frame,
            offset: chunk.offset,
            len: chunk.len,
        }));
    }
    chunks.sort_by_key(|chunk| (chunk.id, chunk.pack));
    let packs = packs
        .iter()
        .map(|pack| SegmentPack {
            id: pack.id,
            kind: pack.kind,
            stored_len: pack.bytes.len() as u64,
            frames: pack.table.frames.clone(),
        })
        .collect();
    Segment { owner: SESSION, number: 0, packs, chunks }
}

fn example() -> Example {
    let content = [b'v'; 4096];
    let id = IdHasher::new(ID_KEY).chunk_id(ChunkKind::Data, &content);
    let entries = vec![LeafEntry::Chunk { len: 4096, offset: 0, id }, LeafEntry::Zero { len: 4096 }];
    let leaf = Node::Leaf { entries }.encode().unwrap();
    let record = record(&leaf);
    let copy = codec::encode(&record).unwrap();
    let data = pack(PackKind::Data, 0x55, &[(ChunkKind::Data, &content)]);
    let metadata = pack(PackKind::Metadata, 0x66, &[(ChunkKind::Node, &leaf), (ChunkKind::Point, &copy)]);
    let twin = metadata.twin([0x77; 32]).unwrap();
    let stats = PointStats {
        dirty_bytes: 4096,
        read_bytes: 4096,
        changed_bytes: 4096,
        new_bytes: 4096,
        stored_bytes: data.bytes.len() as u64,
        metadata_bytes: 0,
        since_base_bytes: None,
        duration_ms: 0,
    };
    let segment = segment(&[&data, &metadata, &twin]).to_object(REPOSITORY).unwrap();
    let outcome = Outcome::Point { record: record.into(), stats };
    let outcome = outcome.to_object(REPOSITORY).unwrap();
    Example { config: config().to_object().unwrap(), data, metadata, twin, segment, outcome }
}

impl Example {
    fn segment_name(&self) -> String {
        ObjectName::Segment(SegmentId::from_bytes(*blake3::hash(&self.segment).as_bytes())).to_string()
    }

    fn files(&self) -> Vec<(String, Vec<u8>)> {
        let mut files = vec![
            ("config".to_owned(), self.config.clone()),
            (self.segment_name(), self.segment.clone()),
            (ObjectName::Outcome(SESSION).to_string(), self.outcome.clone()),
        ];
        files.extend(
            [&self.data, &self.metadata, &self.twin]
                .map(|pack| (ObjectName::Pack(pack.id).to_string(), pack.bytes.to_vec())),
        );
        files.sort();
        files
    }
}

/// Which bytes of a file a block of the document shows.
fn part(kind: &str, file: &[u8]) -> Vec<u8> {
    let word = |from: usize| u32::from_le_bytes(file[from..from + 4].try_into().unwrap()) as usize;
    let plain = |codec: u8, stored: &[u8], raw_len: usize| match codec {
        0 => stored.to_vec(),
        _ => zstd::bulk::decompress(stored, raw_len).unwrap(),
    };
    match kind {
        "file" => file.to_vec(),
        "head" => file[..PACK_HEADER_LEN].to_vec(),
        "body" => plain(file[10], &file[64..file.len() - 32], word(56)),
        "frame" => {
            let start = PACK_HEADER_LEN + FRAME_HEADER_LEN;
            plain(file[PACK_HEADER_LEN + 4], &file[start..start + word(PACK_HEADER_LEN + 12)], word(72))
        }
        "table" => {
            let footer = file.len() - PACK_FOOTER_LEN;
            let stored = &file[footer - word(footer + 12)..footer];
            plain(file[footer + 16], stored, word(footer + 8))
        }
        _ => panic!("{kind} is no part of a file"),
    }
}

/// Writes a block field by field.
struct Dump {
    bytes: Vec<u8>,
    at: usize,
    out: String,
}

impl Dump {
    fn new(kind: &str, name: &str, file: &[u8]) -> Self {
        Self { bytes: part(kind, file), at: 0, out: format!("```hexdump {kind} {name}\n") }
    }

    fn field(mut self, len: usize, text: &str) -> Self {
        let field = &self.bytes[self.at..self.at + len];
        for (line, bytes) in field.chunks(16).enumerate() {
            let digits: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            let text = if line == 0 { format!("; {text}") } else { String::new() };
            let line = format!("{:04x}  {:<47}  {text}", self.at + line * 16, digits.join(" "));
            writeln!(self.out, "{}", line.trim_end()).unwrap();
        }
        self.at += len;
        self
    }

    fn fields(self, fields: &[(usize, &str)]) -> Self {
        fields.iter().fold(self, |dump, (len, text)| dump.field(*len, text))
    }

    fn string(self, text: &str, len: usize) -> Self {
        self.field(8, &format!("{text}: bytes")).field(len, text)
    }

    fn finish(self) -> String {
        assert_eq!(self.at, self.bytes.len(), "the fields do not fill {}", self.out);
        self.out + "```\n\n"
    }
}

fn envelope(name: &str, file: &[u8], magic: &str) -> String {
    Dump::new("file", name, file)
        .field(8, &format!("magic \"{magic}\""))
        .fields(&[(2, "format version"), (1, "codec: zstd"), (1, "seal: none"), (4, "zero")])
        .fields(&[(16, "repository id"), (24, "nonce"), (4, "raw_len"), (4, "stored_len")])
        .field(file.len() - 96, "body, compressed")
        .field(32, "hash of all before")
        .finish()
}

fn config_body(file: &[u8]) -> String {
    Dump::new("body", "config", file)
        .fields(&[(2, "format_version"), (16, "repository"), (16, "key_domain")])
        .fields(&[(8, "required_features"), (8, "optional_features")])
        .fields(&[(1, "plain_id_key: present"), (32, "plain_id_key"), (8, "created_ms")])
        .fields(&[(1, "cutter.algorithm"), (4, "cutter.min_len: 8192")])
        .fields(&[(4, "cutter.average_len: 32768"), (4, "cutter.max_len: 131072")])
        .fields(&[(8, "leaf_len: 1 MiB"), (4, "fanout: 16"), (4, "frame_target_len: 512 KiB")])
        .fields(&[(8, "pack_target_len: 32 MiB"), (4, "zstd_level: 3"), (1, "storage.create_if_absent: yes")])
        .finish()
}

fn pack_file(pack: &FinishedPack, kind: &str) -> String {
    let stored_len = pack.table.frames[0].stored_len as usize;
    let table_len = pack.bytes.len() - PACK_HEADER_LEN - FRAME_HEADER_LEN - stored_len - PACK_FOOTER_LEN;
    Dump::new("file", &ObjectName::Pack(pack.id).to_string(), &pack.bytes)
        .fields(&[(8, "magic \"vmkpPACK\""), (2, "format version"), (1, kind), (1, "seal: none")])
        .fields(&[(4, "zero"), (16, "repository id"), (32, "salt")])
        .fields(&[(4, "the only frame: magic \"FRM1\""), (1, "codec"), (1, "seal: none"), (2, "zero")])
        .fields(&[(4, "raw_len"), (4, "stored_len"), (stored_len, "content, compressed")])
        .field(table_len, "table, compressed as the footer says")
        .fields(&[(8, "footer: table_offset"), (4, "table_raw_len"), (4, "table_stored_len")])
        .fields(&[(1, "codec of the table"), (1, "seal: none"), (6, "zero")])
        .fields(&[(32, "hash of the table as stored"), (8, "magic \"vmkpTAIL\"")])
        .finish()
}

const FRAME_ENTRY: [(usize, &str); 3] = [(4, "offset"), (4, "stored_len"), (4, "raw_len")];

fn pack_table(pack: &FinishedPack) -> String {
    let name = ObjectName::Pack(pack.id).to_string();
    let mut dump = Dump::new("table", &name, &pack.bytes).field(8, "frames: 1").fields(&FRAME_ENTRY);
    dump = dump.field(8, &format!("chunks: {}", pack.table.chunks.len()));
    for chunk in &pack.table.chunks {
        let kind = format!("kind: {:?}", chunk.kind).to_lowercase();
        dump = dump.fields(&[
            (32, "chunk id"),
            (4, &kind),
            (4, "frame"),
            (4, "offset in its plaintext"),
            (4, "len"),
        ]);
    }
    dump.finish()
}

fn record_fields(dump: Dump) -> Dump {
    dump.field(16, "id of the point")
        .string("domain", 3)
        .fields(&[(1, "domain_uuid: absent"), (8, "time_ms"), (4, "level: full"), (1, "base: absent")])
        .fields(&[(1, "predecessor: absent"), (1, "checkpoint: absent"), (4, "source: image file")])
        .fields(&[(4, "consistency: as after a power cut"), (8, "disks: 1")])
        .string("target", 3)
        .fields(&[(8, "size: 8192"), (1, "height: the root is a leaf"), (1, "root: present"), (32, "root")])
        .string("format", 3)
        .fields(&[(4, "level: full"), (1, "full_reason: absent"), (1, "has_bitmap: no"), (8, "files: 0")])
        .fields(&[(1, "xml_inactive: absent"), (1, "xml_live: absent"), (8, "tags: 0")])
        .string("host", 1)
        .string("program", 6)
}

fn metadata_frame(pack: &FinishedPack) -> String {
    let name = ObjectName::Pack(pack.id).to_string();
    let dump = Dump::new("frame", &name, &pack.bytes)
        .fields(&[(4, "number of chunks"), (4, "node, length"), (4, "point, length")])
        .fields(&[(4, "the node: a leaf"), (8, "entries: 2")])
        .fields(&[(4, "entry: chunk"), (4, "len: 4096"), (4, "offset in the chunk"), (32, "chunk id")])
        .fields(&[(4, "entry: zero"), (4, "len: 4096")]);
    record_fields(dump).finish()
}

fn segment_body(example: &Example) -> String {
    let name = example.segment_name();
    let mut dump =
        Dump::new("body", &name, &example.segment).fields(&[(16, "owner"), (4, "number"), (8, "packs: 3")]);
    for kind in ["kind: data", "kind: metadata", "kind: metadata"] {
        dump = dump.fields(&[(32, "pack id"), (4, kind), (8, "stored_len"), (8, "frames: 1")]);
        dump = dump.fields(&FRAME_ENTRY);
    }
    dump = dump.field(8, "chunks: 5, metadata twice");
    for _ in 0..5 {
        dump = dump.fields(&[(32, "chunk id"), (4, "kind"), (4, "pack"), (4, "frame")]);
        dump = dump.fields(&[(4, "offset"), (4, "len")]);
    }
    dump.finish()
}

fn outcome_body(example: &Example) -> String {
    let name = ObjectName::Outcome(SESSION).to_string();
    record_fields(Dump::new("body", &name, &example.outcome).field(4, "variant: point"))
        .fields(&[(8, "dirty_bytes"), (8, "read_bytes"), (8, "changed_bytes"), (8, "new_bytes")])
        .fields(&[(8, "stored_bytes"), (8, "metadata_bytes"), (1, "since_base_bytes: absent")])
        .field(8, "duration_ms")
        .finish()
}

fn section(example: &Example) -> String {
    let outcome = ObjectName::Outcome(SESSION).to_string();
    let twin = ObjectName::Pack(example.twin.id).to_string();
    let twin = Dump::new("head", &twin, &example.twin.bytes)
        .fields(&[(12, "as above"), (4, "zero"), (16, "repository id"), (32, "another salt")])
        .finish();
    [
        "### config\n\nThe file, then its body.\n\n".into(),
        envelope("config", &example.config, "vmkpCONF"),
        config_body(&example.config),
        "### The pack of data\n\nThe file, then its table. The plaintext of its frame is not shown: `01 00 00 00`, \
         `00 10 00 00` (one chunk of data, 4096 bytes), and 4096 bytes of 76.\n\n"
            .into(),
        pack_file(&example.data, "kind: data"),
        pack_table(&example.data),
        "### The packs of metadata\n\nThe file, the plaintext of its frame, and its table.\n\n".into(),
        pack_file(&example.metadata, "kind: metadata"),
        metadata_frame(&example.metadata),
        pack_table(&example.metadata),
        "The twin differs in its salt, so in its name:\n\n".into(),
        twin,
        "### The index segment\n\n".into(),
        envelope(&example.segment_name(), &example.segment, "vmkpSEGM"),
        segment_body(example),
        "### The outcome\n\n".into(),
        envelope(&outcome, &example.outcome, "vmkpOUTC"),
        outcome_body(example),
    ]
    .concat()
}

#[test]
fn the_fixture_is_what_the_library_writes() {
    assert_eq!(
        fixtures::files(NAME),
        example().files(),
        "the encoders or the compressor changed; if the format did not, run the ignored test regenerate_smallest"
    );
}

#[test]
fn the_document_shows_the_fixture() {
    let files = fixtures::files(NAME);
    let mut shown = Vec::new();
    for block in document::blocks() {
        let Some(title) = block.title.strip_prefix("hexdump ") else { continue };
        let (kind, name) = title.split_once(' ').unwrap();
        let file = &files.iter().find(|(known, _)| known == name).unwrap().1;
        let mut bytes = Vec::new();
        for line in &block.lines {
            let (offset, rest) = line.split_once("  ").unwrap();
            assert_eq!(usize::from_str_radix(offset, 16).unwrap(), bytes.len(), "{title}: {line}");
            let digits = rest.split(';').next().unwrap().split_whitespace();
            bytes.extend(digits.map(|byte| u8::from_str_radix(byte, 16).unwrap()));
        }
        assert!(bytes == part(kind, file), "{title} is not what the fixture holds");
        shown.push((kind.to_owned(), name.to_owned()));
    }
    for (name, _) in &files {
        assert!(shown.iter().any(|(_, shown)| shown == name), "the document does not show {name}");
    }
    assert_eq!(shown.len(), 12);
}

#[test]
fn the_smallest_repository_is_sound_and_restores() {
    let root = fixtures::copy(NAME);
    let repository = fixtures::open(root.path());
    let monitor = Recorder::new();
    let report = verify(&repository, &VerifyOptions::default(), &monitor).unwrap();
    assert_eq!(report.findings, []);
    assert_eq!((report.points, report.packs), (1, 3));
    let target = root.path().join("restored");
    let options = RestoreOptions {
        output: RestoreOutput::Targets(vec![("vda".into(), target.clone())]),
        disks: vec![],
        format: ImageFormat::Raw,
        force: false,
        on_damage: OnDamage::Fail,
        dry_run: false,
    };
    let catalog = repository.catalog(&monitor).unwrap();
    restore(&repository, &catalog.points()[0].record, &options, &monitor).unwrap();
    assert_eq!(std::fs::read(target).unwrap(), disk());
}

#[test]
#[ignore = "writes the fixture and a section of repo-format.md"]
fn regenerate_smallest() {
    let example = example();
    let root = fixtures::path(NAME);
    let _ = std::fs::remove_dir_all(&root);
    for (name, bytes) in example.files() {
        let path = root.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    let text = document::text();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (_, after) = rest.split_once(END).unwrap();
    let text = format!("{before}{BEGIN}\n{}{END}{after}", section(&example));
    std::fs::write(document::path(), text).unwrap();
}

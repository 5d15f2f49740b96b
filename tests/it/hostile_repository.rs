//! Repositories that were made to hurt: whoever looks at one is told what is wrong, soon, and with little memory.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use vmkeep::chunk::FrameBuilder;
use vmkeep::extent::ByteRange;
use vmkeep::format::envelope::{self, ObjectKind};
use vmkeep::format::name::{Folder, ObjectName};
use vmkeep::format::node::{Child, ChunkKind, LeafEntry, Node};
use vmkeep::format::point::{Consistency, DiskRecord, Level, Manifest, PointRecord, PointStats, SourceKind};
use vmkeep::format::session::{Outcome, SessionKind};
use vmkeep::id::{ChunkId, PackId, SessionId};
use vmkeep::manifest::NodeWriter;
use vmkeep::monitor::Recorder;
use vmkeep::repo::reader::ChunkReader;
use vmkeep::repo::session::Session;
use vmkeep::repo::writer::write_session;
use vmkeep::repo::{CreateOptions, Repository};
use vmkeep::storage::local::LocalStorage;

use crate::fixtures;
use crate::support::Vmkeep;

/// No command on a hostile repository takes longer than this, or more memory.
const MAX_TIME: Duration = Duration::from_secs(1);
const MAX_MEMORY: u64 = 128 << 20;

struct Hostile {
    vmkeep: Vmkeep,
    repository: Repository,
}

impl Hostile {
    fn new() -> Self {
        let vmkeep = Vmkeep::init(None);
        std::fs::remove_dir_all(vmkeep.repository()).unwrap();
        let storage = Box::new(LocalStorage::create(&vmkeep.repository()).unwrap());
        let repository =
            Repository::create(storage, &CreateOptions::default(), &fixtures::environment()).unwrap();
        Self { vmkeep, repository }
    }

    /// Commits a point of one disk whose map `make` writes.
    fn point(&self, size: u64, make: impl FnOnce(&mut dyn FnMut(&Node) -> ChunkId, ChunkId) -> ChunkId) {
        let session = Session::begin(&self.repository, SessionKind::Backup).unwrap();
        let (_, view) = self.repository.refresh(&Recorder::new()).unwrap();
        let reader = ChunkReader::new(&self.repository, &view);
        let id = session.id();
        let content = blake3::hash(id.as_bytes()).as_bytes().repeat(128);
        let (root, _) = write_session(&self.repository, &reader, id, |writer| {
            let chunk = self.repository.hasher().chunk_id(ChunkKind::Data, &content);
            writer.put_data(chunk, &content, None)?;
            let mut put = |node: &Node| writer.write_node(node.encode().unwrap()).unwrap();
            Ok(make(&mut put, chunk))
        })
        .unwrap();
        let height = self.repository.geometry().height_for(size);
        let mut record = record(id, Manifest { size, height, root: Some(root) });
        record.time_ms += i64::try_from(self.repository.segments().unwrap().len()).unwrap() * 86_400_000;
        let outcome = Outcome::Point { record: record.into(), stats: PointStats::default() };
        session.commit(&outcome).unwrap();
    }

    /// A disk of 8 EiB in a dozen nodes: every slot of every node has the same child.
    fn amplified(&self, entries: impl Fn(ChunkId) -> Vec<LeafEntry>) {
        let size = 1u64 << 62;
        let (height, fanout) =
            (self.repository.geometry().height_for(size), self.repository.geometry().fanout());
        self.point(size, |put, chunk| {
            let mut child = put(&Node::Leaf { entries: entries(chunk) });
            for level in 1..=height {
                let last = if level == height { self.children_of_the_root(size, height) } else { fanout };
                let slots = (0..last).map(|slot| Child { slot: u16::try_from(slot).unwrap(), id: child });
                child = put(&Node::Inner { level, children: slots.collect() });
            }
            child
        });
    }

    fn children_of_the_root(&self, size: u64, height: u8) -> u32 {
        let geometry = self.repository.geometry();
        let below = (0..height - 1).fold(geometry.leaf_len(), |len, _| len * u64::from(geometry.fanout()));
        u32::try_from(size / below).unwrap()
    }

    /// Runs a command; it has to end in time, with little memory, with one of the codes.
    fn bounded(&self, args: &[&str], codes: &[i32]) -> String {
        let mut command = self.vmkeep.command(args);
        let start = Instant::now();
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let (mut memory, mut ended) = (0, None);
        while ended.is_none() && start.elapsed() < Duration::from_secs(20) {
            memory = memory.max(peak_memory(child.id()));
            std::thread::sleep(Duration::from_millis(1));
            ended = child.try_wait().unwrap();
        }
        let time = start.elapsed();
        let _ = child.kill();
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        println!("{args:?}: {} ms, {} MiB", time.as_millis(), memory >> 20);
        assert!(time < MAX_TIME, "{args:?} took {time:?}\n{said}");
        assert!(memory < MAX_MEMORY, "{args:?} took {memory} bytes of memory");
        let code = output.status.code();
        assert!(code.is_some_and(|code| codes.contains(&code)), "{args:?}: {code:?}\n{said}");
        said
    }
}

/// Returns the most memory that a process has had at once, bytes; 0 once it is gone.
fn peak_memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

fn record(id: SessionId, manifest: Manifest) -> PointRecord {
    PointRecord {
        id: id.into(),
        domain: "web".into(),
        domain_uuid: None,
        time_ms: 1_767_225_600_000,
        level: Level::Full,
        base: None,
        predecessor: None,
        checkpoint: None,
        source: SourceKind::File,
        consistency: Consistency::Crash,
        disks: vec![DiskRecord {
            target: "vda".into(),
            manifest,
            format: "raw".into(),
            level: Level::Full,
            full_reason: None,
            has_bitmap: false,
        }],
        files: Vec::new(),
        xml_inactive: None,
        xml_live: None,
        tags: Vec::new(),
        host: "host".into(),
        program: "test".into(),
    }
}

/// A leaf that is full of one chunk.
fn full(chunk: ChunkId) -> Vec<LeafEntry> {
    (0..256).map(|_| LeafEntry::Chunk { len: 4096, offset: 0, id: chunk }).collect()
}

/// A leaf of which every other block is zero.
fn striped(chunk: ChunkId) -> Vec<LeafEntry> {
    let pair = [LeafEntry::Chunk { len: 4096, offset: 0, id: chunk }, LeafEntry::Zero { len: 4096 }];
    (0..128).flat_map(|_| pair).collect()
}

#[test]
fn a_few_nodes_that_describe_exabytes() {
    for stripes in [false, true] {
        let hostile = Hostile::new();
        hostile.amplified(if stripes { striped } else { full });
        hostile.amplified(if stripes { striped } else { full });
        hostile.bounded(&["points"], &[0]);
        hostile.bounded(&["show", "latest"], &[0]);
        hostile.bounded(&["show", "latest", "--extents"], &[0, 1, 4]);
        hostile.bounded(&["stats"], &[0, 1, 4]);
        hostile.bounded(&["stats", "--unique"], &[0, 1, 4]);
        hostile.bounded(&["diff", "latest~1", "latest"], &[0, 1, 4]);
        hostile.bounded(&["verify", "--structure"], &[0, 4]);
        hostile.bounded(&["verify"], &[0, 4]);
        hostile.bounded(&["forget", "latest~1", "--force", "-n"], &[0]);
        hostile.bounded(&["restore", "latest", "-o", "/tmp/never", "-n"], &[0, 1, 4]);
        hostile.bounded(&["prune", "-n"], &[0, 4]);
        hostile.bounded(&["prune"], &[0, 4]);
        hostile.bounded(&["repair", "points", "-n"], &[0]);
    }
}

#[test]
fn depth_that_leads_nowhere() {
    let hostile = Hostile::new();
    // a node that claims to stand far above what is below it
    hostile.point(1 << 62, |put, chunk| {
        let leaf = put(&Node::Leaf { entries: full(chunk) });
        (1..=40).fold(leaf, |child, level| {
            put(&Node::Inner { level, children: vec![Child { slot: 0, id: child }] })
        })
    });
    for args in
        [&["verify"][..], &["show", "latest", "--extents"], &["restore", "latest", "--to", "vda=/tmp/no"]]
    {
        let said = hostile.bounded(args, &[1, 4]);
        assert!(args[0] == "verify" || said.contains("manifest") || said.contains("the size of"), "{said}");
    }
}

/// A pack without its table, of frames that say of themselves that they hold more than there could be.
fn frames_of_many_chunks() -> Vec<u8> {
    let mut builder = FrameBuilder::new(1 << 20);
    for number in 0..8192u32 {
        let id = ChunkId::from_bytes(*blake3::hash(&number.to_le_bytes()).as_bytes());
        let full = builder.push(ChunkKind::Data, id, &[0]).unwrap();
        assert!(full.is_none() || number == 8191);
        if let Some(frame) = full {
            return frame.encode(3).unwrap().bytes.repeat(20_000);
        }
    }
    builder.flush().unwrap().encode(3).unwrap().bytes.repeat(20_000)
}

#[test]
fn packs_whose_frames_hold_too_much() {
    let hostile = Hostile::new();
    hostile.point(4 << 20, |put, _| {
        // of content that is nowhere, so that every pack is looked into
        let missing = ChunkId::from_bytes([0x66; 32]);
        let leaf = put(&Node::Leaf { entries: full(missing) });
        put(&Node::Inner { level: 1, children: vec![Child { slot: 0, id: leaf }] })
    });
    for number in 0..4u8 {
        let bytes = [&[number][..], &frames_of_many_chunks()].concat();
        let id = PackId::from_bytes(*blake3::hash(&bytes).as_bytes());
        put(&hostile, ObjectName::Pack(id), &bytes);
    }
    hostile.bounded(&["verify"], &[4]);
    let target = hostile.vmkeep.path("restored.raw");
    let to = format!("vda={}", target.display());
    hostile.bounded(&["restore", "latest", "--to", &to, "--on-damage", "zero"], &[4]);
    hostile.bounded(&["repair", "packs"], &[4]);
    hostile.bounded(&["repair", "index"], &[0, 4]);
}

#[test]
fn an_id_that_begins_like_a_good_one() {
    let hostile = Hostile::new();
    hostile.point(4 << 20, |put, chunk| {
        let mut like = *chunk.as_bytes();
        like[16..].fill(0x66);
        let leaf_len = 1 << 20;
        let leaves = [chunk, ChunkId::from_bytes(like)].map(|id| {
            let mut entries = vec![LeafEntry::Chunk { len: 4096, offset: 0, id }];
            entries.push(LeafEntry::Zero { len: leaf_len - 4096 });
            put(&Node::Leaf { entries })
        });
        let child = |(slot, id): (u16, ChunkId)| Child { slot, id };
        put(&Node::Inner { level: 1, children: (0..).zip(leaves).map(child).collect() })
    });
    hostile.bounded(&["verify", "--structure"], &[4]);
    hostile.bounded(&["verify"], &[4]);
}

/// Writes an object whose body says that it is longer than it is, or decompresses to more than it says.
fn bomb(kind: ObjectKind, hostile: &Hostile, raw_len: u32, body: &[u8]) -> Vec<u8> {
    let mut object = envelope::wrap(kind, hostile.repository.id(), &[0]).unwrap();
    let packed = zstd::bulk::compress(body, 19).unwrap();
    object.truncate(envelope::HEADER_LEN);
    object[10] = envelope::CODEC_ZSTD;
    object[56..60].copy_from_slice(&raw_len.to_le_bytes());
    object[60..64].copy_from_slice(&u32::try_from(packed.len()).unwrap().to_le_bytes());
    object.extend(packed);
    let checksum = *blake3::hash(&object).as_bytes();
    object.extend(checksum);
    object
}

fn put(hostile: &Hostile, name: ObjectName, bytes: &[u8]) {
    hostile.repository.storage().put_new(name, bytes).unwrap();
}

#[test]
fn bombs_and_lengths() {
    let zeroes = vec![0u8; 96 << 20];
    for (kind, folder, raw_len) in [
        (ObjectKind::Outcome, Folder::Outcomes, 64),
        (ObjectKind::Outcome, Folder::Outcomes, u32::MAX),
        (ObjectKind::Outcome, Folder::Outcomes, 32 << 20),
        (ObjectKind::Segment, Folder::Segments, 64),
        (ObjectKind::Segment, Folder::Segments, 64 << 20),
        (ObjectKind::Tombstone, Folder::Tombstones, 16 << 20),
        (ObjectKind::Mark, Folder::Marks, 16 << 20),
        (ObjectKind::Session, Folder::Sessions, 16 << 20),
    ] {
        let hostile = Hostile::new();
        let bytes = bomb(kind, &hostile, raw_len, &zeroes);
        let session = SessionId::from_bytes([7; 16]);
        let name = match folder {
            Folder::Outcomes => ObjectName::Outcome(session),
            Folder::Tombstones => ObjectName::Tombstone(session),
            Folder::Marks => ObjectName::Mark(session),
            Folder::Sessions => ObjectName::Session(session),
            _ => ObjectName::Segment(vmkeep::id::SegmentId::from_bytes(*blake3::hash(&bytes).as_bytes())),
        };
        put(&hostile, name, &bytes);
        if folder == Folder::Tombstones {
            let done = Outcome::Done.to_object(hostile.repository.id()).unwrap();
            put(&hostile, ObjectName::Outcome(session), &done);
        }
        hostile.bounded(&["points"], &[0, 1, 4]);
        let said = hostile.bounded(&["verify"], &[0, 1, 4]);
        hostile.bounded(&["prune"], &[0, 1, 4, 11]);
        assert!(folder != Folder::Outcomes || said.contains("outcomes/0707"), "{said}");
    }
}

#[test]
fn a_config_of_another_world() {
    let hostile = Hostile::new();
    let config = hostile.vmkeep.repository().join("config");
    std::fs::remove_file(hostile.vmkeep.repository().join("config.copy")).unwrap();
    for bytes in
        [Vec::new(), vec![0xff; 4096], bomb(ObjectKind::Config, &hostile, 16 << 20, &vec![0; 90 << 20])]
    {
        std::fs::write(&config, &bytes).unwrap();
        for args in [&["points"][..], &["verify"], &["prune"], &["stats"]] {
            let said = hostile.bounded(args, &[1, 4, 10]);
            assert!(said.contains("config"), "{said}");
        }
    }
    // a file of 2^63 bytes, as far as its length tells
    let huge = std::fs::File::create(&config).unwrap();
    if huge.set_len(1 << 43).is_ok() {
        hostile.bounded(&["points"], &[1, 4]);
    }
    assert!(Path::new("/proc/self/status").exists());
    assert!(ByteRange::new(u64::MAX, 1).is_none());
}

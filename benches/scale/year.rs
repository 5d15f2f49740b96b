//! A year of a hundred domains: 365 points of each, and the night after that.
//!
//! The first point of each domain is made for real, and so is the night. The points between them are copies of the first with
//! ids and times of their own; each has a segment of its own, and packs that are named, listed and of their length, but hold
//! nothing: nobody reads them. All domains begin with the same content.

use std::fs::File;
use std::path::Path;

use vmkeep::format::name::ObjectName;
use vmkeep::format::node::ChunkKind;
use vmkeep::format::pack::{FrameEntry, PackKind};
use vmkeep::format::point::{Level, PointRecord, PointStats};
use vmkeep::format::segment::{Segment, SegmentChunk, SegmentPack};
use vmkeep::format::session::Outcome;
use vmkeep::id::{ChunkId, PackId, PointId, SegmentId, SessionId};
use vmkeep::monitor::Recorder;
use vmkeep::repo::{PointEntry, Repository};

use super::disk::{GIB, Sparse};
use super::{Random, back_up, create, environment, figure, list_points, phase, setting, storage};

const DAYS: u64 = 365;
const DAY_MS: i64 = 86_400_000;
/// What a light day stores: chunks, and bytes of a pack of data.
const CHUNKS: u32 = 64;
const PACK_LEN: u64 = 1 << 20;
/// Blocks that each domain writes on the last day.
const WRITES: u64 = 256;
/// Definitions of a domain with a few disks and devices, bytes.
const XML_LEN: usize = 6 << 10;

fn name(domain: u64) -> String {
    format!("vm{domain:03}")
}

/// Measures a night beside no points but the first ones, then beside those of a year.
pub fn year() {
    let domains = setting("VMKEEP_SCALE_DOMAINS", 100);
    let temporary = tempfile::tempdir().unwrap();
    let dir = std::env::var_os("VMKEEP_SCALE_DIR").map_or(temporary.path().to_path_buf(), Into::into);
    let dir = dir.join("year");
    create(&dir, false);
    phase("first", &dir, domains);
    let title = format!("{domains} domains");
    let early = phase("night", &dir, domains);
    figure(&format!("{title}: their second night, {WRITES} blocks each"), None, early.seconds, "s");
    let one = phase("night", &dir, 1);
    figure(&format!("{title}, {} points: the backup of one domain", 2 * domains), None, one.seconds, "s");
    make_up(&dir);
    let points = domains * DAYS;
    let title = format!("{title}, {points} points");
    let filled = phase("night", &dir, domains);
    figure(
        &format!("{title}: a night, one domain after the other, that makes the local index anew"),
        None,
        filled.seconds,
        "s",
    );
    figure(
        &format!("{title}: peak memory of a night that makes the index anew"),
        Some(300.0),
        filled.peak,
        "MiB",
    );
    let late = phase("night", &dir, domains);
    figure(&format!("{title}: a night, one domain after the other"), None, late.seconds, "s");
    figure(&format!("{title}: peak memory of a night"), Some(300.0), late.peak, "MiB");
    let one = phase("night", &dir, 1);
    figure(&format!("{title}: the backup of one domain"), None, one.seconds, "s");
    if let Some(seconds) = list_points(&dir) {
        figure(&format!("{title}: vmkeep points"), None, seconds, "s");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

fn disk() -> Sparse {
    Sparse::new(1, 16 * GIB)
}

/// Makes the first point of each domain.
pub fn first(repository: &Repository, domains: u64) -> u64 {
    for domain in 0..domains {
        back_up(repository, &name(domain), &mut disk(), Level::Full);
    }
    domains
}

/// Makes the next point of each domain in one process, one after the other, without libvirt.
pub fn night(repository: &Repository, domains: u64) -> u64 {
    repository.keep_outcomes();
    // each night writes elsewhere
    let mut random = Random(std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64 | 1);
    let mut stored = 0;
    for domain in 0..domains {
        let mut disk = disk();
        disk.write(WRITES, &mut random);
        stored += back_up(repository, &name(domain), &mut disk, Level::Incremental).stats.new_bytes;
    }
    stored
}

/// Adds the points of a year before the ones that are there.
fn make_up(dir: &Path) {
    let repository = Repository::open(storage(dir), None, &environment(), &Recorder::new()).unwrap();
    let catalog = repository.catalog(&Recorder::new()).unwrap();
    let mut random = Random(77);
    for entry in catalog.points().iter().filter(|entry| entry.record.level == Level::Full) {
        for day in 2..DAYS {
            make_point(&repository, &dir.join("repository"), entry, day, &mut random);
        }
    }
}

fn bytes<const N: usize>(random: &mut Random) -> [u8; N] {
    let bytes: Vec<u8> = (0..N.div_ceil(8)).flat_map(|_| random.next().to_le_bytes()).collect();
    bytes.get(..N).unwrap().try_into().unwrap()
}

fn make_point(repository: &Repository, root: &Path, first: &PointEntry, day: u64, random: &mut Random) {
    let put = |name: ObjectName, bytes: &[u8]| {
        let path = root.join(name.to_string());
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        // not synced: it is not what is measured
        std::fs::write(path, bytes).unwrap();
    };
    let session = SessionId::from_bytes(bytes(random));
    let kinds = [(PackKind::Data, PACK_LEN), (PackKind::Metadata, 8192), (PackKind::Metadata, 8192)];
    let frame = FrameEntry { offset: 64, stored_len: 4096, raw_len: 1 << 20 };
    let packs: Vec<SegmentPack> = kinds
        .into_iter()
        .map(|(kind, stored_len)| {
            let id = PackId::from_bytes(bytes(random));
            SegmentPack { id, kind, stored_len, frames: vec![frame] }
        })
        .collect();
    for pack in &packs {
        put(ObjectName::Pack(pack.id), &[]);
        let path = root.join(ObjectName::Pack(pack.id).to_string());
        File::options().write(true).open(path).unwrap().set_len(pack.stored_len).unwrap();
    }
    let chunk = |number, id| SegmentChunk {
        id,
        kind: ChunkKind::Data,
        pack: 0,
        frame: 0,
        offset: 16384 * number,
        len: 16384,
    };
    let mut chunks: Vec<SegmentChunk> =
        (0..CHUNKS).map(|number| chunk(number, ChunkId::from_bytes(bytes(random)))).collect();
    chunks.sort_unstable_by_key(|chunk| chunk.id);
    let segment = Segment { owner: session, number: 0, packs, chunks };
    let segment = segment.to_object(repository.id()).unwrap();
    put(ObjectName::Segment(SegmentId::from_bytes(*blake3::hash(&segment).as_bytes())), &segment);
    let mut record = PointRecord::clone(&first.record);
    record.id = PointId::from(session);
    record.level = Level::Incremental;
    record.base = Some(first.record.id);
    record.time_ms -= (DAYS - day) as i64 * DAY_MS;
    record.checkpoint = Some(format!("vmkeep-{}", record.id.to_hex()));
    let xml: String = (0..XML_LEN / 16).map(|line| format!("<a{line:05}>{:>6}", record.domain)).collect();
    record.xml_inactive = Some(xml.as_str().into());
    record.xml_live = Some(format!("{xml}<live/>").into());
    let outcome = Outcome::Point { record: record.into(), stats: PointStats::default() };
    put(ObjectName::Outcome(session), &outcome.to_object(repository.id()).unwrap());
}

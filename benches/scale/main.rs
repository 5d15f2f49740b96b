//! Large repositories: a disk of 16 TiB with 1 TiB of data and 1,000 points, the metadata of few writes on a disk of 1 TiB,
//! an index of 16 million chunks, a prune that writes every pack anew, and a year of a hundred domains.
//!
//! `cargo bench --bench scale -- [index] [disk] [metadata] [repack] [year]` prints a line of JSON for each figure. Everything
//! is done for real, content is made, cut, hashed, compressed and checked, but that of the large disk's data packs is not
//! kept: there is no place for it. Kept is that of 16 runs of 1 GiB, spread over the disk, which is where later points write:
//! an increment compares what it reads with what was there. `metadata` and `repack` keep everything. Of the year all points but
//! the first ones and those that are measured are made up.
//!
//! `VMKEEP_SCALE_GIB` data of the disk (default 1024), `VMKEEP_SCALE_POINTS` (1000), `VMKEEP_SCALE_CHUNKS` of the index in
//! millions (16), `VMKEEP_SCALE_REPACK_GIB` data of what is repacked (32), `VMKEEP_SCALE_DIR` where it is kept (a temporary
//! directory; 32 GiB at the default sizes; a large disk that has its first point there already is gone on with),
//! `VMKEEP_SCALE_DOMAINS` domains of the year (100), `VMKEEP_SCALE_DISK_GIB` length of the disk of `metadata` (1024),
//! `VMKEEP_SCALE_PROGRAM` a vmkeep whose start beside all points is measured (none), `VMKEEP_SCALE_LEAF` bytes of a leaf and
//! `VMKEEP_SCALE_FANOUT` children of an inner node (those of a new repository).

mod disk;
mod year;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use vmkeep::chunk::IdHasher;
use vmkeep::format::name::ObjectName;
use vmkeep::format::node::ChunkKind;
use vmkeep::format::pack::{FrameEntry, PackKind};
use vmkeep::format::point::Level;
use vmkeep::format::segment::{Segment, SegmentChunk, SegmentPack};
use vmkeep::format::session::Outcome;
use vmkeep::id::{ChunkId, PackId, PointId, RepositoryId, SegmentId, SessionId};
use vmkeep::index::open_index;
use vmkeep::monitor::Recorder;
use vmkeep::ops::RequestedLevel;
use vmkeep::ops::backup::{BackupReport, ImageBackupOptions, ImageInput, backup_source};
use vmkeep::ops::forget::forget;
use vmkeep::ops::prune::{PruneOptions, prune};
use vmkeep::ops::verify::{VerifyLevel, VerifyOptions, verify};
use vmkeep::repo::reader::ChunkReader;
use vmkeep::repo::{CreateOptions, Environment, Repository};
use vmkeep::storage::Storage;

use disk::{GIB, Hollow, Sparse};

fn setting(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

fn main() {
    let parts: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    if let [child, phase, dir, count] = parts.as_slice()
        && child == "child"
    {
        return run_phase(phase, Path::new(dir), count.parse().unwrap());
    }
    // half an hour, and 32 GiB, only for who asks for it
    if parts.is_empty() {
        return eprintln!(
            "which: index, disk, metadata, repack, year? (cargo bench --bench scale -- PART...)"
        );
    }
    let wanted = |part: &str| parts.iter().any(|asked| asked == part);
    if wanted("index") {
        index();
    }
    if wanted("disk") {
        disk();
    }
    if wanted("metadata") {
        metadata();
    }
    if wanted("repack") {
        repack();
    }
    if wanted("year") {
        year::year();
    }
}

/// Prints a figure and its goal.
fn figure(name: &str, goal: Option<f64>, value: f64, unit: &str) {
    let goal = goal.map_or("null".into(), |goal| goal.to_string());
    println!("{{\"name\":\"{name}\",\"goal\":{goal},\"value\":{value:.6},\"unit\":\"{unit}\"}}");
}

/// Returns the most memory that this process has had, MiB.
fn peak() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    peak.trim().trim_end_matches(" kB").parse::<f64>().unwrap() / 1024.0
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

// --- an index ----------------------------------------------------------------

fn chunk_id(number: u64) -> ChunkId {
    IdHasher::new([7; 32]).chunk_id(ChunkKind::Data, &number.to_le_bytes())
}

/// A segment of 250,000 chunks.
fn segment(number: u64) -> (SegmentId, Segment) {
    const CHUNKS: u64 = 250_000;
    let chunk = |n: u64| SegmentChunk {
        id: chunk_id(number * CHUNKS + n),
        kind: ChunkKind::Data,
        pack: 0,
        frame: 0,
        offset: 0,
        len: 1,
    };
    let mut chunks: Vec<SegmentChunk> = (0..CHUNKS).map(chunk).collect();
    chunks.sort_unstable_by_key(|chunk| chunk.id);
    let id = *blake3::hash(&number.to_le_bytes()).as_bytes();
    let frames = vec![FrameEntry { offset: 64, stored_len: 100, raw_len: 100 }];
    let pack = SegmentPack { id: PackId::from_bytes(id), kind: PackKind::Data, stored_len: 1 << 20, frames };
    let owner = SessionId::from_bytes([1; 16]);
    (SegmentId::from_bytes(id), Segment { owner, number: 0, packs: vec![pack], chunks })
}

/// Waits until this process has nothing to do; returns how long that took, in seconds.
fn settle() -> f64 {
    let computed = || {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let fields = stat.rsplit_once(')').unwrap().1.split_whitespace().skip(11).take(2);
        fields.map(|ticks| ticks.parse::<u64>().unwrap()).sum::<u64>()
    };
    let start = Instant::now();
    let mut before = computed();
    loop {
        std::thread::sleep(std::time::Duration::from_secs(1));
        let now = computed();
        if now - before < 5 {
            return start.elapsed().as_secs_f64();
        }
        before = now;
    }
}

/// Measures how a repository of 4 million chunks comes by a local index where there is none: what is listed is read, checked
/// and decoded.
fn rebuild() {
    let dir = tempfile::tempdir().unwrap();
    create(dir.path(), false);
    let open = || {
        let cache = dir.path().join("cache");
        Repository::open(storage(dir.path()), Some(&cache), &environment(), &Recorder::new()).unwrap()
    };
    let repository = open();
    let owner = SessionId::from_bytes([1; 16]);
    let done = Outcome::Done.to_object(repository.id()).unwrap();
    repository.storage().put_new(ObjectName::Outcome(owner), &done).unwrap();
    let mut ids = Vec::new();
    for number in 0..16 {
        let (_, segment) = segment(number);
        ids.push(segment.chunks.first().unwrap().id);
        let bytes = segment.to_object(repository.id()).unwrap();
        let id = SegmentId::from_bytes(*blake3::hash(&bytes).as_bytes());
        repository.storage().put_new(ObjectName::Segment(id), &bytes).unwrap();
    }
    drop(repository);
    let start = Instant::now();
    let repository = open();
    let (_, view) = repository.refresh(&Recorder::new()).unwrap();
    figure("index of 4 million chunks: rebuild", Some(10.0), start.elapsed().as_secs_f64(), "s");
    let reader = ChunkReader::new(&repository, &view);
    assert!(ids.into_iter().all(|id| reader.hinted_packs(id).unwrap().len() == 1));
}

fn index() {
    rebuild();
    let dir = tempfile::tempdir().unwrap();
    let millions = setting("VMKEEP_SCALE_CHUNKS", 16);
    let opened = open_index(Some(dir.path()), RepositoryId::from_bytes([3; 16]));
    assert!(opened.notes.is_empty(), "{:?}", opened.notes);
    let index = opened.index;
    let mut applying = 0.0;
    for number in 0..millions * 4 {
        // making the segments is not the index's work
        let segment = segment(number);
        let start = Instant::now();
        index.apply(&[segment]).unwrap();
        applying += start.elapsed().as_secs_f64();
    }
    figure(&format!("index of {millions} million chunks: filled"), None, applying, "s");
    figure(&format!("index of {millions} million chunks: put in order after that"), None, settle(), "s");
    // filters and the index of blocks come into the cache first: neither kind of look-up pays for them alone
    let mut random = Random(4);
    let ids: Vec<ChunkId> = (0..100_000).map(|_| chunk_id(random.next() % (millions * 2_000_000))).collect();
    assert!(ids.chunks(1024).any(|ids| !index.lookup(ids).unwrap().concat().is_empty()));
    for (what, from) in [("known", 0), ("new", millions * 1_000_000)] {
        let mut random = Random(5);
        let ids: Vec<ChunkId> =
            (0..400_000).map(|_| chunk_id(from + random.next() % (millions * 1_000_000))).collect();
        let start = Instant::now();
        let found: usize = ids.chunks(1024).map(|ids| index.lookup(ids).unwrap().concat().len()).sum();
        assert_eq!(found, if from == 0 { ids.len() } else { 0 });
        let seconds = start.elapsed().as_secs_f64() / 4.0;
        figure(
            &format!("index of {millions} million chunks: 100,000 look-ups of {what} ones"),
            Some(1.0),
            seconds,
            "s",
        );
    }
    let bare = bare_reads(dir.path(), 400_000) / 4.0;
    let name = format!("index of {millions} million chunks: 100,000 bare reads of 4 KiB of it");
    figure(&name, None, bare, "s");
    figure(&format!("index of {millions} million chunks: peak memory"), Some(512.0), peak(), "MiB");
}

/// Returns the seconds that reading so many blocks of the index's files takes, wherever they stand: who looks up a chunk that
/// the index has reads the block in which it stands, but for the few that are in RocksDB's cache.
fn bare_reads(dir: &Path, count: u64) -> f64 {
    const BLOCK_LEN: u64 = 4096;
    let (mut files, mut blocks, mut dirs) = (Vec::new(), 0, vec![dir.to_owned()]);
    while let Some(dir) = dirs.pop() {
        for path in std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == "sst") {
                let file = std::fs::File::open(path).unwrap();
                let first = blocks;
                blocks += file.metadata().unwrap().len() / BLOCK_LEN;
                files.push((first, file));
            }
        }
    }
    assert!(blocks > 0, "the index is not on the disk: a build without rocksdb?");
    let (mut random, mut block) = (Random(6), [0; BLOCK_LEN as usize]);
    let start = Instant::now();
    for _ in 0..count {
        let wanted = random.next() % blocks;
        let (first, file) = files.iter().rfind(|(first, _)| *first <= wanted).unwrap();
        file.read_exact_at(&mut block, (wanted - first) * BLOCK_LEN).unwrap();
    }
    start.elapsed().as_secs_f64()
}

fn environment() -> Environment {
    Environment {
        host: "bench".into(),
        boot_id: "bench".into(),
        process_id: std::process::id(),
        program: "bench".into(),
        now_ms: || {
            let since = std::time::UNIX_EPOCH.elapsed().unwrap();
            i64::try_from(since.as_millis()).unwrap()
        },
        timing: vmkeep::repo::Timing::default(),
    }
}

fn storage(dir: &Path) -> Box<dyn Storage> {
    let url = dir.join("repository");
    let storage = vmkeep::storage::open_url(url.to_str().unwrap()).unwrap();
    let hollow = dir.join("hollow");
    if hollow.exists() { Box::new(Hollow::open(storage, hollow)) } else { storage }
}

/// Makes a repository, of which the content of data packs may not be kept.
fn create(dir: &Path, is_hollow: bool) {
    if is_hollow {
        std::fs::create_dir_all(dir.join("hollow")).unwrap();
    }
    let storage = vmkeep::storage::create_url(dir.join("repository").to_str().unwrap()).unwrap();
    let mut options = CreateOptions::default();
    options.leaf_len = setting("VMKEEP_SCALE_LEAF", options.leaf_len);
    options.fanout = setting("VMKEEP_SCALE_FANOUT", options.fanout.into()).try_into().unwrap();
    Repository::create(storage, &options, &environment()).unwrap();
}

/// Makes a point. In an incremental the disk's dirty ranges alone are read; the first point is a full anyway.
fn back_up(repository: &Repository, domain: &str, disk: &mut Sparse, level: Level) -> BackupReport {
    let options = ImageBackupOptions {
        domain: domain.into(),
        disk: "vda".into(),
        input: ImageInput::Block("none".into()),
        level: RequestedLevel::Is(level),
        tags: Vec::new(),
        read_limit: None,
        dry_run: false,
    };
    backup_source(repository, &options, disk, &Recorder::new()).unwrap()
}

/// What a process of its own did.
struct Phase {
    seconds: f64,
    /// MiB.
    peak: f64,
    /// Bytes of metadata, or a number of chunks.
    count: u64,
}

/// Runs a phase as a command would run: in a new process, that knows nothing of the ones before.
fn phase(phase: &str, dir: &Path, count: u64) -> Phase {
    let run = Command::new(std::env::current_exe().unwrap())
        .args(["child", phase, dir.to_str().unwrap(), &count.to_string()])
        .output()
        .unwrap();
    let said = String::from_utf8(run.stdout).unwrap();
    assert!(run.status.success(), "{phase}: {}", String::from_utf8_lossy(&run.stderr));
    let mut words = said.split_whitespace();
    let mut next = || words.next().unwrap();
    Phase { seconds: next().parse().unwrap(), peak: next().parse().unwrap(), count: next().parse().unwrap() }
}

fn run_phase(phase: &str, dir: &Path, count: u64) {
    // reads tens of thousands of small files: not what vmkeep would do
    let storage = storage(dir);
    // nor has a disk to be written as often as before
    let disk = (phase == "write").then(|| prepare(dir, count));
    let start = Instant::now();
    let repository =
        Repository::open(storage, Some(&dir.join("cache")), &environment(), &Recorder::new()).unwrap();
    let found = match phase {
        "write" => write(&repository, dir, count, &mut disk.unwrap()),
        "verify" => structure(&repository),
        "prune" => forget_half_and_prune(&repository),
        "thin" => write_thin(&repository, count),
        "repack" => forget_first_and_repack(&repository),
        "first" => year::first(&repository, count),
        "night" => year::night(&repository, count),
        other => panic!("no such phase: {other}"),
    };
    println!("{} {} {found}", start.elapsed().as_secs_f64(), peak());
}

/// Returns the disk after so many scattered writes more; the first point has none.
fn prepare(dir: &Path, count: u64) -> Sparse {
    let shape = std::fs::read_to_string(dir.join("shape")).unwrap();
    let mut words = shape.split(' ');
    let mut number = || words.next().unwrap().parse::<u64>().unwrap();
    let (gib, len) = (number(), number() * GIB);
    let mut disk = if words.next() == Some("spread") {
        Sparse::spread((gib * 1024).min(len >> 24), len)
    } else {
        Sparse::new(gib, len)
    };
    let mut random = Random(11);
    // what earlier processes have written
    let before = std::fs::read_to_string(dir.join("history")).unwrap_or_default();
    for count in before.lines() {
        disk.write(count.parse().unwrap(), &mut random);
    }
    if count > 0 {
        disk.write(count, &mut random);
    }
    disk
}

/// Makes a point of a disk, and notes what was written to it.
fn write(repository: &Repository, dir: &Path, count: u64, disk: &mut Sparse) -> u64 {
    let report = back_up(repository, "large", disk, Level::Incremental);
    if count > 0 {
        let history = dir.join("history");
        let before = std::fs::read_to_string(&history).unwrap_or_default();
        std::fs::write(&history, format!("{before}{count}\n")).unwrap();
    }
    report.stats.metadata_bytes
}

fn structure(repository: &Repository) -> u64 {
    let options = VerifyOptions { level: VerifyLevel::Structure, ..VerifyOptions::default() };
    let report = verify(repository, &options, &Recorder::new()).unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings.first());
    report.chunks
}

fn forget_half_and_prune(repository: &Repository) -> u64 {
    let silent = Recorder::new();
    let catalog = repository.catalog(&silent).unwrap();
    let ids: Vec<PointId> = catalog.points().iter().map(|entry| entry.record.id).collect();
    forget(repository, &ids[..ids.len() / 2], "bench", false, &silent).unwrap();
    // what would be repacked is not there
    let options = PruneOptions { max_repack_bytes: 0, ..PruneOptions::default() };
    prune(repository, &options, &silent).unwrap().live_chunks
}

/// Makes a full of a disk of so many GiB, of which something in every MiB was written since the one before.
fn write_thin(repository: &Repository, gib: u64) -> u64 {
    let mut disk = Sparse::new(gib, 16 * 1024 * GIB);
    disk.is_thin = true;
    if !repository.catalog(&Recorder::new()).unwrap().points().is_empty() {
        disk.write_everywhere();
    }
    back_up(repository, "large", &mut disk, Level::Full).stats.metadata_bytes
}

/// Forgets the first of two points; then something in every pack is not needed, and all are written anew.
fn forget_first_and_repack(repository: &Repository) -> u64 {
    let silent = Recorder::new();
    let first = repository.catalog(&silent).unwrap().points()[0].record.id;
    forget(repository, &[first], "bench", false, &silent).unwrap();
    let options = PruneOptions { max_unused_permille: 0, ..PruneOptions::default() };
    let report = prune(repository, &options, &silent).unwrap();
    assert!(report.repacked_bytes * 2 > report.stored_before_bytes, "{report:?}");
    report.live_chunks
}

fn repack() {
    let gib = setting("VMKEEP_SCALE_REPACK_GIB", 32);
    let temporary = tempfile::tempdir().unwrap();
    let dir = std::env::var_os("VMKEEP_SCALE_DIR").map_or(temporary.path().to_path_buf(), PathBuf::from);
    let dir = dir.join("repack");
    create(&dir, false);
    phase("thin", &dir, gib);
    phase("thin", &dir, gib);
    let pruned = phase("repack", &dir, 0);
    let title = format!("{gib} GiB in {} live chunks, every pack repacked", pruned.count);
    figure(&format!("{title}: prune"), None, pruned.seconds, "s");
    let allowed = 200.0 + 40.0 * pruned.count as f64 / 1_048_576.0;
    figure(&format!("{title}: prune: memory"), Some(allowed), pruned.peak, "MiB");
    std::fs::remove_dir_all(&dir).unwrap();
}

fn disk() {
    let (gib, points) = (setting("VMKEEP_SCALE_GIB", 1024), setting("VMKEEP_SCALE_POINTS", 1000));
    let temporary = tempfile::tempdir().unwrap();
    let dir = std::env::var_os("VMKEEP_SCALE_DIR").map_or(temporary.path().to_path_buf(), PathBuf::from);
    let title = format!("16 TiB disk with {gib} GiB");
    let tell = |what: &str, done: &Phase| {
        figure(&format!("{title}: {what}"), None, done.seconds, "s");
        figure(&format!("{title}: {what}: peak memory"), Some(512.0), done.peak, "MiB");
    };
    let (shape, begun) = (format!("{gib} 16384"), dir.join("begun"));
    if begun.exists() {
        assert_eq!(std::fs::read_to_string(&begun).unwrap(), shape, "{} holds another disk", dir.display());
    } else {
        create(&dir, true);
        std::fs::write(dir.join("shape"), &shape).unwrap();
        let first = phase("write", &dir, 0);
        tell("first point", &first);
        figure(&format!("{title}: first point: speed"), None, gib as f64 * 1024.0 / first.seconds, "MiB/s");
        figure(&format!("{title}: first point: metadata of a GiB"), None, per(first.count, gib), "KiB");
        // only now: what was cut off before has no first point
        std::fs::write(&begun, &shape).unwrap();
    }
    for count in [100, 1000, 10_000] {
        let done = phase("write", &dir, count);
        tell(&format!("point of {count} scattered writes"), &done);
        let name = format!("{title}: point of {count} scattered writes: metadata of each");
        figure(&name, None, per(done.count, count), "KiB");
    }
    many_points(&title, &dir, points);
    start_up(&dir, points);
    let verified = phase("verify", &dir, 0);
    tell(&format!("{points} points: verify --structure"), &verified);
    figure(&format!("{title}: {points} points: chunks"), None, verified.count as f64, "");
    let pruned = phase("prune", &dir, 0);
    tell(&format!("{points} points: half of them forgotten, prune that repacks nothing"), &pruned);
    let allowed = 200.0 + 40.0 * pruned.count as f64 / 1_048_576.0;
    figure(
        &format!("{title}: prune: memory at {} live chunks", pruned.count),
        Some(allowed),
        pruned.peak,
        "MiB",
    );
}

/// Makes points of few writes until there are so many: the late ones should cost what the early ones do.
fn many_points(title: &str, dir: &Path, points: u64) {
    let mut times: Vec<f64> = Vec::new();
    let mut most = 0f64;
    let mut metadata = 0;
    for _ in 4..points {
        let done = phase("write", dir, 16);
        times.push(done.seconds);
        most = most.max(done.peak);
        metadata = done.count.max(metadata);
    }
    let some = 20.min(times.len());
    let (early, late) = (median(&times[..some]), median(&times[times.len() - some..]));
    figure(&format!("{title}: points 5 to 24, 16 writes each"), None, early, "s");
    figure(&format!("{title}: the last 20 of {points} points, 16 writes each"), None, late, "s");
    let name = format!("{title}: {points} points: the last points beside the early ones");
    figure(&name, Some(1.1), late / early, "times");
    figure(&format!("{title}: peak memory of those"), Some(512.0), most, "MiB");
    let name = format!("{title}: points of 16 scattered writes: metadata of each, at most");
    figure(&name, None, per(metadata, 16), "KiB");
}

/// What the maps of few and of many writes take, on a disk of 1 TiB that has data everywhere. Writes go to up to 65,536 full
/// MiB; so many that they would often meet there are left out.
fn metadata() {
    let temporary = tempfile::tempdir().unwrap();
    let dir = std::env::var_os("VMKEEP_SCALE_DIR").map_or(temporary.path().to_path_buf(), PathBuf::from);
    let dir = dir.join("metadata");
    create(&dir, false);
    let (gib, len) = (setting("VMKEEP_SCALE_GIB", 1024).min(64), setting("VMKEEP_SCALE_DISK_GIB", 1024));
    std::fs::write(dir.join("shape"), format!("{gib} {len} spread")).unwrap();
    let title = if len == 1024 { "1 TiB".to_owned() } else { format!("{len} GiB") };
    let first = phase("write", &dir, 0);
    let name = format!("{title} disk with data in every MiB: first point: metadata");
    figure(&name, None, per(first.count, 1024), "MiB");
    for count in [1, 16, 100, 1000, 10_000].into_iter().filter(|count| *count < gib * 1024 / 4) {
        let done = phase("write", &dir, count);
        let name = format!(
            "{title} disk with data in every MiB: point of {count} scattered writes: metadata of each"
        );
        figure(&name, Some(6.0), per(done.count, count), "KiB");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

/// Lists all points by a program, as a command does that begins beside them.
fn start_up(dir: &Path, points: u64) {
    if let Some(seconds) = list_points(dir) {
        figure(&format!("vmkeep points, {points} points"), Some(0.1), seconds, "s");
    }
}

/// Returns the seconds that the program takes to list all points, the median of five.
fn list_points(dir: &Path) -> Option<f64> {
    let program = std::env::var_os("VMKEEP_SCALE_PROGRAM")?;
    let list = || {
        let mut command = Command::new(&program);
        command.arg("points").stdout(Stdio::null());
        command.env("VMKEEP_REPOSITORY", dir.join("repository")).env("VMKEEP_CACHE_DIR", dir.join("cache"));
        let start = Instant::now();
        assert!(command.status().unwrap().success());
        start.elapsed().as_secs_f64()
    };
    let times: Vec<f64> = (0..5).map(|_| list()).collect();
    Some(median(&times))
}

fn median(times: &[f64]) -> f64 {
    let mut times = times.to_vec();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn per(bytes: u64, count: u64) -> f64 {
    bytes as f64 / count as f64 / 1024.0
}

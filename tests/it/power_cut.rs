//! Power cuts below a real file system: QEMU records every write and flush of a disk with ext4 or XFS on it while vmkeep
//! works there. Then the disk is made anew as it would be had the power gone at some moment: all that was flushed is
//! there, of what came later any part. The file system recovers by its journal, and the repository has lost nothing.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{Vmkeep, is_long, point, skipped, text};

/// Length of the disk, bytes: XFS wants 300 MiB.
const DISK_LEN: u64 = 320 << 20;

/// Runs a program; returns what went wrong.
fn try_run(program: &str, args: &[&str]) -> Result<String, String> {
    match Command::new(program).args(args).stdin(Stdio::null()).output() {
        Ok(output) if output.status.success() => Ok(text(&output).trim().to_owned()),
        Ok(output) => Err(format!("{program} {args:?}: {}", text(&output).trim())),
        Err(error) => Err(format!("{program}: {error}")),
    }
}

/// A mounted loop device, taken away when dropped.
struct Mounted {
    dir: PathBuf,
    device: String,
}

impl Mounted {
    fn mount(file: &Path, dir: &Path) -> Result<Self, String> {
        fs::create_dir_all(dir).unwrap();
        let device = try_run("losetup", &["-f", "--show", file.to_str().unwrap()])?;
        let mounted = Self { dir: dir.into(), device };
        try_run("mount", &[&mounted.device, dir.to_str().unwrap()])?;
        Ok(mounted)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = try_run("umount", &[self.dir.to_str().unwrap()]);
        let _ = try_run("losetup", &["-d", &self.device]);
    }
}

/// A disk whose writes QEMU records.
struct Recorded {
    daemon: Child,
    log: PathBuf,
    /// The file that is the disk.
    file: PathBuf,
}

impl Recorded {
    fn start(dir: &Path, image: &Path) -> Result<Self, String> {
        let (log, file) = (dir.join("log"), dir.join("export"));
        File::create(&log).unwrap();
        File::create(&file).unwrap();
        let option = |text: String| text;
        let daemon = Command::new("qemu-storage-daemon")
            .args([
                "--blockdev",
                &option(format!("driver=file,node-name=image,filename={}", image.display())),
            ])
            .args(["--blockdev", &option(format!("driver=file,node-name=log,filename={}", log.display()))])
            .args(["--blockdev", "driver=blklogwrites,node-name=disk,file=image,log=log,log-sector-size=512"])
            .arg("--export")
            .arg(format!("type=fuse,id=export,node-name=disk,mountpoint={},writable=on", file.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| format!("qemu-storage-daemon: {error}"))?;
        let mut recorded = Self { daemon, log, file };
        let start = Instant::now();
        while fs::metadata(&recorded.file).map_or(0, |found| found.len()) != DISK_LEN {
            if recorded.daemon.try_wait().unwrap().is_some() || start.elapsed() > Duration::from_secs(10) {
                return Err("qemu-storage-daemon does not export over FUSE here".into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(recorded)
    }

    /// Returns how many entries of the log were there at its last flush.
    fn entries(&self) -> u64 {
        let mut head = [0; 24];
        File::open(&self.log).unwrap().read_exact_at(&mut head, 0).unwrap();
        u64::from_le_bytes(head[16..].try_into().unwrap())
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        // TERM, so that it takes its file system away
        let _ = try_run("kill", &[&self.daemon.id().to_string()]);
        let _ = self.daemon.wait();
        let _ = try_run("umount", &["-l", self.file.to_str().unwrap()]);
    }
}

/// A write, or a flush, as the log of dm-log-writes has it.
struct Entry {
    /// First byte on the disk.
    start: u64,
    /// Where the content stands in the log, and its length.
    content: (u64, u64),
    is_flush: bool,
    /// It is durable by itself.
    is_fua: bool,
    is_discard: bool,
}

fn read_log(path: &Path) -> Vec<Entry> {
    let log = File::open(path).unwrap();
    let number = |at: u64| {
        let mut bytes = [0; 8];
        log.read_exact_at(&mut bytes, at).unwrap();
        u64::from_le_bytes(bytes)
    };
    assert_eq!(number(0), 0x006a_7366_7773_6872, "the magic of the log");
    let (count, sector) = (number(16), number(24) & 0xffff_ffff);
    let (mut entries, mut at) = (Vec::new(), sector);
    for _ in 0..count {
        let (start, sectors, flags) = (number(at), number(at + 8), number(at + 16));
        at += sector;
        let is_discard = flags & 4 != 0;
        let len = sectors * sector;
        entries.push(Entry {
            start: start * sector,
            content: (at, len),
            is_flush: flags & 1 != 0,
            is_fua: flags & 2 != 0,
            is_discard,
        });
        if !is_discard {
            at += len;
        }
    }
    entries
}

/// What had been promised once so many entries were flushed.
struct Promise {
    entries: u64,
    kept: Vec<(String, u64)>,
}

struct Story {
    vmkeep: Vmkeep,
    kept: Vec<(String, u64)>,
    promises: Vec<Promise>,
}

fn content(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; 3 << 20];
    blake3::Hasher::new().update(&(seed / 3).to_le_bytes()).finalize_xof().fill(&mut bytes);
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes[..1 << 20]);
    bytes
}

impl Story {
    fn run(&self, repository: &Path, args: &[&str]) -> String {
        let output = self.vmkeep.command_on(repository, args).output().unwrap();
        let said = text(&output);
        assert!(output.status.success(), "{args:?}: {said}");
        said
    }

    fn backup(&self, repository: &Path, seed: u64) -> String {
        let image = self.vmkeep.path("disk.raw");
        fs::write(&image, content(seed)).unwrap();
        let args = ["--json", "backup", "--file", image.to_str().unwrap(), "--name", "web"];
        let said = self.run(repository, &args);
        point(&serde_json::from_str(said.lines().last().unwrap()).unwrap())
    }

    /// Works for a while; after each command notes what is promised from then on.
    fn tell(&mut self, repository: &Path, recorded: &Recorded) {
        self.run(repository, &["init"]);
        for seed in 0..9 {
            let id = self.backup(repository, seed);
            self.kept.push((id, seed));
            self.promise(recorded);
            if seed % 3 == 2 {
                for _ in 0..2 {
                    let (oldest, _) = self.kept.remove(0);
                    // what is being forgotten is promised no more
                    self.promise(recorded);
                    self.run(repository, &["forget", "-y", "--force", &oldest]);
                }
                self.run(repository, &["prune", "--max-unused", "0"]);
                self.run(repository, &["verify"]);
            }
        }
    }

    fn promise(&mut self, recorded: &Recorded) {
        self.promises.push(Promise { entries: recorded.entries(), kept: self.kept.clone() });
    }

    /// Checks a disk as a power cut has left it. `flushed`: so many entries are there for certain.
    fn check(&self, repository: &Path, flushed: u64, cut: u64) {
        let promised = self.promises.iter().rposition(|promise| promise.entries <= flushed);
        let Some(promised) = promised else { return };
        // a later promise that may have come true takes points away that were being forgotten
        let later = self.promises.iter().skip(promised + 1).filter(|promise| promise.entries <= cut + 1);
        let mut kept = self.promises[promised].kept.clone();
        for promise in later.chain(self.promises.get(promised + 1)) {
            kept.retain(|point| promise.kept.contains(point));
        }
        self.run(repository, &["verify", "--structure"]);
        let target = self.vmkeep.path("restored.raw");
        for (id, seed) in &kept {
            let _ = fs::remove_file(&target);
            self.run(repository, &["restore", id, "--to", &format!("vda={}", target.display())]);
            assert!(fs::read(&target).unwrap() == content(*seed), "point {id} differs");
        }
        self.backup(repository, 1000);
        self.run(repository, &["prune", "--max-unused", "0"]);
        self.run(repository, &["verify"]);
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit.max(1)
    }
}

/// Makes the disk as it would be after a cut behind so many entries; returns how many were flushed.
fn cut(base: &Path, image: &Path, log: &Path, entries: &[Entry], count: usize, random: &mut Random) -> u64 {
    try_run("cp", &["--sparse=always", base.to_str().unwrap(), image.to_str().unwrap()]).unwrap();
    let flushed = entries[..count].iter().rposition(|entry| entry.is_flush).map_or(0, |last| last + 1);
    let (disk, log) = (File::options().write(true).open(image).unwrap(), File::open(log).unwrap());
    // a drive that loses much, or little
    let chance = [1, 4, 7][random.below(3) as usize];
    for (number, entry) in entries[..count].iter().enumerate() {
        let survives = number < flushed || entry.is_fua || random.below(8) < chance;
        let (at, len) = entry.content;
        if !survives || len == 0 {
            continue;
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        if !entry.is_discard {
            log.read_exact_at(&mut bytes, at).unwrap();
        }
        disk.write_all_at(&bytes, entry.start).unwrap();
    }
    flushed as u64
}

/// Returns how many cuts were checked, or why none could be.
fn cut_often(file_system: &str, cuts: u64) -> Result<u64, String> {
    if !rustix::process::geteuid().is_root() {
        return Err("only root can mount".into());
    }
    let vmkeep = Vmkeep::init(None);
    let (base, image) = (vmkeep.path("base.img"), vmkeep.path("image.img"));
    File::create(&base).unwrap().set_len(DISK_LEN).unwrap();
    try_run(&format!("mkfs.{file_system}"), &["-q", base.to_str().unwrap()])?;
    try_run("cp", &["--sparse=always", base.to_str().unwrap(), image.to_str().unwrap()])?;
    let recorded = Recorded::start(vmkeep.dir.path(), &image)?;
    let mut story = Story { vmkeep, kept: Vec::new(), promises: Vec::new() };
    let dir = story.vmkeep.path("mounted");
    let mounted = Mounted::mount(&recorded.file, &dir)?;
    story.tell(&dir.join("repository"), &recorded);
    drop(mounted);
    let log = recorded.log.clone();
    let entries = read_log(&log);
    drop(recorded);
    let flushes = entries.iter().filter(|entry| entry.is_flush).count();
    println!("{file_system}: {} writes and {flushes} flushes recorded", entries.len());
    assert!(flushes > 100, "the file system does not flush what vmkeep syncs");
    let mut random = Random(0x5eed_0000 + cuts);
    for number in 0..cuts {
        let count = usize::try_from(random.below(entries.len() as u64 + 1)).unwrap();
        let flushed = cut(&base, &image, &log, &entries, count, &mut random);
        println!("{file_system} {number}: cut after {count} entries, {flushed} of them flushed");
        let mounted = Mounted::mount(&image, &dir)?;
        if dir.join("repository/config").exists() {
            story.check(&dir.join("repository"), flushed, count as u64);
        } else {
            assert!(story.promises.iter().all(|promise| promise.entries > flushed), "the repository is gone");
        }
        drop(mounted);
    }
    Ok(cuts)
}

#[test]
fn the_power_goes_at_any_moment() {
    for (file_system, cuts) in [("ext4", 10), ("xfs", 10)] {
        match cut_often(file_system, if is_long() { 500 } else { cuts }) {
            Ok(cuts) => println!("{file_system}: {cuts} power cuts, nothing lost"),
            Err(reason) => {
                let make = format!("mkfs.{file_system}");
                let tools = [&make, "losetup", "mount", "qemu-storage-daemon"];
                skipped(&format!("{file_system}: {reason}"), &tools);
            }
        }
    }
}

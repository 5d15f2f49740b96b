//! A lab, and somebody who keeps a domain of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Weak};

use crate::buffer::Payload;
use crate::error::{Error, Result};
use crate::extent::{ByteRange, RangeSet};
use crate::monitor::Recorder;
use crate::source::DiskSource;
use crate::source::domain::{BackupRequest, BaseCheckpoint, DiskMode, DomainBackup, Freeze, Hypervisor, Job};

pub const MIB: u64 = 1 << 20;

/// A private libvirt daemon, shared by the tests that run, purged when the last one is over.
pub struct Lab {
    dir: PathBuf,
}

impl Lab {
    pub fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Lab>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(lab) = shared.upgrade() {
            return lab;
        }
        let lab = Arc::new(Self::start("dom"));
        *shared = Arc::downgrade(&lab);
        lab
    }

    fn start(name: &str) -> Self {
        static LABS: AtomicU32 = AtomicU32::new(0);
        // the lab before may still be purged; short, since unix sockets lie deep below it
        let number = LABS.fetch_add(1, Ordering::Relaxed);
        let lab = Self { dir: format!("/tmp/lab-{name}-{}-{number}", std::process::id()).into() };
        lab.cmd(&["start"]);
        lab
    }

    /// Kills the daemon and starts it again; domains live on.
    #[track_caller]
    pub fn restart(&self) {
        let pid = std::fs::read_to_string(self.dir.join("r/daemon.pid")).unwrap();
        run("kill", &["-9", pid.trim()]);
        while std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()))
            .is_ok_and(|stat| !stat.contains(") Z "))
        {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        self.cmd(&["start"]);
    }

    fn run(&self, args: &[&str]) -> std::process::Output {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/lab/lab.sh");
        let mut command = Command::new("bash");
        command.arg(script).args(args).env("LAB_DIR", &self.dir).stdin(Stdio::null()).output().unwrap()
    }

    /// Runs a command of `lab.sh`.
    #[track_caller]
    pub fn cmd(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "lab.sh {args:?}: {stderr}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs a command of `lab.sh` that may fail.
    pub fn fails(&self, args: &[&str]) -> bool {
        !self.run(args).status.success()
    }

    pub fn hypervisor(&self) -> Hypervisor {
        Hypervisor::connect(Some(self.cmd(&["uri"]).trim())).unwrap()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.run(&["stop", "--purge"]);
    }
}

/// What a backup gave.
pub struct Taken {
    pub modes: BTreeMap<String, DiskMode>,
    pub dirty: BTreeMap<String, Option<RangeSet>>,
    pub sizes: BTreeMap<String, u64>,
    pub excluded: Vec<(String, String)>,
    pub warnings: Vec<String>,
    pub checkpoint: Option<String>,
}

impl Taken {
    /// Describes how each disk was read: "vda inc vdc full".
    pub fn summary(&self) -> String {
        let words = self.modes.iter().map(|(target, mode)| match mode {
            DiskMode::Incremental { .. } => format!("{target} inc"),
            DiskMode::Full { .. } => format!("{target} full"),
        });
        words.collect::<Vec<_>>().join(" ")
    }

    #[track_caller]
    pub fn reason(&self, target: &str) -> &str {
        match &self.modes[target] {
            DiskMode::Full { reason: Some(reason) } => reason,
            other => panic!("{target} is {other:?}"),
        }
    }

    /// Returns the dirty ranges of a disk in KiB: "1024+64 2048+64".
    #[track_caller]
    pub fn dirty_kib(&self, target: &str) -> String {
        let set = self.dirty[target].as_ref().unwrap();
        let words = set.iter().map(|range| format!("{}+{}", range.start() / 1024, range.len() / 1024));
        words.collect::<Vec<_>>().join(" ")
    }
}

/// The point that a backup made.
pub struct Point {
    pub full: bool,
    pub base: Option<BaseCheckpoint>,
    /// The content of each disk.
    pub content: BTreeMap<String, Vec<u8>>,
}

/// One repository's view of one domain.
pub struct Keeper {
    pub lab: Arc<Lab>,
    pub hypervisor: Hypervisor,
    pub domain: String,
    pub prefix: String,
    pub points: Vec<Point>,
    pub scratch: tempfile::TempDir,
    count: u32,
}

impl Keeper {
    /// Defines a domain and starts it.
    #[track_caller]
    pub fn of(domain: &str, disks: &[&str]) -> Self {
        Self::of_lab(Lab::shared(), domain, disks)
    }

    /// Does so in a lab that no other test uses.
    #[track_caller]
    pub fn alone(domain: &str, disks: &[&str]) -> Self {
        Self::of_lab(Arc::new(Lab::start(domain)), domain, disks)
    }

    #[track_caller]
    fn of_lab(lab: Arc<Lab>, domain: &str, disks: &[&str]) -> Self {
        let mut args = vec!["define"];
        args.extend(disks.iter().filter(|word| word.starts_with("--")));
        args.push(domain);
        args.extend(disks.iter().filter(|word| !word.starts_with("--")));
        lab.cmd(&args);
        Self::another(lab, domain, "vmkeep-0000000a-")
    }

    /// Returns another repository's view.
    pub fn another(lab: Arc<Lab>, domain: &str, prefix: &str) -> Self {
        let hypervisor = lab.hypervisor();
        let scratch = tempfile::tempdir_in("/var/tmp").unwrap();
        // the daemon may run as another user
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(scratch.path(), open).unwrap();
        let (domain, prefix) = (domain.to_owned(), prefix.to_owned());
        Self { lab, hypervisor, domain, prefix, points: Vec::new(), scratch, count: 0 }
    }

    #[track_caller]
    pub fn lab(&self, command: &str, args: &[&str]) -> String {
        let mut all = vec![command, self.domain.as_str()];
        all.extend(args);
        self.lab.cmd(&all)
    }

    #[track_caller]
    pub fn virsh(&self, command: &str, args: &[&str]) -> String {
        let mut all = vec!["virsh", command, self.domain.as_str()];
        all.extend(args);
        self.lab.cmd(&all)
    }

    #[track_caller]
    pub fn write(&self, disk: &str, offset: &str, len: &str, pattern: &str) {
        // in the first moments of a domain, lines of its log may hide that a write was made
        let args = ["write", &self.domain, disk, offset, len, pattern];
        let hidden = (0..3).take_while(|_| self.lab.fails(&args)).count();
        assert!(hidden < 3, "{args:?}");
    }

    #[track_caller]
    pub fn image(&self, disk: &str) -> String {
        self.lab("image", &[disk]).trim().to_owned()
    }

    /// Returns what libvirt lists, sorted.
    #[track_caller]
    pub fn checkpoints(&self) -> Vec<String> {
        let list = self.virsh("checkpoint-list", &["--name"]);
        let mut names: Vec<String> = list.split_whitespace().map(str::to_owned).collect();
        names.sort();
        names
    }

    pub fn last_checkpoint(&self) -> String {
        self.points.last().unwrap().base.as_ref().unwrap().name.clone()
    }

    /// Returns a request for an incremental of the newest point, or a full.
    pub fn request(&mut self, full: bool) -> BackupRequest {
        self.count += 1;
        let bases = self.points.iter().rev().filter_map(|point| point.base.clone());
        BackupRequest {
            domain: self.domain.clone(),
            include: Vec::new(),
            exclude: Vec::new(),
            bases: if full { Vec::new() } else { bases.take(1).collect() },
            new_checkpoint: Some(format!("{}{:016x}", self.prefix, self.count)),
            freeze: Freeze::Auto,
            pause: false,
            scratch_dir: Some(self.scratch.path().to_path_buf()),
            checkpoint_prefix: self.prefix.clone(),
            known_checkpoints: self
                .points
                .iter()
                .filter_map(|point| Some(point.base.as_ref()?.name.clone()))
                .collect(),
        }
    }

    pub fn begin(&self, request: &BackupRequest) -> Result<DomainBackup> {
        self.hypervisor.begin(request, &Recorder::new())
    }

    #[track_caller]
    pub fn refused(&self, request: &BackupRequest) -> Error {
        match self.begin(request) {
            Ok(_) => panic!("it began"),
            Err(error) => error,
        }
    }

    #[track_caller]
    pub fn full(&mut self) -> Taken {
        let request = self.request(true);
        self.back_up(&request)
    }

    #[track_caller]
    pub fn inc(&mut self) -> Taken {
        let request = self.request(false);
        self.back_up(&request)
    }

    /// Makes a whole backup and checks what it read.
    #[track_caller]
    pub fn back_up(&mut self, request: &BackupRequest) -> Taken {
        let monitor = Recorder::new();
        let mut backup = self.hypervisor.begin(request, &monitor).unwrap();
        let mut taken = Taken {
            modes: BTreeMap::new(),
            dirty: BTreeMap::new(),
            sizes: BTreeMap::new(),
            excluded: backup.excluded().to_vec(),
            warnings: backup.warnings().to_vec(),
            checkpoint: backup.checkpoint().map(str::to_owned),
        };
        let mut content = BTreeMap::new();
        let mut tracked = Vec::new();
        for mut disk in backup.take_disks() {
            let old = match &disk.mode {
                DiskMode::Full { .. } => None,
                DiskMode::Incremental { checkpoint } => Some(self.content_at(checkpoint, &disk.target)),
            };
            let dirty = disk.source.dirty(&monitor).unwrap();
            assert_eq!(dirty.is_some(), old.is_some(), "{}", disk.target);
            assert_eq!(disk.source.size(), disk.size);
            let mut bytes = old.unwrap_or_default();
            bytes.resize(usize::try_from(disk.size).unwrap(), 0xee);
            read_into(&mut bytes, disk.source.as_mut(), dirty.as_ref());
            if disk.has_bitmap {
                tracked.push((disk.target.clone(), disk.size));
            }
            taken.modes.insert(disk.target.clone(), disk.mode.clone());
            taken.dirty.insert(disk.target.clone(), dirty);
            taken.sizes.insert(disk.target.clone(), disk.size);
            content.insert(disk.target.clone(), bytes);
        }
        backup.end_job(&monitor).unwrap();
        let full = request.bases.is_empty();
        let base = taken.checkpoint.clone().map(|name| BaseCheckpoint { name, disks: tracked });
        self.points.push(Point { full, base, content });
        let keep = self.keep();
        let warnings = backup.finish(&keep, &monitor).unwrap();
        assert_eq!(warnings, [""; 0]);
        self.nothing_left();
        self.compare(self.points.last().unwrap());
        taken
    }

    /// Returns the checkpoints of the last full and of the newest point.
    pub fn keep(&self) -> Vec<String> {
        let name = |point: &Point| Some(point.base.as_ref()?.name.clone());
        let full = self.points.iter().rev().find(|point| point.full).and_then(name);
        let mut keep: Vec<String> = full.into_iter().chain(self.points.iter().rev().find_map(name)).collect();
        keep.dedup();
        keep
    }

    fn content_at(&self, checkpoint: &str, target: &str) -> Vec<u8> {
        let at = |point: &&Point| point.base.as_ref().is_some_and(|base| base.name == checkpoint);
        self.points.iter().find(at).unwrap().content[target].clone()
    }

    #[track_caller]
    fn compare(&self, point: &Point) {
        for (target, content) in &point.content {
            let truth = self.lab.dir.join(format!("{}-{target}.truth", self.domain));
            self.lab("truth", &[target, truth.to_str().unwrap()]);
            let truth = std::fs::read(truth).unwrap();
            assert_eq!(truth.len(), content.len(), "{target}");
            let first = truth.iter().zip(content).position(|(a, b)| a != b);
            assert_eq!(first, None, "{target} of {} differs from there", self.domain);
        }
    }

    /// Checks that neither a job nor files stay behind.
    #[track_caller]
    pub fn nothing_left(&self) {
        assert!(self.lab.fails(&["virsh", "backup-dumpxml", &self.domain]), "a job runs");
        let left: Vec<_> = std::fs::read_dir(self.scratch.path()).unwrap().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let _ = self.lab.fails(&["undefine", &self.domain]);
    }
}

/// Reads what is dirty, and the zeroes between.
#[track_caller]
fn read_into(bytes: &mut [u8], source: &mut dyn DiskSource, dirty: Option<&RangeSet>) {
    let monitor = Recorder::new();
    let whole = RangeSet::whole(source.size());
    let candidates = dirty.unwrap_or(&whole);
    let data = source.data(candidates, &monitor).unwrap();
    for range in candidates.iter() {
        bytes[place(range)].fill(0);
    }
    source
        .read(&data, &monitor, &mut |range, payload| {
            if let Payload::Data(read) = payload {
                bytes[place(range)].copy_from_slice(&read);
            }
            Ok(())
        })
        .unwrap();
}

fn place(range: ByteRange) -> std::ops::Range<usize> {
    usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap()
}

/// Does to a backup what killing its process does.
pub fn kill(mut backup: DomainBackup) {
    backup.disks.clear();
    match backup.job.take() {
        Some(Job::Live(job)) => job.die(),
        Some(Job::Offline(job)) => job.die(),
        None => {}
    }
}

/// Runs a program that has to succeed.
#[track_caller]
pub fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Returns the names of an image's bitmaps, sorted.
pub fn bitmaps(image: &str) -> Vec<String> {
    let chain = super::super::bitmaps::list(Path::new(image)).unwrap();
    let mut names: Vec<String> = chain.into_iter().flatten().map(|bitmap| bitmap.name).collect();
    names.sort();
    names
}

//! A backup, prune or verify that is killed at any moment leaves nothing visible, and nothing in the way.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::support::{Vmkeep, is_long, point, text};

/// Deterministic noise, so that a failure can be repeated.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

#[test]
fn killed_fifty_times_and_still_fine() {
    let vmkeep = Vmkeep::init(None);
    let image = vmkeep.path("disk.img");
    let path = image.to_str().unwrap();
    std::fs::write(&image, noise(0, 48 << 20)).unwrap();
    let backup = ["backup", "--file", path, "--name", "web01"];
    vmkeep.backup(&backup[1..]);
    // how long a round takes that nobody kills
    std::fs::File::options().write(true).open(&image).unwrap().write_all(&noise(u64::MAX, 24 << 20)).unwrap();
    let begun = Instant::now();
    vmkeep.backup(&backup[1..]);
    let whole = begun.elapsed();
    let rounds: u64 = if is_long() { 1000 } else { 50 };
    let mut killed = 0;
    for round in 0..rounds {
        // each round has something new to store
        let mut file = std::fs::OpenOptions::new().write(true).open(&image).unwrap();
        file.write_all(&noise(1 + round, 24 << 20)).unwrap();
        let mut child = vmkeep.command(&backup).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // spread over the whole run, however busy the machine is
        std::thread::sleep(whole * u32::try_from(round % 50).unwrap() / 48);
        child.kill().unwrap();
        killed += u32::from(!child.wait().unwrap().success());
        if round % 10 == 9 {
            vmkeep.ok(&["verify", "--structure"]);
        }
        // a thousand of them leave more than the disk holds
        if round % 50 == 49 && round + 1 < rounds {
            vmkeep.ok(&["prune", "--max-unused", "0"]);
        }
    }
    println!("{killed} of {rounds} backups were killed");
    assert!(u64::from(killed) >= rounds / 2, "only {killed} runs were still at work when they were killed");
    vmkeep.ok(&["verify", "--structure"]);
    let last = vmkeep.backup(&backup[1..]);
    vmkeep.ok(&["verify", "--data"]);
    let target = vmkeep.path("restored.img");
    let argument = format!("vda={}", target.display());
    vmkeep.ok(&["restore", &point(&last), "--to", &argument]);
    assert!(std::fs::read(&target).unwrap() == std::fs::read(&image).unwrap());
    one_prune_reclaims_everything(&vmkeep);
}

/// What killed runs have left, in packs, registrations and unfinished files, is gone after one prune, although nothing
/// was forgotten.
fn one_prune_reclaims_everything(vmkeep: &Vmkeep) {
    let files = |folder: &str| std::fs::read_dir(vmkeep.repository().join(folder)).unwrap().count();
    // as a kill between the outcome and the end of its registration leaves them
    let outcome = std::fs::read_dir(vmkeep.repository().join("outcomes")).unwrap().next().unwrap().unwrap();
    std::fs::write(vmkeep.repository().join("sessions").join(outcome.file_name()), b"left").unwrap();
    std::fs::write(vmkeep.repository().join("tmp/0123456789abcdef.7"), b"unfinished").unwrap();
    std::fs::write(vmkeep.repository().join("tmp/somebody's"), b"not ours").unwrap();
    let first = vmkeep.json(&["prune", "--max-unused", "0"]);
    assert!(first["deleted_packs"].as_u64() > Some(0), "{first}");
    assert_eq!((files("sessions"), files("tmp")), (0, 1));
    let second = vmkeep.json(&["prune", "--max-unused", "0"]);
    assert_eq!(second["deleted_packs"].as_u64(), Some(0), "{second}");
    assert_eq!(second["deleted_segments"].as_u64(), Some(0), "{second}");
    vmkeep.ok(&["verify", "--data"]);
}

/// A repository that is worked on and killed at, and what its points hold.
struct Victim {
    vmkeep: Vmkeep,
    image: PathBuf,
    kept: Vec<(String, u64)>,
    round: u64,
}

impl Victim {
    fn content(round: u64) -> Vec<u8> {
        let mut content = noise(round / 2, 6 << 20);
        content[..2 << 20].copy_from_slice(&noise(1000 + round, 2 << 20));
        content
    }

    fn backup(&mut self) {
        self.round += 1;
        std::fs::write(&self.image, Self::content(self.round)).unwrap();
        let said = self.vmkeep.backup(&["--file", self.image.to_str().unwrap(), "--name", "web01"]);
        self.kept.push((point(&said), self.round));
    }

    fn forget_oldest(&mut self) {
        while self.kept.len() > 3 {
            let (oldest, _) = self.kept.remove(0);
            self.vmkeep.ok(&["forget", "-y", "--force", &oldest]);
        }
    }

    /// Starts a command and kills it; returns whether it was still at work.
    fn kill(&self, args: &[&str], after: Duration) -> bool {
        let mut child =
            self.vmkeep.command(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(after);
        child.kill().unwrap();
        !child.wait().unwrap().success()
    }

    fn check(&self) {
        self.vmkeep.ok(&["verify", "--data"]);
        let target = self.vmkeep.path("restored.img");
        for (id, round) in &self.kept {
            let _ = std::fs::remove_file(&target);
            self.vmkeep.ok(&["restore", id, "--to", &format!("vda={}", target.display())]);
            assert!(std::fs::read(&target).unwrap() == Self::content(*round), "point {id} differs");
        }
    }
}

#[test]
fn prune_and_verify_killed_fifty_times() {
    let vmkeep = Vmkeep::init(None);
    let image = vmkeep.path("disk.img");
    let mut victim = Victim { vmkeep, image, kept: Vec::new(), round: 0 };
    let rounds = if is_long() { 1000 } else { 50 };
    let mut killed = 0;
    for round in 0..rounds {
        victim.backup();
        victim.forget_oldest();
        let command: &[&str] =
            if round % 3 == 2 { &["verify", "--data"] } else { &["prune", "--max-unused", "0"] };
        // they take some 20 to 80 ms
        killed += u32::from(victim.kill(command, Duration::from_millis(1 + round % 25 * 3)));
        if round % 10 == 9 {
            victim.check();
        }
    }
    println!("{killed} of {rounds} runs were killed");
    assert!(killed >= u32::try_from(rounds).unwrap() / 3, "only {killed} were still at work");
    victim.vmkeep.ok(&["prune"]);
    victim.check();
}

#[test]
fn the_index_is_lost_spoilt_or_locked_at_any_moment() {
    let vmkeep = Vmkeep::init(None);
    let image = vmkeep.path("disk.img");
    let mut victim = Victim { vmkeep, image, kept: Vec::new(), round: 0 };
    for round in 0..12u64 {
        // while it is at work, its index is taken away, written over, or in the hands of another program
        let cache = victim.vmkeep.cache();
        let mut lock = Vec::new();
        if round % 4 == 2 {
            // mends what the round before has spoilt
            victim.vmkeep.ok(&["stats"]);
            lock = hold_locks(&cache);
            let said = text(&victim.vmkeep.command(&["-v", "stats"]).output().unwrap());
            let in_memory = said.contains("it is built in memory");
            assert!(in_memory && !lock.is_empty() || cfg!(not(feature = "rocksdb")), "{said}");
            let found = text(&victim.vmkeep.command(&["--json", "doctor"]).output().unwrap());
            let is_named = found.contains("local-index");
            assert!(is_named || cfg!(not(all(feature = "rocksdb", feature = "libvirt"))), "{found}");
        }
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while lock.is_empty() && !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    spoil(&cache, round);
                    std::thread::sleep(Duration::from_millis(7 + round));
                }
            });
            victim.backup();
            if round % 4 == 3 {
                victim.forget_oldest();
                victim.vmkeep.ok(&["prune", "--max-unused", "0"]);
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
    victim.check();
}

/// Takes the locks of indexes, as the program does that has them open; they are held until the files are dropped.
fn hold_locks(dir: &Path) -> Vec<File> {
    let mut held = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            held.extend(hold_locks(&path));
        } else if entry.file_name() == "LOCK" {
            let file = File::options().write(true).open(&path).unwrap();
            rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
            held.push(file);
        }
    }
    held
}

/// Removes the files of an index, fills them with rubbish, or cuts them.
fn spoil(dir: &Path, round: u64) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            spoil(&path, round);
            continue;
        }
        let _ = match round % 3 {
            0 => std::fs::remove_file(&path),
            1 => std::fs::write(&path, noise(round, 300)),
            _ => std::fs::OpenOptions::new().write(true).open(&path).and_then(|file| file.set_len(10)),
        };
    }
}

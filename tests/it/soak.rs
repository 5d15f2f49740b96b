//! Four backups, two prunes, restore and verify at once on one repository, for a while. Processes are stopped for longer than
//! any time-out and wake up again, and their clocks are days apart.

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, RwLock};
use std::time::{Duration, Instant};

use crate::support::{Vmkeep, is_long, point, skipped, text};

/// Heartbeat, until dead, between looks: milliseconds.
const TIMING: &str = "300,1500,50";
/// Longer than any of them.
const STOPPED: Duration = Duration::from_millis(2500);
/// By how much clocks are wrong.
const CLOCKS: [&str; 4] = ["+0", "+10d", "-10d", "+3d"];
/// Points of one domain that stay.
const KEPT: usize = 3;

#[derive(Default)]
struct Counts {
    backups: AtomicU64,
    fenced: AtomicU64,
    prunes: AtomicU64,
    refused_prunes: AtomicU64,
    restores: AtomicU64,
    verifies: AtomicU64,
    stopped: AtomicU64,
}

struct Soak {
    vmkeep: Vmkeep,
    /// By domain: points and the seeds of their content.
    kept: Vec<RwLock<Vec<(String, u64)>>>,
    counts: Counts,
    violations: Mutex<Vec<String>>,
    over: AtomicBool,
    /// The library that gives a process a wrong clock.
    faketime: Option<String>,
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

/// Domains share half of what they hold, and come back to what they held before.
fn content(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; 3 << 20];
    blake3::Hasher::new().update(&(seed % 5).to_le_bytes()).finalize_xof().fill(&mut bytes);
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes[..512 << 10]);
    bytes
}

impl Soak {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed) || !self.violations.lock().unwrap().is_empty()
    }

    fn violation(&self, what: String) {
        self.violations.lock().unwrap().push(what);
    }

    /// Starts a command whose clock is wrong by `clock`.
    fn start(&self, args: &[&str], clock: &str) -> Child {
        let mut command = self.vmkeep.command(args);
        if let Some(library) = self.faketime.as_ref().filter(|_| clock != "+0") {
            command.env("LD_PRELOAD", library).env("FAKETIME", clock);
            command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        }
        command.env("VMKEEP_TEST_TIMING", TIMING).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Runs a command, which may be stopped for a while; returns its code and what it said.
    fn run(&self, args: &[&str], random: &mut Random, stops: bool) -> (i32, String) {
        let child = self.start(args, CLOCKS[random.below(4) as usize]);
        if stops && random.below(5) == 0 {
            let id = child.id().to_string();
            std::thread::sleep(Duration::from_millis(random.below(120)));
            let _ = Command::new("kill").args(["-STOP", &id]).output();
            std::thread::sleep(STOPPED);
            let _ = Command::new("kill").args(["-CONT", &id]).output();
            self.counts.stopped.fetch_add(1, Ordering::Relaxed);
        }
        let output = child.wait_with_output().unwrap();
        (output.status.code().unwrap_or(-1), text(&output))
    }

    fn back_up(&self, domain: usize) {
        let mut random = Random(0x1234_5678 + domain as u64 * 77);
        let image = self.vmkeep.path(&format!("disk-{domain}.raw"));
        let name = format!("web{domain}");
        while !self.is_over() {
            let seed = random.below(40) + 100 * domain as u64;
            std::fs::write(&image, content(seed)).unwrap();
            let args = ["--json", "backup", "--file", image.to_str().unwrap(), "--name", &name];
            let (code, said) = self.run(&args, &mut random, true);
            match code {
                0 => {
                    let summary = said.lines().find(|line| line.contains("\"summary\"")).unwrap_or_default();
                    let id = point(&serde_json::from_str(summary).unwrap());
                    self.kept[domain].write().unwrap().push((id, seed));
                    self.counts.backups.fetch_add(1, Ordering::Relaxed);
                }
                // fenced by a prune, or a prune was about to move what it relied on
                11 => drop(self.counts.fenced.fetch_add(1, Ordering::Relaxed)),
                code => self.violation(format!("backup ended with {code}: {said}")),
            }
            let mut kept = self.kept[domain].write().unwrap();
            if kept.len() > KEPT {
                let (oldest, _) = kept.remove(0);
                let (code, said) = self.run(&["forget", "-y", "--force", &oldest], &mut random, false);
                if code != 0 && code != 11 {
                    self.violation(format!("forget ended with {code}: {said}"));
                }
            }
        }
    }

    fn prune(&self, number: u64) {
        let mut random = Random(0xabcd + number);
        while !self.is_over() {
            match self.run(&["prune", "--max-unused", "0"], &mut random, true) {
                (0, _) => drop(self.counts.prunes.fetch_add(1, Ordering::Relaxed)),
                // another prune is at work, or has ended this one while it was stopped
                (11, _) => drop(self.counts.refused_prunes.fetch_add(1, Ordering::Relaxed)),
                (code, said) => self.violation(format!("prune ended with {code}: {said}")),
            }
            std::thread::sleep(Duration::from_millis(random.below(200)));
        }
    }

    fn restore(&self, number: u64) {
        let mut random = Random(0xbeef + number);
        let target = self.vmkeep.path(&format!("restored-{number}.raw"));
        while !self.is_over() {
            // held, so that nobody forgets the point meanwhile
            let kept = self.kept[random.below(self.kept.len() as u64) as usize].read().unwrap();
            if kept.is_empty() {
                drop(kept);
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
            let (id, seed) = &kept[random.below(kept.len() as u64) as usize];
            self.check(id, *seed, &target, &mut random);
            self.counts.restores.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn check(&self, id: &str, seed: u64, target: &std::path::Path, random: &mut Random) {
        let _ = std::fs::remove_file(target);
        let (code, said) =
            self.run(&["restore", id, "--to", &format!("vda={}", target.display())], random, true);
        if code != 0 {
            self.violation(format!("restore of {id} ended with {code}: {said}"));
        } else if std::fs::read(target).unwrap() != content(seed) {
            self.violation(format!("point {id} differs"));
        }
    }

    fn verify(&self) {
        let mut random = Random(0xcafe);
        while !self.is_over() {
            let level = if random.below(2) == 0 { "--structure" } else { "--data" };
            match self.run(&["verify", level], &mut random, true) {
                (0, _) => drop(self.counts.verifies.fetch_add(1, Ordering::Relaxed)),
                (code, said) => self.violation(format!("verify {level} ended with {code}: {said}")),
            }
        }
    }
}

/// Returns the path of libfaketime, which its program knows. The program itself is no help beyond that: it leaves a
/// semaphore named after its process behind if it is killed, and fails when a later process has that number.
fn faketime() -> Option<String> {
    let said = Command::new("faketime").args(["-m", "-f", "+0", "printenv", "LD_PRELOAD"]).output().ok()?;
    let path = String::from_utf8(said.stdout).ok()?.trim().to_string();
    (said.status.success() && !path.is_empty()).then_some(path)
}

#[test]
fn everything_at_once() {
    let faketime = faketime();
    if faketime.is_none() {
        skipped("wrong clocks: there is no faketime", &["faketime"]);
    }
    let soak = Soak {
        vmkeep: Vmkeep::init(None),
        kept: (0..4).map(|_| RwLock::default()).collect(),
        counts: Counts::default(),
        violations: Mutex::default(),
        over: AtomicBool::new(false),
        faketime,
    };
    let time = if is_long() { Duration::from_secs(30 * 60) } else { Duration::from_secs(60) };
    let start = Instant::now();
    std::thread::scope(|scope| {
        for domain in 0..4 {
            let soak = &soak;
            scope.spawn(move || soak.back_up(domain));
        }
        scope.spawn(|| soak.prune(0));
        scope.spawn(|| soak.prune(1));
        scope.spawn(|| soak.restore(0));
        scope.spawn(|| soak.verify());
        while start.elapsed() < time && !soak.is_over() {
            std::thread::sleep(Duration::from_millis(100));
        }
        soak.over.store(true, Ordering::Relaxed);
    });
    let mut random = Random(1);
    let (code, said) = soak.run(&["prune", "--max-unused", "0"], &mut random, false);
    assert_eq!(code, 0, "{said}");
    let (code, said) = soak.run(&["verify"], &mut random, false);
    assert_eq!(code, 0, "{said}");
    for kept in &soak.kept {
        for (id, seed) in kept.read().unwrap().iter() {
            soak.check(id, *seed, &soak.vmkeep.path("last.raw"), &mut random);
        }
    }
    let Counts { backups, fenced, prunes, refused_prunes, restores, verifies, stopped } = &soak.counts;
    println!(
        "{backups:?} backups, {fenced:?} refused, {prunes:?} prunes, {refused_prunes:?} refused, {restores:?} restores, \
         {verifies:?} verifies, {stopped:?} stopped"
    );
    let violations = soak.violations.into_inner().unwrap();
    assert!(violations.is_empty(), "{}", violations.join("\n\n"));
    assert!(backups.load(Ordering::Relaxed) > 20, "too little was done");
    for (what, count) in [
        ("backup was refused", fenced),
        ("prune was done", prunes),
        ("second prune was refused", refused_prunes),
        ("restore was done", restores),
        ("verify was done", verifies),
        ("process was stopped", stopped),
    ] {
        assert!(count.load(Ordering::Relaxed) > 0, "no {what}");
    }
}

//! A storage that runs full at any moment: nothing that failed is called done, nothing is damaged, and forgetting and
//! pruning make room when not a byte is left.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{Vmkeep, point, skipped, text};

/// A small file system in memory, unmounted when dropped.
struct Small {
    dir: PathBuf,
}

impl Small {
    /// Returns `None`, with the reason printed, where mounting is not allowed.
    fn mount(dir: PathBuf, mib: u32) -> Option<Self> {
        fs::create_dir(&dir).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "vmkeep-test"]).arg(&dir);
        match mount.output() {
            Ok(output) if output.status.success() => Some(Self { dir }),
            Ok(output) => {
                let reason = format!("a file system cannot be mounted here: {}", text(&output).trim());
                skipped(&reason, &["mount"]);
                None
            }
            Err(error) => {
                skipped(&format!("there is no mount: {error}"), &["mount"]);
                None
            }
        }
    }

    fn filler(&self) -> PathBuf {
        self.dir.join("filler")
    }

    /// Fills all but so many bytes.
    fn leave(&self, bytes: u64) {
        let mut file = File::options().create(true).append(true).open(self.filler()).unwrap();
        let block = vec![0x5a; 4096];
        while file.write_all(&block).is_ok() {}
        let len = file.metadata().unwrap().len();
        file.set_len(len.saturating_sub(bytes)).unwrap();
    }

    fn empty(&self) {
        fs::remove_file(self.filler()).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.dir).output();
    }
}

struct World {
    vmkeep: Vmkeep,
    small: Small,
    kept: Vec<(String, Vec<u8>)>,
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

impl World {
    fn new() -> Option<Self> {
        let vmkeep = Vmkeep::init(None);
        let small = Small::mount(vmkeep.path("small"), 64)?;
        let world = Self { vmkeep, small, kept: Vec::new() };
        world.run(&["init"]).unwrap();
        Some(world)
    }

    fn repository(&self) -> PathBuf {
        self.small.dir.join("repository")
    }

    /// Returns what it said, or what went wrong.
    fn run(&self, args: &[&str]) -> Result<String, String> {
        let output = self.vmkeep.command_on(&self.repository(), args).output().unwrap();
        let said = text(&output);
        assert!(!said.contains("panicked"), "{said}");
        if output.status.success() { Ok(said) } else { Err(said) }
    }

    fn backup(&mut self, seed: u64, len: usize) -> Result<(), String> {
        self.backup_content(noise(seed, len))
    }

    fn backup_content(&mut self, content: Vec<u8>) -> Result<(), String> {
        let image = self.vmkeep.path("disk.raw");
        fs::write(&image, &content).unwrap();
        let said = self.run(&["--json", "backup", "--file", image.to_str().unwrap(), "--name", "web"])?;
        let summary = said.lines().find(|line| line.contains("\"summary\"")).unwrap();
        self.kept.push((point(&serde_json::from_str(summary).unwrap()), content));
        Ok(())
    }

    fn check(&self) {
        self.run(&["verify", "-n"]).unwrap();
        let listed = self.run(&["--json", "points"]).unwrap();
        let target = self.vmkeep.path("restored.raw");
        for (id, content) in &self.kept {
            assert!(listed.contains(id.as_str()), "point {id} is gone");
            let _ = fs::remove_file(&target);
            self.run(&["restore", id, "--to", &format!("vda={}", target.display())]).unwrap();
            assert!(fs::read(&target).unwrap() == *content, "point {id} differs");
        }
        let known = listed.matches("\"point\":").count();
        assert_eq!(known, self.kept.len(), "a backup that failed left a point");
    }

    fn forget_oldest(&mut self) {
        let (oldest, _) = self.kept.remove(0);
        self.run(&["forget", "-y", "--force", &oldest]).unwrap();
    }
}

#[test]
fn a_backup_that_meets_the_end_of_the_space() {
    let Some(mut world) = World::new() else { return };
    world.backup(1, 4 << 20).unwrap();
    // from nothing at all to more than enough: each step of a backup meets the end
    let mut failed = 0;
    for (seed, free) in (2u64..).zip([0, 4, 8, 12, 16, 24, 40, 80, 200, 1024, 4000, 4200, 4300, 4400, 9000]) {
        world.small.leave(free << 10);
        if let Err(said) = world.backup(seed, 4 << 20) {
            assert!(said.contains("No space left"), "{said}");
            failed += 1;
        }
        world.check();
        world.small.empty();
        world.run(&["prune", "--max-unused", "0"]).unwrap();
        world.check();
        while world.kept.len() > 3 {
            world.forget_oldest();
        }
    }
    assert!(failed >= 8, "only {failed} backups met the end of the space");
    world.backup(100, 4 << 20).unwrap();
    world.check();
}

#[test]
fn pruning_makes_room_when_no_byte_is_left() {
    let Some(mut world) = World::new() else { return };
    for seed in 0..4 {
        world.backup(seed, 8 << 20).unwrap();
    }
    for free in [0, 4, 64, 300] {
        world.small.leave(free << 10);
        world.forget_oldest();
        world.run(&["prune", "--max-unused", "0"]).unwrap();
        let left = rustix::fs::statvfs(&world.small.dir).unwrap();
        assert!(left.f_bavail * left.f_frsize > 6 << 20, "only {} blocks are free", left.f_bavail);
        world.check();
        world.small.empty();
        world.backup(50 + free, 8 << 20).unwrap();
        world.check();
    }
}

/// Content that compresses to an eighth: in a file system of so few bytes are more chunks than a new repository has room for
/// in its reserve.
fn thin(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = noise(seed, len);
    bytes.iter_mut().for_each(|byte| *byte &= 1);
    bytes
}

#[test]
fn pruning_writes_long_segments_when_no_byte_is_left() {
    let Some(mut world) = World::new() else { return };
    fs::remove_dir_all(world.repository()).unwrap();
    world.run(&["init", "--chunk-size", "4K"]).unwrap();
    let mut content = thin(1, 256 << 20);
    world.backup_content(content.clone()).unwrap();
    for at in (0..content.len()).step_by(1 << 20) {
        content[at] ^= 1;
    }
    world.backup_content(content).unwrap();
    let segments = fs::read_dir(world.repository().join("index")).unwrap();
    let segments: u64 = segments.map(|segment| segment.unwrap().metadata().unwrap().len()).sum();
    let reserve = fs::metadata(world.repository().join("reserve")).unwrap().len();
    assert!(segments > 1 << 20 && reserve >= segments / 4 * 5, "{reserve} beside segments of {segments}");
    world.small.leave(0);
    world.forget_oldest();
    world.run(&["prune", "--max-unused", "0"]).unwrap();
    world.small.empty();
    world.check();
}

#[test]
fn a_prune_that_meets_the_end_of_the_space() {
    let Some(mut world) = World::new() else { return };
    world.backup(0, 6 << 20).unwrap();
    for free in [0u64, 8, 20, 50, 100, 500, 1000, 2000] {
        // half of the old content stays, so that packs have to be written anew
        let mut content = noise(0, 6 << 20);
        content[..3 << 20].copy_from_slice(&noise(1000 + free, 3 << 20));
        let image = world.vmkeep.path("mixed.raw");
        fs::write(&image, &content).unwrap();
        let said =
            world.run(&["--json", "backup", "--file", image.to_str().unwrap(), "--name", "web"]).unwrap();
        let summary = said.lines().find(|line| line.contains("\"summary\"")).unwrap();
        world.kept.push((point(&serde_json::from_str(summary).unwrap()), content));
        world.forget_oldest();
        world.small.leave(free << 10);
        // with less than it needs it does what it can, or says that it could not
        if let Err(said) = world.run(&["prune", "--max-unused", "0"]) {
            assert!(said.contains("No space left"), "{said}");
        }
        world.check();
        world.small.empty();
        world.run(&["prune", "--max-unused", "0"]).unwrap();
        world.check();
    }
    assert!(Path::new(&world.repository()).join("reserve").exists(), "the reserve is back");
}

/// A verify that records, holds, second thoughts and repairs, with less than they need.
#[test]
fn what_else_meets_the_end_of_the_space() {
    let Some(mut world) = World::new() else { return };
    for seed in 0..3 {
        world.backup(seed, 4 << 20).unwrap();
    }
    let mut failed = 0;
    for free in [0u64, 4, 8, 40] {
        let (held, hidden) = (world.kept[0].0.clone(), world.kept[1].0.clone());
        world.run(&["forget", "-y", "--force", &hidden]).unwrap();
        let segment = fs::read_dir(world.repository().join("index")).unwrap().next().unwrap().unwrap().path();
        for args in [
            ["verify", "--data"].as_slice(),
            &["hold", &held],
            &["unhold", &held],
            &["undelete", &hidden],
            &["repair", "index"],
            &["repair", "points"],
        ] {
            if args[1] == "index" {
                fs::remove_file(&segment).unwrap();
            }
            world.small.leave(free << 10);
            let said = world.run(args);
            world.small.empty();
            if let Err(said) = said {
                assert!(said.contains("No space left"), "{args:?}: {said}");
                failed += 1;
                // one that had nothing left to do but to say that it was done has nothing to do now
                let again = world.run(args);
                assert!(again.is_ok() || args[0] == "undelete", "{args:?}: {again:?}");
            }
        }
        world.check();
    }
    assert!(failed >= 8, "only {failed} met the end of the space");
}

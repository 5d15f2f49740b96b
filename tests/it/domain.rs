//! What can be wrong with a domain when a backup begins or while it runs: the next backup is right, says what it did, and
//! leaves the domain as it was.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Lab, Vmkeep, number, point, run, text};

/// A lab with one domain and a repository.
struct Scene {
    lab: Lab,
    vmkeep: Vmkeep,
    disks: Vec<&'static str>,
    name: &'static str,
    truths: u32,
}

impl Scene {
    fn new(name: &'static str, disks: &[&str]) -> Self {
        let lab = Lab::start();
        let mut args = vec!["define", name];
        args.extend(disks);
        lab.cmd(&args);
        let targets = disks.iter().map(|disk| match &disk[..3] {
            "vda" => "vda",
            "vdb" => "vdb",
            _ => "vdc",
        });
        let targets = targets.collect();
        let vmkeep = Vmkeep::init(Some(&lab));
        Self { lab, vmkeep, disks: targets, name, truths: 0 }
    }

    fn write(&self, disk: &str, offset: &str, len: &str, pattern: &str) {
        self.lab.write(self.name, disk, offset, len, pattern);
    }

    /// Backs up, and fails unless the point equals what the guest reads now.
    #[track_caller]
    fn backup(&mut self, args: &[&str]) -> Value {
        self.truths += 1;
        let truth = self.vmkeep.path(&format!("truth-{}", self.truths));
        std::fs::create_dir(&truth).unwrap();
        for disk in &self.disks {
            self.lab.truth(self.name, disk, &truth.join(format!("{disk}.raw")));
        }
        let mut all = vec![self.name];
        all.extend(args);
        let summary = self.vmkeep.backup(&all);
        self.vmkeep.assert_restores(&point(&summary), &truth, "raw");
        std::fs::remove_dir_all(truth).unwrap();
        summary
    }

    /// Returns why a disk was read in full.
    #[track_caller]
    fn reason(summary: &Value, disk: &str) -> Option<String> {
        let disks = summary["disks"].as_array().unwrap_or_else(|| panic!("{summary}"));
        let found = disks.iter().find(|found| found["disk"] == disk).unwrap_or_else(|| panic!("{summary}"));
        found["full_reason"].as_str().map(str::to_owned)
    }

    /// Begins a backup that reads slowly, and returns once it is at it.
    fn slow_backup(&self) -> std::process::Child {
        self.slow_backup_with(&[])
    }

    fn slow_backup_with(&self, args: &[&str]) -> std::process::Child {
        let mut all = vec!["backup", self.name, "-l", "full", "--limit-read", "2M"];
        all.extend(args);
        let child = self.vmkeep.command(&all).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let start = Instant::now();
        while !self.has_job() {
            assert!(start.elapsed() < Duration::from_secs(20), "the backup does not begin");
            std::thread::sleep(Duration::from_millis(50));
        }
        // past the start of the job, into the reading
        std::thread::sleep(Duration::from_millis(500));
        child
    }

    fn has_job(&self) -> bool {
        self.lab.try_cmd(&["virsh", "backup-dumpxml", self.name]).status.success()
    }

    fn scratch_files(&self) -> Vec<PathBuf> {
        let images = self.lab.dir().join("img");
        let mut found = Vec::new();
        for directory in [images, PathBuf::from("/var/tmp"), std::env::temp_dir()] {
            for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.to_string_lossy().contains(".scratch") {
                    found.push(path);
                }
            }
        }
        found
    }
}

#[test]
fn a_killed_run_leaves_nothing_in_the_way() {
    let mut scene = Scene::new("killed", &["vda:qcow2:64M"]);
    scene.write("vda", "0", "32M", "0x11");
    let full = scene.backup(&[]);
    let before = scene.lab.checkpoints("killed");
    scene.write("vda", "1M", "64k", "0x12");
    let mut child = scene.slow_backup();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(scene.has_job(), "a job outlives its client");
    assert_eq!(scene.lab.checkpoints("killed").len(), before.len() + 1, "so does its checkpoint");
    scene.write("vda", "2M", "64k", "0x13");
    let inc = scene.backup(&["-l", "inc"]);
    assert_eq!(inc["base"], full["point"]);
    assert_eq!(Scene::reason(&inc, "vda"), None);
    assert_eq!(number(&inc, "changed_bytes"), 128 << 10, "nothing was lost with the killed run: {inc}");
    assert!(!scene.has_job());
    assert_eq!(scene.lab.checkpoints("killed").len(), 2, "{:?}", scene.lab.checkpoints("killed"));
    scene.vmkeep.ok(&["verify", "--data"]);
}

#[test]
fn a_cancelled_run_leaves_the_domain_as_it_was() {
    let mut scene = Scene::new("cancelled", &["vda:qcow2:64M"]);
    scene.write("vda", "0", "32M", "0x11");
    scene.backup(&[]);
    let before = scene.lab.checkpoints("cancelled");
    let child = scene.slow_backup();
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output));
    assert!(!scene.has_job());
    assert_eq!(scene.lab.checkpoints("cancelled"), before);
    assert_eq!(scene.scratch_files(), Vec::<PathBuf>::new());
    scene.vmkeep.ok(&["verify", "--structure"]);
}

/// A file system of 72 MiB, as long as this lives.
struct SmallSpace(PathBuf);

impl SmallSpace {
    fn mount(dir: PathBuf) -> Self {
        std::fs::create_dir(&dir).unwrap();
        run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=72m,mode=1777", "vmkeep-test"]).arg(&dir));
        Self(dir)
    }
}

impl Drop for SmallSpace {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn scratch_space_is_checked_first_and_its_end_harms_no_point() {
    let mut scene = Scene::new("scratch", &["vda:qcow2:64M"]);
    scene.write("vda", "0", "64M", "0x11");
    scene.backup(&[]);
    let before = scene.lab.checkpoints("scratch");
    let space = SmallSpace::mount(scene.lab.dir().join("small"));
    let dir = space.0.to_str().unwrap().to_owned();
    let somebody = space.0.join("somebody's");

    // there is room at first; then somebody else takes it, and the guest overwrites more than is left
    let child = scene.slow_backup_with(&["--scratch-dir", &dir]);
    let left = [0x55; 1 << 20];
    let mut file = std::fs::File::create(&somebody).unwrap();
    for _ in 0..60 {
        std::io::Write::write_all(&mut file, &left).unwrap();
    }
    let written = scene.lab.try_cmd(&["write", "scratch", "vda", "16M", "40M", "0x12"]);
    assert!(text(&written).contains("No space left"), "{}", text(&written));
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(130));
    assert_eq!(scene.lab.checkpoints("scratch"), before);

    // too little from the beginning
    let said = scene.vmkeep.fails(&["backup", "scratch", "--scratch-dir", &dir], 1);
    assert!(said.contains("scratch directory") && said.contains("--scratch-dir"), "{said}");
    assert_eq!(scene.lab.checkpoints("scratch"), before);

    scene.write("vda", "16M", "1M", "0x13");
    let inc = scene.backup(&["-l", "inc"]);
    assert_eq!(Scene::reason(&inc, "vda"), None, "{inc}");
}

#[test]
fn after_a_crash_of_qemu_the_disk_is_read_in_full() {
    let mut scene = Scene::new("crashed", &["vda:qcow2:64M", "vdb:qcow2:64M"]);
    scene.write("vda", "0", "8M", "0x11");
    scene.backup(&[]);
    scene.write("vda", "1M", "64k", "0x12");
    scene.lab.cmd(&["crash", "crashed"]);
    scene.lab.cmd(&["on", "crashed"]);
    let inc = scene.backup(&["-l", "inc"]);
    assert!(Scene::reason(&inc, "vda").is_some(), "{inc}");
    assert_eq!(number(&inc, "changed_bytes"), 64 << 10, "{inc}");
    scene.vmkeep.fails(&["backup", "crashed", "-l", "inc", "--strict", "-x", "vda,vdb"], 1);
    let next = scene.backup(&["-l", "inc"]);
    assert_eq!(Scene::reason(&next, "vda"), None, "the new checkpoint serves: {next}");
}

#[test]
fn bitmap_or_metadata_gone() {
    let mut scene = Scene::new("gone", &["vda:qcow2:64M"]);
    scene.write("vda", "0", "8M", "0x11");
    let full = scene.backup(&[]);
    let checkpoint = full["checkpoint"].as_str().unwrap().to_owned();
    // the metadata stays, the bitmap goes
    let image = scene.lab.image("gone", "vda");
    scene.lab.cmd(&["off", "gone"]);
    run(Command::new("qemu-img").args(["bitmap", "--remove", &image, &checkpoint]));
    scene.lab.cmd(&["on", "gone"]);
    scene.write("vda", "1M", "64k", "0x12");
    let inc = scene.backup(&["-l", "inc"]);
    assert!(Scene::reason(&inc, "vda").is_some(), "{inc}");
    assert!(!scene.lab.checkpoints("gone").contains(&checkpoint), "the broken one is cleared away");
    // the bitmap stays, the metadata goes
    let checkpoint = inc["checkpoint"].as_str().unwrap().to_owned();
    scene.lab.virsh(&["checkpoint-delete", "gone", &checkpoint, "--metadata"]);
    scene.write("vda", "2M", "64k", "0x13");
    // the bitmap goes on recording, and libvirt is told of it again
    let inc = scene.backup(&["-l", "inc"]);
    assert_eq!(Scene::reason(&inc, "vda"), None, "{inc}");
    assert_eq!(number(&inc, "changed_bytes"), 64 << 10, "{inc}");
}

#[test]
fn a_disk_that_came_later_and_one_that_grew() {
    let mut scene = Scene::new("grown", &["vda:qcow2:32M"]);
    scene.write("vda", "0", "8M", "0x11");
    scene.backup(&[]);
    let extra = scene.lab.dir().join("img/extra.qcow2");
    let extra = extra.to_str().unwrap();
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", extra, "16M"]));
    let xml = scene.lab.dir().join("extra.xml");
    std::fs::write(
        &xml,
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{extra}'/>\
             <target dev='vdb' bus='virtio'/><alias name='ua-vdb'/></disk>"
        ),
    )
    .unwrap();
    scene.lab.virsh(&["attach-device", "grown", xml.to_str().unwrap(), "--live", "--config"]);
    scene.lab.virsh(&["blockresize", "grown", "vda", "48M"]);
    scene.disks.push("vdb");
    scene.write("vda", "40M", "64k", "0x12");
    scene.write("vdb", "1M", "64k", "0x13");
    let inc = scene.backup(&["-l", "inc"]);
    assert_eq!(Scene::reason(&inc, "vda"), None, "{inc}");
    assert!(Scene::reason(&inc, "vdb").is_some(), "{inc}");
    assert_eq!(number(&inc, "changed_bytes"), 128 << 10, "{inc}");
    let next = scene.backup(&["-l", "diff"]);
    assert_eq!(Scene::reason(&next, "vdb"), None, "its checkpoint is there now: {next}");
}

#[test]
fn a_domain_that_is_off_is_kept_at_the_same_levels() {
    let mut scene = Scene::new("off", &["vda:qcow2:64M", "vdb:raw:16M"]);
    scene.write("vda", "0", "8M", "0x11");
    scene.write("vdb", "0", "1M", "0x14");
    scene.backup(&[]);
    scene.write("vda", "1M", "64k", "0x12");
    scene.lab.cmd(&["off", "off"]);
    let inc = scene.backup(&["-l", "inc"]);
    assert_eq!(Scene::reason(&inc, "vda"), None, "{inc}");
    assert_eq!(number(&inc, "changed_bytes"), 64 << 10);
    scene.lab.cmd(&["on", "off"]);
    scene.write("vda", "2M", "64k", "0x13");
    let online = scene.backup(&["-l", "inc"]);
    assert_eq!(Scene::reason(&online, "vda"), None, "the checkpoint made offline serves: {online}");
    assert_eq!(number(&online, "changed_bytes"), 64 << 10);
}

#[test]
fn another_tools_job_is_left_alone() {
    let mut scene = Scene::new("other", &["vda:qcow2:32M"]);
    scene.write("vda", "0", "1M", "0x11");
    scene.lab.cmd(&["begin", "other", "", "theirs"]);
    let start = Instant::now();
    let said = scene.vmkeep.fails(&["backup", "other"], 11);
    assert!(start.elapsed() < Duration::from_secs(10), "it waited");
    assert!(said.contains("other"), "{said}");
    assert!(scene.has_job());
    scene.lab.cmd(&["end", "other"]);
    scene.backup(&[]);
    assert!(scene.lab.checkpoints("other").contains(&"theirs".to_owned()));
}

#[test]
fn a_domain_that_stops_during_the_job_fails_the_backup_only() {
    let mut scene = Scene::new("stopped", &["vda:qcow2:64M"]);
    scene.write("vda", "0", "32M", "0x11");
    scene.backup(&[]);
    let child = scene.slow_backup();
    scene.lab.cmd(&["off", "stopped"]);
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success());
    let said = text(&output);
    assert!(said.contains("stopped"), "{said}");
    scene.lab.cmd(&["on", "stopped"]);
    scene.write("vda", "1M", "64k", "0x12");
    let inc = scene.backup(&["-l", "inc"]);
    assert_eq!(Scene::reason(&inc, "vda"), None, "{inc}");
    assert_eq!(scene.lab.checkpoints("stopped").len(), 2);
}

#[test]
fn two_repositories_keep_one_domain() {
    let mut scene = Scene::new("shared", &["vda:qcow2:64M"]);
    scene.write("vda", "0", "8M", "0x11");
    scene.backup(&[]);
    let other = Vmkeep::init(Some(&scene.lab));
    let theirs = other.backup(&["shared"]);
    assert_eq!(theirs["level"], "full");
    for day in 1..5u32 {
        scene.write("vda", &format!("{day}M"), "64k", &format!("{day}"));
        let inc = scene.backup(&["-l", "inc"]);
        assert_eq!(Scene::reason(&inc, "vda"), None);
        assert_eq!(number(&inc, "changed_bytes"), 64 << 10);
    }
    let inc = other.backup(&["shared", "-l", "inc"]);
    assert_eq!(number(&inc, "changed_bytes"), 4 * (64 << 10), "{inc}");
    assert_eq!(scene.lab.checkpoints("shared").len(), 4, "two of each");
}

#[test]
fn disks_are_chosen_and_left_out() {
    let scene = Scene::new("chosen", &["vda:qcow2:16M", "vdb:qcow2:16M", "hdc:cdrom:1M"]);
    let targets = |summary: &Value| -> Vec<String> {
        let disks = summary["disks"].as_array().unwrap();
        disks.iter().map(|disk| disk["disk"].as_str().unwrap().to_owned()).collect()
    };
    let all = scene.vmkeep.backup(&["chosen"]);
    assert_eq!(targets(&all), ["vda", "vdb"]);
    assert!(all["excluded"].to_string().contains("hdc"), "{all}");
    assert_eq!(targets(&scene.vmkeep.backup(&["chosen", "-i", "vda"])), ["vda"]);
    assert_eq!(targets(&scene.vmkeep.backup(&["chosen", "-x", "vda"])), ["vdb"]);
    let said = scene.vmkeep.fails(&["backup", "chosen", "-x", "vdq"], 2);
    assert!(said.contains("vdq"), "{said}");
    let said = scene.vmkeep.fails(&["backup", "nosuch"], 1);
    assert!(said.contains("nosuch"), "{said}");
}

#[test]
fn a_point_without_dirty_data_is_a_point() {
    let mut scene = Scene::new("quiet", &["vda:qcow2:32M"]);
    scene.write("vda", "0", "1M", "0x11");
    let full = scene.backup(&["-l", "full"]);
    let inc = scene.backup(&["-l", "inc"]);
    let diff = scene.backup(&["-l", "diff"]);
    let latest = scene.backup(&["-l", "latest"]);
    let copy = scene.backup(&["-l", "copy"]);
    for summary in [&inc, &diff, &latest] {
        assert_eq!(number(summary, "dirty_bytes"), 0, "{summary}");
        assert_eq!(number(summary, "new_bytes"), 0);
    }
    assert_eq!(number(&copy, "new_bytes"), 0);
    let ids: std::collections::BTreeSet<String> = [&full, &inc, &diff, &latest, &copy].map(point).into();
    assert_eq!(ids.len(), 5);
    assert_eq!((&latest["checkpoint"], &copy["checkpoint"]), (&Value::Null, &Value::Null));
    // one checkpoint was never the name of two points
    let checkpoint = diff["checkpoint"].as_str().unwrap();
    let shown = scene.vmkeep.ok(&["show", &format!("quiet@{checkpoint}")]);
    assert!(shown.contains(&point(&diff)[..8]), "{shown}");
    // the first digits of two ids
    let said = scene.vmkeep.fails(&["show", ""], 2);
    assert!(!said.is_empty());
}

#[test]
fn firmware_variables_and_xml_come_back() {
    let lab = Lab::start();
    lab.cmd(&["define", "--uefi", "uefi", "vda:qcow2:16M"]);
    let vmkeep = Vmkeep::init(Some(&lab));
    for power in ["running", "off"] {
        if power == "off" {
            lab.cmd(&["off", "uefi"]);
        }
        let summary = vmkeep.backup(&["uefi"]);
        let target = vmkeep.path(power);
        vmkeep.ok(&["restore", &point(&summary), "-o", target.to_str().unwrap()]);
        let nvram = std::fs::read(target.join("nvram")).unwrap();
        assert!(nvram.len() > 64 << 10, "{}", nvram.len());
        assert_eq!(nvram, std::fs::read(lab.dir().join("img/uefi.nvram")).unwrap(), "{power}");
        let xml = std::fs::read_to_string(target.join("domain.xml")).unwrap();
        assert_eq!(xml.trim(), lab.virsh(&["dumpxml", "uefi", "--inactive", "--security-info"]).trim());
        assert_eq!(target.join("domain-live.xml").exists(), power == "running");
    }
}

#[test]
fn a_point_is_compared_with_the_running_domain() {
    let mut scene = Scene::new("against", &["vda:qcow2:8M", "vdb:raw:4M"]);
    scene.write("vda", "1M", "256k", "0x31");
    scene.write("vdb", "0", "64k", "0x32");
    let first = point(&scene.backup(&[]));
    let same = |id: &str| scene.vmkeep.json_with_code(&["verify", id, "--against", "against"]);
    let (said, code) = same(&first);
    assert_eq!(code, 0, "{said}");
    scene.write("vda", "2M", "4k", "0x33");
    let (said, code) = same(&first);
    let vda = &said["disks"][0];
    // the bitmap says that it was written
    assert_eq!((code, &vda["written_bytes"], &vda["untracked"]), (0, &4096.into(), &false.into()), "{said}");
    scene.write("vdb", "1M", "8k", "0x34");
    let (said, code) = same(&first);
    assert_eq!((code, &said["disks"][1]["differing"]), (4, &serde_json::json!([[1 << 20, 8192]])), "{said}");
    assert_eq!(said["disks"][1]["untracked"], true);
    // nothing is left of the comparison
    assert_eq!(scene.lab.checkpoints("against").len(), 1);
    let next = scene.backup(&[]);
    assert_eq!(Scene::reason(&next, "vda"), None);

    // a disk that the point does not have, and points of which the domain has not one disk, or not all
    let not_there = |said: &Value| -> Vec<(String, Value)> {
        crate::cli::assert_valid("against", said);
        let disks = said["disks"].as_array().unwrap();
        disks
            .iter()
            .map(|disk| (disk["disk"].as_str().unwrap().to_owned(), disk["not_there"].clone()))
            .collect()
    };
    let (vda, vdb) = ("vda".to_owned(), "vdb".to_owned());
    let same = |id: &str| scene.vmkeep.json_with_code(&["verify", id, "--against", "against"]);
    let without = point(&scene.vmkeep.backup(&["against", "-x", "vdb"]));
    let (said, code) = same(&without);
    assert_eq!(
        (code, not_there(&said)),
        (4, vec![(vda.clone(), Value::Null), (vdb.clone(), "point".into())])
    );
    let (_, code) = same(&format!("{without}:vda"));
    assert_eq!(code, 0, "only this disk was asked for");
    let image = scene.vmkeep.path("other.raw");
    std::fs::write(&image, [1; 8192]).unwrap();
    let args = ["--file", image.to_str().unwrap(), "--name", "other", "--disk", "vdz"];
    let other = point(&scene.vmkeep.backup(&args));
    let (said, code) = same(&other);
    let all = vec![(vda, "point".into()), (vdb, "point".into()), ("vdz".to_owned(), "domain".into())];
    assert_eq!((code, not_there(&said)), (4, all));
    assert!(scene.vmkeep.fails(&["verify", &other, "--against", "against"], 4).contains("vdz: not there"));
}

//! `doctor` and `checkpoints` on real domains: each mismatch is made, named, and mended; then the next backup is the one
//! that it should be.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cli::assert_valid;
use crate::guest::{assert_thawed, guest};
use crate::support::{Lab, Vmkeep, number, point, run, text};

/// A lab with one domain, a repository, and a scratch directory of its own.
struct Ward {
    lab: Lab,
    vmkeep: Vmkeep,
    name: &'static str,
    disks: Vec<String>,
    scratch: PathBuf,
}

impl Ward {
    fn new(name: &'static str, define: &[&str]) -> Self {
        let lab = Lab::start();
        let mut args = vec!["define"];
        args.extend(define.iter().filter(|word| word.starts_with("--")));
        args.push(name);
        args.extend(define.iter().filter(|word| !word.starts_with("--")));
        lab.cmd(&args);
        let disks = define.iter().filter(|word| !word.starts_with("--") && !word.contains(":cdrom:"));
        let disks = disks.map(|disk| disk[..3].to_owned()).collect();
        let vmkeep = Vmkeep::init(Some(&lab));
        let scratch = lab.dir().join("s");
        std::fs::create_dir(&scratch).unwrap();
        // the daemon may be another user
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(&scratch, open).unwrap();
        Self { lab, vmkeep, name, disks, scratch }
    }

    fn write(&self, disk: &str, offset: &str, pattern: &str) {
        self.lab.write(self.name, disk, offset, "64k", pattern);
    }

    /// Backs up, and fails unless the point equals what the guest reads now.
    #[track_caller]
    fn backup(&self, args: &[&str]) -> Value {
        let truth = self.vmkeep.path("truth");
        std::fs::create_dir(&truth).unwrap();
        for disk in &self.disks {
            self.lab.truth(self.name, disk, &truth.join(format!("{disk}.raw")));
        }
        let mut all = vec![self.name, "--scratch-dir", self.scratch.to_str().unwrap()];
        all.extend(args);
        let summary = self.vmkeep.backup(&all);
        self.vmkeep.assert_restores(&point(&summary), &truth, "raw");
        std::fs::remove_dir_all(truth).unwrap();
        summary
    }

    /// Returns the summary of a doctor of this domain.
    #[track_caller]
    fn doctor(&self, args: &[&str], code: i32) -> Value {
        let mut all = vec![self.name];
        all.extend(args);
        self.doctor_of(&all, code)
    }

    #[track_caller]
    fn doctor_of(&self, args: &[&str], code: i32) -> Value {
        let scratch = self.scratch.to_str().unwrap();
        let mut all = vec!["--json", "doctor", "--scratch-dir", scratch];
        all.extend(args);
        let output = self.vmkeep.command(&all).env("TMPDIR", scratch).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {}", text(&output));
        let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_valid("doctor", &summary);
        summary
    }

    /// Has the doctor name one problem that contains all of `words`, then mend it, and find nothing more.
    #[track_caller]
    fn named_and_mended(&self, kind: &str, words: &[&str]) {
        let before = (self.lab.checkpoints(self.name), self.bitmaps());
        let found = self.doctor(&[], 3);
        let finding = finding(&found, kind);
        assert_eq!(finding["severity"], "problem", "{finding}");
        let problem = finding["problem"].as_str().unwrap();
        assert!(words.iter().all(|word| problem.contains(word)), "{problem}");
        let planned = self.doctor(&["--fix", "-n"], 3);
        assert_eq!(planned["findings"], found["findings"], "a dry run only looks");
        assert_eq!((self.lab.checkpoints(self.name), self.bitmaps()), before, "nothing was changed");
        let mended = self.doctor(&["--fix"], 0);
        let finding = self::finding(&mended, kind);
        assert!(finding["mended"] == true && finding["done"].is_string(), "{finding}");
        let after = self.doctor(&["--fix"], 0);
        assert_eq!((&after["mended"], &after["problems"]), (&Value::from(0), &Value::from(0)), "{after:#}");
    }

    fn is_running(&self) -> bool {
        self.lab.virsh(&["domstate", self.name]).trim() == "running"
    }

    /// Returns the names of all bitmaps by the account of QEMU, or of the images.
    #[track_caller]
    fn bitmaps(&self) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        if self.is_running() {
            let listed = self.lab.cmd(&["bitmaps", self.name]);
            names.extend(listed.lines().map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" ")));
        } else {
            for disk in &self.disks {
                let image = self.lab.image(self.name, disk);
                let info = run(Command::new("qemu-img").args(["info", "--output=json", &image]));
                let info: Value = serde_json::from_str(&info).unwrap();
                let bitmaps = &info["format-specific"]["data"]["bitmaps"];
                for bitmap in bitmaps.as_array().into_iter().flatten() {
                    names.push(format!("{image} {}", bitmap["name"].as_str().unwrap()));
                }
            }
        }
        names.sort();
        names.dedup();
        names
    }

    #[track_caller]
    fn off(&self) {
        self.lab.cmd(&["off", self.name]);
    }

    #[track_caller]
    fn on(&self) {
        self.lab.cmd(&["on", self.name]);
    }

    /// Kills a backup in the middle of its reading.
    fn killed_backup(&self) {
        let scratch = self.scratch.to_str().unwrap();
        let args = ["backup", self.name, "-l", "full", "--limit-read", "256K", "--scratch-dir", scratch];
        let mut child =
            self.vmkeep.command(&args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let start = Instant::now();
        while !self.has_job() {
            assert!(start.elapsed() < Duration::from_secs(20), "the backup does not begin");
            std::thread::sleep(Duration::from_millis(50));
        }
        std::thread::sleep(Duration::from_millis(300));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn has_job(&self) -> bool {
        self.lab.try_cmd(&["virsh", "backup-dumpxml", self.name]).status.success()
    }

    fn scratch_entries(&self) -> usize {
        std::fs::read_dir(&self.scratch).unwrap().count()
    }

    #[track_caller]
    fn checkpoints(&self, args: &[&str]) -> Value {
        let mut all = vec!["checkpoints", self.name];
        all.extend(args);
        let summary = self.vmkeep.json(&all);
        assert_valid("checkpoints", &summary);
        summary
    }
}

#[track_caller]
fn finding<'a>(summary: &'a Value, kind: &str) -> &'a Value {
    let findings = summary["findings"].as_array().unwrap();
    findings.iter().find(|found| found["kind"] == kind).unwrap_or_else(|| panic!("no {kind} in {summary:#}"))
}

fn has(summary: &Value, kind: &str) -> bool {
    summary["findings"].as_array().unwrap().iter().any(|found| found["kind"] == kind)
}

#[track_caller]
fn checkpoint_of(summary: &Value) -> String {
    summary["checkpoint"].as_str().unwrap_or_else(|| panic!("no checkpoint in {summary}")).to_owned()
}

/// Returns what `checkpoints` says of one: its standing and the states of its bitmaps.
#[track_caller]
fn described(list: &Value, name: &str) -> String {
    let all = list["checkpoints"].as_array().unwrap();
    let found = all.iter().find(|found| found["checkpoint"] == name).unwrap_or_else(|| panic!("{list:#}"));
    let mut words = vec![found["standing"].as_str().unwrap().to_owned()];
    for disk in found["disks"].as_array().unwrap() {
        words.push(format!("{} {}", disk["disk"].as_str().unwrap(), disk["state"].as_str().unwrap()));
    }
    words.join(", ")
}

#[test]
fn a_healthy_domain_has_nothing_wrong() {
    let ward =
        Ward::new("sound", &["vda:qcow2:8M", "vdb:raw:4M", "vdc:qcow2:4M:compat=0.10", "hdc:cdrom:1M"]);
    let before = ward.doctor(&[], 0);
    assert_eq!(finding(&before, "no-agent")["severity"], "note");
    assert!(!has(&before, "checkpoint-gone"), "it was never backed up: {before:#}");
    // libvirt notes who uses QEMU's monitor
    let tainted = || ward.lab.virsh(&["dominfo", "sound"]).contains("tainted");
    ward.checkpoints(&[]);
    assert!(!tainted(), "looking leaves no trace");
    ward.checkpoints(&["--ask-qemu"]);
    assert!(tainted(), "and asking QEMU does");
    let full = ward.backup(&[]);
    ward.write("vda", "1M", "0x11");
    for power in ["running", "off"] {
        if power == "off" {
            ward.off();
        }
        let summary = ward.doctor(&[], 0);
        let kinds: Vec<&str> = summary["findings"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|f| !f["disks"].as_array().unwrap().is_empty())
            .map(|f| f["kind"].as_str().unwrap())
            .collect();
        assert_eq!(kinds, ["no-bitmaps", "old-qcow2"], "{power}: {summary:#}");
        let problem = finding(&summary, "no-bitmaps")["problem"].as_str().unwrap();
        assert!(problem.contains("checkpoint for disk vdb unsupported for storage type raw"), "{problem}");
        assert!(finding(&summary, "old-qcow2")["advice"].to_string().contains("qemu-img amend"));
        let list = ward.checkpoints(&[]);
        assert_eq!(described(&list, &checkpoint_of(&full)), "newest-and-last-full, vda sound");
    }
    let said = ward.vmkeep.fails(&["doctor", "nobody"], 1);
    assert!(said.contains("domain nobody does not exist"), "{said}");
}

#[test]
fn a_bitmap_that_is_gone() {
    let ward = Ward::new("gone", &["vda:qcow2:8M", "vdb:qcow2:8M"]);
    ward.write("vda", "1M", "0x11");
    let checkpoint = checkpoint_of(&ward.backup(&[]));
    ward.off();
    let remove = |disk| {
        run(Command::new("qemu-img").args(["bitmap", "--remove", &ward.lab.image("gone", disk), &checkpoint]))
    };
    remove("vda");
    let words = [
        format!("missing or broken bitmap '{checkpoint}' for disk 'vda'"),
        "not found in backing chain".into(),
        "checkpoint inconsistent".into(),
    ];
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    // the other disk is not made to suffer, whether the domain is off or not
    assert_eq!(
        described(&ward.checkpoints(&[]), &checkpoint),
        "newest-and-last-full, vda missing, vdb sound"
    );
    ward.on();
    assert_eq!(
        described(&ward.checkpoints(&[]), &checkpoint),
        "newest-and-last-full, vda missing, vdb sound"
    );
    ward.named_and_mended("bitmap-missing", &words);
    assert_eq!(ward.lab.checkpoints("gone"), [checkpoint.as_str()]);
    ward.write("vdb", "1M", "0x12");
    let inc = ward.backup(&["-l", "inc"]);
    let disks = inc["disks"].as_array().unwrap();
    assert!(disks[0]["full_reason"].is_string() && disks[1]["full_reason"].is_null(), "{inc}");
    assert_eq!(number(&inc, "changed_bytes"), 64 << 10, "{inc}");

    // an image that is away is not one without bitmaps
    ward.off();
    let image = ward.lab.image("gone", "vdb");
    std::fs::rename(&image, format!("{image}.away")).unwrap();
    let before = ward.lab.checkpoints("gone");
    let away = ward.doctor(&["--fix"], 3);
    assert!(has(&away, "unreadable-disk") && away["mended"] == 0, "{away:#}");
    assert_eq!(ward.lab.checkpoints("gone"), before);
    std::fs::rename(format!("{image}.away"), image).unwrap();
    assert_eq!(ward.doctor(&[], 0)["problems"], 0);
    ward.on();

    // off, and both are gone
    let checkpoint = checkpoint_of(&inc);
    ward.off();
    run(Command::new("qemu-img").args(["bitmap", "--remove", &ward.lab.image("gone", "vda"), &checkpoint]));
    run(Command::new("qemu-img").args(["bitmap", "--remove", &ward.lab.image("gone", "vdb"), &checkpoint]));
    ward.named_and_mended("bitmap-missing", &["missing or broken bitmap"]);
    assert!(!ward.lab.checkpoints("gone").contains(&checkpoint));
    ward.on();
    let full = ward.backup(&["-l", "inc"]);
    assert!(full["disks"][0]["full_reason"].is_string(), "{full}");
    let inc = ward.backup(&["-l", "inc"]);
    assert!(inc["disks"][0]["full_reason"].is_null() && inc["disks"][1]["full_reason"].is_null(), "{inc}");
}

#[test]
fn a_disk_is_taken_out_of_each_checkpoint_whose_bitmap_it_lost() {
    let ward = Ward::new("both", &["vda:qcow2:8M", "vdb:qcow2:8M"]);
    let full = checkpoint_of(&ward.backup(&[]));
    ward.write("vdb", "1M", "0x11");
    let newest = checkpoint_of(&ward.backup(&["-l", "inc"]));
    ward.off();
    let image = ward.lab.image("both", "vda");
    for name in [&full, &newest] {
        run(Command::new("qemu-img").args(["bitmap", "--remove", &image, name]));
    }
    ward.on();
    ward.named_and_mended("bitmap-missing", &["for disk 'vda'"]);
    let list = ward.checkpoints(&[]);
    assert_eq!(described(&list, &full), "last-full, vdb sound");
    assert_eq!(described(&list, &newest), "newest, vdb sound");
    ward.write("vdb", "2M", "0x12");
    let reread = ward.backup(&["-l", "diff", "--reread"]);
    let disks = reread["disks"].as_array().unwrap();
    assert!(disks[0]["full_reason"].is_string() && disks[1]["full_reason"].is_null(), "{reread}");
    assert_eq!(number(&reread, "since_base_bytes"), 128 << 10, "{reread}");
    let inc = ward.backup(&["-l", "inc"]);
    assert!(inc["disks"][0]["full_reason"].is_null() && number(&inc, "dirty_bytes") == 0, "{inc}");
}

#[test]
fn what_a_killed_run_leaves() {
    let ward = Ward::new("killed", &["vda:qcow2:64M"]);
    ward.lab.write("killed", "vda", "0", "32M", "0x11");
    let full = ward.backup(&[]);
    let kept = ward.lab.checkpoints("killed");
    ward.killed_backup();
    let found = ward.doctor(&[], 3);
    assert!(has(&found, "leftover-checkpoint"), "{found:#}");
    assert_eq!(ward.scratch_entries(), 1);
    ward.named_and_mended("job-of-killed-run", &["was killed still runs", "NBD socket"]);
    assert!(!ward.has_job());
    assert_eq!((ward.lab.checkpoints("killed"), ward.scratch_entries()), (kept.clone(), 0));
    ward.write("vda", "1M", "0x12");
    let inc = ward.backup(&["-l", "inc"]);
    assert_eq!((&inc["base"], number(&inc, "changed_bytes")), (&full["point"], 64 << 10), "{inc}");

    // the domain stopped meanwhile: the job is gone, its checkpoint and the socket stay
    let kept = ward.lab.checkpoints("killed");
    ward.killed_backup();
    ward.off();
    assert_eq!((ward.lab.checkpoints("killed").len(), ward.scratch_entries()), (kept.len() + 1, 1));
    ward.named_and_mended("leftover-checkpoint", &["no point names it"]);
    assert_eq!((ward.lab.checkpoints("killed"), ward.scratch_entries()), (kept, 0));
    let inc = ward.backup(&["-l", "inc"]);
    assert_eq!((&inc["disks"][0]["full_reason"], number(&inc, "changed_bytes")), (&Value::Null, 0), "{inc}");
}

#[test]
fn bitmaps_after_qemu_was_killed() {
    let ward = Ward::new("crashed", &["vda:qcow2:8M", "vdb:qcow2:8M"]);
    ward.write("vda", "1M", "0x11");
    let theirs = checkpoint_of(&Vmkeep::init(Some(&ward.lab)).backup(&["crashed"]));
    let checkpoint = checkpoint_of(&ward.backup(&[]));
    ward.lab.virsh(&[
        "checkpoint-create-as",
        "crashed",
        "foreign",
        "--diskspec",
        "vda,checkpoint=bitmap",
        "--diskspec",
        "vdb,checkpoint=no",
    ]);
    // bitmaps reach the image when the domain stops
    ward.off();
    ward.on();
    ward.lab.cmd(&["crash", "crashed"]);
    for power in ["off", "running"] {
        if power == "running" {
            ward.on();
        }
        let list = ward.checkpoints(&[]);
        assert_eq!(described(&list, &checkpoint), "newest-and-last-full, vda inconsistent, vdb inconsistent");
        assert_eq!(described(&list, &theirs), "other-repository, vda inconsistent, vdb inconsistent");
        assert_eq!(described(&list, "foreign"), "foreign, vda inconsistent");
    }
    ward.write("vda", "2M", "0x12");
    let words = format!("Bitmap '{checkpoint}' is inconsistent and cannot be used");
    ward.named_and_mended(
        "bitmap-inconsistent",
        &[&words, &format!("missing or broken bitmap '{checkpoint}' for disk 'vda'")],
    );
    assert_eq!(ward.lab.checkpoints("crashed").len(), 2, "others' stay, broken as they are");
    assert!(ward.bitmaps().iter().all(|line| !line.contains(&checkpoint)), "{:?}", ward.bitmaps());
    let summary = ward.doctor(&[], 0);
    assert_eq!(finding(&summary, "checkpoint-unknown-to-libvirt")["severity"], "note");
    assert!(has(&summary, "foreign-checkpoint-broken"));
    assert!(
        has(&ward.doctor(&["--ask-qemu"], 0), "checkpoint-gone"),
        "QEMU knows that its bitmaps are gone, too"
    );
    let full = ward.backup(&["-l", "inc"]);
    assert!(
        full["disks"][0]["full_reason"].is_string() && number(&full, "changed_bytes") == 64 << 10,
        "{full}"
    );
    ward.write("vda", "3M", "0x13");
    let inc = ward.backup(&["-l", "inc"]);
    assert_eq!(
        (&inc["disks"][0]["full_reason"], number(&inc, "changed_bytes")),
        (&Value::Null, 64 << 10),
        "{inc}"
    );

    // and mended while it is off
    ward.off();
    ward.on();
    ward.lab.cmd(&["crash", "crashed"]);
    ward.named_and_mended("bitmap-inconsistent", &["is inconsistent"]);
    let left = ward.bitmaps();
    assert!(left.iter().all(|line| line.ends_with(&theirs) || line.ends_with("foreign")), "{left:?}");
    assert!(ward.backup(&["-l", "inc"])["disks"][0]["full_reason"].is_string());
}

#[test]
fn bitmaps_and_checkpoints_that_do_not_know_each_other() {
    let ward = Ward::new("parted", &["vda:qcow2:8M", "vdb:qcow2:8M"]);
    ward.write("vda", "1M", "0x11");
    let checkpoint = checkpoint_of(&ward.backup(&[]));
    // libvirt forgets the newest point's checkpoint; the bitmaps were made since the domain started
    ward.lab.virsh(&["checkpoint-delete", "parted", &checkpoint, "--metadata"]);
    let unsure = ward.doctor(&[], 0);
    assert_eq!(
        finding(&unsure, "checkpoint-unknown-to-libvirt")["severity"],
        "note",
        "only QEMU knows: {unsure:#}"
    );
    let sure = ward.doctor(&["--ask-qemu"], 3);
    assert!(has(&sure, "checkpoint-unknown-to-libvirt"), "{sure:#}");
    assert_eq!(
        described(&ward.checkpoints(&["--ask-qemu"]), &checkpoint),
        "newest-and-last-full, vda sound, vdb sound"
    );
    ward.off();
    ward.named_and_mended("checkpoint-unknown-to-libvirt", &["but its bitmaps are there"]);
    assert_eq!(ward.lab.checkpoints("parted"), [checkpoint.as_str()]);
    ward.on();
    ward.lab.virsh(&["checkpoint-delete", "parted", &checkpoint, "--metadata"]);
    let mended = ward.doctor(&["--fix"], 0);
    assert_eq!(finding(&mended, "checkpoint-unknown-to-libvirt")["mended"], true, "{mended:#}");
    ward.write("vda", "2M", "0x12");
    let inc = ward.backup(&["-l", "inc"]);
    assert_eq!(
        (&inc["disks"][0]["full_reason"], number(&inc, "changed_bytes")),
        (&Value::Null, 64 << 10),
        "{inc}"
    );

    // bitmaps of ours that nobody needs, and one of somebody else's
    ward.off();
    let orphan = format!("{}0123456789abcdef", &checkpoint[..16]);
    for (disk, name) in [("vda", orphan.as_str()), ("vdb", &orphan), ("vdb", "theirs")] {
        run(Command::new("qemu-img").args(["bitmap", "--add", &ward.lab.image("parted", disk), name]));
    }
    let before = ward.bitmaps();
    ward.on();
    assert_eq!(described(&ward.checkpoints(&[]), &orphan), "unknown, vda present, vdb present");
    ward.off();
    assert_eq!(ward.bitmaps(), before);
    ward.on();
    ward.named_and_mended("bitmap-without-checkpoint", &["Bitmap already exists", &orphan]);
    let left = ward.bitmaps();
    assert!(
        left.iter().all(|line| !line.contains(&orphan)) && left.iter().any(|line| line.ends_with("theirs")),
        "{left:?}"
    );
    assert_eq!(finding(&ward.doctor(&[], 0), "foreign-bitmap")["checkpoint"], "theirs");
    ward.off();
    run(Command::new("qemu-img").args(["bitmap", "--add", &ward.lab.image("parted", "vda"), &orphan]));
    ward.named_and_mended("bitmap-without-checkpoint", &["Bitmap already exists", &orphan]);
    let inc = ward.backup(&["-l", "inc"]);
    assert_eq!((&inc["disks"][0]["full_reason"], number(&inc, "changed_bytes")), (&Value::Null, 0), "{inc}");
}

#[test]
fn a_domain_that_was_defined_anew() {
    let ward = Ward::new("anew", &["vda:qcow2:8M"]);
    ward.write("vda", "1M", "0x11");
    let checkpoint = checkpoint_of(&ward.backup(&[]));
    ward.off();
    let define_anew = || {
        let xml = ward.lab.dir().join("anew.xml");
        std::fs::write(&xml, ward.lab.virsh(&["dumpxml", "anew", "--inactive"])).unwrap();
        ward.lab.virsh(&["undefine", "anew", "--checkpoints-metadata"]);
        ward.lab.virsh(&["define", xml.to_str().unwrap()]);
    };
    define_anew();
    // the bitmap was in the image when the domain started, and so is seen
    ward.on();
    ward.named_and_mended("checkpoint-unknown-to-libvirt", &["but its bitmaps are there"]);
    assert_eq!(ward.lab.checkpoints("anew"), [checkpoint.as_str()]);
    ward.write("vda", "2M", "0x12");
    let inc = ward.backup(&["-l", "inc"]);
    assert_eq!(
        (&inc["disks"][0]["full_reason"], number(&inc, "changed_bytes")),
        (&Value::Null, 64 << 10),
        "{inc}"
    );

    // there, but of no use: libvirt says so when it is told of it
    ward.off();
    ward.on();
    ward.lab.cmd(&["crash", "anew"]);
    define_anew();
    ward.on();
    let mended = ward.doctor(&["--fix"], 0);
    assert!(has(&mended, "checkpoint-gone"), "{mended:#}");
    assert_eq!(ward.lab.checkpoints("anew"), Vec::<String>::new());
    let full = ward.backup(&["-l", "inc"]);
    assert!(full["disks"][0]["full_reason"].is_string() && number(&full, "changed_bytes") == 0, "{full}");
    assert_eq!(ward.backup(&["-l", "inc"])["disks"][0]["full_reason"], Value::Null);
    // the broken bitmaps of the points before are superseded now
    ward.off();
    ward.named_and_mended("bitmap-without-checkpoint", &["Bitmap already exists"]);
    assert_eq!(ward.bitmaps().len(), 1, "{:?}", ward.bitmaps());
}

#[test]
fn checkpoints_that_nothing_needs_are_deleted() {
    let ward = Ward::new("gc", &["vda:qcow2:8M"]);
    let full = ward.backup(&[]);
    let forgotten = ward.backup(&["-l", "inc"]);
    ward.vmkeep.ok(&["forget", "-y", "--force", &point(&forgotten)]);
    let other = Vmkeep::init(Some(&ward.lab));
    let theirs = checkpoint_of(&other.backup(&["gc"]));
    ward.lab.virsh(&["checkpoint-create-as", "gc", "foreign", "--diskspec", "vda,checkpoint=bitmap"]);
    let (kept, lost) = (checkpoint_of(&full), checkpoint_of(&forgotten));
    let list = ward.checkpoints(&[]);
    assert_eq!(described(&list, &kept), "newest-and-last-full, vda sound");
    assert_eq!(described(&list, &lost), "forgotten, vda sound");
    assert_eq!(described(&list, &theirs), "other-repository, vda sound");
    assert_eq!(described(&list, "foreign"), "foreign, vda sound");
    let shown = ward.vmkeep.ok(&["checkpoints", "gc"]);
    assert!(shown.lines().count() == 5 && shown.contains("of a forgotten point"), "{shown}");
    assert_eq!(finding(&ward.doctor(&[], 0), "forgotten-checkpoint")["severity"], "note");

    let said = ward.vmkeep.fails(&["checkpoints", "gc", "--gc"], 2);
    assert!(said.contains("-y") && said.contains(&lost), "{said}");
    assert!(ward.vmkeep.ok(&["checkpoints", "gc", "--gc", "-n"]).contains(&lost));
    assert_eq!(ward.lab.checkpoints("gc").len(), 4, "nothing was deleted yet");
    let gc = ward.checkpoints(&["--gc", "-y"]);
    let deleted: Vec<&Value> =
        gc["checkpoints"].as_array().unwrap().iter().filter(|found| found["deleted"] == true).collect();
    assert!(deleted.len() == 1 && deleted[0]["checkpoint"] == lost.as_str(), "{gc:#}");
    let mut left = ward.lab.checkpoints("gc");
    left.sort();
    let mut expected = [kept, theirs, "foreign".to_owned()];
    expected.sort();
    assert_eq!(left, expected);
    assert!(ward.bitmaps().iter().all(|line| !line.contains(&lost)));
    ward.write("vda", "1M", "0x11");
    assert_eq!(number(&ward.backup(&["-l", "inc"]), "changed_bytes"), 64 << 10);
}

#[test]
fn another_programs_job_is_ended_only_by_name() {
    let ward = Ward::new("other", &["vda:qcow2:8M"]);
    ward.write("vda", "1M", "0x11");
    ward.backup(&[]);
    ward.lab.cmd(&["begin", "other", "", "theirs"]);
    for args in [&[][..], &["--fix"]] {
        let found = ward.doctor(args, 3);
        let job = finding(&found, "job-of-another-program");
        let said = format!("{} {}", job["problem"], job["meaning"]);
        assert!(said.contains("other.sock") && said.contains("cannot acquire state change lock"), "{said}");
        assert_eq!(job["done"], Value::Null);
        assert!(ward.has_job());
    }
    // not without the domain's name, and not without --fix
    ward.vmkeep.fails(&["doctor", "--fix", "--end-job"], 2);
    ward.vmkeep.fails(&["doctor", "other", "--end-job"], 2);
    ward.doctor(&["--fix", "--end-job", "-n"], 3);
    assert!(ward.has_job());
    let mended = ward.doctor(&["--fix", "--end-job"], 0);
    assert_eq!(finding(&mended, "job-of-another-program")["done"], "ended the other program's job");
    assert!(!ward.has_job());
    assert!(ward.lab.checkpoints("other").contains(&"theirs".to_owned()), "their checkpoint stays");
    let inc = ward.backup(&["-l", "inc"]);
    assert_eq!((&inc["disks"][0]["full_reason"], number(&inc, "changed_bytes")), (&Value::Null, 0), "{inc}");
}

#[test]
fn a_backup_at_work_is_not_disturbed() {
    let ward = Ward::new("busy", &["vda:qcow2:32M"]);
    ward.lab.write("busy", "vda", "0", "16M", "0x11");
    let old = checkpoint_of(&ward.backup(&[]));
    let scratch = ward.scratch.to_str().unwrap();
    let args = ["backup", "busy", "-l", "full", "--limit-read", "1M", "--scratch-dir", scratch];
    let child = ward.vmkeep.command(&args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    while !ward.has_job() {
        assert!(start.elapsed() < Duration::from_secs(20), "the backup does not begin");
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut new = ward.lab.checkpoints("busy");
    new.retain(|name| *name != old);
    assert_eq!(new.len(), 1);
    // also for those who have another cache, and so another lock
    let elsewhere = ward.vmkeep.path("other-cache");
    for cache in [ward.vmkeep.path("cache"), elsewhere] {
        let mut doctor =
            ward.vmkeep.command(&["--json", "doctor", "busy", "--fix", "--scratch-dir", scratch]);
        let output = doctor.env("VMKEEP_CACHE_DIR", cache).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", text(&output));
        let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(has(&summary, "job-running") && !has(&summary, "leftover-checkpoint"), "{summary:#}");
    }
    assert_eq!(described(&ward.checkpoints(&[]), &new[0]), "at-work, vda sound");
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    ward.vmkeep.ok(&["verify", "--data"]);
    assert_eq!(ward.doctor(&[], 0)["problems"], 0);
}

#[test]
fn superseded_checkpoints_and_images_in_a_chain() {
    let ward = Ward::new("chain", &["vda:qcow2:8M"]);
    ward.backup(&[]);
    let superseded = checkpoint_of(&ward.backup(&["-l", "inc"]));
    ward.backup(&["-l", "inc"]);
    assert!(!ward.lab.checkpoints("chain").contains(&superseded));
    // as if it could not have been deleted
    ward.off();
    run(Command::new("qemu-img").args(["bitmap", "--add", &ward.lab.image("chain", "vda"), &superseded]));
    let xml = ward.lab.dir().join("superseded.xml");
    std::fs::write(
        &xml,
        format!(
            "<domaincheckpoint><name>{superseded}</name><creationTime>1</creationTime><disks><disk name='vda' \
             checkpoint='bitmap' bitmap='{superseded}'/></disks></domaincheckpoint>"
        ),
    )
    .unwrap();
    ward.lab.virsh(&["checkpoint-create", "chain", xml.to_str().unwrap(), "--redefine"]);
    for power in ["off", "running"] {
        if power == "running" {
            ward.on();
        }
        assert_eq!(described(&ward.checkpoints(&[]), &superseded), "superseded, vda sound");
    }
    ward.named_and_mended("superseded-checkpoint", &["newer points took its place"]);
    assert!(ward.bitmaps().iter().all(|line| !line.contains(&superseded)));
    ward.write("vda", "1M", "0x11");
    assert_eq!(number(&ward.backup(&["-l", "inc"]), "changed_bytes"), 64 << 10);

    let newest = checkpoint_of(&ward.backup(&["-l", "inc"]));
    ward.lab.virsh(&["snapshot-create-as", "chain", "s1", "--disk-only", "--no-metadata"]);
    assert_eq!(described(&ward.checkpoints(&[]), &newest), "newest, vda sound", "QEMU adds them up");
    assert_eq!(ward.doctor(&[], 0)["problems"], 0);
    ward.off();
    assert_eq!(described(&ward.checkpoints(&[]), &newest), "newest, vda spread");
    assert!(has(&ward.doctor(&["--fix"], 0), "spread-bitmap"));
    ward.on();
    ward.write("vda", "2M", "0x12");
    let inc = ward.backup(&["-l", "inc"]);
    assert_eq!(
        (&inc["disks"][0]["full_reason"], number(&inc, "changed_bytes")),
        (&Value::Null, 64 << 10),
        "{inc}"
    );
}

#[test]
fn the_host_is_looked_at() {
    let ward = Ward::new("one", &["--agent", "vda:qcow2:8M"]);
    ward.lab.cmd(&["define", "--off", "two", "vda:qcow2:8M"]);
    ward.backup(&[]);
    let temp = ward.vmkeep.path("temp");
    let stale = temp.join("vmkeep-nbd.stale");
    std::fs::create_dir_all(&stale).unwrap();
    let mut child = Command::new("true").spawn().unwrap();
    child.wait().unwrap();
    std::fs::write(stale.join("pid"), child.id().to_string()).unwrap();
    let leftover = ward.scratch.join("vmkeep-job-00000000-0123456789abcdef");
    std::fs::create_dir(&leftover).unwrap();
    std::fs::write(leftover.join("vda.scratch"), [1; 4096]).unwrap();
    std::fs::remove_file(ward.lab.image("two", "vda")).unwrap();
    let doctor = |args: &[&str], code: i32| -> Value {
        let mut all = vec!["--json", "doctor", "--scratch-dir", ward.scratch.to_str().unwrap()];
        all.extend(args);
        let output = ward.vmkeep.command(&all).env("TMPDIR", &temp).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", text(&output));
        let summary = serde_json::from_slice(&output.stdout).unwrap();
        assert_valid("doctor", &summary);
        summary
    };
    let found = doctor(&[], 3);
    assert_eq!(found["domains"], serde_json::json!(["one", "two"]));
    for tool in ["libvirt", "qemu", "qemu_img", "qemu_nbd"] {
        assert!(found["host"][tool].as_str().unwrap().contains('.'), "{found:#}");
    }
    for kind in ["stale-socket", "leftover-directory", "unreadable-disk", "agent-silent"] {
        assert_eq!(finding(&found, kind)["severity"], "problem");
    }
    assert!(stale.exists() && leftover.exists());
    // of another domain: none of this one's business
    doctor(&["one", "--fix"], 3);
    assert!(stale.exists() && leftover.exists());
    let mended = doctor(&["--fix"], 3);
    assert_eq!(mended["mended"], 2, "{mended:#}");
    assert!(!stale.exists() && !leftover.exists());
    let left: Vec<&Value> = mended["findings"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|found| found["mended"] == false && found["severity"] == "problem")
        .map(|found| &found["kind"])
        .collect();
    assert_eq!(left, ["agent-silent", "unreadable-disk"], "{mended:#}");
}

#[test]
fn whatever_is_missing_the_rest_is_looked_at() {
    let ward = Ward::new("rest", &["vda:qcow2:8M"]);
    ward.backup(&[]);
    let told = |change: &dyn Fn(&mut Command), kind: &str, words: &str| {
        let mut command =
            ward.vmkeep.command(&["--json", "doctor", "--scratch-dir", ward.scratch.to_str().unwrap()]);
        change(&mut command);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(3), "{}", text(&output));
        let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_valid("doctor", &summary);
        let found = finding(&summary, kind);
        assert!(found["problem"].as_str().unwrap().contains(words), "{found}");
        summary
    };
    let summary = told(
        &|command| _ = command.env("LIBVIRT_DEFAULT_URI", "qemu+unix:///session?socket=/nowhere"),
        "libvirt-unreachable",
        "/nowhere",
    );
    assert_eq!(summary["domains"], serde_json::json!([]));
    let file = ward.vmkeep.path("file");
    std::fs::write(&file, "").unwrap();
    told(&|command| _ = command.env("VMKEEP_CACHE_DIR", &file), "cache-unusable", "no directory");
    told(&|command| _ = command.env("PATH", "/nowhere"), "tool-missing", "qemu-img");
    let config = ward.vmkeep.repository().join("config");
    let whole = std::fs::read(&config).unwrap();
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&config, permissions).unwrap();
    std::fs::write(&config, &whole[..20]).unwrap();
    std::fs::remove_file(ward.vmkeep.repository().join("config.copy")).unwrap();
    let summary = told(&|_| {}, "repository-damaged", "config");
    assert!(!has(&summary, "leftover-checkpoint"), "{summary:#}");
    std::fs::remove_file(&config).unwrap();
    told(&|_| {}, "no-repository", "there is no vmkeep repository");
}

#[test]
fn a_guest_that_stays_frozen_is_thawed() {
    let lab = Lab::start();
    guest(&lab, &["define", "--idle", "g"]);
    guest(&lab, &["wait", "g", "ready"]);
    lab.cmd(&["agent", "g"]);
    let vmkeep = Vmkeep::init(Some(&lab));
    // nothing of the host's own is touched
    let scratch = lab.dir().to_str().unwrap().to_owned();
    let doctor = |args: &[&str], code| -> Value {
        let mut command = vmkeep.command(&["--json", "doctor", "--scratch-dir", &scratch]);
        let output = command.args(args).env("TMPDIR", &scratch).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{}", text(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let sound = doctor(&["g"], 0);
    assert!(!has(&sound, "no-agent") && !has(&sound, "agent-silent") && !has(&sound, "frozen"), "{sound:#}");
    lab.virsh(&["domfsfreeze", "g"]);
    let found = doctor(&["g"], 3);
    assert!(finding(&found, "frozen")["problem"].as_str().unwrap().contains("file systems are frozen"));
    // unnamed it may be somebody's snapshot
    let found = doctor(&["--fix"], 3);
    assert_eq!(finding(&found, "frozen")["done"], Value::Null, "{found:#}");
    let mended = doctor(&["g", "--fix"], 0);
    assert_eq!(finding(&mended, "frozen")["mended"], true, "{mended:#}");
    assert_thawed(&lab);
    let summary = vmkeep.backup(&["g", "--freeze", "require"]);
    assert_eq!(summary["consistency"], "frozen", "{summary}");
    assert_thawed(&lab);
}

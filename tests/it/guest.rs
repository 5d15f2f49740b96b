//! A real Linux that goes on writing to two file systems: what it had at the instant of a point is what a domain made
//! from the point has.

use std::collections::BTreeMap;
use std::process::Command;

use crate::support::{Lab, Vmkeep, point, run};

/// Runs a command of `guest.sh`.
#[track_caller]
pub fn guest(lab: &Lab, args: &[&str]) -> String {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/lab/guest.sh");
    run(Command::new("bash").arg(script).args(args).env("LAB_DIR", lab.dir()))
}

/// Boots a domain from a point, which only looks: at its file systems as they are, then at their files. Returns
/// lines of SHA-256 and path.
#[track_caller]
fn boot_restored(lab: &Lab, vmkeep: &Vmkeep, point: &str, name: &str) -> String {
    // in the lab, whose daemon may be another user
    let dir = lab.dir().join(name);
    vmkeep.ok(&["restore", point, "-o", dir.to_str().unwrap(), "--format", "qcow2"]);
    let disk = |target: &str| format!("{target}:qcow2:{}/{target}.qcow2", dir.display());
    guest(lab, &["define", "--check", name, &disk("vda"), &disk("vdb")]);
    guest(lab, &["wait", name, "ready"]);
    let console = std::fs::read_to_string(lab.dir().join(format!("{name}.console"))).unwrap();
    for disk in ["vda", "vdb"] {
        assert!(console.contains(&format!("guest: fsck {disk} clean")), "{console}");
    }
    // the guest compares each file with the hash in its name
    assert!(!console.contains("guest: wrong"), "{console}");
    let files = guest(lab, &["hashes", name, "check"]);
    lab.cmd(&["undefine", name]);
    files
}

/// By the guest's own account.
#[track_caller]
pub fn assert_thawed(lab: &Lab) {
    let answer = lab.virsh(&["qemu-agent-command", "g", r#"{"execute":"guest-fsfreeze-status"}"#]);
    assert!(answer.contains("\"thawed\""), "{answer}");
}

#[test]
fn a_guest_that_writes_on_is_restored_as_it_was_at_the_instant() {
    let lab = Lab::start();
    guest(&lab, &["define", "g"]);
    guest(&lab, &["wait", "g", "ready"]);
    lab.cmd(&["agent", "g"]);
    let vmkeep = Vmkeep::init(Some(&lab));
    let mut points = Vec::new();
    // one file on each disk in a round
    let mut round = 6;
    for level in ["full", "inc", "diff"] {
        guest(&lab, &["wait", "g", &format!("round {round}")]);
        let summary = vmkeep.backup(&["g", "-l", level, "--freeze", "require"]);
        assert_eq!(summary["consistency"], "frozen", "{summary}");
        assert_thawed(&lab);
        let files = guest(&lab, &["hashes", "g"]);
        round = newest_files(&files)["vda"] + 3;
        points.push((point(&summary), files));
    }
    guest(&lab, &["wait", "g", &format!("round {round}")]);
    let unfrozen = vmkeep.backup(&["g", "-l", "inc", "--freeze", "no"]);
    assert_eq!(unfrozen["consistency"], "crash", "{unfrozen}");

    // a job that cannot begin once the guest is frozen
    lab.cmd(&["begin", "g", "", ""]);
    vmkeep.fails(&["backup", "g", "-l", "inc", "--freeze", "require"], 11);
    assert_thawed(&lab);
    lab.cmd(&["end", "g"]);

    for (i, (point, files)) in points.iter().enumerate() {
        assert!(files.lines().count() > 10, "{files}");
        assert_eq!(&boot_restored(&lab, &vmkeep, point, &format!("r{i}")), files, "point {i}");
    }
    let files = boot_restored(&lab, &vmkeep, &point(&unfrozen), "crash");
    // the guest writes its n-th file to vda, and when that is durable to vdb: two disks of one instant show it
    let newest = newest_files(&files);
    assert!(newest["vdb"] <= newest["vda"] && newest["vda"] <= newest["vdb"] + 1, "{newest:?}\n{files}");
}

/// Returns the highest number of the files of each disk; a file's name begins with its number.
fn newest_files(files: &str) -> BTreeMap<String, u32> {
    let mut newest = BTreeMap::new();
    for line in files.lines() {
        let (_, path) = line.split_once("  ").unwrap();
        let (disk, path) = path.split_once('/').unwrap();
        let name = path.rsplit('/').next().unwrap();
        if let Some(number) = name.split_once('.').and_then(|(number, _)| number.parse::<u32>().ok()) {
            let last = newest.entry(disk.to_owned()).or_insert(0);
            *last = number.max(*last);
        }
    }
    newest
}

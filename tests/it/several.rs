//! Several domains in one run, at the same time.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{Lab, Vmkeep, number, point, text};

const NAMES: [&str; 3] = ["ant", "bee", "cat"];

/// A lab with three domains and a repository.
struct Scene {
    lab: Lab,
    vmkeep: Vmkeep,
    scratch: PathBuf,
}

impl Scene {
    fn new() -> Self {
        let lab = Lab::start();
        for name in NAMES {
            lab.cmd(&["define", name, "vda:qcow2:32M"]);
            // as if made from one template
            lab.write(name, "vda", "0", "2M", "0x11");
            lab.write(name, "vda", "8M", "2M", "0x12");
        }
        let vmkeep = Vmkeep::init(Some(&lab));
        let scratch = lab.dir().join("scratch");
        std::fs::create_dir(&scratch).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o1777);
        std::fs::set_permissions(&scratch, mode).unwrap();
        Self { lab, vmkeep, scratch }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut all = vec!["backup", "--scratch-dir", self.scratch.to_str().unwrap()];
        all.extend(args);
        self.vmkeep.command(&all)
    }

    /// Backs up; returns the exit code, and what the run says of each domain.
    fn backup(&self, args: &[&str]) -> (i32, Vec<Value>) {
        let output = self.command(&[args, &["--json"]].concat()).output().unwrap();
        let lines = std::str::from_utf8(&output.stdout).unwrap().lines();
        let results = lines.map(|line| serde_json::from_str::<Value>(line).unwrap());
        let results = results.filter(|result| result["message_type"] != "status").collect();
        (output.status.code().unwrap_or(-1), results)
    }

    /// Copies what the guest reads now.
    fn truth(&self, name: &str) -> PathBuf {
        let dir = self.vmkeep.path(&format!("truth-{name}"));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir(&dir).unwrap();
        self.lab.truth(name, "vda", &dir.join("vda.raw"));
        dir
    }

    fn has_job(&self, name: &str) -> bool {
        self.lab.try_cmd(&["virsh", "backup-dumpxml", name]).status.success()
    }

    /// Nothing is left of any job.
    #[track_caller]
    fn assert_clean(&self) {
        assert!(NAMES.iter().all(|name| !self.has_job(name)));
        let left: Vec<_> =
            std::fs::read_dir(&self.scratch).unwrap().flatten().map(|entry| entry.path()).collect();
        assert_eq!(left, Vec::<PathBuf>::new());
    }
}

fn names(results: &[Value]) -> Vec<&str> {
    let name = |result: &'_ Value| if result["message_type"] == "error" { "object" } else { "domain" };
    results.iter().map(|result| result[name(result)].as_str().unwrap_or("?")).collect()
}

#[test]
fn one_that_fails_keeps_no_other_from_its_point() {
    let scene = Scene::new();
    let (code, first) = scene.backup(&["cat", "ant", "bee", "ant", "-j", "3"]);
    assert_eq!((code, names(&first)), (0, vec!["cat", "ant", "bee"]), "{first:?}");
    let new: Vec<u64> = first.iter().map(|result| number(result, "new_bytes")).collect();
    assert_eq!(new.iter().filter(|bytes| **bytes > 0).count(), 1, "the template is stored once: {new:?}");

    for (name, pattern) in NAMES.into_iter().zip(["0x21", "0x22", "0x23"]) {
        scene.lab.write(name, "vda", "1M", "192k", pattern);
        scene.lab.write(name, "vda", "20M", "64k", "0x2f");
    }
    let before = scene.lab.checkpoints("bee");
    scene.lab.cmd(&["begin", "bee", "", "theirs"]);
    let truths = ["ant", "cat"].map(|name| scene.truth(name));
    let (code, results) = scene.backup(&["ant", "nosuch", "bee", "cat", "-l", "inc", "-j", "4"]);
    assert_eq!(names(&results), ["ant", "nosuch", "bee", "cat"], "{results:?}");
    assert_eq!(code, 1, "the first failure's: {results:?}");
    assert_eq!((&results[1]["exit_code"], &results[2]["exit_code"]), (&1.into(), &11.into()), "{results:?}");
    for (result, truth) in [&results[0], &results[3]].into_iter().zip(&truths) {
        assert_eq!(number(result, "changed_bytes"), 256 << 10, "{result}");
        scene.vmkeep.assert_restores(&point(result), truth, "raw");
    }
    scene.lab.cmd(&["end", "bee"]);
    let ours = |names: Vec<String>| names.into_iter().filter(|name| name != "theirs").collect::<Vec<_>>();
    assert_eq!(ours(scene.lab.checkpoints("bee")), ours(before));

    // as people read it: each domain's lines stand together
    let truths = NAMES.map(|name| scene.truth(name));
    let output = scene.command(&["--all"]).output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let said = String::from_utf8(output.stdout).unwrap();
    let begins: Vec<&str> =
        said.lines().map(|line| line.split([' ', ':']).find(|word| !word.is_empty()).unwrap()).collect();
    assert_eq!(begins, ["backed", "vda", "stored"].repeat(3), "{said}");
    for (name, truth) in NAMES.into_iter().zip(&truths) {
        assert!(said.contains(&format!("backed up {name} as point")), "{said}");
        let latest = scene.vmkeep.json(&["show", name])["point"].as_str().unwrap().to_owned();
        scene.vmkeep.assert_restores(&latest, truth, "raw");
        assert_eq!(ours(scene.lab.checkpoints(name)).len(), 2, "of the full and of the newest");
    }
    scene.assert_clean();
    scene.vmkeep.ok(&["verify", "--data"]);
}

#[test]
fn a_signal_ends_all_of_them_and_leaves_the_domains_as_they_were() {
    let scene = Scene::new();
    for name in NAMES {
        scene.lab.write(name, "vda", "0", "32M", "0x31");
    }
    assert_eq!(scene.backup(&NAMES).0, 0);
    let before = NAMES.map(|name| scene.lab.checkpoints(name));
    let args = [&NAMES[..], &["-l", "full", "--limit-read", "3M", "-j", "2"]].concat();
    let child = scene.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    while !(scene.has_job("ant") && scene.has_job("bee")) {
        assert!(start.elapsed() < Duration::from_secs(20), "the backups do not begin");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(!scene.has_job("cat"), "it waits for one of two to end");
    // past the start of the jobs, into the reading
    std::thread::sleep(Duration::from_millis(500));
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", text(&output));
    assert!(!text(&output).contains("backed up"), "{}", text(&output));
    assert_eq!(NAMES.map(|name| scene.lab.checkpoints(name)), before);
    scene.assert_clean();
    scene.vmkeep.ok(&["verify", "--structure"]);
    let (code, results) = scene.backup(&NAMES);
    assert_eq!(code, 0, "{results:?}");
    assert!(results.iter().all(|result| number(result, "dirty_bytes") == 0), "{results:?}");
}

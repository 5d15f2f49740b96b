//! What the tests share: a lab with real domains, the program, and other tools as judges.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

/// The program under test.
pub const VMKEEP: &str = env!("CARGO_BIN_EXE_vmkeep");

/// Runs a command to its end and returns its standard output.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, text(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// Returns all that a command said.
pub fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A private libvirt daemon; purged when dropped.
pub struct Lab {
    dir: PathBuf,
}

impl Lab {
    /// Starts a daemon of its own.
    #[track_caller]
    pub fn start() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let no = COUNT.fetch_add(1, Ordering::Relaxed);
        // short: unix sockets lie deep below it
        let dir = PathBuf::from(format!("/tmp/vmkl-{}-{no}", std::process::id()));
        let lab = Self { dir };
        lab.cmd(&["start"]);
        lab
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn command(&self, args: &[&str]) -> Command {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/lab/lab.sh");
        let mut command = Command::new("bash");
        command.arg(script).args(args).env("LAB_DIR", &self.dir);
        command
    }

    /// Runs a command of `lab.sh`.
    #[track_caller]
    pub fn cmd(&self, args: &[&str]) -> String {
        run(&mut self.command(args))
    }

    /// Runs `virsh`.
    #[track_caller]
    pub fn virsh(&self, args: &[&str]) -> String {
        let mut all = vec!["virsh"];
        all.extend(args);
        self.cmd(&all)
    }

    /// Runs a command of `lab.sh` that may fail.
    pub fn try_cmd(&self, args: &[&str]) -> Output {
        self.command(args).stdin(Stdio::null()).output().unwrap()
    }

    pub fn uri(&self) -> String {
        self.cmd(&["uri"]).trim().to_owned()
    }

    /// Returns the path of a disk's image.
    #[track_caller]
    pub fn image(&self, domain: &str, disk: &str) -> String {
        self.cmd(&["image", domain, disk]).trim().to_owned()
    }

    /// Writes from inside QEMU, so that bitmaps see it. `pattern` is a byte, or `-z` for zeroes.
    #[track_caller]
    pub fn write(&self, domain: &str, disk: &str, offset: &str, len: &str, pattern: &str) {
        self.cmd(&["write", domain, disk, offset, len, pattern]);
    }

    /// Copies what the guest would read now into a raw file.
    #[track_caller]
    pub fn truth(&self, domain: &str, disk: &str, file: &Path) {
        self.cmd(&["truth", domain, disk, file.to_str().unwrap()]);
    }

    /// Returns the names of a domain's checkpoints.
    #[track_caller]
    pub fn checkpoints(&self, domain: &str) -> Vec<String> {
        let list = self.virsh(&["checkpoint-list", domain, "--name"]);
        list.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.command(&["stop", "--purge"]).stdin(Stdio::null()).output();
    }
}

/// Returns true if the long tests were asked for: `scripts/test --long`.
pub fn is_long() -> bool {
    std::env::var_os("VMKEEP_TEST_LONG").is_some()
}

/// Says that a test was left out because this machine does not allow it. Where `CI` is set, root runs it and its tools
/// are there, that is a failure: nobody would notice that it is never run.
#[track_caller]
pub fn skipped(reason: &str, tools: &[&str]) {
    println!("SKIPPED: {reason}");
    let is_ci = std::env::var_os("CI").is_some_and(|value| !value.is_empty() && value != "false");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_there = |tool: &&str| std::env::split_paths(&path).any(|dir| dir.join(tool).exists());
    let can_run = rustix::process::geteuid().is_root() && tools.iter().all(is_there);
    assert!(!(is_ci && can_run), "left out where it has to run: {reason}");
}

/// A repository and how to call the program on it.
pub struct Vmkeep {
    pub dir: tempfile::TempDir,
    uri: Option<String>,
}

impl Vmkeep {
    /// Makes a repository.
    #[track_caller]
    pub fn init(lab: Option<&Lab>) -> Self {
        let new = Self { dir: tempfile::tempdir().unwrap(), uri: lab.map(Lab::uri) };
        new.ok(&["init"]);
        new
    }

    /// Returns a path beside the repository.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn repository(&self) -> PathBuf {
        self.path("repository")
    }

    /// Returns a command with repository, cache and libvirt set, and nothing of the user's settings.
    pub fn command(&self, args: &[&str]) -> Command {
        self.command_on(&self.repository(), args)
    }

    /// Returns where the local index lives.
    pub fn cache(&self) -> PathBuf {
        self.path("cache")
    }

    /// As [`Vmkeep::command`] for a repository elsewhere.
    pub fn command_on(&self, repository: &Path, args: &[&str]) -> Command {
        let mut command = Command::new(VMKEEP);
        command
            .arg("-r")
            .arg(repository)
            .args(args)
            .stdin(Stdio::null())
            .env("VMKEEP_CACHE_DIR", self.cache())
            .env("HOME", self.dir.path())
            .env("TZ", "UTC")
            .env_remove("XDG_CONFIG_HOME")
            .env_remove("VMKEEP_REPOSITORY")
            .env_remove("LIBVIRT_DEFAULT_URI");
        if let Some(uri) = &self.uri {
            command.env("LIBVIRT_DEFAULT_URI", uri);
        }
        command
    }

    /// Runs it, and fails unless it ends well.
    #[track_caller]
    pub fn ok(&self, args: &[&str]) -> String {
        run(&mut self.command(args))
    }

    /// Runs it, and fails unless it ends with `code`; returns all that it said.
    #[track_caller]
    pub fn fails(&self, args: &[&str], code: i32) -> String {
        let output = self.command(args).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {}", text(&output));
        text(&output)
    }

    /// Runs it with `--json` and returns the last document.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend(args);
        let output = self.ok(&all);
        let last = output.lines().last().unwrap_or_else(|| panic!("{args:?} printed nothing"));
        serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {output}"))
    }

    /// Runs the program with `--json`, however it ends; returns its last line and its exit code.
    #[track_caller]
    pub fn json_with_code(&self, args: &[&str]) -> (Value, i32) {
        let mut all = vec!["--json"];
        all.extend(args);
        let output = self.command(&all).output().unwrap();
        let text = String::from_utf8(output.stdout.clone()).unwrap();
        let last = text.lines().last().unwrap_or("null");
        (serde_json::from_str(last).unwrap(), output.status.code().unwrap_or(-1))
    }

    /// Backs a domain up and returns the summary.
    #[track_caller]
    pub fn backup(&self, args: &[&str]) -> Value {
        let mut all = vec!["backup"];
        all.extend(args);
        let summary = self.json(&all);
        assert_eq!(summary["message_type"], "summary", "{summary}");
        summary
    }

    /// Restores a point and fails unless each disk equals the raw file of that name in `truth`.
    #[track_caller]
    pub fn assert_restores(&self, point: &str, truth: &Path, format: &str) {
        let target = self.path(&format!("restored-{point}-{format}"));
        self.ok(&["restore", point, "-o", target.to_str().unwrap(), "--format", format]);
        let mut disks = 0;
        for entry in std::fs::read_dir(truth).unwrap() {
            let expected = entry.unwrap().path();
            let disk = expected.file_stem().unwrap().to_str().unwrap();
            let found = target.join(format!("{disk}.{format}"));
            if format == "qcow2" {
                run(Command::new("qemu-img").arg("check").arg("-q").arg(&found));
            }
            let sizes = [&found, &expected].map(|path| virtual_size(path));
            assert_eq!(sizes[0], sizes[1], "size of {disk}");
            run(Command::new("qemu-img")
                .args(["compare", "-f", format, "-F", "raw"])
                .arg(&found)
                .arg(&expected));
            disks += 1;
        }
        assert!(disks > 0, "nothing was compared");
        std::fs::remove_dir_all(target).unwrap();
    }
}

/// Returns a named number of a summary.
#[track_caller]
pub fn number(summary: &Value, name: &str) -> u64 {
    summary["stats"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {summary}"))
}

/// Returns the id of the point that a summary speaks of.
#[track_caller]
pub fn point(summary: &Value) -> String {
    summary["point"].as_str().unwrap_or_else(|| panic!("no point in {summary}")).to_owned()
}

/// Returns the size of the disk that an image holds, by another tool's account.
#[track_caller]
pub fn virtual_size(image: &Path) -> u64 {
    let info = run(Command::new("qemu-img").args(["info", "-U", "--output=json"]).arg(image));
    let info: Value = serde_json::from_str(&info).unwrap();
    info["virtual-size"].as_u64().unwrap()
}

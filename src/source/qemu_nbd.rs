//! A `qemu-nbd` of our own: the server of one image file, for reading and for writing.
//!
//! The server is not persistent: it ends with its only client, so that nothing stays behind when we are killed.
//! Names of files never become options: they are given absolute, as values of a JSON description.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::nbd::{Address, Connection, DIRTY_BITMAP_PREFIX, Options};

/// The name under which the image is served.
const EXPORT: &str = "disk";
/// How long a server may take until it listens: it replays what a crash left in the image first.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a server may take to end once its client has gone: it writes what it still holds.
const STOP_TIMEOUT: Duration = Duration::from_secs(300);
/// How often a server is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// What the names of the directories begin with in which servers listen.
const DIRECTORY_PREFIX: &str = "vmkeep-nbd.";
/// How old a directory without a server has to be until it is nobody's: a server that starts has none yet.
const UNSTARTED_AGE: Duration = Duration::from_secs(3600);
/// What is kept of a program's messages, bytes.
const MAX_MESSAGES_LEN: u64 = 4096;

/// A running `qemu-nbd`. Dropped, it is killed.
#[derive(Debug)]
pub struct QemuNbd {
    child: Child,
    messages: File,
    socket: PathBuf,
    /// Removed with everything in it.
    _directory: tempfile::TempDir,
}

/// Explains why a helper program could not be run.
fn cannot_run(program: &str, error: std::io::Error) -> Error {
    if error.kind() == std::io::ErrorKind::NotFound {
        return Error::Refused {
            object: program.to_owned(),
            reason: "the program is not installed".into(),
            hint: Some("it comes with QEMU's tools: Debian's package is qemu-utils".into()),
        };
    }
    Error::io("run", program, error)
}

/// Returns the first part of what a program said.
fn first_messages(messages: &mut File) -> String {
    let mut text = Vec::new();
    // without its messages the program's failure is still one
    let _ = messages.seek(SeekFrom::Start(0));
    let _ = messages.take(MAX_MESSAGES_LEN).read_to_end(&mut text);
    String::from_utf8_lossy(&text).trim().to_owned()
}

fn messages_file() -> Result<(File, Stdio)> {
    let failed = |error| Error::io("create", "a temporary file", error);
    let file = tempfile::tempfile().map_err(failed)?;
    let copy = file.try_clone().map_err(failed)?;
    Ok((file, Stdio::from(copy)))
}

/// Runs a program to its end.
fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let (mut messages, stderr) = messages_file()?;
    let status = command
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .status()
        .map_err(|error| cannot_run(&program, error))?;
    if status.success() {
        return Ok(());
    }
    Err(Error::Command { program, status: status.to_string(), stderr: first_messages(&mut messages) })
}

/// Returns the version that `qemu-img` or `qemu-nbd` says it is, such as "10.0.2".
///
/// # Errors
/// [`Error::Refused`] if it is not installed; [`Error::Command`].
pub fn tool_version(program: &str) -> Result<String> {
    let output = Command::new(program)
        .arg("--version")
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| cannot_run(program, error))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // "qemu-img version 10.0.2 (Debian 1:10.0.2+ds-2)", and of qemu-nbd without "version"
    let is_version = |word: &&str| word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('.');
    let found = text.lines().next().and_then(|line| line.split_whitespace().find(is_version));
    found.map(str::to_owned).ok_or_else(|| Error::Command {
        program: program.to_owned(),
        status: output.status.to_string(),
        stderr: format!("it does not say its version: {}", text.trim()),
    })
}

/// Returns the directories below `parent` in which a server listened that is gone. `now_ms` is since 1970.
pub fn stale_directories(parent: &Path, now_ms: i64) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(parent) else { return Vec::new() };
    let named = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with(DIRECTORY_PREFIX))
    };
    let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(named).collect();
    found.retain(|path| is_stale(path, now_ms));
    found.sort();
    found
}

/// A number that another process got meanwhile keeps a directory, which does no harm.
fn is_stale(directory: &Path, now_ms: i64) -> bool {
    if let Ok(text) = std::fs::read_to_string(directory.join("pid")) {
        let process = text.trim().parse().ok().and_then(rustix::process::Pid::from_raw);
        let alive = process.map(rustix::process::test_kill_process);
        return alive == Some(Err(rustix::io::Errno::SRCH));
    }
    let Ok(metadata) = std::fs::symlink_metadata(directory) else { return false };
    let modified_ms = std::os::unix::fs::MetadataExt::mtime(&metadata).saturating_mul(1000);
    let age = u64::try_from(now_ms.saturating_sub(modified_ms)).unwrap_or(0);
    metadata.is_dir() && Duration::from_millis(age) > UNSTARTED_AGE
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| Error::io("find the path of", path.display(), error))
}

/// Creates an empty qcow2 image of `size` bytes of disk; the file must not exist.
///
/// # Errors
/// [`Error::Command`] with what `qemu-img` says.
pub fn create_qcow2(path: &Path, size: u64) -> Result<()> {
    let path = absolute(path)?;
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", "compat=1.1,lazy_refcounts=off", "--"])
        .arg(&path)
        .arg(size.to_string()))?;
    // a disk's content is its owner's, as in a raw image; there is none in it yet
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))
        .map_err(|error| Error::io("set the mode of", path.display(), error))
}

impl QemuNbd {
    /// Serves an image for writing. Zeroes that are written leave the image unallocated.
    ///
    /// # Errors
    /// [`Error::Command`] with what `qemu-nbd` says; [`Error::Cancelled`].
    pub fn writable(image: &Path, format: &str, monitor: &dyn Monitor) -> Result<Self> {
        let mut command = Command::new("qemu-nbd");
        // a restore is made durable once, at its end
        command.args(["--cache=writeback", "--discard=unmap", "--detect-zeroes=unmap"]);
        Self::start(command, image, format, monitor)
    }

    /// Serves an image for reading, with its persistent dirty bitmaps of these names. As long as it runs, nobody can write
    /// the image.
    ///
    /// # Errors
    /// [`Error::Command`] with what `qemu-nbd` says: a bitmap is missing or inconsistent, or the image is in use;
    /// [`Error::Cancelled`].
    pub fn readable(image: &Path, format: &str, bitmaps: &[&str], monitor: &dyn Monitor) -> Result<Self> {
        let mut command = Command::new("qemu-nbd");
        command.arg("--read-only");
        for bitmap in bitmaps {
            command.arg(format!("--bitmap={bitmap}"));
        }
        Self::start(command, image, format, monitor)
    }

    fn start(mut command: Command, image: &Path, format: &str, monitor: &dyn Monitor) -> Result<Self> {
        let image = absolute(image)?;
        let file = image.to_str().ok_or_else(|| Error::Refused {
            object: image.display().to_string(),
            reason: "its name is not UTF-8, and QEMU takes no other".into(),
            hint: None,
        })?;
        let host_device = std::fs::metadata(&image)
            .is_ok_and(|found| std::os::unix::fs::FileTypeExt::is_block_device(&found.file_type()));
        let driver = if host_device { "host_device" } else { "file" };
        let description = json!({ "driver": format, "file": { "driver": driver, "filename": file } });
        let directory = tempfile::Builder::new()
            .prefix(DIRECTORY_PREFIX)
            .tempdir()
            .map_err(|error| Error::io("create", "a temporary directory", error))?;
        let socket = directory.path().join("s");
        let pid_file = directory.path().join("pid");
        let (messages, stderr) = messages_file()?;
        let child = command
            .args(["--export-name", EXPORT, "--socket"])
            .arg(&socket)
            .arg("--pid-file")
            .arg(&pid_file)
            .arg(format!("json:{description}"))
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .map_err(|error| cannot_run("qemu-nbd", error))?;
        let mut server = Self { child, messages, socket, _directory: directory };
        server.wait_until_it_listens(&pid_file, monitor)?;
        Ok(server)
    }

    /// `pid_file` is written after it listens; the socket is there a moment before.
    fn wait_until_it_listens(&mut self, pid_file: &Path, monitor: &dyn Monitor) -> Result<()> {
        let start = Instant::now();
        while !pid_file.exists() {
            monitor.check()?;
            if let Some(status) = self.try_wait()? {
                return Err(self.failure(&status.to_string()));
            }
            if start.elapsed() > START_TIMEOUT {
                let status = format!("it does not listen after {} s", START_TIMEOUT.as_secs());
                return Err(self.failure(&status));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().map_err(|error| Error::io("wait for", "qemu-nbd", error))
    }

    fn failure(&mut self, status: &str) -> Error {
        Error::Command {
            program: "qemu-nbd".into(),
            status: status.to_owned(),
            stderr: first_messages(&mut self.messages),
        }
    }

    /// Returns where it listens.
    pub fn address(&self) -> Address {
        Address::Unix(self.socket.clone())
    }

    /// Returns the name of its one export.
    pub fn export(&self) -> &'static str {
        EXPORT
    }

    /// Connects to it. It serves one client and then ends.
    ///
    /// # Errors
    /// As [`Connection::open`]: a bitmap that is not there, too.
    pub fn connect(&self, bitmaps: &[&str], monitor: &dyn Monitor) -> Result<Connection> {
        let contexts: Vec<String> =
            bitmaps.iter().map(|bitmap| format!("{DIRTY_BITMAP_PREFIX}{bitmap}")).collect();
        Connection::open(&self.address(), EXPORT, &contexts, &Options::default(), monitor)
    }

    /// Waits until it has ended, after its client has disconnected: then the image is closed.
    ///
    /// # Errors
    /// [`Error::Command`] if it did not end well, or not in time.
    pub fn stop(mut self) -> Result<()> {
        let start = Instant::now();
        loop {
            match self.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(self.failure(&status.to_string())),
                None if start.elapsed() > STOP_TIMEOUT => {
                    let status = format!("it has not ended after {} s", STOP_TIMEOUT.as_secs());
                    return Err(self.failure(&status));
                }
                None => std::thread::sleep(POLL_INTERVAL),
            }
        }
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        // it has ended already, or is of no use any more
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_dead_servers_left_is_found() {
        let parent = tempfile::tempdir().unwrap();
        let make = |name: &str, process: Option<&str>| {
            let path = parent.path().join(name);
            std::fs::create_dir(&path).unwrap();
            process.into_iter().for_each(|id| std::fs::write(path.join("pid"), id).unwrap());
            path
        };
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let dead = make("vmkeep-nbd.dead", Some(&format!("{}\n", child.id())));
        make("vmkeep-nbd.alive", Some(&std::process::id().to_string()));
        make("other", Some("1"));
        let young = make("vmkeep-nbd.young", None);
        let made = std::os::unix::fs::MetadataExt::mtime(&std::fs::metadata(&young).unwrap()) * 1000;
        assert_eq!(stale_directories(parent.path(), made).len(), 1);
        assert_eq!(stale_directories(parent.path(), made + 3_700_000), [dead, young]);
    }

    #[test]
    fn the_tools_say_what_they_are() {
        let version = tool_version("qemu-img").unwrap();
        assert!(version.split('.').count() >= 2, "{version}");
        let error = tool_version("no-such-program").unwrap_err();
        assert!(error.to_string().contains("not installed"), "{error}");
    }
}

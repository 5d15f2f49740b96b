//! qemu-img and qemu-nbd on the images of a domain that is off.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::monitor::Monitor;

/// How long a server may take to listen.
const STARTING: Duration = Duration::from_secs(30);
const BETWEEN_LOOKS: Duration = Duration::from_millis(10);

/// A bitmap as `qemu-img info` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bitmap {
    pub name: String,
    /// It is sound and recording.
    pub serves: bool,
}

#[derive(Deserialize)]
struct Info {
    #[serde(rename = "format-specific")]
    specific: Option<Specific>,
}

#[derive(Deserialize)]
struct Specific {
    data: Option<Data>,
}

#[derive(Deserialize)]
struct Data {
    #[serde(default)]
    bitmaps: Vec<RawBitmap>,
}

#[derive(Deserialize)]
struct RawBitmap {
    name: String,
    #[serde(default)]
    flags: Vec<String>,
}

fn run(command: &mut Command) -> Result<Vec<u8>> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Error::io("run", &program, error))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Error::Command { program, status: output.status.to_string(), stderr })
}

/// Returns the bitmaps of every image of a backing chain, the active image first.
pub(super) fn bitmaps(image: &Path) -> Result<Vec<Vec<Bitmap>>> {
    let out = run(Command::new("qemu-img")
        .args(["info", "--output=json", "--backing-chain", "-f", "qcow2"])
        .arg(image))?;
    let chain: Vec<Info> = serde_json::from_slice(&out).map_err(|error| Error::Command {
        program: "qemu-img".into(),
        status: "unreadable output".into(),
        stderr: error.to_string(),
    })?;
    let of = |info: Info| {
        let found = info.specific.and_then(|specific| specific.data).map(|data| data.bitmaps);
        let flag = |raw: &RawBitmap, name: &str| raw.flags.iter().any(|flag| flag == name);
        let found = found.unwrap_or_default().into_iter();
        found
            .map(|raw| Bitmap { serves: flag(&raw, "auto") && !flag(&raw, "in-use"), name: raw.name })
            .collect()
    };
    Ok(chain.into_iter().map(of).collect())
}

/// Adds an empty bitmap that records.
pub(super) fn add_bitmap(image: &Path, name: &str) -> Result<()> {
    run(Command::new("qemu-img").args(["bitmap", "--add", "--enable", "-f", "qcow2"]).arg(image).arg(name))?;
    Ok(())
}

/// Removes a bitmap, sound or not.
pub(super) fn remove_bitmap(image: &Path, name: &str) -> Result<()> {
    run(Command::new("qemu-img").args(["bitmap", "--remove", "-f", "qcow2"]).arg(image).arg(name))?;
    Ok(())
}

/// A server of one image, read-only; while it runs nobody can write the image.
pub(super) struct Server {
    child: Child,
}

impl Server {
    /// Serves an image as `export`.
    pub fn start(
        image: &Path,
        (format, export): (&str, &str),
        bitmap: Option<&str>,
        socket: &Path,
        monitor: &dyn Monitor,
    ) -> Result<Self> {
        let messages = PathBuf::from(format!("{}.log", socket.display()));
        let log =
            fs::File::create(&messages).map_err(|error| Error::io("create", messages.display(), error))?;
        let mut command = Command::new("qemu-nbd");
        command.env("LC_ALL", "C").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        // not persistent: it ends with its only client, even if that is killed
        command.args(["--read-only", "--format", format, "--export-name", export, "--socket"]).arg(socket);
        if let Some(bitmap) = bitmap {
            command.args(["--bitmap", bitmap]);
        }
        let child = command.arg(image).spawn().map_err(|error| Error::io("run", "qemu-nbd", error))?;
        let mut server = Self { child };
        let patience = Instant::now();
        while !socket.exists() {
            monitor.check()?;
            let ended = server.child.try_wait().map_err(|error| Error::io("wait for", "qemu-nbd", error))?;
            if ended.is_some() || patience.elapsed() > STARTING {
                let status = ended.map_or("no socket".to_owned(), |status| status.to_string());
                let stderr = fs::read_to_string(&messages).unwrap_or_default().trim().to_owned();
                return Err(Error::Command { program: "qemu-nbd".into(), status, stderr });
            }
            thread::sleep(BETWEEN_LOOKS);
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! The dirty bitmaps in the images of a domain that is off, by `qemu-img`.

use std::path::Path;
use std::process::{Command, Stdio};

use serde::Deserialize;

use crate::error::{Error, Result};

/// A bitmap as `qemu-img info` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bitmap {
    pub name: String,
    /// It is sound and recording.
    pub serves: bool,
    /// A QEMU has it in use, or died when it had: of a domain that is off, it is inconsistent.
    pub in_use: bool,
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
///
/// # Errors
/// [`Error::Command`] with what `qemu-img` says, as for the others.
pub(super) fn list(image: &Path) -> Result<Vec<Vec<Bitmap>>> {
    list_with(image, &[])
}

/// As [`list`], of an image that a QEMU has open. It shows the bitmaps that were there when that QEMU opened it and
/// were not removed since, all of them in use; new ones are written when it closes the image.
///
/// # Errors
/// As [`list`].
pub(super) fn list_in_use(image: &Path) -> Result<Vec<Vec<Bitmap>>> {
    list_with(image, &["--force-share"])
}

fn list_with(image: &Path, options: &[&str]) -> Result<Vec<Vec<Bitmap>>> {
    let out = run(Command::new("qemu-img")
        .args(["info", "--output=json", "--backing-chain", "-f", "qcow2"])
        .args(options)
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
            .map(|raw| {
                let in_use = flag(&raw, "in-use");
                Bitmap { serves: flag(&raw, "auto") && !in_use, in_use, name: raw.name }
            })
            .collect()
    };
    Ok(chain.into_iter().map(of).collect())
}

/// Adds an empty bitmap that records.
pub(super) fn add(image: &Path, name: &str) -> Result<()> {
    run(Command::new("qemu-img").args(["bitmap", "--add", "--enable", "-f", "qcow2"]).arg(image).arg(name))?;
    Ok(())
}

/// Removes a bitmap, sound or not.
pub(super) fn remove(image: &Path, name: &str) -> Result<()> {
    run(Command::new("qemu-img").args(["bitmap", "--remove", "-f", "qcow2"]).arg(image).arg(name))?;
    Ok(())
}

//! Restoring a point by looking its manifests up: no other point is read, nothing is replayed.

mod raw;
mod target;

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::{Context, Error, Result};
use crate::extent::ByteRange;
use crate::format::point::{DiskRecord, PointRecord};
use crate::monitor::Monitor;
pub use crate::ops::content::OnDamage;
use crate::ops::content::{DiskBytes, DiskRead, Sink, read_disk};
use crate::ops::diff::data_len;
use crate::repo::Repository;
use crate::repo::reader::ChunkReader;
use target::{DiskTarget, open_target};

/// Format of restored image files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    #[default]
    Raw,
    Qcow2,
}

/// Where to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RestoreOutput {
    /// Every disk as `<disk>.<format>`, with the domain's XML and side files.
    Directory(PathBuf),
    /// Each named disk into a file or block device.
    Targets(Vec<(String, PathBuf)>),
}

/// How.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreOptions {
    pub output: RestoreOutput,
    /// Only these disks; empty: all.
    pub disks: Vec<String>,
    pub format: ImageFormat,
    /// Write over files that exist.
    pub force: bool,
    /// What to do where content is lost.
    pub on_damage: OnDamage,
    pub dry_run: bool,
}

/// One disk that was restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RestoredDisk {
    pub disk: String,
    pub target: PathBuf,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes that are not zero by the manifest.
    pub data_bytes: u64,
    /// What is lost and was written as zeroes: first byte and length of each range.
    pub missing: Vec<(u64, u64)>,
}

/// A side file of which something is lost. It was not written: half of a firmware's variables is worse than none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LostFile {
    pub file: String,
    pub target: PathBuf,
    /// Bytes of the file.
    pub size: u64,
    /// What was not written: all of it.
    pub missing: Vec<(u64, u64)>,
}

/// What was restored.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct RestoreReport {
    pub disks: Vec<RestoredDisk>,
    /// Side files: XML, firmware variables; maps of what is missing.
    pub files: Vec<PathBuf>,
    /// Side files that are not there.
    pub lost_files: Vec<LostFile>,
    pub dry_run: bool,
}

impl RestoreReport {
    /// Returns true if nothing is missing.
    pub fn is_whole(&self) -> bool {
        self.lost_files.is_empty() && self.disks.iter().all(|disk| disk.missing.is_empty())
    }
}

/// A target as what takes content.
struct Target<'a>(&'a dyn DiskTarget);

impl Sink for Target<'_> {
    fn write(&self, contents: Vec<DiskBytes>) -> Result<()> {
        self.0.write(contents)
    }

    fn zero(&self, range: ByteRange) -> Result<()> {
        self.0.zero(range)
    }
}

/// Restores disks of a point. Every chunk is checked against its id before it is written.
///
/// # Errors
/// [`Error::NotFound`] for a disk that the point does not have; [`Error::Exists`] for a file that is there
/// already; damage, naming disk and range; those of the targets. An unfinished file does not get its name.
pub fn restore(
    repository: &Repository,
    record: &PointRecord,
    options: &RestoreOptions,
    monitor: &dyn Monitor,
) -> Result<RestoreReport> {
    let jobs = plan(record, options)?;
    let mut report = RestoreReport { dry_run: options.dry_run, ..RestoreReport::default() };
    let (_, view) = repository.refresh_to_read(monitor)?;
    let reader = ChunkReader::new(repository, &view);
    if let (RestoreOutput::Directory(dir), false) = (&options.output, options.dry_run) {
        std::fs::create_dir_all(dir).map_err(|source| Error::io("create", dir.display(), source))?;
    }
    for (disk, path) in jobs {
        let read = if options.dry_run {
            let data_bytes = data_len(repository, &reader, &disk.manifest, monitor)?;
            DiskRead { data_bytes, ..DiskRead::default() }
        } else {
            restore_disk(&reader, record, disk, &path, options, monitor)?
        };
        let (disk, size, data_bytes) = (disk.target.clone(), disk.manifest.size, read.data_bytes);
        let missing: Vec<(u64, u64)> =
            read.missing.iter().map(|range| (range.start(), range.len())).collect();
        let map = match &options.output {
            RestoreOutput::Directory(dir) => Some(dir.join(format!("{disk}.missing"))),
            // beside the file; there is no place beside a device
            RestoreOutput::Targets(_) if path.is_file() => {
                let mut name = path.clone().into_os_string();
                name.push(".missing");
                Some(name.into())
            }
            RestoreOutput::Targets(_) => None,
        };
        if let (false, Some(map)) = (options.dry_run, map) {
            report.files.extend(settle_map(map, &missing, options.force)?);
        }
        report.disks.push(RestoredDisk { disk, target: path, size, data_bytes, missing });
    }
    if let RestoreOutput::Directory(dir) = &options.output {
        restore_side_files(&reader, record, dir, options, monitor, &mut report)?;
    }
    Ok(report)
}

fn plan<'a>(record: &'a PointRecord, options: &RestoreOptions) -> Result<Vec<(&'a DiskRecord, PathBuf)>> {
    let find = |name: &str| {
        record.disks.iter().find(|disk| disk.target == name).ok_or_else(|| Error::NotFound {
            object: format!(
                "disk {name} of point {} (it has {})",
                record.id.short(),
                record.disks.iter().map(|disk| disk.target.as_str()).collect::<Vec<_>>().join(", ")
            ),
        })
    };
    match &options.output {
        RestoreOutput::Targets(targets) => {
            targets.iter().map(|(name, path)| Ok((find(name)?, path.clone()))).collect()
        }
        RestoreOutput::Directory(dir) => {
            let extension = match options.format {
                ImageFormat::Raw => "raw",
                ImageFormat::Qcow2 => "qcow2",
            };
            let wanted: Vec<&DiskRecord> = if options.disks.is_empty() {
                record.disks.iter().collect()
            } else {
                options.disks.iter().map(|name| find(name)).collect::<Result<_>>()?
            };
            Ok(wanted
                .into_iter()
                .map(|disk| (disk, dir.join(format!("{}.{extension}", disk.target))))
                .collect())
        }
    }
}

/// Returns the map of what is missing: a line for each range, its first byte and its length in decimal digits.
fn missing_map(missing: &[(u64, u64)]) -> String {
    missing.iter().map(|(start, len)| format!("{start} {len}\n")).collect()
}

/// Writes the map of what is missing, or removes the one that an earlier restore left: it would be wrong beside what is whole.
fn settle_map(map: PathBuf, missing: &[(u64, u64)], force: bool) -> Result<Option<PathBuf>> {
    if !missing.is_empty() {
        target::write_small_file(&map, missing_map(missing).as_bytes(), force)?;
        return Ok(Some(map));
    }
    // without force, what is there is not ours to remove
    match if force { std::fs::remove_file(&map) } else { Ok(()) } {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("remove", map.display(), source))
        }
        _ => Ok(None),
    }
}

fn restore_disk(
    reader: &ChunkReader<'_>,
    record: &PointRecord,
    disk: &DiskRecord,
    path: &Path,
    options: &RestoreOptions,
    monitor: &dyn Monitor,
) -> Result<DiskRead> {
    let target = open_target(path, disk.manifest.size, options.format, options.force, monitor)?;
    let label = format!("{} of {}", disk.target, record.domain);
    let task = monitor.start(&label, disk.manifest.size);
    let sink = Target(target.as_ref());
    let advance = |bytes| monitor.advance(task, bytes);
    let written = read_disk(reader, &disk.manifest, &sink, options.on_damage, monitor, &advance);
    monitor.finish(task);
    let done = written.and_then(|read| target.finish(monitor).map(|()| read));
    done.context(|| format!("while restoring {label} to {}", path.display()))
}

fn restore_side_files(
    reader: &ChunkReader<'_>,
    record: &PointRecord,
    dir: &Path,
    options: &RestoreOptions,
    monitor: &dyn Monitor,
    report: &mut RestoreReport,
) -> Result<()> {
    let xml = [("domain.xml", &record.xml_inactive), ("domain-live.xml", &record.xml_live)];
    for (name, content) in xml {
        let Some(content) = content else { continue };
        let path = dir.join(name);
        if !options.dry_run {
            target::write_small_file(&path, content.as_bytes(), options.force)?;
        }
        report.files.push(path);
    }
    for file in &record.files {
        let path = dir.join(&file.name);
        let mut missing = Vec::new();
        if !options.dry_run {
            let target = open_target(&path, file.manifest.size, ImageFormat::Raw, options.force, monitor)?;
            let sink = Target(target.as_ref());
            let read = read_disk(reader, &file.manifest, &sink, OnDamage::Fail, monitor, &|_| {});
            match read.and_then(|_| target.finish(monitor)) {
                Ok(()) => {}
                Err(error) if options.on_damage == OnDamage::Zero && error.is_damage() => {
                    monitor.warn(&format!("{} is lost: {error}", path.display()));
                    missing.push((0, file.manifest.size));
                }
                Err(error) => {
                    return Err(error).context(|| format!("while restoring {}", path.display()));
                }
            }
            let map = dir.join(format!("{}.missing", file.name));
            report.files.extend(settle_map(map, &missing, options.force)?);
        }
        if missing.is_empty() {
            report.files.push(path);
        } else {
            let (file, size) = (file.name.clone(), file.manifest.size);
            report.lost_files.push(LostFile { file, target: path, size, missing });
        }
    }
    Ok(())
}

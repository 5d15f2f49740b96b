//! Restoring a point by looking its manifests up: no other point is read, nothing is replayed.

mod target;

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crossbeam_channel::{Receiver, bounded};
use serde::Serialize;

use crate::error::{Context, Error, Result};
use crate::extent::ByteRange;
use crate::format::node::ChunkKind;
use crate::format::point::{DiskRecord, Manifest, PointRecord};
use crate::id::ChunkId;
use crate::manifest::{Cursor, EntryRef};
use crate::monitor::Monitor;
use crate::repo::Repository;
use crate::repo::reader::ChunkReader;
use crate::repo::view::View;
use target::{DiskTarget, open_target};

/// Disk content in one batch of look-ups, bytes.
const BATCH_LEN: u64 = 4 << 20;
/// Entries in one batch.
const BATCH_ENTRIES: usize = 1024;
/// Batches that wait for a worker; a batch holds ids, not content.
const BATCH_QUEUE: usize = 4;

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
}

/// What was restored.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct RestoreReport {
    pub disks: Vec<RestoredDisk>,
    /// Side files: XML, firmware variables.
    pub files: Vec<PathBuf>,
    pub dry_run: bool,
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
    let (_, view) = repository.refresh(monitor)?;
    let reader = ChunkReader::new(repository, &view);
    if let (RestoreOutput::Directory(dir), false) = (&options.output, options.dry_run) {
        std::fs::create_dir_all(dir).map_err(|source| Error::io("create", dir.display(), source))?;
    }
    for (disk, path) in jobs {
        let data_bytes = if options.dry_run {
            data_len(repository, &reader, &disk.manifest)?
        } else {
            restore_disk(repository, &reader, record, disk, &path, options, monitor)?
        };
        let (disk, size) = (disk.target.clone(), disk.manifest.size);
        report.disks.push(RestoredDisk { disk, target: path, size, data_bytes });
    }
    if let RestoreOutput::Directory(dir) = &options.output {
        report.files = restore_side_files(repository, &view, record, dir, options, monitor)?;
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

fn data_len(repository: &Repository, reader: &ChunkReader<'_>, manifest: &Manifest) -> Result<u64> {
    let Some(whole) = ByteRange::new(0, manifest.size) else { return Ok(0) };
    let mut cursor = Cursor::new(repository.geometry(), manifest, reader)?;
    let mut total = 0;
    for piece in cursor.entries(whole) {
        let (range, entry) = piece?;
        if entry != EntryRef::Zero {
            total += range.len();
        }
    }
    Ok(total)
}

fn restore_disk(
    repository: &Repository,
    reader: &ChunkReader<'_>,
    record: &PointRecord,
    disk: &DiskRecord,
    path: &Path,
    options: &RestoreOptions,
    monitor: &dyn Monitor,
) -> Result<u64> {
    let target = open_target(path, disk.manifest.size, options.format, options.force, monitor)?;
    let label = format!("{} of {}", disk.target, record.domain);
    let task = monitor.start(&label, disk.manifest.size);
    let written = write_disk(repository, reader, &disk.manifest, target.as_ref(), monitor, &|bytes| {
        monitor.advance(task, bytes);
    });
    monitor.finish(task);
    let done = written.and_then(|bytes| target.finish(monitor).map(|()| bytes));
    done.context(|| format!("while restoring {label} to {}", path.display()))
}

/// A piece of a disk that has to be written.
type Piece = (ByteRange, EntryRef);

/// Writes a disk's content; returns how many bytes were not zero.
fn write_disk(
    repository: &Repository,
    reader: &ChunkReader<'_>,
    manifest: &Manifest,
    target: &dyn DiskTarget,
    monitor: &dyn Monitor,
    advance: &(dyn Fn(u64) + Sync),
) -> Result<u64> {
    let Some(whole) = ByteRange::new(0, manifest.size) else { return Ok(0) };
    let failure: Mutex<Option<Error>> = Mutex::new(None);
    let result = std::thread::scope(|scope| {
        let (sender, receiver) = bounded::<Vec<Piece>>(BATCH_QUEUE);
        for _ in 0..std::thread::available_parallelism().map_or(2, std::num::NonZero::get).clamp(1, 16) {
            let (receiver, failure) = (receiver.clone(), &failure);
            scope.spawn(move || {
                if let Err(error) = write_batches(reader, &receiver, target, monitor, advance)
                    && let Ok(mut slot) = failure.lock()
                {
                    slot.get_or_insert(error);
                }
            });
        }
        drop(receiver);
        let mut cursor = Cursor::new(repository.geometry(), manifest, reader)?;
        let mut data_bytes = 0;
        let (mut batch, mut batch_len) = (Vec::new(), 0);
        for piece in cursor.entries(whole) {
            monitor.check()?;
            let (range, entry) = piece?;
            if entry == EntryRef::Zero {
                batch.push((range, entry));
            } else {
                data_bytes += range.len();
                batch_len += range.len();
                batch.push((range, entry));
            }
            if batch_len >= BATCH_LEN || batch.len() >= BATCH_ENTRIES {
                // the workers are gone only after a failure, which is in its slot
                sender.send(std::mem::take(&mut batch)).map_err(|_| Error::Cancelled)?;
                batch_len = 0;
            }
        }
        sender.send(batch).map_err(|_| Error::Cancelled)?;
        Ok(data_bytes)
    });
    match failure.into_inner() {
        Ok(Some(error)) => Err(error),
        _ => result,
    }
}

fn write_batches(
    reader: &ChunkReader<'_>,
    batches: &Receiver<Vec<Piece>>,
    target: &dyn DiskTarget,
    monitor: &dyn Monitor,
    advance: &dyn Fn(u64),
) -> Result<()> {
    for batch in batches {
        monitor.check()?;
        let ids: Vec<ChunkId> = batch
            .iter()
            .filter_map(|(_, entry)| match entry {
                EntryRef::Chunk { id, .. } => Some(*id),
                _ => None,
            })
            .collect();
        let mut places = reader.locate(&ids)?.into_iter();
        for (range, entry) in &batch {
            match entry {
                EntryRef::Zero => target.zero(*range)?,
                EntryRef::Unreadable => {
                    let what = format!("bytes {range} could not be recovered when this point was repaired");
                    return Err(Error::Damaged(what));
                }
                EntryRef::Chunk { id, offset } => {
                    let places = places.next().unwrap_or_default();
                    let chunk = reader
                        .read_at(ChunkKind::Data, *id, &places)
                        .context(|| format!("bytes {range} cannot be read"))?;
                    let start = *offset as usize;
                    let len = usize::try_from(range.len()).unwrap_or(usize::MAX);
                    let content = chunk.get(start..start.saturating_add(len)).ok_or_else(|| {
                        let what = format!("bytes {range} are beyond the end of chunk {id}");
                        Error::Damaged(what)
                    })?;
                    target.write(range.start(), content)?;
                }
            }
            advance(range.len());
        }
    }
    Ok(())
}

fn restore_side_files(
    repository: &Repository,
    view: &View,
    record: &PointRecord,
    dir: &Path,
    options: &RestoreOptions,
    monitor: &dyn Monitor,
) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let xml = [("domain.xml", &record.xml_inactive), ("domain-live.xml", &record.xml_live)];
    for (name, content) in xml {
        let Some(content) = content else { continue };
        let path = dir.join(name);
        if !options.dry_run {
            target::write_small_file(&path, content.as_bytes(), options.force)?;
        }
        files.push(path);
    }
    let reader = ChunkReader::new(repository, view);
    for file in &record.files {
        let path = dir.join(&file.name);
        if !options.dry_run {
            let target = open_target(&path, file.manifest.size, ImageFormat::Raw, options.force, monitor)?;
            write_disk(repository, &reader, &file.manifest, target.as_ref(), monitor, &|_| {})
                .and_then(|_| target.finish(monitor))
                .context(|| format!("while restoring {}", path.display()))?;
        }
        files.push(path);
    }
    Ok(files)
}

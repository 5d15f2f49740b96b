//! Backing up one image file, block device or NBD export as a domain's disk, without libvirt.

use std::path::PathBuf;

use super::{BackupReport, usable_points};
use crate::error::{Context, Error, Result};
use crate::extent::RangeSet;
use crate::format::point::{Consistency, Level, PointStats, SourceKind};
use crate::format::session::SessionKind;
use crate::monitor::Monitor;
use crate::nbd::NbdUri;
use crate::ops::RequestedLevel;
use crate::ops::levels::{self, newest_manifest};
use crate::ops::record::{self, DiskJob, PointJob};
use crate::repo::Repository;
use crate::repo::ingest::{IngestInput, candidates};
use crate::repo::session::Session;
use crate::source::DiskSource;
use crate::source::image::{self, ImageFileFormat};
use crate::source::nbd::NbdDisk;

/// What to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageInput {
    /// An image file; without a format, its first bytes say whether it is qcow2.
    File { path: PathBuf, format: Option<ImageFileFormat> },
    /// A block device.
    Block(PathBuf),
    /// An export of an NBD server.
    Nbd(NbdUri),
}

/// How.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageBackupOptions {
    /// Name of the domain that the point belongs to.
    pub domain: String,
    /// Target name of the disk.
    pub disk: String,
    pub input: ImageInput,
    pub level: RequestedLevel,
    pub tags: Vec<String>,
    /// Bytes per second to read at most.
    pub read_limit: Option<u64>,
    pub dry_run: bool,
}

/// Why every level reads an image in full.
const NO_BITMAP: &str = "an image without a domain has no dirty bitmap";

/// Backs up one image. Every level reads all that is allocated; only what differs is stored.
///
/// # Errors
/// Those of the image and of the storage; [`Error::Fenced`] by a prune. Nothing is visible of a point that failed.
pub fn backup_image(
    repository: &Repository,
    options: &ImageBackupOptions,
    monitor: &dyn Monitor,
) -> Result<BackupReport> {
    if options.level == RequestedLevel::Is(Level::Latest) {
        return Err(Error::Usage("level latest is about checkpoints of a domain; an image has none".into()));
    }
    let (mut source, format, kind) = open(&options.input, monitor)?;
    if options.dry_run {
        return dry_run(repository, options, source.as_mut(), (format, kind), monitor);
    }
    back_up(repository, options, source.as_mut(), (format, kind), false, monitor)
}

/// Backs up what `source` reads as a disk; `options.input` is not looked at. The source's own dirty bitmap is trusted: it
/// has to begin at the instant of the domain's newest point. The point is recorded as a full nevertheless, because no
/// checkpoint says where the bitmap began.
///
/// # Errors
/// As for [`backup_image`].
pub fn backup_source(
    repository: &Repository,
    options: &ImageBackupOptions,
    source: &mut dyn DiskSource,
    monitor: &dyn Monitor,
) -> Result<BackupReport> {
    back_up(repository, options, source, ("raw".into(), SourceKind::Block), true, monitor)
}

fn back_up(
    repository: &Repository,
    options: &ImageBackupOptions,
    source: &mut dyn DiskSource,
    (format, kind): (String, SourceKind),
    trust_bitmap: bool,
    monitor: &dyn Monitor,
) -> Result<BackupReport> {
    let (session, catalog, view) = Session::begin_and_look(repository, SessionKind::Backup, monitor)?;
    let points = usable_points(&catalog, &view, &options.domain);
    let (job, level, made_full) = point_job(repository, options, &points, kind)?;
    let disk = DiskJob {
        target: options.disk.clone(),
        format,
        level,
        full_reason: (level != job.level).then(|| NO_BITMAP.to_owned()),
        has_bitmap: trust_bitmap,
        source,
        predecessor: newest_manifest(&points, &options.disk),
        trust_bitmap,
        recut: options.level == RequestedLevel::Is(Level::Full),
    };
    let mut report =
        record::record_point(repository, session, &view, job, vec![disk], &mut || Ok(()), monitor)
            .context(|| format!("while backing up {}", options.domain))?;
    report.warnings.extend(made_full);
    repository.grow_reserve(monitor);
    Ok(report)
}

pub(in crate::ops) type Opened = (Box<dyn DiskSource>, String, SourceKind);

/// Opens an image: its content, format and kind.
pub(in crate::ops) fn open(input: &ImageInput, monitor: &dyn Monitor) -> Result<Opened> {
    match input {
        ImageInput::File { path, format } => {
            let format = match format {
                Some(format) => *format,
                None => image::detect_format(path)?,
            };
            let source = image::open_image(path, format, monitor)?;
            Ok((source, format.as_str().to_owned(), SourceKind::File))
        }
        ImageInput::Block(path) => Ok((image::open_block(path)?, "raw".into(), SourceKind::Block)),
        ImageInput::Nbd(uri) => {
            let disk = NbdDisk::open(&uri.address, &uri.export, None, uri.to_string(), monitor)?;
            Ok((Box::new(disk), "raw".into(), SourceKind::Nbd))
        }
    }
}

/// Returns the point to be made, the level of its disk, and what to say if the point is a full unasked.
fn point_job(
    repository: &Repository,
    options: &ImageBackupOptions,
    points: &[super::PointEntry],
    source: SourceKind,
) -> Result<(PointJob, Level, Option<String>)> {
    let mut plan = levels::plan(points, options.level, false, None)?;
    plan.settle(false);
    let disk_level = if plan.level == Level::Copy { Level::Copy } else { Level::Full };
    let job = PointJob {
        domain: options.domain.clone(),
        domain_uuid: None,
        time_ms: (repository.environment().now_ms)(),
        level: plan.level,
        base: plan.base,
        predecessor: points.last().map(|entry| entry.record.id),
        checkpoint: None,
        source,
        consistency: Consistency::Crash,
        files: Vec::new(),
        xml_inactive: None,
        xml_live: None,
        tags: options.tags.clone(),
        read_limit: options.read_limit,
    };
    let made_full = plan.full_reason.map(|reason| format!("made a full: {reason}"));
    Ok((job, disk_level, made_full))
}

fn dry_run(
    repository: &Repository,
    options: &ImageBackupOptions,
    source: &mut dyn DiskSource,
    (format, kind): (String, SourceKind),
    monitor: &dyn Monitor,
) -> Result<BackupReport> {
    let (catalog, view) = repository.refresh(monitor)?;
    let points = usable_points(&catalog, &view, &options.domain);
    let (job, level, made_full) = point_job(repository, options, &points, kind)?;
    let size = source.size();
    let lost = RangeSet::default();
    let mut input =
        IngestInput { source, predecessor: None, trust_bitmap: false, lost, recut: false, read_limit: None };
    let found = candidates(&mut input, monitor)?;
    let stats = PointStats {
        dirty_bytes: found.dirty_bytes(),
        read_bytes: found.read_bytes(),
        ..PointStats::default()
    };
    let planned = record::PlannedDisk {
        target: options.disk.clone(),
        format,
        size,
        level,
        full_reason: (level != job.level).then(|| NO_BITMAP.to_owned()),
        stats,
    };
    let mut report = record::planned_report(repository, &job, vec![planned])?;
    report.warnings.extend(made_full);
    Ok(report)
}

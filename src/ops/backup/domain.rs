//! Backing up a domain through libvirt.

use std::path::PathBuf;

use super::{BackupReport, PointEntry, usable_points};
use crate::error::{Context, Result};
use crate::format::point::{Consistency, Level, PointRecord, PointStats, SourceKind};
use crate::format::session::SessionKind;
use crate::id::{PointId, RepositoryId};
use crate::monitor::Monitor;
use crate::ops::RequestedLevel;
use crate::ops::levels::{self, FromBase, LevelPlan, checkpoints_to_keep, disk_manifest, newest_manifest};
use crate::ops::record::{self, DiskJob, PointJob};
use crate::repo::session::Session;
use crate::repo::view::View;
use crate::repo::{Catalog, Repository};
use crate::source::domain::{
    BackupRequest, BaseCheckpoint, DiskMode, DomainBackup, DomainDisk, DomainInfo, Freeze, Hypervisor,
};

/// What to back up and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainBackupOptions {
    /// Name of the domain.
    pub domain: String,
    pub level: RequestedLevel,
    /// For a differential: read everything that is dirty since the last full, not only since the newest point.
    pub reread: bool,
    /// The base, instead of the one that the level implies.
    pub from: Option<FromBase>,
    /// Only these disks; empty: every writable one.
    pub include: Vec<String>,
    pub exclude: Vec<String>,
    pub freeze: Freeze,
    /// Pause the domain for the instant of the point.
    pub pause: bool,
    /// Where QEMU keeps what the guest overwrites during the backup.
    pub scratch_dir: Option<PathBuf>,
    pub tags: Vec<String>,
    /// Bytes per second to read at most.
    pub read_limit: Option<u64>,
    pub dry_run: bool,
}

/// Backs up a domain as one point of one instant.
///
/// # Errors
/// Those of libvirt, of the domain's NBD server and of the storage; [`Error::Busy`](crate::error::Error::Busy) while another backup of
/// the domain runs; [`Error::Fenced`](crate::error::Error::Fenced) by a prune. Nothing is visible of a point that failed, and the domain
/// is left as it was.
pub fn backup_domain(
    repository: &Repository,
    hypervisor: &Hypervisor,
    options: &DomainBackupOptions,
    monitor: &dyn Monitor,
) -> Result<BackupReport> {
    let backup = || format!("while backing up {}", options.domain);
    if options.dry_run {
        return dry_run(repository, hypervisor, options, monitor).context(backup);
    }
    // before the first look at checkpoints: another run's new one looks like a dead run's leftover
    let _lock = repository.lock_domain(&options.domain)?;
    back_up(repository, hypervisor, options, monitor).context(backup)
}

fn back_up(
    repository: &Repository,
    hypervisor: &Hypervisor,
    options: &DomainBackupOptions,
    monitor: &dyn Monitor,
) -> Result<BackupReport> {
    let (session, catalog, view) = Session::begin_and_look(repository, SessionKind::Backup, monitor)?;
    let points = usable_points(&catalog, &view, &options.domain);
    // the points of all domains, with their XML
    drop(catalog);
    let mut plan = levels::plan(&points, options.level, options.reread, options.from.as_ref())?;
    let checkpoint =
        plan.leaves_checkpoint.then(|| checkpoint_name(repository.id(), PointId::from(session.id())));
    let request = request(repository, options, &points, &plan, checkpoint);
    let mut domain = hypervisor.begin(&request, monitor)?;
    // the instant lies just behind
    let time_ms = (repository.environment().now_ms)();
    let mut sources = domain.take_disks();
    plan.settle(sources.iter().any(|disk| matches!(disk.mode, DiskMode::Incremental { .. })));
    let job = point_job(options, &points, &plan, &domain, &sources, time_ms);
    let checkpoint = job.checkpoint.clone();
    let disks = sources.iter_mut().map(|disk| disk_job(disk, &points, &plan)).collect();
    let mut all_read = || domain.end_job(monitor);
    let mut report = record::record_point(repository, session, &view, job, disks, &mut all_read, monitor)?;
    drop(sources);
    report.excluded = domain.excluded().to_vec();
    report.warnings.extend(plan.full_reason.iter().map(|reason| format!("made a full: {reason}")));
    report.warnings.extend(domain.warnings().iter().cloned());
    let keep = checkpoints_to_keep(&points, report.record.level, checkpoint.as_deref());
    // the point is committed: what goes wrong from here on is no failure of the backup
    match domain.finish(&keep, monitor) {
        Ok(warnings) => report.warnings.extend(warnings),
        Err(error) => report.warnings.push(format!("superseded checkpoints stay for now: {error}")),
    }
    repository.grow_reserve(monitor);
    Ok(report)
}

/// Returns the name of a point's checkpoint: unique for ever, and telling repositories apart.
fn checkpoint_name(repository: RepositoryId, point: PointId) -> String {
    let hex = point.to_hex();
    format!("{}{}", checkpoint_prefix(repository), hex.get(..16).unwrap_or(&hex))
}

/// Returns what the names of all of a repository's checkpoints begin with.
pub(in crate::ops) fn checkpoint_prefix(repository: RepositoryId) -> String {
    let hex = repository.to_hex();
    format!("vmkeep-{}-", hex.get(..8).unwrap_or(&hex))
}

fn request(
    repository: &Repository,
    options: &DomainBackupOptions,
    points: &[PointEntry],
    plan: &LevelPlan,
    new_checkpoint: Option<String>,
) -> BackupRequest {
    BackupRequest {
        domain: options.domain.clone(),
        include: options.include.clone(),
        exclude: options.exclude.clone(),
        bases: plan.tracked.iter().filter_map(|entry| base_checkpoint(&entry.record)).collect(),
        new_checkpoint,
        freeze: options.freeze,
        pause: options.pause,
        scratch_dir: options.scratch_dir.clone(),
        checkpoint_prefix: checkpoint_prefix(repository.id()),
        known_checkpoints: points.iter().filter_map(|entry| entry.record.checkpoint.clone()).collect(),
    }
}

/// Returns the request for reading a domain as it is now, with what was written since a point. It leaves no checkpoint.
pub(in crate::ops) fn compare_request(
    repository: &Repository,
    catalog: &Catalog,
    view: &View,
    record: &PointRecord,
    disk: Option<&str>,
    domain: &str,
) -> BackupRequest {
    let points = usable_points(catalog, view, domain);
    BackupRequest {
        domain: domain.to_owned(),
        include: disk.map(str::to_owned).into_iter().collect(),
        exclude: Vec::new(),
        bases: base_checkpoint(record).into_iter().collect(),
        new_checkpoint: None,
        freeze: Freeze::No,
        pause: false,
        scratch_dir: None,
        checkpoint_prefix: checkpoint_prefix(repository.id()),
        known_checkpoints: points.iter().filter_map(|entry| entry.record.checkpoint.clone()).collect(),
    }
}

/// Returns the checkpoint that a point left.
pub(in crate::ops) fn base_checkpoint(record: &PointRecord) -> Option<BaseCheckpoint> {
    let tracked = record.disks.iter().filter(|disk| disk.has_bitmap);
    Some(BaseCheckpoint {
        name: record.checkpoint.clone()?,
        disks: tracked.map(|disk| (disk.target.clone(), disk.manifest.size)).collect(),
    })
}

fn point_job(
    options: &DomainBackupOptions,
    points: &[PointEntry],
    plan: &LevelPlan,
    domain: &DomainBackup,
    disks: &[DomainDisk],
    time_ms: i64,
) -> PointJob {
    let info = domain.info();
    let served = disks.iter().find_map(|disk| match &disk.mode {
        DiskMode::Incremental { checkpoint } => plan.owner_of(checkpoint),
        DiskMode::Full { .. } => None,
    });
    PointJob {
        domain: options.domain.clone(),
        domain_uuid: Some(info.uuid.clone()),
        time_ms,
        level: plan.level,
        base: plan.base.clone(),
        predecessor: served.or(points.last()).map(|entry| entry.record.id),
        checkpoint: domain.checkpoint().map(str::to_owned),
        source: if info.running { SourceKind::Running } else { SourceKind::Offline },
        consistency: consistency(info),
        files: info.nvram.iter().map(|bytes| ("nvram".to_owned(), bytes.clone())).collect(),
        xml_inactive: Some(info.xml_inactive.clone()),
        xml_live: info.xml_live.clone(),
        tags: options.tags.clone(),
        read_limit: options.read_limit,
    }
}

fn consistency(info: &DomainInfo) -> Consistency {
    match info {
        DomainInfo { running: false, .. } => Consistency::Off,
        DomainInfo { frozen: true, .. } => Consistency::Frozen,
        DomainInfo { paused: true, .. } => Consistency::Paused,
        _ => Consistency::Crash,
    }
}

/// Returns how a disk was read, and why in full if the point is neither full nor copy.
fn disk_level(mode: &DiskMode, plan: &LevelPlan) -> (Level, Option<String>) {
    let whole_point = matches!(plan.level, Level::Full | Level::Copy);
    match mode {
        DiskMode::Incremental { .. } => (plan.level, None),
        DiskMode::Full { .. } if plan.level == Level::Copy => (Level::Copy, None),
        DiskMode::Full { .. } if whole_point && plan.tracked.is_empty() => (Level::Full, None),
        DiskMode::Full { reason } => {
            (Level::Full, Some(reason.clone().unwrap_or_else(|| "no checkpoint serves as its base".into())))
        }
    }
}

fn disk_job<'a>(disk: &'a mut DomainDisk, points: &[PointEntry], plan: &LevelPlan) -> DiskJob<'a> {
    let (level, full_reason) = disk_level(&disk.mode, plan);
    let (predecessor, trust_bitmap) = match &disk.mode {
        DiskMode::Incremental { checkpoint } => {
            let owner = plan.owner_of(checkpoint).and_then(|entry| disk_manifest(entry, &disk.target));
            // without the map of that instant the bitmap says nothing
            (owner, owner.is_some())
        }
        DiskMode::Full { .. } => (newest_manifest(points, &disk.target), false),
    };
    DiskJob {
        target: disk.target.clone(),
        format: disk.format.clone(),
        level,
        full_reason,
        has_bitmap: disk.has_bitmap,
        source: disk.source.as_mut(),
        predecessor,
        trust_bitmap,
        recut: plan.is_full_by_wish(),
    }
}

fn dry_run(
    repository: &Repository,
    hypervisor: &Hypervisor,
    options: &DomainBackupOptions,
    monitor: &dyn Monitor,
) -> Result<BackupReport> {
    let (catalog, view) = repository.refresh(monitor)?;
    let points = usable_points(&catalog, &view, &options.domain);
    let mut plan = levels::plan(&points, options.level, options.reread, options.from.as_ref())?;
    let request = request(repository, options, &points, &plan, None);
    let found = hypervisor.plan(&request, monitor)?;
    plan.settle(found.disks.iter().any(|disk| matches!(disk.mode, DiskMode::Incremental { .. })));
    let job = PointJob {
        domain: options.domain.clone(),
        domain_uuid: None,
        time_ms: (repository.environment().now_ms)(),
        level: plan.level,
        base: plan.base.clone(),
        predecessor: points.last().map(|entry| entry.record.id),
        checkpoint: None,
        source: if found.running { SourceKind::Running } else { SourceKind::Offline },
        consistency: if found.running { Consistency::Crash } else { Consistency::Off },
        files: Vec::new(),
        xml_inactive: None,
        xml_live: None,
        tags: options.tags.clone(),
        read_limit: options.read_limit,
    };
    let disks = found.disks.iter().map(|disk| {
        let (level, full_reason) = disk_level(&disk.mode, &plan);
        record::PlannedDisk {
            target: disk.target.clone(),
            format: disk.format.clone(),
            size: disk.size,
            level,
            full_reason,
            stats: PointStats { dirty_bytes: disk.dirty_bytes.unwrap_or(disk.size), ..PointStats::default() },
        }
    });
    let mut report = record::planned_report(repository, &job, disks.collect())?;
    report.excluded = found.excluded;
    report.warnings = plan.full_reason.iter().map(|reason| format!("made a full: {reason}")).collect();
    report.warnings.extend(found.warnings);
    Ok(report)
}

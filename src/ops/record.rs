//! What every backup does once it knows its disks: take them in, write the record, commit.

use std::sync::Arc;

use serde::Serialize;

use crate::error::{Context, Error, Result};
use crate::format::codec;
use crate::format::node::ChunkKind;
use crate::format::point::{
    Consistency, DiskRecord, FileRecord, Level, Manifest, PointRecord, PointStats, SourceKind,
};
use crate::format::session::Outcome;
use crate::id::PointId;
use crate::monitor::Monitor;
use crate::ops::diff::diff_manifests;
use crate::ops::marked::{NewPoint, store_again};
use crate::repo::heal::{Lost, find_lost};
use crate::repo::ingest::{IngestInput, Ingested, ingest, ingest_bytes};
use crate::repo::reader::ChunkReader;
use crate::repo::rules::Rule;
use crate::repo::session::Session;
use crate::repo::view::View;
use crate::repo::writer::{SessionWriter, write_session};
use crate::repo::{PointEntry, Repository};
use crate::source::DiskSource;

/// One disk to take in.
pub(super) struct DiskJob<'a> {
    pub target: String,
    pub format: String,
    pub level: Level,
    pub full_reason: Option<String>,
    pub has_bitmap: bool,
    pub source: &'a mut dyn DiskSource,
    /// The map to compare with; with `trust_bitmap` the one at whose instant the bitmap began.
    pub predecessor: Option<Manifest>,
    pub trust_bitmap: bool,
    /// Cut anew what small writes have left in pieces: for who asks for a full. It is stored once more, which no one wants
    /// every night.
    pub recut: bool,
}

impl DiskJob<'_> {
    /// Makes it a disk that is read as a whole and compared with nothing.
    fn read_in_full(&mut self, why: &str) {
        self.predecessor = None;
        self.trust_bitmap = false;
        if self.level != Level::Full {
            self.level = Level::Full;
            self.full_reason = Some(why.to_owned());
        }
    }
}

/// All that is recorded of a point beside its disks.
#[derive(Debug, Clone)]
pub(super) struct PointJob {
    pub domain: String,
    pub domain_uuid: Option<String>,
    pub time_ms: i64,
    pub level: Level,
    pub base: Option<PointEntry>,
    pub predecessor: Option<PointId>,
    pub checkpoint: Option<String>,
    pub source: SourceKind,
    pub consistency: Consistency,
    /// Name and content of small files kept beside the disks.
    pub files: Vec<(String, Vec<u8>)>,
    pub xml_inactive: Option<String>,
    pub xml_live: Option<String>,
    pub tags: Vec<String>,
    pub read_limit: Option<u64>,
}

/// What became of one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiskReport {
    pub target: String,
    pub level: Level,
    /// Why it was read in full although the point is not a full.
    pub full_reason: Option<String>,
    /// Bytes; what is stored is only known for the point as a whole.
    pub stats: PointStats,
}

/// A point that was made, or with a dry run the one that would have been.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupReport {
    pub record: PointRecord,
    pub stats: PointStats,
    pub disks: Vec<DiskReport>,
    /// Disks that were left out, and why.
    pub excluded: Vec<(String, String)>,
    pub warnings: Vec<String>,
    pub dry_run: bool,
}

/// One disk that a dry run looked at.
#[derive(Debug)]
pub(super) struct PlannedDisk {
    pub target: String,
    pub format: String,
    /// Bytes.
    pub size: u64,
    pub level: Level,
    pub full_reason: Option<String>,
    pub stats: PointStats,
}

/// Returns what a dry run found: a record without an id, of disks without content.
///
/// # Errors
/// [`Error::Malformed`] if the point could not be recorded: a name is too long, or no name.
pub(super) fn planned_report(
    repository: &Repository,
    job: &PointJob,
    disks: Vec<PlannedDisk>,
) -> Result<BackupReport> {
    let records = disks.iter().map(|disk| DiskRecord {
        target: disk.target.clone(),
        manifest: Manifest { size: disk.size, height: 0, root: None },
        format: disk.format.clone(),
        level: disk.level,
        full_reason: disk.full_reason.clone(),
        has_bitmap: false,
    });
    let record = point_record(repository, PointId::from_bytes([0; 16]), job, records.collect(), Vec::new());
    let reports: Vec<DiskReport> = disks
        .into_iter()
        .map(|disk| DiskReport {
            target: disk.target,
            level: disk.level,
            full_reason: disk.full_reason,
            stats: disk.stats,
        })
        .collect();
    Ok(BackupReport {
        record,
        stats: sum(&reports),
        disks: reports,
        excluded: Vec::new(),
        warnings: Vec::new(),
        dry_run: true,
    })
}

/// Takes the disks in, makes everything durable and commits the point.
///
/// `all_read` is called once nothing more is read from the sources, before the commit.
///
/// # Errors
/// Those of sources and storage; [`Error::Fenced`] by a prune. Nothing is visible of a point that failed.
pub(super) fn record_point(
    repository: &Repository,
    session: Session,
    view: &View,
    job: PointJob,
    mut disks: Vec<DiskJob<'_>>,
    all_read: &mut dyn FnMut() -> Result<()>,
    monitor: &dyn Monitor,
) -> Result<BackupReport> {
    disks.sort_by(|a, b| a.target.cmp(&b.target));
    let reader = ChunkReader::new(repository, view);
    let id = session.id();
    let mut session = Some(session);
    let ((record, mut reports), mut written) = write_session(repository, &reader, id, |writer| {
        let (records, reports) =
            take_in_disks(repository, &reader, writer, &mut disks, job.read_limit, monitor)?;
        all_read()?;
        let files = take_in_files(repository, &reader, writer, &job.files, monitor)?;
        let record = point_record(repository, PointId::from(id), &job, records, files);
        record.check().map_err(|fault| Error::malformed(format!("the record of {}", job.domain), fault))?;
        let copy =
            codec::encode(&record).map_err(|fault| Error::malformed("the record of the point", fault))?;
        for part in copy.chunks(crate::format::limits::MAX_CHUNK_LEN as usize) {
            writer.put_metadata(ChunkKind::Point, part)?;
        }
        if repository.breaks(Rule::CommitLast) {
            commit(&mut session, &record, sum(&reports))?;
        }
        Ok((record, reports))
    })?;
    let mut stats = sum(&reports);
    if let Some(base) = job.base.as_ref().filter(|_| job.level == Level::Differential) {
        let reader = reader.with_own_metadata(view, &written.segments)?;
        for report in &mut reports {
            let since = since_base(repository, &reader, &base.record, &record, &report.target, monitor)?;
            report.stats.since_base_bytes = Some(since);
        }
        stats.since_base_bytes =
            Some(reports.iter().filter_map(|report| report.stats.since_base_bytes).sum());
    }
    let elapsed = (repository.environment().now_ms)().saturating_sub(job.time_ms);
    stats.duration_ms = u64::try_from(elapsed).unwrap_or(0);
    // In order to be crash consistent, in this order: (1) every pack, (2) every segment: both durable, since
    // `write_session` has returned; (3) look at the marks again, and from (1) on for what is marked; (4) the outcome,
    // which makes the point.
    monitor.check()?;
    let predecessors: Vec<Option<Manifest>> = disks.iter().map(|disk| disk.predecessor).collect();
    let point = NewPoint { record: &record, predecessors: &predecessors };
    if let Some(session) = &session {
        store_again(repository, session, &reader, &point, &mut written, monitor)?;
    }
    stats.stored_bytes = written.data_bytes;
    stats.metadata_bytes = written.metadata_bytes;
    commit(&mut session, &record, stats)?;
    Ok(BackupReport {
        record,
        stats,
        disks: reports,
        excluded: Vec::new(),
        warnings: Vec::new(),
        dry_run: false,
    })
}

/// Puts the outcome, unless that is done.
fn commit(session: &mut Option<Session>, record: &PointRecord, stats: PointStats) -> Result<()> {
    let outcome = Outcome::Point { record: Arc::new(record.clone()), stats };
    session.take().map_or(Ok(()), |session| session.commit(&outcome))
}

fn take_in_disks(
    repository: &Repository,
    reader: &ChunkReader<'_>,
    writer: &mut SessionWriter<'_>,
    disks: &mut [DiskJob<'_>],
    read_limit: Option<u64>,
    monitor: &dyn Monitor,
) -> Result<(Vec<DiskRecord>, Vec<DiskReport>)> {
    let mut records = Vec::new();
    let mut reports = Vec::new();
    for disk in disks {
        let new_before = writer.new_bytes();
        let label = disk.source.label();
        let taken = take_in_disk(repository, reader, writer, disk, read_limit, monitor)
            .context(|| format!("while backing up {label}"))?;
        records.push(DiskRecord {
            target: disk.target.clone(),
            manifest: taken.manifest,
            format: disk.format.clone(),
            level: disk.level,
            full_reason: disk.full_reason.clone(),
            has_bitmap: disk.has_bitmap,
        });
        reports.push(DiskReport {
            target: disk.target.clone(),
            level: disk.level,
            full_reason: disk.full_reason.clone(),
            stats: PointStats {
                dirty_bytes: taken.dirty_bytes,
                read_bytes: taken.read_bytes,
                changed_bytes: taken.changed_bytes,
                new_bytes: writer.new_bytes() - new_before,
                ..PointStats::default()
            },
        });
    }
    Ok((records, reports))
}

/// Takes in one disk; what the repository has lost of its predecessor is read again. A predecessor whose map itself
/// cannot be read is none.
fn take_in_disk(
    repository: &Repository,
    reader: &ChunkReader<'_>,
    writer: &mut SessionWriter<'_>,
    disk: &mut DiskJob<'_>,
    read_limit: Option<u64>,
    monitor: &dyn Monitor,
) -> Result<Ingested> {
    let lost = match &disk.predecessor {
        Some(manifest) => find_lost(repository, reader, manifest, monitor)?,
        None => Lost::default(),
    };
    if lost.nodes {
        disk.read_in_full("the map of its last point is damaged");
    } else if !lost.ranges.is_empty() {
        let bytes = lost.ranges.total_bytes();
        monitor.note(&format!("{}: reading {bytes} bytes again that the repository has lost", disk.target));
    }
    let mut take = |disk: &mut DiskJob<'_>| {
        let mut input = IngestInput {
            source: &mut *disk.source,
            predecessor: disk.predecessor,
            trust_bitmap: disk.trust_bitmap,
            lost: lost.ranges.clone(),
            recut: disk.recut,
            read_limit,
        };
        ingest(repository, reader, writer, &mut input, monitor)
    };
    match take(disk) {
        // damage that nobody has recorded yet: content that cannot be read counts as changed, but a map does not
        Err(error) if disk.predecessor.is_some() && error.is_damage() => {
            monitor.warn(&format!("{}: the map of its last point cannot be read: {error}", disk.target));
            disk.read_in_full("the map of its last point is damaged");
            take(disk)
        }
        taken => taken,
    }
}

fn take_in_files(
    repository: &Repository,
    reader: &ChunkReader<'_>,
    writer: &mut SessionWriter<'_>,
    files: &[(String, Vec<u8>)],
    monitor: &dyn Monitor,
) -> Result<Vec<FileRecord>> {
    let mut records = Vec::new();
    for (name, bytes) in files {
        let manifest = ingest_bytes(repository, reader, writer, name, bytes.clone(), monitor)?;
        records.push(FileRecord { name: name.clone(), manifest });
    }
    Ok(records)
}

fn point_record(
    repository: &Repository,
    id: PointId,
    job: &PointJob,
    disks: Vec<DiskRecord>,
    files: Vec<FileRecord>,
) -> PointRecord {
    let environment = repository.environment();
    PointRecord {
        id,
        domain: job.domain.clone(),
        domain_uuid: job.domain_uuid.clone(),
        time_ms: job.time_ms,
        level: job.level,
        base: job.base.as_ref().map(|base| base.record.id),
        predecessor: job.predecessor,
        checkpoint: job.checkpoint.clone(),
        source: job.source,
        consistency: job.consistency,
        disks,
        files,
        xml_inactive: job.xml_inactive.as_deref().map(Arc::from),
        xml_live: job.xml_live.as_deref().map(Arc::from),
        tags: job.tags.clone(),
        host: environment.host.clone(),
        program: environment.program.clone(),
    }
}

fn sum(reports: &[DiskReport]) -> PointStats {
    reports.iter().fold(PointStats::default(), |sum, report| PointStats {
        dirty_bytes: sum.dirty_bytes + report.stats.dirty_bytes,
        read_bytes: sum.read_bytes + report.stats.read_bytes,
        changed_bytes: sum.changed_bytes + report.stats.changed_bytes,
        new_bytes: sum.new_bytes + report.stats.new_bytes,
        ..sum
    })
}

fn since_base(
    repository: &Repository,
    reader: &ChunkReader<'_>,
    base: &PointRecord,
    record: &PointRecord,
    target: &str,
    monitor: &dyn Monitor,
) -> Result<u64> {
    let manifest = |record: &PointRecord| {
        record
            .disks
            .iter()
            .find(|disk| disk.target == target)
            .map_or(Manifest { size: 0, height: 0, root: None }, |disk| disk.manifest)
    };
    let ranges = diff_manifests(repository, reader, &manifest(base), &manifest(record), monitor)?;
    Ok(ranges.total_bytes())
}

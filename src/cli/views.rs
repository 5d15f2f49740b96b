//! Points and their numbers as JSON and as text.

use serde::Serialize;
use vmkeep::format::point::{Consistency, DiskRecord, Level, PointRecord, PointStats, SourceKind};
use vmkeep::ops::PointEntry;

use super::units;

/// One disk of a point as JSON.
#[derive(Debug, Serialize)]
pub struct DiskView<'a> {
    pub disk: &'a str,
    /// Bytes.
    pub size: u64,
    pub format: &'a str,
    pub level: Level,
    pub full_reason: Option<&'a str>,
}

impl<'a> From<&'a DiskRecord> for DiskView<'a> {
    fn from(record: &'a DiskRecord) -> Self {
        Self {
            disk: &record.target,
            size: record.manifest.size,
            format: &record.format,
            level: record.level,
            full_reason: record.full_reason.as_deref(),
        }
    }
}

/// A point as JSON.
#[derive(Debug, Serialize)]
pub struct PointView<'a> {
    pub point: String,
    pub domain: &'a str,
    pub domain_uuid: Option<&'a str>,
    /// RFC 3339, UTC.
    pub time: String,
    pub level: Level,
    pub base: Option<String>,
    pub checkpoint: Option<&'a str>,
    pub source: SourceKind,
    pub consistency: Consistency,
    pub disks: Vec<DiskView<'a>>,
    pub files: Vec<&'a str>,
    pub tags: &'a [String],
    pub host: &'a str,
    pub program: &'a str,
    pub stats: &'a PointStats,
}

impl<'a> PointView<'a> {
    /// Views a point.
    pub fn new(record: &'a PointRecord, stats: &'a PointStats) -> Self {
        Self {
            point: record.id.to_hex(),
            domain: &record.domain,
            domain_uuid: record.domain_uuid.as_deref(),
            time: units::utc(record.time_ms),
            level: record.level,
            base: record.base.map(|id| id.to_hex()),
            checkpoint: record.checkpoint.as_deref(),
            source: record.source,
            consistency: record.consistency,
            disks: record.disks.iter().map(DiskView::from).collect(),
            files: record.files.iter().map(|file| file.name.as_str()).collect(),
            tags: &record.tags,
            host: &record.host,
            program: &record.program,
            stats,
        }
    }
}

impl<'a> From<&'a PointEntry> for PointView<'a> {
    fn from(entry: &'a PointEntry) -> Self {
        Self::new(&entry.record, &entry.stats)
    }
}

/// Returns the word for a level.
pub fn level(level: Level) -> &'static str {
    match level {
        Level::Full => "full",
        Level::Incremental => "incremental",
        Level::Differential => "differential",
        Level::Copy => "copy",
        Level::Latest => "latest",
    }
}

/// Returns the words for what became of the guest's file systems.
pub fn consistency(consistency: Consistency) -> &'static str {
    match consistency {
        Consistency::Crash => "as after a power cut",
        Consistency::Frozen => "file systems frozen",
        Consistency::Paused => "paused",
        Consistency::Off => "shut off",
    }
}

/// Returns the named numbers for people, each with what it means.
pub fn numbers(stats: &PointStats) -> Vec<(&'static str, String, &'static str)> {
    let mut rows = vec![
        ("dirty_bytes", units::size(stats.dirty_bytes), "marked by the bitmap, or allocated"),
        ("read_bytes", units::size(stats.read_bytes), "read from the disks"),
        ("changed_bytes", units::size(stats.changed_bytes), "differ from the predecessor, in 4 KiB blocks"),
        ("new_bytes", units::size(stats.new_bytes), "not in the repository before"),
        ("stored_bytes", units::size(stats.stored_bytes), "those, compressed"),
        ("metadata_bytes", units::size(stats.metadata_bytes), "maps and index, two copies of the maps"),
    ];
    if let Some(bytes) = stats.since_base_bytes {
        rows.push(("since_base_bytes", units::size(bytes), "differ from the base"));
    }
    rows
}

/// Returns the short word for a level, as `-l` takes it.
pub fn short_level(level: Level) -> &'static str {
    match level {
        Level::Full => "full",
        Level::Incremental => "inc",
        Level::Differential => "diff",
        Level::Copy => "copy",
        Level::Latest => "latest",
    }
}

//! What differs between two points, offline, by walking two trees; and what a disk holds.

use serde::Serialize;

use crate::error::{Context, Error, Result};
use crate::extent::{ByteRange, RangeSet};
use crate::format::point::{Manifest, PointRecord};
use crate::manifest;
use crate::monitor::Monitor;
use crate::repo::Repository;
use crate::repo::reader::ChunkReader;

/// What differs of one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiskDiff {
    pub disk: String,
    /// First byte and length of each range, in order, bytes.
    pub ranges: Vec<(u64, u64)>,
    /// Sum of their lengths.
    pub bytes: u64,
}

/// Compares the disks of two points; a disk that only one of them has differs in all that it holds.
///
/// # Errors
/// [`Error::NotFound`] if `disk` is in neither; those of reading metadata.
pub fn diff_points(
    repository: &Repository,
    a: &PointRecord,
    b: &PointRecord,
    disk: Option<&str>,
    monitor: &dyn Monitor,
) -> Result<Vec<DiskDiff>> {
    let (_, view) = repository.refresh_to_read(monitor)?;
    let reader = ChunkReader::new(repository, &view);
    let mut targets: Vec<&str> = a.disks.iter().chain(&b.disks).map(|disk| disk.target.as_str()).collect();
    targets.sort_unstable();
    targets.dedup();
    targets.retain(|target| disk.is_none_or(|wanted| wanted == *target));
    if let (Some(disk), true) = (disk, targets.is_empty()) {
        return Err(Error::NotFound {
            object: format!("disk {disk} of points {} and {}", a.id.short(), b.id.short()),
        });
    }
    let mut diffs = Vec::new();
    for target in targets {
        let (old, new) = (manifest_of(a, target), manifest_of(b, target));
        let ranges = diff_manifests(repository, &reader, &old, &new, monitor)
            .context(|| format!("while comparing disk {target}"))?;
        diffs.push(DiskDiff {
            disk: target.to_owned(),
            bytes: ranges.total_bytes(),
            ranges: ranges.iter().map(|range| (range.start(), range.len())).collect(),
        });
    }
    Ok(diffs)
}

/// Returns a disk's manifest; that of an empty disk where the point has none of that name.
fn manifest_of(record: &PointRecord, target: &str) -> Manifest {
    record
        .disks
        .iter()
        .find(|disk| disk.target == target)
        .map_or(Manifest { size: 0, height: 0, root: None }, |disk| disk.manifest)
}

/// Returns the ranges in which two maps differ.
///
/// # Errors
/// Those of reading metadata.
pub fn diff_manifests(
    repository: &Repository,
    reader: &ChunkReader<'_>,
    a: &Manifest,
    b: &Manifest,
    monitor: &dyn Monitor,
) -> Result<RangeSet> {
    let mut ranges = RangeSet::new();
    manifest::diff(repository.geometry(), a, b, reader, monitor, &mut |range| ranges.push(range))?;
    Ok(ranges)
}

/// Calls `sink` with every range of a disk that holds data, in order; touching ranges are joined.
///
/// # Errors
/// Those of reading metadata; the first of `sink`, after which it is not called again.
pub fn data_extents(
    repository: &Repository,
    disk: &Manifest,
    monitor: &dyn Monitor,
    sink: &mut dyn FnMut(ByteRange) -> Result<()>,
) -> Result<()> {
    let (_, view) = repository.refresh_to_read(monitor)?;
    let reader = ChunkReader::new(repository, &view);
    let mut failed = None;
    let mut take = |range| {
        if failed.is_none() {
            failed = sink(range).err();
        }
    };
    differences_to_zero(repository, &reader, disk, monitor, &mut take)?;
    failed.map_or(Ok(()), Err)
}

/// Returns how many bytes of a disk hold data.
///
/// # Errors
/// Those of reading metadata.
pub fn data_len(
    repository: &Repository,
    reader: &ChunkReader<'_>,
    disk: &Manifest,
    monitor: &dyn Monitor,
) -> Result<u64> {
    let mut len: u64 = 0;
    differences_to_zero(repository, reader, disk, monitor, &mut |range| {
        len = len.saturating_add(range.len())
    })?;
    Ok(len)
}

/// What holds data is what differs from a disk of that size on which everything is zero.
fn differences_to_zero(
    repository: &Repository,
    reader: &ChunkReader<'_>,
    disk: &Manifest,
    monitor: &dyn Monitor,
    sink: &mut dyn FnMut(ByteRange),
) -> Result<()> {
    let zero = Manifest { root: None, ..*disk };
    manifest::diff(repository.geometry(), &zero, disk, reader, monitor, sink)
}

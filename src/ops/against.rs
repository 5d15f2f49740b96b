//! Comparing a point with a disk: an image that was restored, or the domain itself.
//!
//! With a domain, what its dirty bitmap says was written since the point may differ; anything else that differs was
//! not noticed by the bitmap, or restored wrongly.

use serde::Serialize;

use crate::buffer::Payload;
use crate::error::{Context, Error, Result};
use crate::extent::{ByteRange, RangeSet};
use crate::format::limits::BLOCK_LEN;
use crate::format::node::ChunkKind;
use crate::format::point::{DiskRecord, PointRecord};
use crate::manifest::{Cursor, EntryRef};
use crate::monitor::Monitor;
use crate::ops::backup::{ImageInput, open_image_input};
use crate::repo::reader::ChunkReader;
use crate::repo::{Repository, is_zero};
use crate::source::DiskSource;

/// Most ranges of one disk that are reported; further ones are only counted.
const MAX_RANGES: usize = 1000;
/// A disk that differs in more places is another disk.
const MAX_PLACES: usize = 1 << 20;

/// Who lacks a disk that the other one has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Lacking {
    /// The point has no such disk: it came later, or was left out.
    Point,
    /// The domain has no such disk that can be read.
    Domain,
}

/// What comparing one disk found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Compared {
    pub disk: String,
    /// Bytes of the disk at the point, and now.
    pub size: u64,
    pub found_size: u64,
    /// Bytes that were compared.
    pub compared_bytes: u64,
    /// Bytes that differ and may: the bitmap says that they were written since.
    pub written_bytes: u64,
    /// Bytes in blocks of 4 KiB that differ and should not.
    pub differing_bytes: u64,
    /// First byte and length of ranges that differ and should not; the first thousand.
    pub differing: Vec<(u64, u64)>,
    /// Bytes that the point has lost, which cannot be compared, and their ranges as above.
    pub lost_bytes: u64,
    pub lost: Vec<(u64, u64)>,
    /// No bitmap tells what was written since the point.
    pub untracked: bool,
    /// Nothing was compared: the disk is not there.
    pub not_there: Option<Lacking>,
}

impl Compared {
    /// Returns true if nothing differs that should not.
    pub fn is_same(&self) -> bool {
        let is_whole = self.lost_bytes == 0 && self.not_there.is_none();
        is_whole && self.differing_bytes == 0 && self.size == self.found_size
    }
}

/// Returns true if disks were compared, and nothing differs that should not.
pub fn is_all_same(disks: &[Compared]) -> bool {
    !disks.is_empty() && disks.iter().all(Compared::is_same)
}

/// Returns an entry for each disk that only the point has, or only the domain: disks of the point by name and size, of which
/// `wanted` is the only one that was asked for, against those found.
#[cfg(any(feature = "libvirt", test))]
fn not_there(record: &PointRecord, wanted: Option<&str>, found: &[(String, u64)]) -> Vec<Compared> {
    let asked = record.disks.iter().filter(|disk| wanted.is_none_or(|wanted| disk.target == wanted));
    let gone = asked.filter(|disk| found.iter().all(|(target, _)| *target != disk.target)).map(|disk| {
        let (disk, size) = (disk.target.clone(), disk.manifest.size);
        Compared { disk, size, not_there: Some(Lacking::Domain), ..Compared::default() }
    });
    let new = found.iter().filter(|(target, _)| find(record, target).is_err()).map(|(target, size)| {
        let (disk, found_size) = (target.clone(), *size);
        Compared { disk, found_size, not_there: Some(Lacking::Point), ..Compared::default() }
    });
    gone.chain(new).collect()
}

/// Compares one disk of a point with an image, a block device or an export.
///
/// # Errors
/// [`Error::NotFound`] for a disk that the point does not have; those of the storage and of the image. What the point has
/// lost is no error.
pub fn against_image(
    repository: &Repository,
    record: &PointRecord,
    disk: &str,
    input: &ImageInput,
    monitor: &dyn Monitor,
) -> Result<Compared> {
    let disk = find(record, disk)?;
    let (mut source, ..) = open_image_input(input, monitor)?;
    let (_, view) = repository.refresh_to_read(monitor)?;
    let reader = ChunkReader::new(repository, &view);
    compare(repository, &reader, disk, source.as_mut(), &RangeSet::default(), monitor)
}

fn find<'a>(record: &'a PointRecord, name: &str) -> Result<&'a DiskRecord> {
    let found = record.disks.iter().find(|disk| disk.target == name);
    found.ok_or_else(|| Error::NotFound { object: format!("disk {name} of point {}", record.id.short()) })
}

/// Compares all disks of a point, or one, with what the domain has on them now. A disk that only one of the two has is
/// reported as not there.
///
/// # Errors
/// Those of libvirt, of the domain's NBD server and of the storage.
#[cfg(feature = "libvirt")]
pub fn against_domain(
    repository: &Repository,
    hypervisor: &crate::source::domain::Hypervisor,
    record: &PointRecord,
    disk: Option<&str>,
    domain: &str,
    monitor: &dyn Monitor,
) -> Result<Vec<Compared>> {
    use crate::ops::backup::compare_request;
    use crate::source::domain::DiskMode;

    let (catalog, view) = repository.refresh_to_read(monitor)?;
    let _lock = repository.lock_domain(domain)?;
    let request = compare_request(repository, &catalog, &view, record, disk, domain);
    let mut live = hypervisor.begin(&request, monitor)?;
    let mut sources = live.take_disks();
    let reader = ChunkReader::new(repository, &view);
    let found: Vec<(String, u64)> =
        sources.iter().map(|source| (source.target.clone(), source.size)).collect();
    let mut reports = Vec::new();
    let compared = sources.iter_mut().try_for_each(|source| {
        let Ok(recorded) = find(record, &source.target) else { return Ok(()) };
        let tracked = matches!(source.mode, DiskMode::Incremental { .. });
        let written =
            if tracked { source.source.dirty(monitor)?.unwrap_or_default() } else { RangeSet::default() };
        let mut report = compare(repository, &reader, recorded, source.source.as_mut(), &written, monitor)?;
        report.untracked = !tracked;
        reports.push(report);
        Ok(())
    });
    drop(sources);
    live.end_job(monitor)?;
    compared?;
    reports.extend(not_there(record, disk, &found));
    reports.sort_by(|a: &Compared, b| a.disk.cmp(&b.disk));
    Ok(reports)
}

fn compare(
    repository: &Repository,
    reader: &ChunkReader<'_>,
    disk: &DiskRecord,
    source: &mut dyn DiskSource,
    written: &RangeSet,
    monitor: &dyn Monitor,
) -> Result<Compared> {
    let label = source.label();
    let size = disk.manifest.size.min(source.size());
    let mut report = Compared {
        disk: disk.target.clone(),
        size: disk.manifest.size,
        found_size: source.size(),
        ..Compared::default()
    };
    let whole = RangeSet::whole(size);
    let data = source.data(&whole, monitor)?.intersection(&whole);
    let task = monitor.start(&label, size);
    let cursor = Cursor::new(repository.geometry(), &disk.manifest, reader)?;
    let (places, lost) = (Places::default(), Places::default());
    let mut comparison = Comparison { reader, cursor, report: &mut report, places, lost };
    for range in whole.difference(&data).iter() {
        comparison.zero(range, monitor)?;
        monitor.advance(task, range.len());
    }
    source.read(&data, monitor, &mut |range, payload| {
        monitor.check()?;
        monitor.advance(task, range.len());
        match payload {
            Payload::Zero => comparison.zero(range, monitor),
            Payload::Data(bytes) => comparison.data(range, &bytes, monitor),
        }
    })?;
    let Comparison { places: Places(places), lost: Places(lost), .. } = comparison;
    let (places, lost): (RangeSet, RangeSet) = (places.into_iter().collect(), lost.into_iter().collect());
    monitor.finish(task);
    report.compared_bytes -= lost.total_bytes();
    report.written_bytes = places.intersection(written).total_bytes();
    let differing = places.difference(written);
    (report.differing_bytes, report.differing) = (differing.total_bytes(), first_ranges(&differing));
    (report.lost_bytes, report.lost) = (lost.total_bytes(), first_ranges(&lost));
    Ok(report)
}

/// Returns the ranges that are reported: first byte and length.
fn first_ranges(ranges: &RangeSet) -> Vec<(u64, u64)> {
    ranges.iter().take(MAX_RANGES).map(|range| (range.start(), range.len())).collect()
}

/// Ranges, in the order in which they are met; neighbours are joined.
#[derive(Default)]
struct Places(Vec<ByteRange>);

impl Places {
    fn note(&mut self, range: ByteRange, disk: &str) -> Result<()> {
        let count = self.0.len();
        match self.0.last_mut() {
            Some(last) if last.end() == range.start() => {
                *last = ByteRange::between(last.start(), range.end()).unwrap_or(*last);
            }
            _ if count >= MAX_PLACES => {
                return Err(Error::Refused {
                    object: disk.to_owned(),
                    reason: format!(
                        "it differs, or the point has lost something, in more than {MAX_PLACES} places"
                    ),
                    hint: None,
                });
            }
            _ => self.0.push(range),
        }
        Ok(())
    }
}

struct Comparison<'a, 'r> {
    reader: &'a ChunkReader<'r>,
    cursor: Cursor<'a>,
    report: &'a mut Compared,
    /// Ranges that differ.
    places: Places,
    /// Ranges that the point has lost.
    lost: Places,
}

impl Comparison<'_, '_> {
    /// A range of the disk that reads as zero.
    fn zero(&mut self, range: ByteRange, monitor: &dyn Monitor) -> Result<()> {
        self.report.compared_bytes += range.len();
        for (piece, entry) in self.pieces(range, |entry| *entry != EntryRef::Zero, monitor)? {
            monitor.check()?;
            if let Some(kept) = self.content(piece, entry)? {
                self.blocks(piece, |part| kept.get(part).is_some_and(is_zero))?;
            }
        }
        Ok(())
    }

    /// Returns what the map says of a range, as far as it is wanted. The range of a node that is lost is noted.
    fn pieces(
        &mut self,
        range: ByteRange,
        wanted: impl Fn(&EntryRef) -> bool,
        monitor: &dyn Monitor,
    ) -> Result<Vec<(ByteRange, EntryRef)>> {
        let mut found = Vec::new();
        let mut position = range.start();
        while let Some(rest) = ByteRange::between(position, range.end()) {
            let mut is_lost = false;
            for piece in self.cursor.entries(rest) {
                match piece {
                    Ok((piece, entry)) => {
                        position = piece.end();
                        found.extend(wanted(&entry).then_some((piece, entry)));
                    }
                    Err(error) if error.is_damage() => is_lost = true,
                    Err(error) => return Err(error),
                }
            }
            monitor.check()?;
            if !is_lost {
                break;
            }
            let node_end = self.cursor.last_range().map(|node| node.end()).filter(|end| *end > position);
            let Some(lost) = ByteRange::between(position, node_end.unwrap_or(u64::MAX).min(range.end()))
            else {
                break;
            };
            self.lost.note(lost, &self.report.disk)?;
            position = lost.end();
        }
        Ok(found)
    }

    /// A range of the disk with its content.
    fn data(&mut self, range: ByteRange, bytes: &[u8], monitor: &dyn Monitor) -> Result<()> {
        self.report.compared_bytes += range.len();
        for (piece, entry) in self.pieces(range, |_| true, monitor)? {
            let start = usize::try_from(piece.start() - range.start()).unwrap_or(usize::MAX);
            let len = usize::try_from(piece.len()).unwrap_or(usize::MAX);
            let found = bytes.get(start..start.saturating_add(len)).unwrap_or_default();
            if entry == EntryRef::Zero {
                self.blocks(piece, |part| found.get(part).is_some_and(is_zero))?;
            } else {
                if let Some(kept) = self.content(piece, entry)? {
                    self.blocks(piece, |part| found.get(part.clone()) == kept.get(part))?;
                }
            }
        }
        Ok(())
    }

    /// Returns what the point has in a piece; `None` where it has lost it, which is noted.
    fn content(&mut self, piece: ByteRange, entry: EntryRef) -> Result<Option<Vec<u8>>> {
        let mut kept = None;
        if let EntryRef::Chunk { id, offset } = entry {
            let start = offset as usize;
            let len = usize::try_from(piece.len()).unwrap_or(usize::MAX);
            kept = match self.reader.read(ChunkKind::Data, id) {
                Ok(chunk) => chunk.get(start..start.saturating_add(len)).map(<[u8]>::to_vec),
                Err(error) if error.is_damage() => None,
                Err(error) => return Err(error).context(|| format!("bytes {piece} cannot be read")),
            };
        }
        if kept.is_none() {
            self.lost.note(piece, &self.report.disk)?;
        }
        Ok(kept)
    }

    /// Notes which blocks of a piece are not the `same`.
    fn blocks(&mut self, piece: ByteRange, same: impl Fn(std::ops::Range<usize>) -> bool) -> Result<()> {
        let mut position = piece.start();
        while let Some(rest) = ByteRange::between(position, piece.end()) {
            let end = rest.end().min((position / BLOCK_LEN + 1) * BLOCK_LEN);
            let from = usize::try_from(position - piece.start()).unwrap_or(usize::MAX);
            let to = usize::try_from(end - piece.start()).unwrap_or(usize::MAX);
            if let (false, Some(block)) = (same(from..to), ByteRange::between(position, end)) {
                self.places.note(block, &self.report.disk)?;
            }
            position = end;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::select::tests::entry;

    #[test]
    fn a_disk_that_only_one_side_has_is_told_and_is_no_match() {
        let record = entry([1, 0], "web", 0, None, &["vda", "vdb"]).record;
        let found = |disks: &[&str]| disks.iter().map(|disk| ((*disk).to_owned(), 8192)).collect::<Vec<_>>();
        let lacking = |wanted, disks: &[&str]| -> Vec<(String, Option<Lacking>)> {
            let told = not_there(&record, wanted, &found(disks));
            assert!(!is_all_same(&told), "{told:?}");
            told.into_iter().map(|compared| (compared.disk, compared.not_there)).collect()
        };
        assert_eq!(lacking(None, &["vda", "vdb"]), []);
        assert_eq!(lacking(Some("vda"), &["vda"]), []);
        assert_eq!(lacking(None, &["vda"]), [("vdb".into(), Some(Lacking::Domain))]);
        let both = [("vdb".into(), Some(Lacking::Domain)), ("vdc".into(), Some(Lacking::Point))];
        assert_eq!(lacking(None, &["vda", "vdc"]), both);
        assert_eq!(lacking(None, &[]).len(), 2);
        let same = Compared { size: 8192, found_size: 8192, ..Compared::default() };
        assert!(is_all_same(&[same]) && !is_all_same(&[]));
    }
}

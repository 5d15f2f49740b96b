//! What points hold, and what the repository takes.

use std::collections::HashSet;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::name::Folder;
use crate::id::{ChunkId, PointId};
use crate::manifest::{EntryRef, NodeAt, Visitor, walk};
use crate::monitor::Monitor;
use crate::ops::diff::data_len;
use crate::repo::Repository;
use crate::repo::reader::ChunkReader;

/// Entries that are looked up together.
const BATCH_ENTRIES: usize = 4096;

/// Numbers of some points and of the repository as a whole.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct StatsReport {
    pub points: u64,
    /// Sizes of all disks of the points, bytes.
    pub disk_bytes: u64,
    /// What a restore of all of them would write: what is not zero, once per point. Bytes.
    pub data_bytes: u64,
    /// Content of those points, each chunk counted once. Bytes.
    pub unique_bytes: u64,
    pub unique_chunks: u64,
    /// Manifest nodes, each counted once. Bytes.
    pub node_bytes: u64,
    /// Of the whole repository.
    pub packs: u64,
    pub stored_bytes: u64,
    pub index_bytes: u64,
}

/// Counts what points hold.
///
/// # Errors
/// [`Error::NotFound`] for a point that is none; a manifest that cannot be read; those of the storage.
pub fn stats(repository: &Repository, points: &[PointId], monitor: &dyn Monitor) -> Result<StatsReport> {
    let (catalog, view) = repository.refresh_to_read(monitor)?;
    // before anything else is looked at: packs of one moment
    let packs = view.pack_lens()?;
    let reader = ChunkReader::new(repository, &view);
    let mut report = StatsReport { points: points.len() as u64, ..StatsReport::default() };
    let mut seen = HashSet::new();
    let mut pending = Vec::new();
    for id in points {
        let entry = catalog.point(*id).ok_or_else(|| Error::NotFound { object: format!("point {id}") })?;
        for disk in &entry.record.disks {
            report.disk_bytes = report.disk_bytes.saturating_add(disk.manifest.size);
        }
        for manifest in entry.record.manifests() {
            let data = data_len(repository, &reader, manifest, monitor)?;
            report.data_bytes = report.data_bytes.saturating_add(data);
            let mut counter = Counter {
                reader: &reader,
                monitor,
                seen: &mut seen,
                pending: &mut pending,
                report: &mut report,
            };
            walk(repository.geometry(), manifest, &reader, &mut counter)?;
            counter.look_up()?;
        }
    }
    report.packs = packs.len() as u64;
    report.stored_bytes = packs.iter().map(|(_, len)| len).sum();
    report.index_bytes = repository.storage().list(Folder::Segments)?.iter().map(|listed| listed.len).sum();
    Ok(report)
}

struct Counter<'a, 'r> {
    reader: &'a ChunkReader<'r>,
    monitor: &'a dyn Monitor,
    seen: &'a mut HashSet<ChunkId>,
    /// Chunks whose length is not known yet.
    pending: &'a mut Vec<ChunkId>,
    report: &'a mut StatsReport,
}

impl Counter<'_, '_> {
    fn look_up(&mut self) -> Result<()> {
        self.monitor.check()?;
        for places in self.reader.locate(self.pending)? {
            self.report.unique_bytes += places.first().map_or(0, |place| u64::from(place.len));
        }
        self.pending.clear();
        Ok(())
    }
}

impl Visitor for Counter<'_, '_> {
    fn node(&mut self, node: NodeAt) -> Result<bool> {
        let is_new = self.seen.insert(node.id);
        if is_new {
            let places = self.reader.locate(&[node.id])?.pop().unwrap_or_default();
            self.report.node_bytes += places.first().map_or(0, |place| u64::from(place.len));
        }
        Ok(is_new)
    }

    fn entry(&mut self, _range: ByteRange, entry: EntryRef) -> Result<()> {
        if let EntryRef::Chunk { id, .. } = entry
            && self.seen.insert(id)
        {
            self.report.unique_chunks += 1;
            self.pending.push(id);
            if self.pending.len() >= BATCH_ENTRIES {
                return self.look_up();
            }
        }
        Ok(())
    }
}

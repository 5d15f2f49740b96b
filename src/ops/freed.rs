//! What forgetting would free: content that some points reach and no other.

use std::collections::HashMap;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::codec;
use crate::format::limits::MAX_CHUNK_LEN;
use crate::format::node::ChunkKind;
use crate::format::pack::FRAME_HEADER_LEN;
use crate::format::point::PointRecord;
use crate::id::{ChunkId, PointId};
use crate::index::Location;
use crate::manifest::{EntryRef, NodeAt, Visitor, walk};
use crate::monitor::Monitor;
use crate::repo::Repository;
use crate::repo::reader::ChunkReader;

/// Entries that are looked up together.
const BATCH_ENTRIES: usize = 4096;

/// What only some points hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Freed {
    /// Content of disks. Exact, bytes.
    pub content_bytes: u64,
    pub chunks: u64,
    /// What this content and its maps take in packs, in all copies: of a frame that is shared with other content,
    /// the share by length. Bytes.
    pub stored_bytes: u64,
}

impl Freed {
    fn add(&mut self, other: Self) {
        self.content_bytes += other.content_bytes;
        self.chunks += other.chunks;
        self.stored_bytes += other.stored_bytes;
    }
}

/// What forgetting one point alone would free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PointFreed {
    pub point: PointId,
    #[serde(flatten)]
    pub freed: Freed,
}

/// What would be free after forgetting points and a prune that leaves nothing unused.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct FreedReport {
    /// For each point by itself.
    pub points: Vec<PointFreed>,
    /// For all of them together: more than the sum where they share something.
    pub together: Freed,
}

/// Computes what forgetting `chosen` would free. What only forgotten points hold is free anyway and not counted.
///
/// # Errors
/// [`Error::NotFound`] for a point that is none; a manifest that cannot be read; those of the storage.
pub fn freed(repository: &Repository, chosen: &[PointId], monitor: &dyn Monitor) -> Result<FreedReport> {
    let (catalog, view) = repository.refresh_to_read(monitor)?;
    for id in chosen {
        if catalog.point(*id).is_none() {
            return Err(Error::NotFound { object: format!("point {id}") });
        }
    }
    let reader = ChunkReader::new(repository, &view);
    let task = monitor.start("points", 0);
    let mut owners = Owners::default();
    for entry in catalog.points().iter().filter(|entry| !chosen.contains(&entry.record.id)) {
        owners.walk(repository, &reader, &entry.record, Owner::Others, monitor)?;
    }
    for (number, id) in (0u32..).zip(chosen) {
        if let Some(entry) = catalog.point(*id) {
            owners.walk(repository, &reader, &entry.record, Owner::Chosen(number), monitor)?;
        }
    }
    let mut report = FreedReport {
        points: chosen.iter().map(|id| PointFreed { point: *id, freed: Freed::default() }).collect(),
        together: Freed::default(),
    };
    let mut batch = Vec::new();
    for (id, owner) in owners.chunks.iter().filter(|(_, owner)| **owner != Owner::Others) {
        batch.push((*id, *owner));
        if batch.len() >= BATCH_ENTRIES {
            count(&reader, &mut batch, &mut report)?;
            monitor.check()?;
        }
    }
    count(&reader, &mut batch, &mut report)?;
    monitor.finish(task);
    Ok(report)
}

/// Looks a batch up and adds it to those who own it.
fn count(
    reader: &ChunkReader<'_>,
    batch: &mut Vec<(ChunkId, Owner)>,
    report: &mut FreedReport,
) -> Result<()> {
    let ids: Vec<ChunkId> = batch.iter().map(|(id, _)| *id).collect();
    for ((_, owner), places) in batch.drain(..).zip(reader.locate(&ids)?) {
        let Some(place) = places.first() else { continue };
        let is_data = place.kind == ChunkKind::Data;
        let freed = Freed {
            content_bytes: if is_data { u64::from(place.len) } else { 0 },
            chunks: u64::from(is_data),
            stored_bytes: places.iter().map(share).sum(),
        };
        report.together.add(freed);
        if let Owner::Chosen(number) = owner
            && let Some(point) = report.points.get_mut(number as usize)
        {
            point.freed.add(freed);
        }
    }
    Ok(())
}

/// Returns a chunk's share of the frame it stands in, bytes.
fn share(place: &Location) -> u64 {
    let stored = u64::from(place.frame.stored_len) + FRAME_HEADER_LEN as u64;
    stored * u64::from(place.len) / u64::from(place.frame.raw_len.max(1))
}

/// Who reaches a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// A point that stays; whoever else does makes no difference.
    Others,
    /// Several of the chosen points, and nobody else.
    Several,
    /// This one of the chosen points alone.
    Chosen(u32),
}

/// Every chunk that points reach, about 60 bytes each.
#[derive(Debug, Default)]
struct Owners {
    chunks: HashMap<ChunkId, Owner>,
}

impl Owners {
    fn walk(
        &mut self,
        repository: &Repository,
        reader: &ChunkReader<'_>,
        record: &PointRecord,
        owner: Owner,
        monitor: &dyn Monitor,
    ) -> Result<()> {
        for manifest in record.manifests() {
            let mut walker = Walker { owners: self, owner, monitor };
            walk(repository.geometry(), manifest, reader, &mut walker)?;
        }
        let copy = codec::encode(record)
            .map_err(|fault| Error::malformed(format!("the record of point {}", record.id), fault))?;
        for part in copy.chunks(MAX_CHUNK_LEN as usize) {
            self.add(repository.hasher().chunk_id(ChunkKind::Point, part), owner);
        }
        Ok(())
    }

    /// Notes that `owner` reaches a chunk. Returns false if that says nothing new, so that what is below a node need
    /// not be looked at again.
    fn add(&mut self, id: ChunkId, owner: Owner) -> bool {
        let known = self.chunks.get(&id).copied();
        let now = match (known, owner) {
            (None, owner) => owner,
            (Some(Owner::Others), _) | (_, Owner::Others) => Owner::Others,
            (Some(known), owner) if known == owner => known,
            _ => Owner::Several,
        };
        self.chunks.insert(id, now);
        known != Some(now)
    }
}

struct Walker<'a> {
    owners: &'a mut Owners,
    owner: Owner,
    monitor: &'a dyn Monitor,
}

impl Visitor for Walker<'_> {
    fn node(&mut self, node: NodeAt) -> Result<bool> {
        self.monitor.check()?;
        Ok(self.owners.add(node.id, self.owner))
    }

    fn entry(&mut self, _range: ByteRange, entry: EntryRef) -> Result<()> {
        if let EntryRef::Chunk { id, .. } = entry {
            self.owners.add(id, self.owner);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::point::Level;
    use crate::monitor::Recorder;
    use crate::ops::RequestedLevel;
    use crate::ops::backup::tests::{World, write};
    use crate::ops::forget::forget;
    use crate::ops::prune::{PruneOptions, prune};

    #[test]
    fn what_is_said_to_be_freed_is_freed() {
        let mut world = World::new(&[8 << 20]);
        for day in 0..4u64 {
            write(&mut world, 1 << 20, (1 << 20) + (day << 16), day);
            write(&mut world, (3 << 20) + day * (1 << 20), 100 << 10, 100 + day);
            world.backup(RequestedLevel::Is(if day == 0 { Level::Full } else { Level::Incremental }));
        }
        let ids: Vec<PointId> = world.kept.iter().map(|kept| kept.id).collect();
        let silent = Recorder::new();
        let report = freed(&world.repository, &ids[..3], &silent).unwrap();
        assert_eq!(report.points.len(), 3);
        let alone: u64 = report.points.iter().map(|point| point.freed.content_bytes).sum();
        assert_eq!(
            alone, report.together.content_bytes,
            "each point has its own megabyte, nothing is shared"
        );
        for (day, point) in (0u64..).zip(&report.points) {
            // the 100 KiB stay in every later point
            assert_eq!(point.freed.content_bytes, (1 << 20) + (day << 16), "day {day}");
        }
        let options = PruneOptions { max_unused_permille: 0, ..PruneOptions::default() };
        prune(&world.repository, &options, &silent).unwrap();
        forget(&world.repository, &ids[..3], "test", false, &silent).unwrap();
        let pruned = prune(&world.repository, &options, &silent).unwrap();
        let won = pruned.stored_before_bytes - pruned.stored_after_bytes;
        let said = report.together.stored_bytes;
        // headers and tables of packs belong to no chunk
        assert!(won.abs_diff(said) < said / 50, "said {said}, won {won}");
        let left = freed(&world.repository, &ids[3..], &silent).unwrap();
        assert!(left.together.content_bytes > 1 << 20);
    }

    #[test]
    fn what_two_chosen_points_share_is_freed_by_both_together() {
        let mut world = World::new(&[4 << 20]);
        write(&mut world, 0, 1 << 20, 1);
        world.backup(RequestedLevel::Is(Level::Full));
        world.backup(RequestedLevel::Is(Level::Incremental));
        write(&mut world, 0, 1 << 20, 2);
        world.backup(RequestedLevel::Is(Level::Incremental));
        let ids: Vec<PointId> = world.kept.iter().map(|kept| kept.id).collect();
        let report = freed(&world.repository, &ids[..2], &Recorder::new()).unwrap();
        let bytes = |no: usize| report.points[no].freed.content_bytes;
        assert_eq!((bytes(0), bytes(1), report.together.content_bytes), (0, 0, 1 << 20));
        let all = freed(&world.repository, &ids, &Recorder::new()).unwrap();
        assert_eq!(all.points[2].freed.content_bytes, 1 << 20);
        // and the small file that every point of the model has beside its disk
        assert!((2 << 20..(2 << 20) + 4096).contains(&all.together.content_bytes), "{all:?}");
        assert!(freed(&world.repository, &[PointId::from_bytes([9; 16])], &Recorder::new()).is_err());
    }
}

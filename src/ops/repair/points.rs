//! Points of which something stays lost: a copy that says what, and is whole otherwise.

use std::collections::HashSet;

use serde::Serialize;

use crate::error::{Context, Error, Result};
use crate::extent::ByteRange;
use crate::format::codec;
use crate::format::limits::MAX_CHUNK_LEN;
use crate::format::name::{Folder, ObjectName};
use crate::format::node::{ChunkKind, LeafEntry};
use crate::format::point::{DiskRecord, FileRecord, Manifest, PointRecord, PointStats};
use crate::format::session::{Outcome, SessionKind};
use crate::id::{ChunkId, PointId};
use crate::manifest::{EntryRef, NodeAt, TreeWriter, Visitor, walk};
use crate::monitor::Monitor;
use crate::ops::lost_points::{self, LostPoint};
use crate::ops::marked::check_marks;
use crate::repo::heal::find_lost;
use crate::repo::reader::ChunkReader;
use crate::repo::session::Session;
use crate::repo::view::View;
use crate::repo::writer::{SessionWriter, write_session};
use crate::repo::{Catalog, Repository};

/// Entries that are looked up together.
const BATCH_ENTRIES: usize = 1024;
/// Leaves that a map may have for its loss to be spelled out: 16 TiB of leaves of 1 MiB.
const MAX_LEAVES: u64 = 1 << 24;
/// What the tag of a repaired point begins with; the id of the damaged one follows.
const TAG_PREFIX: &str = "repaired-from-";

/// A point that was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RepairedPoint {
    /// The damaged point, which stays as it is.
    pub point: PointId,
    pub domain: String,
    /// The new one; with a dry run none.
    pub repaired: Option<PointId>,
    /// What is lost of it, bytes.
    pub lost_bytes: u64,
}

/// What was repaired.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PointsReport {
    pub points: Vec<RepairedPoint>,
    /// Points whose outcome was lost, and is there again, made of a copy of the record. Its numbers are gone.
    pub brought_back: Vec<PointId>,
    /// Outcomes and tombstones that could not be read and were removed: they made no point.
    pub removed: Vec<String>,
    pub dry_run: bool,
}

/// Makes for each point that is known to have lost something a point that names those ranges unreadable. One that was
/// repaired before is left out.
///
/// # Errors
/// Those of the storage; [`Error::Fenced`] by a prune.
pub fn repair_points(repository: &Repository, dry_run: bool, monitor: &dyn Monitor) -> Result<PointsReport> {
    let mut report =
        PointsReport { points: Vec::new(), brought_back: Vec::new(), removed: Vec::new(), dry_run };
    let (catalog, view) = repository.refresh(monitor)?;
    let reader = ChunkReader::new(repository, &view);
    for lost in lost_points::find(repository, &catalog, &reader, monitor)? {
        if !lost.is_complete {
            continue;
        }
        report.brought_back.push(lost.record.id);
        if !dry_run {
            bring_back(repository, lost)?;
        }
    }
    report.removed = remove_unreadable(repository, &catalog, &report.brought_back, dry_run, monitor)?;
    for entry in catalog.points() {
        let record = &entry.record;
        if is_repaired(&catalog, record) {
            continue;
        }
        let mut lost_bytes = 0;
        for manifest in record.manifests() {
            lost_bytes += find_lost(repository, &reader, manifest, monitor)?.ranges.total_bytes();
        }
        if lost_bytes == 0 {
            continue;
        }
        let repaired = if dry_run {
            None
        } else {
            let made = repair_point(repository, record, monitor);
            Some(made.context(|| format!("while repairing point {}", record.id.short()))?)
        };
        report.points.push(RepairedPoint {
            point: record.id,
            domain: record.domain.clone(),
            repaired,
            lost_bytes,
        });
    }
    Ok(report)
}

/// Puts a lost outcome again: what the session stored counts once more.
fn bring_back(repository: &Repository, lost: LostPoint) -> Result<()> {
    let name = ObjectName::Outcome(lost.record.id.into());
    let outcome = Outcome::Point { record: Box::new(lost.record), stats: PointStats::default() };
    let bytes = outcome.to_object(repository.id()).map_err(|fault| Error::malformed(name, fault))?;
    if lost.is_unreadable {
        // cut off here, the outcome is one that is lost
        repository.storage().delete(name)?;
        repository.storage().sync_deletes(Folder::Outcomes)?;
    }
    match repository.storage().put_new(name, &bytes) {
        // somebody has done it meanwhile
        Err(Error::Exists { .. }) => Ok(()),
        put => put,
    }
}

/// Removes outcomes and tombstones that cannot be read and cannot have made a point, because nothing in the repository was
/// stored by their session: they would keep every prune from deleting anything. Points of a tombstone are shown again; a
/// hold or a verification is not known any more.
fn remove_unreadable(
    repository: &Repository,
    catalog: &Catalog,
    brought_back: &[PointId],
    dry_run: bool,
    monitor: &dyn Monitor,
) -> Result<Vec<String>> {
    let storage = repository.storage();
    let unreadable = |name: &ObjectName| match name {
        ObjectName::Outcome(session) => !brought_back.contains(&PointId::from(*session)),
        ObjectName::Tombstone(_) => true,
        _ => false,
    };
    let mut names: Vec<ObjectName> =
        catalog.problems().iter().map(|(name, _)| *name).filter(unreadable).collect();
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let mut owners = HashSet::new();
    for id in repository.segments()? {
        monitor.check()?;
        match repository.load_segment(id) {
            Ok(segment) => drop(owners.insert(segment.owner)),
            Err(Error::NotFound { .. }) => {}
            // it may be of any of them
            Err(_) => return Ok(Vec::new()),
        }
    }
    // a sweep whose mark is there may not be carried out yet
    owners.extend(storage.list(Folder::Marks)?.iter().filter_map(|listed| match listed.name {
        ObjectName::Mark(session) => Some(session),
        _ => None,
    }));
    names.retain(|name| !matches!(name, ObjectName::Outcome(session) if owners.contains(session)));
    if !dry_run {
        names.iter().try_for_each(|name| storage.delete(*name))?;
        storage.sync_deletes(Folder::Tombstones)?;
        storage.sync_deletes(Folder::Outcomes)?;
    }
    Ok(names.iter().map(ToString::to_string).collect())
}

/// Returns true if a point is a repaired one, or there is one for it.
fn is_repaired(catalog: &Catalog, record: &PointRecord) -> bool {
    let is_one = record.tags.iter().any(|tag| tag.starts_with(TAG_PREFIX));
    let tag = format!("{TAG_PREFIX}{}", record.id);
    is_one || catalog.points().iter().any(|entry| entry.record.tags.contains(&tag))
}

fn repair_point(repository: &Repository, damaged: &PointRecord, monitor: &dyn Monitor) -> Result<PointId> {
    let session = Session::begin(repository, SessionKind::Repair)?;
    // marks are read anew: this session relies on what it sees now
    let (_, view) = repository.refresh(monitor)?;
    let reader = ChunkReader::new(repository, &view);
    let point = PointId::from(session.id());
    let (record, written) = write_session(repository, &reader, session.id(), |writer| {
        let rewritten = |manifest: &Manifest, writer: &mut SessionWriter<'_>| {
            rewrite_manifest(repository, &view, &reader, writer, manifest, monitor)
        };
        let mut record = damaged.clone();
        record.disks = damaged
            .disks
            .iter()
            .map(|disk| Ok(DiskRecord { manifest: rewritten(&disk.manifest, writer)?, ..disk.clone() }))
            .collect::<Result<_>>()?;
        record.files = damaged
            .files
            .iter()
            .map(|file| Ok(FileRecord { manifest: rewritten(&file.manifest, writer)?, ..file.clone() }))
            .collect::<Result<_>>()?;
        record.id = point;
        // the damaged point's checkpoint stays its own
        record.checkpoint = None;
        record.disks.iter_mut().for_each(|disk| disk.has_bitmap = false);
        record.predecessor = Some(damaged.id);
        record.tags.push(format!("{TAG_PREFIX}{}", damaged.id));
        record.program = repository.environment().program.clone();
        record.host = repository.environment().host.clone();
        record.check().map_err(|fault| Error::malformed("the record of the repaired point", fault))?;
        let copy = codec::encode(&record)
            .map_err(|fault| Error::malformed("the record of the repaired point", fault))?;
        for part in copy.chunks(MAX_CHUNK_LEN as usize) {
            writer.put_metadata(ChunkKind::Point, part)?;
        }
        Ok(record)
    })?;
    check_marks(repository, &written.reused)?;
    let stats = PointStats { metadata_bytes: written.metadata_bytes, ..PointStats::default() };
    session.commit(&Outcome::Point { record: Box::new(record), stats })?;
    Ok(point)
}

/// Makes a map anew, entry by entry; what is whole becomes the same nodes again.
fn rewrite_manifest(
    repository: &Repository,
    view: &View,
    reader: &ChunkReader<'_>,
    writer: &mut SessionWriter<'_>,
    manifest: &Manifest,
    monitor: &dyn Monitor,
) -> Result<Manifest> {
    let geometry = repository.geometry();
    if geometry.leaf_count(manifest.size) > MAX_LEAVES
        && find_lost(repository, reader, manifest, monitor)?.nodes
    {
        return Err(Error::Refused {
            object: "its map".into(),
            reason: format!("nodes of a disk of {} bytes are lost", manifest.size),
            hint: None,
        });
    }
    let mut leaves = Leaves {
        leaf_len: geometry.leaf_len(),
        reader,
        view,
        monitor,
        tree: TreeWriter::new(geometry, manifest.size, None, reader, writer)?,
        number: 0,
        entries: Vec::new(),
        position: 0,
        pending: Vec::new(),
    };
    walk(geometry, manifest, reader, &mut leaves)?;
    leaves.look_up()?;
    leaves.close_leaf()?;
    leaves.tree.finish()
}

/// Collects entries into leaves.
struct Leaves<'a> {
    leaf_len: u64,
    reader: &'a ChunkReader<'a>,
    view: &'a View,
    monitor: &'a dyn Monitor,
    tree: TreeWriter<'a>,
    number: u64,
    entries: Vec<LeafEntry>,
    /// Up to where the open leaf is told.
    position: u64,
    pending: Vec<(ByteRange, ChunkId, u32)>,
}

impl Leaves<'_> {
    fn look_up(&mut self) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        let ids: Vec<ChunkId> = pending.iter().map(|(_, id, _)| *id).collect();
        for ((range, id, offset), places) in pending.into_iter().zip(self.reader.locate(&ids)?) {
            let good = places.iter().any(|place| self.view.is_good(&id, place));
            let len = u32::try_from(range.len()).unwrap_or(u32::MAX);
            let entry =
                if good { LeafEntry::Chunk { len, offset, id } } else { LeafEntry::Unreadable { len } };
            self.tell(range, entry)?;
        }
        Ok(())
    }

    /// Adds an entry, which lies within one leaf.
    fn tell(&mut self, range: ByteRange, entry: LeafEntry) -> Result<()> {
        self.open_leaf(range.start() / self.leaf_len)?;
        self.zero_until(range.start());
        self.entries.push(entry);
        self.position = range.end();
        Ok(())
    }

    fn zero_until(&mut self, end: u64) {
        if let Some(gap) = ByteRange::between(self.position, end) {
            self.entries.push(LeafEntry::Zero { len: u32::try_from(gap.len()).unwrap_or(u32::MAX) });
        }
    }

    fn open_leaf(&mut self, number: u64) -> Result<()> {
        if number != self.number || self.entries.is_empty() {
            self.close_leaf()?;
            self.number = number;
            self.position = number.saturating_mul(self.leaf_len);
        }
        Ok(())
    }

    fn close_leaf(&mut self) -> Result<()> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let start = self.number.saturating_mul(self.leaf_len);
        let end = start.saturating_add(self.leaf_len).min(self.tree.size());
        self.zero_until(end);
        let entries = std::mem::take(&mut self.entries);
        self.tree.put_leaf(self.number, &entries)
    }
}

impl Visitor for Leaves<'_> {
    fn node(&mut self, _node: NodeAt) -> Result<bool> {
        self.monitor.check()?;
        Ok(true)
    }

    fn entry(&mut self, range: ByteRange, entry: EntryRef) -> Result<()> {
        match entry {
            EntryRef::Chunk { id, offset } => {
                self.pending.push((range, id, offset));
                if self.pending.len() >= BATCH_ENTRIES {
                    return self.look_up();
                }
                Ok(())
            }
            EntryRef::Zero => Ok(()),
            EntryRef::Unreadable => {
                self.look_up()?;
                self.tell(
                    range,
                    LeafEntry::Unreadable { len: u32::try_from(range.len()).unwrap_or(u32::MAX) },
                )
            }
        }
    }

    fn fault(&mut self, node: NodeAt, error: Error) -> Result<()> {
        if !error.is_damage() {
            return Err(error);
        }
        self.look_up()?;
        let mut position = node.range.start();
        while let Some(rest) = ByteRange::between(position, node.range.end()) {
            self.monitor.check()?;
            let leaf_end = (position / self.leaf_len + 1).saturating_mul(self.leaf_len).min(rest.end());
            let Some(part) = ByteRange::between(position, leaf_end) else { break };
            self.tell(part, LeafEntry::Unreadable { len: u32::try_from(part.len()).unwrap_or(u32::MAX) })?;
            position = leaf_end;
        }
        Ok(())
    }
}

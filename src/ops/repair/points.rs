//! Points of which something stays lost: a copy that says what, and is whole otherwise.

use std::collections::HashSet;
use std::sync::Arc;

use serde::Serialize;

use crate::error::{Context, Error, Result};
use crate::extent::ByteRange;
use crate::format::codec;
use crate::format::limits::MAX_CHUNK_LEN;
use crate::format::name::{Folder, ObjectName};
use crate::format::node::{ChunkKind, LeafEntry};
use crate::format::point::{DiskRecord, FileRecord, Manifest, PointRecord, PointStats, REPAIRED_TAG};
use crate::format::session::{Outcome, SessionKind};
use crate::id::{ChunkId, PackId, PointId, SessionId};

use crate::manifest::{EntryRef, NodeAt, TreeWriter, Visitor, walk};
use crate::monitor::Monitor;
use crate::ops::lost_points::{self, LostPoint, LostPoints};
use crate::ops::marked::check_marks;
use crate::repo::catalog::Ended;
use crate::repo::heal::find_lost;
use crate::repo::reader::ChunkReader;
use crate::repo::rules::Rule;
use crate::repo::segments::SegmentCache;
use crate::repo::session::Session;
use crate::repo::view::{Marks, View};
use crate::repo::writer::{SessionWriter, write_session};
use crate::repo::{Catalog, Repository};

/// Entries that are looked up together.
const BATCH_ENTRIES: usize = 1024;
/// Leaves that a map may have for its loss to be spelled out: 16 TiB of leaves of 1 MiB.
const MAX_LEAVES: u64 = 1 << 24;

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
    /// Outcomes that could not be read, made no point and are aborts now, and tombstones that could not be read and were
    /// removed.
    pub removed: Vec<String>,
    /// Outcomes that cannot be read and may have made a point: packs are listed by their session alone, or something else
    /// cannot be read that may tell. `repair index` lists such packs anew.
    pub left: Vec<String>,
    pub dry_run: bool,
}

/// Makes for each point that is known to have lost something a point that names those ranges unreadable. One that was
/// repaired before is left out.
///
/// # Errors
/// Those of the storage; [`Error::Busy`] while a prune is about to delete something; [`Error::Fenced`] by a prune.
pub fn repair_points(repository: &Repository, dry_run: bool, monitor: &dyn Monitor) -> Result<PointsReport> {
    // registered before anything is looked at: a prune that begins now waits
    let session = if dry_run { None } else { Some(Session::begin(repository, SessionKind::Repair)?) };
    let mut report = PointsReport { dry_run, ..PointsReport::default() };
    let (catalog, view) = repository.refresh_and_look(monitor)?;
    let reader = ChunkReader::new(repository, &view);
    let lost = lost_points::find(&SegmentCache::passing(repository), &catalog, &reader, monitor)?;
    for lost in lost.points.iter().filter(|lost| lost.is_complete) {
        report.brought_back.push(lost.record.id);
        if !dry_run {
            bring_back(repository, lost, &view)?;
        }
    }
    let (unreadable, left) = made_no_point(repository, &catalog, &view, &lost, monitor)?;
    report.removed = unreadable.iter().map(ToString::to_string).collect();
    let is_back =
        |name: &ObjectName| report.brought_back.iter().any(|id| ObjectName::Outcome((*id).into()) == *name);
    report.left = left.iter().filter(|name| !is_back(name)).map(ToString::to_string).collect();
    if let Some(session) = &session {
        put_away(repository, session, &unreadable)?;
    }
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
        let mut repaired = None;
        if !dry_run {
            let made = repair_point(repository, record, monitor);
            repaired = made.context(|| format!("while repairing point {}", record.id.short()))?;
            if repaired.is_none() {
                monitor.note(&format!("point {} was forgotten or repaired meanwhile", record.id.short()));
                continue;
            }
        }
        let (point, domain) = (record.id, record.domain.clone());
        report.points.push(RepairedPoint { point, domain, repaired, lost_bytes });
    }
    match session {
        Some(session) => session.commit(&Outcome::Done).map(|()| report),
        None => Ok(report),
    }
}

/// Puts a lost outcome again: what the session stored counts once more.
fn bring_back(repository: &Repository, lost: &LostPoint, view: &View) -> Result<()> {
    if *view.marks() != Marks::default() {
        // that prune began before this session, does not wait for it, and may delete what the point needs
        return Err(Error::Busy {
            object: repository.storage().url(),
            why: format!("a lost point of {} is there, and so is the mark of a prune", lost.record.domain),
        });
    }
    let name = ObjectName::Outcome(lost.record.id.into());
    let outcome = Outcome::Point { record: Arc::new(lost.record.clone()), stats: PointStats::default() };
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

/// Returns the tombstones that cannot be read, and the outcomes that cannot be read and cannot have made a point: nothing in
/// the repository was stored by their session but what others list, too, as after `repair index`. They keep every prune
/// from deleting anything. Returns besides how many outcomes may have made one.
fn made_no_point(
    repository: &Repository,
    catalog: &Catalog,
    view: &View,
    lost: &LostPoints,
    monitor: &dyn Monitor,
) -> Result<(Vec<ObjectName>, Vec<ObjectName>)> {
    let is_kept = |name: &ObjectName| matches!(name, ObjectName::Outcome(_) | ObjectName::Tombstone(_));
    let names: Vec<ObjectName> = catalog.problems().iter().map(|(name, _)| *name).filter(is_kept).collect();
    if names.is_empty() {
        return Ok((names, Vec::new()));
    }
    // a prune may have taken over what a point's session stored: then the copy of the record alone tells of it
    let mut owners: HashSet<SessionId> =
        lost.points.iter().map(|lost| SessionId::from(lost.record.id)).collect();
    let mut listed: HashSet<PackId> = HashSet::new();
    let mut others: Vec<(SessionId, Vec<PackId>)> = Vec::new();
    let mut has_unreadable = lost.has_unreadable;
    for id in repository.segments()? {
        monitor.check()?;
        match repository.load_segment(id) {
            Ok(segment) => {
                let packs = segment.packs.iter().map(|pack| pack.id);
                match catalog.ended(segment.owner) {
                    Some(Ended::Committed) => listed.extend(packs),
                    _ => others.push((segment.owner, packs.collect())),
                }
            }
            Err(Error::NotFound { .. }) => {}
            // it may be of any of them
            Err(error) if repository.is_of_object(&error) => has_unreadable = true,
            Err(error) => return Err(error),
        }
    }
    let is_needed = |pack: &PackId| view.has_pack(*pack) && !listed.contains(pack);
    owners.extend(others.iter().filter(|(_, packs)| packs.iter().any(is_needed)).map(|(owner, _)| *owner));
    // a sweep whose mark is there may not be carried out yet
    let marks = repository.storage().list(Folder::Marks)?;
    owners.extend(marks.iter().filter_map(|listed| match listed.name {
        ObjectName::Mark(session) => Some(session),
        _ => None,
    }));
    Ok(names.into_iter().partition(|name| match name {
        ObjectName::Outcome(session) => !has_unreadable && !owners.contains(session),
        _ => true,
    }))
}

/// Puts an abort in the place of outcomes, and removes tombstones: their points are shown again. A hold or a verification is
/// not known any more.
fn put_away(repository: &Repository, session: &Session, names: &[ObjectName]) -> Result<()> {
    let storage = repository.storage();
    for name in names {
        let ObjectName::Outcome(_) = name else {
            storage.delete(*name)?;
            continue;
        };
        // it may be the abort of a session that slept: at no moment may the name be free
        let outcome = Outcome::Abort { by: session.id(), why: "its outcome could not be read".into() };
        let bytes = outcome.to_object(repository.id()).map_err(|fault| Error::malformed(*name, fault))?;
        storage.replace(*name, &bytes)?;
    }
    storage.sync_deletes(Folder::Tombstones)?;
    storage.sync_deletes(Folder::Outcomes)
}

/// Returns true if a point is a repaired one, or there is one for it.
fn is_repaired(catalog: &Catalog, record: &PointRecord) -> bool {
    let is_one = record.tags.iter().any(|tag| tag.starts_with(REPAIRED_TAG));
    let tag = format!("{REPAIRED_TAG}{}", record.id);
    is_one || catalog.points().iter().any(|entry| entry.record.tags.contains(&tag))
}

/// Makes a point of what is left of one; `None` if there is no reason any more.
fn repair_point(
    repository: &Repository,
    damaged: &PointRecord,
    monitor: &dyn Monitor,
) -> Result<Option<PointId>> {
    let session = Session::begin(repository, SessionKind::Repair)?;
    // all is read anew: this session relies on what it sees now. It shares what the damaged point has, which a prune
    // moves and does not delete as long as that point stays
    let (catalog, view) = repository.refresh_and_look(monitor)?;
    let stays = catalog.point(damaged.id).is_some() && !view.marks().points.contains(&damaged.id);
    if !repository.breaks(Rule::RepairOfPointsThatStay) && (!stays || is_repaired(&catalog, damaged)) {
        session.abort("the point was forgotten or repaired meanwhile")?;
        return Ok(None);
    }
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
        record.tags.push(format!("{REPAIRED_TAG}{}", damaged.id));
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
    session.commit(&Outcome::Point { record: Arc::new(record), stats })?;
    Ok(Some(point))
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

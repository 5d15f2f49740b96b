//! What a new point relies on in packs that a prune has marked meanwhile is stored again.
//!
//! A prune that marks a pack later than a session has registered waits for that session, and then sees its point. So this
//! is only needed where the prune could not see the session: in a storage whose listings lag behind. There it may even
//! take what the session has just put for what a killed one left.
//!
//! Nothing need be stored again of what the predecessor shares as long as that is a point which no mark names: a prune
//! keeps what such a point reaches, and a later one waits for this session.

use std::collections::HashSet;

use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::codec;
use crate::format::limits::MAX_CHUNK_LEN;
use crate::format::node::ChunkKind;
use crate::format::point::{Manifest, PointRecord};
use crate::id::{ChunkId, PackId, PointId, SegmentId};
use crate::manifest::{EntryRef, NodeAt, Visitor, walk_new};
use crate::monitor::Monitor;
use crate::repo::reader::ChunkReader;
use crate::repo::rules::Rule;
use crate::repo::session::Session;
use crate::repo::view::{Marks, View};
use crate::repo::writer::{SessionWriter, Written, write_more};
use crate::repo::{Catalog, Repository};

/// Chunks that are looked up together.
const BATCH_CHUNKS: usize = 1024;
/// So often something is stored again. One prune marks once, and a second one withdraws while it lives.
const MAX_ROUNDS: usize = 3;

/// A point that is about to be committed.
pub(super) struct NewPoint<'a> {
    pub record: &'a PointRecord,
    /// The maps that its disks were compared with, in the order of its disks.
    pub predecessors: &'a [Option<Manifest>],
}

/// Looks at the marks again, until no prune that began meanwhile is about to delete what a new point relies on. What it
/// relies on there is stored again.
///
/// # Errors
/// [`Error::Busy`] if ever new marks name what it relies on; those of the storage. If somebody else has ended the session,
/// [`Error::Fenced`].
pub(super) fn store_again(
    repository: &Repository,
    session: &Session,
    reader: &ChunkReader<'_>,
    point: &NewPoint<'_>,
    written: &mut Written,
    monitor: &dyn Monitor,
) -> Result<()> {
    if repository.breaks(Rule::LookAgain) {
        return Ok(());
    }
    let mut heeded = reader.view().marks().points.clone();
    for _ in 0..MAX_ROUNDS {
        if find_touched(repository, written, &heeded)?.is_none() {
            return Ok(());
        }
        let (catalog, view) = repository.refresh(monitor)?;
        heeded.extend(&view.marks().points);
        let all_stay = point.predecessors.iter().flatten().all(|map| stays(&catalog, view.marks(), map));
        let marked = &view.marks().packs;
        if !all_stay || !written.reused.is_disjoint(marked) || !written.packs.is_disjoint(marked) {
            let again = store_marked(repository, session, reader, (&catalog, &view), point, written, monitor);
            again.map_err(|error| session.cause_of(error))?;
        }
    }
    match find_touched(repository, written, &heeded)? {
        None => Ok(()),
        Some(object) => Err(busy(object)),
    }
}

/// Fails if a prune that began meanwhile is about to delete a pack that a session relies on.
pub(super) fn check_marks(repository: &Repository, reused: &HashSet<PackId>) -> Result<()> {
    let marks = Marks::load(repository.storage(), repository.id())?;
    match reused.iter().find(|pack| marks.packs.contains(pack)) {
        None => Ok(()),
        Some(pack) => Err(busy(format!("pack {pack}"))),
    }
}

fn busy(object: String) -> Error {
    Error::Busy { object, why: "a prune that began meanwhile is about to delete it".into() }
}

/// Returns a pack that is relied on and marked now, or a point that was not marked before: it may be a predecessor.
fn find_touched(
    repository: &Repository,
    written: &Written,
    heeded: &HashSet<PointId>,
) -> Result<Option<String>> {
    let marks = Marks::load(repository.storage(), repository.id())?;
    let mut packs = written.reused.iter().chain(&written.packs);
    let pack = packs.find(|pack| marks.packs.contains(pack)).map(|pack| format!("pack {pack}"));
    let point = || marks.points.iter().find(|point| !heeded.contains(point));
    Ok(pack.or_else(|| point().map(|point| format!("point {point}"))))
}

/// Stores again what of the session's own packs is marked, then walks what the predecessors do not share.
fn store_marked(
    repository: &Repository,
    session: &Session,
    before: &ChunkReader<'_>,
    (catalog, view): (&Catalog, &View),
    point: &NewPoint<'_>,
    written: &mut Written,
    monitor: &dyn Monitor,
) -> Result<()> {
    let reader = before.with_own_metadata(view, &written.segments)?;
    let record = point.record;
    let geometry = repository.geometry();
    let ((copied, bytes), later) = write_more(repository, &reader, session.id(), written, |writer| {
        let mut again = Again {
            reader: &reader,
            own: written,
            writer,
            monitor,
            met: HashSet::new(),
            copied: HashSet::new(),
            pending: Vec::new(),
            bytes: 0,
        };
        again.copy_own(repository, &written.segments)?;
        // files have no predecessors
        let predecessors = point.predecessors.iter().copied().chain(std::iter::repeat(None));
        for (manifest, predecessor) in record.manifests().zip(predecessors) {
            let old = predecessor.filter(|old| stays(catalog, view.marks(), old));
            let old = old.unwrap_or(Manifest { size: 0, height: 0, root: None });
            walk_new(geometry, &old, manifest, &reader, &mut again)?;
            again.look_up_data()?;
        }
        let copy = codec::encode(record)
            .map_err(|fault| Error::malformed(format!("the record of {}", record.domain), fault))?;
        for part in copy.chunks(MAX_CHUNK_LEN as usize) {
            again.rely_on(ChunkKind::Point, &[repository.hasher().chunk_id(ChunkKind::Point, part)])?;
        }
        Ok((again.copied, again.bytes))
    })?;
    if !copied.is_empty() {
        monitor.note(&format!(
            "a prune that began meanwhile is about to delete {} chunks of {bytes} bytes: they are stored again",
            copied.len()
        ));
    }
    written.packs.retain(|pack| !view.marks().packs.contains(pack));
    written.add(later);
    let mut again = repository.pending();
    again.extend(copied);
    written.chunks.push(again);
    Ok(())
}

/// Returns true if a committed point has this map and no mark names it.
fn stays(catalog: &Catalog, marks: &Marks, map: &Manifest) -> bool {
    let all = catalog.points().iter().chain(catalog.forgotten()).map(|entry| &entry.record);
    let mut unmarked = all.filter(|record| !marks.points.contains(&record.id));
    unmarked.any(|record| record.manifests().any(|other| other == map))
}

/// Makes sure of each chunk that it is in a pack which may be relied on.
struct Again<'a, 'r, 'w> {
    reader: &'a ChunkReader<'r>,
    /// What the session stored before.
    own: &'a Written,
    writer: &'a mut SessionWriter<'w>,
    monitor: &'a dyn Monitor,
    /// Nodes.
    met: HashSet<ChunkId>,
    copied: HashSet<ChunkId>,
    pending: Vec<ChunkId>,
    bytes: u64,
}

impl Again<'_, '_, '_> {
    fn rely_on(&mut self, kind: ChunkKind, ids: &[ChunkId]) -> Result<()> {
        for (id, known) in ids.iter().zip(self.reader.known(kind, ids)?) {
            if self.own.has(id) || self.copied.contains(id) {
                continue;
            }
            if let Some(pack) = known {
                self.writer.rely_on(pack);
                continue;
            }
            self.copy(kind, *id)?;
        }
        Ok(())
    }

    fn copy(&mut self, kind: ChunkKind, id: ChunkId) -> Result<()> {
        self.monitor.check()?;
        if self.copied.insert(id) {
            let content = self.reader.read(kind, id)?;
            self.writer.copy(kind, id, &content)?;
            self.bytes += content.len() as u64;
        }
        Ok(())
    }

    /// The segments that list what goes stay: the next prune sees that those packs are gone.
    fn copy_own(&mut self, repository: &Repository, segments: &[SegmentId]) -> Result<()> {
        let marked = &self.reader.view().marks().packs;
        for id in segments {
            let segment = repository.load_segment(*id)?;
            let goes: Vec<bool> = segment.packs.iter().map(|pack| marked.contains(&pack.id)).collect();
            for chunk in &segment.chunks {
                if goes.get(chunk.pack as usize) == Some(&true) {
                    self.copy(chunk.kind, chunk.id)?;
                }
            }
        }
        Ok(())
    }

    fn look_up_data(&mut self) -> Result<()> {
        let ids = std::mem::take(&mut self.pending);
        self.rely_on(ChunkKind::Data, &ids)
    }
}

impl Visitor for Again<'_, '_, '_> {
    fn node(&mut self, node: NodeAt) -> Result<bool> {
        self.monitor.check()?;
        if !self.met.insert(node.id) {
            return Ok(false);
        }
        self.rely_on(ChunkKind::Node, &[node.id])?;
        Ok(true)
    }

    fn entry(&mut self, _range: ByteRange, entry: EntryRef) -> Result<()> {
        if let EntryRef::Chunk { id, .. } = entry
            && !self.own.has(&id)
        {
            self.pending.push(id);
            if self.pending.len() >= BATCH_CHUNKS {
                return self.look_up_data();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

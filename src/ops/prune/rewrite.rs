//! Writing anew what is live of packs that are to go, and the segments that speak of what stays.

use std::collections::{HashMap, HashSet};

use super::live::Live;
use super::{Chosen, for_each_segment};
use crate::error::{Context, Error, Result};
use crate::format::limits::SEGMENT_TARGET_CHUNKS;
use crate::format::segment::{Segment, SegmentChunk, SegmentPack};
use crate::id::{PackId, PointId, SessionId};
use crate::index::Location;
use crate::monitor::Monitor;
use crate::repo::reader::ChunkReader;
use crate::repo::session::Session;
use crate::repo::view::View;
use crate::repo::writer::{SessionWriter, put_segment, write_session};
use crate::repo::{Catalog, Repository};

/// What is to go.
pub(super) struct Scope<'a> {
    pub catalog: &'a Catalog,
    pub view: &'a View,
    pub marked: &'a HashSet<PackId>,
    pub dropped: &'a HashSet<PointId>,
}

impl Scope<'_> {
    /// Returns true if a segment is deleted by the sweep: it speaks of a pack that goes, or its owner does.
    pub(super) fn replaces(&self, segment: &Segment) -> bool {
        is_swept(segment, self.marked, self.dropped)
    }
}

/// The rule by which whoever finds a sweep knows which segments go with it.
pub(super) fn is_swept(segment: &Segment, packs: &HashSet<PackId>, points: &HashSet<PointId>) -> bool {
    points.contains(&PointId::from(segment.owner))
        || segment.packs.iter().any(|pack| packs.contains(&pack.id))
}

/// Writes packs and segments; returns how many bytes.
///
/// # Errors
/// [`Error::Damaged`] if a live chunk is nowhere.
pub(super) fn rewrite(
    repository: &Repository,
    reader: &ChunkReader<'_>,
    session: &Session,
    scope: &Scope<'_>,
    mut live: Live,
    chosen: &Chosen,
    monitor: &dyn Monitor,
) -> Result<u64> {
    live.recount();
    let mut seen = HashSet::new();
    for_each_segment(repository, scope.catalog, monitor, &mut |_, segment| {
        note_what_stays(segment, scope, &mut seen, &mut live);
        Ok(())
    })?;
    let task = monitor.start("repack", chosen.plan.repack.iter().map(|pack| pack.stored_len).sum());
    let ((), written) = write_session(repository, reader, session.id(), |writer| {
        for_each_segment(repository, scope.catalog, monitor, &mut |_, segment| {
            repack(reader, writer, segment, scope, &mut live, &|bytes| monitor.advance(task, bytes), monitor)
        })
    })?;
    monitor.finish(task);
    let missing = live.missing();
    if missing > 0 {
        return Err(Error::Damaged(format!(
            "{missing} chunks that points need are in no pack; nothing was deleted"
        )));
    }
    let number = u32::try_from(written.segments.len()).unwrap_or(u32::MAX);
    let mut survivors = Survivors::new(repository, session.id(), number);
    for_each_segment(repository, scope.catalog, monitor, &mut |_, segment| {
        if scope.replaces(segment) { survivors.take(segment, scope) } else { Ok(()) }
    })?;
    survivors.finish()?;
    Ok(written.data_bytes + written.metadata_bytes + survivors.bytes)
}

/// Returns where a chunk of a segment is.
fn location(pack: &SegmentPack, chunk: &SegmentChunk) -> Option<Location> {
    let frame = *pack.frames.get(chunk.frame as usize)?;
    Some(Location { pack: pack.id, frame, kind: chunk.kind, offset: chunk.offset, len: chunk.len })
}

/// Notes the good copies of live chunks in packs that stay: `is_usable` leaves out what is marked or bad. A pack that two
/// segments list, which a sweep cut short may leave, counts once.
fn note_what_stays(segment: &Segment, scope: &Scope<'_>, seen: &mut HashSet<PackId>, live: &mut Live) {
    let new: Vec<bool> = segment.packs.iter().map(|pack| seen.insert(pack.id)).collect();
    for chunk in &segment.chunks {
        if new.get(chunk.pack as usize) != Some(&true) {
            continue;
        }
        let Some(pack) = segment.packs.get(chunk.pack as usize) else { continue };
        let usable = location(pack, chunk).is_some_and(|place| scope.view.is_usable(&chunk.id, &place));
        if usable {
            live.found(&chunk.id);
        }
    }
}

/// Copies what is live and nowhere else out of a segment's marked packs, each pack in its own order.
fn repack(
    reader: &ChunkReader<'_>,
    writer: &mut SessionWriter<'_>,
    segment: &Segment,
    scope: &Scope<'_>,
    live: &mut Live,
    advance: &dyn Fn(u64),
    monitor: &dyn Monitor,
) -> Result<()> {
    if !segment.packs.iter().any(|pack| scope.marked.contains(&pack.id)) {
        return Ok(());
    }
    let mut by_pack: HashMap<u32, Vec<&SegmentChunk>> = HashMap::new();
    for chunk in segment.chunks.iter().filter(|chunk| live.lacks(&chunk.id)) {
        by_pack.entry(chunk.pack).or_default().push(chunk);
    }
    for (number, pack) in (0u32..).zip(&segment.packs) {
        if !scope.marked.contains(&pack.id) || !scope.view.packs().contains_key(&pack.id) {
            continue;
        }
        let mut chunks = by_pack.remove(&number).unwrap_or_default();
        chunks.sort_unstable_by_key(|chunk| (chunk.frame, chunk.offset));
        for chunk in chunks {
            monitor.check()?;
            if !live.lacks(&chunk.id) {
                continue;
            }
            let places: Vec<Location> = location(pack, chunk).into_iter().collect();
            let content = reader
                .read_at(chunk.kind, chunk.id, &places)
                .context(|| format!("while writing anew what is needed of pack {}", pack.id))?;
            writer.copy(chunk.kind, chunk.id, &content)?;
            live.settle(&chunk.id);
        }
        advance(pack.stored_len);
    }
    Ok(())
}

/// Collects the packs that stay out of segments that go.
struct Survivors<'a> {
    repository: &'a Repository,
    owner: SessionId,
    number: u32,
    seen: HashSet<PackId>,
    packs: Vec<SegmentPack>,
    chunks: Vec<SegmentChunk>,
    bytes: u64,
}

impl<'a> Survivors<'a> {
    fn new(repository: &'a Repository, owner: SessionId, number: u32) -> Self {
        Self {
            repository,
            owner,
            number,
            seen: HashSet::new(),
            packs: Vec::new(),
            chunks: Vec::new(),
            bytes: 0,
        }
    }

    fn take(&mut self, segment: &Segment, scope: &Scope<'_>) -> Result<()> {
        let mut renumbered: Vec<Option<u32>> = Vec::with_capacity(segment.packs.len());
        for pack in &segment.packs {
            let stays = !scope.marked.contains(&pack.id)
                && scope.view.packs().contains_key(&pack.id)
                && self.seen.insert(pack.id);
            let number = u32::try_from(self.packs.len()).ok().filter(|_| stays);
            renumbered.push(number);
            if number.is_some() {
                self.packs.push(pack.clone());
            }
        }
        for chunk in &segment.chunks {
            if let Some(Some(pack)) = renumbered.get(chunk.pack as usize) {
                self.chunks.push(SegmentChunk { pack: *pack, ..*chunk });
            }
        }
        if self.chunks.len() >= SEGMENT_TARGET_CHUNKS {
            self.finish()?;
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        if self.packs.is_empty() {
            return Ok(());
        }
        let packs = std::mem::take(&mut self.packs);
        let chunks = std::mem::take(&mut self.chunks);
        let (_, len) = put_segment(self.repository, self.owner, self.number, packs, chunks)?;
        self.number += 1;
        self.bytes += len;
        Ok(())
    }
}

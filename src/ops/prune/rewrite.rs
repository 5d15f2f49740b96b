//! Writing anew what is live of packs that are to go, and the segments that speak of what stays.

use std::collections::{HashMap, HashSet};

use super::Chosen;
use super::live::{Live, record_copy};
use super::segments::{for_each_segment, refuse_unknown};
use crate::chunk::FramedChunk;
use crate::error::{Context, Error, Result};
use crate::extent::ByteRange;
use crate::format::limits::SEGMENT_TARGET_CHUNKS;
use crate::format::node::ChunkKind;
use crate::format::point::PointRecord;
use crate::format::segment::{Segment, SegmentChunk, SegmentPack};
use crate::id::{ChunkId, PackId, PointId, SegmentId, SessionId};
use crate::index::{Location, locate};
use crate::manifest::{EntryRef, NodeAt, Visitor, walk};
use crate::monitor::{Monitor, TaskId};
use crate::repo::reader::ChunkReader;
use crate::repo::rules::Rule;
use crate::repo::segments::SegmentCache;
use crate::repo::session::Session;
use crate::repo::view::View;
use crate::repo::writer::{FrameCopy, SessionWriter, put_segment, write_session};
use crate::repo::{Catalog, Repository};

/// Entries that are looked at together: a frame is copied as it is if all of its chunks are among them.
const BATCH_ENTRIES: usize = 1024;

/// What it means if a chunk cannot be read.
const CANNOT_COPY: &str = "nothing was deleted: a chunk that points need cannot be written anew";

/// What is to go.
pub(super) struct Scope<'a> {
    pub segments: &'a SegmentCache<'a>,
    pub catalog: &'a Catalog,
    pub view: &'a View,
    /// The points that stay.
    pub kept: &'a [&'a PointRecord],
    pub marked: &'a HashSet<PackId>,
    pub dropped: &'a HashSet<PointId>,
    /// Small segments that become one.
    pub merged: &'a HashSet<SegmentId>,
}

impl Scope<'_> {
    /// Returns true if the sweep deletes a segment: it speaks of a pack that goes, its owner goes, or it is merged.
    fn replaces(&self, id: SegmentId, segment: &Segment) -> bool {
        self.merged.contains(&id)
            || self.dropped.contains(&PointId::from(segment.owner))
            || segment.packs.iter().any(|pack| self.marked.contains(&pack.id))
    }
}

/// What was written, and what may go for it.
#[derive(Debug, Default)]
pub(super) struct Rewritten {
    /// Bytes of packs and segments.
    pub bytes: u64,
    /// The segments that say nothing any more that others do not.
    pub replaced: Vec<SegmentId>,
}

/// Writes packs and segments.
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
) -> Result<Rewritten> {
    live.recount();
    let mut seen = HashSet::new();
    let spare = for_each_segment(scope.segments, scope.catalog, monitor, &mut |_, segment| {
        note_what_stays(segment, scope, &mut seen, &mut live);
        Ok(())
    })?;
    refuse_unknown(&spare.unreadable, &seen, scope.view)?;
    live.count_wanting();
    let task = monitor.start("repack", chosen.plan.repack.iter().map(|pack| pack.live_len).sum());
    let ((), written) = write_session(repository, reader, session.id(), |writer| {
        let live = &mut live;
        let mut repack = Repack { repository, reader, writer, live, monitor, task, pending: Vec::new() };
        repack.all(scope.kept)
    })?;
    monitor.finish(task);
    if !repository.breaks(Rule::StopIfMissing) {
        refuse_missing(&live)?;
        refuse_wanting(&mut live)?;
    }
    let number = u32::try_from(written.segments.len()).unwrap_or(u32::MAX);
    let mut survivors = Survivors::new(repository, session.id(), number);
    let mut replaced: Vec<SegmentId> = spare.all(&HashSet::new()).collect();
    for_each_segment(scope.segments, scope.catalog, monitor, &mut |id, segment| {
        if scope.replaces(id, segment) {
            replaced.push(id);
            if !repository.breaks(Rule::ListSurvivors) {
                return survivors.take(segment, scope);
            }
        }
        Ok(())
    })?;
    survivors.finish()?;
    Ok(Rewritten { bytes: written.data_bytes + written.metadata_bytes + survivors.bytes, replaced })
}

/// Refuses to go on if anything that points need was not found.
///
/// # Errors
/// [`Error::Damaged`]
pub(super) fn refuse_missing(live: &Live) -> Result<()> {
    match live.missing() {
        0 => Ok(()),
        missing => Err(Error::Damaged(format!(
            "{missing} chunks that points need are in no pack; nothing was deleted"
        ))),
    }
}

/// Refuses to go on if anything was not written as often as it should be there, whatever was counted meanwhile.
fn refuse_wanting(live: &mut Live) -> Result<()> {
    match live.count_wanting() {
        0 => Ok(()),
        count => Err(Error::Damaged(format!(
            "{count} chunks that points need would have too few copies; nothing was deleted"
        ))),
    }
}

/// Notes the good copies of live chunks in packs that stay: `is_usable` leaves out what is marked or bad. A pack that two
/// segments list, which a sweep cut short may leave, counts once.
fn note_what_stays(segment: &Segment, scope: &Scope<'_>, seen: &mut HashSet<PackId>, live: &mut Live) {
    let new: Vec<bool> = segment.packs.iter().map(|pack| seen.insert(pack.id)).collect();
    for chunk in &segment.chunks {
        if new.get(chunk.pack as usize) != Some(&true) {
            continue;
        }
        let usable = locate(segment, chunk).is_some_and(|place| scope.view.is_usable(&chunk.id, &place));
        if usable {
            live.found(&chunk.id);
        }
    }
}

/// A frame by its pack, and its first byte there.
type FrameAt = (PackId, u32);

fn frame_at(place: &Location) -> FrameAt {
    (place.pack, place.frame.offset)
}

/// Copies what is live and has too few good copies in packs that stay, in the order of the newest disks: what is
/// restored together stands together.
struct Repack<'a, 'r, 'w> {
    repository: &'a Repository,
    reader: &'a ChunkReader<'r>,
    writer: &'a mut SessionWriter<'w>,
    live: &'a mut Live,
    monitor: &'a dyn Monitor,
    task: TaskId,
    pending: Vec<ChunkId>,
}

impl Repack<'_, '_, '_> {
    /// `points` are oldest first. Ends as soon as nothing is left to copy.
    fn all(&mut self, points: &[&PointRecord]) -> Result<()> {
        let (repository, reader) = (self.repository, self.reader);
        for record in points.iter().rev() {
            if !self.live.wants_any() {
                break;
            }
            for manifest in record.manifests() {
                let mut visitor = RepackVisitor { repack: self };
                walk(repository.geometry(), manifest, reader, &mut visitor)?;
                self.flush()?;
            }
            for (id, plain) in record_copy(repository, record)? {
                if self.live.lacks(&id) {
                    self.writer.copy(ChunkKind::Point, id, &plain)?;
                    self.live.settle(&id);
                }
            }
        }
        Ok(())
    }

    fn copy(&mut self, kind: ChunkKind, id: ChunkId, places: &[Location]) -> Result<()> {
        self.monitor.check()?;
        let content = match self.reader.read_at(kind, id, places) {
            Err(_) if self.repository.breaks(Rule::StopIfMissing) => return Ok(()),
            read => read.context(|| CANNOT_COPY)?,
        };
        self.writer.copy(kind, id, &content)?;
        self.live.settle(&id);
        self.monitor.advance(self.task, content.len() as u64);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let ids = std::mem::take(&mut self.pending);
        let places = self.reader.good_places(&ids)?;
        let mut whole = self.whole_frames(&ids, &places);
        for (id, place) in ids.iter().zip(places) {
            // the same chunk may be pending twice
            if !self.live.lacks(id) {
                continue;
            }
            let frame = place.and_then(|place| Some((place, whole.remove(&frame_at(&place))?)));
            match frame {
                // of a segment that is not as it should be, this one may not be among them
                Some((place, chunks)) if chunks.iter().any(|chunk| chunk.id == *id) => {
                    self.copy_frame(&place, chunks)?;
                }
                _ => self.copy(ChunkKind::Data, *id, place.as_slice())?,
            }
        }
        Ok(())
    }

    /// Returns the frames all of whose chunks are among these, and are to be written anew: they stand near to each other on the
    /// newest disk. Of short frames longer ones are made.
    fn whole_frames(
        &mut self,
        ids: &[ChunkId],
        places: &[Option<Location>],
    ) -> HashMap<FrameAt, Vec<FramedChunk>> {
        let mut frames: HashMap<FrameAt, (u32, Vec<FramedChunk>)> = HashMap::new();
        if self.repository.breaks(Rule::StopIfMissing) {
            return HashMap::new();
        }
        let least = self.repository.config().frame_target_len / 2;
        for (id, place) in ids.iter().zip(places) {
            let Some(place) = place.filter(|place| place.kind == ChunkKind::Data) else { continue };
            if place.frame.raw_len >= least && self.live.lacks(id) {
                let (_, chunks) = frames.entry(frame_at(&place)).or_insert((place.frame.raw_len, Vec::new()));
                chunks.push(FramedChunk { kind: place.kind, id: *id, offset: place.offset, len: place.len });
            }
        }
        let whole = frames.into_iter().filter_map(|(at, (raw_len, mut chunks))| {
            chunks.sort_unstable_by_key(|chunk| chunk.offset);
            chunks.dedup_by_key(|chunk| chunk.offset);
            FramedChunk::fill(&chunks, raw_len).then_some((at, chunks))
        });
        whole.collect()
    }

    fn copy_frame(&mut self, place: &Location, chunks: Vec<FramedChunk>) -> Result<()> {
        self.monitor.check()?;
        let mut bytes = 0;
        for chunk in &chunks {
            self.live.settle(&chunk.id);
            bytes += u64::from(chunk.len);
        }
        let copy = FrameCopy { pack: place.pack, entry: place.frame, chunks, failing: CANNOT_COPY };
        self.writer.copy_frame(copy)?;
        self.monitor.advance(self.task, bytes);
        Ok(())
    }
}

struct RepackVisitor<'v, 'a, 'r, 'w> {
    repack: &'v mut Repack<'a, 'r, 'w>,
}

impl Visitor for RepackVisitor<'_, '_, '_, '_> {
    fn node(&mut self, node: NodeAt) -> Result<bool> {
        self.repack.monitor.check()?;
        if !self.repack.live.wants_any() || !self.repack.live.walk(&node.id) {
            return Ok(false);
        }
        if self.repack.live.lacks(&node.id) {
            let place = self.repack.reader.good_places(&[node.id])?.pop().flatten();
            self.repack.copy(ChunkKind::Node, node.id, place.as_slice())?;
        }
        Ok(true)
    }

    fn entry(&mut self, _range: ByteRange, entry: EntryRef) -> Result<()> {
        if let EntryRef::Chunk { id, .. } = entry
            && self.repack.live.wants_data()
            && self.repack.live.lacks(&id)
        {
            self.repack.pending.push(id);
            if self.repack.pending.len() >= BATCH_ENTRIES {
                return self.repack.flush();
            }
        }
        Ok(())
    }
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
            let stays =
                !scope.marked.contains(&pack.id) && scope.view.has_pack(pack.id) && self.seen.insert(pack.id);
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

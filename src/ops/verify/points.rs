//! Walking the manifests of points: is everything there that a restore needs?

use std::cell::OnceCell;
use std::collections::{HashMap, HashSet};

use super::{Bad, Findings, Scope, VerifyLevel, VerifyReport};
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::name::ObjectName;
use crate::format::node::ChunkKind;
use crate::format::point::{Manifest, PointRecord};
use crate::format::segment::Segment;
use crate::id::{ChunkId, PackId, PointId};
use crate::index::{Index, Location, MemoryIndex, locate};
use crate::manifest::{EntryRef, NodeAt, Visitor, walk};
use crate::monitor::Monitor;
use crate::ops::{Affected, Finding};
use crate::repo::reader::{ChunkReader, in_parts};
use crate::repo::view::View;
use crate::repo::{PointEntry, Repository};

/// What a walk meets is judged in batches of so many events; 72 bytes each.
pub(super) const BATCH_EVENTS: usize = 8 * 1024;
/// Chunks of which it is remembered that they are in order: a hash table of 2^19 places, about 19 MiB.
const MAX_SOUND: usize = 450_000;

/// What is wrong with a pack whose segment was lost.
const UNLISTED: &str = "no segment lists it: restores find what it has, backups and prunes do not; `vmkeep repair index` lists it anew, or, where it is damaged, `vmkeep repair packs` stores anew what is left of it";

/// Returns the maps of a point with the names of what they map.
pub(super) fn maps(record: &PointRecord) -> impl Iterator<Item = (&str, &Manifest)> {
    let disks = record.disks.iter().map(|disk| (disk.target.as_str(), &disk.manifest));
    disks.chain(record.files.iter().map(|file| (file.name.as_str(), &file.manifest)))
}

/// Walks every point; a subtree that several points share is walked once, unless something is wrong in it:
/// then each point that it affects is named.
pub(super) fn verify_points(
    scope: &Scope<'_>,
    reader: &ChunkReader<'_>,
    points: &[&PointEntry],
    (bad, mut sound): (&Bad, Sound),
    monitor: &dyn Monitor,
    findings: &mut Findings,
    report: &mut VerifyReport,
) -> Result<()> {
    let mut clean = HashSet::new();
    let unlisted = OnceCell::new();
    let task = monitor.start("points", 0);
    for entry in points {
        for (name, manifest) in maps(&entry.record) {
            let mut walker = Walker {
                reader,
                bad,
                scope,
                unlisted: &unlisted,
                monitor,
                findings: &mut *findings,
                clean: &mut clean,
                sound: &mut sound,
                open: Vec::new(),
                queue: Vec::new(),
                queued_nodes: HashSet::new(),
                faults: 0,
                chunks: 0,
                point: entry.record.id,
                domain: &entry.record.domain,
                disk: name,
            };
            let walked = walk(scope.repository.geometry(), manifest, reader, &mut walker);
            let walked = walked.and_then(|()| walker.settle(u8::MAX));
            report.chunks += walker.chunks;
            match walked {
                Ok(()) => {}
                Err(error @ Error::Malformed { .. }) => {
                    let whole = ByteRange::new(0, manifest.size);
                    let object = ObjectName::Outcome(entry.record.id.into()).to_string();
                    let finding = walker.findings.at(object, &error.to_string());
                    whole.into_iter().for_each(|range| affect(finding, &entry.record, name, range));
                }
                Err(error) => return Err(error),
            }
        }
    }
    monitor.finish(task);
    Ok(())
}

fn affect(finding: &mut Finding, record: &PointRecord, disk: &str, range: ByteRange) {
    add_range(finding, record.id, &record.domain, disk, range);
}

pub(super) fn add_range(finding: &mut Finding, point: PointId, domain: &str, disk: &str, range: ByteRange) {
    let known = finding.affected.iter_mut().find(|affected| affected.point == point && affected.disk == disk);
    match known {
        Some(affected) => match affected.ranges.last_mut() {
            Some((start, len)) if *start + *len == range.start() => *len += range.len(),
            _ => affected.ranges.push((range.start(), range.len())),
        },
        None => finding.affected.push(Affected {
            point,
            domain: domain.to_owned(),
            disk: disk.to_owned(),
            ranges: vec![(range.start(), range.len())],
        }),
    }
}

/// Chunks that were found in order lately, first in the segments, then by look-ups: points that share content in leaves of
/// their own name most chunks many times.
#[derive(Default)]
pub(super) struct Sound {
    /// How many bytes were needed.
    needed: HashMap<ChunkId, u32>,
}

impl Sound {
    /// Notes the good chunks of disk content of a segment whose packs were judged, as long as there is room. In a repository
    /// that has many more they do not last: the walk makes room for what it meets.
    pub(super) fn note_segment(&mut self, segment: &Segment, view: &View, bad: &Bad) {
        for chunk in segment.chunks.iter().filter(|chunk| chunk.kind == ChunkKind::Data) {
            if self.needed.len() >= MAX_SOUND {
                return;
            }
            let place = locate(segment, chunk).filter(|place| view.is_readable(place));
            if let Some(place) = place.filter(|place| bad.spares(view, ChunkKind::Data, chunk.id, place)) {
                self.note(chunk.id, u64::from(place.len));
            }
        }
    }

    fn has(&self, id: &ChunkId, end: u64) -> bool {
        self.needed.get(id).is_some_and(|needed| u64::from(*needed) >= end)
    }

    fn note(&mut self, id: ChunkId, end: u64) {
        if self.needed.len() >= MAX_SOUND {
            self.needed.clear();
        }
        let needed = self.needed.entry(id).or_default();
        *needed = (*needed).max(u32::try_from(end).unwrap_or(0));
    }
}

/// What a walk has met.
enum Event {
    Node(NodeAt),
    /// A chunk, of which the entry needs the first `end` bytes.
    Chunk {
        range: ByteRange,
        id: ChunkId,
        end: u64,
    },
    Unreadable(ByteRange),
    Fault(NodeAt, Box<Error>),
}

/// Tells good places from others.
#[derive(Clone, Copy)]
struct Judge<'a, 'r> {
    reader: &'a ChunkReader<'r>,
    bad: &'a Bad,
}

impl Judge<'_, '_> {
    fn is_good(&self, kind: ChunkKind, id: ChunkId, place: &Location) -> bool {
        self.bad.spares(self.reader.view(), kind, id, place)
    }

    /// Returns the packs that have a good copy of a node.
    fn copies(&self, id: ChunkId, places: &[Location]) -> HashSet<PackId> {
        let good = places.iter().filter(|place| self.is_good(ChunkKind::Node, id, place));
        good.map(|place| place.pack).collect()
    }

    /// Returns for each event the places of its chunk if they are not as they should be.
    fn judge(&self, events: &[Event]) -> Result<Vec<Option<Vec<Location>>>> {
        in_parts(events, |part| self.judge_part(part))
    }

    fn judge_part(&self, events: &[Event]) -> Result<Vec<Option<Vec<Location>>>> {
        let ids = events.iter().filter_map(|event| match event {
            Event::Node(node) => Some(node.id),
            Event::Chunk { id, .. } => Some(*id),
            Event::Unreadable(_) | Event::Fault(..) => None,
        });
        let mut found = self.reader.locate(&ids.collect::<Vec<ChunkId>>())?.into_iter();
        let judged = events.iter().map(|event| {
            let (places, is_sound) = match event {
                Event::Node(node) => {
                    let places = found.next().unwrap_or_default();
                    let is_sound = self.copies(node.id, &places).len() >= 2;
                    (places, is_sound)
                }
                Event::Chunk { id, end, .. } => {
                    let places = found.next().unwrap_or_default();
                    let reaches = |place: &Location| u64::from(place.len) >= *end;
                    let is_good = |place| reaches(place) && self.is_good(ChunkKind::Data, *id, place);
                    let is_sound = places.iter().any(is_good);
                    (places, is_sound)
                }
                Event::Unreadable(_) | Event::Fault(..) => return None,
            };
            (!is_sound).then_some(places)
        });
        Ok(judged.collect())
    }
}

/// Goes ahead and queues what it meets; findings are made of the queue, in the order of the walk, once there is enough to
/// look up on all cores.
struct Walker<'a, 'r> {
    reader: &'a ChunkReader<'r>,
    bad: &'a Bad,
    scope: &'a Scope<'a>,
    /// Made when it is needed.
    unlisted: &'a OnceCell<MemoryIndex>,
    monitor: &'a dyn Monitor,
    findings: &'a mut Findings,
    /// Nodes below which everything was found in order.
    clean: &'a mut HashSet<ChunkId>,
    sound: &'a mut Sound,
    queue: Vec<Event>,
    queued_nodes: HashSet<ChunkId>,
    /// The path to where the queue begins, with the number of faults before each.
    open: Vec<(NodeAt, u64)>,
    faults: u64,
    chunks: u64,
    point: PointId,
    domain: &'a str,
    disk: &'a str,
}

impl Walker<'_, '_> {
    fn push(&mut self, event: Event) -> Result<()> {
        self.queue.push(event);
        if self.queue.len() >= BATCH_EVENTS { self.judge_queue() } else { Ok(()) }
    }

    /// Judges all that was met, and closes the path up to the parent of a node of this level.
    fn settle(&mut self, level: u8) -> Result<()> {
        self.judge_queue()?;
        self.close(level);
        Ok(())
    }

    fn close(&mut self, level: u8) {
        while let Some((node, faults_before)) = self.open.pop_if(|(node, _)| node.level <= level) {
            if faults_before == self.faults {
                self.clean.insert(node.id);
            }
        }
    }

    fn judge_queue(&mut self) -> Result<()> {
        let queue = std::mem::take(&mut self.queue);
        if queue.is_empty() {
            return Ok(());
        }
        self.queued_nodes.clear();
        let judged = self.judge().judge(&queue)?;
        for (event, faulty) in queue.into_iter().zip(judged) {
            match event {
                Event::Node(node) => {
                    self.close(node.level);
                    self.open.push((node, self.faults));
                    if let Some(places) = faulty {
                        self.miss_copies(node, &places)?;
                    }
                }
                Event::Chunk { range, id, end } => {
                    self.chunks += 1;
                    match faulty {
                        Some(places) => self.miss_chunk(range, id, end, &places)?,
                        None => self.sound.note(id, end),
                    }
                }
                Event::Unreadable(range) => {
                    self.faults += 1;
                    let object = ObjectName::Outcome(self.point.into()).to_string();
                    let problem = "ranges could not be recovered when this point was repaired";
                    let finding = self.findings.at(object, problem);
                    add_range(finding, self.point, self.domain, self.disk, range);
                }
                Event::Fault(node, error) => {
                    self.faults += 1;
                    let finding = self.findings.at(format!("manifest node {}", node.id), &error.to_string());
                    if !finding.chunks.contains(&node.id) {
                        finding.chunks.push(node.id);
                    }
                    add_range(finding, self.point, self.domain, self.disk, node.range);
                }
            }
        }
        Ok(())
    }

    fn judge(&self) -> Judge<'_, '_> {
        Judge { reader: self.reader, bad: self.bad }
    }

    /// Notices a chunk that has no good place.
    fn miss_chunk(&mut self, range: ByteRange, id: ChunkId, end: u64, places: &[Location]) -> Result<()> {
        self.faults += 1;
        // the index may remember a segment that cannot be read any more
        let is_listed = |pack: &PackId| self.bad.listed.contains(pack);
        let mut packs = places.iter().map(|place| place.pack).chain(self.reader.hinted_packs(id)?);
        let known_place = match (packs.find(is_listed), self.unlisted_place(ChunkKind::Data, id, end)?) {
            (_, Some((_, true))) => return Ok(()),
            (None, Some((pack, false))) => Some(pack),
            (listed, _) => listed,
        };
        let finding = match known_place {
            Some(pack) => self.findings.at_pack(pack, "chunks of it cannot be read"),
            None => self.findings.at(format!("chunk {id}"), "the chunk is in no pack"),
        };
        if !finding.chunks.contains(&id) {
            finding.chunks.push(id);
        }
        add_range(finding, self.point, self.domain, self.disk, range);
        Ok(())
    }

    /// Notices a node of which fewer than two copies are left.
    fn miss_copies(&mut self, node: NodeAt, places: &[Location]) -> Result<()> {
        let left = self.judge().copies(node.id, places).len();
        self.faults += 1;
        if left == 0
            && let Some((_, true)) = self.unlisted_place(ChunkKind::Node, node.id, 0)?
        {
            return Ok(());
        }
        let problem = format!("{left} of 2 copies of the manifest node are left");
        let finding = self.findings.at(format!("manifest node {}", node.id), &problem);
        if left == 0 {
            add_range(finding, self.point, self.domain, self.disk, node.range);
        }
        Ok(())
    }

    /// Returns an index of the packs that no segment lists which counts, made of their own tables.
    fn unlisted(&self) -> Result<&MemoryIndex> {
        if let Some(index) = self.unlisted.get() {
            return Ok(index);
        }
        let index = MemoryIndex::default();
        let packs = self.reader.view().pack_lens()?.into_iter();
        let packs = packs.filter(|(id, _)| !self.bad.listed.contains(id));
        self.scope.repository.index_tables(&index, packs, self.monitor)?;
        Ok(self.unlisted.get_or_init(|| index))
    }

    /// Notices the packs that have a chunk of at least `len` bytes, but that no segment lists which counts. Returns one, and
    /// whether a restore finds the chunk there: then no range is affected.
    fn unlisted_place(&mut self, kind: ChunkKind, id: ChunkId, len: u64) -> Result<Option<(PackId, bool)>> {
        let mut places = self.unlisted()?.lookup(&[id])?.pop().unwrap_or_default();
        places.retain(|place| place.kind == kind && u64::from(place.len) >= len);
        let Some(pack) = places.iter().map(|place| place.pack).min() else { return Ok(None) };
        if self.scope.level >= VerifyLevel::Data {
            match self.reader.read_at(kind, id, &places) {
                Ok(_) => {}
                Err(Error::Cancelled) => return Err(Error::Cancelled),
                Err(_) => return Ok(Some((pack, false))),
            }
        }
        for place in places {
            let finding = self.findings.at_pack(place.pack, UNLISTED);
            if !finding.chunks.contains(&id) {
                finding.chunks.push(id);
            }
        }
        Ok(Some((pack, true)))
    }
}

impl Visitor for Walker<'_, '_> {
    fn node(&mut self, node: NodeAt) -> Result<bool> {
        self.monitor.check()?;
        // what is met again before it was judged is judged now: it need not be walked twice
        if self.queued_nodes.contains(&node.id) || self.open.iter().any(|(open, _)| open.id == node.id) {
            self.settle(node.level)?;
        }
        if self.clean.contains(&node.id) {
            return Ok(false);
        }
        self.queued_nodes.insert(node.id);
        self.push(Event::Node(node))?;
        Ok(true)
    }

    fn entry(&mut self, range: ByteRange, entry: EntryRef) -> Result<()> {
        match entry {
            EntryRef::Zero => Ok(()),
            EntryRef::Unreadable => self.push(Event::Unreadable(range)),
            EntryRef::Chunk { id, offset } => {
                let end = u64::from(offset) + range.len();
                if self.sound.has(&id, end) {
                    self.chunks += 1;
                    return Ok(());
                }
                self.push(Event::Chunk { range, id, end })
            }
        }
    }

    fn fault(&mut self, node: NodeAt, error: Error) -> Result<()> {
        if matches!(error, Error::Cancelled) {
            return Err(error);
        }
        self.push(Event::Fault(node, Box::new(error)))
    }
}

/// Returns the packs that points need, with every copy of their nodes.
pub(super) fn needed_packs(
    repository: &Repository,
    view: &View,
    points: &[&PointEntry],
) -> Result<HashSet<PackId>> {
    struct Collector<'a, 'r> {
        reader: &'a ChunkReader<'r>,
        seen: HashSet<ChunkId>,
        pending: Vec<ChunkId>,
        packs: HashSet<PackId>,
    }
    impl Collector<'_, '_> {
        fn add(&mut self, id: ChunkId) -> Result<()> {
            self.pending.push(id);
            if self.pending.len() >= BATCH_EVENTS { self.look_up() } else { Ok(()) }
        }
        fn look_up(&mut self) -> Result<()> {
            let found = in_parts(&self.pending, |ids| self.reader.locate(ids))?;
            self.packs.extend(found.iter().flatten().map(|place| place.pack));
            self.pending.clear();
            Ok(())
        }
    }
    impl Visitor for Collector<'_, '_> {
        fn node(&mut self, node: NodeAt) -> Result<bool> {
            if !self.seen.insert(node.id) {
                return Ok(false);
            }
            self.add(node.id).map(|()| true)
        }
        fn entry(&mut self, _range: ByteRange, entry: EntryRef) -> Result<()> {
            match entry {
                EntryRef::Chunk { id, .. } => self.add(id),
                _ => Ok(()),
            }
        }
        fn fault(&mut self, _node: NodeAt, error: Error) -> Result<()> {
            // the walk that verifies reports it
            if matches!(error, Error::Cancelled) { Err(error) } else { Ok(()) }
        }
    }
    let reader = ChunkReader::new(repository, view);
    let (seen, pending, packs) = (HashSet::new(), Vec::new(), HashSet::new());
    let mut collector = Collector { reader: &reader, seen, pending, packs };
    for entry in points {
        for (_, manifest) in maps(&entry.record) {
            match walk(repository.geometry(), manifest, &reader, &mut collector) {
                Ok(()) | Err(Error::Malformed { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }
    collector.look_up()?;
    Ok(collector.packs)
}

//! Walking the manifests of points: is everything there that a restore needs?

use std::cell::OnceCell;
use std::collections::HashSet;

use super::{Bad, Findings, Scope, VerifyLevel, VerifyReport};
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::name::ObjectName;
use crate::format::node::ChunkKind;
use crate::format::point::{Manifest, PointRecord};
use crate::id::{ChunkId, PackId, PointId};
use crate::index::{Index, Location, MemoryIndex};
use crate::manifest::{EntryRef, NodeAt, Visitor, walk};
use crate::monitor::Monitor;
use crate::ops::{Affected, Finding};
use crate::repo::reader::ChunkReader;
use crate::repo::view::View;
use crate::repo::{PointEntry, Repository};

/// Entries that are looked up together.
const BATCH_ENTRIES: usize = 1024;

/// What is wrong with a pack whose segment was lost.
const UNLISTED: &str = "no segment lists it: restores find what it has, backups and prunes do not; `vmkeep repair index` lists it anew";

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
    bad: &Bad,
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
                open: Vec::new(),
                pending: Vec::new(),
                faults: 0,
                chunks: 0,
                point: entry.record.id,
                domain: &entry.record.domain,
                disk: name,
            };
            let walked = walk(scope.repository.geometry(), manifest, reader, &mut walker);
            let walked = walked.and_then(|()| walker.settle(0));
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
    /// The path to where the walk is, with the number of faults before each.
    open: Vec<(NodeAt, u64)>,
    pending: Vec<(ByteRange, ChunkId, u64)>,
    faults: u64,
    chunks: u64,
    point: PointId,
    domain: &'a str,
    disk: &'a str,
}

impl Walker<'_, '_> {
    /// Closes all but the first `depth` nodes of the path.
    fn settle(&mut self, depth: usize) -> Result<()> {
        self.look_up()?;
        while self.open.len() > depth {
            if let Some((node, faults_before)) = self.open.pop()
                && faults_before == self.faults
            {
                self.clean.insert(node.id);
            }
        }
        Ok(())
    }

    fn look_up(&mut self) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        let ids: Vec<ChunkId> = pending.iter().map(|(_, id, _)| *id).collect();
        let found = self.reader.locate(&ids)?;
        for ((range, id, end), places) in pending.into_iter().zip(found) {
            self.chunks += 1;
            let good = |place: &&Location| {
                place.kind == ChunkKind::Data
                    && u64::from(place.len) >= end
                    && self.bad.listed.contains(&place.pack)
                    && !self.bad.has(self.reader.view(), place.pack, id)
            };
            if places.iter().find(good).is_some() {
                continue;
            }
            self.faults += 1;
            // the index may remember a segment that cannot be read any more
            let is_listed = |pack: &PackId| self.bad.listed.contains(pack);
            let mut packs = places.iter().map(|place| place.pack).chain(self.reader.hinted_packs(id)?);
            let known_place = match (packs.find(is_listed), self.unlisted_place(ChunkKind::Data, id, end)?) {
                (_, Some((_, true))) => continue,
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
        }
        Ok(())
    }

    /// Returns an index of the packs that no segment lists which counts, made of their own tables.
    fn unlisted(&self) -> Result<&MemoryIndex> {
        if let Some(index) = self.unlisted.get() {
            return Ok(index);
        }
        let index = MemoryIndex::default();
        let packs = self.reader.view().packs().iter().map(|(id, len)| (*id, *len));
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

    /// Notices a node of which only one copy is left.
    fn check_copies(&mut self, node: NodeAt) -> Result<()> {
        let places = self.reader.locate(&[node.id])?.pop().unwrap_or_default();
        let good: HashSet<PackId> = places
            .iter()
            .filter(|place| {
                place.kind == ChunkKind::Node
                    && self.bad.listed.contains(&place.pack)
                    && !self.bad.has(self.reader.view(), place.pack, node.id)
            })
            .map(|place| place.pack)
            .collect();
        if good.len() < 2 {
            self.faults += 1;
            if good.is_empty()
                && let Some((_, true)) = self.unlisted_place(ChunkKind::Node, node.id, 0)?
            {
                return Ok(());
            }
            let problem = format!("{} of 2 copies of the manifest node are left", good.len());
            let finding = self.findings.at(format!("manifest node {}", node.id), &problem);
            if good.is_empty() {
                add_range(finding, self.point, self.domain, self.disk, node.range);
            }
        }
        Ok(())
    }
}

impl Visitor for Walker<'_, '_> {
    fn node(&mut self, node: NodeAt) -> Result<bool> {
        self.monitor.check()?;
        let depth = self.open.iter().take_while(|(parent, _)| parent.level > node.level).count();
        self.settle(depth)?;
        if self.clean.contains(&node.id) {
            return Ok(false);
        }
        self.open.push((node, self.faults));
        self.check_copies(node)?;
        Ok(true)
    }

    fn entry(&mut self, range: ByteRange, entry: EntryRef) -> Result<()> {
        match entry {
            EntryRef::Zero => {}
            EntryRef::Unreadable => {
                self.faults += 1;
                let object = ObjectName::Outcome(self.point.into()).to_string();
                let problem = "ranges could not be recovered when this point was repaired";
                let finding = self.findings.at(object, problem);
                add_range(finding, self.point, self.domain, self.disk, range);
            }
            EntryRef::Chunk { id, offset } => {
                self.pending.push((range, id, u64::from(offset) + range.len()));
                if self.pending.len() >= BATCH_ENTRIES {
                    self.look_up()?;
                }
            }
        }
        Ok(())
    }

    fn fault(&mut self, node: NodeAt, error: Error) -> Result<()> {
        if matches!(error, Error::Cancelled) {
            return Err(error);
        }
        self.faults += 1;
        let finding = self.findings.at(format!("manifest node {}", node.id), &error.to_string());
        if !finding.chunks.contains(&node.id) {
            finding.chunks.push(node.id);
        }
        add_range(finding, self.point, self.domain, self.disk, node.range);
        Ok(())
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
        packs: HashSet<PackId>,
    }
    impl Collector<'_, '_> {
        fn add(&mut self, id: ChunkId) -> Result<()> {
            let places = self.reader.locate(&[id])?.pop().unwrap_or_default();
            self.packs.extend(places.iter().map(|place| place.pack));
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
    let mut collector = Collector { reader: &reader, seen: HashSet::new(), packs: HashSet::new() };
    for entry in points {
        for (_, manifest) in maps(&entry.record) {
            match walk(repository.geometry(), manifest, &reader, &mut collector) {
                Ok(()) | Err(Error::Malformed { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(collector.packs)
}

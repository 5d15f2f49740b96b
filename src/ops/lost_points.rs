//! Points whose outcome is lost. Each point keeps two copies of its record among the metadata: one that no outcome and no
//! prune knows of tells of a point that was there.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::codec;
use crate::format::limits::MAX_CHUNK_LEN;
use crate::format::name::ObjectName;
use crate::format::node::ChunkKind;
use crate::format::point::PointRecord;
use crate::id::{ChunkId, PointId, SessionId};
use crate::index::{Location, locate};
use crate::manifest::{EntryRef, NodeAt, Visitor, walk};
use crate::monitor::Monitor;
use crate::repo::catalog::Ended;
use crate::repo::reader::ChunkReader;
use crate::repo::segments::SegmentCache;
use crate::repo::{Catalog, Repository};

/// Entries that are looked up together.
const BATCH_ENTRIES: usize = 1024;

/// A point without an outcome, or with one that cannot be read.
#[derive(Debug, Clone)]
pub(super) struct LostPoint {
    pub record: PointRecord,
    /// There is an outcome, which cannot be read.
    pub is_unreadable: bool,
    /// Everything that it needs is somewhere in the repository.
    pub is_complete: bool,
}

/// What was found.
#[derive(Debug, Clone, Default)]
pub(super) struct LostPoints {
    pub points: Vec<LostPoint>,
    /// There is a copy of a record that cannot be read: it may be of any session.
    pub has_unreadable: bool,
}

/// Finds them. Costs a read for each copy of a record that no outcome has.
///
/// # Errors
/// Those of the storage; [`Error::Cancelled`].
pub(super) fn find(
    segments: &SegmentCache<'_>,
    catalog: &Catalog,
    reader: &ChunkReader<'_>,
    monitor: &dyn Monitor,
) -> Result<LostPoints> {
    let repository = segments.repository();
    let mut found: BTreeMap<PointId, LostPoint> = BTreeMap::new();
    let mut has_unreadable = false;
    for (id, places) in unknown_copies(segments, catalog, monitor)? {
        monitor.check()?;
        let Some(record) = read_record(reader, id, &places)? else {
            has_unreadable = true;
            continue;
        };
        let session = SessionId::from(record.id);
        if catalog.is_swept(record.id) || found.contains_key(&record.id) {
            continue;
        }
        let is_unreadable = catalog.ended(session) == Some(Ended::Unreadable);
        if !is_unreadable && !is_lost(repository, session)? {
            continue;
        }
        let is_complete = is_complete(repository, reader, &record, monitor)?;
        found.insert(record.id, LostPoint { record, is_unreadable, is_complete });
    }
    Ok(LostPoints { points: found.into_values().collect(), has_unreadable })
}

/// Returns the ids of copies of records that belong to no point that there is, and where segments say that they are: such a
/// segment need not count, and the index does not have it then.
fn unknown_copies(
    segments: &SegmentCache<'_>,
    catalog: &Catalog,
    monitor: &dyn Monitor,
) -> Result<HashMap<ChunkId, Vec<Location>>> {
    let repository = segments.repository();
    let mut known = HashSet::new();
    for entry in catalog.points().iter().chain(catalog.forgotten()) {
        let object = || format!("the record of point {}", entry.record.id);
        let copy = codec::encode(&entry.record).map_err(|fault| Error::malformed(object(), fault))?;
        let parts = copy.chunks(MAX_CHUNK_LEN as usize);
        known.extend(parts.map(|part| repository.hasher().chunk_id(ChunkKind::Point, part)));
    }
    let mut unknown: HashMap<ChunkId, Vec<Location>> = HashMap::new();
    for id in repository.segments()? {
        monitor.check()?;
        let segment = match segments.load(id) {
            Ok(segment) => segment,
            Err(Error::NotFound { .. }) => continue,
            Err(error) if repository.is_of_object(&error) => continue,
            Err(error) => return Err(error),
        };
        for chunk in segment.chunks.iter().filter(|chunk| chunk.kind == ChunkKind::Point) {
            if !known.contains(&chunk.id) {
                unknown.entry(chunk.id).or_default().extend(locate(&segment, chunk));
            }
        }
    }
    Ok(unknown)
}

/// Reads a record from its copy. One of several parts, with an XML of more than a MiB, is not put together.
fn read_record(reader: &ChunkReader<'_>, id: ChunkId, places: &[Location]) -> Result<Option<PointRecord>> {
    let bytes = match reader.read_at(ChunkKind::Point, id, places) {
        Ok(bytes) => bytes,
        Err(error) if error.is_damage() || matches!(error, Error::NotFound { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    let record = codec::decode::<PointRecord>(&bytes).ok();
    Ok(record.filter(|record| record.check().is_ok()))
}

/// Returns true if a session has ended without leaving an outcome, as none does by itself: it is not registered any more.
fn is_lost(repository: &Repository, session: SessionId) -> Result<bool> {
    let exists = |name| match repository.storage().len(name) {
        Ok(_) => Ok(true),
        Err(Error::NotFound { .. }) => Ok(false),
        // whatever it is: it is there
        Err(error) if repository.is_of_object(&error) => Ok(true),
        Err(error) => Err(error),
    };
    let outcome = ObjectName::Outcome(session);
    // once more at the end: it may have been put, and the registration removed, between the first two looks
    Ok(!exists(outcome)? && !exists(ObjectName::Session(session))? && !exists(outcome)?)
}

fn is_complete(
    repository: &Repository,
    reader: &ChunkReader<'_>,
    record: &PointRecord,
    monitor: &dyn Monitor,
) -> Result<bool> {
    let mut checker =
        Checker { reader, monitor, seen: HashSet::new(), pending: Vec::new(), is_complete: true };
    for manifest in record.manifests() {
        match walk(repository.geometry(), manifest, reader, &mut checker) {
            Ok(()) => {}
            Err(Error::Malformed { .. }) => return Ok(false),
            Err(error) => return Err(error),
        }
    }
    checker.look_up()?;
    Ok(checker.is_complete)
}

struct Checker<'a, 'r> {
    reader: &'a ChunkReader<'r>,
    monitor: &'a dyn Monitor,
    seen: HashSet<ChunkId>,
    pending: Vec<ChunkId>,
    is_complete: bool,
}

impl Checker<'_, '_> {
    fn look_up(&mut self) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        self.is_complete &= self.reader.is_somewhere(&pending)?.into_iter().all(|is_there| is_there);
        Ok(())
    }
}

impl Visitor for Checker<'_, '_> {
    fn node(&mut self, node: NodeAt) -> Result<bool> {
        self.monitor.check()?;
        Ok(self.is_complete && self.seen.insert(node.id))
    }

    fn entry(&mut self, _range: ByteRange, entry: EntryRef) -> Result<()> {
        if let EntryRef::Chunk { id, .. } = entry {
            self.pending.push(id);
            if self.pending.len() >= BATCH_ENTRIES {
                return self.look_up();
            }
        }
        Ok(())
    }

    fn fault(&mut self, _node: NodeAt, error: Error) -> Result<()> {
        if !error.is_damage() {
            return Err(error);
        }
        self.is_complete = false;
        Ok(())
    }
}

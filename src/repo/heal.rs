//! Which ranges of a disk have to be read again because the repository has lost their content.
//!
//! A chunk that is recorded as damaged counts as absent. Whoever has its content stores it again: the next backup of
//! the disk reads the range whatever its bitmap says, and cuts it as it was cut before, so that it becomes the same
//! chunk and every point that names it is whole again.

use super::Repository;
use super::reader::ChunkReader;
use crate::error::{Error, Result};
use crate::extent::{ByteRange, RangeSet};
use crate::format::point::Manifest;
use crate::id::ChunkId;
use crate::manifest::{EntryRef, NodeAt, Visitor, walk};
use crate::monitor::Monitor;

/// Entries that are looked up together, on all cores; 48 bytes each.
const BATCH_ENTRIES: usize = 8 * 1024;

/// What a map has lost.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lost {
    /// Ranges whose chunks are gone, or were not recovered by a repair.
    pub ranges: RangeSet,
    /// A node could not be read: what is below it is among the ranges, and the map cannot be built on.
    pub nodes: bool,
}

/// Finds what of a map is lost, as far as is known. Costs a walk of the map, but nothing while no damage is recorded and
/// no verify has found a point to be damaged.
///
/// # Errors
/// Those of the storage; [`Error::Cancelled`].
pub fn find_lost(
    repository: &Repository,
    reader: &ChunkReader<'_>,
    manifest: &Manifest,
    monitor: &dyn Monitor,
) -> Result<Lost> {
    if !reader.view().has_lost() {
        return Ok(Lost::default());
    }
    let mut finder = Finder { reader, monitor, pending: Vec::new(), ranges: Vec::new(), nodes: false };
    walk(repository.geometry(), manifest, reader, &mut finder)?;
    finder.look_up()?;
    Ok(Lost { ranges: finder.ranges.into_iter().collect(), nodes: finder.nodes })
}

struct Finder<'a, 'r> {
    reader: &'a ChunkReader<'r>,
    monitor: &'a dyn Monitor,
    pending: Vec<(ByteRange, ChunkId)>,
    ranges: Vec<ByteRange>,
    nodes: bool,
}

impl Finder<'_, '_> {
    fn look_up(&mut self) -> Result<()> {
        let pending = std::mem::take(&mut self.pending);
        let ids: Vec<ChunkId> = pending.iter().map(|(_, id)| *id).collect();
        let lost = self.reader.lost(&ids)?;
        self.ranges
            .extend(pending.into_iter().zip(lost).filter(|(_, lost)| *lost).map(|((range, _), _)| range));
        Ok(())
    }
}

impl Visitor for Finder<'_, '_> {
    fn node(&mut self, _node: NodeAt) -> Result<bool> {
        self.monitor.check()?;
        Ok(true)
    }

    fn entry(&mut self, range: ByteRange, entry: EntryRef) -> Result<()> {
        match entry {
            EntryRef::Zero => {}
            EntryRef::Unreadable => self.ranges.push(range),
            EntryRef::Chunk { id, .. } => {
                self.pending.push((range, id));
                if self.pending.len() >= BATCH_ENTRIES {
                    return self.look_up();
                }
            }
        }
        Ok(())
    }

    fn fault(&mut self, node: NodeAt, error: Error) -> Result<()> {
        if matches!(error, Error::Cancelled) {
            return Err(error);
        }
        self.nodes = true;
        self.ranges.push(node.range);
        Ok(())
    }
}

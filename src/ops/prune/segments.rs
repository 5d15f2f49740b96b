//! The index segments as prune needs them: all of them, or none.

use std::collections::HashSet;

use crate::error::{Error, Result};
use crate::format::name::ObjectName;
use crate::format::segment::Segment;
use crate::id::{PackId, SegmentId};
use crate::monitor::Monitor;
use crate::repo::catalog::Ended;
use crate::repo::view::View;
use crate::repo::{Catalog, Repository};

/// Calls `each` with every segment that counts; returns those that cannot be read.
///
/// # Errors
/// Those of the storage and of `each`.
pub(super) fn for_each_segment(
    repository: &Repository,
    catalog: &Catalog,
    monitor: &dyn Monitor,
    each: &mut dyn FnMut(SegmentId, &Segment) -> Result<()>,
) -> Result<Vec<SegmentId>> {
    let mut unreadable = Vec::new();
    for id in repository.segments()? {
        monitor.check()?;
        match repository.load_segment(id) {
            Ok(segment) if catalog.ended(segment.owner) == Some(Ended::Committed) => each(id, &segment)?,
            Ok(_) => {}
            Err(Error::Malformed { .. }) => unreadable.push(id),
            Err(error) => return Err(error),
        }
    }
    Ok(unreadable)
}

/// Refuses to go on if a segment that cannot be read may be what speaks of a pack. Where every pack is spoken of by
/// another segment, it has nothing to say.
///
/// # Errors
/// [`Error::Damaged`]
pub(super) fn refuse_unknown(unreadable: &[SegmentId], listed: &HashSet<PackId>, view: &View) -> Result<()> {
    let Some(id) = unreadable.first() else { return Ok(()) };
    match view.packs().keys().find(|pack| !listed.contains(*pack)) {
        None => Ok(()),
        Some(pack) => Err(Error::Damaged(format!(
            "{} cannot be read and may be what lists {}; nothing is deleted before `vmkeep repair index`",
            ObjectName::Segment(*id),
            ObjectName::Pack(*pack),
        ))),
    }
}

//! The index segments as prune needs them: all of them, or none.

use std::collections::HashSet;

use crate::error::{Error, Result};
use crate::format::name::ObjectName;
use crate::format::segment::Segment;
use crate::id::{PackId, SegmentId, SessionId};
use crate::monitor::Monitor;
use crate::repo::Catalog;
use crate::repo::catalog::Ended;
use crate::repo::segments::SegmentCache;
use crate::repo::view::View;

/// Segments that do not count.
#[derive(Debug, Default)]
pub(super) struct Spare {
    pub unreadable: Vec<SegmentId>,
    /// Of sessions that were ended before they committed.
    pub aborted: Vec<SegmentId>,
    /// Of sessions without an outcome, with their owners.
    undecided: Vec<(SegmentId, SessionId)>,
}

impl Spare {
    /// Returns those that nobody needs if the sessions in `dead` are over.
    pub fn all(self, dead: &HashSet<SessionId>) -> impl Iterator<Item = SegmentId> {
        let left = self.undecided.into_iter().filter(|(_, owner)| dead.contains(owner)).map(|(id, _)| id);
        self.unreadable.into_iter().chain(self.aborted).chain(left)
    }
}

/// Calls `each` with every segment that counts; returns others.
///
/// # Errors
/// Those of the storage and of `each`.
pub(super) fn for_each_segment(
    segments: &SegmentCache<'_>,
    catalog: &Catalog,
    monitor: &dyn Monitor,
    each: &mut dyn FnMut(SegmentId, &Segment) -> Result<()>,
) -> Result<Spare> {
    let repository = segments.repository();
    let mut spare = Spare::default();
    for id in repository.segments()? {
        monitor.check()?;
        match segments.load(id) {
            Ok(segment) => match catalog.ended(segment.owner) {
                Some(Ended::Committed) => each(id, &segment)?,
                Some(Ended::Aborted) => spare.aborted.push(id),
                None => spare.undecided.push((id, segment.owner)),
                // it is not known what became of it
                Some(Ended::Unreadable) => {}
            },
            Err(error) if repository.is_of_object(&error) => spare.unreadable.push(id),
            Err(error) => return Err(error),
        }
    }
    Ok(spare)
}

/// Refuses to go on if a segment that cannot be read may be what speaks of a pack. Where every pack is spoken of by
/// another segment, it has nothing to say.
///
/// # Errors
/// [`Error::Damaged`]; those of the storage.
pub(super) fn refuse_unknown(unreadable: &[SegmentId], listed: &HashSet<PackId>, view: &View) -> Result<()> {
    let Some(id) = unreadable.first() else { return Ok(()) };
    match view.pack_lens()?.into_iter().find(|(pack, _)| !listed.contains(pack)) {
        None => Ok(()),
        Some((pack, _)) => Err(Error::Damaged(format!(
            "{} cannot be read and may be what lists {}; nothing is deleted before `vmkeep repair index`",
            ObjectName::Segment(*id),
            ObjectName::Pack(pack),
        ))),
    }
}

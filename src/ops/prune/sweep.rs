//! Deleting what a committed sweep names. All of it can be done again by whoever finds the sweep's mark.

use std::collections::HashSet;

use super::Sweep;
use crate::error::{Error, Result};
use crate::format::envelope::ObjectKind;
use crate::format::name::{Folder, ObjectName};
use crate::format::session::Outcome;
use crate::id::{PackId, SegmentId, SessionId};
use crate::monitor::Monitor;
use crate::repo::Repository;
use crate::repo::rules::Rule;

/// Deletes, phase by phase: what speaks of a pack is gone for good before the pack is. Returns how many segments went.
pub(super) fn carry_out(repository: &Repository, sweep: &Sweep, monitor: &dyn Monitor) -> Result<u64> {
    let storage = repository.storage();
    let packs: HashSet<PackId> = sweep.packs.iter().copied().collect();
    if repository.breaks(Rule::MarkLast) {
        delete_mark(repository, sweep.session)?;
    }
    if repository.breaks(Rule::SegmentsBeforePacks) {
        sweep.packs.iter().try_for_each(|pack| storage.delete(ObjectName::Pack(*pack)))?;
        storage.sync_deletes(Folder::Packs)?;
    }
    let listed: HashSet<SegmentId> = repository.segments()?.into_iter().collect();
    let mut deleted_segments = 0;
    for id in sweep.segments.iter().filter(|id| listed.contains(*id)) {
        storage.delete(ObjectName::Segment(*id))?;
        deleted_segments += 1;
    }
    storage.sync_deletes(Folder::Segments)?;
    let task = monitor.start("delete", 0);
    for pack in &sweep.packs {
        storage.delete(ObjectName::Pack(*pack))?;
    }
    for listed in storage.list(Folder::Damage)? {
        if let ObjectName::Damage(pack, _) = listed.name
            && packs.contains(&pack)
        {
            storage.delete(listed.name)?;
        }
    }
    storage.sync_deletes(Folder::Packs)?;
    storage.sync_deletes(Folder::Damage)?;
    for point in &sweep.points {
        storage.delete(ObjectName::Outcome(SessionId::from(*point)))?;
    }
    storage.sync_deletes(Folder::Outcomes)?;
    delete_mark(repository, sweep.session)?;
    monitor.finish(task);
    Ok(deleted_segments)
}

/// Deletes outcomes that inform of nothing any more: holds of points that are gone, verifies that newer ones replace.
pub(super) fn delete_spent(repository: &Repository, monitor: &dyn Monitor) -> Result<()> {
    for session in repository.catalog(monitor)?.spent() {
        repository.storage().delete(ObjectName::Outcome(session))?;
    }
    repository.storage().sync_deletes(Folder::Outcomes)
}

/// Ends what earlier prunes left: a sweep that was decided is carried out; any other mark is taken away.
///
/// # Errors
/// Those of the storage; an outcome that cannot be read.
pub(super) fn clear_marks(repository: &Repository, own: SessionId, monitor: &dyn Monitor) -> Result<()> {
    for listed in repository.storage().list(Folder::Marks)? {
        let ObjectName::Mark(session) = listed.name else { continue };
        let name = ObjectName::Outcome(session);
        let bytes = match repository.storage().get(name, ObjectKind::Outcome.max_object_len()) {
            Ok(bytes) => bytes,
            Err(Error::NotFound { .. }) => {
                // no prune runs, as was checked: this one was killed before it decided
                if repository.end_session(session, own, "it left a mark and no outcome")? {
                    delete_mark(repository, session)?;
                    continue;
                }
                repository.storage().get(name, ObjectKind::Outcome.max_object_len())?
            }
            Err(error) => return Err(error),
        };
        let outcome =
            Outcome::from_object(&bytes, repository.id()).map_err(|fault| Error::malformed(name, fault))?;
        match outcome {
            Outcome::Sweep { packs, points, segments } if !repository.breaks(Rule::FinishSweeps) => {
                monitor.note("finishing what an earlier prune had decided to delete");
                carry_out(repository, &Sweep { session, packs, points, segments }, monitor)?;
            }
            _ => delete_mark(repository, session)?,
        }
    }
    Ok(())
}

/// Says what comes before anything that a dry run plans.
pub(super) fn note_decided(repository: &Repository, monitor: &dyn Monitor) -> Result<()> {
    for listed in repository.storage().list(Folder::Marks)? {
        let ObjectName::Mark(session) = listed.name else { continue };
        let name = ObjectName::Outcome(session);
        let bytes = match repository.storage().get(name, ObjectKind::Outcome.max_object_len()) {
            Err(Error::NotFound { .. }) => continue,
            other => other?,
        };
        if let Ok(Outcome::Sweep { packs, .. }) = Outcome::from_object(&bytes, repository.id()) {
            monitor.warn(&format!(
                "an earlier prune has decided to delete {} packs and was cut off: that comes first, and the plan for \
                 the rest may become another one",
                packs.len()
            ));
        }
    }
    Ok(())
}

/// Takes the mark of a prune that failed away, if it is certain that it decided nothing: its abort is there. A sweep that
/// may be there needs its mark, which is how the next prune finds it.
///
/// # Errors
/// Those of the storage; an outcome that cannot be read.
pub(super) fn clear_aborted(repository: &Repository, session: SessionId) -> Result<()> {
    let name = ObjectName::Outcome(session);
    let bytes = repository.storage().get(name, ObjectKind::Outcome.max_object_len())?;
    let outcome =
        Outcome::from_object(&bytes, repository.id()).map_err(|fault| Error::malformed(name, fault))?;
    match outcome {
        Outcome::Abort { .. } => delete_mark(repository, session),
        _ => Ok(()),
    }
}

fn delete_mark(repository: &Repository, session: SessionId) -> Result<()> {
    repository.storage().delete(ObjectName::Mark(session))?;
    repository.storage().sync_deletes(Folder::Marks)
}

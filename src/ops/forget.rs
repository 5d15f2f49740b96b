//! Forgetting points: they are no longer shown or compared with; their space comes back with a prune. Until a prune
//! has swept them they can be had back. Holds keep points from being forgotten.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::format::name::{Folder, ObjectName};
use crate::format::point::PointRecord;
use crate::format::session::{Outcome, SessionKind, Tombstone, VerifiedLevel};
use crate::id::{PointId, SessionId};
use crate::monitor::Monitor;
use crate::ops::prune::{PruneOptions, PruneReport, prune};
use crate::ops::repaired::copies;
use crate::ops::retention::{Facts, Guards, guarded};
use crate::repo::rules::Rule;
use crate::repo::session::Session;
use crate::repo::view::Marks;
use crate::repo::{Catalog, Environment, Repository};
use crate::storage::Storage;
use crate::storage::overlay::OverlayStorage;

/// What was forgotten.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ForgetReport {
    pub points: Vec<PointId>,
    pub dry_run: bool,
}

/// Forgets points: all of them, or none.
///
/// # Errors
/// [`Error::NotFound`] if one of them is no point (any more); [`Error::Refused`] if one is held; those of the storage.
pub fn forget(
    repository: &Repository,
    points: &[PointId],
    reason: &str,
    dry_run: bool,
    monitor: &dyn Monitor,
) -> Result<ForgetReport> {
    let catalog = repository.catalog(monitor)?;
    for id in points {
        if catalog.point(*id).is_none() {
            return Err(Error::NotFound { object: format!("point {id}") });
        }
        refuse_held(&catalog, *id, (repository.environment().now_ms)())?;
    }
    let report = ForgetReport { points: points.to_vec(), dry_run };
    if dry_run || points.is_empty() {
        return Ok(report);
    }
    let time_ms = (repository.environment().now_ms)();
    let tombstone = Tombstone { points: points.to_vec(), reason: reason.to_owned(), time_ms };
    match bury(repository, tombstone.clone()) {
        Err(error) if error.is_storage_full() => {
            // whoever forgets where no space is left wants to prune next, which does with what is left of it
            monitor.note("no space is left: giving the reserve back");
            repository.storage().delete(ObjectName::Reserve)?;
            bury(repository, tombstone)?;
        }
        buried => buried?,
    }
    Ok(report)
}

fn refuse_held(catalog: &Catalog, id: PointId, now_ms: i64) -> Result<()> {
    let Some(hold) = catalog.held(id, now_ms) else { return Ok(()) };
    Err(Error::Refused {
        object: format!("point {}", id.short()),
        reason: format!("it is held: {}", hold.reason),
        hint: Some(format!("vmkeep unhold {} releases it", id.short())),
    })
}

/// Returns what retention has to know of a point beside its record. `until` puts the end of a hold into words.
pub fn facts(catalog: &Catalog, id: PointId, now_ms: i64, until: &dyn Fn(i64) -> String) -> Facts {
    let held = catalog.held(id, now_ms).map(|hold| match hold.until_ms {
        Some(until_ms) => format!("held until {}: {}", until(until_ms), hold.reason),
        None => format!("held: {}", hold.reason),
    });
    let verified = catalog.verified_state(id, VerifiedLevel::Data).is_some_and(|state| state.sound);
    Facts { held, verified }
}

/// Returns what protects the points of a catalog.
pub fn guards(catalog: &Catalog, now_ms: i64) -> Guards {
    guarded(catalog.points(), now_ms, &|id| facts(catalog, id, now_ms, &|until| until.to_string()))
}

/// Refuses to forget points that are protected, or more than half of those of the domains concerned. A copy of a damaged
/// point counts as one with it.
///
/// # Errors
/// [`Error::Refused`], with the option that helps as its hint.
pub fn check_guards(catalog: &Catalog, points: &[PointId], now_ms: i64) -> Result<()> {
    let hint = Some("--force forgets them all the same".to_owned());
    let guards = guards(catalog, now_ms);
    for id in points {
        if let Some(guard) = guards.get(id).and_then(|guards| guards.first()) {
            let object = format!("point {}", id.short());
            return Err(Error::Refused { object, reason: format!("it is {}", guard.as_str()), hint });
        }
    }
    let copies = copies(catalog.points());
    let own: Vec<&PointRecord> = catalog
        .points()
        .iter()
        .map(|entry| entry.record.as_ref())
        .filter(|record| !copies.contains_key(&record.id))
        .collect();
    let chosen: Vec<&PointRecord> =
        own.iter().copied().filter(|record| points.contains(&record.id)).collect();
    let domains: BTreeSet<&str> = chosen.iter().map(|record| record.domain.as_str()).collect();
    let all = own.iter().filter(|record| domains.contains(record.domain.as_str())).count();
    if chosen.len() * 2 > all {
        let names: Vec<&str> = domains.into_iter().collect();
        return Err(Error::Refused {
            object: format!("forgetting {} of the {all} points of {}", chosen.len(), names.join(", ")),
            reason: "it is more than half of them".into(),
            hint,
        });
    }
    Ok(())
}

/// Returns what a prune would do once points are forgotten: all of it happens in memory, on top of `storage`.
///
/// # Errors
/// Those of [`forget`] and [`prune`].
pub fn plan_prune(
    storage: Box<dyn Storage>,
    cache_dir: Option<&Path>,
    environment: &Environment,
    points: &[PointId],
    options: &PruneOptions,
    monitor: &dyn Monitor,
) -> Result<PruneReport> {
    let overlay = Box::new(OverlayStorage::new(storage));
    let repository = Repository::open(overlay, cache_dir, environment, monitor)?;
    forget(&repository, points, "to see what a prune would do", false, monitor)?;
    prune(&repository, &PruneOptions { dry_run: true, ..options.clone() }, monitor)
}

/// Holds a point: it is neither forgotten nor dropped before `until_ms` (milliseconds since 1970; `None`: before it is
/// released).
///
/// # Errors
/// [`Error::NotFound`] if it is no point (any more); [`Error::Busy`] if a prune is about to drop it; those of the
/// storage.
pub fn hold(
    repository: &Repository,
    point: PointId,
    until_ms: Option<i64>,
    reason: &str,
    monitor: &dyn Monitor,
) -> Result<()> {
    // registered first: a prune that marks the point from now on waits for this session
    let session = Session::begin(repository, SessionKind::Forget)?;
    refuse_marked(repository, point)?;
    if repository.catalog(monitor)?.point(point).is_none() {
        return Err(Error::NotFound { object: format!("point {point}") });
    }
    session.commit(&Outcome::Hold { point, until_ms, reason: reason.to_owned() })
}

/// Releases a point from all its holds; returns how many there were.
///
/// # Errors
/// [`Error::NotFound`] if it is no point (any more); [`Error::Damaged`] if an outcome cannot be read, which may be a hold;
/// those of the storage.
pub fn unhold(repository: &Repository, point: PointId, monitor: &dyn Monitor) -> Result<usize> {
    let catalog = repository.catalog(monitor)?;
    if catalog.point(point).is_none() {
        return Err(Error::NotFound { object: format!("point {point}") });
    }
    let is_outcome = |name: &ObjectName| matches!(name, ObjectName::Outcome(_));
    if let Some((name, problem)) = catalog.problems().iter().find(|(name, _)| is_outcome(name)) {
        return Err(Error::Damaged(format!(
            "{name} cannot be read and may be a hold of the point: {problem}"
        )));
    }
    let holds = catalog.holds(point);
    for hold in holds {
        repository.storage().delete(ObjectName::Outcome(hold.session))?;
    }
    repository.storage().sync_deletes(Folder::Outcomes)?;
    Ok(holds.len())
}

/// Brings a forgotten point back.
///
/// # Errors
/// [`Error::NotFound`] if it was not forgotten, or is gone for good; [`Error::Busy`] if a prune is about to drop it;
/// those of the storage.
pub fn undelete(repository: &Repository, point: PointId, monitor: &dyn Monitor) -> Result<()> {
    let session = Session::begin(repository, SessionKind::Forget)?;
    refuse_marked(repository, point)?;
    let catalog = repository.catalog(monitor)?;
    if !catalog.forgotten().iter().any(|entry| entry.record.id == point) {
        return Err(Error::NotFound { object: format!("forgotten point {point}") });
    }
    let naming: Vec<(SessionId, &Tombstone)> = catalog
        .tombstones()
        .iter()
        .filter(|(_, tombstone)| tombstone.points.contains(&point))
        .map(|(session, tombstone)| (*session, tombstone))
        .collect();
    let others = |tombstone: &Tombstone| -> Vec<PointId> {
        tombstone.points.iter().copied().filter(|id| *id != point).collect()
    };
    let rest: BTreeSet<PointId> = naming.iter().flat_map(|(_, tombstone)| others(tombstone)).collect();
    if let Some((_, first)) = naming.first().filter(|_| !rest.is_empty()) {
        // the others of those tombstones stay forgotten, at every instant
        let tombstone = Tombstone { points: rest.into_iter().collect(), ..(*first).clone() };
        bury(repository, tombstone)?;
    }
    let mut session = Some(session);
    if repository.breaks(Rule::UndeleteBeforeOutcome) {
        session.take().map_or(Ok(()), |session| session.commit(&Outcome::Done))?;
    }
    for (session, _) in naming {
        repository.storage().delete(ObjectName::Tombstone(session))?;
    }
    repository.storage().sync_deletes(Folder::Tombstones)?;
    // last: a prune that waits for this session looks at the tombstones once it has an outcome
    session.map_or(Ok(()), |session| session.commit(&Outcome::Done))
}

/// Puts a tombstone, in a session of its own.
fn bury(repository: &Repository, tombstone: Tombstone) -> Result<()> {
    let session = Session::begin(repository, SessionKind::Forget)?;
    let name = ObjectName::Tombstone(session.id());
    let bytes = tombstone.to_object(repository.id()).map_err(|fault| Error::malformed(name, fault))?;
    // in order to be crash consistent: the tombstone first; it counts only once the outcome is there
    repository.storage().put_new(name, &bytes)?;
    session.commit(&Outcome::Done)
}

fn refuse_marked(repository: &Repository, point: PointId) -> Result<()> {
    let marked = Marks::load(repository.storage(), repository.id())?.points.contains(&point);
    if !marked || repository.breaks(Rule::HeedMarkedPoints) {
        return Ok(());
    }
    Err(Error::Busy { object: format!("point {point}"), why: "a prune is about to drop it".into() })
}

#[cfg(test)]
mod tests;

//! Forgetting points: they are no longer shown or compared with; their space comes back with a prune.

use serde::Serialize;

use crate::error::{Error, Result};
use crate::format::name::ObjectName;
use crate::format::session::{Outcome, SessionKind, Tombstone};
use crate::id::PointId;
use crate::monitor::Monitor;
use crate::repo::Repository;
use crate::repo::session::Session;

/// What was forgotten.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ForgetReport {
    pub points: Vec<PointId>,
    pub dry_run: bool,
}

/// Forgets points: all of them, or none.
///
/// # Errors
/// [`Error::NotFound`] if one of them is no point (any more); those of the storage.
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
    }
    let report = ForgetReport { points: points.to_vec(), dry_run };
    if dry_run || points.is_empty() {
        return Ok(report);
    }
    let session = Session::begin(repository, SessionKind::Forget)?;
    let tombstone = Tombstone {
        points: points.to_vec(),
        reason: reason.to_owned(),
        time_ms: (repository.environment().now_ms)(),
    };
    let name = ObjectName::Tombstone(session.id());
    let bytes = tombstone.to_object(repository.id()).map_err(|fault| Error::malformed(name, fault))?;
    // in order to be crash consistent: the tombstone first; it counts only once the outcome is there
    repository.storage().put_new(name, &bytes)?;
    session.commit(&Outcome::Done)?;
    Ok(report)
}

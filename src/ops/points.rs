//! The list of points.

use crate::error::Result;
use crate::format::session::VerifiedLevel;
use crate::id::PointId;
use crate::monitor::Monitor;
use crate::repo::catalog::VerifiedState;
use crate::repo::{Catalog, PointEntry, Repository};

/// Returns the points that were not forgotten, oldest first.
///
/// # Errors
/// A failed listing; an outcome that cannot be read is reported to the monitor and left out.
pub fn list(repository: &Repository, monitor: &dyn Monitor) -> Result<Vec<PointEntry>> {
    Ok(repository.catalog(monitor)?.points().to_vec())
}

/// Returns what verifies have found out of a point that still stands: damage if the newest one found it, else the most
/// thorough one since then that found the point sound. A structure that was looked at later takes nothing from content
/// that was read.
pub fn standing(catalog: &Catalog, id: PointId) -> Option<VerifiedState> {
    use VerifiedLevel::{Against, Data, Packs, Restore, Structure};
    let newest = catalog.verified_state(id, Structure)?;
    if !newest.sound {
        return Some(newest);
    }
    let at_least = |level| catalog.verified_state(id, level).filter(|state| state.sound);
    [Against, Restore, Data, Packs].into_iter().find_map(at_least).or(Some(newest))
}

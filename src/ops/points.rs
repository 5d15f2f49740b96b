//! The list of points.

use crate::error::Result;
use crate::monitor::Monitor;
use crate::repo::{PointEntry, Repository};

/// Returns the points that were not forgotten, oldest first.
///
/// # Errors
/// A failed listing; an outcome that cannot be read is reported to the monitor and left out.
pub fn list(repository: &Repository, monitor: &dyn Monitor) -> Result<Vec<PointEntry>> {
    Ok(repository.catalog(monitor)?.points().to_vec())
}

//! Outcomes and tombstones: what happened, and which points there are.

use std::collections::{HashMap, HashSet};

use crate::error::{Error, Result};
use crate::format::envelope::ObjectKind;
use crate::format::name::{Folder, ObjectName};
use crate::format::point::{PointRecord, PointStats};
use crate::format::session::{Outcome, Tombstone};
use crate::id::{PointId, RepositoryId, SessionId};
use crate::monitor::Monitor;
use crate::storage::Storage;

/// A committed point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PointEntry {
    pub record: PointRecord,
    pub stats: PointStats,
}

/// How a session ended, as far as it matters to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// What it wrote counts.
    Committed,
    /// Nothing of it counts.
    Aborted,
    /// There is an outcome, but it cannot be read.
    Unreadable,
}

/// Every outcome of a repository at one moment.
#[derive(Debug, Default)]
pub struct Catalog {
    points: Vec<PointEntry>,
    forgotten: Vec<PointEntry>,
    ended: HashMap<SessionId, Ended>,
    problems: Vec<(ObjectName, String)>,
}

impl Catalog {
    /// Reads all outcomes, then all tombstones.
    ///
    /// # Errors
    /// A failed listing or read. An object that cannot be decoded is reported to the monitor and left out.
    pub fn load(storage: &dyn Storage, repository: RepositoryId, monitor: &dyn Monitor) -> Result<Self> {
        let mut catalog = Self::default();
        let mut points = Vec::new();
        for listed in storage.list(Folder::Outcomes)? {
            monitor.check()?;
            let ObjectName::Outcome(session) = listed.name else { continue };
            let bytes = match storage.get(listed.name, ObjectKind::Outcome.max_object_len()) {
                // a sweep deletes outcomes of points that were dropped
                Err(Error::NotFound { .. }) => continue,
                other => other?,
            };
            let ended = match Outcome::from_object(&bytes, repository) {
                Ok(Outcome::Point { record, stats }) if SessionId::from(record.id) == session => {
                    points.push(PointEntry { record: *record, stats });
                    Ended::Committed
                }
                Ok(Outcome::Point { record, .. }) => {
                    let problem = format!("it holds the record of another point, {}", record.id);
                    catalog.problem(listed.name, problem, monitor);
                    Ended::Unreadable
                }
                Ok(Outcome::Sweep { .. } | Outcome::Done) => Ended::Committed,
                Ok(Outcome::Abort { .. }) => Ended::Aborted,
                Err(fault) => {
                    catalog.problem(listed.name, fault.to_string(), monitor);
                    Ended::Unreadable
                }
            };
            catalog.ended.insert(session, ended);
        }
        let forgotten = catalog.forgotten_points(storage, repository, monitor)?;
        points.sort_by_key(|entry| (entry.record.time_ms, entry.record.id));
        (catalog.forgotten, catalog.points) =
            points.into_iter().partition(|entry| forgotten.contains(&entry.record.id));
        Ok(catalog)
    }

    fn problem(&mut self, name: ObjectName, problem: String, monitor: &dyn Monitor) {
        monitor.warn(&format!("{name}: {problem}"));
        self.problems.push((name, problem));
    }

    /// Returns the objects that could not be read, and why.
    pub fn problems(&self) -> &[(ObjectName, String)] {
        &self.problems
    }

    fn forgotten_points(
        &mut self,
        storage: &dyn Storage,
        repository: RepositoryId,
        monitor: &dyn Monitor,
    ) -> Result<HashSet<PointId>> {
        let mut forgotten = HashSet::new();
        for listed in storage.list(Folder::Tombstones)? {
            let ObjectName::Tombstone(session) = listed.name else { continue };
            if self.ended(session) != Some(Ended::Committed) {
                continue;
            }
            let bytes = match storage.get(listed.name, ObjectKind::Tombstone.max_object_len()) {
                Err(Error::NotFound { .. }) => continue,
                other => other?,
            };
            match Tombstone::from_object(&bytes, repository) {
                Ok(tombstone) => forgotten.extend(tombstone.points),
                // shown again rather than lost
                Err(fault) => self.problem(listed.name, fault.to_string(), monitor),
            }
        }
        Ok(forgotten)
    }

    /// Returns the points that were not forgotten, oldest first.
    pub fn points(&self) -> &[PointEntry] {
        &self.points
    }

    /// Returns the points that were forgotten and not yet swept, oldest first.
    pub fn forgotten(&self) -> &[PointEntry] {
        &self.forgotten
    }

    /// Returns how a session ended; `None` if it did not.
    pub fn ended(&self, session: SessionId) -> Option<Ended> {
        self.ended.get(&session).copied()
    }

    /// Returns a point that was not forgotten.
    pub fn point(&self, id: PointId) -> Option<&PointEntry> {
        self.points.iter().find(|entry| entry.record.id == id)
    }
}

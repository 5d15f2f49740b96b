//! Outcomes and tombstones: what happened, and which points there are.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::config::is_of_object;
use crate::error::{Error, Result};
use crate::format::envelope::ObjectKind;
use crate::format::name::{Folder, ObjectName};
use crate::format::point::{PointRecord, PointStats};
use crate::format::session::{Outcome, SampleScope, Tombstone, VerifiedLevel, VerifiedRecord};
use crate::id::{PointId, RepositoryId, SessionId};
use crate::monitor::Monitor;
use crate::storage::{Storage, in_threads};

/// A committed point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PointEntry {
    /// Shared by all who look at it: there may be many points, and catalogs of them.
    pub record: Arc<PointRecord>,
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

/// A hold on a point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    /// The session that set it: deleting its outcome releases the point.
    pub session: SessionId,
    /// Milliseconds since 1970; `None`: until it is released.
    pub until_ms: Option<i64>,
    pub reason: String,
}

/// What the newest verify that looked at all of a point said of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifiedState {
    pub level: VerifiedLevel,
    /// Milliseconds since 1970.
    pub time_ms: i64,
    pub sound: bool,
}

/// What is kept of outcomes that were read.
#[derive(Debug, Default)]
struct Known {
    /// Where that is wanted: outcomes are written once, so who looks at all of them again and again has to read only those
    /// that are new.
    outcomes: Option<HashMap<SessionId, Outcome>>,
    definitions: HashSet<Arc<str>>,
}

#[derive(Debug, Default)]
pub(super) struct KnownOutcomes(Mutex<Known>);

impl KnownOutcomes {
    /// Keeps what is read from now on.
    pub fn keep(&self) {
        self.lock().outcomes.get_or_insert_default();
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what is known of sessions' outcomes, in the order asked.
    fn look_up(&self, sessions: &[SessionId]) -> Vec<Option<Outcome>> {
        let known = self.lock();
        sessions.iter().map(|session| known.outcomes.as_ref()?.get(session).cloned()).collect()
    }

    /// Reads a session's outcome. Returns it, or why it cannot be read; `None` if it is gone.
    fn read(
        &self,
        storage: &dyn Storage,
        repository: RepositoryId,
        session: SessionId,
    ) -> Result<Option<Readable>> {
        let name = ObjectName::Outcome(session);
        let bytes = match storage.get(name, ObjectKind::Outcome.max_object_len()) {
            Err(Error::NotFound { .. }) => return Ok(None),
            Err(error) if is_of_object(storage, &error) => return Ok(Some(Err(error.cause()))),
            other => other?,
        };
        let mut outcome = Outcome::from_object(&bytes, repository).map_err(|fault| fault.to_string());
        let mut known = self.lock();
        if let Ok(Outcome::Point { record, .. }) = &mut outcome {
            share(Arc::make_mut(record), &mut known.definitions);
        }
        if let (Some(outcomes), Ok(outcome)) = (&mut known.outcomes, &outcome) {
            outcomes.insert(session, outcome.clone());
        }
        Ok(Some(outcome))
    }
}

/// An outcome, or why it cannot be read.
type Readable = std::result::Result<Outcome, String>;

/// Reads every outcome, several at once; `None` of one that went away meanwhile. In the order of the sessions' ids.
fn read_all(
    storage: &dyn Storage,
    repository: RepositoryId,
    known: &KnownOutcomes,
    monitor: &dyn Monitor,
) -> Result<Vec<(SessionId, Option<Readable>)>> {
    let names = storage.names(Folder::Outcomes)?;
    let session = |name| if let ObjectName::Outcome(session) = name { Some(session) } else { None };
    let sessions: Vec<SessionId> = names.into_iter().filter_map(session).collect();
    in_threads(&sessions, |part| {
        let mut outcomes = Vec::with_capacity(part.len());
        for (session, outcome) in part.iter().zip(known.look_up(part)) {
            monitor.check()?;
            let outcome = match outcome {
                Some(outcome) => Some(Ok(outcome)),
                None => known.read(storage, repository, *session)?,
            };
            outcomes.push((*session, outcome));
        }
        Ok(outcomes)
    })
}

/// Has a point share the definitions of its domain with the points that have the same ones, as nearly all of a domain do:
/// they are most of what a point takes in memory.
fn share(record: &mut PointRecord, definitions: &mut HashSet<Arc<str>>) {
    for xml in [&mut record.xml_inactive, &mut record.xml_live].into_iter().flatten() {
        match definitions.get(xml) {
            Some(known) => *xml = Arc::clone(known),
            None => drop(definitions.insert(Arc::clone(xml))),
        }
    }
}

/// What a verify found out.
#[derive(Debug)]
pub struct VerifiedEntry {
    pub session: SessionId,
    /// Its lists are sorted.
    pub record: VerifiedRecord,
    /// The higher one of two is the later one; 0 of an early version's.
    pub order: u64,
    /// Of a sample.
    pub scope: Option<SampleScope>,
}

impl VerifiedEntry {
    fn new(session: SessionId, mut record: VerifiedRecord, order: u64, scope: Option<SampleScope>) -> Self {
        record.sound.sort_unstable();
        record.damaged.sort_unstable();
        Self { session, record, order, scope }
    }
}

/// Every outcome of a repository at one moment.
#[derive(Debug, Default)]
pub struct Catalog {
    points: Vec<PointEntry>,
    /// Where in `points` each is.
    positions: HashMap<PointId, usize>,
    forgotten: Vec<PointEntry>,
    tombstones: HashMap<SessionId, Tombstone>,
    /// Points that prunes have dropped.
    swept: HashSet<PointId>,
    holds: HashMap<PointId, Vec<Hold>>,
    verified: Vec<VerifiedEntry>,
    ended: HashMap<SessionId, Ended>,
    problems: Vec<(ObjectName, String)>,
}

impl Catalog {
    /// Reads all outcomes, then all tombstones.
    ///
    /// # Errors
    /// A failed listing or read. An object that cannot be decoded is reported to the monitor and left out.
    pub(super) fn load(
        storage: &dyn Storage,
        repository: RepositoryId,
        known: &KnownOutcomes,
        monitor: &dyn Monitor,
    ) -> Result<Self> {
        let mut catalog = Self::default();
        let mut points = Vec::new();
        let outcomes = read_all(storage, repository, known, monitor)?;
        for (session, outcome) in outcomes {
            let name = ObjectName::Outcome(session);
            // a sweep deletes outcomes of points that were dropped
            let Some(outcome) = outcome else { continue };
            let ended = match outcome {
                Ok(Outcome::Point { record, stats }) if SessionId::from(record.id) == session => {
                    points.push(PointEntry { record, stats });
                    Ended::Committed
                }
                Ok(Outcome::Point { record, .. }) => {
                    let problem = format!("it holds the record of another point, {}", record.id);
                    catalog.problem(name, problem, monitor);
                    Ended::Unreadable
                }
                Ok(Outcome::Sweep { points, .. }) => {
                    catalog.swept.extend(points);
                    Ended::Committed
                }
                Ok(Outcome::Done) => Ended::Committed,
                Ok(Outcome::Hold { point, until_ms, reason }) => {
                    catalog.holds.entry(point).or_default().push(Hold { session, until_ms, reason });
                    Ended::Committed
                }
                Ok(Outcome::Verified { record }) => {
                    catalog.verified.push(VerifiedEntry::new(session, record, 0, None));
                    Ended::Committed
                }
                Ok(Outcome::Found { record, order, scope }) => {
                    catalog.verified.push(VerifiedEntry::new(session, record, order, scope));
                    Ended::Committed
                }
                Ok(Outcome::Abort { .. }) => Ended::Aborted,
                Err(problem) => {
                    catalog.problem(name, problem, monitor);
                    Ended::Unreadable
                }
            };
            catalog.ended.insert(session, ended);
        }
        catalog.verified.sort_by_key(|entry| (entry.order, entry.record.time_ms, entry.session));
        catalog.load_tombstones(storage, repository, monitor)?;
        let forgotten: HashSet<PointId> =
            catalog.tombstones.values().flat_map(|tombstone| &tombstone.points).copied().collect();
        points.sort_by_key(|entry| (entry.record.time_ms, entry.record.id));
        (catalog.forgotten, catalog.points) =
            points.into_iter().partition(|entry| forgotten.contains(&entry.record.id));
        catalog.positions = (0..).zip(&catalog.points).map(|(at, entry)| (entry.record.id, at)).collect();
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

    fn load_tombstones(
        &mut self,
        storage: &dyn Storage,
        repository: RepositoryId,
        monitor: &dyn Monitor,
    ) -> Result<()> {
        for name in storage.names(Folder::Tombstones)? {
            let ObjectName::Tombstone(session) = name else { continue };
            if self.ended(session) != Some(Ended::Committed) {
                continue;
            }
            let bytes = match storage.get(name, ObjectKind::Tombstone.max_object_len()) {
                Err(Error::NotFound { .. }) => continue,
                // shown again rather than lost
                Err(error) if is_of_object(storage, &error) => {
                    self.problem(name, error.cause(), monitor);
                    continue;
                }
                other => other?,
            };
            match Tombstone::from_object(&bytes, repository) {
                Ok(tombstone) => drop(self.tombstones.insert(session, tombstone)),
                Err(fault) => self.problem(name, fault.to_string(), monitor),
            }
        }
        Ok(())
    }

    /// Returns true if the newest verify of any point has found that something of it is lost.
    pub fn is_anything_lost(&self) -> bool {
        let mut seen = HashSet::new();
        self.verified.iter().rev().any(|VerifiedEntry { record, .. }| {
            let new =
                |list: &[PointId]| list.iter().filter(|id| !seen.contains(*id)).copied().collect::<Vec<_>>();
            let (damaged, sound) = (new(&record.damaged), new(&record.sound));
            let is_lost = damaged.iter().any(|id| self.point(*id).is_some());
            seen.extend(damaged.into_iter().chain(sound));
            is_lost
        })
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
        self.points.get(*self.positions.get(&id)?)
    }

    /// Returns true if a prune has dropped a point.
    pub fn is_swept(&self, id: PointId) -> bool {
        self.swept.contains(&id)
    }

    /// Returns the tombstones that count, by the session that put them.
    pub fn tombstones(&self) -> &HashMap<SessionId, Tombstone> {
        &self.tombstones
    }

    /// Returns the holds on a point, expired ones included.
    pub fn holds(&self, id: PointId) -> &[Hold] {
        self.holds.get(&id).map(Vec::as_slice).unwrap_or_default()
    }

    /// Returns the hold on a point that lasts longest, if one has not expired at `now_ms`.
    pub fn held(&self, id: PointId, now_ms: i64) -> Option<&Hold> {
        let lasting = self.holds(id).iter().filter(|hold| hold.until_ms.is_none_or(|until| until > now_ms));
        lasting.max_by_key(|hold| (hold.until_ms.is_none(), hold.until_ms))
    }

    /// Returns the sessions whose outcomes say nothing any more: holds of points that are gone, and verifies of which
    /// newer ones say as much.
    pub fn spent(&self) -> Vec<SessionId> {
        let known: HashSet<PointId> =
            self.points.iter().chain(&self.forgotten).map(|entry| entry.record.id).collect();
        let stray = self.holds.iter().filter(|(point, _)| !known.contains(point));
        let mut spent: Vec<SessionId> =
            stray.flat_map(|(_, holds)| holds.iter().map(|hold| hold.session)).collect();
        // by point, the highest level at which a newer one found it sound, and whether one found it damaged
        let mut said: HashMap<PointId, Option<VerifiedLevel>> = HashMap::new();
        let mut scopes = HashSet::new();
        for VerifiedEntry { session, record, scope, .. } in self.verified.iter().rev() {
            let is_new = |id: &&PointId| known.contains(*id) && said.get(*id) < Some(&Some(record.level));
            let news = record.sound.iter().chain(&record.damaged).any(|id| is_new(&id));
            let leads = scope.as_ref().is_some_and(|scope| scopes.insert(scope));
            if !news && !leads {
                spent.push(*session);
            }
            for id in record.sound.iter().chain(&record.damaged) {
                let level = said.entry(*id).or_default();
                *level = (*level).max(Some(record.level));
            }
        }
        spent
    }

    /// Returns what verifies found out, oldest first.
    pub fn verified(&self) -> &[VerifiedEntry] {
        &self.verified
    }

    /// Returns what the newest verify of at least `least` said of a point that it looked at as a whole.
    pub fn verified_state(&self, id: PointId, least: VerifiedLevel) -> Option<VerifiedState> {
        self.verified.iter().rev().find_map(|VerifiedEntry { record, .. }| {
            let sound = record.sound.binary_search(&id).is_ok();
            let named = sound && record.level >= least || record.damaged.binary_search(&id).is_ok();
            named.then_some(VerifiedState { level: record.level, time_ms: record.time_ms, sound })
        })
    }
}

//! A session: work that is registered before it begins and ends in exactly one outcome.

use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::catalog::Catalog;
use super::rules::Rule;
use super::view::View;
use super::{Environment, Repository, random};
use crate::error::{Context, Error, FormatFault, Result};
use crate::format::envelope::ObjectKind;
use crate::format::name::ObjectName;
use crate::format::session::{Outcome, SessionKind, SessionRecord};
use crate::id::{RepositoryId, SessionId};
use crate::monitor::Monitor;
use crate::storage::Storage;

/// A registered session. Dropped without [`Session::commit`], it aborts itself.
#[derive(Debug)]
pub struct Session {
    id: SessionId,
    repository: RepositoryId,
    storage: Arc<dyn Storage>,
    heartbeat: Option<Heartbeat>,
    ended: bool,
    exclusive: bool,
    doubts_failed_sync: bool,
    unfinished: Arc<Mutex<Vec<SessionId>>>,
}

#[derive(Debug)]
struct Heartbeat {
    stop: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Heartbeat {
    fn start(storage: Arc<dyn Storage>, id: SessionId, interval: Duration) -> Result<Self> {
        let stop = Arc::new((Mutex::new(false), Condvar::new()));
        let shared = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("heartbeat".into())
            .spawn(move || {
                let (stopped, wake) = &*shared;
                let Ok(mut guard) = stopped.lock() else { return };
                let mut beat = 0u64;
                while !*guard {
                    let Ok((next, timeout)) = wake.wait_timeout(guard, interval) else { return };
                    guard = next;
                    if timeout.timed_out() && !*guard {
                        beat += 1;
                        // one lost beat is no harm: the next one follows
                        let _ = storage.replace(ObjectName::Heartbeat(id), &beat.to_le_bytes());
                    }
                }
            })
            .map_err(|source| Error::io("start", "the heartbeat", source))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Heartbeat {
    fn drop(&mut self) {
        if let Ok(mut stopped) = self.stop.0.lock() {
            *stopped = true;
        }
        self.stop.1.notify_all();
        if let Some(thread) = self.thread.take() {
            // a panic there has been reported by the panic hook already
            let _ = thread.join();
        }
    }
}

impl Session {
    /// Registers a session and only then reads what there is: a prune that marks any of it later waits for the session.
    ///
    /// # Errors
    /// Those of the storage; [`Error::Cancelled`].
    pub fn begin_and_look(
        repository: &Repository,
        kind: SessionKind,
        monitor: &dyn Monitor,
    ) -> Result<(Self, Catalog, View)> {
        let early = match repository.breaks(Rule::RegisterFirst) {
            true => Some(repository.refresh(monitor)?),
            false => None,
        };
        std::thread::scope(|scope| {
            // needed only behind the registration, which waits for the disk
            scope.spawn(|| repository.open_local_index(monitor));
            let session = Self::begin(repository, kind)?;
            let (catalog, view) = early.map_or_else(|| repository.refresh(monitor), Ok)?;
            Ok((session, catalog, view))
        })
    }

    /// Registers a session, durably.
    ///
    /// # Errors
    /// Those of the storage.
    pub fn begin(repository: &Repository, kind: SessionKind) -> Result<Self> {
        let id = SessionId::from_bytes(random()?);
        let Environment { host, boot_id, process_id, program, now_ms, timing } = repository.environment();
        let record = SessionRecord {
            kind,
            host: host.clone(),
            boot_id: boot_id.clone(),
            process_id: *process_id,
            started_ms: now_ms(),
            program: program.clone(),
        };
        let name = ObjectName::Session(id);
        let bytes = record.to_object(repository.id()).map_err(|fault| Error::malformed(name, fault))?;
        repository.storage.put_new(name, &bytes)?;
        let mut session = Self {
            id,
            repository: repository.id(),
            storage: Arc::clone(&repository.storage),
            heartbeat: None,
            ended: false,
            exclusive: !repository.breaks(Rule::ExclusiveOutcome),
            doubts_failed_sync: !repository.breaks(Rule::DoubtFailedSync),
            unfinished: Arc::clone(&repository.unfinished),
        };
        session.end_unfinished(repository);
        session.heartbeat = Some(Heartbeat::start(Arc::clone(&session.storage), id, timing.heartbeat)?);
        Ok(session)
    }

    /// Ends sessions of this process whose abort failed, if it can be put now.
    fn end_unfinished(&self, repository: &Repository) {
        let Ok(mut unfinished) = self.unfinished.lock() else { return };
        unfinished
            .retain(|id| repository.end_session(*id, self.id, "the work failed or was cancelled").is_err());
    }

    /// Returns its id.
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// Ends the session by its one outcome. After this returns, the outcome is durable and everything
    /// that it names counts.
    ///
    /// # Errors
    /// [`Error::Fenced`] if somebody else ended the session before; those of the storage.
    pub fn commit(mut self, outcome: &Outcome) -> Result<()> {
        let name = ObjectName::Outcome(self.id);
        let bytes = outcome.to_object(self.repository).map_err(|fault| Error::malformed(name, fault))?;
        if !self.exclusive {
            self.storage.delete(name)?;
        }
        match self.storage.put_new(name, &bytes) {
            Ok(()) => {
                self.ended = true;
                self.unregister();
                Ok(())
            }
            Err(Error::Exists { .. }) => {
                self.ended = true;
                self.check_own_outcome(&bytes)
            }
            Err(error) => self.check_after_failure(&bytes, error),
        }
    }

    /// The put failed. It may have succeeded all the same, and whoever looks then sees what it says.
    fn check_after_failure(&mut self, ours: &[u8], error: Error) -> Result<()> {
        let name = ObjectName::Outcome(self.id);
        match self.storage.get(name, ObjectKind::Outcome.max_object_len()) {
            // not there: dropped, the session puts an abort
            Err(Error::NotFound { .. }) => Err(error),
            Ok(found) if found == ours && !(error.is_failed_sync() && self.doubts_failed_sync) => {
                self.ended = true;
                self.unregister();
                Ok(())
            }
            Ok(found) if found == ours => {
                // no abort: it would not take the place of what is there, and a sync is not tried again
                self.ended = true;
                Err(error).context(|| {
                    format!("{name} is there, but it is not known whether it would survive a power cut")
                })
            }
            Ok(_) => {
                self.ended = true;
                self.check_own_outcome(ours)
            }
            Err(_) => {
                self.ended = true;
                Err(error).context(|| format!("it is not known whether {name} was put"))
            }
        }
    }

    /// The name is taken: by this session's own write that seemed to fail, or by an abort.
    fn check_own_outcome(&mut self, ours: &[u8]) -> Result<()> {
        let name = ObjectName::Outcome(self.id);
        let found = self.storage.get(name, ObjectKind::Outcome.max_object_len())?;
        if found == ours {
            self.unregister();
            return Ok(());
        }
        match Outcome::from_object(&found, self.repository) {
            Ok(Outcome::Abort { by, why }) => {
                self.unregister();
                Err(Error::Fenced { session: self.id, by: format!("session {by}"), why })
            }
            Ok(_) => Err(Error::malformed(
                name,
                FormatFault::Invalid { what: "the outcome", found: "another session's".into() },
            )),
            Err(fault) => Err(Error::malformed(name, fault)),
        }
    }

    /// Returns [`Error::Fenced`] in place of `error` if somebody else has ended the session: what it relied on may be gone
    /// since.
    pub fn cause_of(&self, error: Error) -> Error {
        let found = self.storage.get(ObjectName::Outcome(self.id), ObjectKind::Outcome.max_object_len());
        match found.map(|found| Outcome::from_object(&found, self.repository)) {
            Ok(Ok(Outcome::Abort { by, why })) if by != self.id => {
                Error::Fenced { session: self.id, by: format!("session {by}"), why }
            }
            _ => error,
        }
    }

    /// Ends the session so that nothing of it counts.
    ///
    /// # Errors
    /// Those of the storage; an outcome that is there already is none.
    pub fn abort(mut self, why: &str) -> Result<()> {
        self.abort_once(why)
    }

    fn abort_once(&mut self, why: &str) -> Result<()> {
        self.ended = true;
        let name = ObjectName::Outcome(self.id);
        let outcome = Outcome::Abort { by: self.id, why: why.into() };
        let bytes = outcome.to_object(self.repository).map_err(|fault| Error::malformed(name, fault))?;
        match self.storage.put_new(name, &bytes) {
            Ok(()) | Err(Error::Exists { .. }) => {}
            Err(error) => return Err(error),
        }
        self.unregister();
        Ok(())
    }

    /// Takes the registration away. If that fails, the next prune does it: the outcome has decided.
    fn unregister(&mut self) {
        self.heartbeat = None;
        let _ = self.storage.delete(ObjectName::Heartbeat(self.id));
        let _ = self.storage.delete(ObjectName::Session(self.id));
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if !self.ended {
            // if even this fails, the session is like one that a kill has left: the next one of this process ends it,
            // or the next prune
            if self.abort_once("the work failed or was cancelled").is_err()
                && let Ok(mut unfinished) = self.unfinished.lock()
            {
                unfinished.push(self.id);
            }
        }
    }
}

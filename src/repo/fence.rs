//! Fencing: making sure that a session has ended, by waiting for it or by ending it.
//!
//! No clocks of two hosts are compared, and no age decides anything: a session is over if it has an outcome; it can
//! be ended if its process is gone from this host, or if its heartbeat stood still for a long time of our own clock.
//! Ending it creates its outcome exclusively, so that a session taken for dead by mistake fails instead of harming.

use std::collections::HashMap;
use std::path::Path;
use std::time::Instant;

use super::Repository;
use crate::error::{Error, Result};
use crate::format::envelope::ObjectKind;
use crate::format::name::{Folder, ObjectName};
use crate::format::session::{Outcome, SessionKind, SessionRecord};
use crate::id::SessionId;
use crate::monitor::Monitor;

/// A registered session that has no outcome yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenSession {
    pub id: SessionId,
    /// `None` if its record cannot be read.
    pub record: Option<SessionRecord>,
}

impl Repository {
    /// Returns the registered sessions that have not ended.
    ///
    /// # Errors
    /// A failed listing or read.
    pub fn open_sessions(&self) -> Result<Vec<OpenSession>> {
        let mut open = Vec::new();
        for listed in self.storage().list(Folder::Sessions)? {
            let ObjectName::Session(id) = listed.name else { continue };
            if self.has_outcome(id)? {
                continue;
            }
            let record = match self.storage().get(listed.name, ObjectKind::Session.max_object_len()) {
                // it ended just now
                Err(Error::NotFound { .. }) => continue,
                Err(error) if self.is_of_object(&error) => None,
                other => SessionRecord::from_object(&other?, self.id()).ok(),
            };
            open.push(OpenSession { id, record });
        }
        Ok(open)
    }

    /// Takes away what killed programs left of their registrations: those of sessions that have an outcome, and sessions
    /// of this host whose process is gone, which are ended.
    ///
    /// # Errors
    /// Those of the storage.
    pub fn clear_dead_sessions(&self, own: SessionId) -> Result<()> {
        for listed in self.storage().list(Folder::Sessions)? {
            let ObjectName::Session(id) = listed.name else { continue };
            if id != own && self.has_outcome(id)? {
                self.storage().delete(ObjectName::Heartbeat(id))?;
                self.storage().delete(ObjectName::Session(id))?;
            }
        }
        for session in self.open_sessions()? {
            if session.id != own && self.is_dead_here(&session) {
                self.end_session(session.id, own, "its process had ended")?;
            }
        }
        Ok(())
    }

    /// Waits for signs of life of a session. Returns true as soon as there are so many; false if it has ended, or showed
    /// none for so long that it is taken for dead.
    ///
    /// # Errors
    /// [`Error::Cancelled`]; those of the storage.
    pub fn shows_life(&self, id: SessionId, signs: u32, monitor: &dyn Monitor) -> Result<bool> {
        let (mut beat, mut since, mut left) = (self.heartbeat(id)?, Instant::now(), signs);
        while since.elapsed() < self.environment().timing.dead_after {
            monitor.check()?;
            std::thread::sleep(self.environment().timing.poll);
            if self.has_outcome(id)? {
                return Ok(false);
            }
            let now = self.heartbeat(id)?;
            if now != beat {
                left = left.saturating_sub(1);
                (beat, since) = (now, Instant::now());
            }
            if left == 0 {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn has_outcome(&self, id: SessionId) -> Result<bool> {
        match self.storage().len(ObjectName::Outcome(id)) {
            Ok(_) => Ok(true),
            Err(Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Returns true if the session ran on this host and its process is certain to be gone. Of two machines of one name, each
    /// has boots of its own.
    pub fn is_dead_here(&self, session: &OpenSession) -> bool {
        let Some(record) = &session.record else { return false };
        let environment = self.environment();
        if record.host != environment.host {
            return false;
        }
        if record.boot_id != environment.boot_id {
            let machine = record.boot_id.split_once('/').map(|(machine, _)| machine);
            let own = environment.boot_id.split_once('/').map(|(machine, _)| machine);
            return machine.is_some() && machine == own;
        }
        let lives = Path::new("/proc").join(record.process_id.to_string()).exists();
        !lives && record.process_id != environment.process_id
    }

    /// Ends a session that has not ended itself. Returns false if it was faster.
    ///
    /// # Errors
    /// Those of the storage.
    pub fn end_session(&self, id: SessionId, by: SessionId, why: &str) -> Result<bool> {
        let name = ObjectName::Outcome(id);
        let outcome = Outcome::Abort { by, why: why.into() };
        let bytes = outcome.to_object(self.id()).map_err(|fault| Error::malformed(name, fault))?;
        let ended = match self.storage().put_new(name, &bytes) {
            Ok(()) => true,
            Err(Error::Exists { .. }) => false,
            Err(error) => return Err(error),
        };
        self.storage().delete(ObjectName::Heartbeat(id))?;
        self.storage().delete(ObjectName::Session(id))?;
        Ok(ended)
    }

    /// Waits until every session that is registered now, except `own` and readers, has an outcome.
    ///
    /// # Errors
    /// [`Error::Cancelled`]; those of the storage.
    pub fn fence(&self, own: SessionId, monitor: &dyn Monitor) -> Result<()> {
        let mut waiting: HashMap<SessionId, (Vec<u8>, Instant)> = HashMap::new();
        let is_reader = |session: &OpenSession| {
            let kind = session.record.as_ref().map(|record| record.kind);
            matches!(kind, Some(SessionKind::Restore | SessionKind::Verify))
        };
        for session in self.open_sessions()? {
            if session.id == own || is_reader(&session) {
                continue;
            }
            if self.is_dead_here(&session) {
                self.end_session(session.id, own, "its process had ended")?;
                continue;
            }
            let host = session.record.map_or_else(|| "an unknown host".to_owned(), |record| record.host);
            monitor.note(&format!("waiting for session {} on {host}", session.id));
            waiting.insert(session.id, (self.heartbeat(session.id)?, Instant::now()));
        }
        while !waiting.is_empty() {
            monitor.check()?;
            std::thread::sleep(self.environment().timing.poll);
            let mut over = Vec::new();
            for (id, (beat, since)) in &mut waiting {
                if self.has_outcome(*id)? {
                    over.push(*id);
                    continue;
                }
                let now = self.heartbeat(*id)?;
                if now != *beat {
                    (*beat, *since) = (now, Instant::now());
                } else if since.elapsed() >= self.environment().timing.dead_after
                    || self.died_meanwhile(*id)?
                {
                    self.end_session(*id, own, "it showed no sign of life")?;
                    over.push(*id);
                }
            }
            over.iter().for_each(|id| drop(waiting.remove(id)));
        }
        Ok(())
    }

    fn died_meanwhile(&self, id: SessionId) -> Result<bool> {
        let name = ObjectName::Session(id);
        let record = match self.storage().get(name, ObjectKind::Session.max_object_len()) {
            Ok(bytes) => SessionRecord::from_object(&bytes, self.id()).ok(),
            // removed: by the session itself behind its outcome, or by hand; the outcome decides
            Err(Error::NotFound { .. }) => return Ok(true),
            Err(error) => return Err(error),
        };
        Ok(self.is_dead_here(&OpenSession { id, record }))
    }

    fn heartbeat(&self, id: SessionId) -> Result<Vec<u8>> {
        match self.storage().get(ObjectName::Heartbeat(id), 64) {
            Ok(bytes) => Ok(bytes),
            Err(Error::NotFound { .. } | Error::Malformed { .. }) => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }
}

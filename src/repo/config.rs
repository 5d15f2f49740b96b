//! `config` and its copy: without what they say no point can be read, and one of them is enough.

use super::Repository;
use crate::error::{Error, FormatFault, Result};
use crate::format::config::Config;
use crate::format::envelope::ObjectKind;
use crate::format::name::{Folder, ObjectName};
use crate::monitor::Monitor;
use crate::storage::Storage;

/// Both names, that of the copy last.
const NAMES: [ObjectName; 2] = [ObjectName::Config, ObjectName::ConfigCopy];

/// Reads the config, or where that is lost its copy.
///
/// # Errors
/// [`Error::NoRepository`] where there is neither; that of the config if the copy is no help.
pub(super) fn read(storage: &dyn Storage, monitor: &dyn Monitor) -> Result<Config> {
    let error = match load(storage, ObjectName::Config) {
        Ok((config, _)) => return Ok(config),
        // nothing is lost: this process cannot read it
        Err(error) if error.is_local() => return Err(error),
        Err(error) => error,
    };
    let is_missing = matches!(error, Error::NotFound { .. });
    match load(storage, ObjectName::ConfigCopy) {
        Ok((config, _)) => {
            let problem = if is_missing {
                format!("config of {} is missing", storage.url())
            } else {
                error.to_string()
            };
            monitor.warn(&format!("{problem}; its copy is used: `vmkeep repair index` puts it anew"));
            Ok(config)
        }
        Err(Error::NotFound { .. }) if is_missing => Err(Error::NoRepository { url: storage.url() }),
        Err(copy) => Err(if is_missing { copy } else { error }),
    }
}

/// Returns a config and its bytes.
fn load(storage: &dyn Storage, name: ObjectName) -> Result<(Config, Vec<u8>)> {
    let bytes = storage.get(name, ObjectKind::Config.max_object_len())?;
    let named = |fault| Error::malformed(format!("{name} of {}", storage.url()), fault);
    Ok((Config::from_object(&bytes).map_err(named)?, bytes))
}

/// Refuses a storage in which a repository is or was.
pub(super) fn refuse_repository(storage: &dyn Storage) -> Result<()> {
    for name in NAMES {
        match storage.len(name) {
            Ok(_) => return Err(Error::Exists { object: format!("the repository {}", storage.url()) }),
            Err(Error::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    for folder in Folder::ALL {
        let listed = storage.list(folder)?;
        // an attempt that was cut short leaves no more than what it probed with
        let left = listed.iter().find(|listed| !matches!(listed.name, ObjectName::Heartbeat(_)));
        if let Some(left) = left {
            return Err(Error::Refused {
                object: storage.url(),
                reason: format!("{} is there, of a repository whose config is lost", left.name),
                hint: Some("bring config or config.copy back from a copy of the repository".into()),
            });
        }
    }
    Ok(())
}

/// What one of the two is.
enum State {
    Good,
    Missing,
    Damaged(Error),
    /// Sound, and of another repository.
    Other(Error),
}

impl Repository {
    fn config_state(&self, name: ObjectName) -> Result<State> {
        match load(self.storage(), name) {
            Ok((config, _)) if config == *self.config() => Ok(State::Good),
            Ok((config, _)) => {
                let (found, expected) = (config.repository.to_hex(), self.id().to_hex());
                let fault = match found == expected {
                    false => FormatFault::ForeignRepository { found, expected },
                    true => FormatFault::Invalid { what: "it", found: "another config than its copy".into() },
                };
                Ok(State::Other(Error::malformed(name, fault)))
            }
            Err(Error::NotFound { .. }) => Ok(State::Missing),
            Err(error) if self.is_of_object(&error) => Ok(State::Damaged(error)),
            Err(error) => Err(error),
        }
    }

    /// Returns what is wrong with the config and its copy. That there is no copy is not wrong: a repository that was made
    /// without one gets it from the next prune.
    ///
    /// # Errors
    /// Those of the storage but damage.
    pub fn config_problems(&self) -> Result<Vec<(ObjectName, String)>> {
        let mut problems = Vec::new();
        for name in NAMES {
            match self.config_state(name)? {
                State::Missing if name == ObjectName::Config => {
                    let problem = "it is missing; `vmkeep repair index` puts it anew from its copy";
                    problems.push((name, problem.to_owned()));
                }
                State::Good | State::Missing => {}
                State::Damaged(error) | State::Other(error) => problems.push((name, error.to_string())),
            }
        }
        Ok(problems)
    }

    /// Puts the config, or its copy, where it is missing.
    ///
    /// # Errors
    /// Those of the storage.
    pub fn put_missing_config(&self) -> Result<()> {
        for name in NAMES {
            match self.storage().len(name) {
                Err(Error::NotFound { .. }) => self.put_config(name)?,
                Ok(_) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Puts the config, or its copy, in place of what is damaged or missing. Returns what is put, or with a dry run would be.
    ///
    /// # Errors
    /// [`Error::Malformed`] if one of them is that of another repository: which of the two is wrong is for people to say.
    /// Those of the storage.
    pub fn repair_config(&self, dry_run: bool) -> Result<Vec<ObjectName>> {
        let mut bad = Vec::new();
        for name in NAMES {
            match self.config_state(name)? {
                State::Good => continue,
                State::Other(error) => return Err(error),
                // cut off behind this, it is missing, and the other one is there
                State::Damaged(_) if !dry_run => self.storage().delete(name)?,
                State::Damaged(_) | State::Missing => {}
            }
            if !dry_run {
                self.put_config(name)?;
            }
            bad.push(name);
        }
        Ok(bad)
    }

    /// Puts the bytes of the other one.
    fn put_config(&self, name: ObjectName) -> Result<()> {
        let other = if name == ObjectName::Config { ObjectName::ConfigCopy } else { ObjectName::Config };
        let bytes = match load(self.storage(), other) {
            Ok((config, bytes)) if config == *self.config() => bytes,
            Ok(_) | Err(_) => self.config().to_object().map_err(|fault| Error::malformed(name, fault))?,
        };
        match self.storage().put_new(name, &bytes) {
            // somebody else has
            Err(Error::Exists { .. }) | Ok(()) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Returns true if an object that was read is the reason for an error: it is not what it should be, or a part of the disk
    /// that it lies on cannot be read, though the storage gives others and this process may read it.
    pub fn is_of_object(&self, error: &Error) -> bool {
        is_of_object(self.storage(), error)
    }
}

/// Returns true if an object that was read is the reason for an error: it is not what it should be, or a part of the disk
/// that it lies on cannot be read. A storage that gives nothing at all is another matter, and so is what this process may
/// not do or has no room for.
pub fn is_of_object(storage: &dyn Storage, error: &Error) -> bool {
    let is_reachable = || NAMES.into_iter().any(|name| storage.len(name).is_ok());
    error.is_damage() || (error.is_io() && !error.is_local() && is_reachable())
}

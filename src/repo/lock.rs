//! One backup of a domain at a time, as far as one host and user can see.
//!
//! Not needed for the repository's sake. But what one run sees of the domain's checkpoints while another one is
//! between its job and its commit looks like a killed run's leftover, and would be tidied away.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::thread;
use std::time::Duration;

use rustix::fs::FlockOperation;

use super::Repository;
use crate::error::{Error, Result};

/// Whoever only looks whether the lock is taken has it for a moment.
const ATTEMPTS: u32 = 4;
const BETWEEN_ATTEMPTS: Duration = Duration::from_millis(50);

/// Held until dropped, or until the process ends, however it does.
#[derive(Debug)]
pub struct DomainLock {
    _file: Option<File>,
}

impl Repository {
    /// Takes the lock of a domain, which lies beside the local index; without a cache directory there is none.
    ///
    /// # Errors
    /// [`Error::Busy`] while another process holds it; [`Error::Io`].
    pub fn lock_domain(&self, domain: &str) -> Result<DomainLock> {
        let Some(cache_dir) = &self.cache_dir else { return Ok(DomainLock { _file: None }) };
        let directory = cache_dir.join(self.id().to_hex()).join("locks");
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&directory)
            .map_err(|error| Error::io("create", directory.display(), error))?;
        // a domain's name may hold what a file's name may not
        let hash = blake3::hash(domain.as_bytes()).to_hex();
        let path = directory.join(hash.as_str());
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|error| Error::io("open", path.display(), error))?;
        let attempt = || rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive);
        let mut locked = attempt();
        for _ in 1..ATTEMPTS {
            if locked != Err(rustix::io::Errno::WOULDBLOCK) {
                break;
            }
            thread::sleep(BETWEEN_ATTEMPTS);
            locked = attempt();
        }
        match locked {
            Ok(()) => Ok(DomainLock { _file: Some(file) }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::Busy {
                object: format!("domain {domain}"),
                why: "another backup of it to this repository is running".into(),
            }),
            Err(errno) => Err(Error::io("lock", path.display(), errno.into())),
        }
    }
}

//! A storage on top of another one, which it does not change: what is written stays in memory. For showing what would be.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::memory::MemoryStorage;
use super::{Listed, Storage};
use crate::error::{Error, Result};
use crate::format::name::{Folder, ObjectName};

/// What was written and deleted, and below it what was there.
#[derive(Debug)]
pub struct OverlayStorage {
    below: Box<dyn Storage>,
    written: MemoryStorage,
    /// Names that are not looked for below any more. Locked by whoever changes anything.
    hidden: Mutex<BTreeSet<ObjectName>>,
}

impl OverlayStorage {
    /// Begins with what is below.
    pub fn new(below: Box<dyn Storage>) -> Self {
        Self { below, written: MemoryStorage::new(), hidden: Mutex::default() }
    }

    fn hidden(&self) -> MutexGuard<'_, BTreeSet<ObjectName>> {
        // no call leaves it half changed
        self.hidden.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for an object where it is.
    fn ask<T>(&self, name: ObjectName, mut ask: impl FnMut(&dyn Storage) -> Result<T>) -> Result<T> {
        match ask(&self.written) {
            Err(Error::NotFound { .. }) if !self.hidden().contains(&name) => ask(self.below.as_ref()),
            asked => asked,
        }
    }
}

impl Storage for OverlayStorage {
    fn url(&self) -> String {
        self.below.url()
    }

    fn put_new(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        let hidden = self.hidden();
        if !hidden.contains(&name) {
            match self.below.len(name) {
                Err(Error::NotFound { .. }) => {}
                Err(error) => return Err(error),
                Ok(_) => return Err(Error::Exists { object: name.to_string() }),
            }
        }
        self.written.put_new(name, bytes)
    }

    fn replace(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        self.hidden().insert(name);
        self.written.replace(name, bytes)
    }

    fn get(&self, name: ObjectName, max_len: u64) -> Result<Vec<u8>> {
        self.ask(name, |storage| storage.get(name, max_len))
    }

    fn prefetch(&self, name: ObjectName, offset: u64, len: u64) {
        self.below.prefetch(name, offset, len);
    }

    fn get_range(&self, name: ObjectName, offset: u64, len: u64) -> Result<Vec<u8>> {
        self.ask(name, |storage| storage.get_range(name, offset, len))
    }

    fn get_range_into(&self, name: ObjectName, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.ask(name, |storage| storage.get_range_into(name, offset, bytes))
    }

    fn len(&self, name: ObjectName) -> Result<u64> {
        self.ask(name, |storage| storage.len(name))
    }

    fn list(&self, folder: Folder) -> Result<Vec<Listed>> {
        let hidden = self.hidden();
        let mut listed = self.below.list(folder)?;
        listed.retain(|listed| !hidden.contains(&listed.name));
        listed.extend(self.written.list(folder)?);
        listed.sort_by_key(|listed| listed.name);
        Ok(listed)
    }

    fn names(&self, folder: Folder) -> Result<Vec<ObjectName>> {
        let hidden = self.hidden();
        let mut names = self.below.names(folder)?;
        names.retain(|name| !hidden.contains(name));
        names.extend(self.written.names(folder)?);
        names.sort_unstable();
        Ok(names)
    }

    fn delete(&self, name: ObjectName) -> Result<()> {
        self.hidden().insert(name);
        self.written.delete(name)
    }

    fn sync_deletes(&self, _folder: Folder) -> Result<()> {
        Ok(())
    }
}

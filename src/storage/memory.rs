//! Storage in memory, for tests, benches and experiments.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Listed, Storage};
use crate::error::{Error, FormatFault, Result};
use crate::format::name::{Folder, ObjectName};

type Objects = BTreeMap<ObjectName, Vec<u8>>;

/// Objects in a map; clones share it.
#[derive(Debug, Clone, Default)]
pub struct MemoryStorage {
    objects: Arc<Mutex<Objects>>,
}

impl MemoryStorage {
    /// Creates an empty storage.
    pub fn new() -> Self {
        Self::default()
    }

    /// Changes an object in place, or removes it by returning `None`: what the trait does not allow and damage does.
    pub fn tamper(&self, name: ObjectName, change: impl FnOnce(Vec<u8>) -> Option<Vec<u8>>) {
        let mut objects = self.objects();
        if let Some(bytes) = objects.remove(&name).and_then(change) {
            objects.insert(name, bytes);
        }
    }

    /// Returns a copy that does not share its objects.
    pub fn snapshot(&self) -> Self {
        Self { objects: Arc::new(Mutex::new(self.objects().clone())) }
    }

    /// Returns all objects.
    #[cfg(test)]
    pub(crate) fn objects_for_test(&self) -> Objects {
        self.objects().clone()
    }

    /// Replaces all objects.
    #[cfg(test)]
    pub(crate) fn set_for_test(&self, objects: impl Iterator<Item = (ObjectName, Vec<u8>)>) {
        *self.objects() = objects.collect();
    }

    fn objects(&self) -> MutexGuard<'_, Objects> {
        // no call leaves the map half changed
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, name: ObjectName, read: impl FnOnce(&[u8]) -> Result<T>) -> Result<T> {
        match self.objects().get(&name) {
            Some(bytes) => read(bytes),
            None => Err(Error::NotFound { object: name.to_string() }),
        }
    }
}

impl Storage for MemoryStorage {
    fn url(&self) -> String {
        "memory:".into()
    }

    fn put_new(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        let mut objects = self.objects();
        if objects.contains_key(&name) {
            return Err(Error::Exists { object: name.to_string() });
        }
        objects.insert(name, bytes.to_vec());
        Ok(())
    }

    fn replace(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        self.objects().insert(name, bytes.to_vec());
        Ok(())
    }

    fn get(&self, name: ObjectName, max_len: u64) -> Result<Vec<u8>> {
        self.with(name, |bytes| {
            let found = bytes.len() as u64;
            if found > max_len {
                let fault = FormatFault::TooLarge { what: "its length", found, max: max_len };
                return Err(Error::malformed(name, fault));
            }
            Ok(bytes.to_vec())
        })
    }

    fn get_range(&self, name: ObjectName, offset: u64, len: u64) -> Result<Vec<u8>> {
        self.with(name, |bytes| {
            let needed = offset.saturating_add(len);
            let part = usize::try_from(offset)
                .ok()
                .zip(usize::try_from(needed).ok())
                .and_then(|(start, end)| bytes.get(start..end));
            part.map(<[u8]>::to_vec).ok_or_else(|| {
                let fault = FormatFault::Truncated { found: bytes.len() as u64, needed };
                Error::malformed(name, fault)
            })
        })
    }

    fn len(&self, name: ObjectName) -> Result<u64> {
        self.with(name, |bytes| Ok(bytes.len() as u64))
    }

    fn list(&self, folder: Folder) -> Result<Vec<Listed>> {
        let objects = self.objects();
        let inside = objects.iter().filter(|(name, _)| name.folder() == Some(folder));
        Ok(inside.map(|(name, bytes)| Listed { name: *name, len: bytes.len() as u64 }).collect())
    }

    fn delete(&self, name: ObjectName) -> Result<()> {
        self.objects().remove(&name);
        Ok(())
    }

    fn sync_deletes(&self, _folder: Folder) -> Result<()> {
        Ok(())
    }
}

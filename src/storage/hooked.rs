//! A storage for tests in which something happens at listings, reads and puts.

use std::fmt;
use std::sync::Arc;

use super::memory::MemoryStorage;
use super::{Listed, Storage};
use crate::error::Result;
use crate::format::name::{Folder, ObjectName};

type BeforeList = dyn Fn(Folder) + Send + Sync;
type OnList = dyn Fn(Folder, Vec<Listed>) -> Vec<Listed> + Send + Sync;
type BeforeRead = dyn Fn(ObjectName) + Send + Sync;
type BehindPut = dyn Fn(ObjectName) -> Result<()> + Send + Sync;

/// Does something before each listing, with what was listed, before each read, and behind each put of a new object, before
/// they return.
#[derive(Clone)]
pub(crate) struct HookedStorage {
    inner: MemoryStorage,
    before_list: Arc<BeforeList>,
    on_list: Arc<OnList>,
    before_read: Arc<BeforeRead>,
    behind_put: Arc<BehindPut>,
}

impl HookedStorage {
    /// One in which nothing happens yet.
    pub fn new(inner: &MemoryStorage) -> Self {
        Self {
            inner: inner.clone(),
            before_list: Arc::new(|_| {}),
            on_list: Arc::new(|_, listed| listed),
            before_read: Arc::new(|_| {}),
            behind_put: Arc::new(|_| Ok(())),
        }
    }

    pub fn before_list(self, hook: impl Fn(Folder) + Send + Sync + 'static) -> Self {
        Self { before_list: Arc::new(hook), ..self }
    }

    pub fn on_list(self, hook: impl Fn(Folder, Vec<Listed>) -> Vec<Listed> + Send + Sync + 'static) -> Self {
        Self { on_list: Arc::new(hook), ..self }
    }

    pub fn before_read(self, hook: impl Fn(ObjectName) + Send + Sync + 'static) -> Self {
        Self { before_read: Arc::new(hook), ..self }
    }

    pub fn behind_put(self, hook: impl Fn(ObjectName) -> Result<()> + Send + Sync + 'static) -> Self {
        Self { behind_put: Arc::new(hook), ..self }
    }
}

impl fmt::Debug for HookedStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HookedStorage")
    }
}

impl Storage for HookedStorage {
    fn url(&self) -> String {
        "hooked:".into()
    }

    fn put_new(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        self.inner.put_new(name, bytes)?;
        (self.behind_put)(name)
    }

    fn replace(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        self.inner.replace(name, bytes)
    }

    fn get(&self, name: ObjectName, max_len: u64) -> Result<Vec<u8>> {
        (self.before_read)(name);
        self.inner.get(name, max_len)
    }

    fn get_range(&self, name: ObjectName, offset: u64, len: u64) -> Result<Vec<u8>> {
        (self.before_read)(name);
        self.inner.get_range(name, offset, len)
    }

    fn len(&self, name: ObjectName) -> Result<u64> {
        self.inner.len(name)
    }

    fn list(&self, folder: Folder) -> Result<Vec<Listed>> {
        (self.before_list)(folder);
        Ok((self.on_list)(folder, self.inner.list(folder)?))
    }

    fn delete(&self, name: ObjectName) -> Result<()> {
        self.inner.delete(name)
    }

    fn sync_deletes(&self, folder: Folder) -> Result<()> {
        self.inner.sync_deletes(folder)
    }
}

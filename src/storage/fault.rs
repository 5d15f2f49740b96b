//! Storages that fail, for tests: one that is cut off by a crash, and one whose n-th operation goes wrong.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::memory::MemoryStorage;
use super::{Listed, Storage};
use crate::error::{Error, Result};
use crate::format::name::{Folder, ObjectName};

/// What a local directory does for an operation, step by step.
#[derive(Debug, Clone)]
enum Step {
    /// Content goes to a file without a name; not durable yet.
    Write(u64, Arc<Vec<u8>>),
    SyncFile(u64),
    /// The file gets its name; durable once the directory is synced.
    Link(u64, ObjectName),
    Unlink(ObjectName),
    SyncDirectory(Option<Folder>),
}

/// A rule of the directory that can be taken away, to see that a test notices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flaw {
    None,
    /// Content is not synced before the file gets its name.
    NoFileSync,
    /// The directory is not synced before the object is called durable.
    NoDirectorySync,
    /// Deletes are not synced between the phases of a sweep.
    NoDeleteSync,
}

/// What of the steps that were not synced a crash lets survive.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Survival {
    All,
    Nothing,
    /// Each with even chances, by this seed.
    Some(u64),
}

#[derive(Debug)]
struct Log {
    steps: Vec<Step>,
    next_file: u64,
}

/// A directory whose every step is on record, so that what a crash would leave can be built at any of them.
#[derive(Debug, Clone)]
pub(crate) struct CrashStorage {
    now: MemoryStorage,
    log: Arc<Mutex<Log>>,
    base: Arc<BTreeMap<ObjectName, Arc<Vec<u8>>>>,
    flaw: Flaw,
}

impl CrashStorage {
    /// Begins with what `base` holds, durably.
    pub(crate) fn on(base: &MemoryStorage, flaw: Flaw) -> Self {
        let objects = base.objects_for_test().into_iter().map(|(name, bytes)| (name, Arc::new(bytes)));
        Self {
            now: base.snapshot(),
            log: Arc::new(Mutex::new(Log { steps: Vec::new(), next_file: 0 })),
            base: Arc::new(objects.collect()),
            flaw,
        }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns how many steps were taken.
    pub(crate) fn len(&self) -> usize {
        self.log().steps.len()
    }

    /// Returns what is there if the first `count` steps were taken and then the power went.
    pub(crate) fn image(&self, count: usize, survival: Survival) -> MemoryStorage {
        let log = self.log();
        let steps = log.steps.get(..count).unwrap_or(&log.steps);
        let mut synced_files = std::collections::HashSet::new();
        let mut last_sync: BTreeMap<Option<Folder>, usize> = BTreeMap::new();
        let mut files: BTreeMap<u64, Arc<Vec<u8>>> = BTreeMap::new();
        for (at, step) in steps.iter().enumerate() {
            match step {
                Step::Write(file, bytes) => drop(files.insert(*file, Arc::clone(bytes))),
                Step::SyncFile(file) => drop(synced_files.insert(*file)),
                Step::SyncDirectory(folder) => drop(last_sync.insert(*folder, at)),
                Step::Link(..) | Step::Unlink(_) => {}
            }
        }
        let mut random = match survival {
            Survival::Some(seed) => seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ count as u64,
            _ => 0,
        };
        let mut survives = || match survival {
            Survival::All => true,
            Survival::Nothing => false,
            Survival::Some(_) => {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random & 1 == 1
            }
        };
        let mut objects: BTreeMap<ObjectName, Arc<Vec<u8>>> = (*self.base).clone();
        for (at, step) in steps.iter().enumerate() {
            let name = match step {
                Step::Link(_, name) | Step::Unlink(name) => *name,
                _ => continue,
            };
            let durable = last_sync.get(&name.folder()).is_some_and(|sync| *sync > at);
            if !durable && !survives() {
                continue;
            }
            match step {
                Step::Link(file, _) => {
                    let Some(bytes) = files.get(file) else { continue };
                    let whole = synced_files.contains(file) || survives();
                    let torn = || Arc::new(bytes.get(..bytes.len() / 2).unwrap_or_default().to_vec());
                    objects.insert(name, if whole { Arc::clone(bytes) } else { torn() });
                }
                _ => drop(objects.remove(&name)),
            }
        }
        let image = MemoryStorage::new();
        image.set_for_test(objects.into_iter().map(|(name, bytes)| (name, (*bytes).clone())));
        image
    }

    fn link(&self, name: ObjectName, bytes: &[u8], sync: bool) {
        let mut log = self.log();
        let file = log.next_file;
        log.next_file += 1;
        log.steps.push(Step::Write(file, Arc::new(bytes.to_vec())));
        if sync && self.flaw != Flaw::NoFileSync {
            log.steps.push(Step::SyncFile(file));
        }
        log.steps.push(Step::Link(file, name));
        if sync && self.flaw != Flaw::NoDirectorySync {
            log.steps.push(Step::SyncDirectory(name.folder()));
        }
    }
}

impl Storage for CrashStorage {
    fn url(&self) -> String {
        "crash:".into()
    }

    fn put_new(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        self.now.put_new(name, bytes)?;
        self.link(name, bytes, true);
        Ok(())
    }

    fn replace(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        self.now.replace(name, bytes)?;
        self.link(name, bytes, false);
        Ok(())
    }

    fn get(&self, name: ObjectName, max_len: u64) -> Result<Vec<u8>> {
        self.now.get(name, max_len)
    }

    fn get_range(&self, name: ObjectName, offset: u64, len: u64) -> Result<Vec<u8>> {
        self.now.get_range(name, offset, len)
    }

    fn len(&self, name: ObjectName) -> Result<u64> {
        self.now.len(name)
    }

    fn list(&self, folder: Folder) -> Result<Vec<Listed>> {
        self.now.list(folder)
    }

    fn delete(&self, name: ObjectName) -> Result<()> {
        self.now.delete(name)?;
        self.log().steps.push(Step::Unlink(name));
        Ok(())
    }

    fn sync_deletes(&self, folder: Folder) -> Result<()> {
        if self.flaw != Flaw::NoDeleteSync {
            self.log().steps.push(Step::SyncDirectory(Some(folder)));
        }
        Ok(())
    }
}

/// How an operation goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing is done.
    Eio,
    /// Nothing is done.
    NoSpace,
    /// Nothing is visible.
    ShortWrite,
    /// The object is there, and may not be after a power cut.
    FailedSync,
    /// As before, and it is not there.
    FailedSyncAndGone,
    /// It is done, and nobody says so.
    TimeOut,
    /// It is done; a second attempt below says that it was there.
    ExistsAlready,
}

impl Fault {
    pub(crate) const ALL: [Self; 7] = [
        Self::Eio,
        Self::NoSpace,
        Self::ShortWrite,
        Self::FailedSync,
        Self::FailedSyncAndGone,
        Self::TimeOut,
        Self::ExistsAlready,
    ];

    fn is_done(self) -> bool {
        matches!(self, Self::FailedSync | Self::TimeOut | Self::ExistsAlready)
    }

    fn error(self, name: &str) -> Error {
        use std::io::{Error as IoError, ErrorKind};
        let (action, kind) = match self {
            Self::NoSpace => ("write", ErrorKind::StorageFull),
            Self::ShortWrite => ("write", ErrorKind::WriteZero),
            Self::FailedSync | Self::FailedSyncAndGone => ("sync", ErrorKind::Other),
            Self::TimeOut => ("write", ErrorKind::TimedOut),
            Self::ExistsAlready => return Error::Exists { object: name.to_owned() },
            Self::Eio => ("reach", ErrorKind::Other),
        };
        Error::io(action, name, IoError::new(kind, "injected"))
    }
}

/// A storage whose operation number `at` goes wrong, once.
#[derive(Debug, Clone)]
pub(crate) struct FailingStorage {
    inner: MemoryStorage,
    left: Arc<AtomicU64>,
    fault: Fault,
    /// Only puts into this folder are counted.
    only: Option<Folder>,
    failed_read: Arc<Mutex<Option<String>>>,
}

impl FailingStorage {
    pub(crate) fn new(inner: MemoryStorage, at: u64, fault: Fault) -> Self {
        Self { inner, left: Arc::new(AtomicU64::new(at)), fault, only: None, failed_read: Arc::default() }
    }

    /// The put number `at` into a folder goes wrong, and nothing else.
    pub(crate) fn at_put(inner: MemoryStorage, folder: Folder, at: u64, fault: Fault) -> Self {
        Self { only: Some(folder), ..Self::new(inner, at, fault) }
    }

    /// Returns true once the operation has gone wrong.
    pub(crate) fn has_failed(&self) -> bool {
        self.left.load(Ordering::SeqCst) == u64::MAX
    }

    /// Returns the object, folder or "a part of" an object that could not be read, if it was a read that went wrong.
    pub(crate) fn failed_read(&self) -> Option<String> {
        self.failed_read.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Counts an operation; returns true if it is the one.
    fn is_due(&self) -> bool {
        let count = |left: u64| if left == u64::MAX { None } else { Some(left.wrapping_sub(1)) };
        self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, count) == Ok(0)
    }

    fn change(&self, name: &str, change: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.only.is_some() || !self.is_due() {
            return change();
        }
        self.fail(name, change)
    }

    fn fail(&self, name: &str, change: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.fault.is_done() {
            change()?;
        }
        Err(self.fault.error(name))
    }

    fn read<T>(&self, name: &str, read: impl FnOnce() -> Result<T>) -> Result<T> {
        if self.only.is_none() && self.is_due() {
            *self.failed_read.lock().unwrap_or_else(PoisonError::into_inner) = Some(name.to_owned());
            return Err(Fault::Eio.error(name));
        }
        read()
    }
}

impl Storage for FailingStorage {
    fn url(&self) -> String {
        "failing:".into()
    }

    fn put_new(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        let put = || self.inner.put_new(name, bytes);
        if self.only.is_some_and(|only| name.folder() == Some(only)) && self.is_due() {
            return self.fail(&name.to_string(), put);
        }
        self.change(&name.to_string(), put)
    }

    fn replace(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        self.inner.replace(name, bytes)
    }

    fn get(&self, name: ObjectName, max_len: u64) -> Result<Vec<u8>> {
        self.read(&name.to_string(), || self.inner.get(name, max_len))
    }

    fn get_range(&self, name: ObjectName, offset: u64, len: u64) -> Result<Vec<u8>> {
        self.read(&format!("a part of {name}"), || self.inner.get_range(name, offset, len))
    }

    fn len(&self, name: ObjectName) -> Result<u64> {
        self.read(&name.to_string(), || self.inner.len(name))
    }

    fn list(&self, folder: Folder) -> Result<Vec<Listed>> {
        self.read(folder.as_str(), || self.inner.list(folder))
    }

    fn delete(&self, name: ObjectName) -> Result<()> {
        let change = || self.inner.delete(name);
        match self.change(&name.to_string(), change) {
            // no delete says that
            Err(Error::Exists { .. }) => Ok(()),
            other => other,
        }
    }

    fn sync_deletes(&self, folder: Folder) -> Result<()> {
        match self.change(folder.as_str(), || self.inner.sync_deletes(folder)) {
            Err(Error::Exists { .. }) => Ok(()),
            other => other,
        }
    }
}

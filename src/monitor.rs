//! How the library tells what it is doing, and is told to stop: it never prints.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::{Error, Result};

/// Names one piece of work whose progress is shown; unique within a [`Monitor`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TaskId(pub u64);

/// Receives progress and warnings, and says whether to go on. Called from several threads.
pub trait Monitor: Send + Sync {
    /// Begins a task of `total_bytes` (0 where unknown).
    fn start(&self, name: &str, total_bytes: u64) -> TaskId;
    /// Reports that `bytes` more of a task are done.
    fn advance(&self, task: TaskId, bytes: u64);
    /// Ends a task.
    fn finish(&self, task: TaskId);
    /// Says something that the user has to know although the work goes on.
    fn warn(&self, message: &str);
    /// Says something that only an interested user wants to read.
    fn note(&self, message: &str);
    /// Returns true once the work is to stop.
    fn is_cancelled(&self) -> bool;

    /// Fails with [`Error::Cancelled`] once the work is to stop.
    ///
    /// # Errors
    /// [`Error::Cancelled`], and nothing else.
    fn check(&self) -> Result<()> {
        if self.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }
}

/// A monitor that remembers warnings and notes, counts progress, and can be cancelled.
///
/// Tests assert on it; library users that want no output use it as it is.
#[derive(Debug, Default)]
pub struct Recorder {
    next_task: AtomicU64,
    advanced: AtomicU64,
    cancelled: AtomicBool,
    warnings: Mutex<Vec<String>>,
    notes: Mutex<Vec<String>>,
}

impl Recorder {
    /// Creates a monitor that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes every later [`Monitor::check`] fail.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::SeqCst);
    }

    /// Returns the warnings so far.
    pub fn warnings(&self) -> Vec<String> {
        self.warnings.lock().map(|list| list.clone()).unwrap_or_default()
    }

    /// Returns the notes so far.
    pub fn notes(&self) -> Vec<String> {
        self.notes.lock().map(|list| list.clone()).unwrap_or_default()
    }

    /// Returns the bytes that all tasks advanced by.
    pub fn advanced_bytes(&self) -> u64 {
        self.advanced.load(Ordering::Relaxed)
    }
}

impl Monitor for Recorder {
    fn start(&self, _name: &str, _total_bytes: u64) -> TaskId {
        TaskId(self.next_task.fetch_add(1, Ordering::Relaxed))
    }

    fn advance(&self, _task: TaskId, bytes: u64) {
        self.advanced.fetch_add(bytes, Ordering::Relaxed);
    }

    fn finish(&self, _task: TaskId) {}

    fn warn(&self, message: &str) {
        if let Ok(mut list) = self.warnings.lock() {
            list.push(message.to_owned());
        }
    }

    fn note(&self, message: &str) {
        if let Ok(mut list) = self.notes.lock() {
            list.push(message.to_owned());
        }
    }

    fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
    }
}

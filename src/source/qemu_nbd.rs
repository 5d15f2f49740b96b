//! A `qemu-nbd` of our own: the server of an image file, for reading and for writing.

use std::path::Path;

use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::nbd::Connection;

/// A running `qemu-nbd`.
pub struct QemuNbd {}

fn missing() -> Error {
    Error::Usage("qcow2 images are not supported by this build".into())
}

/// Creates an empty qcow2 image.
///
/// # Errors
/// What `qemu-img` says.
pub fn create_qcow2(_path: &Path, _size: u64) -> Result<()> {
    Err(missing())
}

impl QemuNbd {
    /// Serves an image for writing.
    ///
    /// # Errors
    /// What `qemu-nbd` says.
    pub fn writable(_image: &Path, _format: &str, _monitor: &dyn Monitor) -> Result<Self> {
        Err(missing())
    }

    /// Connects to the server.
    ///
    /// # Errors
    /// As [`Connection::open`].
    pub fn connect(&self, _contexts: &[&str], _monitor: &dyn Monitor) -> Result<Connection> {
        Err(missing())
    }

    /// Ends the server.
    ///
    /// # Errors
    /// What `qemu-nbd` says.
    pub fn stop(self) -> Result<()> {
        Ok(())
    }
}

//! What a disk is restored to: a raw file, a block device, a qcow2 image.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fs::{FallocateFlags, OFlags, RenameFlags};

use super::ImageFormat;
use super::raw::RawTarget;
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::limits::BLOCK_LEN;
use crate::monitor::Monitor;
use crate::nbd::Connection;
use crate::ops::content::{DiskBytes, Sink};
use crate::repo::is_zero;
use crate::source::qemu_nbd::{self, QemuNbd};
use crate::storage::direct;

/// Zeroes written at once where a device cannot be told to hold them, bytes.
const ZERO_BUFFER_LEN: usize = 1 << 20;

/// Takes a disk's content, and becomes what was asked for.
pub(super) trait DiskTarget: Sink + Send {
    /// Makes everything durable and gives the target its name.
    fn finish(self: Box<Self>, monitor: &dyn Monitor) -> Result<()>;
}

/// Opens what `path` is, or creates an image file of `format` there.
pub(super) fn open_target(
    path: &Path,
    size: u64,
    format: ImageFormat,
    force: bool,
    monitor: &dyn Monitor,
) -> Result<Box<dyn DiskTarget>> {
    match std::fs::metadata(path) {
        Ok(found) if found.file_type().is_block_device() => {
            return Ok(Box::new(BlockTarget::open(path, size)?));
        }
        Ok(found) if !found.is_file() => {
            return Err(Error::Refused {
                object: path.display().to_string(),
                reason: "it is neither a file nor a block device".into(),
                hint: None,
            });
        }
        Ok(_) if !force => return Err(exists(path)),
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(Error::io("look at", path.display(), error)),
    }
    match format {
        ImageFormat::Raw => Ok(Box::new(RawTarget::create(path, size, force)?)),
        ImageFormat::Qcow2 => Ok(Box::new(Qcow2Target::create(path, size, force, monitor)?)),
    }
}

fn exists(path: &Path) -> Error {
    Error::Refused {
        object: path.display().to_string(),
        reason: "the file exists already".into(),
        hint: Some("name another target, or add --force to write over it".into()),
    }
}

/// A file that gets its name only when it is complete; dropped before, it is removed.
pub(super) struct PartialFile {
    /// The name that it will get.
    pub path: PathBuf,
    partial: PathBuf,
    force: bool,
    named: bool,
}

impl PartialFile {
    pub fn new(path: &Path, force: bool) -> Result<Self> {
        let name =
            path.file_name().ok_or_else(|| Error::Usage(format!("{} names no file", path.display())))?;
        let mut partial_name = std::ffi::OsString::from(".");
        partial_name.push(name);
        partial_name.push(format!(".{}.partial", std::process::id()));
        let partial = path.with_file_name(partial_name);
        Ok(Self { path: path.to_path_buf(), partial, force, named: false })
    }

    /// Creates it, for this user alone.
    pub fn create(&self) -> Result<File> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&self.partial)
            .map_err(|source| Error::io("create", self.partial.display(), source))
    }

    /// Opens it once more, for writing around the page cache; `None` where the file system cannot.
    pub fn open_direct(&self) -> Option<File> {
        direct::open_direct(&self.partial)
    }

    /// Gives the file its name, durably. The content must be durable.
    pub fn name(mut self) -> Result<()> {
        let flags = if self.force { RenameFlags::empty() } else { RenameFlags::NOREPLACE };
        let cwd = rustix::fs::CWD;
        match rustix::fs::renameat_with(cwd, &self.partial, cwd, &self.path, flags) {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST) => return Err(exists(&self.path)),
            // the file system cannot rename without replacing: that nobody made the file was checked at the start
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
                std::fs::rename(&self.partial, &self.path)
                    .map_err(|source| Error::io("name", self.path.display(), source))?;
            }
            Err(errno) => return Err(Error::io("name", self.path.display(), errno.into())),
        }
        self.named = true;
        let parent = match self.path.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
            None => Path::new("/"),
        };
        File::open(parent)
            .and_then(|dir| dir.sync_all())
            .map_err(|source| Error::io("sync", parent.display(), source))
    }
}

impl Drop for PartialFile {
    fn drop(&mut self) {
        if !self.named {
            // nothing more can be done about a file that cannot be removed; its name says what it is
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

/// Writes a small file as a whole.
pub(super) fn write_small_file(path: &Path, bytes: &[u8], force: bool) -> Result<()> {
    if !force && path.exists() {
        return Err(exists(path));
    }
    let partial = PartialFile::new(path, force)?;
    let mut file = partial.create()?;
    file.write_all(bytes)
        .and_then(|()| file.sync_all())
        .map_err(|source| Error::io("write", path.display(), source))?;
    partial.name()
}

/// Calls `write` with the runs of blocks that are not zero.
fn for_nonzero_runs(
    offset: u64,
    bytes: &[u8],
    mut write: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let block = usize::try_from(BLOCK_LEN).unwrap_or(4096);
    let mut run = 0..0;
    for (number, part) in bytes.chunks(block).enumerate() {
        let start = number * block;
        if !is_zero(part) {
            if run.end != start {
                write(offset + run.start as u64, bytes.get(run).unwrap_or_default())?;
                run = start..start;
            }
            run.end = start + part.len();
        }
    }
    match bytes.get(run.clone()) {
        Some(last) if !last.is_empty() => write(offset + run.start as u64, last),
        _ => Ok(()),
    }
}

/// A block device: it holds something, so zeroes are written too.
struct BlockTarget {
    path: PathBuf,
    file: File,
}

impl BlockTarget {
    fn open(path: &Path, size: u64) -> Result<Self> {
        // exclusive: fails while the device is mounted or held by another
        let flags = i32::try_from(OFlags::EXCL.bits()).unwrap_or(0);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)
            .map_err(|source| Error::io("open", path.display(), source))?;
        let device_size = std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0))
            .map_err(|source| Error::io("find the size of", path.display(), source))?;
        if device_size < size {
            return Err(Error::Refused {
                object: path.display().to_string(),
                reason: format!("it has {device_size} bytes, the disk has {size}"),
                hint: None,
            });
        }
        Ok(Self { path: path.to_path_buf(), file })
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all_at(bytes, offset)
            .map_err(|source| Error::io("write", self.path.display(), source))
    }

    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        let zeroes = vec![0; ZERO_BUFFER_LEN];
        let mut position = range.start();
        while position < range.end() {
            let len = usize::try_from(range.end() - position).unwrap_or(usize::MAX).min(ZERO_BUFFER_LEN);
            self.write_at(position, zeroes.get(..len).unwrap_or_default())?;
            position += len as u64;
        }
        Ok(())
    }
}

impl Sink for BlockTarget {
    fn write(&self, contents: Vec<DiskBytes>) -> Result<()> {
        contents.iter().try_for_each(|content| self.write_at(content.offset, &content.bytes))
    }

    fn zero(&self, range: ByteRange) -> Result<()> {
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, flags, range.start(), range.len()) {
            Ok(()) => Ok(()),
            // not every device can, and none can for a part of a sector
            Err(_) => self.write_zeroes(range),
        }
    }
}

impl DiskTarget for BlockTarget {
    fn finish(self: Box<Self>, _monitor: &dyn Monitor) -> Result<()> {
        self.file.sync_all().map_err(|source| Error::io("sync", self.path.display(), source))
    }
}

/// A new qcow2 image, written by a `qemu-nbd` over NBD: what is not written stays unallocated.
struct Qcow2Target {
    partial: PartialFile,
    connection: Mutex<Connection>,
    server: QemuNbd,
}

impl Qcow2Target {
    fn create(path: &Path, size: u64, force: bool, monitor: &dyn Monitor) -> Result<Self> {
        let partial = PartialFile::new(path, force)?;
        qemu_nbd::create_qcow2(&partial.partial, size)?;
        let server = QemuNbd::writable(&partial.partial, "qcow2", monitor)?;
        let connection = Mutex::new(server.connect(&[], monitor)?);
        Ok(Self { partial, connection, server })
    }

    fn connection(&self) -> Result<std::sync::MutexGuard<'_, Connection>> {
        self.connection.lock().map_err(|_| Error::Cancelled)
    }
}

impl Sink for Qcow2Target {
    fn write(&self, contents: Vec<DiskBytes>) -> Result<()> {
        let monitor = crate::monitor::Recorder::new();
        let mut connection = self.connection()?;
        contents.iter().try_for_each(|content| {
            for_nonzero_runs(content.offset, &content.bytes, |offset, run| {
                connection.write(offset, run, &monitor)
            })
        })
    }

    fn zero(&self, _range: ByteRange) -> Result<()> {
        Ok(())
    }
}

impl DiskTarget for Qcow2Target {
    fn finish(self: Box<Self>, monitor: &dyn Monitor) -> Result<()> {
        let Self { partial, connection, server } = *self;
        let mut connection = connection.into_inner().map_err(|_| Error::Cancelled)?;
        connection.flush(monitor)?;
        connection.disconnect(monitor)?;
        server.stop()?;
        let path = partial.partial.clone();
        File::open(&path)
            .and_then(|file| file.sync_all())
            .map_err(|source| Error::io("sync", path.display(), source))?;
        partial.name()
    }
}

//! Image files and block devices: raw ones read directly, qcow2 through `qemu-nbd`.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::ahead::read_in_order;
use super::nbd::NbdDisk;
use super::qemu_nbd::QemuNbd;
use super::{DiskSource, Payload};
use crate::error::{Error, Result};
use crate::extent::{ByteRange, RangeSet};
use crate::monitor::Monitor;

/// Bytes of a qcow2 header that are looked at, and where the offset of the backing file's name and the features
/// stand that a reader has to know (QEMU's docs/interop/qcow2.rst).
const QCOW2_HEADER_LEN: u64 = 80;
const QCOW2_BACKING_FILE: usize = 8;
const QCOW2_FEATURES: usize = 72;
/// The content is in another file.
const QCOW2_EXTERNAL_DATA: u64 = 1 << 2;

/// Format of an image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageFileFormat {
    Raw,
    Qcow2,
}

impl ImageFileFormat {
    /// Returns the name that QEMU gives it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

fn refused(path: &Path, reason: &str) -> Error {
    Error::Refused { object: path.display().to_string(), reason: reason.into(), hint: None }
}

fn open(path: &Path) -> Result<File> {
    // not blocking: a pipe is refused below, and must not hang us here
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
    OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .map_err(|error| Error::io("open", path.display(), error))
}

/// Looks at the first bytes of a file: qcow2, or else raw.
///
/// A guest writes the first bytes of its raw disk as it likes, and a qcow2 header can name any file of the host as
/// its backing file. So a format that was only guessed never leads to another file.
///
/// # Errors
/// [`Error::Io`]; [`Error::Refused`] for a qcow2 header that names another file.
pub fn detect_format(path: &Path) -> Result<ImageFileFormat> {
    let mut header = Vec::new();
    open(path)?
        .take(QCOW2_HEADER_LEN)
        .read_to_end(&mut header)
        .map_err(|error| Error::io("read", path.display(), error))?;
    if !header.starts_with(b"QFI\xfb") {
        return Ok(ImageFileFormat::Raw);
    }
    let number = |at: usize| {
        let bytes = header.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.map(u64::from_be_bytes)
    };
    // a header of version 2 ends before the features
    let features = if header.get(4..8) == Some(&[0, 0, 0, 2]) { Some(0) } else { number(QCOW2_FEATURES) };
    match (number(QCOW2_BACKING_FILE), features) {
        (Some(0), Some(features)) if features & QCOW2_EXTERNAL_DATA == 0 => Ok(ImageFileFormat::Qcow2),
        (Some(_), Some(_)) => Err(Error::Refused {
            object: path.display().to_string(),
            reason: "it seems to be a qcow2 image that refers to another file; if this is a raw disk, \
                     its guest may have written that"
                .into(),
            hint: Some("say which it is with --image-format".into()),
        }),
        _ => Err(refused(path, "it begins like a qcow2 image and ends in the header; see --image-format")),
    }
}

/// Opens an image file.
///
/// # Errors
/// [`Error::Io`]; [`Error::Refused`] for what is no regular file; [`Error::Command`] with what `qemu-nbd` says.
pub fn open_image(
    path: &Path,
    format: ImageFileFormat,
    monitor: &dyn Monitor,
) -> Result<Box<dyn DiskSource>> {
    let file = open(path)?;
    let found = file.metadata().map_err(|error| Error::io("look at", path.display(), error))?;
    if !found.is_file() {
        return Err(refused(path, "it is no regular file"));
    }
    if format == ImageFileFormat::Qcow2 {
        let server = QemuNbd::readable(path, format.as_str(), &[], monitor)?;
        let label = path.display().to_string();
        let disk = NbdDisk::open(&server.address(), server.export(), None, label, monitor)?;
        return Ok(Box::new(ServedImage { disk, _server: server }));
    }
    Ok(Box::new(ImageFile { path: path.to_path_buf(), file, size: found.len(), has_holes: true }))
}

/// Opens a block device.
///
/// # Errors
/// [`Error::Io`]; [`Error::Refused`] for what is no block device.
pub fn open_block(path: &Path) -> Result<Box<dyn DiskSource>> {
    let mut file = open(path)?;
    let found = file.metadata().map_err(|error| Error::io("look at", path.display(), error))?;
    if !found.file_type().is_block_device() {
        return Err(refused(path, "it is no block device"));
    }
    let size =
        file.seek(SeekFrom::End(0)).map_err(|error| Error::io("find the size of", path.display(), error))?;
    Ok(Box::new(ImageFile { path: path.to_path_buf(), file, size, has_holes: false }))
}

/// A raw image.
struct ImageFile {
    path: PathBuf,
    file: File,
    size: u64,
    has_holes: bool,
}

impl DiskSource for ImageFile {
    fn label(&self) -> String {
        self.path.display().to_string()
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn dirty(&mut self, _monitor: &dyn Monitor) -> Result<Option<RangeSet>> {
        Ok(None)
    }

    fn data(&mut self, within: &RangeSet, monitor: &dyn Monitor) -> Result<RangeSet> {
        if !self.has_holes {
            return Ok(within.clone());
        }
        let mut data = RangeSet::new();
        let mut position = 0;
        while position < self.size {
            monitor.check()?;
            let start = match rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Data(position)) {
                Ok(start) => start,
                Err(Errno::NXIO) => break,
                Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(within.clone()),
                Err(errno) => return Err(Error::io("find the data of", self.path.display(), errno.into())),
            };
            let end = rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Hole(start))
                .map_err(|errno| Error::io("find the holes of", self.path.display(), errno.into()))?;
            if let Some(range) = ByteRange::between(start.min(self.size), end.min(self.size)) {
                data.push(range);
            }
            position = end.max(position + 1);
        }
        Ok(data.intersection(within))
    }

    fn read(
        &mut self,
        ranges: &RangeSet,
        monitor: &dyn Monitor,
        sink: &mut dyn FnMut(ByteRange, Payload) -> Result<()>,
    ) -> Result<()> {
        read_in_order(&self.file, &self.path, ranges, monitor, sink)
    }
}

/// An image with its server: the connection is closed before the server is ended.
struct ServedImage {
    disk: NbdDisk,
    _server: QemuNbd,
}

impl DiskSource for ServedImage {
    fn label(&self) -> String {
        self.disk.label()
    }

    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn dirty(&mut self, monitor: &dyn Monitor) -> Result<Option<RangeSet>> {
        self.disk.dirty(monitor)
    }

    fn data(&mut self, within: &RangeSet, monitor: &dyn Monitor) -> Result<RangeSet> {
        self.disk.data(within, monitor)
    }

    fn read(
        &mut self,
        ranges: &RangeSet,
        monitor: &dyn Monitor,
        sink: &mut dyn FnMut(ByteRange, Payload) -> Result<()>,
    ) -> Result<()> {
        self.disk.read(ranges, monitor, sink)
    }
}

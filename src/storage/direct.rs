//! Writing a large file around the page cache. Nobody reads a pack soon after it was written: in the cache it would only
//! push out what the host's guests use, and on a host whose memory is full making room for it costs more than the write.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Result};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;

pub use crate::buffer::ALIGN;
use crate::buffer::{Buffer, to_aligned};

/// Bytes in one write.
const PIECE_LEN: usize = 1 << 20;
/// Shorter files are not worth the calls. Bytes.
const MIN_LEN: usize = 1 << 20;

/// Opens a file for writing around the page cache; `None` where the file system cannot.
pub fn open_direct(path: &Path) -> Option<File> {
    let flags = i32::try_from(OFlags::DIRECT.bits()).ok()?;
    OpenOptions::new().write(true).custom_flags(flags).open(path).ok()
}

/// Returns true for the error of a disk that wants another alignment, or of a file system that takes the flag and no such
/// write.
pub fn is_refusal(error: &std::io::Error) -> bool {
    error.kind() == ErrorKind::InvalidInput
}

/// Writes `bytes` to the new and empty `file` at `path`. Not durable before the file is synced.
///
/// # Errors
/// Those of the file system; a part may have been written.
pub(super) fn write_new(file: &File, path: &Path, bytes: &[u8]) -> Result<()> {
    let blocks = bytes.len() / ALIGN * ALIGN;
    let direct = if bytes.len() < MIN_LEN { None } else { open_direct(path) };
    let Some(direct) = direct else { return file.write_all_at(bytes, 0) };
    let room = rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes.len() as u64);
    // any other refusal only means more extents than one
    if let Err(errno @ (Errno::NOSPC | Errno::DQUOT)) = room {
        return Err(errno.into());
    }
    let is_aligned = to_aligned(bytes) == 0;
    // packs are; what is not goes through memory that is
    let mut memory = Buffer::with_room(if is_aligned { 0 } else { PIECE_LEN });
    let mut done = 0;
    for piece in bytes.get(..blocks).unwrap_or_default().chunks(PIECE_LEN) {
        let aligned = if is_aligned {
            piece
        } else {
            memory.truncate(0);
            memory.extend(piece);
            &memory
        };
        match direct.write_all_at(aligned, done as u64) {
            Ok(()) => done += piece.len(),
            Err(error) if is_refusal(&error) => break,
            Err(error) => return Err(error),
        }
    }
    file.write_all_at(bytes.get(done..).unwrap_or_default(), done as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_length_arrives_whole() {
        let here = tempfile::tempdir().unwrap();
        let memory = tempfile::tempdir_in("/dev/shm").ok();
        for dir in [Some(&here), memory.as_ref()].into_iter().flatten() {
            for len in
                [0, 1, 4096, MIN_LEN - 1, MIN_LEN, MIN_LEN + 1, 3 * PIECE_LEN + 4096, 3 * PIECE_LEN + 4099]
            {
                let bytes: Vec<u8> = (0..len).map(|at| (at / 7 % 251) as u8).collect();
                let (mut aligned, mut moved) = (Buffer::with_room(len), Buffer::with_room(len + 1));
                aligned.extend(&bytes);
                moved.extend(&[0]);
                moved.extend(&bytes);
                for (name, bytes) in [("aligned", &*aligned), ("moved", &moved[1..])] {
                    let path = dir.path().join(format!("{len}-{name}"));
                    write_new(&File::create_new(&path).unwrap(), &path, bytes).unwrap();
                    assert!(std::fs::read(&path).unwrap() == bytes, "{len} bytes, {name}");
                }
            }
        }
    }
}

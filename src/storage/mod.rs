//! Where named objects are kept durably.
//!
//! One narrow trait; its contract is in the comments, and one suite of tests holds each storage to it.

pub mod direct;
#[cfg(test)]
pub(crate) mod fault;
#[cfg(test)]
pub(crate) mod hooked;
pub mod local;
pub mod memory;
pub mod overlay;
#[cfg(test)]
mod tests;

use std::fmt;
use std::path::PathBuf;

use crate::error::{Error, FormatFault, Result};
use crate::format::name::{Folder, ObjectName};

/// An object met in a listing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Listed {
    pub name: ObjectName,
    /// Length, bytes.
    pub len: u64,
}

/// Threads that look at many objects at once: more of them would only wait for one another, and each may hold an object.
const MAX_THREADS: usize = 4;
/// For fewer objects no thread is begun.
const MIN_PART: usize = 64;

/// Works on many objects on a few threads of its own, and returns what `work` gave for the parts in the order of `items`.
/// Not on the threads that everybody shares: they may wait for a lock that the caller holds.
///
/// # Errors
/// One of those of `work`.
pub(crate) fn in_threads<T: Sync, U: Send>(
    items: &[T],
    work: impl Fn(&[T]) -> Result<Vec<U>> + Sync,
) -> Result<Vec<U>> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let part = items.len().div_ceil(cores.min(MAX_THREADS)).max(MIN_PART);
    if items.len() <= part {
        return work(items);
    }
    std::thread::scope(|scope| {
        let threads: Vec<_> = items.chunks(part).map(|part| scope.spawn(|| work(part))).collect();
        let mut all = Vec::new();
        for thread in threads {
            all.extend(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(all)
    })
}

/// A file in which a program that was killed had begun to write an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    pub name: String,
    /// Bytes.
    pub len: u64,
}

/// A place for objects that are created once and never change.
pub trait Storage: Send + Sync + fmt::Debug {
    /// Returns where this is, for people: a path or URL.
    fn url(&self) -> String;

    /// Creates an object. Atomic: nobody sees a part of it. Durable when it returns.
    ///
    /// # Errors
    /// [`Error::Exists`] if the name is taken (the object there is unchanged);
    /// else the object was not written, or, after a failed sync, may or may not be there, and must
    /// be written again under another name.
    fn put_new(&self, name: ObjectName, bytes: &[u8]) -> Result<()>;

    /// Makes an object of random bytes without meaning at least `len` bytes long, and puts it where there is none. The seed
    /// decides the bytes: not compressible, so that a file system that compresses or deduplicates keeps them at their length.
    ///
    /// Unless a storage does better, at most 64 MiB, all of them in memory.
    ///
    /// # Errors
    /// As [`Storage::put_new`]; then the object is as long as it was, if there is room for that.
    fn put_filler(&self, name: ObjectName, len: u64, seed: [u8; 32]) -> Result<()> {
        let len = len.min(64 << 20);
        let put = |len: u64| {
            let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
            blake3::Hasher::new_keyed(&seed).finalize_xof().fill(&mut bytes);
            self.put_new(name, &bytes)
        };
        match self.len(name) {
            Ok(found) if found >= len => Ok(()),
            Ok(found) => {
                self.delete(name)?;
                put(len).inspect_err(|_| drop(put(found)))
            }
            Err(Error::NotFound { .. }) => put(len),
            Err(error) => Err(error),
        }
    }

    /// Returns how many objects are put fastest at once: one waits for its sync while another is written.
    fn puts_at_once(&self) -> usize {
        1
    }

    /// Replaces an object: atomic, not durable. For heartbeats, and for outcomes that cannot be read.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn replace(&self, name: ObjectName, bytes: &[u8]) -> Result<()>;

    /// Returns a whole object of at most `max_len` bytes.
    ///
    /// # Errors
    /// [`Error::NotFound`];
    /// [`Error::Malformed`] if it is longer.
    fn get(&self, name: ObjectName, max_len: u64) -> Result<Vec<u8>>;

    /// As [`Storage::get`], into memory that is used again; what it held is gone.
    ///
    /// # Errors
    /// As [`Storage::get`].
    fn get_into(&self, name: ObjectName, max_len: u64, bytes: &mut Vec<u8>) -> Result<()> {
        *bytes = self.get(name, max_len)?;
        Ok(())
    }

    /// Says that a part of an object will be read soon. A hint: nothing waits for it, and it cannot fail.
    fn prefetch(&self, _name: ObjectName, _offset: u64, _len: u64) {}

    /// Returns exactly `len` bytes from `offset`; the caller bounds `len`.
    ///
    /// # Errors
    /// [`Error::NotFound`];
    /// [`Error::Malformed`] (truncated) if the object ends before.
    fn get_range(&self, name: ObjectName, offset: u64, len: u64) -> Result<Vec<u8>>;

    /// As [`Storage::get_range`], into memory that is there: all of `bytes` is filled, or it holds anything.
    ///
    /// # Errors
    /// As [`Storage::get_range`].
    fn get_range_into(&self, name: ObjectName, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let found = self.get_range(name, offset, bytes.len() as u64)?;
        let (found_len, needed) = (found.len() as u64, bytes.len() as u64);
        if found_len != needed {
            let fault = FormatFault::Truncated { found: offset + found_len, needed: offset + needed };
            return Err(Error::malformed(name, fault));
        }
        bytes.copy_from_slice(&found);
        Ok(())
    }

    /// Returns an object's length, bytes.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    fn len(&self, name: ObjectName) -> Result<u64>;

    /// Returns every object of a folder whose `put_new` returned before the call, in order of their names.
    /// Files that are no objects are left out. A folder that does not exist is an error: it is not empty.
    ///
    /// # Errors
    /// [`Error::Io`]: a failed or truncated listing is never a short one.
    fn list(&self, folder: Folder) -> Result<Vec<Listed>>;

    /// As [`Storage::list`], without the lengths, which may take most of the time.
    ///
    /// # Errors
    /// Those of [`Storage::list`].
    fn names(&self, folder: Folder) -> Result<Vec<ObjectName>> {
        Ok(self.list(folder)?.into_iter().map(|listed| listed.name).collect())
    }

    /// Deletes an object; one that is not there is no error. Durable after [`Storage::sync_deletes`].
    ///
    /// # Errors
    /// [`Error::Io`].
    fn delete(&self, name: ObjectName) -> Result<()>;

    /// Makes the deletes of a folder durable, before the next phase begins.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn sync_deletes(&self, folder: Folder) -> Result<()>;

    /// Returns what is unfinished, by whomever: it may still be written.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn leftovers(&self) -> Result<Vec<Leftover>> {
        Ok(Vec::new())
    }

    /// Removes unfinished files; one that has got its name meanwhile stays.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn remove_leftovers(&self, _leftovers: &[Leftover]) -> Result<()> {
        Ok(())
    }
}

/// Returns the path that a URL names: a plain path or `file:///path`.
///
/// # Errors
/// [`Error::Usage`] for a URL of a kind that this program does not know.
fn local_path(url: &str) -> Result<PathBuf> {
    if url.is_empty() {
        return Err(Error::Usage("the name of the repository is empty".into()));
    }
    if let Some(path) = url.strip_prefix("file://") {
        if !path.starts_with('/') {
            return Err(Error::Usage(format!("{url} names a host; only file:///PATH is a local repository")));
        }
        return Ok(PathBuf::from(path));
    }
    // a path may hold a colon; what looks like a scheme may not be taken for a directory's name
    let scheme = url.split_once(':').map(|(scheme, _)| scheme);
    match scheme {
        Some(
            scheme @ ("s3" | "gs" | "azure" | "sftp" | "http" | "https" | "rest" | "rclone" | "b2" | "swift"),
        ) => Err(Error::Usage(format!(
            "{url}: storage of kind {scheme} is not supported; use a local directory"
        ))),
        _ => Ok(PathBuf::from(url)),
    }
}

/// Opens the storage that a URL names.
///
/// # Errors
/// [`Error::Usage`] for a URL of an unknown kind; [`Error::NoRepository`] where there is no directory.
pub fn open_url(url: &str) -> Result<Box<dyn Storage>> {
    Ok(Box::new(local::LocalStorage::open(&local_path(url)?)?))
}

/// Makes an empty storage where a URL says.
///
/// # Errors
/// [`Error::Usage`] for a URL of an unknown kind; [`Error::Exists`] or [`Error::Refused`] where there is something already.
pub fn create_url(url: &str) -> Result<Box<dyn Storage>> {
    Ok(Box::new(local::LocalStorage::create(&local_path(url)?)?))
}

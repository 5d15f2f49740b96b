//! A directory as storage.
//!
//! An object is written to a temporary file in `tmp/`, synced, and then given its name by a rename that fails
//! if the name is taken; then the directory is synced. After a crash an object is there as a whole or not at all,
//! and one whose `put_new` returned is there.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::num::NonZeroU64;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::buffer::spare_capacity;
use rustix::fs::{Advice, AtFlags, CWD, FileType, Mode, OFlags, RawDir, RenameFlags};
use rustix::io::Errno;

use super::{Leftover, Listed, Storage, direct, in_threads};
use crate::error::{Error, FormatFault, Result};
use crate::format::name::{Folder, ObjectName};

/// Where files live that have no name yet.
const TEMPORARY: &str = "tmp";

/// Bytes of a filler that are in memory.
const FILLER_PART_LEN: usize = 1 << 20;

/// Bytes of a directory that are read at once.
const LISTING_LEN: usize = 128 << 10;

/// How often an object is written again whose file was removed before it had its name.
const MAX_TRIES: u32 = 3;

/// Distinguishes the temporary files of one process.
static NEXT_TEMPORARY: AtomicU64 = AtomicU64::new(0);

/// Objects as files below one directory.
#[derive(Debug)]
pub struct LocalStorage {
    root: PathBuf,
}

/// A file that is removed unless it was given a name.
struct Temporary {
    path: PathBuf,
    keep: bool,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.keep {
            // one left over takes space and does no harm: no listing shows it
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn sync_directory(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(|source| Error::io("sync", path.display(), source))
}

fn make_directory(path: &Path) -> Result<()> {
    match std::fs::DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(error) => Err(Error::io("create", path.display(), error)),
    }
}

impl LocalStorage {
    /// Opens a directory; whether it holds a repository is not looked at.
    ///
    /// # Errors
    /// [`Error::NoRepository`] if there is no such directory; [`Error::Io`].
    pub fn open(root: &Path) -> Result<Self> {
        match std::fs::metadata(root) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => return Err(Error::NoRepository { url: root.display().to_string() }),
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Err(Error::NoRepository { url: root.display().to_string() });
            }
            Err(error) => return Err(Error::io("open", root.display(), error)),
        }
        // absolute: the process may change its directory
        let root = std::path::absolute(root)
            .map_err(|error| Error::io("find the path of", root.display(), error))?;
        Ok(Self { root })
    }

    /// Makes a directory with its folders, durably. It may exist if nothing is in it but the folders of an
    /// attempt that was cut short.
    ///
    /// # Errors
    /// [`Error::Exists`] if a repository is there; [`Error::Refused`] if anything else is; [`Error::Io`].
    pub fn create(root: &Path) -> Result<Self> {
        std::fs::create_dir_all(root).map_err(|error| Error::io("create", root.display(), error))?;
        let storage = Self::open(root)?;
        let mut missing: Vec<&str> = Folder::ALL.iter().map(|folder| folder.as_str()).collect();
        missing.push(TEMPORARY);
        let entries = std::fs::read_dir(root).map_err(|error| Error::io("list", root.display(), error))?;
        for entry in entries {
            let entry = entry.map_err(|error| Error::io("list", root.display(), error))?;
            let name = entry.file_name();
            if name == "config" || name == "config.copy" {
                return Err(Error::Exists { object: format!("the repository {}", root.display()) });
            }
            if name != "reserve" && name != "lost+found" && missing.iter().all(|folder| name != *folder) {
                return Err(Error::Refused {
                    object: root.display().to_string(),
                    reason: format!("it is not empty: there is {}", name.display()),
                    hint: Some("name a directory of its own for the repository".into()),
                });
            }
        }
        for folder in missing {
            make_directory(&storage.root.join(folder))?;
        }
        sync_directory(&storage.root)?;
        if let Some(parent) = storage.root.parent() {
            sync_directory(parent)?;
        }
        Ok(storage)
    }

    fn path(&self, name: ObjectName) -> PathBuf {
        self.root.join(name.to_string())
    }

    fn object(&self, name: ObjectName) -> String {
        format!("{name} in {}", self.root.display())
    }

    /// Writes a file without a name, and syncs it.
    fn write_temporary(&self, name: ObjectName, write: &WriteFile<'_>, sync: bool) -> Result<Temporary> {
        let number = NEXT_TEMPORARY.fetch_add(1, Ordering::Relaxed);
        let unique: [u8; 8] = {
            let mut unique = [0; 8];
            getrandom::fill(&mut unique).map_err(|error| {
                Error::io("draw", "random bytes", std::io::Error::other(error.to_string()))
            })?;
            unique
        };
        let file_name = format!("{:016x}.{number}", u64::from_le_bytes(unique));
        let path = self.root.join(TEMPORARY).join(file_name);
        let failed = |error| Error::io("write", self.object(name), error);
        let open = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let file = match open() {
            Err(error) if error.kind() == ErrorKind::NotFound && self.root.is_dir() => {
                // a copy of a repository made without its empty folders
                make_directory(&self.root.join(TEMPORARY))?;
                open()
            }
            other => other,
        }
        .map_err(failed)?;
        let temporary = Temporary { path: path.clone(), keep: false };
        write(&file, &path).map_err(failed)?;
        if sync {
            // not again after a failure: the kernel may have dropped the pages that it could not write
            file.sync_all().map_err(|error| Error::io("sync", self.object(name), error))?;
        }
        Ok(temporary)
    }

    /// Creates an object of what `write` puts into a file.
    fn put_with(&self, name: ObjectName, write: &WriteFile<'_>) -> Result<()> {
        let path = self.path(name);
        let directory = self.directory(name, &path)?;
        let mut tries = 0..MAX_TRIES;
        loop {
            let mut temporary = self.write_temporary(name, write, true)?;
            let error = match name_new(&mut temporary, &path) {
                Ok(true) => return sync_directory(&directory),
                Ok(false) => return Err(Error::Exists { object: self.object(name) }),
                Err(error) => error,
            };
            // a prune took this program for dead and removed the file; its outcome will say so if it is
            let is_removed = error.kind() == ErrorKind::NotFound && !temporary.path.exists();
            if !is_removed || tries.next().is_none() {
                return Err(Error::io("create", self.object(name), error));
            }
        }
    }

    /// Returns the directory of an object, made if it is a folder that exists on demand.
    fn directory(&self, name: ObjectName, path: &Path) -> Result<PathBuf> {
        let parent = path.parent().unwrap_or(&self.root).to_path_buf();
        if matches!(name, ObjectName::Pack(_)) && !parent.is_dir() {
            make_directory(&parent)?;
            sync_directory(&self.root.join(Folder::Packs.as_str()))?;
        }
        Ok(parent)
    }

    fn open_object(&self, name: ObjectName) -> Result<(File, u64)> {
        // not blocking: a pipe in an object's place must not hang us
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
        let opened = OpenOptions::new().read(true).custom_flags(flags).open(self.path(name));
        let file = match opened {
            Ok(file) => file,
            // a file in the place of a directory holds no object
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Err(Error::NotFound { object: self.object(name) });
            }
            Err(error) => return Err(Error::io("open", self.object(name), error)),
        };
        let found = file.metadata().map_err(|error| Error::io("look at", self.object(name), error))?;
        if !found.is_file() {
            return Err(Error::malformed(
                self.object(name),
                FormatFault::Invalid { what: "the object", found: "no regular file".into() },
            ));
        }
        Ok((file, found.len()))
    }

    /// Opens an object that has `len` bytes from `offset` on.
    fn open_range(&self, name: ObjectName, offset: u64, len: u64) -> Result<File> {
        let (file, found) = self.open_object(name)?;
        let needed = offset.saturating_add(len);
        if needed > found { Err(self.cut_off(name, found, needed)) } else { Ok(file) }
    }

    fn cut_off(&self, name: ObjectName, found: u64, needed: u64) -> Error {
        Error::malformed(self.object(name), FormatFault::Truncated { found, needed })
    }

    /// Returns the objects of a folder's directory. Their lengths are found out only if `with_len`: looking at each takes
    /// longer than listing them all.
    fn list_directory(&self, path: &Path, with_len: bool) -> Result<Vec<Listed>> {
        let mut listed = Vec::new();
        let failed = |errno: Errno| Error::io("list", path.display(), errno.into());
        let Some(folder) = path.strip_prefix(&self.root).ok().and_then(Path::to_str) else {
            return Ok(listed);
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(path, flags, Mode::empty()).map_err(failed)?;
        let mut memory = Vec::with_capacity(LISTING_LEN);
        let mut entries = RawDir::new(&directory, memory.spare_capacity_mut());
        let mut object = format!("{folder}/");
        let folder_len = object.len();
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(failed)?;
            object.truncate(folder_len);
            object.push_str(entry.file_name().to_str().unwrap_or_default());
            let Some(name) = ObjectName::parse(&object) else { continue };
            if entry.file_type() == FileType::RegularFile && !with_len {
                listed.push(Listed { name, len: 0 });
                continue;
            }
            match rustix::fs::statat(&directory, entry.file_name(), AtFlags::empty()) {
                Ok(found) if FileType::from_raw_mode(found.st_mode).is_file() => {
                    listed.push(Listed { name, len: found.st_size.try_into().unwrap_or_default() });
                }
                Ok(_) => {}
                // deleted since the directory was read
                Err(Errno::NOENT) => {}
                Err(errno) => return Err(Error::io("look at", self.path(name).display(), errno.into())),
            }
        }
        Ok(listed)
    }

    fn list_folder(&self, folder: Folder, with_len: bool) -> Result<Vec<Listed>> {
        let mut listed = match folder {
            Folder::Packs => {
                let list = |directory: &PathBuf| self.list_directory(directory, with_len);
                in_threads(&self.pack_directories()?, |directories| {
                    let lists: Vec<Vec<Listed>> = directories.iter().map(list).collect::<Result<_>>()?;
                    Ok(lists.concat())
                })?
            }
            _ => self.list_directory(&self.root.join(folder.as_str()), with_len)?,
        };
        listed.sort_unstable();
        // a directory that changes meanwhile may name one twice
        listed.dedup_by_key(|listed| listed.name);
        Ok(listed)
    }

    /// Returns the directories below `packs/` that hold packs.
    fn pack_directories(&self) -> Result<Vec<PathBuf>> {
        let packs = self.root.join(Folder::Packs.as_str());
        let failed = |error| Error::io("list", packs.display(), error);
        let mut directories = Vec::new();
        for entry in std::fs::read_dir(&packs).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            // one that cannot be looked at is an error: its packs would be missing from the listing
            let found =
                std::fs::metadata(&path).map_err(|error| Error::io("look at", path.display(), error))?;
            if found.is_dir() {
                directories.push(path);
            }
        }
        Ok(directories)
    }
}

/// Gives a file its name unless the name is taken; returns false if it is.
fn name_new(temporary: &mut Temporary, path: &Path) -> std::io::Result<bool> {
    match rustix::fs::renameat_with(CWD, &temporary.path, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => {
            temporary.keep = true;
            return Ok(true);
        }
        Err(Errno::EXIST) => return Ok(false),
        // NFS and some FUSE file systems
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        Err(errno) => return Err(errno.into()),
    }
    match std::fs::hard_link(&temporary.path, path) {
        // the temporary name goes when `temporary` does
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// Reads at most `len` bytes from `offset` in place of what `bytes` held, fewer where the file ends. Returns how many.
fn read_up_to(file: &File, offset: u64, len: u64, bytes: &mut Vec<u8>) -> std::io::Result<u64> {
    bytes.clear();
    let wanted = usize::try_from(len).unwrap_or(usize::MAX);
    bytes.reserve_exact(wanted);
    while bytes.len() < wanted {
        let position = offset + bytes.len() as u64;
        // new memory need not be filled with zeroes before
        match rustix::io::pread(file, spare_capacity(bytes), position) {
            Ok(0) => break,
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    // memory that is used again may have more room
    bytes.truncate(wanted);
    Ok(bytes.len() as u64)
}

fn is_hexadecimal(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Writes a new file of the given path.
type WriteFile<'a> = dyn Fn(&File, &Path) -> std::io::Result<()> + 'a;

/// Appends bytes that a seed decides until the file has so many, and syncs it; if that fails it is as long as before. Nothing
/// is written unless there is room for twice as much: others write too.
fn grow_filler(file: &File, len: u64, seed: [u8; 32]) -> std::io::Result<()> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(ErrorKind::InvalidInput.into());
    }
    let found = metadata.len();
    let Some(missing) = len.checked_sub(found).filter(|missing| *missing > 0) else { return Ok(()) };
    let space = rustix::fs::fstatvfs(file)?;
    if found > 0 && space.f_bavail.saturating_mul(space.f_frsize) / 2 < missing {
        return Err(ErrorKind::StorageFull.into());
    }
    let grow = || {
        let mut bytes = blake3::Hasher::new_keyed(&seed).finalize_xof();
        let mut part = vec![0; FILLER_PART_LEN];
        let mut position = found;
        while position < len {
            let part_len = usize::try_from(len - position).unwrap_or(usize::MAX).min(part.len());
            let part = part.get_mut(..part_len).unwrap_or_default();
            bytes.fill(part);
            file.write_all_at(part, position)?;
            position += part_len as u64;
        }
        file.sync_all()
    };
    grow().inspect_err(|_| drop(file.set_len(found)))
}

impl Storage for LocalStorage {
    fn url(&self) -> String {
        self.root.display().to_string()
    }

    fn put_new(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        self.put_with(name, &|file, path| direct::write_new(file, path, bytes))
    }

    fn put_filler(&self, name: ObjectName, len: u64, seed: [u8; 32]) -> Result<()> {
        let path = self.path(name);
        // neither through a link to another file, nor waiting for somebody at a pipe
        let flags = i32::try_from((OFlags::NONBLOCK | OFlags::NOFOLLOW).bits()).unwrap_or(0);
        let open = || OpenOptions::new().write(true).custom_flags(flags).open(&path);
        let file = match open() {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let first_len = len.min(FILLER_PART_LEN as u64);
                self.put_with(name, &|file, _| grow_filler(file, first_len, seed))?;
                open()
            }
            opened => opened,
        };
        // in its place: there is always one, and a program that is killed leaves no second one
        file.and_then(|file| grow_filler(&file, len, seed))
            .map_err(|error| Error::io("make room in", self.object(name), error))
    }

    fn puts_at_once(&self) -> usize {
        2
    }

    fn replace(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        let write = |file: &File, path: &Path| direct::write_new(file, path, bytes);
        let mut temporary = self.write_temporary(name, &write, false)?;
        std::fs::rename(&temporary.path, self.path(name))
            .map_err(|error| Error::io("replace", self.object(name), error))?;
        temporary.keep = true;
        Ok(())
    }

    fn get(&self, name: ObjectName, max_len: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.get_into(name, max_len, &mut bytes)?;
        Ok(bytes)
    }

    fn get_into(&self, name: ObjectName, max_len: u64, bytes: &mut Vec<u8>) -> Result<()> {
        let (file, len) = self.open_object(name)?;
        if len > max_len {
            let fault = FormatFault::TooLarge { what: "its length", found: len, max: max_len };
            return Err(Error::malformed(self.object(name), fault));
        }
        // objects do not grow: nothing is behind what it had when it was opened
        let found =
            read_up_to(&file, 0, len, bytes).map_err(|error| Error::io("read", self.object(name), error))?;
        if found != len {
            let fault = FormatFault::Truncated { found, needed: len };
            return Err(Error::malformed(self.object(name), fault));
        }
        Ok(())
    }

    fn prefetch(&self, name: ObjectName, offset: u64, len: u64) {
        // whoever reads it says what is wrong with it
        let Ok((file, _)) = self.open_object(name) else { return };
        let _ = rustix::fs::fadvise(&file, offset, NonZeroU64::new(len), Advice::WillNeed);
    }

    fn get_range(&self, name: ObjectName, offset: u64, len: u64) -> Result<Vec<u8>> {
        let file = self.open_range(name, offset, len)?;
        let mut bytes = Vec::new();
        let read = read_up_to(&file, offset, len, &mut bytes)
            .map_err(|error| Error::io("read", self.object(name), error))?;
        if read < len { Err(self.cut_off(name, offset + read, offset + len)) } else { Ok(bytes) }
    }

    fn get_range_into(&self, name: ObjectName, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let len = bytes.len() as u64;
        let file = self.open_range(name, offset, len)?;
        file.read_exact_at(bytes, offset).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => self.cut_off(name, offset, offset + len),
            _ => Error::io("read", self.object(name), error),
        })
    }

    fn len(&self, name: ObjectName) -> Result<u64> {
        self.open_object(name).map(|(_, len)| len)
    }

    fn list(&self, folder: Folder) -> Result<Vec<Listed>> {
        self.list_folder(folder, true)
    }

    fn names(&self, folder: Folder) -> Result<Vec<ObjectName>> {
        Ok(self.list_folder(folder, false)?.into_iter().map(|listed| listed.name).collect())
    }

    fn leftovers(&self) -> Result<Vec<Leftover>> {
        let path = self.root.join(TEMPORARY);
        let entries = match std::fs::read_dir(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|error| Error::io("list", path.display(), error))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| Error::io("list", path.display(), error))?;
            // what has got its name since the directory was read is not there any more; other files are not ours
            let is_ours = |name: &String| {
                name.split_once('.').is_some_and(|(unique, _)| unique.len() == 16 && is_hexadecimal(unique))
            };
            let name = entry.file_name().into_string().ok().filter(is_ours);
            if let (Some(name), Ok(data)) = (name, entry.metadata()) {
                found.push(Leftover { name, len: data.len() });
            }
        }
        Ok(found)
    }

    fn remove_leftovers(&self, leftovers: &[Leftover]) -> Result<()> {
        for left in leftovers {
            let path = self.root.join(TEMPORARY).join(&left.name);
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(Error::io("delete", path.display(), error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn delete(&self, name: ObjectName) -> Result<()> {
        match std::fs::remove_file(self.path(name)) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Error::io("delete", self.object(name), error)),
        }
    }

    fn sync_deletes(&self, folder: Folder) -> Result<()> {
        if folder == Folder::Packs {
            for directory in self.pack_directories()? {
                sync_directory(&directory)?;
            }
        }
        sync_directory(&self.root.join(folder.as_str()))
    }
}

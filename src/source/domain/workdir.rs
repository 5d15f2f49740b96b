//! The private directory of one backup job: its socket and its scratch files.
//!
//! The directory is locked while its owner lives. So whoever finds a job whose directory can be locked, or is
//! gone, knows that nobody reads from that job any more, whatever process ids and clocks say.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock, statvfs};

use crate::error::{Error, Result};

/// What the names of these directories begin with.
const PREFIX: &str = "vmkeep-job-";
/// What the name of one that is not locked yet begins with.
const NEW_PREFIX: &str = ".vmkeep-new-";
const SOCKET: &str = "nbd";
/// `sun_path` of a unix socket's address has 108 bytes, the last one is NUL.
const MAX_SOCKET_PATH: usize = 107;
/// Where they are made by default: on disk, and not behind QEMU's back as a private /tmp would be.
const DEFAULT_PARENT: &str = "/var/tmp";
/// Nobody but its owner lists it; everybody who knows a name may use it; only owners remove.
const MODE_FOR_UNKNOWN_QEMU: u32 = 0o1733;
const MODE_FOR_KNOWN_QEMU: u32 = 0o700;

/// A directory that is removed, with what is in it, when dropped.
#[derive(Debug)]
pub(super) struct WorkDir {
    path: PathBuf,
    // held as long as it is open; read by nobody but tests
    #[cfg_attr(not(test), allow(dead_code))]
    lock: File,
}

/// How old a directory that never got its name has to be until it is nobody's, seconds. Making one takes less than a
/// second.
const UNFINISHED_SECONDS: i64 = 3600;

/// What is known of a directory of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobDirState {
    /// The vmkeep that made it is at work.
    InUse,
    /// That vmkeep is gone, but something listens at the socket: its backup job goes on.
    Serving,
    /// Nobody needs it.
    Dead,
}

/// A directory that a backup job had for its socket and its scratch files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobDir {
    pub path: PathBuf,
    /// The first eight digits of the domain's UUID; empty if it never got that far.
    pub uuid_digits: String,
    /// What its files take.
    pub bytes: u64,
    pub state: JobDirState,
}

/// Returns the directories of jobs in `parent`; those that cannot be looked at are left out, and so are those that
/// are being made. `now` is in seconds since the epoch.
pub fn job_dirs(parent: &Path, now: i64) -> Vec<JobDir> {
    let Ok(entries) = fs::read_dir(parent) else { return Vec::new() };
    let mut found: Vec<JobDir> = entries.flatten().filter_map(|entry| job_dir(&entry.path(), now)).collect();
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn job_dir(path: &Path, now: i64) -> Option<JobDir> {
    let name = path.file_name()?.to_str()?;
    let metadata = fs::symlink_metadata(path).ok().filter(fs::Metadata::is_dir)?;
    let uuid_digits = match name.strip_prefix(PREFIX) {
        Some(rest) => rest.split('-').next().unwrap_or_default().to_owned(),
        None if !name.starts_with(NEW_PREFIX) => return None,
        None if now.saturating_sub(metadata.mtime()) < UNFINISHED_SECONDS => return None,
        None => String::new(),
    };
    let state = match try_lock(path) {
        Ok(None) => JobDirState::InUse,
        Ok(Some(_)) if listens(&path.join(SOCKET)) => JobDirState::Serving,
        Ok(Some(_)) => JobDirState::Dead,
        Err(_) => return None,
    };
    let files = fs::read_dir(path).into_iter().flatten().flatten();
    // what is taken, not how long it looks: scratch files are sparse
    let bytes = files.filter_map(|file| Some(file.metadata().ok()?.blocks().saturating_mul(512)));
    Some(JobDir { path: path.to_owned(), uuid_digits, bytes: bytes.fold(0, u64::saturating_add), state })
}

/// Returns false only if it is known that nobody listens there.
fn listens(socket: &Path) -> bool {
    let gone = [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused];
    match UnixStream::connect(socket) {
        Ok(_) => true,
        Err(error) => !gone.contains(&error.kind()),
    }
}

/// Removes a directory that [`job_dirs`] called dead, if it still is.
///
/// # Errors
/// [`Error::Busy`] if it is not; [`Error::Io`].
pub fn remove_job_dir(path: &Path) -> Result<()> {
    let busy = |why: &str| Error::Busy { object: path.display().to_string(), why: why.to_owned() };
    let _lock = match try_lock(path) {
        Ok(Some(lock)) => lock,
        Ok(None) => return Err(busy("a vmkeep is at work in it")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("lock", path.display(), error)),
    };
    if listens(&path.join(SOCKET)) {
        return Err(busy("something listens at its socket"));
    }
    fs::remove_dir_all(path).map_err(|error| Error::io("remove", path.display(), error))
}

/// Returns true if a directory of a job is one of the domain `uuid`.
pub fn belongs_to(directory: &JobDir, uuid: &str) -> bool {
    let digits: String = uuid.chars().filter(char::is_ascii_hexdigit).take(8).collect();
    !digits.is_empty() && directory.uuid_digits == digits
}

/// The place where scratch files are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScratchPlace {
    pub path: PathBuf,
    /// Bytes that may still be written there, or why that is not known.
    pub free: std::result::Result<u64, String>,
    /// How many bytes the path is too long for a unix socket.
    pub excess: usize,
}

/// Looks at the place where scratch files are made; `/var/tmp` by default.
pub fn scratch_place(scratch_dir: Option<&Path>) -> ScratchPlace {
    let parent = parent_of(scratch_dir);
    let path = std::path::absolute(parent).unwrap_or_else(|_| parent.to_owned());
    let free = statvfs(&path).map(|space| space.f_bavail.saturating_mul(space.f_frsize));
    let free = match fs::metadata(&path) {
        Ok(found) if !found.is_dir() => Err("it is no directory".to_owned()),
        _ => free.map_err(|error| io::Error::from(error).to_string()),
    };
    // PREFIX, eight digits, a dash, sixteen digits
    let name = PREFIX.len() + 8 + 1 + 16;
    let length = path.as_os_str().len() + 1 + name + 1 + SOCKET.len();
    ScratchPlace { path, free, excess: length.saturating_sub(MAX_SOCKET_PATH) }
}

/// Whose a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// Another program's.
    Foreign,
    /// A vmkeep's that is still there.
    Alive,
    /// A vmkeep's that is gone.
    Dead,
}

/// Returns the directory in which private ones are made.
pub(super) fn parent_of(scratch_dir: Option<&Path>) -> &Path {
    scratch_dir.unwrap_or(Path::new(DEFAULT_PARENT))
}

fn try_lock(directory: &Path) -> io::Result<Option<File>> {
    let file = File::open(directory)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Returns whose job it is that listens at `socket`.
pub(super) fn owner_of(socket: &Path) -> Owner {
    let Some(directory) = socket.parent() else { return Owner::Foreign };
    let named = |name: &OsStr| name.to_str().is_some_and(|name| name.starts_with(PREFIX));
    if socket.file_name() != Some(OsStr::new(SOCKET)) || !directory.file_name().is_some_and(named) {
        return Owner::Foreign;
    }
    match try_lock(directory) {
        Ok(Some(_)) => Owner::Dead,
        Ok(None) => Owner::Alive,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Owner::Dead,
        Err(_) => Owner::Alive,
    }
}

/// Removes the directory of a job that has ended and whose owner is dead.
pub(super) fn remove_dead(socket: &Path) {
    if owner_of(socket) == Owner::Dead
        && let Some(directory) = socket.parent()
    {
        // what cannot be removed does no harm but take space
        let _ = fs::remove_dir_all(directory);
    }
}

fn directory_prefix(uuid: &str) -> String {
    let digits: String = uuid.chars().filter(char::is_ascii_hexdigit).take(8).collect();
    format!("{PREFIX}{digits}-")
}

/// Removes what dead runs left of the domain `uuid`; call it only while the domain has no job.
pub(super) fn remove_stale(parent: &Path, uuid: &str) {
    let prefix = directory_prefix(uuid);
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        if entry.file_name().to_str().is_some_and(|name| name.starts_with(&prefix))
            && let Ok(Some(_lock)) = try_lock(&entry.path())
        {
            // what cannot be removed does no harm but take space
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

impl WorkDir {
    /// Makes one for the domain `uuid`, whose QEMU runs as `qemu` where that is known.
    ///
    /// `parent` has to be reachable for that user.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Usage`] if the path is too long for a socket or not UTF-8.
    pub fn create(parent: &Path, uuid: &str, qemu: Option<(u32, u32)>) -> Result<Self> {
        let parent =
            std::path::absolute(parent).map_err(|error| Error::io("find", parent.display(), error))?;
        let mut random = [0_u8; 8];
        getrandom::fill(&mut random)
            .map_err(|error| Error::io("draw", "random bytes", io::Error::other(error.to_string())))?;
        let random = format!("{:016x}", u64::from_le_bytes(random));
        let path = parent.join(format!("{}{random}", directory_prefix(uuid)));
        if path.to_str().is_none() {
            return Err(Error::Usage(format!("the scratch directory {} is not UTF-8", parent.display())));
        }
        let length = path.as_os_str().len() + 1 + SOCKET.len();
        if length > MAX_SOCKET_PATH {
            return Err(Error::Usage(format!(
                "the scratch directory {} is {} bytes too long for a socket in it",
                parent.display(),
                length - MAX_SOCKET_PATH
            )));
        }
        // first locked, then named: a name that is seen unlocked has a dead owner
        let new = parent.join(format!("{NEW_PREFIX}{random}"));
        let fail = |action, error| Error::io(action, new.display(), error);
        DirBuilder::new().mode(0o700).create(&new).map_err(|error| fail("create", error))?;
        let ready = try_lock(&new)
            .and_then(|lock| lock.ok_or_else(|| io::ErrorKind::WouldBlock.into()))
            .and_then(|lock| open_to_qemu(&new, qemu).map(|()| lock))
            .and_then(|lock| fs::rename(&new, &path).map(|()| lock));
        match ready {
            Ok(lock) => Ok(Self { path, lock }),
            Err(error) => {
                let _ = fs::remove_dir(&new);
                Err(fail("prepare", error))
            }
        }
    }

    /// Where the job's NBD server listens.
    pub fn socket(&self) -> PathBuf {
        self.path.join(SOCKET)
    }

    /// Where QEMU keeps what the guest overwrites of a disk.
    pub fn scratch(&self, target: &str) -> PathBuf {
        // a target may have any characters
        let name: String = target.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        self.path.join(format!("{name}.scratch"))
    }

    /// Returns how many bytes may still be written into it.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn free_bytes(&self) -> Result<u64> {
        let space = statvfs(&self.path)
            .map_err(|error| Error::io("measure the free space of", self.path.display(), error.into()))?;
        Ok(space.f_bavail.saturating_mul(space.f_frsize))
    }

    /// Returns when it was made, in seconds since the epoch.
    ///
    /// # Errors
    /// [`Error::Io`]
    pub fn made_at(&self) -> Result<i64> {
        let found =
            fs::metadata(&self.path).map_err(|error| Error::io("look at", self.path.display(), error))?;
        Ok(found.mtime())
    }
}

#[cfg(test)]
impl WorkDir {
    /// Does to the lock what being killed does.
    pub fn unlock(&self) {
        flock(&self.lock, FlockOperation::Unlock).unwrap();
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        // the next backup of the domain removes what stays
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Lets QEMU make its socket, and libvirt its scratch files, in a directory.
fn open_to_qemu(directory: &Path, qemu: Option<(u32, u32)>) -> io::Result<()> {
    let own = rustix::process::geteuid().as_raw();
    let given = match qemu {
        Some((user, _)) if user == own => true,
        Some((user, group)) => std::os::unix::fs::chown(directory, Some(user), Some(group)).is_ok(),
        None => false,
    };
    let mode = if given { MODE_FOR_KNOWN_QEMU } else { MODE_FOR_UNKNOWN_QEMU };
    fs::set_permissions(directory, Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "6f1c2d3e-0000-4000-8000-000000000000";

    #[test]
    fn the_lock_tells_the_living_from_the_dead() {
        let parent = tempfile::tempdir().unwrap();
        let directory = WorkDir::create(parent.path(), UUID, None).unwrap();
        let socket = directory.socket();
        assert_eq!(owner_of(&socket), Owner::Alive);
        remove_stale(parent.path(), UUID);
        assert!(directory.path.exists(), "the living keep theirs");
        drop(directory);
        assert_eq!(owner_of(&socket), Owner::Dead, "gone");
        assert_eq!(owner_of(Path::new("/var/tmp/virtnbdbackup.7")), Owner::Foreign);
        assert_eq!(owner_of(&socket.with_file_name("other")), Owner::Foreign);
    }

    #[test]
    fn what_the_dead_left_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let ours = parent.path().join("vmkeep-job-6f1c2d3e-1");
        let others = parent.path().join("vmkeep-job-7f1c2d3e-1");
        for directory in [&ours, &others] {
            fs::create_dir(directory).unwrap();
            fs::write(directory.join(SOCKET), "").unwrap();
            assert_eq!(owner_of(&directory.join(SOCKET)), Owner::Dead);
        }
        remove_stale(parent.path(), UUID);
        assert!(!ours.exists() && others.exists());
    }

    #[test]
    fn directories_of_jobs_are_told_apart() {
        let parent = tempfile::tempdir().unwrap();
        let alive = WorkDir::create(parent.path(), UUID, None).unwrap();
        let dead = parent.path().join("vmkeep-job-7f1c2d3e-1");
        let serving = parent.path().join("vmkeep-job-8f1c2d3e-1");
        for directory in [&dead, &serving] {
            fs::create_dir(directory).unwrap();
        }
        fs::create_dir(parent.path().join(".vmkeep-new-1")).unwrap();
        fs::create_dir(parent.path().join("somebody's")).unwrap();
        fs::write(dead.join("vda.scratch"), [1; 8192]).unwrap();
        // as QEMU leaves it when it is killed: there, but nobody listens
        drop(std::os::unix::net::UnixListener::bind(dead.join(SOCKET)).unwrap());
        let listener = std::os::unix::net::UnixListener::bind(serving.join(SOCKET)).unwrap();
        let made = fs::metadata(parent.path()).unwrap().mtime();
        let found = job_dirs(parent.path(), made);
        let states: Vec<_> = found.iter().map(|dir| (dir.uuid_digits.as_str(), dir.state)).collect();
        let expected = [
            ("6f1c2d3e", JobDirState::InUse),
            ("7f1c2d3e", JobDirState::Dead),
            ("8f1c2d3e", JobDirState::Serving),
        ];
        assert_eq!(states, expected);
        assert!(found[1].bytes >= 8192 && belongs_to(&found[0], UUID) && !belongs_to(&found[1], UUID));
        let later = job_dirs(parent.path(), made + UNFINISHED_SECONDS + 1);
        assert_eq!(later.len(), 4, "one that was never finished: {later:?}");
        assert!(remove_job_dir(&alive.path).is_err() && remove_job_dir(&serving).is_err());
        remove_job_dir(&dead).unwrap();
        remove_job_dir(&dead).unwrap();
        assert!(!dead.exists() && serving.exists());
        drop(listener);
    }

    #[test]
    fn the_place_for_scratch_files_is_judged() {
        let parent = tempfile::tempdir().unwrap();
        let place = scratch_place(Some(parent.path()));
        assert!(place.free.unwrap() > 0 && place.excess == 0);
        let long = scratch_place(Some(&parent.path().join("x".repeat(80))));
        assert!(long.free.is_err() && long.excess > 0);
    }

    #[test]
    fn it_leaves_nothing() {
        let parent = tempfile::tempdir().unwrap();
        let directory = WorkDir::create(parent.path(), UUID, None).unwrap();
        fs::write(directory.scratch("v/../da"), "x").unwrap();
        assert_eq!(directory.scratch("v/../da").parent(), Some(directory.path.as_path()));
        assert_eq!(fs::metadata(&directory.path).unwrap().mode() & 0o7777, MODE_FOR_UNKNOWN_QEMU);
        assert!(directory.free_bytes().unwrap() > 0);
        drop(directory);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_refused_at_once() {
        let parent = tempfile::tempdir().unwrap();
        let long = parent.path().join("x".repeat(80));
        let error = WorkDir::create(&long, UUID, None).unwrap_err().to_string();
        assert!(error.contains("too long for a socket"), "{error}");
    }
}

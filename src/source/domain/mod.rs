//! Backing up a domain of libvirt: all of its disks at one instant, since a checkpoint where one serves.
//!
//! A running domain is read from its own QEMU through a pull-mode backup job, one that is off from its images
//! through `qemu-nbd`. Either way the instant leaves a checkpoint, whose dirty bitmaps record what is written
//! from then on, and the same bitmaps serve both.
//!
//! A base checkpoint keeps recording while a backup runs, and is deleted only after the backup that supersedes
//! it was committed. So whatever fails, the next backup can be made from the same base: a failed one ends its
//! job, deletes its own checkpoint, and leaves the domain as it was. What a killed one leaves behind (a job
//! that nobody reads from, a checkpoint that no point names) the next one removes.
//!
//! Checkpoints are told apart by the beginning of their names, which is the repository's. Several repositories
//! may keep one domain.

mod bitmaps;
mod checkpoints;
mod delay_load;
mod disk;
mod ffi;
mod live;
mod look;
mod mend;
mod monitor_answer;
mod offline;
mod plan;
mod quiesce;
mod survey;
mod workdir;
mod xml;

use std::path::PathBuf;

use crate::error::Result;
use crate::monitor::Monitor;
use crate::source::DiskSource;

use ffi::{Guest, Power};
pub use look::{
    AgentFacts, BitmapFacts, BitmapState, CheckpointFacts, DiskFacts, DomainFacts, JobFacts, Version,
    Versions,
};
pub use workdir::{JobDir, JobDirState, ScratchPlace, belongs_to, job_dirs, remove_job_dir, scratch_place};

/// With less space for scratch files than this, or than its disks have if that is less, no backup of a running domain
/// begins, bytes.
pub const MIN_SCRATCH_BYTES: u64 = live::MIN_SCRATCH_BYTES;
/// With less space for scratch files than this part of its disks a backup warns.
pub const SCRATCH_SHARE: u64 = live::SCRATCH_SHARE;

/// The largest NVRAM that is kept, in bytes; UEFI's have at most 540 KiB.
pub const MAX_NVRAM_BYTES: u64 = 16 << 20;

/// Whether the guest agent freezes the file systems for the instant of the backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Freeze {
    /// Where there is an agent; if it fails, the backup is only crash-consistent and says so.
    #[default]
    Auto,
    /// It is an error if that fails.
    Require,
    No,
}

/// A checkpoint that a committed point names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseCheckpoint {
    pub name: String,
    /// The disks with a bitmap: target names, and sizes in bytes at the checkpoint's instant.
    pub disks: Vec<(String, u64)>,
}

/// What to back up and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupRequest {
    /// Name of the domain.
    pub domain: String,
    /// Target names of the only disks to take; empty: every writable one.
    pub include: Vec<String>,
    /// Target names of disks to leave out.
    pub exclude: Vec<String>,
    /// Checkpoints to read since, best first; empty: in full.
    pub bases: Vec<BaseCheckpoint>,
    /// Name of the checkpoint to make. It begins with `checkpoint_prefix` and was never used before.
    pub new_checkpoint: Option<String>,
    pub freeze: Freeze,
    /// Pause the domain for the instant.
    pub pause: bool,
    /// Where a private directory is made for QEMU's socket and for what the guest overwrites during the
    /// backup; `/var/tmp` by default. QEMU's user has to reach it.
    pub scratch_dir: Option<PathBuf>,
    /// What the names of all checkpoints of the repository begin with, and those of nobody else's.
    pub checkpoint_prefix: String,
    /// Every checkpoint of this domain that a point of the repository names. Others with the prefix are left
    /// over from killed runs, and are deleted.
    pub known_checkpoints: Vec<String>,
}

/// How a disk is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskMode {
    /// What is dirty since a checkpoint.
    Incremental { checkpoint: String },
    /// All of it, because of `reason`; without one, because that was asked for.
    Full { reason: Option<String> },
}

/// One disk at the instant of the backup.
pub struct DomainDisk {
    pub target: String,
    /// The format of its image: "qcow2", "raw", ...
    pub format: String,
    /// Bytes.
    pub size: u64,
    pub mode: DiskMode,
    /// The new checkpoint tracks it.
    pub has_bitmap: bool,
    pub source: Box<dyn DiskSource>,
}

/// The domain at the instant of the backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainInfo {
    pub name: String,
    pub uuid: String,
    pub running: bool,
    /// What it starts with next time, with passwords.
    pub xml_inactive: String,
    /// What it runs with, with passwords.
    pub xml_live: Option<String>,
    /// Variables of its UEFI firmware.
    pub nvram: Option<Vec<u8>>,
    /// Its file systems were frozen.
    pub frozen: bool,
    /// Its processor stood still.
    pub paused: bool,
}

/// What a disk would be read like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedDisk {
    pub target: String,
    pub format: String,
    /// Bytes.
    pub size: u64,
    pub mode: DiskMode,
    /// How much is dirty now, where that can be told without a job.
    pub dirty_bytes: Option<u64>,
}

/// What a backup would do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainPlan {
    pub running: bool,
    pub disks: Vec<PlannedDisk>,
    /// Target names and reasons.
    pub excluded: Vec<(String, String)>,
    pub warnings: Vec<String>,
}

/// A connection to libvirt.
pub struct Hypervisor {
    connect: virt::connect::Connect,
    uri: Option<String>,
}

impl Hypervisor {
    /// Connects read-write; without a URI to libvirt's default one.
    ///
    /// Silences what libvirt itself prints, in the whole process.
    ///
    /// # Errors
    /// [`Error::Unreachable`](crate::error::Error::Unreachable)
    pub fn connect(uri: Option<&str>) -> Result<Self> {
        Ok(Self { connect: ffi::connect(uri)?, uri: uri.map(str::to_owned) })
    }

    /// Returns the names of all domains, running or not, sorted.
    ///
    /// # Errors
    /// [`Error::Unreachable`](crate::error::Error::Unreachable)
    pub fn domains(&self) -> Result<Vec<String>> {
        ffi::domain_names(&self.connect)
    }

    /// Fixes the instant of a backup: from when this returns, its disks can be read.
    ///
    /// # Errors
    /// [`Error::NotFound`](crate::error::Error::NotFound) without such a domain,
    /// [`Error::Busy`](crate::error::Error::Busy) if another job runs on it,
    /// [`Error::Usage`](crate::error::Error::Usage) and [`Error::Refused`](crate::error::Error::Refused) for
    /// disks that it does not have or that cannot be read, and what libvirt says. The domain is as it was then.
    pub fn begin(&self, request: &BackupRequest, monitor: &dyn Monitor) -> Result<DomainBackup> {
        monitor.check()?;
        let guest = Guest::find(&self.connect, self.uri.as_deref(), &request.domain)?;
        let mut begun = match guest.power().map_err(|fault| fault.at("look at", guest.object()))? {
            Power::Off => offline::begin(guest, request, monitor)?,
            power => live::begin(guest, power, request, monitor)?,
        };
        let modes: Vec<(&str, &DiskMode)> =
            begun.disks.iter().map(|disk| (disk.target.as_str(), &disk.mode)).collect();
        begun.spent = plan::spent(&request.bases, &modes);
        Ok(begun)
    }

    /// Tells what [`Hypervisor::begin`] would do, changing nothing.
    ///
    /// # Errors
    /// As for [`Hypervisor::begin`].
    pub fn plan(&self, request: &BackupRequest, monitor: &dyn Monitor) -> Result<DomainPlan> {
        monitor.check()?;
        let guest = Guest::find(&self.connect, self.uri.as_deref(), &request.domain)?;
        match guest.power().map_err(|fault| fault.at("look at", guest.object()))? {
            Power::Off => offline::plan(&guest, request),
            _ => live::plan(&guest, request),
        }
    }
}

/// What keeps the instant.
enum Job {
    Live(live::LiveJob),
    Offline(offline::OfflineJob),
}

/// A backup that has begun. Dropped before [`DomainBackup::finish`], it is undone.
pub struct DomainBackup {
    info: DomainInfo,
    disks: Vec<DomainDisk>,
    excluded: Vec<(String, String)>,
    warnings: Vec<String>,
    checkpoint: Option<String>,
    checkpoint_prefix: String,
    /// Offered bases that serve no disk any more.
    spent: Vec<String>,
    job: Option<Job>,
}

impl DomainBackup {
    /// Returns what the domain was at the instant.
    pub fn info(&self) -> &DomainInfo {
        &self.info
    }

    /// Returns the disks that were not taken out.
    pub fn disks(&mut self) -> &mut [DomainDisk] {
        &mut self.disks
    }

    /// Takes the disks out. They can be read until the job ends.
    pub fn take_disks(&mut self) -> Vec<DomainDisk> {
        std::mem::take(&mut self.disks)
    }

    /// Returns the disks that are left out, and why.
    pub fn excluded(&self) -> &[(String, String)] {
        &self.excluded
    }

    /// Returns what the user has to know although the backup goes on. They are not told to a monitor.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Returns the new checkpoint; `None` if none was asked for, or no disk can have a bitmap.
    pub fn checkpoint(&self) -> Option<&str> {
        self.checkpoint.as_deref()
    }

    /// Ends the job before the point is committed: nothing more is read, and QEMU need not keep any more what
    /// the guest overwrites.
    ///
    /// A job that is gone already, since the domain stopped after everything was read, is a warning.
    ///
    /// # Errors
    /// What libvirt says: the job may still run.
    pub fn end_job(&mut self, _monitor: &dyn Monitor) -> Result<()> {
        self.disks.clear();
        match &mut self.job {
            Some(Job::Live(job)) => self.warnings.extend(job.end()?),
            Some(Job::Offline(job)) => job.end(),
            None => {}
        }
        Ok(())
    }

    /// Ends the backup after its point was committed: deletes the checkpoints of this repository that are not
    /// in `keep`, or that turned out to serve no disk any more. Returns what did not work, which harms nothing.
    ///
    /// # Errors
    /// As for [`DomainBackup::end_job`].
    pub fn finish(mut self, keep: &[String], monitor: &dyn Monitor) -> Result<Vec<String>> {
        // the point names the new checkpoint now: it stays, even if ending the job fails
        let told = self.warnings.len();
        let ended = self.end_job(monitor);
        let mut keep: Vec<&str> =
            keep.iter().filter(|name| !self.spent.contains(name)).map(String::as_str).collect();
        keep.extend(self.checkpoint.as_deref());
        let mut warnings = self.warnings.split_off(told);
        match self.job.take() {
            Some(Job::Live(job)) => job.finish(&self.checkpoint_prefix, &keep, &mut warnings),
            Some(Job::Offline(job)) => job.finish(&self.checkpoint_prefix, &keep, &mut warnings),
            None => {}
        }
        ended.map(|()| warnings)
    }

    /// Undoes the backup: ends its job and deletes its checkpoint.
    pub fn abandon(mut self, monitor: &dyn Monitor) {
        for warning in self.undo() {
            monitor.warn(&warning);
        }
    }

    fn undo(&mut self) -> Vec<String> {
        self.disks.clear();
        match self.job.take() {
            Some(Job::Live(job)) => job.undo(),
            Some(Job::Offline(job)) => job.undo(),
            None => Vec::new(),
        }
    }
}

impl Drop for DomainBackup {
    fn drop(&mut self) {
        // what stays is removed by the next backup
        self.undo();
    }
}

#[cfg(test)]
mod tests;

//! Backing up a domain that runs, through a pull-mode job of its QEMU.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::disk::GuestDisk;
use super::ffi::{CHECKPOINT_INCONSISTENT, Fault, Guest, NO_DOMAIN, NO_DOMAIN_CHECKPOINT, Power};
use super::plan::{self, Broken, Choice, KnownBase};
use super::quiesce::Quiesced;
use super::survey::Survey;
use super::workdir::{self, Owner, WorkDir};
use super::{
    BackupRequest, DiskMode, DomainBackup, DomainDisk, DomainPlan, Freeze, Job, PlannedDisk, checkpoints, xml,
};
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::nbd::Address;
use crate::source::DiskSource;
use crate::source::nbd::NbdDisk;

/// How long a job that was told to end may take.
const ENDING: Duration = Duration::from_secs(30);
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);
/// How long libvirt's daemon may take to come back.
const RESTARTING: Duration = Duration::from_secs(20);
const BETWEEN_CONNECTIONS: Duration = Duration::from_secs(1);
/// With less space for scratch files than this no backup begins: when it runs out, the guest's writes fail.
pub(super) const MIN_SCRATCH_BYTES: u64 = 256 << 20;
/// The part of the disks that may be overwritten during a backup before somebody should have been warned.
pub(super) const SCRATCH_SHARE: u64 = 10;

/// A job of ours; dropped before it was finished, it is undone.
pub(super) struct LiveJob {
    guest: Arc<Guest>,
    directory: WorkDir,
    /// The checkpoint that is deleted if the backup fails.
    checkpoint: Option<String>,
    ended: bool,
}

/// Begins the backup of a running (or paused) domain.
pub(super) fn begin(
    guest: Guest,
    power: Power,
    request: &BackupRequest,
    monitor: &dyn Monitor,
) -> Result<DomainBackup> {
    let guest = Arc::new(guest);
    let mut warnings = Vec::new();
    let survey = Survey::take(&guest, request, true)?;
    end_leftover_job(&guest, monitor)?;
    let parent = workdir::parent_of(request.scratch_dir.as_deref());
    workdir::remove_stale(parent, &survey.uuid);
    delete_leftover_checkpoints(&guest, request, monitor);
    let directory = WorkDir::create(parent, &survey.uuid, survey.domain.owner)?;
    check_space(parent, directory.free_bytes()?, survey.total_bytes(), &mut warnings)?;
    let bases = known_bases(&guest, &survey, &request.bases, Some(directory.made_at()?))?;

    let tracked = if request.new_checkpoint.is_some() { survey.trackable(&mut warnings) } else { Vec::new() };
    let checkpoint = request.new_checkpoint.clone().filter(|_| !tracked.is_empty());
    if checkpoint.is_none() && request.new_checkpoint.is_some() {
        warnings.push("no checkpoint is made: no disk can have a dirty bitmap".into());
    }
    if request.freeze == Freeze::Auto && !survey.domain.has_agent {
        monitor.note(&format!("{} has no guest agent: not frozen, so crash-consistent", guest.object()));
    }
    // from here on, whatever fails is undone by dropping this
    let job = LiveJob { guest: guest.clone(), directory, checkpoint: checkpoint.clone(), ended: false };
    let attempt = Attempt { job: &job, survey: &survey, request, tracked: &tracked };
    let instant = attempt.until_begun(&bases, monitor, &mut warnings)?;
    let disks = open_disks(&job, &survey, instant.choices, &tracked, monitor)?;

    let excluded = survey.excluded.clone();
    let mut info = survey.info(&guest, &mut warnings);
    info.frozen = instant.frozen;
    info.paused = request.pause || power == Power::Paused;
    Ok(DomainBackup {
        info,
        disks,
        excluded,
        warnings,
        checkpoint,
        checkpoint_prefix: request.checkpoint_prefix.clone(),
        spent: Vec::new(),
        job: Some(Job::Live(job)),
    })
}

/// Tells what [`begin`] would do.
pub(super) fn plan(guest: &Guest, request: &BackupRequest) -> Result<DomainPlan> {
    let survey = Survey::take(guest, request, true)?;
    let mut warnings = Vec::new();
    if guest.has_job().is_ok_and(|has_job| has_job) {
        warnings.push("a job runs on the domain now: until it has ended, no backup can begin".to_owned());
    }
    let bases = known_bases(guest, &survey, &request.bases, None)?;
    let mut broken = Broken::new();
    let mut sizes = Vec::new();
    for known in bases.iter().filter(|known| known.tracked.is_some()) {
        let name = &known.base.name;
        // without an answer there is no forecast, and nothing is known against the bitmaps
        let Ok(text) = guest.checkpoint_xml(name, true) else { continue };
        for disk in xml::read_checkpoint(name, &text)? {
            let which = (disk.target, name.clone());
            match disk.dirty_bytes {
                Some(dirty) => sizes.push((which, dirty)),
                // libvirt leaves the size out where the bitmap is missing or inconsistent
                None => _ = broken.insert(which, broken_bitmap(name)),
            }
        }
    }
    let disks = survey.disks.iter().map(|disk| {
        let choice = plan::choose(&disk.xml, disk.size, &bases, &broken);
        let dirty_bytes = match &choice.mode {
            DiskMode::Full { .. } => None,
            DiskMode::Incremental { checkpoint } => sizes
                .iter()
                .find(|((target, name), _)| *target == disk.xml.target && name == checkpoint)
                .map(|(_, dirty)| dirty.saturating_add(disk.size.saturating_sub(choice.size_then))),
        };
        PlannedDisk {
            target: disk.xml.target.clone(),
            format: disk.xml.format.clone(),
            size: disk.size,
            mode: choice.mode,
            dirty_bytes,
        }
    });
    Ok(DomainPlan { running: true, disks: disks.collect(), excluded: survey.excluded.clone(), warnings })
}

/// Ends the job of a vmkeep that is gone.
///
/// libvirt lets a second job wait for half a minute before it refuses it: so look first.
fn end_leftover_job(guest: &Guest, monitor: &dyn Monitor) -> Result<()> {
    let busy = |why: String| Err(Error::Busy { object: guest.object(), why });
    let look = |fault: Fault| fault.at("look at the jobs of", guest.object());
    let Some(text) = guest.backup_xml().map_err(look)? else {
        return match guest.has_job().map_err(look)? {
            true => busy("libvirt runs another job on it (virsh domjobinfo tells which)".into()),
            false => Ok(()),
        };
    };
    let Some(socket) = xml::read_backup_socket(guest.name(), &text)? else {
        return busy("another program's backup job runs on it, without a unix socket".into());
    };
    match workdir::owner_of(&socket) {
        Owner::Foreign => busy(format!(
            "another program's backup job runs on it (NBD socket {}); virsh domjobabort {} ends it",
            socket.display(),
            guest.name()
        )),
        Owner::Alive => busy(format!("another vmkeep is backing it up (NBD socket {})", socket.display())),
        Owner::Dead => {
            monitor.note(&format!("ending the backup job that a killed vmkeep left on {}", guest.object()));
            stop(guest, &socket)?;
            workdir::remove_dead(&socket);
            Ok(())
        }
    }
}

/// Deletes checkpoints of ours that no point names.
fn delete_leftover_checkpoints(guest: &Guest, request: &BackupRequest, monitor: &dyn Monitor) {
    // what cannot be deleted costs the guest a little, not the backup
    let Ok(names) = checkpoints::owned(guest, &request.checkpoint_prefix) else { return };
    for name in names.iter().filter(|name| !request.known_checkpoints.contains(name)) {
        monitor.note(&format!("deleting checkpoint {name} of {}: no point names it", guest.object()));
        if let Err(error) = checkpoints::delete_running(guest, name) {
            monitor.note(&format!("checkpoint {name} stays: {error}"));
        }
    }
}

fn check_space(parent: &Path, free: u64, disks: u64, warnings: &mut Vec<String>) -> Result<()> {
    if free < disks.min(MIN_SCRATCH_BYTES) {
        return Err(Error::Refused {
            object: format!("scratch directory {}", parent.display()),
            reason: format!(
                "{free} bytes are free, at least {MIN_SCRATCH_BYTES} are needed: without space for what it \
                 overwrites, the guest's writes would fail"
            ),
            hint: Some("name another directory with --scratch-dir".into()),
        });
    }
    if free < disks / SCRATCH_SHARE {
        warnings.push(format!(
            "only {free} bytes are free in {}: if the guest overwrites more than that during the backup, its \
             writes fail",
            parent.display()
        ));
    }
    Ok(())
}

/// Finds out which of the bases libvirt knows. With `redefined_at`, seconds since the epoch, those that it
/// lost, as when a domain was defined anew, are told to it again, if their bitmaps are still there and sound.
fn known_bases(
    guest: &Guest,
    survey: &Survey,
    bases: &[super::BaseCheckpoint],
    redefined_at: Option<i64>,
) -> Result<Vec<KnownBase>> {
    let mut known = Vec::with_capacity(bases.len());
    for base in bases {
        let mut tracked = checkpoints::tracked(guest, &base.name)?;
        if let (None, Some(now)) = (&tracked, redefined_at) {
            let targets: Vec<&str> = base
                .disks
                .iter()
                .map(|(target, _)| target.as_str())
                .filter(|target| survey.disks.iter().any(|disk| disk.xml.target == **target))
                .collect();
            let leaves = guest.leaves().unwrap_or_default();
            let parent = if let [leaf] = &leaves[..] { Some(leaf.as_str()) } else { None };
            let text = xml::write_redefined(&base.name, &targets, parent, now);
            if !targets.is_empty() && guest.checkpoint_redefine(&text, true).is_ok() {
                tracked = checkpoints::tracked(guest, &base.name)?;
            }
        }
        known.push(KnownBase { base: base.clone(), tracked: tracked.map(|list| list.into_iter().collect()) });
    }
    Ok(known)
}

fn broken_reason(fault: &Fault, checkpoint: &str) -> String {
    match fault.code {
        NO_DOMAIN_CHECKPOINT => format!("checkpoint {checkpoint} is gone"),
        _ => broken_bitmap(checkpoint),
    }
}

fn broken_bitmap(checkpoint: &str) -> String {
    format!("its dirty bitmap of checkpoint {checkpoint} is missing or broken")
}

/// What it takes to begin a job.
struct Attempt<'a> {
    job: &'a LiveJob,
    survey: &'a Survey,
    request: &'a BackupRequest,
    tracked: &'a [String],
}

/// What became of it.
struct Begun {
    choices: Vec<Choice>,
    frozen: bool,
}

impl Attempt<'_> {
    /// Tries with the best bitmaps, and again without those that turn out to be broken.
    fn until_begun(
        &self,
        bases: &[KnownBase],
        monitor: &dyn Monitor,
        warnings: &mut Vec<String>,
    ) -> Result<Begun> {
        let mut broken = Broken::new();
        loop {
            monitor.check()?;
            let choose =
                |disk: &super::survey::SurveyedDisk| plan::choose(&disk.xml, disk.size, bases, &broken);
            let choices: Vec<Choice> = self.survey.disks.iter().map(choose).collect();
            let used: Vec<(String, String)> = self
                .survey
                .disks
                .iter()
                .zip(&choices)
                .filter_map(|(disk, choice)| match &choice.mode {
                    DiskMode::Incremental { checkpoint } => {
                        Some((disk.xml.target.clone(), checkpoint.clone()))
                    }
                    DiskMode::Full { .. } => None,
                })
                .collect();
            let fault = match self.once(&choices, warnings)? {
                Ok(frozen) => return Ok(Begun { choices, frozen }),
                Err(fault) => fault,
            };
            let about_bitmaps = matches!(fault.code, CHECKPOINT_INCONSISTENT | NO_DOMAIN_CHECKPOINT);
            if !about_bitmaps || used.is_empty() {
                return Err(fault.at("begin a backup of", self.job.guest.object()));
            }
            // each round uses fewer of them, so this ends
            for which in plan::blamed(&fault.message, &used) {
                let reason = broken_reason(&fault, &which.1);
                broken.insert(which, reason);
            }
            self.job.delete_checkpoint()?;
        }
    }

    /// Returns whether the domain was frozen, or why libvirt refused.
    fn once(&self, choices: &[Choice], warnings: &mut Vec<String>) -> Result<Result<bool, Fault>> {
        let (guest, directory) = (&self.job.guest, &self.job.directory);
        let scratches: Vec<String> =
            self.survey.disks.iter().map(|disk| text_of(&directory.scratch(&disk.xml.target))).collect();
        let disks: Vec<xml::JobDisk<'_>> = self
            .survey
            .disks
            .iter()
            .zip(choices)
            .zip(&scratches)
            .map(|((disk, choice), scratch)| xml::JobDisk {
                target: &disk.xml.target,
                since: match &choice.mode {
                    DiskMode::Incremental { checkpoint } => Some(checkpoint),
                    DiskMode::Full { .. } => None,
                },
                scratch,
            })
            .collect();
        let others = self.survey.others();
        let backup = xml::write_backup(&text_of(&directory.socket()), &disks, &others);
        let tracked: Vec<&str> = self.tracked.iter().map(String::as_str).collect();
        let untracked: Vec<&str> = self.survey.domain.disks.iter().map(|disk| disk.target.as_str()).collect();
        let untracked: Vec<&str> = untracked.into_iter().filter(|target| !tracked.contains(target)).collect();
        let checkpoint =
            self.job.checkpoint.as_ref().map(|name| xml::write_checkpoint(name, &tracked, &untracked));

        let (freeze, pause) = (self.request.freeze, self.request.pause);
        let quiesced = Quiesced::begin(guest, freeze, pause, self.survey.domain.has_agent, warnings)?;
        let begun = guest.backup_begin(&backup, checkpoint.as_deref());
        let frozen = quiesced.is_frozen();
        quiesced.end(warnings);
        Ok(begun.map(|()| frozen))
    }
}

/// The path of a private directory, which was checked to be UTF-8.
fn text_of(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn open_disks(
    job: &LiveJob,
    survey: &Survey,
    choices: Vec<Choice>,
    tracked: &[String],
    monitor: &dyn Monitor,
) -> Result<Vec<DomainDisk>> {
    let address = Address::Unix(job.directory.socket());
    let mut disks = Vec::with_capacity(choices.len());
    for (disk, choice) in survey.disks.iter().zip(choices) {
        let target = &disk.xml.target;
        let is_incremental = matches!(choice.mode, DiskMode::Incremental { .. });
        let bitmap = is_incremental.then(|| xml::bitmap_name(target));
        let label = format!("{target} of {}", job.guest.name());
        let source = NbdDisk::open(&address, target, bitmap.as_deref(), label, monitor)?;
        // it may have been resized since it was looked at
        let (size, then) = (source.size(), choice.size_then);
        let mode = if is_incremental && size < then {
            DiskMode::Full { reason: Some(format!("it shrank from {then} to {size} bytes")) }
        } else {
            choice.mode
        };
        let size_then = matches!(mode, DiskMode::Incremental { .. }).then_some(then);
        disks.push(DomainDisk {
            target: target.clone(),
            format: disk.xml.format.clone(),
            size,
            mode,
            has_bitmap: tracked.contains(target),
            source: Box::new(GuestDisk::new(Box::new(source), size_then, Some(job.guest.clone()))),
        });
    }
    Ok(disks)
}

/// Ends the job that listens at `socket`; returns false if it was gone.
pub(super) fn stop(guest: &Guest, socket: &Path) -> Result<bool> {
    let runs = || -> Result<bool> {
        match guest.backup_xml() {
            Ok(Some(text)) => Ok(xml::read_backup_socket(guest.name(), &text)?.as_deref() == Some(socket)),
            Ok(None) => Ok(false),
            // a domain that was never more than running vanishes when it stops
            Err(fault) if fault.code == NO_DOMAIN => Ok(false),
            Err(fault) => Err(fault.at("look at the backup job of", guest.object())),
        }
    };
    if !runs()? {
        return Ok(false);
    }
    if let Err(fault) = guest.abort_job()
        && runs()?
    {
        return Err(fault.at("end the backup job of", guest.object()));
    }
    // libvirt answers before the job is gone; the next one would have to wait for it
    let patience = Instant::now();
    while runs()? {
        if patience.elapsed() > ENDING {
            let why = format!("its backup job was told to end {} s ago and still runs", ENDING.as_secs());
            return Err(Error::Busy { object: guest.object(), why });
        }
        thread::sleep(BETWEEN_LOOKS);
    }
    Ok(true)
}

impl LiveJob {
    fn socket(&self) -> PathBuf {
        self.directory.socket()
    }

    /// Ends the job; returns a warning if it had ended by itself.
    ///
    /// # Errors
    /// What libvirt says.
    pub fn end(&mut self) -> Result<Option<String>> {
        if self.ended {
            return Ok(None);
        }
        self.reconnect()?;
        let stopped = stop(&self.guest, &self.socket())?;
        self.ended = true;
        // every read was answered in full, or would have failed: what was read is right
        Ok((!stopped).then(|| {
            let why = match self.guest.power() {
                Ok(Power::Off) | Err(_) => "the domain stopped",
                Ok(_) => "somebody else ended the backup job",
            };
            format!("{why} after its disks had been read")
        }))
    }

    /// Finds the domain again, if libvirt's daemon was restarted meanwhile.
    fn reconnect(&mut self) -> Result<()> {
        let began = Instant::now();
        loop {
            match self.guest.over_a_live_connection() {
                Ok(Some(guest)) => self.guest = Arc::new(guest),
                Ok(None) | Err(Error::NotFound { .. }) => return Ok(()),
                Err(error) if began.elapsed() > RESTARTING => return Err(error),
                Err(_) => thread::sleep(BETWEEN_CONNECTIONS),
            }
        }
    }

    /// Keeps the checkpoint and deletes those of ours that are not in `keep`.
    pub fn finish(mut self, prefix: &str, keep: &[&str], warnings: &mut Vec<String>) {
        self.checkpoint = None;
        checkpoints::delete_superseded(&self.guest, prefix, keep, warnings);
    }

    /// Ends the job and deletes its checkpoint; returns what did not work.
    pub fn undo(mut self) -> Vec<String> {
        self.undo_what_is_left()
    }

    fn undo_what_is_left(&mut self) -> Vec<String> {
        let mut problems = Vec::new();
        if let Err(error) = self.end() {
            problems.push(format!("the backup job of {} may still run: {error}", self.guest.object()));
        }
        if let Err(error) = self.delete_checkpoint() {
            problems.push(format!("the checkpoint of the failed backup stays for now: {error}"));
        }
        // one try is all: the next backup looks for leftovers
        (self.checkpoint, self.ended) = (None, true);
        problems
    }

    /// Deletes the job's checkpoint, if there is one.
    fn delete_checkpoint(&self) -> Result<()> {
        self.checkpoint.as_ref().map_or(Ok(()), |name| checkpoints::delete(&self.guest, name))
    }
}

#[cfg(test)]
impl LiveJob {
    /// Leaves behind what a killed process does.
    pub fn die(self) {
        self.directory.unlock();
        std::mem::forget(self);
    }
}

impl Drop for LiveJob {
    fn drop(&mut self) {
        if !self.ended || self.checkpoint.is_some() {
            self.undo_what_is_left();
        }
    }
}

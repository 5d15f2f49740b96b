//! Backing up a domain that is off, from its images.
//!
//! libvirt refuses backups, and to make or delete checkpoints, of such a domain. But a checkpoint is no more
//! than what libvirt knows of it and a bitmap of the same name in each image: both can be made from outside.
//! The two are changed in an order that leaves something a later run finds and removes, if this one is killed:
//! libvirt is told first of a checkpoint that is made, and last of one that is deleted.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use super::bitmaps::{self, Bitmap};
use super::disk::GuestDisk;
use super::ffi::{Config, Guest, NO_DOMAIN_CHECKPOINT};
use super::plan::{self, Broken, Choice, KnownBase};
use super::survey::{Survey, SurveyedDisk};
use super::{
    BackupRequest, DiskMode, DomainBackup, DomainDisk, DomainPlan, Freeze, Job, PlannedDisk, checkpoints,
    workdir, xml,
};
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::source::DiskSource;
use crate::source::nbd::NbdDisk;
use crate::source::qemu_nbd::QemuNbd;

/// A backup of ours; dropped before it was finished, it is undone.
pub(super) struct OfflineJob {
    guest: Guest,
    /// They keep the domain from starting.
    servers: Vec<QemuNbd>,
    /// The checkpoint that is deleted if the backup fails.
    checkpoint: Option<String>,
}

/// The image of a disk.
struct Image {
    target: String,
    path: PathBuf,
    /// For each image of the backing chain, the active one first; empty for other formats than qcow2.
    bitmaps: Vec<Vec<Bitmap>>,
}

impl Image {
    fn of(guest: &Guest, disk: &SurveyedDisk) -> Result<Self> {
        let refused = |why: &str| {
            Err(Error::Refused {
                object: format!("disk {} of {}", disk.xml.target, guest.object()),
                reason: format!("it cannot be read while the domain is off: {why}"),
                hint: Some("start the domain, or leave the disk out with --exclude".into()),
            })
        };
        let Some(path) = disk.xml.path.clone() else {
            return refused(&format!("it is a disk of type {}", disk.xml.kind));
        };
        if disk.xml.encrypted {
            return refused("it is encrypted");
        }
        let bitmaps = if disk.xml.format == "qcow2" { bitmaps::list(&path)? } else { Vec::new() };
        Ok(Self { target: disk.xml.target.clone(), path, bitmaps })
    }

    /// Returns why a bitmap of the image does not tell what was written; `None` if it does.
    fn fault(&self, name: &str) -> Option<String> {
        let mut chain = self.bitmaps.iter().map(|list| list.iter().find(|bitmap| bitmap.name == name));
        match chain.next().flatten() {
            None => Some(format!("its dirty bitmap of checkpoint {name} is missing")),
            Some(bitmap) if !bitmap.serves => {
                Some(format!("its dirty bitmap of checkpoint {name} is broken"))
            }
            Some(_) if chain.any(|bitmap| bitmap.is_some()) => {
                Some(format!("its dirty bitmap of checkpoint {name} is spread over a chain of images"))
            }
            Some(_) => None,
        }
    }
}

fn images(guest: &Guest, survey: &Survey) -> Result<Vec<Image>> {
    survey.disks.iter().map(|disk| Image::of(guest, disk)).collect()
}

/// Chooses how each disk is read, by the bitmaps that are in its image, whatever libvirt knows of them.
fn choose(survey: &Survey, images: &[Image], request: &BackupRequest) -> Vec<Choice> {
    let mut broken = Broken::new();
    let known: Vec<KnownBase> = request
        .bases
        .iter()
        .map(|base| {
            for image in images {
                if let Some(reason) = image.fault(&base.name) {
                    broken.insert((image.target.clone(), base.name.clone()), reason);
                }
            }
            let tracked: BTreeSet<String> = images.iter().map(|image| image.target.clone()).collect();
            KnownBase { base: base.clone(), tracked: Some(tracked) }
        })
        .collect();
    survey.disks.iter().map(|disk| plan::choose(&disk.xml, disk.size, &known, &broken)).collect()
}

/// Tells what [`begin`] would do.
pub(super) fn plan(guest: &Guest, request: &BackupRequest) -> Result<DomainPlan> {
    let survey = Survey::take(guest, request, false)?;
    let images = images(guest, &survey)?;
    let choices = choose(&survey, &images, request);
    let disks = survey.disks.iter().zip(choices).map(|(disk, choice)| PlannedDisk {
        target: disk.xml.target.clone(),
        format: disk.xml.format.clone(),
        size: disk.size,
        mode: choice.mode,
        dirty_bytes: None,
    });
    Ok(DomainPlan {
        running: false,
        disks: disks.collect(),
        excluded: survey.excluded.clone(),
        warnings: Vec::new(),
    })
}

/// Begins the backup of a domain that is off.
pub(super) fn begin(guest: Guest, request: &BackupRequest, monitor: &dyn Monitor) -> Result<DomainBackup> {
    let mut warnings = Vec::new();
    let survey = Survey::take(&guest, request, false)?;
    if request.freeze == Freeze::Require && guest.has_saved_memory().unwrap_or(false) {
        let reason = "it is off with its memory saved: its file systems cannot be frozen".into();
        return Err(Error::Refused { object: guest.object(), reason, hint: None });
    }
    if guest.has_saved_memory().unwrap_or(false) {
        warnings.push("the domain's memory is saved: its disks are those of a running system".into());
    }
    let parent = workdir::parent_of(request.scratch_dir.as_deref());
    workdir::remove_stale(parent, &survey.uuid);
    delete_leftovers(&guest, request, monitor);
    let images = images(&guest, &survey)?;
    let choices = choose(&survey, &images, request);
    let tracked = if request.new_checkpoint.is_some() { survey.trackable(&mut warnings) } else { Vec::new() };
    let checkpoint = request.new_checkpoint.clone().filter(|_| !tracked.is_empty());
    if checkpoint.is_none() && request.new_checkpoint.is_some() {
        warnings.push("no checkpoint is made: no disk can have a dirty bitmap".into());
    }
    // from here on, whatever fails is undone by dropping this
    let mut job = OfflineJob { guest, servers: Vec::new(), checkpoint: checkpoint.clone() };
    if let Some(name) = &checkpoint {
        // The bitmaps are there before the first image is locked: should the domain run in between, they
        // record too much, never too little.
        make_checkpoint(&job.guest, name, &images, &tracked)?;
    }
    let disks = job.open_disks(&survey, &images, choices, &tracked, monitor)?;
    let excluded = survey.excluded.clone();
    let info = survey.info(&job.guest, &mut warnings);
    Ok(DomainBackup {
        info,
        disks,
        excluded,
        warnings,
        checkpoint,
        checkpoint_prefix: request.checkpoint_prefix.clone(),
        spent: Vec::new(),
        job: Some(Job::Offline(job)),
    })
}

fn make_checkpoint(guest: &Guest, name: &str, images: &[Image], tracked: &[String]) -> Result<()> {
    let targets: Vec<&str> = tracked.iter().map(String::as_str).collect();
    let leaves = guest.leaves().unwrap_or_default();
    let parent = if let [leaf] = &leaves[..] { Some(leaf.as_str()) } else { None };
    guest
        .checkpoint_redefine(&xml::write_redefined(name, &targets, parent, last_written(images)), false)
        .map_err(|fault| fault.at("make", format_args!("checkpoint {name} of {}", guest.object())))?;
    for image in images.iter().filter(|image| tracked.contains(&image.target)) {
        bitmaps::add(&image.path, name)?;
    }
    Ok(())
}

/// Returns when an image was written last, in seconds since the epoch: an off domain is that of then.
fn last_written(images: &[Image]) -> i64 {
    let times = images.iter().filter_map(|image| Some(std::fs::metadata(&image.path).ok()?.mtime()));
    times.max().unwrap_or(0)
}

/// Removes the bitmaps of ours, and then the checkpoints, that no point names.
fn delete_leftovers(guest: &Guest, request: &BackupRequest, monitor: &dyn Monitor) {
    // what cannot be deleted costs a little space, not the backup
    let Ok(names) = owned(guest, &request.checkpoint_prefix) else { return };
    for name in names.iter().filter(|name| !request.known_checkpoints.contains(name)) {
        monitor.note(&format!("deleting checkpoint {name} of {}: no point names it", guest.object()));
        if let Err(error) = delete_checkpoint(guest, name) {
            monitor.note(&format!("checkpoint {name} stays: {error}"));
        }
    }
}

/// Returns the checkpoints that libvirt or an image knows and whose names begin with `prefix`, sorted.
///
/// # Errors
/// What libvirt and qemu-img say.
pub(super) fn owned(guest: &Guest, prefix: &str) -> Result<Vec<String>> {
    let mut names: BTreeSet<String> = checkpoints::owned(guest, prefix)?.into_iter().collect();
    for image in images_with_bitmaps(guest)? {
        let in_image = image.bitmaps.into_iter().next().into_iter().flatten().map(|bitmap| bitmap.name);
        names.extend(in_image.filter(|name| checkpoints::is_owned(name, prefix)));
    }
    Ok(names.into_iter().collect())
}

/// Removes the bitmaps called `name` from disks of a domain that is off, as far as they are there.
///
/// # Errors
/// What libvirt and qemu-img say.
pub(super) fn remove_bitmaps(guest: &Guest, name: &str, targets: &[&str]) -> Result<()> {
    let mut images = images_with_bitmaps(guest)?;
    images.retain(|image| targets.contains(&image.target.as_str()));
    remove_from(&images, name)
}

fn remove_from(images: &[Image], name: &str) -> Result<()> {
    for image in images {
        if image.bitmaps.first().is_some_and(|list| list.iter().any(|bitmap| bitmap.name == name)) {
            bitmaps::remove(&image.path, name)?;
        }
    }
    Ok(())
}

fn delete_from(guest: &Guest, images: &[Image], name: &str) -> Result<()> {
    remove_from(images, name)?;
    match guest.checkpoint_delete(name, true) {
        Ok(()) => Ok(()),
        Err(fault) if fault.code == NO_DOMAIN_CHECKPOINT => Ok(()),
        Err(fault) => Err(fault.at("delete", format_args!("checkpoint {name} of {}", guest.object()))),
    }
}

/// Returns the images of a domain that can have bitmaps.
fn images_with_bitmaps(guest: &Guest) -> Result<Vec<Image>> {
    let text = guest.xml(Config::Inactive).map_err(|fault| fault.at("read the XML of", guest.object()))?;
    let disks = xml::read_domain(guest.name(), &text)?.disks;
    let mut images = Vec::new();
    for disk in disks.into_iter().filter(|disk| disk.format == "qcow2" && !disk.read_only) {
        if let Some(path) = disk.path {
            // an image that cannot be looked at keeps its bitmaps; the others need not
            if let Ok(bitmaps) = bitmaps::list(&path) {
                images.push(Image { target: disk.target, path, bitmaps });
            }
        }
    }
    Ok(images)
}

/// Deletes a checkpoint of a domain that is off: its bitmaps, then what libvirt knows of it.
///
/// # Errors
/// What libvirt and qemu-img say.
pub(super) fn delete_checkpoint(guest: &Guest, name: &str) -> Result<()> {
    delete_from(guest, &images_with_bitmaps(guest)?, name)
}

impl OfflineJob {
    /// Opens all images before any is read: from then on the domain cannot start.
    fn open_disks(
        &mut self,
        survey: &Survey,
        images: &[Image],
        choices: Vec<Choice>,
        tracked: &[String],
        monitor: &dyn Monitor,
    ) -> Result<Vec<DomainDisk>> {
        let mut disks = Vec::with_capacity(choices.len());
        for ((disk, image), choice) in survey.disks.iter().zip(images).zip(choices) {
            let (target, format) = (&disk.xml.target, disk.xml.format.as_str());
            let since = match &choice.mode {
                DiskMode::Incremental { checkpoint } => Some(checkpoint.as_str()),
                DiskMode::Full { .. } => None,
            };
            let since: Vec<&str> = since.into_iter().collect();
            let server = QemuNbd::readable(&image.path, format, &since, monitor)?;
            let since = since.first().copied();
            let label = format!("{target} of {}", self.guest.name());
            let source = NbdDisk::open(&server.address(), server.export(), since, label, monitor)?;
            self.servers.push(server);
            let size_then = since.map(|_| choice.size_then);
            disks.push(DomainDisk {
                target: target.clone(),
                format: format.to_owned(),
                size: source.size(),
                mode: choice.mode,
                has_bitmap: tracked.contains(target),
                source: Box::new(GuestDisk::new(Box::new(source), size_then, None)),
            });
        }
        Ok(disks)
    }

    /// Lets go of the images: the domain may start.
    pub fn end(&mut self) {
        self.servers.clear();
    }

    /// Keeps the checkpoint and deletes those of ours that are not in `keep`.
    pub fn finish(mut self, prefix: &str, keep: &[&str], warnings: &mut Vec<String>) {
        self.checkpoint = None;
        self.end();
        checkpoints::delete_superseded(&self.guest, prefix, keep, warnings);
    }

    /// Deletes the checkpoint; returns what did not work.
    pub fn undo(mut self) -> Vec<String> {
        self.undo_what_is_left()
    }

    fn undo_what_is_left(&mut self) -> Vec<String> {
        self.end();
        let Some(name) = self.checkpoint.take() else { return Vec::new() };
        match checkpoints::delete(&self.guest, &name) {
            Ok(()) => Vec::new(),
            Err(error) => vec![format!("the checkpoint of the failed backup stays for now: {error}")],
        }
    }
}

#[cfg(test)]
impl OfflineJob {
    /// Leaves behind what a killed process does; its servers lose their only client.
    pub fn die(mut self) {
        self.end();
        std::mem::forget(self);
    }
}

impl Drop for OfflineJob {
    fn drop(&mut self) {
        self.undo_what_is_left();
    }
}

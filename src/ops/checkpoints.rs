//! The checkpoints of a domain: what libvirt, QEMU and the repository each know of them, and deleting those that can
//! serve no backup any more.

use std::collections::BTreeSet;

use serde::Serialize;

use super::backup::{base_checkpoint, checkpoint_prefix};
use super::levels::checkpoints_to_keep;
use crate::error::{Error, Result};
use crate::format::point::Level;
use crate::format::session::SessionKind;
use crate::id::PointId;
use crate::monitor::Monitor;
use crate::repo::{PointEntry, Repository};
use crate::source::domain::{BaseCheckpoint, BitmapState, DomainFacts, Hypervisor, JobFacts};

/// What to look at, and whether to tidy up.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CheckpointsOptions {
    pub domain: String,
    /// Delete the checkpoints of this repository that can serve no backup any more.
    pub gc: bool,
    /// With `gc`: only say which.
    pub dry_run: bool,
    /// Ask QEMU itself for its bitmaps, which taints the domain.
    pub ask_qemu: bool,
}

/// What a checkpoint is to the repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// The newest one: the next incremental is read since it.
    Newest,
    /// The last full's.
    LastFull,
    NewestAndLastFull,
    /// Of a point that newer ones have taken the place of.
    Superseded,
    /// Of a point that was forgotten.
    Forgotten,
    /// No point of the domain names it: never committed, or forgotten and pruned.
    Unknown,
    /// It may be of the backup that runs now.
    AtWork,
    OtherRepository,
    /// Not vmkeep's.
    Foreign,
}

impl Standing {
    /// Returns true if a backup may be made since it.
    pub fn is_needed(self) -> bool {
        matches!(self, Self::Newest | Self::LastFull | Self::NewestAndLastFull)
    }
}

/// What the repository knows of a domain's checkpoints.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Known {
    /// What the names of all of the repository's checkpoints begin with.
    pub prefix: String,
    /// A backup of the domain runs now: what no point names may be its own.
    pub at_work: bool,
    newest: Option<BaseCheckpoint>,
    full: Option<BaseCheckpoint>,
    /// Name and point.
    points: Vec<(String, PointId)>,
    forgotten: Vec<(String, PointId)>,
    /// When the points that left them were made, milliseconds since 1970.
    times_ms: Vec<(String, i64)>,
}

impl Known {
    /// Sorts out the points of one domain, oldest first.
    pub fn new(prefix: String, points: &[PointEntry], forgotten: &[PointEntry], at_work: bool) -> Self {
        let named = |entries: &[PointEntry]| -> Vec<(String, PointId)> {
            let name = |entry: &PointEntry| Some((entry.record.checkpoint.clone()?, entry.record.id));
            entries.iter().filter_map(name).collect()
        };
        let keep = checkpoints_to_keep(points, Level::Incremental, None);
        let newest = points.iter().rev().find_map(|entry| base_checkpoint(&entry.record));
        let full = points.iter().rev().find(|entry| entry.record.level == Level::Full);
        let full =
            full.and_then(|entry| base_checkpoint(&entry.record)).filter(|base| keep.contains(&base.name));
        let times =
            points.iter().filter_map(|entry| Some((entry.record.checkpoint.clone()?, entry.record.time_ms)));
        Self {
            prefix,
            at_work,
            newest,
            full,
            points: named(points),
            forgotten: named(forgotten),
            times_ms: times.collect(),
        }
    }

    /// Reads what a repository knows of a domain; `locked_out` if somebody else has the domain's lock.
    ///
    /// # Errors
    /// Those of the storage.
    pub fn of(
        repository: &Repository,
        facts: &DomainFacts,
        locked_out: bool,
        monitor: &dyn Monitor,
    ) -> Result<Self> {
        let domain = &facts.name;
        let at_work = locked_out || matches!(facts.job, JobFacts::Alive { .. }) || is_backing_up(repository)?;
        let catalog = repository.catalog(monitor)?;
        let of_domain = |entries: &[PointEntry]| -> Vec<PointEntry> {
            entries.iter().filter(|entry| entry.record.domain == *domain).cloned().collect()
        };
        let (points, forgotten) = (of_domain(catalog.points()), of_domain(catalog.forgotten()));
        Ok(Self::new(checkpoint_prefix(repository.id()), &points, &forgotten, at_work))
    }

    /// Returns what a checkpoint is, and the point that left it.
    pub fn standing(&self, name: &str) -> (Standing, Option<PointId>) {
        let of = |list: &[(String, PointId)]| {
            list.iter().find(|(known, _)| known == name).map(|(_, point)| *point)
        };
        let is = |base: &Option<BaseCheckpoint>| base.as_ref().is_some_and(|base| base.name == name);
        let point = of(&self.points);
        match (is(&self.newest), is(&self.full)) {
            (true, true) => return (Standing::NewestAndLastFull, point),
            (true, false) => return (Standing::Newest, point),
            (false, true) => return (Standing::LastFull, point),
            (false, false) => {}
        }
        // an empty prefix would own everybody's
        if self.prefix.is_empty() || !name.starts_with(&self.prefix) {
            return (if is_vmkeeps(name) { Standing::OtherRepository } else { Standing::Foreign }, None);
        }
        match (point, of(&self.forgotten)) {
            (Some(point), _) => (Standing::Superseded, Some(point)),
            (None, Some(point)) => (Standing::Forgotten, Some(point)),
            (None, None) if self.at_work => (Standing::AtWork, None),
            (None, None) => (Standing::Unknown, None),
        }
    }

    /// Returns the checkpoints that backups may be made since, the newest first.
    pub fn needed(&self) -> impl Iterator<Item = &BaseCheckpoint> {
        let full = self.full.as_ref().filter(|full| self.newest.as_ref() != Some(*full));
        self.newest.iter().chain(full)
    }

    /// Returns when the point was made that left a checkpoint, milliseconds since 1970.
    pub fn time_ms(&self, name: &str) -> Option<i64> {
        self.times_ms.iter().find(|(known, _)| known == name).map(|(_, time)| *time)
    }
}

/// Returns true for names that a vmkeep gives: `vmkeep-`, eight digits of a repository, `-`, sixteen of a point.
fn is_vmkeeps(name: &str) -> bool {
    let Some((repository, point)) = name.strip_prefix("vmkeep-").and_then(|rest| rest.split_once('-')) else {
        return false;
    };
    let hex = |text: &str, len: usize| text.len() == len && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    hex(repository, 8) && hex(point, 16)
}

/// A checkpoint's bitmap on one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiskBitmap {
    pub disk: String,
    pub state: BitmapState,
    /// Bytes dirty since, where that is known.
    pub dirty_bytes: Option<u64>,
    /// libvirt says that the checkpoint tracks the disk.
    pub tracked: bool,
}

/// A checkpoint, or bitmaps of one name that are left of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointReport {
    pub name: String,
    pub standing: Standing,
    /// The point that left it.
    pub point: Option<PointId>,
    /// Seconds since the epoch; `None` if libvirt does not know it.
    pub created: Option<i64>,
    pub disks: Vec<DiskBitmap>,
    /// Why it can serve no backup any more; `None`: it can, or is not this repository's.
    pub useless: Option<String>,
    pub deleted: bool,
}

/// All checkpoints of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointsReport {
    pub domain: String,
    pub running: bool,
    /// QEMU was asked for its bitmaps.
    pub asked_qemu: bool,
    /// As libvirt made them, then those that it does not know.
    pub checkpoints: Vec<CheckpointReport>,
    /// What did not work.
    pub warnings: Vec<String>,
    pub dry_run: bool,
}

/// Lists the checkpoints of a domain, and with `gc` deletes those of this repository that can serve no backup any more.
///
/// # Errors
/// Those of libvirt and of the storage; with `gc` [`Error::Busy`] while a backup of the domain runs.
pub fn checkpoints(
    repository: &Repository,
    hypervisor: &Hypervisor,
    options: &CheckpointsOptions,
    monitor: &dyn Monitor,
) -> Result<CheckpointsReport> {
    let domain = &options.domain;
    let change = options.gc && !options.dry_run;
    // whoever only looks keeps nobody from making a backup
    let (_lock, locked_out) = if change {
        (Some(repository.lock_domain(domain)?), false)
    } else {
        (None, is_locked(repository, domain))
    };
    let facts = hypervisor.look(domain, options.ask_qemu)?;
    let known = Known::of(repository, &facts, locked_out, monitor)?;
    let mut report = CheckpointsReport {
        domain: domain.clone(),
        running: facts.running,
        asked_qemu: facts.asked_qemu,
        checkpoints: describe(&facts, &known),
        warnings: Vec::new(),
        dry_run: options.dry_run,
    };
    if change {
        for found in report.checkpoints.iter_mut().filter(|found| found.useless.is_some()) {
            if monitor.is_cancelled() {
                // what was deleted has to be told
                report.warnings.push("cancelled: the others stay".into());
                break;
            }
            let disks: Vec<String> = found.disks.iter().map(|disk| disk.disk.clone()).collect();
            match hypervisor.delete_checkpoint(domain, &known.prefix, &found.name, &disks) {
                Ok(()) => found.deleted = true,
                Err(error) => report.warnings.push(format!("checkpoint {} stays: {error}", found.name)),
            }
        }
    }
    Ok(report)
}

/// Returns true while a backup of the domain to this repository runs, as far as its lock tells.
pub(super) fn is_locked(repository: &Repository, domain: &str) -> bool {
    matches!(repository.lock_domain(domain), Err(Error::Busy { .. }))
}

/// Returns true while a backup of any domain to this repository runs on this host, whoever's it is: another user's has
/// another cache directory, and so another lock.
fn is_backing_up(repository: &Repository) -> Result<bool> {
    let sessions = repository.open_sessions()?;
    let host = &repository.environment().host;
    Ok(sessions.iter().any(|session| {
        let record = session.record.as_ref();
        let here = record.is_some_and(|record| record.kind == SessionKind::Backup && record.host == *host);
        here && !repository.is_dead_here(session)
    }))
}

/// Puts together what libvirt, the images and the repository say.
pub fn describe(facts: &DomainFacts, known: &Known) -> Vec<CheckpointReport> {
    let mut listed: Vec<(Option<i64>, &str)> =
        facts.checkpoints.iter().map(|found| (Some(found.created), found.name.as_str())).collect();
    listed.sort_unstable();
    let mut others: BTreeSet<&str> =
        facts.disks.iter().flat_map(|disk| &disk.bitmaps).map(|bitmap| bitmap.name.as_str()).collect();
    others.extend(known.needed().map(|base| base.name.as_str()));
    others.retain(|name| listed.iter().all(|(_, known)| known != name));
    listed.extend(others.into_iter().map(|name| (None, name)));
    let reports = listed.into_iter().map(|(created, name)| {
        let (standing, point) = known.standing(name);
        let disks = bitmaps_of(facts, known, name, standing);
        let useless = why_useless(standing, &disks);
        CheckpointReport { name: name.to_owned(), standing, point, created, disks, useless, deleted: false }
    });
    reports.collect()
}

/// Returns the bitmaps called `name`, with those that a point relies on and that are not there.
fn bitmaps_of(facts: &DomainFacts, known: &Known, name: &str, standing: Standing) -> Vec<DiskBitmap> {
    let mut found = Vec::new();
    for disk in &facts.disks {
        if let Some(bitmap) = disk.bitmaps.iter().find(|bitmap| bitmap.name == name) {
            found.push(DiskBitmap {
                disk: disk.target.clone(),
                state: bitmap.state,
                dirty_bytes: bitmap.dirty_bytes,
                tracked: bitmap.has_checkpoint,
            });
            continue;
        }
        // of a running domain only QEMU knows that a bitmap is not there
        let would_be_seen = (!facts.running && disk.unreadable.is_none()) || facts.asked_qemu;
        let base = known.needed().find(|base| standing.is_needed() && base.name == name);
        let expected = base.is_some_and(|base| base.disks.iter().any(|(target, _)| *target == disk.target));
        if expected && would_be_seen && disk.can_track() {
            let state = BitmapState::Missing;
            found.push(DiskBitmap { disk: disk.target.clone(), state, dirty_bytes: None, tracked: false });
        }
    }
    found
}

fn why_useless(standing: Standing, disks: &[DiskBitmap]) -> Option<String> {
    match standing {
        Standing::Superseded => Some("newer points have taken its place".into()),
        Standing::Forgotten => Some("its point was forgotten".into()),
        Standing::Unknown => Some("no point of the domain names it".into()),
        Standing::AtWork | Standing::OtherRepository | Standing::Foreign => None,
        Standing::Newest | Standing::LastFull | Standing::NewestAndLastFull => {
            let is_lost = |disk: &DiskBitmap| disk.state.is_lost();
            // with nothing left to delete there is nothing to do either
            let something = disks.iter().any(|disk| disk.tracked || disk.state != BitmapState::Missing);
            (something && disks.iter().all(is_lost)).then(|| "all of its bitmaps are lost".to_owned())
        }
    }
}

#[cfg(test)]
pub(super) mod tests;

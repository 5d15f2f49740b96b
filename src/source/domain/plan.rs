//! Which disks of a domain are backed up, and since which checkpoint: pure decisions.

use std::collections::{BTreeMap, BTreeSet};

use super::xml::{Device, DiskXml};
use super::{BaseCheckpoint, DiskMode};
use crate::error::{Error, Result};

/// The disks of a domain, sorted out.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Selection {
    pub disks: Vec<DiskXml>,
    /// Target names and reasons.
    pub excluded: Vec<(String, String)>,
}

/// Sorts out which disks are backed up.
///
/// # Errors
/// [`Error::Usage`] if `include` or `exclude` name a disk that `object` does not have;
/// [`Error::Refused`] if `include` names one that cannot be backed up, or nothing is left.
pub(super) fn select(
    object: &str,
    disks: &[DiskXml],
    include: &[String],
    exclude: &[String],
) -> Result<Selection> {
    if let Some(unknown) =
        include.iter().chain(exclude).find(|name| disks.iter().all(|disk| disk.target != **name))
    {
        let known: Vec<&str> = disks.iter().map(|disk| disk.target.as_str()).collect();
        return Err(Error::Usage(format!("{object} has no disk {unknown}; it has {}", known.join(", "))));
    }
    let mut selection = Selection::default();
    for disk in disks {
        let wanted = include.contains(&disk.target);
        let reason = match obstacle(disk) {
            Some(reason) if wanted && !exclude.contains(&disk.target) => {
                return Err(refused(object, format!("disk {} cannot be backed up: {reason}", disk.target)));
            }
            Some(reason) => Some(reason),
            None if exclude.contains(&disk.target) => Some("it was excluded".into()),
            None if !include.is_empty() && !wanted => Some("it was not included".into()),
            None => None,
        };
        match reason {
            Some(reason) => selection.excluded.push((disk.target.clone(), reason)),
            None => selection.disks.push(disk.clone()),
        }
    }
    if selection.disks.is_empty() {
        let reasons: Vec<String> =
            selection.excluded.iter().map(|(disk, reason)| format!("{disk}: {reason}")).collect();
        let why = if reasons.is_empty() { "it has none".into() } else { reasons.join(", ") };
        return Err(refused(object, format!("no disk is left to back up ({why})")));
    }
    Ok(selection)
}

fn refused(object: &str, reason: String) -> Error {
    Error::Refused { object: object.to_owned(), reason, hint: None }
}

/// Returns why a disk is never backed up.
pub(super) fn obstacle(disk: &DiskXml) -> Option<String> {
    match &disk.device {
        Device::Other(device) if device == "lun" => {
            return Some("it is a SCSI device that is passed through".into());
        }
        Device::Other(device) => return Some(format!("it is a {device}")),
        Device::Disk => {}
    }
    if !disk.has_source {
        return Some("it is empty".into());
    }
    if disk.read_only {
        return Some("it is read-only".into());
    }
    if disk.shareable {
        return Some("it is shared with other domains, which may write it meanwhile".into());
    }
    if matches!(disk.kind.as_str(), "vhostuser" | "vhostvdpa" | "nvme" | "dir") {
        return Some(format!("its content does not go through QEMU ({})", disk.kind));
    }
    None
}

/// A base that was offered, and which disks have its bitmap now.
#[derive(Debug, Clone)]
pub(super) struct KnownBase {
    pub base: BaseCheckpoint,
    /// `None`: nobody knows the checkpoint any more.
    pub tracked: Option<BTreeSet<String>>,
}

/// Bitmaps that turned out to be of no use, by disk and checkpoint, with the reason.
pub(super) type Broken = BTreeMap<(String, String), String>;

/// How one disk is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Choice {
    pub mode: DiskMode,
    /// The size of the disk when its base was made, in bytes.
    pub size_then: u64,
}

/// Chooses the first base whose bitmap of the disk serves.
pub(super) fn choose(disk: &DiskXml, size: u64, bases: &[KnownBase], broken: &Broken) -> Choice {
    let mut reasons: Vec<String> = Vec::new();
    for known in bases {
        let name = &known.base.name;
        let then = known.base.disks.iter().find(|(target, _)| *target == disk.target);
        let reason = match (&known.tracked, then) {
            _ if disk.format != "qcow2" => {
                format!("an image of format {} keeps no dirty bitmap", disk.format)
            }
            (None, _) => format!("checkpoint {name} is gone"),
            (_, None) => format!("checkpoint {name} did not track it"),
            (Some(tracked), _) if !tracked.contains(&disk.target) => {
                format!("checkpoint {name} has no bitmap of it")
            }
            (_, Some((_, then))) if size < *then => format!("it shrank from {then} to {size} bytes"),
            (_, Some((_, then))) => match broken.get(&(disk.target.clone(), name.clone())) {
                Some(reason) => reason.clone(),
                None => {
                    let mode = DiskMode::Incremental { checkpoint: name.clone() };
                    return Choice { mode, size_then: *then };
                }
            },
        };
        if !reasons.contains(&reason) {
            reasons.push(reason);
        }
    }
    let reason = (!reasons.is_empty()).then(|| reasons.join("; "));
    Choice { mode: DiskMode::Full { reason }, size_then: size }
}

/// Returns the bases that serve no disk any more, by what was chosen for the disks: one counts only if all disks
/// that it tracked were asked, and all chose a later base or none.
pub(super) fn spent(bases: &[BaseCheckpoint], modes: &[(&str, &DiskMode)]) -> Vec<String> {
    let rank = |mode: &DiskMode| match mode {
        DiskMode::Incremental { checkpoint } => bases.iter().position(|base| base.name == *checkpoint),
        DiskMode::Full { .. } => Some(bases.len()),
    };
    let serves_none = |at: usize, base: &BaseCheckpoint| {
        base.disks.iter().all(|(target, _)| {
            let mode = modes.iter().find(|(disk, _)| disk == target).map(|(_, mode)| *mode);
            mode.and_then(rank).is_some_and(|chosen| chosen > at)
        })
    };
    let found = bases.iter().enumerate().filter(|(at, base)| serves_none(*at, base));
    found.map(|(_, base)| base.name.clone()).collect()
}

/// Returns which bitmaps an error of libvirt is about: those whose disk and checkpoint it quotes, else those
/// whose disk, else all, since its words may be of any language.
pub(super) fn blamed(message: &str, used: &[(String, String)]) -> Vec<(String, String)> {
    let quotes = |word: &str| message.contains(&format!("'{word}'"));
    let both = used.iter().filter(|(disk, checkpoint)| quotes(disk) && quotes(checkpoint));
    let both: Vec<_> = both.cloned().collect();
    if !both.is_empty() {
        return both;
    }
    let disks: Vec<_> = used.iter().filter(|(disk, _)| quotes(disk)).cloned().collect();
    if disks.is_empty() { used.to_vec() } else { disks }
}

#[cfg(test)]
mod tests;

//! Deleting checkpoints of our own, however much of them is left.

use super::ffi::{Fault, Guest, NO_DOMAIN_CHECKPOINT, Power};
use super::{offline, xml};
use crate::error::Result;

/// Returns the checkpoints that libvirt knows of a domain and whose names begin with `prefix`, sorted.
///
/// # Errors
/// What libvirt says.
pub(super) fn owned(guest: &Guest, prefix: &str) -> Result<Vec<String>> {
    let mut names =
        guest.checkpoints().map_err(|fault| fault.at("list the checkpoints of", guest.object()))?;
    names.retain(|name| is_owned(name, prefix));
    names.sort_unstable();
    Ok(names)
}

/// Returns true if the checkpoint is one of those whose names begin with `prefix`.
pub(super) fn is_owned(name: &str, prefix: &str) -> bool {
    // an empty prefix would own everybody's
    !prefix.is_empty() && name.starts_with(prefix)
}

/// Deletes a checkpoint and its bitmaps, whether the domain runs or not.
///
/// # Errors
/// What libvirt and qemu-img say.
pub(super) fn delete(guest: &Guest, name: &str) -> Result<()> {
    match guest.power() {
        Ok(Power::Off) => offline::delete_checkpoint(guest, name),
        _ => delete_running(guest, name),
    }
}

/// Deletes the checkpoints of ours that are not in `keep`, and tells what did not work in `warnings`.
pub(super) fn delete_superseded(guest: &Guest, prefix: &str, keep: &[&str], warnings: &mut Vec<String>) {
    let names = match guest.power() {
        Ok(Power::Off) => offline::owned(guest, prefix),
        _ => owned(guest, prefix),
    };
    let names = match names {
        Ok(names) => names,
        Err(error) => return warnings.push(format!("superseded checkpoints stay for now: {error}")),
    };
    for name in names.iter().filter(|name| !keep.contains(&name.as_str())) {
        if let Err(error) = delete(guest, name) {
            warnings.push(format!("the superseded checkpoint {name} stays for now: {error}"));
        }
    }
}

/// Deletes a checkpoint of a running domain and all of its bitmaps; one that is gone is no error.
///
/// # Errors
/// What libvirt says.
pub(super) fn delete_running(guest: &Guest, name: &str) -> Result<()> {
    let fault = match guest.checkpoint_delete(name, false) {
        Ok(()) => return Ok(()),
        Err(fault) if fault.code == NO_DOMAIN_CHECKPOINT => return Ok(()),
        Err(fault) => fault,
    };
    // One bitmap that is missing keeps libvirt from removing the others. So the checkpoint is forgotten and
    // told again, a disk at a time.
    let targets = tracked(guest, name)?.unwrap_or_default();
    if let Err(second) = guest.checkpoint_delete(name, true) {
        return if second.code == NO_DOMAIN_CHECKPOINT { Ok(()) } else { Err(at(fault, name, guest)) };
    }
    let targets: Vec<&str> = targets.iter().map(String::as_str).collect();
    delete_parts(guest, name, &targets)
}

/// Removes the bitmaps called `name` from disks of a running domain, as far as they are there. libvirt must not know
/// a checkpoint of that name; it is told of one, a disk at a time, only for it to be deleted.
///
/// # Errors
/// What libvirt says.
pub(super) fn delete_parts(guest: &Guest, name: &str, targets: &[&str]) -> Result<()> {
    for target in targets {
        let alone = xml::write_redefined(name, &[target], None, 0);
        if guest.checkpoint_redefine(&alone, false).is_ok() && guest.checkpoint_delete(name, false).is_err() {
            guest.checkpoint_delete(name, true).map_err(|fault| at(fault, name, guest))?;
        }
    }
    Ok(())
}

fn at(fault: Fault, name: &str, guest: &Guest) -> crate::error::Error {
    fault.at("delete", format_args!("checkpoint {name} of {}", guest.object()))
}

/// Returns which disks have a bitmap of a checkpoint as far as libvirt knows; `None` if it does not know the
/// checkpoint.
///
/// # Errors
/// What libvirt says.
pub(super) fn tracked(guest: &Guest, name: &str) -> Result<Option<Vec<String>>> {
    match guest.checkpoint_xml(name, false) {
        Ok(text) => {
            Ok(Some(xml::read_checkpoint(name, &text)?.into_iter().map(|disk| disk.target).collect()))
        }
        Err(fault) if fault.code == NO_DOMAIN_CHECKPOINT => Ok(None),
        Err(fault) => Err(fault.at("read", format_args!("checkpoint {name} of {}", guest.object()))),
    }
}

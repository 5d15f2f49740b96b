//! Putting right what [`Hypervisor::look`] found. Each function does one thing, and looks again before it does.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::ffi::{CHECKPOINT_INCONSISTENT, Guest, Power};
use super::{BaseCheckpoint, Hypervisor, checkpoints, live, offline, workdir, xml};
use crate::error::{Error, Result};

/// How long another program's job may take to end.
const ENDING: Duration = Duration::from_secs(30);
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

impl Hypervisor {
    /// Deletes a checkpoint with its bitmaps, and bitmaps of its name on the disks `targets` that libvirt does not
    /// know of. `name` has to begin with `prefix`: others' are never touched.
    ///
    /// # Errors
    /// [`Error::Refused`] for another's; what libvirt and qemu-img say.
    pub fn delete_checkpoint(
        &self,
        domain: &str,
        prefix: &str,
        name: &str,
        targets: &[String],
    ) -> Result<()> {
        let guest = self.guest(domain)?;
        owned(&guest, prefix, name)?;
        if is_off(&guest)? {
            return offline::delete_checkpoint(&guest, name);
        }
        let tracked = checkpoints::tracked(&guest, name)?.unwrap_or_default();
        checkpoints::delete_running(&guest, name)?;
        let others: Vec<&str> =
            targets.iter().filter(|target| !tracked.contains(target)).map(String::as_str).collect();
        checkpoints::delete_parts(&guest, name, &others)
    }

    /// Takes disks whose bitmaps are of no use out of a checkpoint, and what is left of those bitmaps out of the
    /// images. The checkpoint serves the other disks as before.
    ///
    /// If this is cut off, libvirt may have forgotten the checkpoint, but the bitmaps of the other disks record on,
    /// and the next backup tells libvirt of them.
    ///
    /// # Errors
    /// As [`Hypervisor::delete_checkpoint`].
    pub fn narrow_checkpoint(&self, domain: &str, prefix: &str, name: &str, broken: &[String]) -> Result<()> {
        let guest = self.guest(domain)?;
        owned(&guest, prefix, name)?;
        let at = |fault: super::ffi::Fault| {
            fault.at("change", format_args!("checkpoint {name} of {}", guest.object()))
        };
        let text = guest.checkpoint_xml(name, false).map_err(at)?;
        let (created, parent) = xml::read_origin(name, &text)?;
        let tracked: Vec<String> =
            xml::read_checkpoint(name, &text)?.into_iter().map(|disk| disk.target).collect();
        let parts = |of_broken: bool| -> Vec<&str> {
            let wanted = tracked.iter().filter(|target| broken.contains(target) == of_broken);
            wanted.map(String::as_str).collect()
        };
        let (lost, kept) = (parts(true), parts(false));
        guest.checkpoint_delete(name, true).map_err(at)?;
        // whatever comes of the lost ones: libvirt has to know of the others again
        let removed = if is_off(&guest)? {
            offline::remove_bitmaps(&guest, name, &lost)
        } else {
            checkpoints::delete_parts(&guest, name, &lost)
        };
        if !kept.is_empty() {
            let told = xml::write_redefined(name, &kept, parent.as_deref(), created);
            guest.checkpoint_redefine(&told, false).map_err(at)?;
        }
        removed
    }

    /// Tells libvirt of a checkpoint that it lost; of one of a running domain only if its bitmaps are there and sound.
    /// Returns whether they are.
    ///
    /// # Errors
    /// What libvirt says.
    pub fn tell_checkpoint(&self, domain: &str, base: &BaseCheckpoint, created: i64) -> Result<bool> {
        let guest = self.guest(domain)?;
        let name = &base.name;
        let targets: Vec<&str> = base.disks.iter().map(|(target, _)| target.as_str()).collect();
        let leaves = guest.leaves().unwrap_or_default();
        let parent = if let [leaf] = &leaves[..] { Some(leaf.as_str()) } else { None };
        let text = xml::write_redefined(name, &targets, parent, created);
        let running = !is_off(&guest)?;
        match guest.checkpoint_redefine(&text, running) {
            Ok(()) => Ok(true),
            Err(fault) if fault.code == CHECKPOINT_INCONSISTENT => Ok(false),
            Err(fault) => {
                Err(fault.at("be told of", format_args!("checkpoint {name} of {}", guest.object())))
            }
        }
    }

    /// Ends the backup job of a vmkeep that is gone, and removes its directory.
    ///
    /// # Errors
    /// [`Error::Busy`] if that vmkeep is at work after all; what libvirt says.
    pub fn end_dead_job(&self, domain: &str, socket: &Path) -> Result<()> {
        let guest = self.guest(domain)?;
        if workdir::owner_of(socket) != workdir::Owner::Dead {
            let why = format!("another vmkeep is backing it up (NBD socket {})", socket.display());
            return Err(Error::Busy { object: guest.object(), why });
        }
        live::stop(&guest, socket)?;
        workdir::remove_dead(socket);
        Ok(())
    }

    /// Ends the backup job that runs, whosever it is, if it still is the one that listens at `socket`.
    ///
    /// # Errors
    /// [`Error::Busy`] if it is another one, or does not end; what libvirt says.
    pub fn end_foreign_job(&self, domain: &str, socket: Option<&Path>) -> Result<()> {
        let guest = self.guest(domain)?;
        let busy = |why: &str| Error::Busy { object: guest.object(), why: why.to_owned() };
        match running_job(&guest)? {
            None => return Ok(()),
            Some(found) if found.as_deref() != socket => {
                return Err(busy("another backup job runs on it by now"));
            }
            Some(_) => {}
        }
        guest.abort_job().map_err(|fault| fault.at("end the backup job of", guest.object()))?;
        let patience = Instant::now();
        while running_job(&guest)?.is_some_and(|found| found.as_deref() == socket) {
            if patience.elapsed() > ENDING {
                return Err(busy("its backup job was told to end and still runs"));
            }
            thread::sleep(BETWEEN_LOOKS);
        }
        Ok(())
    }

    /// Has the guest agent thaw the file systems.
    ///
    /// # Errors
    /// What libvirt says.
    pub fn thaw(&self, domain: &str) -> Result<()> {
        let guest = self.guest(domain)?;
        guest.thaw().map_err(|fault| fault.at("thaw", guest.object()))
    }
}

/// Returns the socket of the backup job that runs, if it has one.
fn running_job(guest: &Guest) -> Result<Option<Option<std::path::PathBuf>>> {
    let text = guest.backup_xml().map_err(|fault| fault.at("look at the backup job of", guest.object()))?;
    text.map(|text| xml::read_backup_socket(guest.name(), &text)).transpose()
}

fn is_off(guest: &Guest) -> Result<bool> {
    Ok(guest.power().map_err(|fault| fault.at("look at", guest.object()))? == Power::Off)
}

fn owned(guest: &Guest, prefix: &str, name: &str) -> Result<()> {
    if checkpoints::is_owned(name, prefix) {
        return Ok(());
    }
    Err(Error::Refused {
        object: format!("checkpoint {name} of {}", guest.object()),
        reason: format!("it is not of this repository, whose checkpoints begin with {prefix:?}"),
        hint: None,
    })
}

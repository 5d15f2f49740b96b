//! Doing what findings say, and finding out whether it helped.

use std::path::Path;

use super::domain::{Case, GONE, examine, gone};
use super::{Diagnosis, DoctorOptions, Remedy, shown, told};
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::ops::backup::checkpoint_prefix;
use crate::ops::checkpoints::{Known, is_locked};
use crate::repo::Repository;
use crate::source::domain::{Hypervisor, JobDirState, belongs_to, job_dirs, remove_job_dir, scratch_place};
use crate::source::qemu_nbd::stale_directories;

/// Says what a remedy does.
pub(super) fn describe(remedy: &Remedy) -> String {
    match remedy {
        Remedy::EndDeadJob { socket } => {
            format!("ends the job and removes {}", socket.parent().map(shown).unwrap_or_default())
        }
        Remedy::EndForeignJob { .. } => "ends the other program's job".into(),
        Remedy::Thaw => "has the guest agent thaw the file systems".into(),
        Remedy::DeleteCheckpoint { name, disks } if disks.is_empty() => format!("deletes checkpoint {name}"),
        Remedy::DeleteCheckpoint { name, disks } => {
            format!("deletes checkpoint {name} and its bitmaps on {}", disks.join(", "))
        }
        Remedy::NarrowCheckpoint { name, broken } => {
            format!(
                "takes {} out of checkpoint {name}, which goes on serving the other disks",
                broken.join(", ")
            )
        }
        Remedy::TellCheckpoint { base, .. } => format!("tells libvirt of checkpoint {} again", base.name),
        Remedy::RemoveJobDir { path } | Remedy::RemoveDirectory { path } => {
            format!("removes {}", shown(path))
        }
    }
}

/// Says what a remedy did.
fn describe_done(remedy: &Remedy) -> String {
    match remedy {
        Remedy::EndDeadJob { socket } => {
            format!("ended the job and removed {}", socket.parent().map(shown).unwrap_or_default())
        }
        Remedy::EndForeignJob { .. } => "ended the other program's job".into(),
        Remedy::Thaw => "had the guest agent thaw the file systems".into(),
        Remedy::DeleteCheckpoint { name, disks } if disks.is_empty() => format!("deleted checkpoint {name}"),
        Remedy::DeleteCheckpoint { name, disks } => {
            format!("deleted checkpoint {name} and its bitmaps on {}", disks.join(", "))
        }
        Remedy::NarrowCheckpoint { name, broken } => {
            format!(
                "took {} out of checkpoint {name}, which goes on serving the other disks",
                broken.join(", ")
            )
        }
        Remedy::TellCheckpoint { base, .. } => format!("told libvirt of checkpoint {} again", base.name),
        Remedy::RemoveJobDir { path } | Remedy::RemoveDirectory { path } => {
            format!("removed {}", shown(path))
        }
    }
}

/// What it takes to look after domains.
pub(super) struct Visit<'a> {
    pub hypervisor: &'a Hypervisor,
    pub repository: Option<&'a Repository>,
    pub options: &'a DoctorOptions,
    pub monitor: &'a dyn Monitor,
}

impl Visit<'_> {
    /// Looks after one domain; returns what was found, and the domain's UUID where it could be told.
    ///
    /// # Errors
    /// [`Error::Cancelled`]
    pub fn domain(&self, name: &str) -> Result<(Vec<Diagnosis>, Option<String>)> {
        let change = self.options.fix && !self.options.dry_run;
        // what a backup that runs has made looks like a killed one's
        let lock = match self.repository {
            Some(repository) if change => Some(repository.lock_domain(name)),
            _ => None,
        };
        let locked_out = match (&lock, self.repository) {
            (Some(taken), _) => matches!(taken, Err(Error::Busy { .. })),
            (None, Some(repository)) => is_locked(repository, name),
            (None, None) => false,
        };
        let (mut found, uuid) = match self.examine(name, locked_out) {
            Ok(seen) => seen,
            Err(Error::Cancelled) => return Err(Error::Cancelled),
            Err(error) => return Ok((vec![unreadable(name, &error)], None)),
        };
        if !change || found.iter().all(|diagnosis| diagnosis.remedy.is_none()) {
            return Ok((found, Some(uuid)));
        }
        if let Some(Err(error)) = &lock {
            for diagnosis in found.iter_mut().filter(|diagnosis| diagnosis.remedy.is_some()) {
                diagnosis.failure = Some(told(error));
            }
            return Ok((found, Some(uuid)));
        }
        self.treat(name, &mut found);
        match self.examine(name, locked_out) {
            Ok((left, _)) => check(&mut found, left),
            // what was done has to be told, though nobody looked whether it helped
            Err(Error::Cancelled) => {}
            Err(error) => found.push(unreadable(name, &error)),
        }
        Ok((found, Some(uuid)))
    }

    fn examine(&self, name: &str, locked_out: bool) -> Result<(Vec<Diagnosis>, String)> {
        let facts = self.hypervisor.look(name, self.options.ask_qemu)?;
        let known = match self.repository {
            Some(repository) => match Known::of(repository, &facts, locked_out, self.monitor) {
                Err(Error::Cancelled) => return Err(Error::Cancelled),
                // a catalog that cannot be read has been told of
                known => known.ok(),
            },
            None => None,
        };
        let place = scratch_place(self.options.scratch_dir.as_deref());
        let case = Case {
            known: known.as_ref(),
            place: &place,
            named: self.options.domain.is_some(),
            end_job: self.options.end_job,
        };
        Ok((examine(&facts, &case), facts.uuid))
    }

    /// Applies each remedy once, jobs before checkpoints: they come in that order. Stops when it is cancelled.
    fn treat(&self, name: &str, found: &mut [Diagnosis]) {
        let mut applied: Vec<(Remedy, Result<(), String>)> = Vec::new();
        for diagnosis in found {
            if self.monitor.is_cancelled() {
                return;
            }
            let Some(remedy) = diagnosis.remedy.clone() else { continue };
            let result = match applied.iter().find(|(known, _)| *known == remedy) {
                Some((_, result)) => result.clone(),
                None => match (self.apply(name, &remedy), &remedy) {
                    // libvirt had a look, and now it is known
                    (Ok(false), Remedy::TellCheckpoint { base, .. }) => {
                        *diagnosis = gone(name, &base.name);
                        continue;
                    }
                    (result, _) => {
                        let result = result.map(|_| ()).map_err(|error| told(&error));
                        applied.push((remedy.clone(), result.clone()));
                        result
                    }
                },
            };
            match result {
                Ok(()) => diagnosis.done = Some(describe_done(&remedy)),
                Err(failure) => diagnosis.failure = Some(failure),
            }
        }
    }

    /// Returns false if it turned out that there is nothing to be mended.
    fn apply(&self, domain: &str, remedy: &Remedy) -> Result<bool> {
        let hypervisor = self.hypervisor;
        let prefix = self.repository.map(|repository| checkpoint_prefix(repository.id())).unwrap_or_default();
        match remedy {
            Remedy::EndDeadJob { socket } => hypervisor.end_dead_job(domain, socket)?,
            Remedy::EndForeignJob { socket } => hypervisor.end_foreign_job(domain, socket.as_deref())?,
            Remedy::Thaw => hypervisor.thaw(domain)?,
            Remedy::DeleteCheckpoint { name, disks } => {
                hypervisor.delete_checkpoint(domain, &prefix, name, disks)?;
            }
            Remedy::NarrowCheckpoint { name, broken } => {
                hypervisor.narrow_checkpoint(domain, &prefix, name, broken)?;
            }
            Remedy::TellCheckpoint { base, created } => {
                return hypervisor.tell_checkpoint(domain, base, *created);
            }
            Remedy::RemoveJobDir { path } => remove_job_dir(path)?,
            Remedy::RemoveDirectory { path } => remove_directory(path)?,
        }
        Ok(true)
    }
}

fn remove_directory(path: &Path) -> Result<()> {
    std::fs::remove_dir_all(path).map_err(|error| Error::io("remove", path.display(), error))
}

/// What is not there any more was mended; what is there only now is added.
fn check(found: &mut Vec<Diagnosis>, left: Vec<Diagnosis>) {
    for diagnosis in found.iter_mut().filter(|diagnosis| diagnosis.remedy.is_some()) {
        let is_left = left.iter().any(|other| other.is_same(diagnosis));
        diagnosis.mended = diagnosis.failure.is_none() && !is_left;
        if is_left && diagnosis.failure.is_none() {
            diagnosis.failure = Some("it is still there".into());
        }
    }
    for mut other in left {
        // what is known to have been deleted is not asked about
        let is_deleted = |diagnosis: &Diagnosis| {
            let by_us = matches!(diagnosis.remedy, Some(Remedy::DeleteCheckpoint { .. })) && diagnosis.mended;
            (by_us || diagnosis.kind == GONE) && diagnosis.checkpoint == other.checkpoint
        };
        let is_told = matches!(other.remedy, Some(Remedy::TellCheckpoint { .. }));
        if let (true, Some(domain), Some(name)) = (is_told, &other.domain, &other.checkpoint)
            && found.iter().any(is_deleted)
        {
            other = gone(domain, name);
        }
        if found.iter().all(|diagnosis| !other.is_same(diagnosis)) {
            found.push(other);
        }
    }
}

fn unreadable(name: &str, error: &Error) -> Diagnosis {
    let mut found = Diagnosis::problem("domain-unreadable", told(error))
        .means("a backup of the domain fails in the same way")
        .advise(format!("`virsh dominfo {name}`, and the log of libvirt's daemon"));
    found.domain = Some(name.to_owned());
    found
}

/// Looks for directories that dead runs left, of the domains `uuids` or, without a domain in the options, of all.
pub(super) fn directories(options: &DoctorOptions, uuids: &[String], now_ms: i64) -> Vec<Diagnosis> {
    let mut found = Vec::new();
    for directory in job_dirs(&scratch_place(options.scratch_dir.as_deref()).path, now_ms / 1000) {
        if options.domain.is_some() && !uuids.iter().any(|uuid| belongs_to(&directory, uuid)) {
            continue;
        }
        let path = shown(&directory.path);
        let bytes = directory.bytes;
        found.extend(match directory.state {
            JobDirState::InUse => None,
            JobDirState::Dead => Some(
                Diagnosis::problem("leftover-directory", format!("a run that was killed left {path} ({bytes} bytes)"))
                    .means("nothing for the next backup, which removes it if it is of the same domain; until then it takes space")
                    .advise("`vmkeep doctor --fix`")
                    .mend_by(Remedy::RemoveJobDir { path: directory.path }),
            ),
            // of a job on a domain that was looked at, more was told there
            JobDirState::Serving => Some(
                Diagnosis::note("leftover-directory-in-use", format!("something still listens in {path} ({bytes} bytes), which a killed run made"))
                    .means("the job of that run goes on in a domain, perhaps of another libvirt")
                    .advise("`vmkeep doctor DOMAIN --fix` with the URI of that libvirt ends it"),
            ),
        });
    }
    if options.domain.is_none() {
        found.extend(stale_directories(&options.temp_dir, now_ms).into_iter().map(|path| {
            let what = format!("a qemu-nbd of a killed run left {} with its socket", shown(&path));
            Diagnosis::problem("stale-socket", what)
                .means("nothing for the next backup")
                .advise("`vmkeep doctor --fix`")
                .mend_by(Remedy::RemoveDirectory { path })
        }));
    }
    if options.fix && !options.dry_run {
        for diagnosis in &mut found {
            remove(diagnosis);
        }
    }
    found
}

fn remove(diagnosis: &mut Diagnosis) {
    let removed = match &diagnosis.remedy {
        Some(Remedy::RemoveJobDir { path }) => remove_job_dir(path),
        Some(Remedy::RemoveDirectory { path }) => remove_directory(path),
        _ => return,
    };
    match removed {
        Ok(()) => {
            diagnosis.done = diagnosis.remedy.as_ref().map(describe_done);
            diagnosis.mended = true;
        }
        Err(error) => diagnosis.failure = Some(told(&error)),
    }
}

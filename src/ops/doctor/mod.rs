//! What keeps backups from being made, or from being small: each thing that is wrong, what it means for the next
//! backup, and what to do about it.
//!
//! Looking changes nothing. Mending is looking, doing what each finding says, and looking again: what is still
//! there then was not mended, whatever the doing returned. Nothing is done to checkpoints, bitmaps or jobs of
//! others, but for a job that the user wants to have ended.

mod domain;
mod host;
mod mend;

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::repo::Repository;
use crate::source::domain::{BaseCheckpoint, Hypervisor};

/// What to look at and whether to mend it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DoctorOptions {
    /// Only this domain; `None`: the host and all domains.
    pub domain: Option<String>,
    pub fix: bool,
    /// With `fix`: only say what would be done.
    pub dry_run: bool,
    /// With `fix`: end the backup job of another program on the domain.
    pub end_job: bool,
    /// Ask QEMU itself for its bitmaps, which taints the domains.
    pub ask_qemu: bool,
    /// Where backups make their scratch files; `/var/tmp` by default.
    pub scratch_dir: Option<PathBuf>,
    /// Where programs make temporary files.
    pub temp_dir: PathBuf,
    pub cache_dir: Option<PathBuf>,
}

/// What there is to work with; an error is the first finding.
pub struct Surroundings<'a> {
    pub repository: std::result::Result<&'a Repository, &'a Error>,
    pub hypervisor: std::result::Result<&'a Hypervisor, &'a Error>,
    /// What was said when the repository was opened: of the local index, as a rule.
    pub remarks: Vec<String>,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Something is not as it should be.
    Problem,
    /// Good to know; it may well be meant to be so.
    Note,
}

/// What can be done about a finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Remedy {
    EndDeadJob { socket: PathBuf },
    EndForeignJob { socket: Option<PathBuf> },
    Thaw,
    DeleteCheckpoint { name: String, disks: Vec<String> },
    NarrowCheckpoint { name: String, broken: Vec<String> },
    TellCheckpoint { base: BaseCheckpoint, created: i64 },
    RemoveJobDir { path: PathBuf },
    RemoveDirectory { path: PathBuf },
}

/// One thing that the doctor noticed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Diagnosis {
    /// A word for programs: it stays the same when the texts change.
    pub kind: &'static str,
    pub severity: Severity,
    /// `None`: it is about the host or the repository.
    pub domain: Option<String>,
    pub disks: Vec<String>,
    pub checkpoint: Option<String>,
    /// What is wrong.
    pub problem: String,
    /// What it means for the next backup.
    pub meaning: String,
    /// What helps.
    pub advice: String,
    #[serde(skip)]
    pub remedy: Option<Remedy>,
    /// What mending does; `None`: it has to be done by hand, or by a backup.
    pub fix: Option<String>,
    /// What was done about it.
    pub done: Option<String>,
    /// What went wrong with that.
    pub failure: Option<String>,
    /// It is gone.
    pub mended: bool,
}

impl Diagnosis {
    fn new(severity: Severity, kind: &'static str, problem: impl Into<String>) -> Self {
        Self {
            kind,
            severity,
            domain: None,
            disks: Vec::new(),
            checkpoint: None,
            problem: problem.into(),
            meaning: String::new(),
            advice: String::new(),
            remedy: None,
            fix: None,
            done: None,
            failure: None,
            mended: false,
        }
    }

    fn problem(kind: &'static str, problem: impl Into<String>) -> Self {
        Self::new(Severity::Problem, kind, problem)
    }

    fn note(kind: &'static str, problem: impl Into<String>) -> Self {
        Self::new(Severity::Note, kind, problem)
    }

    fn means(mut self, meaning: impl Into<String>) -> Self {
        self.meaning = meaning.into();
        self
    }

    fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = advice.into();
        self
    }

    fn of_disk(mut self, target: &str) -> Self {
        self.disks.push(target.to_owned());
        self
    }

    fn of_checkpoint(mut self, name: &str) -> Self {
        self.checkpoint = Some(name.to_owned());
        self
    }

    fn mend_by(mut self, remedy: Remedy) -> Self {
        self.fix = Some(mend::describe(&remedy));
        self.remedy = Some(remedy);
        self
    }

    /// Returns true if both are about the same thing.
    fn is_same(&self, other: &Self) -> bool {
        (self.kind, &self.domain, &self.disks, &self.checkpoint)
            == (other.kind, &other.domain, &other.disks, &other.checkpoint)
    }
}

/// Versions of what backups are made with; `None`: not there, or it does not say.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct HostFacts {
    pub libvirt: Option<String>,
    pub qemu: Option<String>,
    pub qemu_img: Option<String>,
    pub qemu_nbd: Option<String>,
}

/// All that was found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct DoctorReport {
    pub host: HostFacts,
    /// The domains that were looked at.
    pub domains: Vec<String>,
    pub findings: Vec<Diagnosis>,
    /// Problems that are left, without notes.
    pub problems: usize,
    /// Findings that were mended.
    pub mended: usize,
    pub fix: bool,
    pub dry_run: bool,
}

/// Looks for what is wrong with the host and with all domains, or with one, and mends what can be mended safely.
///
/// Cancelled, it returns what it found and did until then.
///
/// # Errors
/// [`Error::NotFound`] for a domain that does not exist; [`Error::Unreachable`] if libvirt is and a domain is named.
/// All else that is wrong is a finding.
pub fn doctor(
    surroundings: &Surroundings<'_>,
    options: &DoctorOptions,
    monitor: &dyn Monitor,
) -> Result<DoctorReport> {
    let mut report = DoctorReport { fix: options.fix, dry_run: options.dry_run, ..DoctorReport::default() };
    report.findings = host::examine(surroundings, options, &mut report.host, monitor)?;
    match (&options.domain, surroundings.hypervisor) {
        (Some(name), Ok(hypervisor)) => {
            // one that does not exist is a mistake of the caller, not a finding
            hypervisor.look(name, false)?;
            report.domains.push(name.clone());
        }
        (None, Ok(hypervisor)) => report.domains = hypervisor.domains()?,
        (_, Err(_)) => {}
    }
    if let Ok(hypervisor) = surroundings.hypervisor {
        let mut uuids = Vec::new();
        // what was done has to be told: whoever cancels gets the report of what was looked at
        for name in report.domains.iter().take_while(|_| !monitor.is_cancelled()) {
            let visit =
                mend::Visit { hypervisor, repository: surroundings.repository.ok(), options, monitor };
            let (findings, uuid) = match visit.domain(name) {
                Err(Error::Cancelled) => break,
                seen => seen?,
            };
            report.findings.extend(findings);
            uuids.extend(uuid);
        }
        // last: ending a job takes its directory along
        report.findings.extend(mend::directories(options, &uuids, now_ms(surroundings)));
    } else if options.domain.is_none() {
        report.findings.extend(mend::directories(options, &[], now_ms(surroundings)));
    }
    let left = |found: &&Diagnosis| found.severity == Severity::Problem && !found.mended;
    report.problems = report.findings.iter().filter(left).count();
    report.mended = report.findings.iter().filter(|found| found.mended).count();
    Ok(report)
}

/// The clock of the repository's environment; without one nothing is old enough to be nobody's.
fn now_ms(surroundings: &Surroundings<'_>) -> i64 {
    surroundings.repository.map_or(0, |repository| (repository.environment().now_ms)())
}

/// Returns an error with its causes in one line.
fn told(error: &Error) -> String {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        text.push_str(&format!(": {cause}"));
        next = cause.source();
    }
    text
}

/// Returns how a path is written in a sentence.
fn shown(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests;

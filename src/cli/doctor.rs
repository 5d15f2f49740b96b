//! `vmkeep doctor`.

use std::path::PathBuf;

use vmkeep::error::Result;

use super::App;
use super::exit::Exit;

#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  vmkeep doctor
  vmkeep doctor web01 --fix
  vmkeep doctor web01 --fix --end-job

Says what keeps backups from being made or from being small, and what helps: checkpoints without bitmaps, bitmaps \
without checkpoints, inconsistent ones, jobs, sockets, scratch files and checkpoints that killed runs left, disks \
that can have no bitmap, a guest agent that is silent, a repository, cache or scratch directory that cannot be used. \
Without --fix nothing is changed. With it, what is mended is this repository's own and what dead runs left; another \
program's job is ended only with --end-job, and frozen file systems are thawed only if the domain is named.

Exit codes: 0 nothing is wrong, or all of it was mended; 3 something is left. Notes do not count.")]
pub struct Args {
    /// Only this domain; else the host and all domains
    #[arg(value_name = "DOMAIN")]
    domain: Option<String>,
    /// Mend what can be mended safely
    #[arg(long)]
    fix: bool,
    /// With --fix: only say what would be done
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// With --fix: end the backup job of another program on the domain
    #[arg(long, requires = "fix", requires = "domain")]
    end_job: bool,
    /// Ask QEMU itself for its bitmaps; libvirt calls the domains tainted then
    #[arg(long)]
    ask_qemu: bool,
    /// Where backups keep what the guest overwrites meanwhile
    #[arg(long, value_name = "DIR")]
    scratch_dir: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// A domain that does not exist; libvirt is not reached although a domain is named.
#[cfg(not(feature = "libvirt"))]
pub fn run(args: &Args, _app: &App) -> Result<Exit> {
    let _ = (&args.domain, args.fix, args.dry_run, args.end_job, args.ask_qemu, &args.scratch_dir);
    Err(vmkeep::error::Error::Usage("this build has no libvirt: there is nothing to look after".into()))
}

/// Runs the command.
///
/// # Errors
/// A domain that does not exist; libvirt is not reached although a domain is named;
/// [`vmkeep::error::Error::Cancelled`], after it told what was done.
#[cfg(feature = "libvirt")]
pub fn run(args: &Args, app: &App) -> Result<Exit> {
    with_libvirt::run(args, app)
}

#[cfg(feature = "libvirt")]
mod with_libvirt {
    use serde::Serialize;
    use vmkeep::error::Result;
    use vmkeep::monitor::{Monitor, Recorder};
    use vmkeep::ops::doctor::{Diagnosis, DoctorOptions, DoctorReport, Severity, Surroundings, doctor};
    use vmkeep::repo::Repository;
    use vmkeep::source::domain::Hypervisor;
    use vmkeep::storage;

    use super::super::progress::Progress;
    use super::super::work::environment;
    use super::super::{App, signals, units};
    use super::{Args, Exit};

    #[derive(Debug, Serialize)]
    struct DoctorView<'a> {
        message_type: &'static str,
        #[serde(flatten)]
        report: &'a DoctorReport,
    }

    /// Runs the command.
    pub fn run(args: &Args, app: &App) -> Result<Exit> {
        let settings = &app.settings;
        let cache_dir = settings.cache_dir.as_ref().map(|(path, _)| path.clone());
        // what is said on the way is part of the findings
        let recorder = Recorder::new();
        let repository = settings.repository().and_then(|url| {
            Repository::open(storage::open_url(url)?, cache_dir.as_deref(), &environment()?, &recorder)
        });
        if let Ok(repository) = &repository {
            repository.open_local_index(&recorder);
        }
        let hypervisor = Hypervisor::connect(settings.connect.as_ref().map(|(uri, _)| uri.as_str()));
        let surroundings = Surroundings {
            repository: repository.as_ref(),
            hypervisor: hypervisor.as_ref(),
            remarks: recorder.notes(),
        };
        let options = DoctorOptions {
            domain: args.domain.clone(),
            fix: args.fix,
            dry_run: args.dry_run,
            end_job: args.end_job,
            ask_qemu: args.ask_qemu,
            scratch_dir: args.scratch_dir.clone().or_else(|| settings.backup.scratch_dir.clone()),
            temp_dir: std::env::temp_dir(),
            cache_dir,
        };
        let progress = Progress::new(&app.output, settings.progress_fps.as_ref().map(|(fps, _)| *fps));
        if args.fix {
            signals::install(&progress.cancelled())?;
        }
        let report = doctor(&surroundings, &options, &progress)?;
        progress.clear();
        if app.output.json {
            app.output.json_line(&DoctorView { message_type: "summary", report: &report })?;
        } else {
            print(app, &report)?;
        }
        progress.check()?;
        Ok(if report.problems == 0 { Exit::Done } else { Exit::Incomplete })
    }

    fn print(app: &App, report: &DoctorReport) -> Result<()> {
        let unknown = || "not found".to_owned();
        let host = &report.host;
        let version = |found: &Option<String>| found.clone().unwrap_or_else(unknown);
        app.output.remark(&format!(
            "libvirt {}, QEMU {}, qemu-img {}, qemu-nbd {}; looked at {}",
            version(&host.libvirt),
            version(&host.qemu),
            version(&host.qemu_img),
            version(&host.qemu_nbd),
            units::count(report.domains.len(), "domain")
        ));
        for found in &report.findings {
            // with -q only what is wrong
            if found.severity == Severity::Problem || !app.output.quiet {
                app.output.line(&text(found, report))?;
            }
        }
        let problems = report.problems;
        let mended = if report.mended > 0 { format!(", {} mended", report.mended) } else { String::new() };
        if problems == 0 && report.mended == 0 {
            app.output.remark("nothing is wrong");
        } else {
            let left = if report.fix && !report.dry_run { " left" } else { "" };
            app.output.remark(&format!("{}{left}{mended}", units::count(problems, "problem")));
        }
        Ok(())
    }

    /// Returns one finding as a line, with lines below it that are set in.
    fn text(found: &Diagnosis, report: &DoctorReport) -> String {
        let word = match (found.severity, found.mended) {
            (_, true) => "mended",
            (Severity::Problem, false) => "problem",
            (Severity::Note, false) => "note",
        };
        let object = found.domain.as_ref().map(|domain| format!("{domain}: ")).unwrap_or_default();
        let mut text = format!("{word}: {object}{}", found.problem);
        let mut add = |title: &str, line: &str| text.push_str(&format!("\n  {title}: {line}"));
        if let Some(done) = &found.done {
            add("done", done);
        }
        if let Some(failure) = &found.failure {
            add("not mended", failure);
        }
        if !found.mended {
            add("means", &found.meaning);
            add("help", &found.advice);
            if let (Some(fix), true) = (&found.fix, found.done.is_none() && found.failure.is_none()) {
                add(if report.fix { "would do" } else { "--fix" }, fix);
            }
        }
        text
    }
}

//! `vmkeep checkpoints`.

use vmkeep::error::Result;

use super::App;
use super::exit::Exit;

#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  vmkeep checkpoints web01
  vmkeep checkpoints web01 --gc -n
  vmkeep checkpoints web01 --gc -y

Lists what libvirt, QEMU and the repository each know: the checkpoint, its bitmap on each disk, the point that left \
it. Of a domain that runs, libvirt says which bitmaps of its checkpoints serve, and the images say which others there \
were when it started; --ask-qemu asks QEMU as well. --gc deletes the checkpoints of this repository that can serve no \
backup any more, as each backup does; those of the last full and of the newest point stay while a bitmap of theirs \
serves. Checkpoints of others are never touched.")]
pub struct Args {
    /// The domain
    #[arg(value_name = "DOMAIN")]
    domain: String,
    /// Delete this repository's checkpoints that can serve no backup any more
    #[arg(long)]
    gc: bool,
    /// With --gc: only say which would be deleted
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// With --gc: do not ask
    #[arg(short, long)]
    yes: bool,
    /// Ask QEMU itself for its bitmaps; libvirt calls the domain tainted then
    #[arg(long)]
    ask_qemu: bool,
}

/// Runs the command.
///
/// # Errors
/// Those of libvirt and of the repository.
#[cfg(not(feature = "libvirt"))]
pub fn run(args: &Args, _app: &App) -> Result<Exit> {
    let _ = (&args.domain, args.gc, args.dry_run, args.yes, args.ask_qemu);
    Err(vmkeep::error::Error::Usage("this build has no libvirt, so it knows of no checkpoints".into()))
}

/// Runs the command.
///
/// # Errors
/// Those of libvirt and of the repository; [`vmkeep::error::Error::Cancelled`] if the user does not agree.
#[cfg(feature = "libvirt")]
pub fn run(args: &Args, app: &App) -> Result<Exit> {
    with_libvirt::run(args, app)
}

#[cfg(feature = "libvirt")]
mod with_libvirt {
    use serde::Serialize;
    use vmkeep::error::{Error, Result};
    use vmkeep::ops::checkpoints::{
        CheckpointsOptions, CheckpointsReport, DiskBitmap, Standing, checkpoints,
    };
    use vmkeep::source::domain::{BitmapState, Hypervisor};

    use super::super::output::{Table, confirm};
    use super::super::work::Work;
    use super::super::{App, units};
    use super::{Args, Exit};

    #[derive(Debug, Serialize)]
    struct CheckpointView<'a> {
        checkpoint: &'a str,
        standing: Standing,
        point: Option<String>,
        /// RFC 3339, UTC.
        created: Option<String>,
        disks: &'a [DiskBitmap],
        useless: Option<&'a str>,
        deleted: bool,
    }

    #[derive(Debug, Serialize)]
    struct CheckpointsView<'a> {
        message_type: &'static str,
        domain: &'a str,
        running: bool,
        asked_qemu: bool,
        checkpoints: Vec<CheckpointView<'a>>,
        warnings: &'a [String],
        dry_run: bool,
    }

    /// Runs the command.
    pub fn run(args: &Args, app: &App) -> Result<Exit> {
        let work = Work::open(app)?;
        let hypervisor = Hypervisor::connect(app.settings.connect.as_ref().map(|(uri, _)| uri.as_str()))?;
        let mut options = CheckpointsOptions {
            domain: args.domain.clone(),
            gc: false,
            dry_run: args.dry_run,
            ask_qemu: args.ask_qemu,
        };
        let mut report = checkpoints(&work.repository, &hypervisor, &options, &work.progress)?;
        let names = |report: &CheckpointsReport| -> Vec<String> {
            let useless = report.checkpoints.iter().filter(|found| found.useless.is_some());
            useless.map(|found| found.name.clone()).collect()
        };
        let useless = names(&report);
        if args.gc && !args.dry_run && !useless.is_empty() {
            agree(args, app, &report, &useless)?;
            work.watch_signals()?;
            options.gc = true;
            report = checkpoints(&work.repository, &hypervisor, &options, &work.progress)?;
        }
        work.progress.clear();
        if app.output.json {
            app.output.json_line(&view(&report))?;
            return Ok(exit(&report));
        }
        for warning in &report.warnings {
            app.output.remark(&format!("warning: {warning}"));
        }
        if !args.gc {
            app.output.bytes(table(&report, &work).render().as_bytes())?;
        } else if !app.output.quiet {
            let told = if args.dry_run { useless } else { deleted(&report) };
            let verb = if args.dry_run { "would delete" } else { "deleted" };
            let list = if told.is_empty() { String::new() } else { format!(": {}", told.join(", ")) };
            app.output.line(&format!("{verb} {}{list}", units::count(told.len(), "checkpoint")))?;
        }
        Ok(exit(&report))
    }

    fn deleted(report: &CheckpointsReport) -> Vec<String> {
        report.checkpoints.iter().filter(|found| found.deleted).map(|found| found.name.clone()).collect()
    }

    /// What could not be deleted harms nothing, but was asked for.
    fn exit(report: &CheckpointsReport) -> Exit {
        if report.warnings.is_empty() { Exit::Done } else { Exit::Incomplete }
    }

    fn agree(args: &Args, app: &App, report: &CheckpointsReport, useless: &[String]) -> Result<()> {
        if args.yes {
            return Ok(());
        }
        for found in report.checkpoints.iter().filter(|found| found.useless.is_some()) {
            app.output.remark(&format!("{}: {}", found.name, found.useless.as_deref().unwrap_or_default()));
        }
        let what = units::count(useless.len(), "checkpoint");
        match confirm(&format!("delete {what} of {}?", report.domain)) {
            Some(true) => Ok(()),
            Some(false) => Err(Error::Cancelled),
            None => Err(Error::Usage("without a terminal to ask on, checkpoints --gc needs -y".into())),
        }
    }

    fn view(report: &CheckpointsReport) -> CheckpointsView<'_> {
        let views = report.checkpoints.iter().map(|found| CheckpointView {
            checkpoint: &found.name,
            standing: found.standing,
            point: found.point.map(|point| point.to_hex()),
            created: found.created.map(|seconds| units::utc(seconds.saturating_mul(1000))),
            disks: &found.disks,
            useless: found.useless.as_deref(),
            deleted: found.deleted,
        });
        CheckpointsView {
            message_type: "summary",
            domain: &report.domain,
            running: report.running,
            asked_qemu: report.asked_qemu,
            checkpoints: views.collect(),
            warnings: &report.warnings,
            dry_run: report.dry_run,
        }
    }

    fn table(report: &CheckpointsReport, work: &Work) -> Table {
        let mut table =
            Table::new(&["CHECKPOINT", "TIME", "POINT", "IS", "LIBVIRT", "DISK", "BITMAP", ">DIRTY"]);
        for found in &report.checkpoints {
            let first = [
                found.name.clone(),
                found
                    .created
                    .map_or_else(|| "-".into(), |at| units::local(at.saturating_mul(1000), &work.now)),
                found.point.map_or_else(|| "-".into(), |point| point.short()),
                standing(found.standing).into(),
                if found.created.is_some() { "yes" } else { "no" }.to_owned(),
            ];
            if found.disks.is_empty() {
                table.row(first.iter().map(String::as_str).chain(["-", "-", "-"]));
            }
            for disk in &found.disks {
                let dirty = disk.dirty_bytes.map_or_else(|| "-".into(), units::size);
                table.row(first.iter().map(String::as_str).chain([
                    disk.disk.as_str(),
                    state(disk.state),
                    dirty.as_str(),
                ]));
            }
        }
        table
    }

    fn standing(standing: Standing) -> &'static str {
        match standing {
            Standing::Newest => "newest",
            Standing::LastFull => "last full",
            Standing::NewestAndLastFull => "newest, last full",
            Standing::Superseded => "superseded",
            Standing::Forgotten => "of a forgotten point",
            Standing::Unknown => "of no point",
            Standing::AtWork => "of a running backup",
            Standing::OtherRepository => "of another repository",
            Standing::Foreign => "foreign",
        }
    }

    fn state(state: BitmapState) -> &'static str {
        match state {
            BitmapState::Sound => "sound",
            BitmapState::Missing => "missing",
            BitmapState::Inconsistent => "inconsistent",
            BitmapState::Disabled => "disabled",
            BitmapState::Busy => "busy",
            BitmapState::Spread => "spread over images",
            BitmapState::Broken => "missing or inconsistent",
            BitmapState::Present => "there",
            BitmapState::Unknown => "unknown",
        }
    }
}

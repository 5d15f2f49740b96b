//! `vmkeep backup`.

use std::path::PathBuf;

use serde::Serialize;
use vmkeep::error::{Error, Result};
use vmkeep::format::point::Level;
use vmkeep::nbd::NbdUri;
use vmkeep::ops::RequestedLevel;
use vmkeep::ops::backup::{BackupReport, DiskReport, ImageBackupOptions, ImageInput, backup_image};
use vmkeep::source::image::ImageFileFormat;

use super::exit::Exit;
use super::views::{self, PointView};
use super::work::Work;
use super::{App, units};

#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  vmkeep backup web01
  vmkeep backup web01 -l diff --freeze require
  vmkeep backup --all -x hdb --tag nightly
  vmkeep backup --file disk.qcow2 --name web01

Levels: auto is inc where a base exists, else full; inc compares with the newest point, diff with the last full, \
latest with the newest checkpoint and leaves none, copy is a full that leaves none. Whatever the level, the point \
is complete, and nothing is stored twice.")]
pub struct Args {
    /// The domains
    #[arg(value_name = "DOMAIN")]
    domains: Vec<String>,
    /// The same, for those used to it
    #[arg(short = 'd', long = "domain", value_name = "DOMAIN", hide = true)]
    domain: Vec<String>,
    /// Every domain that libvirt knows
    #[arg(long, conflicts_with_all = ["domains", "domain"])]
    all: bool,
    /// auto, full, inc, diff, latest or copy [default: auto]
    #[arg(short, long, value_name = "LEVEL")]
    level: Option<String>,
    /// The base: a point or checkpoint of this repository
    #[arg(long, value_name = "POINT|CHECKPOINT")]
    from: Option<String>,
    /// With diff: read everything that is dirty since the last full
    #[arg(long)]
    reread: bool,
    /// Only these disks
    #[arg(short, long, value_name = "DISK", value_delimiter = ',')]
    include: Vec<String>,
    /// Not these disks
    #[arg(short = 'x', long, value_name = "DISK", value_delimiter = ',')]
    exclude: Vec<String>,
    /// Freeze the guest's file systems through its agent: auto, require or no [default: auto]
    #[arg(long, value_name = "WHEN")]
    freeze: Option<String>,
    /// Pause the domain for the instant of the point
    #[arg(long)]
    pause: bool,
    /// Where QEMU keeps what the guest overwrites meanwhile
    #[arg(long, value_name = "DIR")]
    scratch_dir: Option<PathBuf>,
    /// Mark the point
    #[arg(long, value_name = "TAG")]
    tag: Vec<String>,
    /// Read at most so much a second
    #[arg(long, value_name = "RATE", value_parser = units::parse_rate)]
    limit_read: Option<u64>,
    /// Only say what would be read
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Exit with 3 if a disk had to be read in full
    #[arg(long)]
    strict: bool,
    #[command(flatten)]
    image: ImageArgs,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Without libvirt")]
struct ImageArgs {
    /// An image file
    #[arg(long, value_name = "IMAGE", group = "input", requires = "name", conflicts_with_all = ["domains", "domain", "all"])]
    file: Option<PathBuf>,
    /// A block device
    #[arg(long, value_name = "DEVICE", group = "input", requires = "name", conflicts_with_all = ["domains", "domain", "all"])]
    block: Option<PathBuf>,
    /// An export: nbd://HOST/EXPORT or nbd+unix:///EXPORT?socket=PATH
    #[arg(long, value_name = "URI", group = "input", requires = "name", conflicts_with_all = ["domains", "domain", "all"])]
    nbd: Option<String>,
    /// Name of the domain that the point belongs to
    #[arg(long, value_name = "DOMAIN", requires = "input")]
    name: Option<String>,
    /// Name of the disk
    #[arg(long, value_name = "DISK", default_value = "vda")]
    disk: String,
    /// Format of the image file, instead of looking at its first bytes
    #[arg(long, value_parser = ["raw", "qcow2"], requires = "file")]
    image_format: Option<String>,
}

#[derive(Debug, Serialize)]
struct DiskNumbers<'a> {
    disk: &'a str,
    level: Level,
    full_reason: Option<&'a str>,
    stats: &'a vmkeep::format::point::PointStats,
}

#[derive(Debug, Serialize)]
struct ExcludedView<'a> {
    disk: &'a str,
    reason: &'a str,
}

#[derive(Debug, Serialize)]
struct SummaryView<'a> {
    message_type: &'static str,
    /// `None` with a dry run.
    point: Option<String>,
    domain: &'a str,
    time: String,
    level: Level,
    base: Option<String>,
    checkpoint: Option<&'a str>,
    consistency: vmkeep::format::point::Consistency,
    stats: &'a vmkeep::format::point::PointStats,
    disks: Vec<DiskNumbers<'a>>,
    excluded: Vec<ExcludedView<'a>>,
    warnings: &'a [String],
    dry_run: bool,
}

/// Runs the command.
///
/// # Errors
/// Those of the arguments and of the repository. With several domains, one that fails is told and does not keep the
/// others from being backed up.
pub fn run(args: &Args, app: &App) -> Result<Exit> {
    let level = level(args.level.as_deref().or(app.settings.backup.level.as_deref()).unwrap_or("auto"))?;
    let work = match args.image.input(args)? {
        Some((name, input)) => {
            let work = Work::open(app)?;
            work.watch_signals()?;
            let options = ImageBackupOptions {
                domain: name,
                disk: args.image.disk.clone(),
                input,
                level,
                tags: tags(args, app),
                read_limit: read_limit(args, app)?,
                dry_run: args.dry_run,
            };
            let report = backup_image(&work.repository, &options, &work.progress)?;
            return finish(args, app, &work, &report);
        }
        None => Work::open(app)?,
    };
    domains(args, app, level, &work)
}

fn level(text: &str) -> Result<RequestedLevel> {
    Ok(match text {
        "auto" => RequestedLevel::Auto,
        "full" => RequestedLevel::Is(Level::Full),
        "inc" | "incremental" => RequestedLevel::Is(Level::Incremental),
        "diff" | "differential" => RequestedLevel::Is(Level::Differential),
        "latest" => RequestedLevel::Is(Level::Latest),
        "copy" => RequestedLevel::Is(Level::Copy),
        other => {
            let known = "auto, full, inc, diff, latest or copy";
            return Err(Error::Usage(format!("level {other:?} is none of {known}")));
        }
    })
}

fn tags(args: &Args, app: &App) -> Vec<String> {
    let mut tags = args.tag.clone();
    tags.extend(app.settings.backup.tag.iter().flatten().cloned());
    tags
}

fn read_limit(args: &Args, app: &App) -> Result<Option<u64>> {
    match (args.limit_read, &app.settings.backup.limit_read) {
        (Some(rate), _) => Ok(Some(rate)),
        (None, Some(text)) => units::parse_rate(text).map(Some).map_err(Error::Usage),
        (None, None) => Ok(None),
    }
}

impl ImageArgs {
    fn input(&self, args: &Args) -> Result<Option<(String, ImageInput)>> {
        let input = match (&self.file, &self.block, &self.nbd) {
            (Some(path), _, _) => {
                let format = self.image_format.as_deref().map(|format| match format {
                    "qcow2" => ImageFileFormat::Qcow2,
                    _ => ImageFileFormat::Raw,
                });
                ImageInput::File { path: path.clone(), format }
            }
            (_, Some(path), _) => ImageInput::Block(path.clone()),
            (_, _, Some(uri)) => ImageInput::Nbd(uri.parse::<NbdUri>()?),
            _ => return Ok(None),
        };
        let given = [
            ("--from", args.from.is_some()),
            ("--reread", args.reread),
            ("--include", !args.include.is_empty()),
            ("--exclude", !args.exclude.is_empty()),
            ("--freeze", args.freeze.is_some()),
            ("--pause", args.pause),
            ("--scratch-dir", args.scratch_dir.is_some()),
        ];
        if let Some((option, _)) = given.iter().find(|(_, given)| *given) {
            return Err(Error::Usage(format!("{option} is for domains, not for a single image")));
        }
        Ok(self.name.clone().map(|name| (name, input)))
    }
}

#[cfg(not(feature = "libvirt"))]
fn domains(_args: &Args, _app: &App, _level: RequestedLevel, _work: &Work) -> Result<Exit> {
    Err(Error::Usage("this build has no libvirt: use --file, --block or --nbd with --name".into()))
}

#[cfg(feature = "libvirt")]
fn domains(args: &Args, app: &App, level: RequestedLevel, work: &Work) -> Result<Exit> {
    use vmkeep::ops::backup::{DomainBackupOptions, backup_domain};
    use vmkeep::source::domain::Hypervisor;

    let named: Vec<String> = args.domains.iter().chain(&args.domain).cloned().collect();
    if named.is_empty() && !args.all {
        return Err(Error::Usage("name a domain, or --all, or an image by --file, --block or --nbd".into()));
    }
    let freeze = freeze(args.freeze.as_deref().or(app.settings.backup.freeze.as_deref()).unwrap_or("auto"))?;
    let read_limit = read_limit(args, app)?;
    work.watch_signals()?;
    let uri = app.settings.connect.as_ref().map(|(uri, _)| uri.as_str());
    let hypervisor = Hypervisor::connect(uri)?;
    let domains = if args.all { hypervisor.domains()? } else { named };
    let several = domains.len() > 1;
    let mut worst = Exit::Done;
    for domain in domains {
        let backed_up = base(args, work, &domain).and_then(|from| {
            let options = DomainBackupOptions {
                domain: domain.clone(),
                level,
                reread: args.reread,
                from,
                include: either(&args.include, app.settings.backup.include.as_ref()),
                exclude: either(&args.exclude, app.settings.backup.exclude.as_ref()),
                freeze,
                pause: args.pause || app.settings.backup.pause == Some(true),
                scratch_dir: args.scratch_dir.clone().or_else(|| app.settings.backup.scratch_dir.clone()),
                tags: tags(args, app),
                read_limit,
                dry_run: args.dry_run,
            };
            let report = backup_domain(&work.repository, &hypervisor, &options, &work.progress)?;
            finish(args, app, work, &report)
        });
        let exit = match backed_up {
            Ok(exit) => exit,
            Err(error) if !several || matches!(error, Error::Cancelled) => return Err(error),
            Err(error) => super::exit::report(&app.output, Some(&domain), &error),
        };
        // a failure counts more than something incomplete, and the first failure most
        if worst == Exit::Done || (worst == Exit::Incomplete && exit != Exit::Done) {
            worst = exit;
        }
    }
    Ok(worst)
}

#[cfg(feature = "libvirt")]
fn either(flag: &[String], profile: Option<&Vec<String>>) -> Vec<String> {
    if flag.is_empty() { profile.cloned().unwrap_or_default() } else { flag.to_vec() }
}

#[cfg(feature = "libvirt")]
fn freeze(text: &str) -> Result<vmkeep::source::domain::Freeze> {
    use vmkeep::source::domain::Freeze;
    match text {
        "auto" => Ok(Freeze::Auto),
        "require" => Ok(Freeze::Require),
        "no" => Ok(Freeze::No),
        other => Err(Error::Usage(format!("--freeze {other} is none of auto, require or no"))),
    }
}

#[cfg(feature = "libvirt")]
fn base(args: &Args, work: &Work, domain: &str) -> Result<Option<vmkeep::ops::levels::FromBase>> {
    use vmkeep::ops::levels::FromBase;
    let Some(text) = &args.from else { return Ok(None) };
    let entries = work.points()?;
    let entry = vmkeep::ops::select::select_base(&entries, domain, text, &work.now)?;
    Ok(Some(FromBase::Point(entry.record.id)))
}

/// Tells what was done.
fn finish(args: &Args, app: &App, work: &Work, report: &BackupReport) -> Result<Exit> {
    work.progress.clear();
    let strict = args.strict || app.settings.backup.strict == Some(true);
    let is_full = |disk: &&DiskReport| disk.full_reason.is_some();
    let exit =
        if strict && report.disks.iter().any(|disk| is_full(&disk)) { Exit::Incomplete } else { Exit::Done };
    if app.output.json {
        app.output.json_line(&summary(report))?;
        return Ok(exit);
    }
    for warning in &report.warnings {
        app.output.remark(&format!("warning: {warning}"));
    }
    if app.output.quiet {
        return Ok(exit);
    }
    let record = &report.record;
    let verb = if report.dry_run { "would back up" } else { "backed up" };
    let id = if report.dry_run { String::new() } else { format!(" as point {}", record.id.short()) };
    app.output.line(&format!(
        "{verb} {}{id}: {}, {}",
        record.domain,
        views::level(record.level),
        views::consistency(record.consistency)
    ))?;
    for disk in &report.disks {
        let reason = disk.full_reason.as_ref().map(|reason| format!(" (read in full: {reason})"));
        app.output.line(&format!(
            "  {}: {} dirty, {} changed, {} new{}",
            disk.target,
            units::size(disk.stats.dirty_bytes),
            units::size(disk.stats.changed_bytes),
            units::size(disk.stats.new_bytes),
            reason.unwrap_or_default()
        ))?;
    }
    for (disk, reason) in &report.excluded {
        app.output.line(&format!("  {disk}: left out, {reason}"))?;
    }
    if !report.dry_run {
        let since =
            report.stats.since_base_bytes.map(|bytes| format!(", {} since the base", units::size(bytes)));
        app.output.line(&format!(
            "  stored {} and {} of metadata in {}{}",
            units::size(report.stats.stored_bytes),
            units::size(report.stats.metadata_bytes),
            units::duration(report.stats.duration_ms),
            since.unwrap_or_default()
        ))?;
    }
    Ok(exit)
}

fn summary(report: &BackupReport) -> SummaryView<'_> {
    let record = &report.record;
    let view = PointView::new(record, &report.stats);
    SummaryView {
        message_type: "summary",
        point: (!report.dry_run).then_some(view.point),
        domain: &record.domain,
        time: view.time,
        level: record.level,
        base: view.base,
        checkpoint: record.checkpoint.as_deref(),
        consistency: record.consistency,
        stats: &report.stats,
        disks: report
            .disks
            .iter()
            .map(|disk| DiskNumbers {
                disk: &disk.target,
                level: disk.level,
                full_reason: disk.full_reason.as_deref(),
                stats: &disk.stats,
            })
            .collect(),
        excluded: report.excluded.iter().map(|(disk, reason)| ExcludedView { disk, reason }).collect(),
        warnings: &report.warnings,
        dry_run: report.dry_run,
    }
}

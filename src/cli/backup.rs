//! `vmkeep backup`.

use std::num::NonZeroU16;
use std::path::PathBuf;

use serde::Serialize;
use vmkeep::error::{Error, Result};
use vmkeep::format::point::Level;
#[cfg(feature = "libvirt")]
use vmkeep::monitor::{Monitor, TaskId};
use vmkeep::nbd::NbdUri;
use vmkeep::ops::RequestedLevel;
#[cfg(feature = "libvirt")]
use vmkeep::ops::backup::DomainBackupOptions;
use vmkeep::ops::backup::{BackupReport, DiskReport, ImageBackupOptions, ImageInput, backup_image};
use vmkeep::source::image::ImageFileFormat;

use super::exit::Exit;
#[cfg(feature = "libvirt")]
use super::progress::Progress;
use super::views::{self, PointView};
use super::work::Work;
use super::{App, units};

#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  vmkeep backup web01
  vmkeep backup web01 -l diff --freeze require
  vmkeep backup --all -x hdb --tag nightly
  vmkeep backup web01 web02 db01 -j 3
  vmkeep backup --file disk.qcow2 --name web01

Levels: auto is inc where a base exists, else full; inc compares with the newest point, diff with the last full, \
latest with the newest checkpoint and leaves none, copy is a full that leaves none. Whatever the level, the point \
is complete, and nothing is stored twice.

Several domains are backed up at the same time (-j); what became of each is told in the order in which they are named. \
Of domains that have no point yet one at a time is taken in, so that what is the same in all of them is stored once.")]
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
    /// How many domains to back up at the same time [default: as many as there are cores, at most 4]
    #[arg(short, long, value_name = "N")]
    jobs: Option<NonZeroU16>,
    /// Read at most so much a second, of all domains together
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
            return work.progress.print(|| finish(args, app, &report, false));
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
            ("--jobs", args.jobs.is_some()),
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
    use vmkeep::ops::backup::{backup_domain, backup_domains};
    use vmkeep::source::domain::Hypervisor;

    let named: Vec<String> = args.domains.iter().chain(&args.domain).cloned().collect();
    if named.is_empty() && !args.all {
        return Err(Error::Usage("name a domain, or --all, or an image by --file, --block or --nbd".into()));
    }
    let template = template(args, app, level)?;
    work.watch_signals()?;
    let uri = app.settings.connect.as_ref().map(|(uri, _)| uri.as_str());
    let hypervisor = Hypervisor::connect(uri)?;
    let domains = each_once(if args.all { hypervisor.domains()? } else { named });
    let jobs = jobs(args, app, domains.len());
    let several = domains.len() > 1;
    let backup = |domain: &str| {
        let from = base(args, work, domain)?;
        // what all of them may read in a second is divided
        let read_limit = template.read_limit.map(|rate| (rate / jobs as u64).max(1));
        let options = DomainBackupOptions { domain: domain.to_owned(), from, read_limit, ..template.clone() };
        if !several {
            return backup_domain(&work.repository, &hypervisor, &options, &work.progress);
        }
        // libvirt's daemon works on few calls of one connection at a time: no guest may stay frozen for another one's
        let hypervisor = Hypervisor::connect(uri)?;
        let monitor = OfDomain { progress: &work.progress, domain };
        backup_domain(&work.repository, &hypervisor, &options, &monitor)
    };
    let mut worst = Exit::Done;
    let mut ended_by = None;
    let mut tell = |domain: &str, result: Result<BackupReport>| {
        let told = result.and_then(|report| work.progress.print(|| finish(args, app, &report, several)));
        let exit = match told {
            Ok(exit) => exit,
            Err(error) if !several || matches!(error, Error::Cancelled) => {
                ended_by.get_or_insert(error);
                return;
            }
            Err(error) => work.progress.print(|| super::exit::report(&app.output, Some(domain), &error)),
        };
        // a failure counts more than something incomplete, and the first failure most
        if worst == Exit::Done || (worst == Exit::Incomplete && exit != Exit::Done) {
            worst = exit;
        }
    };
    backup_domains(&work.repository, &domains, jobs, &backup, &work.progress, &mut tell)?;
    ended_by.map_or(Ok(worst), Err)
}

/// Returns what goes for every domain.
#[cfg(feature = "libvirt")]
fn template(args: &Args, app: &App, level: RequestedLevel) -> Result<DomainBackupOptions> {
    let profile = &app.settings.backup;
    Ok(DomainBackupOptions {
        domain: String::new(),
        level,
        reread: args.reread,
        from: None,
        include: either(&args.include, profile.include.as_ref()),
        exclude: either(&args.exclude, profile.exclude.as_ref()),
        freeze: freeze(args.freeze.as_deref().or(profile.freeze.as_deref()).unwrap_or("auto"))?,
        pause: args.pause || profile.pause == Some(true),
        scratch_dir: args.scratch_dir.clone().or_else(|| profile.scratch_dir.clone()),
        tags: tags(args, app),
        read_limit: read_limit(args, app)?,
        dry_run: args.dry_run,
    })
}

/// Drops names that came before: a domain has one backup at a time.
#[cfg(feature = "libvirt")]
fn each_once(domains: Vec<String>) -> Vec<String> {
    let mut known = std::collections::HashSet::new();
    domains.into_iter().filter(|domain| known.insert(domain.clone())).collect()
}

/// Returns how many domains are backed up at the same time.
#[cfg(feature = "libvirt")]
fn jobs(args: &Args, app: &App, domains: usize) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    match args.jobs.or(app.settings.backup.jobs) {
        Some(jobs) => usize::from(jobs.get()).min(domains).max(1),
        None => vmkeep::ops::backup::default_jobs(cores, domains),
    }
}

/// The progress of one domain among others: what it says names the domain.
#[cfg(feature = "libvirt")]
struct OfDomain<'a> {
    progress: &'a Progress,
    domain: &'a str,
}

#[cfg(feature = "libvirt")]
impl Monitor for OfDomain<'_> {
    fn start(&self, name: &str, total_bytes: u64) -> TaskId {
        self.progress.start(name, total_bytes)
    }

    fn advance(&self, task: TaskId, bytes: u64) {
        self.progress.advance(task, bytes);
    }

    fn finish(&self, task: TaskId) {
        self.progress.finish(task);
    }

    fn warn(&self, message: &str) {
        self.progress.warn(&format!("{}: {message}", self.domain));
    }

    fn note(&self, message: &str) {
        self.progress.note(&format!("{}: {message}", self.domain));
    }

    fn is_cancelled(&self) -> bool {
        self.progress.is_cancelled()
    }
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

/// Tells what was done, in one piece: other domains may be at work.
fn finish(args: &Args, app: &App, report: &BackupReport, several: bool) -> Result<Exit> {
    let strict = args.strict || app.settings.backup.strict == Some(true);
    let is_full = |disk: &&DiskReport| disk.full_reason.is_some();
    let exit =
        if strict && report.disks.iter().any(|disk| is_full(&disk)) { Exit::Incomplete } else { Exit::Done };
    if app.output.json {
        app.output.json_line(&summary(report))?;
        return Ok(exit);
    }
    let whose = if several { format!("{}: ", report.record.domain) } else { String::new() };
    for warning in &report.warnings {
        app.output.remark(&format!("warning: {whose}{warning}"));
    }
    if !app.output.quiet {
        app.output.line(&text(report))?;
    }
    Ok(exit)
}

/// Returns the lines that tell of a point.
fn text(report: &BackupReport) -> String {
    let record = &report.record;
    let verb = if report.dry_run { "would back up" } else { "backed up" };
    let id = if report.dry_run { String::new() } else { format!(" as point {}", record.id.short()) };
    let level = views::level(record.level);
    let consistency = views::consistency(record.consistency);
    let mut lines = vec![format!("{verb} {}{id}: {level}, {consistency}", record.domain)];
    for disk in &report.disks {
        let reason = disk.full_reason.as_ref().map(|reason| format!(" (read in full: {reason})"));
        lines.push(format!(
            "  {}: {} dirty, {} changed, {} new{}",
            disk.target,
            units::size(disk.stats.dirty_bytes),
            units::size(disk.stats.changed_bytes),
            units::size(disk.stats.new_bytes),
            reason.unwrap_or_default()
        ));
    }
    for (disk, reason) in &report.excluded {
        lines.push(format!("  {disk}: left out, {reason}"));
    }
    if !report.dry_run {
        let since =
            report.stats.since_base_bytes.map(|bytes| format!(", {} since the base", units::size(bytes)));
        lines.push(format!(
            "  stored {} and {} of metadata in {}{}",
            units::size(report.stats.stored_bytes),
            units::size(report.stats.metadata_bytes),
            units::duration(report.stats.duration_ms),
            since.unwrap_or_default()
        ));
    }
    lines.join("\n")
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

#[cfg(all(test, feature = "libvirt"))]
mod tests {
    use super::*;

    #[test]
    fn a_domain_that_is_named_twice_is_backed_up_once() {
        let names = ["b", "a", "b", "c", "a"].map(str::to_owned).to_vec();
        assert_eq!(each_once(names), ["b", "a", "c"]);
    }
}

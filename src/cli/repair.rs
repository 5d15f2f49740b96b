//! `vmkeep repair`.

use clap::Subcommand;
use serde::Serialize;
use vmkeep::error::{Error, Result};
use vmkeep::ops::backup::ImageInput;
use vmkeep::ops::repair::{PacksOptions, repair_index, repair_packs, repair_points};
use vmkeep::repo::Repository;
use vmkeep::storage;

use super::exit::Exit;
use super::verify::image_input;
use super::work::{Work, environment};
use super::{App, units};

/// What can be repaired. No content is ever deleted.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List packs that no index segment lists, from their own tables
    #[command(after_long_help = "Examples:
  vmkeep repair index -n
  vmkeep repair index")]
    Index {
        /// Only say what would be done
        #[arg(short = 'n', long)]
        dry_run: bool,
    },
    /// Store lost chunks anew from wherever their content still is
    #[command(after_long_help = "Examples:
  vmkeep verify && vmkeep repair packs
  vmkeep repair packs --from /mnt/offsite/repository
  vmkeep repair packs --from-disk /var/lib/libvirt/images/web01.qcow2

Looked at are: other copies in the repository, what can be salvaged from damaged packs, a copy of the repository, and an \
image of a disk. What verify has recorded as damaged counts as lost, so verify goes before. Exit code 4: something is \
still lost.")]
    Packs {
        /// A copy of this repository, to take chunks from
        #[arg(long, value_name = "REPO")]
        from: Option<String>,
        /// An image, block device or NBD URI that has, or had, the content of a disk
        #[arg(long, value_name = "FILE|URI")]
        from_disk: Option<String>,
        /// Only say what would be done
        #[arg(short = 'n', long)]
        dry_run: bool,
    },
    /// Bring points back whose outcome is lost; copy damaged ones, with what is lost marked unreadable
    #[command(after_long_help = "Examples:
  vmkeep repair points -n
  vmkeep repair points

The damaged point stays; a copy has the tag repaired-from-ID and restores with --on-damage zero. As long as both are \
there, only its id selects the copy, and forget guards the damaged point alone, which may heal. verify says when it has.")]
    Points {
        /// Only say what would be done
        #[arg(short = 'n', long)]
        dry_run: bool,
    },
}

#[derive(Debug, Serialize)]
struct RepairView<'a, T: Serialize> {
    message_type: &'static str,
    repaired: &'static str,
    #[serde(flatten)]
    report: &'a T,
}

/// Runs the command.
///
/// # Errors
/// Those of the repairs.
pub fn run(command: &Command, app: &App) -> Result<Exit> {
    let work = Work::open(app)?;
    work.watch_signals()?;
    match command {
        Command::Index { dry_run } => index(app, &work, *dry_run),
        Command::Packs { from, from_disk, dry_run } => {
            packs(app, &work, from.as_deref(), from_disk.as_deref(), *dry_run)
        }
        Command::Points { dry_run } => points(app, &work, *dry_run),
    }
}

fn print<T: Serialize>(
    app: &App,
    work: &Work,
    repaired: &'static str,
    report: &T,
    lines: &[String],
) -> Result<()> {
    work.progress.clear();
    if app.output.json {
        return app.output.json_line(&RepairView { message_type: "summary", repaired, report });
    }
    if app.output.quiet {
        return Ok(());
    }
    lines.iter().try_for_each(|line| app.output.line(line))
}

fn count(number: u64, noun: &str) -> String {
    units::count(usize::try_from(number).unwrap_or(usize::MAX), noun)
}

fn index(app: &App, work: &Work, dry_run: bool) -> Result<Exit> {
    let report = repair_index(&work.repository, dry_run, &work.progress)?;
    let verb = if dry_run { "would list" } else { "listed" };
    let mut lines =
        vec![format!("{verb} {} with {}", count(report.packs, "pack"), count(report.chunks, "chunk"))];
    let put = if dry_run { "would be put anew" } else { "is put anew" };
    lines.extend(report.configs.iter().map(|name| format!("{name} {put}")));
    if report.unreadable_segments > 0 {
        let segments = count(report.unreadable_segments, "segment");
        lines.push(format!("{segments} cannot be read; the next prune takes what they leave"));
    }
    lines.extend(report.skipped.iter().map(|(pack, why)| format!("{pack}: left out: {why}")));
    print(app, work, "index", &report, &lines)?;
    Ok(if report.skipped.is_empty() { Exit::Done } else { Exit::Damage })
}

fn packs(app: &App, work: &Work, from: Option<&str>, from_disk: Option<&str>, dry_run: bool) -> Result<Exit> {
    let other = match from {
        // its index is built in memory: the cache is for the repository that is repaired
        Some(url) => Some(Repository::open(storage::open_url(url)?, None, &environment()?, &work.progress)?),
        None => None,
    };
    let from_disk = from_disk.map(image).transpose()?;
    let options = PacksOptions { from: other.as_ref(), from_disk, dry_run };
    let report = repair_packs(&work.repository, &options, &work.progress)?;
    let verb = if dry_run { "would be stored anew" } else { "were stored anew" };
    let found = report.lacking - report.lost.min(report.lacking);
    let lines = [
        format!("{} had too few good copies, {found} {verb}", count(report.lacking, "chunk")),
        format!(
            "from other copies {}, salvaged {}, from the other repository {}, from the image {}",
            report.from_copies, report.salvaged, report.from_repository, report.from_disk
        ),
        format!("still lost: {}", count(report.lost, "chunk")),
    ];
    print(app, work, "packs", &report, &lines)?;
    Ok(if report.lost == 0 { Exit::Done } else { Exit::Damage })
}

fn image(text: &str) -> Result<ImageInput> {
    image_input(text)?.ok_or_else(|| Error::NotFound { object: text.to_owned() })
}

fn points(app: &App, work: &Work, dry_run: bool) -> Result<Exit> {
    let report = repair_points(&work.repository, dry_run, &work.progress)?;
    let lines: Vec<String> = report
        .points
        .iter()
        .map(|point| {
            let lost = units::size(point.lost_bytes);
            let (old, domain) = (point.point.short(), &point.domain);
            match point.repaired {
                Some(new) => {
                    format!("{old} of {domain}: {lost} lost; {} says so and restores the rest", new.short())
                }
                None => format!("{old} of {domain}: {lost} lost; a point that says so would be made"),
            }
        })
        .chain(report.brought_back.iter().map(|id| match dry_run {
            true => format!("{}: its outcome is lost; it would be made anew", id.short()),
            false => format!("{}: its outcome was lost, and was made anew", id.short()),
        }))
        .chain(report.removed.iter().map(|name| match dry_run {
            true => format!("{name}: cannot be read and made no point; it would be put away"),
            false => format!("{name}: could not be read and made no point; put away"),
        }))
        .chain(report.left.iter().map(|name| {
            format!("{name}: cannot be read and may have made a point; `vmkeep repair index` may tell, then repeat this")
        }))
        .collect();
    let nothing = vec!["no point is known to have lost anything".to_owned()];
    print(app, work, "points", &report, if lines.is_empty() { &nothing } else { &lines })?;
    Ok(if report.left.is_empty() { Exit::Done } else { Exit::Damage })
}

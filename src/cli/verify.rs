//! `vmkeep verify`.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use jiff::Span;
use serde::Serialize;
use vmkeep::error::{Error, Result};
use vmkeep::format::point::PointRecord;
use vmkeep::id::PointId;
use vmkeep::nbd::NbdUri;
use vmkeep::ops::against::{Compared, Lacking, against_image, is_all_same};
use vmkeep::ops::backup::ImageInput;
use vmkeep::ops::repaired::copies;
use vmkeep::ops::select::select;
use vmkeep::ops::verify::sample::Sample;
use vmkeep::ops::verify::{RestoredHash, VerifyLevel, VerifyOptions, VerifyReport, verify};

use super::exit::Exit;
use super::work::Work;
use super::{App, units};

#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  vmkeep verify
  vmkeep verify --structure
  vmkeep verify --sample 1/30
  vmkeep verify web01 --older-than 30d --json
  vmkeep verify web01~1 --restore
  vmkeep verify web01 --against web01
  vmkeep verify web01~2:vda --against /srv/restored/vda.raw

Each level finds what those before it find: structure, packs, data, restore. What is damaged is recorded: from then on it counts as absent, and the next backup that meets the lost content stores it again and heals every point that needs it. Nothing is deleted; -n records nothing either.

Exit code 4: damage was found, or --against found a difference or a disk that only one of the two has; each finding names \
what a restore would miss.")]
pub struct Args {
    /// Only what these points or domains need
    #[arg(value_name = "POINT|DOMAIN", conflicts_with = "all")]
    scope: Vec<String>,
    /// Everything, which is the default
    #[arg(long)]
    all: bool,
    /// Check listings, outcomes, segments and maps; read no disk content
    #[arg(long, group = "depth")]
    structure: bool,
    /// Also read every pack that the index lists and compare its hash with its name
    #[arg(long, group = "depth")]
    packs: bool,
    /// Also check every chunk in the packs against its id, which is the default
    #[arg(long, group = "depth")]
    data: bool,
    /// Also restore every disk of the points into a hash
    #[arg(long, group = "depth")]
    restore: bool,
    /// Compare one point with a domain, an image file, a block device or an NBD URI
    #[arg(long, group = "depth", value_name = "DOMAIN|FILE|URI", requires = "scope")]
    against: Option<String>,
    /// Read only a part of the packs, each time the next: n of m parts, a percentage, or so many bytes
    #[arg(long, value_name = "N/M|X%|SIZE", value_parser = parse_sample, conflicts_with_all = ["structure", "restore", "against"])]
    sample: Option<Sample>,
    /// Leave out points that were verified at this level within this time
    #[arg(long, value_name = "SPAN", value_parser = units::parse_span, conflicts_with = "against")]
    older_than: Option<Span>,
    /// Record nothing in the repository
    #[arg(short = 'n', long)]
    dry_run: bool,
}

fn parse_sample(text: &str) -> Result<Sample, String> {
    let wrong = || format!("{text:?} is neither n/m, nor a percentage, nor a size");
    if let Some((parts, of)) = text.split_once('/') {
        let (parts, of) = (parts.parse().map_err(|_| wrong())?, of.parse().map_err(|_| wrong())?);
        return match (parts, of) {
            (parts, of) if parts >= 1 && parts <= of => Ok(Sample::Parts { parts, of }),
            _ => Err(wrong()),
        };
    }
    if text.ends_with('%') {
        let permille = super::prune::parse_permille(text)?;
        return if permille > 0 { Ok(Sample::Parts { parts: permille, of: 1000 }) } else { Err(wrong()) };
    }
    units::parse_size(text).map(Sample::Bytes).map_err(|_| wrong())
}

#[derive(Debug, Serialize)]
struct AgainstView<'a> {
    message_type: &'static str,
    point: PointId,
    against: &'a str,
    disks: &'a [Compared],
}

#[derive(Debug, Serialize)]
struct VerifyView<'a> {
    message_type: &'static str,
    level: VerifyLevel,
    #[serde(flatten)]
    report: &'a VerifyReport,
}

/// Runs the command.
///
/// # Errors
/// Those of the selectors and of [`verify`]; damage is a result, not an error.
pub fn run(args: &Args, app: &App) -> Result<Exit> {
    let work = Work::open(app)?;
    work.watch_signals()?;
    if let Some(source) = &args.against {
        return against(args, app, &work, source);
    }
    let level = match (args.structure, args.packs, args.restore) {
        (true, ..) => VerifyLevel::Structure,
        (_, true, _) => VerifyLevel::Packs,
        (_, _, true) => VerifyLevel::Restore,
        _ => VerifyLevel::Data,
    };
    let points: Vec<PointId> = if args.scope.is_empty() {
        Vec::new()
    } else {
        let entries = work.points()?;
        work.scope(&entries, &args.scope)?.iter().map(|entry| entry.record.id).collect()
    };
    let older_than_ms = match &args.older_than {
        Some(span) => {
            Some(work.now.checked_sub(*span).map_or(i64::MIN, |time| time.timestamp().as_millisecond()))
        }
        None => None,
    };
    let record = !args.dry_run;
    let options = VerifyOptions { level, points, older_than_ms, sample: args.sample, record };
    let report = verify(&work.repository, &options, &work.progress)?;
    work.progress.clear();
    let exit = if report.findings.is_empty() { Exit::Done } else { Exit::Damage };
    if app.output.json {
        app.output.json_line(&VerifyView { message_type: "summary", level, report: &report })?;
        return Ok(exit);
    }
    for finding in &report.findings {
        app.output.line(&format!("{}: {}", finding.object, finding.problem))?;
        if !finding.chunks.is_empty() {
            app.output.line(&format!("  chunks: {}", finding.chunks.len()))?;
        }
        for affected in &finding.affected {
            let bytes = affected.ranges.iter().map(|(_, len)| len).sum();
            let ranges: Vec<String> =
                affected.ranges.iter().take(8).map(|(start, len)| format!("{start}+{len}")).collect();
            let more = affected.ranges.len().saturating_sub(8);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            app.output.line(&format!(
                "  {} of {} in point {}: {} at {}{more}",
                affected.disk,
                affected.domain,
                affected.point.short(),
                units::size(bytes),
                ranges.join(" ")
            ))?;
        }
    }
    for restored in report.restored.iter().filter(|_| !app.output.quiet) {
        let RestoredHash { point, disk, size, blake3 } = restored;
        app.output.line(&format!("{blake3}  {disk} of {}, {}", point.short(), units::size(*size)))?;
    }
    if !app.output.quiet || exit == Exit::Damage {
        summary(app, &report, spent_copies(&work, &report)?)?;
    }
    Ok(exit)
}

/// Returns how many damaged points are copies of points that are not damaged.
fn spent_copies(work: &Work, report: &VerifyReport) -> Result<usize> {
    if report.damaged_points.is_empty() {
        return Ok(0);
    }
    let copies = copies(&work.points()?);
    let is_damaged = |id: &PointId| report.damaged_points.contains(id);
    let spent = copies.iter().filter(|(copy, original)| is_damaged(copy) && !is_damaged(original));
    Ok(spent.count())
}

fn summary(app: &App, report: &VerifyReport, spent_copies: usize) -> Result<()> {
    let count = |number: u64, noun| units::count(usize::try_from(number).unwrap_or(usize::MAX), noun);
    let mut line = format!(
        "{}, {}, {}: {}",
        count(report.points, "point"),
        count(report.packs, "pack"),
        count(report.chunks, "chunk"),
        match report.findings.len() {
            0 => "no damage".to_owned(),
            found => units::count(found, "finding"),
        }
    );
    if let Some(sample) = &report.sample {
        line += &format!("; a sample of {} of {}", sample.packs, count(sample.of_packs, "pack"));
    }
    if report.unlisted_packs > 0 {
        let (packs, bytes) = (count(report.unlisted_packs, "pack"), units::size(report.unlisted_bytes));
        line += &format!(
            "; {packs} of {bytes} that no segment lists, of a session at work or a killed one, not read"
        );
    }
    if report.skipped_points > 0 {
        line += &format!("; {} verified lately and left out", count(report.skipped_points, "point"));
    }
    app.output.line(&line)?;
    let damaged = report.damaged_points.len().saturating_sub(spent_copies);
    if damaged > 0 {
        app.output.line(&format!(
            "{} would not restore in full; the next backup heals what it meets, `vmkeep repair` tries the rest",
            units::count(damaged, "point")
        ))?;
    }
    if spent_copies > 0 {
        let copies = units::count(spent_copies, "point");
        app.output.line(&format!("{copies} would not, being a copy of what is whole again: forget it"))?;
    }
    Ok(())
}

fn against(args: &Args, app: &App, work: &Work, source: &str) -> Result<Exit> {
    let entries = work.points()?;
    let [text] = args.scope.as_slice() else {
        return Err(Error::Usage("--against compares one point, name one".into()));
    };
    let selected = select(&entries, text, &work.now)?;
    let record = &selected.entry.record;
    let disks = match image_input(source)? {
        Some(input) => {
            let names: Vec<&str> = record.disks.iter().map(|disk| disk.target.as_str()).collect();
            let disk = match (selected.disk, names.as_slice()) {
                (Some(disk), _) => disk,
                (None, [one]) => one,
                (None, _) => {
                    let names = names.join(", ");
                    return Err(Error::Usage(format!(
                        "the point has several disks ({names}): name one, as in {text}:vda"
                    )));
                }
            };
            vec![against_image(&work.repository, record, disk, &input, &work.progress)?]
        }
        None => with_domain(app, work, record, selected.disk, source)?,
    };
    work.progress.clear();
    let exit = if is_all_same(&disks) { Exit::Done } else { Exit::Damage };
    if app.output.json {
        let view = AgainstView { message_type: "summary", point: record.id, against: source, disks: &disks };
        app.output.json_line(&view)?;
        return Ok(exit);
    }
    for disk in &disks {
        app.output.line(&compared_line(disk))?;
    }
    if disks.is_empty() {
        app.output.line("nothing was compared: neither has a disk")?;
    }
    Ok(exit)
}

/// Returns what a text names if it is an image; `None`: there is no such file, it may be a domain.
///
/// # Errors
/// A URI that is none; a path that is none.
pub fn image_input(source: &str) -> Result<Option<ImageInput>> {
    if source.contains("://") {
        return Ok(Some(ImageInput::Nbd(source.parse::<NbdUri>()?)));
    }
    let path = Path::new(source);
    match std::fs::metadata(path) {
        Ok(found) if found.file_type().is_block_device() => Ok(Some(ImageInput::Block(path.to_path_buf()))),
        Ok(_) => Ok(Some(ImageInput::File { path: path.to_path_buf(), format: None })),
        Err(_) if source.contains('/') => Err(Error::NotFound { object: source.to_owned() }),
        Err(_) => Ok(None),
    }
}

#[cfg(not(feature = "libvirt"))]
fn with_domain(
    _app: &App,
    _work: &Work,
    _record: &PointRecord,
    _disk: Option<&str>,
    domain: &str,
) -> Result<Vec<Compared>> {
    Err(Error::Usage(format!("this build has no libvirt, and {domain} is neither a file nor a URI")))
}

#[cfg(feature = "libvirt")]
fn with_domain(
    app: &App,
    work: &Work,
    record: &PointRecord,
    disk: Option<&str>,
    domain: &str,
) -> Result<Vec<Compared>> {
    let uri = app.settings.connect.as_ref().map(|(uri, _)| uri.as_str());
    let hypervisor = vmkeep::source::domain::Hypervisor::connect(uri)?;
    vmkeep::ops::against::against_domain(&work.repository, &hypervisor, record, disk, domain, &work.progress)
}

fn some_ranges(ranges: &[(u64, u64)]) -> String {
    let ranges: Vec<String> = ranges.iter().take(8).map(|(start, len)| format!("{start}+{len}")).collect();
    ranges.join(" ")
}

fn compared_line(disk: &Compared) -> String {
    let (name, size, found_size) = (&disk.disk, units::size(disk.size), units::size(disk.found_size));
    match disk.not_there {
        Some(Lacking::Domain) => {
            return format!("{name}: not there: the point has {size} of it, the domain no such disk to read");
        }
        Some(Lacking::Point) => {
            return format!("{name}: not there: the domain has {found_size} of it, the point no such disk");
        }
        None => {}
    }
    let mut line = format!("{name}: {} compared", units::size(disk.compared_bytes));
    if disk.size != disk.found_size {
        line += &format!("; the point has {} bytes, the disk {}", disk.size, disk.found_size);
    }
    if disk.written_bytes > 0 {
        line += &format!("; {} written since", units::size(disk.written_bytes));
    }
    if disk.lost_bytes > 0 {
        line += &format!("; {} lost at {}", units::size(disk.lost_bytes), some_ranges(&disk.lost));
    }
    if disk.differing_bytes == 0 {
        line += match (disk.written_bytes + disk.lost_bytes, disk.size == disk.found_size) {
            (0, true) => "; nothing differs",
            _ => "; nothing else differs",
        };
        return line;
    }
    line += &format!("; {} differ at {}", units::size(disk.differing_bytes), some_ranges(&disk.differing));
    if disk.untracked {
        line += "; no bitmap tells what was written since the point";
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_read() {
        assert_eq!(parse_sample("1/30"), Ok(Sample::Parts { parts: 1, of: 30 }));
        assert_eq!(parse_sample("2.5%"), Ok(Sample::Parts { parts: 25, of: 1000 }));
        assert_eq!(parse_sample("10G"), Ok(Sample::Bytes(10 << 30)));
        for text in ["", "0/3", "4/3", "1/0", "0%", "101%", "x", "/"] {
            assert!(parse_sample(text).is_err(), "{text}");
        }
    }
}

//! `vmkeep verify`.

use serde::Serialize;
use vmkeep::error::Result;
use vmkeep::id::PointId;
use vmkeep::ops::verify::{VerifyLevel, VerifyOptions, VerifyReport, verify};

use super::exit::Exit;
use super::work::Work;
use super::{App, units};

#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  vmkeep verify
  vmkeep verify --structure
  vmkeep verify web01 --data --json

Nothing is changed. Exit code 4: damage was found; each finding names what a restore would miss.")]
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
    /// Read every pack and check every chunk against its id, which is the default
    #[arg(long, group = "depth")]
    data: bool,
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
    let level = if args.structure { VerifyLevel::Structure } else { VerifyLevel::Data };
    let points: Vec<PointId> = if args.scope.is_empty() {
        Vec::new()
    } else {
        let entries = work.points()?;
        work.scope(&entries, &args.scope)?.iter().map(|entry| entry.record.id).collect()
    };
    let report = verify(&work.repository, &VerifyOptions { level, points }, &work.progress)?;
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
    if !app.output.quiet || exit == Exit::Damage {
        let count = |number: u64, noun| units::count(usize::try_from(number).unwrap_or(usize::MAX), noun);
        app.output.line(&format!(
            "{}, {}, {}: {}",
            count(report.points, "point"),
            count(report.packs, "pack"),
            count(report.chunks, "chunk"),
            match report.findings.len() {
                0 => "no damage".to_owned(),
                found => units::count(found, "finding"),
            }
        ))?;
    }
    Ok(exit)
}

//! `vmkeep stats`.

use vmkeep::error::Result;
use vmkeep::id::PointId;
use vmkeep::ops::stats::stats;

use super::exit::Exit;
use super::output::Table;
use super::work::Work;
use super::{App, units};

#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  vmkeep stats
  vmkeep stats web01
  vmkeep stats web01~1 --json")]
pub struct Args {
    /// Only what these points or domains hold
    #[arg(value_name = "DOMAIN|POINT")]
    scope: Vec<String>,
}

/// Runs the command.
///
/// # Errors
/// Those of the selectors and of the repository.
pub fn run(args: &Args, app: &App) -> Result<Exit> {
    let work = Work::open(app)?;
    work.watch_signals()?;
    let entries = work.points()?;
    let points: Vec<PointId> =
        work.scope(&entries, &args.scope)?.iter().map(|entry| entry.record.id).collect();
    let report = stats(&work.repository, &points, &work.progress)?;
    work.progress.clear();
    if app.output.json {
        app.output.json_line(&report)?;
        return Ok(Exit::Done);
    }
    let mut table = Table::new(&["NUMBER", ">VALUE", "MEANING"]);
    let rows = [
        ("points", report.points.to_string(), "looked at"),
        ("disk_bytes", units::size(report.disk_bytes), "sizes of all their disks"),
        ("data_bytes", units::size(report.data_bytes), "of them not zero: what restoring all would write"),
        ("unique_bytes", units::size(report.unique_bytes), "each piece of content counted once"),
        ("unique_chunks", report.unique_chunks.to_string(), "in so many chunks"),
        ("node_bytes", units::size(report.node_bytes), "maps, each node counted once"),
        ("packs", report.packs.to_string(), "in the whole repository"),
        ("stored_bytes", units::size(report.stored_bytes), "in all its packs"),
        ("index_bytes", units::size(report.index_bytes), "in all its index segments"),
    ];
    for (name, value, meaning) in rows {
        table.row([name, value.as_str(), meaning]);
    }
    app.output.bytes(table.render().as_bytes())?;
    Ok(Exit::Done)
}

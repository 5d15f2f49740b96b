//! `vmkeep stats`.

use std::collections::HashMap;

use serde::Serialize;
use vmkeep::error::Result;
use vmkeep::id::PointId;
use vmkeep::ops::PointEntry;
use vmkeep::ops::freed::{FreedReport, freed};
use vmkeep::ops::select::ShortIds;
use vmkeep::ops::stats::{StatsReport, stats};

use super::exit::Exit;
use super::output::Table;
use super::work::Work;
use super::{App, units};

#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  vmkeep stats
  vmkeep stats web01
  vmkeep stats web01~1 --json
  vmkeep stats web01 --unique")]
pub struct Args {
    /// Only what these points or domains hold
    #[arg(value_name = "DOMAIN|POINT")]
    scope: Vec<String>,
    /// What each of these points holds that no other point does: what forgetting it would free
    #[arg(long)]
    unique: bool,
}

#[derive(Debug, Serialize)]
struct StatsView<'a> {
    #[serde(flatten)]
    report: &'a StatsReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    unique: Option<&'a FreedReport>,
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
    let unique = if args.unique { Some(freed(&work.repository, &points, &work.progress)?) } else { None };
    work.progress.clear();
    if app.output.json {
        app.output.json_line(&StatsView { report: &report, unique: unique.as_ref() })?;
        return Ok(Exit::Done);
    }
    if let Some(unique) = &unique {
        app.output.bytes(unique_table(&entries, unique, &work).render().as_bytes())?;
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

fn unique_table(entries: &[PointEntry], report: &FreedReport, work: &Work) -> Table {
    let mut table = Table::new(&["POINT", "DOMAIN", "TIME", ">CHUNKS", ">CONTENT", ">STORED"]);
    let ids = ShortIds::of(entries);
    let by_id: HashMap<PointId, &PointEntry> = entries.iter().map(|entry| (entry.record.id, entry)).collect();
    for point in &report.points {
        let Some(entry) = by_id.get(&point.point) else { continue };
        let freed = &point.freed;
        table.row([
            ids.short(point.point),
            entry.record.domain.clone(),
            units::local(entry.record.time_ms, &work.now),
            freed.chunks.to_string(),
            units::size(freed.content_bytes),
            units::size(freed.stored_bytes),
        ]);
    }
    let freed = &report.together;
    let all = ["all of them", "", "", &freed.chunks.to_string()].map(str::to_owned);
    table.row(all.into_iter().chain([freed.content_bytes, freed.stored_bytes].map(units::size)));
    table
}

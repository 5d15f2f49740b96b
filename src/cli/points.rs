//! `vmkeep points`.

use serde::Serialize;
use vmkeep::error::{Error, Result};
use vmkeep::ops::PointEntry;
use vmkeep::ops::select::{parse_moments, short_id};

use super::App;
use super::exit::Exit;
use super::output::Table;
use super::units;
use super::views::{PointView, level};
use super::work::Work;

#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  vmkeep points
  vmkeep points web01 --last 7 --long
  vmkeep points --since 2026-07-01 --json")]
pub struct Args {
    /// Only points of this domain
    #[arg(value_name = "DOMAIN")]
    domain: Option<String>,
    /// Only points with this tag
    #[arg(long, value_name = "TAG")]
    tag: Vec<String>,
    /// Only points made at or after this time
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Only points made before this time
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
    /// Only the newest N of them
    #[arg(long, value_name = "N")]
    last: Option<usize>,
    /// All named numbers
    #[arg(long)]
    long: bool,
}

#[derive(Debug, Serialize)]
struct PointsView<'a> {
    points: Vec<PointView<'a>>,
}

/// Runs the command.
///
/// # Errors
/// Those of the repository; a time that is none.
pub fn run(args: &Args, app: &App) -> Result<Exit> {
    let work = Work::open(app)?;
    let all = work.points()?;
    let bound = |text: &Option<String>| -> Result<Option<i64>> {
        let Some(text) = text else { return Ok(None) };
        let moments = parse_moments(text, &work.now);
        let moment = moments.first().ok_or_else(|| Error::Usage(format!("{text:?} is no time")))?;
        Ok(Some(moment.start_ms))
    };
    let (since, until) = (bound(&args.since)?, bound(&args.until)?);
    let mut wanted: Vec<&PointEntry> = all
        .iter()
        .filter(|entry| args.domain.as_ref().is_none_or(|domain| entry.record.domain == *domain))
        .filter(|entry| args.tag.iter().all(|tag| entry.record.tags.contains(tag)))
        .filter(|entry| since.is_none_or(|since| entry.record.time_ms >= since))
        .filter(|entry| until.is_none_or(|until| entry.record.time_ms < until))
        .collect();
    if let Some(last) = args.last {
        wanted.drain(..wanted.len().saturating_sub(last));
    }
    if app.output.json {
        app.output.json_line(&PointsView { points: wanted.into_iter().map(PointView::from).collect() })?;
        return Ok(Exit::Done);
    }
    app.output.bytes(table(&all, &wanted, args.long, &work).render().as_bytes())?;
    Ok(Exit::Done)
}

fn table(all: &[PointEntry], wanted: &[&PointEntry], long: bool, work: &Work) -> Table {
    let mut titles = vec!["ID", "DOMAIN", "TIME", "LEVEL", "BASE", ">SIZE", ">CHANGED", ">NEW", ">STORED"];
    if long {
        titles = vec![
            "ID",
            "DOMAIN",
            "TIME",
            "LEVEL",
            "BASE",
            "DISKS",
            ">SIZE",
            ">DIRTY",
            ">READ",
            ">CHANGED",
            ">NEW",
            ">STORED",
            ">METADATA",
            ">SINCE BASE",
            "TAGS",
        ];
    }
    let mut table = Table::new(&titles);
    for entry in wanted {
        let (record, stats) = (&entry.record, &entry.stats);
        let disk_size = record.disks.iter().map(|disk| disk.manifest.size).fold(0, u64::saturating_add);
        let mut row = vec![
            short_id(all, record.id),
            record.domain.clone(),
            units::local(record.time_ms, &work.now),
            level(record.level).to_owned(),
            record.base.map_or_else(|| "-".into(), |base| short_id(all, base)),
        ];
        if long {
            let disks: Vec<&str> = record.disks.iter().map(|disk| disk.target.as_str()).collect();
            row.push(disks.join(","));
            row.extend([disk_size, stats.dirty_bytes, stats.read_bytes].map(units::size));
        } else {
            row.push(units::size(disk_size));
        }
        row.extend([stats.changed_bytes, stats.new_bytes, stats.stored_bytes].map(units::size));
        if long {
            row.push(units::size(stats.metadata_bytes));
            row.push(stats.since_base_bytes.map_or_else(|| "-".into(), units::size));
            row.push(record.tags.join(","));
        }
        table.row(row);
    }
    table
}

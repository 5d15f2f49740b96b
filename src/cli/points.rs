//! `vmkeep points`.

use serde::Serialize;
use vmkeep::error::{Error, Result};
use vmkeep::format::session::VerifiedLevel;
use vmkeep::id::PointId;
use vmkeep::ops::PointEntry;
use vmkeep::ops::points::standing;
use vmkeep::ops::select::{ShortIds, parse_moments};
use vmkeep::repo::Catalog;

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
    /// The forgotten points that no prune has swept yet, which undelete can bring back
    #[arg(long)]
    forgotten: bool,
}

#[derive(Debug, Serialize)]
struct PointsView<'a> {
    points: Vec<ListedPoint<'a>>,
}

#[derive(Debug, Serialize)]
struct ListedPoint<'a> {
    #[serde(flatten)]
    point: PointView<'a>,
    state: StateView,
}

/// What is known of a point beside its record.
#[derive(Debug, Serialize)]
struct StateView {
    /// Damage if the newest verify found it, else the most thorough one that found it sound since.
    verified: Option<VerifiedView>,
    held: Option<HeldView>,
    forgotten: bool,
}

#[derive(Debug, Serialize)]
struct VerifiedView {
    level: VerifiedLevel,
    time: String,
    sound: bool,
}

#[derive(Debug, Serialize)]
struct HeldView {
    until: Option<String>,
    reason: String,
}

impl StateView {
    fn of(catalog: &Catalog, id: PointId, now_ms: i64) -> Self {
        let state = standing(catalog, id);
        let held = catalog
            .held(id, now_ms)
            .map(|hold| HeldView { until: hold.until_ms.map(units::utc), reason: hold.reason.clone() });
        Self {
            verified: state.map(|state| VerifiedView {
                level: state.level,
                time: units::utc(state.time_ms),
                sound: state.sound,
            }),
            held,
            forgotten: catalog.point(id).is_none(),
        }
    }

    /// Returns it in a few words.
    fn words(&self) -> String {
        let mut words = Vec::new();
        match &self.verified {
            Some(VerifiedView { sound: false, .. }) => words.push("damaged"),
            Some(VerifiedView { level: VerifiedLevel::Structure, .. }) => words.push("structure verified"),
            Some(_) => words.push("verified"),
            None => {}
        }
        words.extend(self.held.as_ref().map(|_| "held"));
        if words.is_empty() { "-".to_owned() } else { words.join(", ") }
    }
}

/// Runs the command.
///
/// # Errors
/// Those of the repository; a time that is none.
pub fn run(args: &Args, app: &App) -> Result<Exit> {
    let work = Work::open(app)?;
    let catalog = work.repository.catalog(&work.progress)?;
    let all = if args.forgotten { catalog.forgotten() } else { catalog.points() };
    let now_ms = work.now.timestamp().as_millisecond();
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
        let listed = wanted.into_iter().map(|entry| ListedPoint {
            point: PointView::from(entry),
            state: StateView::of(&catalog, entry.record.id, now_ms),
        });
        app.output.json_line(&PointsView { points: listed.collect() })?;
        return Ok(Exit::Done);
    }
    let state = |id| StateView::of(&catalog, id, now_ms).words();
    app.output.bytes(table(all, &wanted, args.long, &work, &state).render().as_bytes())?;
    Ok(Exit::Done)
}

fn table(
    all: &[PointEntry],
    wanted: &[&PointEntry],
    long: bool,
    work: &Work,
    state: &dyn Fn(PointId) -> String,
) -> Table {
    let mut titles =
        vec!["ID", "DOMAIN", "TIME", "LEVEL", "BASE", ">SIZE", ">CHANGED", ">NEW", ">STORED", "STATE"];
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
            "STATE",
        ];
    }
    let mut table = Table::new(&titles);
    let ids = ShortIds::of(all);
    for entry in wanted {
        let (record, stats) = (&entry.record, &entry.stats);
        let disk_size = record.disks.iter().map(|disk| disk.manifest.size).fold(0, u64::saturating_add);
        let mut row = vec![
            ids.short(record.id),
            record.domain.clone(),
            units::local(record.time_ms, &work.now),
            level(record.level).to_owned(),
            record.base.map_or_else(|| "-".into(), |base| ids.short(base)),
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
        row.push(state(record.id));
        table.row(row);
    }
    table
}

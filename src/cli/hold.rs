//! `vmkeep hold`, `unhold` and `undelete`: keeping points from being forgotten, and having forgotten ones back.

use jiff::Span;
use serde::Serialize;
use vmkeep::error::{Error, Result};
use vmkeep::id::PointId;
use vmkeep::ops::forget::{hold, undelete, unhold};
use vmkeep::ops::select::{ShortIds, parse_moments};

use super::exit::Exit;
use super::work::Work;
use super::{App, units};

#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  vmkeep hold web01@2026-07-05
  vmkeep hold 3fa9 --until 1y --reason 'audit 2026'
  vmkeep hold web01~2 --until 2027-01-01

A held point is neither forgotten nor dropped, not even with --force, until the hold expires or unhold releases it.")]
pub struct HoldArgs {
    /// The points to hold
    #[arg(value_name = "POINT", required = true)]
    points: Vec<String>,
    /// A time, or a span from now, after which the hold is over [default: never]
    #[arg(long, value_name = "TIME|SPAN")]
    until: Option<String>,
    /// Why; shown where the hold keeps the point
    #[arg(long, value_name = "TEXT", default_value = "by hand")]
    reason: String,
    /// Only say what would be held
    #[arg(short = 'n', long)]
    dry_run: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  vmkeep unhold web01@2026-07-05")]
pub struct UnholdArgs {
    /// The points to release
    #[arg(value_name = "POINT", required = true)]
    points: Vec<String>,
    /// Only say what would be released
    #[arg(short = 'n', long)]
    dry_run: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  vmkeep points --forgotten
  vmkeep undelete 3fa9

A forgotten point can be had back until a prune has swept it.")]
pub struct UndeleteArgs {
    /// The forgotten points to bring back, as `vmkeep points --forgotten` shows them
    #[arg(value_name = "POINT", required = true)]
    points: Vec<String>,
    /// Only say what would be brought back
    #[arg(short = 'n', long)]
    dry_run: bool,
}

#[derive(Debug, Serialize)]
struct ChangeView<'a> {
    message_type: &'static str,
    points: &'a [PointId],
    until: Option<String>,
    dry_run: bool,
}

/// Runs `hold`.
///
/// # Errors
/// Those of the selectors and of the repository; a time that is none, or over.
pub fn run_hold(args: &HoldArgs, app: &App) -> Result<Exit> {
    let work = Work::open(app)?;
    let entries = work.points()?;
    let ids = work.select_all(&entries, &args.points)?;
    let until_ms = args.until.as_deref().map(|text| until(text, &work)).transpose()?;
    if !args.dry_run {
        for id in &ids {
            hold(&work.repository, *id, until_ms, &args.reason, &work.progress)?;
        }
    }
    let short = ShortIds::of(&entries);
    let names = ids.iter().map(|id| short.short(*id)).collect();
    report(app, &work, ["would hold", "held"], &ids, names, until_ms, args.dry_run)
}

/// Runs `unhold`.
///
/// # Errors
/// Those of the selectors and of the repository.
pub fn run_unhold(args: &UnholdArgs, app: &App) -> Result<Exit> {
    let work = Work::open(app)?;
    let catalog = work.repository.catalog(&work.progress)?;
    let entries = catalog.points();
    let (held, free): (Vec<PointId>, Vec<PointId>) =
        work.select_all(entries, &args.points)?.into_iter().partition(|id| !catalog.holds(*id).is_empty());
    if !args.dry_run {
        for id in &held {
            unhold(&work.repository, *id, &work.progress)?;
        }
    }
    let short = ShortIds::of(entries);
    let names = |ids: &[PointId]| ids.iter().map(|id| short.short(*id)).collect::<Vec<_>>();
    if !free.is_empty() && !app.output.quiet && !app.output.json {
        work.progress.clear();
        let count = units::count(free.len(), "point");
        app.output.line(&format!("nothing held {count} ({})", names(&free).join(", ")))?;
    }
    if held.is_empty() && !app.output.json {
        return Ok(Exit::Done);
    }
    let names = names(&held);
    report(app, &work, ["would release", "released"], &held, names, None, args.dry_run)
}

/// Runs `undelete`.
///
/// # Errors
/// Those of the selectors, which select among the forgotten points, and of the repository.
pub fn run_undelete(args: &UndeleteArgs, app: &App) -> Result<Exit> {
    let work = Work::open(app)?;
    let catalog = work.repository.catalog(&work.progress)?;
    let ids = work.select_all(catalog.forgotten(), &args.points)?;
    if !args.dry_run {
        for id in &ids {
            undelete(&work.repository, *id, &work.progress)?;
        }
    }
    let short = ShortIds::of(catalog.forgotten());
    let names = ids.iter().map(|id| short.short(*id)).collect();
    report(app, &work, ["would bring back", "brought back"], &ids, names, None, args.dry_run)
}

/// Reads a time, or a span from now on.
fn until(text: &str, work: &Work) -> Result<i64> {
    let span: Option<Span> = units::parse_span(text).ok();
    let until_ms = match span {
        Some(span) => {
            let end = work.now.checked_add(span);
            end.map_err(|_| Error::Usage(format!("{text:?} is beyond any calendar")))?
                .timestamp()
                .as_millisecond()
        }
        None => {
            let moments = parse_moments(text, &work.now);
            let moment = moments.first();
            moment.ok_or_else(|| Error::Usage(format!("{text:?} is neither a time nor a span")))?.start_ms
        }
    };
    if until_ms <= work.now.timestamp().as_millisecond() {
        return Err(Error::Usage(format!("{text:?} is over already")));
    }
    Ok(until_ms)
}

fn report(
    app: &App,
    work: &Work,
    verbs: [&str; 2],
    ids: &[PointId],
    names: Vec<String>,
    until_ms: Option<i64>,
    dry_run: bool,
) -> Result<Exit> {
    work.progress.clear();
    if app.output.json {
        let until = until_ms.map(units::utc);
        app.output.json_line(&ChangeView { message_type: "summary", points: ids, until, dry_run })?;
    } else if !app.output.quiet {
        let [would, did] = verbs;
        let verb = if dry_run { would } else { did };
        let until = until_ms.map(|ms| format!(" until {}", units::local(ms, &work.now))).unwrap_or_default();
        let count = units::count(ids.len(), "point");
        app.output.line(&format!("{verb} {count} ({}){until}", names.join(", ")))?;
    }
    Ok(Exit::Done)
}

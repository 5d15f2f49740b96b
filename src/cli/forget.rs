//! `vmkeep forget`: points by name, or by a policy.

use std::collections::BTreeMap;

use jiff::Span;
use serde::Serialize;
use vmkeep::error::{Error, Result};
use vmkeep::id::PointId;
use vmkeep::monitor::Monitor;
use vmkeep::ops::PointEntry;
use vmkeep::ops::forget::{check_guards, facts, forget, guards, plan_prune};
use vmkeep::ops::freed::{Freed, FreedReport, freed};
use vmkeep::ops::prune::{PruneOptions, prune};
use vmkeep::ops::retention::{Count, Decision, GroupBy, Period, Policy, decide};
use vmkeep::ops::select::ShortIds;
use vmkeep::repo::Catalog;
use vmkeep::storage;

use super::exit::Exit;
use super::output::{Table, confirm};
use super::work::{Work, environment};
use super::{App, units};

#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  vmkeep forget web01~3
  vmkeep forget 3fa9 77c2 -n
  vmkeep forget --keep-daily 7 --keep-weekly 5 --keep-monthly 12 --prune
  vmkeep forget web01 db01 --keep-within 30d --keep-yearly unlimited -n

With --keep options a point stays if any of them keeps it; each domain is looked at by itself. -n shows what would \
go, why the rest stays, and how much space that would free; with --prune also what the prune would do.

A forgotten point is no longer shown and restores no longer; all others restore as before, whatever they were \
compared with. The space is reclaimed by prune; until then undelete brings a point back.

Without --force these are not forgotten: the newest two points of a domain, the last one that verify found sound, and \
more than half of the points of the domains concerned. The order of the points counts, not this host's clock, and all \
points of a domain, whatever --tag says. A held point never is. With -n, what would be refused is shown all the same, then \
why (exit code 1).

A copy that `repair points` made counts as one with its point while that is there, stays with it, and is not guarded.")]
pub struct Args {
    /// The points to forget; with --keep options, the domains that the policy is for [default: all]
    #[arg(value_name = "POINT|DOMAIN", required_unless_present = "policy")]
    scope: Vec<String>,
    #[command(flatten)]
    keep: Keep,
    /// Apply the policy only to points with this tag
    #[arg(long, value_name = "TAG", requires = "policy")]
    tag: Vec<String>,
    /// What points have in common that are looked at together
    #[arg(long, value_name = "domain,tags|none", requires = "policy", default_value = "domain", value_parser = parse_group_by)]
    group_by: GroupBy,
    /// Forget protected points too, and more than half of all
    #[arg(short, long)]
    force: bool,
    /// Prune afterwards
    #[arg(long)]
    prune: bool,
    /// Only say what would be forgotten, and what that would free
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

/// The policy's options.
#[derive(Debug, Default, clap::Args)]
#[group(id = "policy", multiple = true)]
#[command(next_help_heading = "Policy (N: a number, or unlimited; SPAN: as in 2y5m7d3h)")]
struct Keep {
    /// Keep the newest N points
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = parse_count)]
    keep_last: Option<Count>,
    /// Keep the newest point of each of the last N hours that have one
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = parse_count)]
    keep_hourly: Option<Count>,
    /// The same for days
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = parse_count)]
    keep_daily: Option<Count>,
    /// The same for weeks, from Monday on
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = parse_count)]
    keep_weekly: Option<Count>,
    /// The same for months
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = parse_count)]
    keep_monthly: Option<Count>,
    /// The same for years
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = parse_count)]
    keep_yearly: Option<Count>,
    /// Keep all points within this time before the newest one
    #[arg(long, value_name = "SPAN", value_parser = units::parse_span)]
    keep_within: Option<Span>,
    /// Keep one an hour within this time before the newest one
    #[arg(long, value_name = "SPAN", value_parser = units::parse_span)]
    keep_within_hourly: Option<Span>,
    /// Keep one a day within this time
    #[arg(long, value_name = "SPAN", value_parser = units::parse_span)]
    keep_within_daily: Option<Span>,
    /// Keep one a week within this time
    #[arg(long, value_name = "SPAN", value_parser = units::parse_span)]
    keep_within_weekly: Option<Span>,
    /// Keep one a month within this time
    #[arg(long, value_name = "SPAN", value_parser = units::parse_span)]
    keep_within_monthly: Option<Span>,
    /// Keep one a year within this time
    #[arg(long, value_name = "SPAN", value_parser = units::parse_span)]
    keep_within_yearly: Option<Span>,
    /// Keep points with this tag
    #[arg(long, value_name = "TAG")]
    keep_tag: Vec<String>,
}

fn parse_count(text: &str) -> Result<Count, String> {
    if matches!(text, "unlimited" | "-1") {
        return Ok(Count::Unlimited);
    }
    text.parse().map(Count::Of).map_err(|_| format!("{text:?} is neither a number nor unlimited"))
}

fn parse_group_by(text: &str) -> Result<GroupBy, String> {
    let mut group_by = GroupBy { domain: false, tags: false };
    for part in text.split(',') {
        match part {
            "domain" => group_by.domain = true,
            "tags" => group_by.tags = true,
            "none" if text == "none" => {}
            _ => return Err(format!("{part:?} is none of domain, tags and none")),
        }
    }
    Ok(group_by)
}

impl Keep {
    fn policy(&self, group_by: GroupBy) -> Policy {
        let counts = [
            (Period::Last, self.keep_last),
            (Period::Hourly, self.keep_hourly),
            (Period::Daily, self.keep_daily),
            (Period::Weekly, self.keep_weekly),
            (Period::Monthly, self.keep_monthly),
            (Period::Yearly, self.keep_yearly),
        ];
        let within = [
            (Period::Last, self.keep_within),
            (Period::Hourly, self.keep_within_hourly),
            (Period::Daily, self.keep_within_daily),
            (Period::Weekly, self.keep_within_weekly),
            (Period::Monthly, self.keep_within_monthly),
            (Period::Yearly, self.keep_within_yearly),
        ];
        Policy {
            counts: counts.into_iter().filter_map(|(period, count)| Some((period, count?))).collect(),
            within: within.into_iter().filter_map(|(period, span)| Some((period, span?))).collect(),
            tags: self.keep_tag.clone(),
            group_by,
        }
    }

    fn is_given(&self) -> bool {
        let policy = self.policy(GroupBy::default());
        !(policy.counts.is_empty() && policy.within.is_empty() && policy.tags.is_empty())
    }
}

/// What a run decided of one point.
#[derive(Debug, Serialize)]
struct DecisionView<'a> {
    point: PointId,
    domain: &'a str,
    time: String,
    keep: bool,
    reasons: &'a [String],
    guards: &'a [&'static str],
    /// What forgetting it alone would free; only for points to forget, and only with a dry run.
    freed: Option<Freed>,
}

#[derive(Debug, Serialize)]
struct ForgetView<'a> {
    message_type: &'static str,
    points: &'a [PointId],
    decisions: Vec<DecisionView<'a>>,
    freed: Option<Freed>,
    dry_run: bool,
}

/// Runs the command.
///
/// # Errors
/// Those of the selectors and of the repository; points that are protected; [`Error::Cancelled`] if the user does not
/// agree.
pub fn run(args: &Args, app: &App) -> Result<Exit> {
    let work = Work::open(app)?;
    let catalog = work.repository.catalog(&work.progress)?;
    let decisions = decisions(args, &work, &catalog)?;
    let chosen: Vec<PointId> =
        decisions.iter().filter(|decision| !decision.keep).map(|decision| decision.point).collect();
    let now_ms = work.now.timestamp().as_millisecond();
    let allowed = if args.force { Ok(()) } else { check_guards(&catalog, &chosen, now_ms) };
    if args.dry_run {
        return show(args, app, work, &catalog, &decisions, allowed);
    }
    allowed?;
    if !args.yes && !chosen.is_empty() {
        agree(catalog.points(), &chosen)?;
    }
    work.watch_signals()?;
    let reason = if args.keep.is_given() { "not kept by the policy" } else { "asked for by name" };
    forget(&work.repository, &chosen, reason, false, &work.progress)?;
    work.progress.clear();
    print(app, &work, &catalog, &decisions, &Shown { freed: None, dry_run: false })?;
    if args.prune {
        let report = prune(&work.repository, &PruneOptions::default(), &work.progress)?;
        work.progress.clear();
        super::prune::print(app, &report)?;
    }
    Ok(Exit::Done)
}

/// Shows the plan, then why it would not be carried out, if so, or what the prune behind it would do.
fn show(
    args: &Args,
    app: &App,
    work: Work,
    catalog: &Catalog,
    decisions: &[Decision],
    allowed: Result<()>,
) -> Result<Exit> {
    work.watch_signals()?;
    let chosen: Vec<PointId> =
        decisions.iter().filter(|decision| !decision.keep).map(|decision| decision.point).collect();
    let freed = match freed(&work.repository, &chosen, &work.progress) {
        // points can be forgotten all the same, damaged ones above all
        Err(error) if error.is_damage() => {
            work.progress.warn(&format!("what this would free cannot be told: {error}"));
            None
        }
        freed => Some(freed?),
    };
    work.progress.clear();
    print(app, &work, catalog, decisions, &Shown { freed: freed.as_ref(), dry_run: true })?;
    allowed?;
    // a hold, too, would be in the way
    forget(&work.repository, &chosen, "", true, &work.progress)?;
    if !args.prune {
        return Ok(Exit::Done);
    }
    let Work { repository, progress, .. } = work;
    // the local index is one program's at a time
    drop(repository);
    let storage = storage::open_url(app.settings.repository()?)?;
    let cache_dir = app.settings.cache_dir.as_ref().map(|(path, _)| path.as_path());
    let options = PruneOptions::default();
    let report = plan_prune(storage, cache_dir, &environment()?, &chosen, &options, &progress)?;
    progress.clear();
    super::prune::print(app, &report)?;
    Ok(Exit::Done)
}

fn agree(entries: &[PointEntry], chosen: &[PointId]) -> Result<()> {
    let ids = ShortIds::of(entries);
    let names: Vec<String> = chosen.iter().map(|id| ids.short(*id)).collect();
    let question = format!("forget {} ({})?", units::count(chosen.len(), "point"), names.join(", "));
    match confirm(&question) {
        Some(true) => Ok(()),
        Some(false) => Err(Error::Cancelled),
        None => Err(Error::Usage("without a terminal to ask on, forget needs -y".into())),
    }
}

fn decisions(args: &Args, work: &Work, catalog: &Catalog) -> Result<Vec<Decision>> {
    let entries = catalog.points();
    let now_ms = work.now.timestamp().as_millisecond();
    let guards = guards(catalog, now_ms);
    if !args.keep.is_given() {
        let chosen = work.select_all(entries, &args.scope)?;
        return Ok(chosen.into_iter().map(|point| Decision::drop(point, &guards)).collect());
    }
    let policy = args.keep.policy(args.group_by);
    if policy.is_empty() {
        return Err(Error::Usage("this policy keeps nothing; to forget points name them".into()));
    }
    for scope in &args.scope {
        if entries.iter().all(|entry| entry.record.domain != *scope) {
            let reason =
                format!("there is no domain {scope:?}; a policy is for domains, not for single points");
            return Err(Error::Usage(reason));
        }
    }
    let concerned: Vec<PointEntry> = entries
        .iter()
        .filter(|entry| args.scope.is_empty() || args.scope.contains(&entry.record.domain))
        .filter(|entry| args.tag.iter().all(|tag| entry.record.tags.contains(tag)))
        .cloned()
        .collect();
    let facts = |id| facts(catalog, id, now_ms, &|until| units::local(until, &work.now));
    Ok(decide(&concerned, &policy, &guards, &facts, &work.now, args.force))
}

fn table(
    work: &Work,
    catalog: &Catalog,
    decisions: &[Decision],
    freed: &BTreeMap<PointId, Freed>,
    dry_run: bool,
) -> Table {
    let mut table = Table::new(&["POINT", "DOMAIN", "TIME", "", "WHY", ">FREES"]);
    let ids = ShortIds::of(catalog.points());
    for decision in decisions {
        let Some(entry) = catalog.point(decision.point) else { continue };
        let frees = freed.get(&decision.point).map(|freed| units::size(freed.stored_bytes));
        let is_guarded = !decision.guards.is_empty();
        let what = match decision.keep {
            // one plan with force and without: what that changes is said below
            _ if dry_run && is_guarded => "guarded",
            true => "keep",
            false => "forget",
        };
        table.row([
            ids.short(decision.point),
            entry.record.domain.clone(),
            units::local(entry.record.time_ms, &work.now),
            what.to_owned(),
            if is_guarded { decision.guards.join(", ") } else { decision.reasons.join(", ") },
            frees.unwrap_or_default(),
        ]);
    }
    table
}

/// What is printed of a plan beside its decisions.
struct Shown<'a> {
    freed: Option<&'a FreedReport>,
    dry_run: bool,
}

fn print(app: &App, work: &Work, catalog: &Catalog, decisions: &[Decision], shown: &Shown<'_>) -> Result<()> {
    let Shown { freed, dry_run } = *shown;
    let by_point: BTreeMap<PointId, Freed> =
        freed.iter().flat_map(|report| &report.points).map(|point| (point.point, point.freed)).collect();
    let chosen: Vec<PointId> =
        decisions.iter().filter(|decision| !decision.keep).map(|decision| decision.point).collect();
    let together = freed.map(|report| report.together);
    if app.output.json {
        let views = decisions.iter().filter_map(|decision| {
            let record = &catalog.point(decision.point)?.record;
            Some(DecisionView {
                point: decision.point,
                domain: &record.domain,
                time: units::utc(record.time_ms),
                keep: decision.keep,
                reasons: &decision.reasons,
                guards: &decision.guards,
                freed: by_point.get(&decision.point).copied(),
            })
        });
        return app.output.json_line(&ForgetView {
            message_type: "summary",
            points: &chosen,
            decisions: views.collect(),
            freed: together,
            dry_run,
        });
    }
    if app.output.quiet {
        return Ok(());
    }
    app.output.bytes(table(work, catalog, decisions, &by_point, dry_run).render().as_bytes())?;
    let mut count = units::count(chosen.len(), "point");
    let guarded = decisions.iter().filter(|decision| !decision.guards.is_empty());
    let (stay, go): (Vec<_>, Vec<_>) = guarded.partition(|decision| decision.keep);
    if !go.is_empty() {
        count += &format!(", {} guarded", go.len());
    }
    let stay = match stay.len() {
        0 => String::new(),
        stay => format!("; {stay} guarded would go with --force"),
    };
    match together {
        None if dry_run => app.output.line(&format!("would forget {count}{stay}")),
        None => app.output.line(&format!("forgot {count}")),
        Some(freed) => app.output.line(&format!(
            "would forget {count}; {} of content, about {} as stored, would be free after `vmkeep prune --max-unused 0`{stay}",
            units::size(freed.content_bytes),
            units::size(freed.stored_bytes)
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_groups_are_read() {
        assert_eq!(parse_count("7"), Ok(Count::Of(7)));
        assert_eq!(parse_count("unlimited"), Ok(Count::Unlimited));
        assert!(parse_count("many").is_err() && parse_count("-2").is_err());
        assert_eq!(parse_group_by("domain,tags"), Ok(GroupBy { domain: true, tags: true }));
        assert_eq!(parse_group_by("none"), Ok(GroupBy { domain: false, tags: false }));
        assert!(parse_group_by("host").is_err() && parse_group_by("").is_err());
    }
}

//! Retention: which points a policy keeps, and why. Pure: it decides, [`super::forget`] carries out.
//!
//! Points are grouped (by domain, unless asked otherwise), each group is looked at from its newest point back, and
//! each rule keeps the newest point of so many of its periods; a point stays if any rule keeps it. A point that
//! is dated in the future is left alone: it is neither dropped nor counted as the newest of anything. A copy that a
//! repair made of a damaged point stays as long as that one does, and counts with it as one point.

use std::collections::{BTreeMap, BTreeSet};

use jiff::tz::TimeZone;
use jiff::{Span, Timestamp, ZonedDateTime};
use serde::Serialize;

use crate::format::point::PointRecord;
use crate::id::PointId;
use crate::ops::repaired::copies;
use crate::repo::PointEntry;

/// How many periods a rule keeps a point of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Count {
    Of(u32),
    Unlimited,
}

/// What a rule counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Period {
    /// Every point is a period of its own.
    Last,
    Hourly,
    Daily,
    /// Weeks begin on Monday, by ISO 8601.
    Weekly,
    Monthly,
    Yearly,
}

impl Period {
    /// All of them, shortest first.
    pub const ALL: [Self; 6] =
        [Self::Last, Self::Hourly, Self::Daily, Self::Weekly, Self::Monthly, Self::Yearly];

    /// Returns its name, as in the option `--keep-NAME`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Last => "last",
            Self::Hourly => "hourly",
            Self::Daily => "daily",
            Self::Weekly => "weekly",
            Self::Monthly => "monthly",
            Self::Yearly => "yearly",
        }
    }

    /// Returns the name of the period that a time lies in; `number` distinguishes points.
    fn name_of(self, time: &ZonedDateTime, number: usize) -> String {
        match self {
            Self::Last => number.to_string(),
            Self::Hourly => time.strftime("%Y-%m-%d %H:00").to_string(),
            Self::Daily => time.strftime("%Y-%m-%d").to_string(),
            Self::Weekly => time.strftime("%G-W%V").to_string(),
            Self::Monthly => time.strftime("%Y-%m").to_string(),
            Self::Yearly => time.strftime("%Y").to_string(),
        }
    }
}

/// A policy: what to keep. A point that none of it names is dropped.
#[derive(Debug, Clone, Default)]
pub struct Policy {
    /// The newest point of each of the last so many periods that have one.
    pub counts: BTreeMap<Period, Count>,
    /// The newest point of each period within this time before the group's newest point.
    pub within: BTreeMap<Period, Span>,
    /// Points with one of these tags.
    pub tags: Vec<String>,
    pub group_by: GroupBy,
}

/// What points have in common that are looked at together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupBy {
    pub domain: bool,
    pub tags: bool,
}

impl Default for GroupBy {
    fn default() -> Self {
        Self { domain: true, tags: false }
    }
}

impl Policy {
    /// Returns true if it would keep nothing.
    pub fn is_empty(&self) -> bool {
        let counts = self.counts.values().all(|count| *count == Count::Of(0));
        counts && self.within.is_empty() && self.tags.is_empty()
    }
}

/// What is known of a point beside its record.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// Until when and why it is held, if it is.
    pub held: Option<String>,
    /// A verify of its content has found it sound, and none since then has found it damaged.
    pub verified: bool,
}

/// What is to become of a point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Decision {
    pub point: PointId,
    pub keep: bool,
    /// Why it is kept; empty if it is not.
    pub reasons: Vec<String>,
    /// What protects it, in words, where nothing else keeps it: then it goes only by force.
    pub guards: Vec<&'static str>,
}

/// Why points that a policy does not keep stay unless `--force` is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guard {
    NewestTwo,
    /// Where others seem to be of the future: a clock is wrong, theirs or ours.
    NewestTwoByNow,
    LastVerified,
}

/// What protects which point.
pub type Guards = BTreeMap<PointId, Vec<Guard>>;

impl Guard {
    /// Returns it in words.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NewestTwo => "one of the newest two of its domain",
            Self::NewestTwoByNow => "one of the newest two of its domain that are not dated in the future",
            Self::LastVerified => "the last of its domain that was verified",
        }
    }
}

/// Returns the points that are protected, by domain: the newest two, and the last one that was verified.
///
/// `points` are all there are, oldest first: their order counts, not this host's clock, which may be behind. Where some
/// are dated in the future, what would be protected without them is protected too. A copy of a damaged point that is
/// still there is not: it holds nothing that that one does not hold.
pub fn guarded(points: &[PointEntry], now_ms: i64, facts: &dyn Fn(PointId) -> Facts) -> Guards {
    let copies = copies(points);
    let mut by_domain: BTreeMap<&str, Vec<&PointRecord>> = BTreeMap::new();
    for record in points.iter().map(|entry| &entry.record).filter(|record| !copies.contains_key(&record.id)) {
        by_domain.entry(&record.domain).or_default().push(record);
    }
    let mut guards = Guards::new();
    for all in by_domain.values() {
        let by_now: Vec<&PointRecord> =
            all.iter().copied().filter(|record| record.time_ms <= now_ms).collect();
        for (records, newest) in [(all, Guard::NewestTwo), (&by_now, Guard::NewestTwoByNow)] {
            let two = records.iter().rev().take(2).map(|record| (record.id, newest));
            let verified = records.iter().rev().find(|record| facts(record.id).verified);
            for (id, guard) in two.chain(verified.map(|record| (record.id, Guard::LastVerified))) {
                let known = guards.entry(id).or_default();
                let is_said = known.contains(&guard)
                    || guard == Guard::NewestTwoByNow && known.contains(&Guard::NewestTwo);
                if !is_said {
                    known.push(guard);
                }
            }
        }
    }
    guards
}

/// What the points of a group have in common: their domain, their tags.
type GroupKey<'a> = (Option<&'a str>, Option<Vec<&'a str>>);

/// One rule at work on one group.
struct Rule {
    period: Period,
    left: Count,
    /// Only points at or after this time, milliseconds since 1970.
    since_ms: Option<i64>,
    /// How the rule is called in reasons.
    name: String,
    last: Option<String>,
}

impl Rule {
    /// Returns why the rule keeps a point, if it does. Points come newest first.
    fn keeps(
        &mut self,
        time: &ZonedDateTime,
        time_ms: i64,
        number: usize,
        is_oldest: bool,
    ) -> Option<String> {
        if self.left == Count::Of(0) || self.since_ms.is_some_and(|since| time_ms < since) {
            return None;
        }
        let period = self.period.name_of(time, number);
        let is_new = self.last.as_ref() != Some(&period);
        // while periods are left, the oldest point stands for those before it that have none
        if !is_new && (!is_oldest || self.since_ms.is_some()) {
            return None;
        }
        if let Count::Of(left) = &mut self.left {
            *left -= 1;
        }
        let reason = match self.period {
            Period::Last => self.name.clone(),
            _ if is_new => format!("{} {period}", self.name),
            _ => format!("{} (the oldest)", self.name),
        };
        self.last = Some(period);
        Some(reason)
    }
}

/// Returns what becomes of each point, in the order given (oldest first). `now` gives days and weeks their zone.
///
/// Held points are kept whatever the policy says; guarded ones are kept unless `force`. The guards are those of all points,
/// of which `points` may be a part.
pub fn decide(
    points: &[PointEntry],
    policy: &Policy,
    guards: &Guards,
    facts: &dyn Fn(PointId) -> Facts,
    now: &ZonedDateTime,
    force: bool,
) -> Vec<Decision> {
    let now_ms = now.timestamp().as_millisecond();
    let copies = copies(points);
    let mut groups: BTreeMap<GroupKey<'_>, Vec<usize>> = BTreeMap::new();
    for (number, entry) in points.iter().enumerate() {
        let domain = policy.group_by.domain.then_some(entry.record.domain.as_str());
        let tags = policy.group_by.tags.then(|| sorted(&entry.record.tags));
        groups.entry((domain, tags)).or_default().push(number);
    }
    let mut decisions: Vec<Decision> =
        points.iter().map(|entry| Decision::drop(entry.record.id, &Guards::new())).collect();
    let counts = |number: &usize| {
        let record = points.get(*number).map(|entry| &entry.record);
        record.is_some_and(|record| record.time_ms <= now_ms && !copies.contains_key(&record.id))
    };
    for members in groups.values() {
        let present: Vec<usize> = members.iter().copied().filter(counts).collect();
        for (number, reason) in kept_by_rules(points, &present, policy, now.time_zone()) {
            if let Some(decision) = decisions.get_mut(number) {
                decision.reasons.push(reason);
            }
        }
    }
    for (entry, decision) in points.iter().zip(&mut decisions) {
        if entry.record.time_ms > now_ms {
            decision.reasons.push("dated in the future".into());
        }
        let tags = entry.record.tags.iter().filter(|tag| policy.tags.contains(tag));
        decision.reasons.extend(tags.map(|tag| format!("tag {tag}")));
        decision.reasons.extend(facts(decision.point).held);
        if decision.reasons.is_empty() {
            decision.guards = words(guards, decision.point);
            let kept_by = decision.guards.iter().filter(|_| !force).map(|guard| (*guard).to_owned());
            decision.reasons.extend(kept_by);
        }
        decision.keep = !decision.reasons.is_empty();
    }
    keep_copies(&mut decisions, &copies);
    decisions
}

/// A copy stays with the point that it was made of.
fn keep_copies(decisions: &mut [Decision], copies: &BTreeMap<PointId, PointId>) {
    let kept: BTreeSet<PointId> =
        decisions.iter().filter(|decision| decision.keep).map(|decision| decision.point).collect();
    for decision in decisions.iter_mut().filter(|decision| !decision.keep) {
        if let Some(original) = copies.get(&decision.point).filter(|original| kept.contains(*original)) {
            decision.keep = true;
            decision.reasons.push(format!("repaired from {}, which stays", original.short()));
        }
    }
}

fn words(guards: &Guards, point: PointId) -> Vec<&'static str> {
    let guards = guards.get(&point).map(Vec::as_slice).unwrap_or_default();
    guards.iter().map(|guard| guard.as_str()).collect()
}

impl Decision {
    /// Returns that a point goes, with what protects it unless there is force.
    pub fn drop(point: PointId, guards: &Guards) -> Self {
        Self { point, keep: false, reasons: Vec::new(), guards: words(guards, point) }
    }
}

fn sorted(tags: &[String]) -> Vec<&str> {
    let mut tags: Vec<&str> = tags.iter().map(String::as_str).collect();
    tags.sort_unstable();
    tags
}

/// Returns which members of a group, oldest first, the rules keep, and why.
fn kept_by_rules(
    points: &[PointEntry],
    members: &[usize],
    policy: &Policy,
    zone: &TimeZone,
) -> Vec<(usize, String)> {
    let local = |time_ms: i64| {
        Timestamp::from_millisecond(time_ms).unwrap_or(Timestamp::MIN).to_zoned_datetime(zone.clone())
    };
    let Some(newest) = members.last().and_then(|number| points.get(*number)) else { return Vec::new() };
    let newest = local(newest.record.time_ms);
    let mut rules: Vec<Rule> = Vec::new();
    for (period, count) in &policy.counts {
        let name = period.as_str().to_owned();
        rules.push(Rule { period: *period, left: *count, since_ms: None, name, last: None });
    }
    for (period, span) in &policy.within {
        // a span that leads before the beginning of time keeps everything
        let since = newest.checked_sub(*span).map_or(i64::MIN, |time| time.timestamp().as_millisecond());
        let name = match period {
            Period::Last => format!("within {span:#}"),
            _ => format!("{} within {span:#}", period.as_str()),
        };
        let left = Count::Unlimited;
        rules.push(Rule { period: *period, left, since_ms: Some(since), name, last: None });
    }
    let mut kept = Vec::new();
    for (age, number) in members.iter().rev().enumerate() {
        let Some(entry) = points.get(*number) else { continue };
        let time = local(entry.record.time_ms);
        let is_oldest = age + 1 == members.len();
        for rule in &mut rules {
            let reason = rule.keeps(&time, entry.record.time_ms, *number, is_oldest);
            kept.extend(reason.map(|reason| (*number, reason)));
        }
    }
    kept
}

#[cfg(test)]
mod tests;

use std::sync::Arc;

use super::*;
use crate::ops::select::tests::{entry, ms};

fn now() -> ZonedDateTime {
    let zone = TimeZone::get("Europe/Berlin").unwrap();
    "2026-07-07T10:00:00Z".parse::<Timestamp>().unwrap().to_zoned_datetime(zone)
}

/// One point of `web` a day at 02:00 UTC, the last on 7 July 2026.
fn days(count: u8) -> Vec<PointEntry> {
    let last = ms("2026-07-07T02:00:00Z");
    (0..count)
        .map(|no| entry([no, 0], "web", last - i64::from(count - 1 - no) * 86_400_000, None, &["vda"]))
        .collect()
}

fn counts(pairs: &[(Period, u32)]) -> Policy {
    let counts = pairs.iter().map(|(period, count)| (*period, Count::Of(*count))).collect();
    Policy { counts, ..Policy::default() }
}

fn no_facts(_: PointId) -> Facts {
    Facts::default()
}

fn decided(
    points: &[PointEntry],
    policy: &Policy,
    facts: &dyn Fn(PointId) -> Facts,
    force: bool,
) -> Vec<Decision> {
    let guards = guarded(points, now().timestamp().as_millisecond(), facts);
    decide(points, policy, &guards, facts, &now(), force)
}

/// The numbers of the kept points.
fn kept(points: &[PointEntry], policy: &Policy, force: bool) -> Vec<usize> {
    let decisions = decided(points, policy, &no_facts, force);
    (0..).zip(decisions).filter(|(_, decision)| decision.keep).map(|(number, _)| number).collect()
}

#[test]
fn each_rule_keeps_the_newest_of_its_periods() {
    let points = days(40);
    assert_eq!(kept(&points, &counts(&[(Period::Last, 3)]), true), [37, 38, 39]);
    assert_eq!(kept(&points, &counts(&[(Period::Daily, 4)]), true), [36, 37, 38, 39]);
    // 7 July is a Tuesday: this week's newest, then the Sundays 5 July and 28 June
    assert_eq!(kept(&points, &counts(&[(Period::Weekly, 3)]), true), [30, 37, 39]);
    // 29 May to 7 July: 7 July, 30 June, 31 May; a fourth month does not exist, the oldest stands for it
    assert_eq!(kept(&points, &counts(&[(Period::Monthly, 3)]), true), [2, 32, 39]);
    assert_eq!(kept(&points, &counts(&[(Period::Monthly, 4)]), true), [0, 2, 32, 39]);
    assert_eq!(kept(&points, &counts(&[(Period::Yearly, 1)]), true), [39]);
    let all: Vec<usize> = (0..40).collect();
    let unlimited = [(Period::Hourly, Count::Unlimited)].into_iter().collect();
    assert_eq!(kept(&points, &Policy { counts: unlimited, ..Policy::default() }, true), all);
    // rules add up
    let both = counts(&[(Period::Daily, 2), (Period::Weekly, 2)]);
    assert_eq!(kept(&points, &both, true), [37, 38, 39]);
}

#[test]
fn within_counts_from_the_newest_point() {
    let points = days(40);
    let within =
        |period, span: Span| Policy { within: [(period, span)].into_iter().collect(), ..Policy::default() };
    assert_eq!(kept(&points, &within(Period::Last, Span::new().days(2)), true), [37, 38, 39]);
    assert_eq!(kept(&points, &within(Period::Weekly, Span::new().days(10)), true), [30, 37, 39]);
    assert_eq!(kept(&points, &within(Period::Monthly, Span::new().months(1)), true), [32, 39]);
}

#[test]
fn several_points_of_a_day_count_as_one_day() {
    let mut points = days(3);
    let morning = entry([50, 0], "web", ms("2026-07-07T08:00:00Z"), None, &["vda"]);
    points.push(morning);
    assert_eq!(kept(&points, &counts(&[(Period::Daily, 2)]), true), [1, 3]);
    // a day begins at midnight in Berlin, not in Greenwich
    let late = entry([51, 0], "web", ms("2026-07-06T22:30:00Z"), None, &["vda"]);
    points.insert(2, late);
    assert_eq!(kept(&points, &counts(&[(Period::Daily, 2)]), true), [1, 4]);
}

#[test]
fn domains_do_not_compete_and_tags_can_group_and_keep() {
    let mut points = days(4);
    Arc::make_mut(&mut points[1].record).domain = "db".into();
    Arc::make_mut(&mut points[0].record).tags = vec!["audit".into()];
    let policy = counts(&[(Period::Last, 1)]);
    assert_eq!(kept(&points, &policy, true), [1, 3]);
    let group_by = GroupBy { domain: false, tags: false };
    assert_eq!(kept(&points, &Policy { group_by, ..policy.clone() }, true), [3]);
    let group_by = GroupBy { domain: false, tags: true };
    assert_eq!(kept(&points, &Policy { group_by, ..policy.clone() }, true), [0, 3]);
    assert_eq!(kept(&points, &Policy { tags: vec!["audit".into()], ..policy }, true), [0, 1, 3]);
}

#[test]
fn guards_keep_the_newest_two_and_the_last_verified() {
    let points = days(6);
    let policy = counts(&[(Period::Last, 1)]);
    assert_eq!(kept(&points, &policy, false), [4, 5]);
    let verified = points[2].record.id;
    let facts = |id: PointId| Facts { verified: id == verified, held: None };
    let decisions = decided(&points, &policy, &facts, false);
    assert_eq!(decisions[2].reasons, [Guard::LastVerified.as_str()]);
    let forced = decided(&points, &policy, &facts, true);
    assert!(!forced[2].keep, "force sets guards aside");
    let guards = |decisions: &[Decision]| decisions.iter().map(|one| one.guards.clone()).collect::<Vec<_>>();
    assert_eq!(guards(&forced), guards(&decisions), "and says so of the same points");
    let held = |id: PointId| Facts { verified: false, held: (id == verified).then(|| "held".into()) };
    assert!(decided(&points, &policy, &held, true)[2].keep, "force does not release a hold");
}

#[test]
fn guards_are_those_of_all_points_of_a_domain() {
    let points = days(6);
    let policy = counts(&[(Period::Last, 1)]);
    let guards = guarded(&points, now().timestamp().as_millisecond(), &no_facts);
    // as a filter by a tag would leave them
    let some = points[..3].to_vec();
    let decisions = decide(&some, &policy, &guards, &no_facts, &now(), false);
    assert_eq!(decisions.iter().filter(|decision| decision.keep).count(), 1, "{decisions:?}");
}

#[test]
fn guards_go_by_the_order_of_points_and_not_by_this_hosts_clock() {
    let points = days(6);
    let verified = points[4].record.id;
    let facts = |id: PointId| Facts { verified: id == verified, held: None };
    for days_behind in [0, 1, 3, 5, 1000] {
        let now_ms = now().timestamp().as_millisecond() - days_behind * 86_400_000;
        let guards = guarded(&points, now_ms, &facts);
        let is_guarded =
            |number: usize, guard| guards.get(&points[number].record.id).unwrap().contains(&guard);
        assert!(
            is_guarded(5, Guard::NewestTwo) && is_guarded(4, Guard::NewestTwo),
            "{days_behind}: {guards:?}"
        );
        assert!(is_guarded(4, Guard::LastVerified), "{days_behind}: {guards:?}");
    }
}

#[test]
fn a_repaired_copy_counts_as_one_with_its_point_and_stays_with_it() {
    let mut points = days(6);
    let original = points[4].record.clone();
    let mut copy = entry([0xcc, 0], "web", original.time_ms, None, &["vda"]);
    Arc::make_mut(&mut copy.record).tags = vec![format!("repaired-from-{}", original.id)];
    Arc::make_mut(&mut copy.record).predecessor = Some(original.id);
    points.insert(5, copy);
    let policy = counts(&[(Period::Last, 3)]);
    assert_eq!(kept(&points, &policy, true), [3, 4, 5, 6]);
    assert_eq!(kept(&points, &counts(&[(Period::Last, 1)]), false), [4, 5, 6]);
    assert_eq!(kept(&points, &counts(&[(Period::Last, 1)]), true), [6], "and goes with it");
    Arc::make_mut(&mut points[5].record).predecessor = None;
    assert_eq!(kept(&points, &policy, true), [4, 5, 6], "a tag alone makes no copy");
}

#[test]
fn a_point_from_the_future_is_left_alone() {
    let mut points = days(4);
    points.push(entry([60, 0], "web", ms("2030-01-01T00:00:00Z"), None, &["vda"]));
    // the newest that counts is still 7 July
    assert_eq!(kept(&points, &counts(&[(Period::Last, 1)]), true), [3, 4]);
    assert_eq!(kept(&points, &counts(&[(Period::Last, 1)]), false), [2, 3, 4]);
}

#[test]
fn reasons_name_rule_and_period() {
    let points = days(3);
    let policy = counts(&[(Period::Daily, 1), (Period::Weekly, 5)]);
    let decisions = decided(&points, &policy, &no_facts, true);
    assert_eq!(decisions[2].reasons, ["daily 2026-07-07", "weekly 2026-W28"]);
    assert_eq!(decisions[0].reasons, ["weekly 2026-W27"]);
    assert!(decisions[1].reasons.is_empty() && !decisions[1].keep);
    assert!(Policy::default().is_empty() && !policy.is_empty());
}

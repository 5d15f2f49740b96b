use std::sync::Arc;

use super::*;
use crate::format::point::{Consistency, PointRecord, PointStats, SourceKind};

fn entry(number: u8, level: Level, checkpoint: bool) -> PointEntry {
    PointEntry {
        record: Arc::new(PointRecord {
            id: PointId::from_bytes([number; 16]),
            domain: "web01".into(),
            domain_uuid: None,
            time_ms: i64::from(number),
            level,
            base: None,
            predecessor: None,
            checkpoint: checkpoint.then(|| format!("c{number}")),
            source: SourceKind::Running,
            consistency: Consistency::Crash,
            disks: Vec::new(),
            files: Vec::new(),
            xml_inactive: None,
            xml_live: None,
            tags: Vec::new(),
            host: String::new(),
            program: String::new(),
        }),
        stats: PointStats::default(),
    }
}

fn ids(entries: &[PointEntry]) -> Vec<u8> {
    entries.iter().map(|entry| entry.record.id.as_bytes()[0]).collect()
}

#[test]
fn the_week_has_the_bases_that_the_design_names() {
    use Level::{Differential, Full, Incremental};
    let week = [Full, Incremental, Incremental, Differential, Incremental, Differential];
    let mut points = Vec::new();
    let mut bases = Vec::new();
    for (number, level) in (1u8..).zip(week) {
        let plan = plan(&points, RequestedLevel::Is(level), false, None).expect("a plan");
        bases.push(plan.base.as_ref().map(|base| base.record.id.as_bytes()[0]));
        // whatever the level, only what is dirty since the newest checkpoint is read
        assert_eq!(ids(&plan.tracked).first().copied(), (number > 1).then(|| number - 1));
        points.push(entry(number, plan.level, plan.leaves_checkpoint));
    }
    assert_eq!(bases, [None, Some(1), Some(2), Some(1), Some(4), Some(1)]);
}

#[test]
fn a_differential_falls_back_to_the_checkpoint_of_the_full() {
    let points = [entry(1, Level::Full, true), entry(2, Level::Incremental, true)];
    let asked = RequestedLevel::Is(Level::Differential);
    assert_eq!(ids(&plan(&points, asked, false, None).expect("a plan").tracked), [2, 1]);
    assert_eq!(ids(&plan(&points, asked, true, None).expect("a plan").tracked), [1]);
}

#[test]
fn without_a_full_a_differential_is_one_and_says_so() {
    let plan = plan(&[], RequestedLevel::Is(Level::Differential), false, None).expect("a plan");
    assert_eq!(plan.level, Level::Full);
    assert!(plan.full_reason.is_some());
}

#[test]
fn auto_becomes_full_when_nothing_serves() {
    let mut auto = plan(&[entry(1, Level::Full, true)], RequestedLevel::Auto, false, None).expect("a plan");
    assert_eq!(auto.level, Level::Incremental);
    auto.settle(false);
    assert_eq!((auto.level, auto.base), (Level::Full, None));
}

#[test]
fn copy_and_latest_leave_no_checkpoint() {
    let points = [entry(1, Level::Full, true), entry(2, Level::Copy, false)];
    for level in [Level::Copy, Level::Latest] {
        let plan = plan(&points, RequestedLevel::Is(level), false, None).expect("a plan");
        assert!(!plan.leaves_checkpoint);
    }
    // the newest point has no checkpoint: what is dirty since the one before is more, and right
    let inc = plan(&points, RequestedLevel::Is(Level::Incremental), false, None).expect("a plan");
    assert_eq!(ids(&inc.tracked), [1]);
}

#[test]
fn at_most_two_checkpoints_stay() {
    let points =
        [entry(1, Level::Full, true), entry(2, Level::Incremental, true), entry(3, Level::Incremental, true)];
    assert_eq!(checkpoints_to_keep(&points, Level::Incremental, Some("c4")), ["c4", "c1"]);
    assert_eq!(checkpoints_to_keep(&points, Level::Full, Some("c4")), ["c4"]);
    assert_eq!(checkpoints_to_keep(&points, Level::Copy, None), ["c3", "c1"]);
}

#[test]
fn from_names_a_point_or_checkpoint_of_the_domain() {
    let points = [entry(1, Level::Full, true), entry(2, Level::Incremental, true)];
    let asked = RequestedLevel::Is(Level::Incremental);
    let by_name = plan(&points, asked, false, Some(&FromBase::Checkpoint("c1".into()))).expect("a plan");
    assert_eq!(ids(&by_name.tracked), [1]);
    let nothing = plan(&points, asked, false, Some(&FromBase::Checkpoint("c9".into())));
    assert!(matches!(nothing, Err(Error::NotFound { .. })));
    let full =
        plan(&points, RequestedLevel::Is(Level::Full), false, Some(&FromBase::Checkpoint("c1".into())));
    assert!(matches!(full, Err(Error::Usage(_))));
}

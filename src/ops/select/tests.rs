use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::tz::TimeZone;
use jiff::{Timestamp, ZonedDateTime};
use proptest::prelude::*;

use super::*;
use crate::format::point::{Consistency, DiskRecord, Level, Manifest, PointRecord, PointStats, SourceKind};

const DAY_MS: i64 = 86_400_000;

/// A Tuesday, noon, in Berlin's summer.
fn now() -> ZonedDateTime {
    let zone = TimeZone::get("Europe/Berlin").unwrap();
    "2026-07-07T10:00:00Z".parse::<Timestamp>().unwrap().to_zoned_datetime(zone)
}

pub(in crate::ops) fn ms(text: &str) -> i64 {
    text.parse::<Timestamp>().unwrap().as_millisecond()
}

pub(in crate::ops) fn entry(
    id: [u8; 2],
    domain: &str,
    time_ms: i64,
    checkpoint: Option<&str>,
    disks: &[&str],
) -> PointEntry {
    let mut bytes = [0x77; 16];
    bytes[..2].copy_from_slice(&id);
    let disk = |target: &&str| DiskRecord {
        target: (*target).to_owned(),
        manifest: Manifest { size: 4096, height: 0, root: None },
        format: "raw".into(),
        level: Level::Full,
        full_reason: None,
        has_bitmap: false,
    };
    let record = PointRecord {
        id: PointId::from_bytes(bytes),
        domain: domain.into(),
        domain_uuid: None,
        time_ms,
        level: Level::Full,
        base: None,
        predecessor: None,
        checkpoint: checkpoint.map(Into::into),
        source: SourceKind::File,
        consistency: Consistency::Off,
        disks: disks.iter().map(disk).collect(),
        files: Vec::new(),
        xml_inactive: None,
        xml_live: None,
        tags: Vec::new(),
        host: "h".into(),
        program: "p".into(),
    };
    PointEntry { record: record.into(), stats: PointStats::default() }
}

/// Mon 29 June to Sat 4 July: one point of `web` a day at 02:00 UTC, ids `10..`, `11..`, ...
fn week() -> Vec<PointEntry> {
    let start = ms("2026-06-29T02:00:00Z");
    (0..6u8)
        .map(|day| {
            let checkpoint = format!("cp{day}");
            let time_ms = start + i64::from(day) * DAY_MS;
            entry([0x10 + day, 0], "web", time_ms, Some(&checkpoint), &["vda", "vdb"])
        })
        .collect()
}

fn pick(entries: &[PointEntry], text: &str) -> Result<(String, Option<String>)> {
    let selected = select(entries, text, &now())?;
    let first = selected.entry.record.id.to_hex().chars().take(4).collect();
    Ok((first, selected.disk.map(str::to_owned)))
}

fn id_of(entries: &[PointEntry], text: &str) -> String {
    pick(entries, text).unwrap().0
}

fn candidates(entries: &[PointEntry], text: &str) -> usize {
    match pick(entries, text) {
        Err(Error::Selector { candidates, .. }) => candidates.len(),
        other => panic!("{text} gave {other:?}"),
    }
}

#[test]
fn every_form_selects() {
    let week = week();
    assert_eq!(id_of(&week, "12"), "1200");
    assert_eq!(id_of(&week, "latest"), "1500");
    assert_eq!(id_of(&week, "latest~2"), "1300");
    assert_eq!(id_of(&week, "web"), "1500");
    assert_eq!(id_of(&week, "web~5"), "1000");
    assert_eq!(id_of(&week, "web@2026-07-01"), "1200");
    // 02:00 UTC is 04:00 in Berlin
    assert_eq!(id_of(&week, "web@2026-07-01T03:59"), "1100");
    assert_eq!(id_of(&week, "web@2026-07-01T04:00"), "1200");
    assert_eq!(id_of(&week, "web@2026-07-01 04:00:00"), "1200");
    assert_eq!(id_of(&week, "web@2026-07-01T02:00Z"), "1200");
    assert_eq!(id_of(&week, "web@2026-07-01T02:00-01:00"), "1200");
    assert_eq!(id_of(&week, "web@2026-07-01T01:00-0100"), "1200");
    assert_eq!(id_of(&week, "web@2026-07-01T01:59Z"), "1100");
    assert_eq!(id_of(&week, "web@saturday"), "1500");
    assert_eq!(id_of(&week, "web@Wed"), "1200");
    assert_eq!(id_of(&week, "web@2030-01-01"), "1500");
    assert_eq!(id_of(&week, "web@cp1"), "1100");
    let with_disk = ("1200".to_owned(), Some("vdb".to_owned()));
    for text in ["12:vdb", "web~3:vdb", "web@cp2:vdb", "web@2026-07-01T04:00:vdb", "web@wed:vdb"] {
        assert_eq!(pick(&week, text).unwrap(), with_disk, "{text}");
    }
}

#[test]
fn what_fits_nothing_is_refused() {
    let week = week();
    for text in [
        "",
        ":",
        "~",
        "@",
        "ff",
        "wbe",
        "web~6",
        "web~",
        "web~x",
        "web~+1",
        "latest~6",
        "web@",
        "web@cp9",
        "web@2026-06-28",
        "web@2026-13-01",
        "web@2026-07-01T",
        "web@2026-07-01T4",
        "web@2026-07-01T04:00+99:00",
        "web@2026-07-0é",
        "Web",
        "latest@cp1",
        "web~99999999999999999999",
    ] {
        assert_eq!(candidates(&week, text), 0, "{text:?}");
    }
    assert_eq!(candidates(&[], "latest"), 0);
}

#[test]
fn a_missing_disk_is_named_with_those_there_are() {
    let week = week();
    let error = select(&week, "web:vdz", &now()).unwrap_err();
    assert_eq!(error.to_string(), "point 15007777 of web has no disk \"vdz\", it has vda, vdb");
}

#[test]
fn several_points_are_listed_and_none_is_picked() {
    let mut points = week();
    assert_eq!(candidates(&points, "1"), 6);
    // a domain named like the first digits of another's id, and newer than all
    points.push(entry([0x20, 0], "12", ms("2026-07-05T00:00:00Z"), None, &["vda"]));
    assert_eq!(candidates(&points, "12"), 2);
    assert_eq!(id_of(&points, "12~0"), "2000");
    assert_eq!(id_of(&points, "120"), "1200");
    // a domain called latest is the newest, then it is not
    points.push(entry([0x21, 0], "latest", ms("2026-07-06T00:00:00Z"), None, &["vda"]));
    assert_eq!(id_of(&points, "latest"), "2100");
    points.push(entry([0x22, 0], "db", ms("2026-07-06T00:00:01Z"), None, &["vda"]));
    assert_eq!(candidates(&points, "latest"), 2);
    // names with signs of the grammar
    points.push(entry([0x23, 0], "web~1", ms("2026-07-06T00:00:02Z"), None, &["vda"]));
    assert_eq!(candidates(&points, "web~1"), 2);
    points.push(entry([0x24, 0], "web@sat", ms("2026-07-06T00:00:03Z"), None, &["vda"]));
    assert_eq!(candidates(&points, "web@sat"), 2);
    points.push(entry([0x25, 0], "web:vda", ms("2026-07-06T00:00:04Z"), None, &["vda"]));
    assert_eq!(candidates(&points, "web:vda"), 2);
    assert_eq!(id_of(&points, "web:vda:vda"), "2500");
    assert_eq!(id_of(&points, "web:vdb"), "1500");
    // a checkpoint called like a weekday
    points.push(entry([0x26, 0], "web", ms("2026-07-06T00:00:05Z"), Some("wed"), &["vda"]));
    assert_eq!(candidates(&points, "web@wed"), 2);
}

#[test]
fn a_disk_does_not_decide_between_points() {
    let points = [entry([0xa1, 0], "a", 1, None, &["vda"]), entry([0xa2, 0], "b", 2, None, &["vda", "vdb"])];
    assert_eq!(candidates(&points, "a:vdb"), 2);
    assert_eq!(id_of(&points, "a2:vdb"), "a200");
}

#[test]
fn points_of_one_instant_are_never_ranked() {
    let points = [
        entry([1, 0], "web", 5, None, &[]),
        entry([2, 0], "web", 5, None, &[]),
        entry([3, 0], "web", 3, None, &[]),
    ];
    for text in ["latest", "latest~1", "web", "web~1", "web@2026-07-01"] {
        assert_eq!(candidates(&points, text), 2, "{text}");
    }
    assert_eq!(id_of(&points, "web~2"), "0300");
}

#[test]
fn a_whole_id_is_always_that_point() {
    let mut points = week();
    let whole = points[0].record.id.to_hex();
    points.push(entry([0x30, 0], &whole, ms("2026-07-06T00:00:00Z"), None, &["vda"]));
    assert_eq!(id_of(&points, &whole), "1000");
    assert_eq!(id_of(&points, &format!("{whole}~0")), "3000");
}

#[test]
fn a_time_that_the_clocks_show_twice_means_both() {
    // 2026-10-25: Berlin's clocks go from 03:00 back to 02:00, at 01:00 UTC
    let points = [
        entry([1, 0], "web", ms("2026-10-25T00:10:00Z"), None, &[]),
        entry([2, 0], "web", ms("2026-10-25T01:10:00Z"), None, &[]),
    ];
    assert_eq!(candidates(&points, "web@2026-10-25T02:15"), 2);
    assert_eq!(id_of(&points, "web@2026-10-25T02:15+02:00"), "0100");
    assert_eq!(id_of(&points, "web@2026-10-25T03:00"), "0200");
    // 2026-03-29 02:30 does not exist there, and no point lies between its two meanings
    assert_eq!(parse_moments("2026-03-29T02:30", &now()).len(), 2);
}

#[test]
fn a_day_has_its_own_length() {
    let hours = |text: &str| {
        let [moment] = parse_moments(text, &now())[..] else { panic!("{text}") };
        (moment.end_ms - moment.start_ms) / 3_600_000
    };
    assert_eq!([hours("2026-07-05"), hours("2026-10-25"), hours("2026-03-29")], [24, 25, 23]);
    assert_eq!(parse_moments("tuesday", &now()), parse_moments("2026-07-07", &now()));
    assert_eq!(parse_moments("wednesday", &now()), parse_moments("2026-07-01", &now()));
}

#[test]
fn a_scope_is_a_domain_or_one_point() {
    let mut points = week();
    assert_eq!(select_scope(&points, "web", &now()).unwrap().len(), 6);
    assert_eq!(select_scope(&points, "web~1", &now()).unwrap().len(), 1);
    assert!(matches!(select_scope(&points, "web:vda", &now()), Err(Error::Usage(_)) | Ok(_)));
    points.push(entry([0x40, 0], "12", 1, None, &[]));
    assert!(
        matches!(select_scope(&points, "12", &now()), Err(Error::Selector { candidates, .. }) if candidates.len() == 2)
    );
}

#[test]
fn a_base_is_found_by_its_checkpoint() {
    let points = week();
    assert_eq!(select_base(&points, "web", "cp3", &now()).unwrap().record.id, points[3].record.id);
    assert_eq!(select_base(&points, "web", "13", &now()).unwrap().record.id, points[3].record.id);
    assert!(select_base(&points, "db", "cp3", &now()).is_err());
}

#[test]
fn short_ids_tell_points_apart() {
    let points = week();
    assert_eq!(short_id(&points, points[0].record.id), "10007777");
    let mut twin = points[0].clone();
    let mut bytes = *twin.record.id.as_bytes();
    bytes[6] ^= 1;
    Arc::make_mut(&mut twin.record).id = PointId::from_bytes(bytes);
    let both = [points[0].clone(), twin];
    assert_eq!(short_id(&both, both[0].record.id).len(), 14);
}

/// What each text means, built the other way round: every spelling of every point.
fn spellings(
    entries: &[PointEntry],
    dates: &[&str],
) -> BTreeMap<String, BTreeSet<(PointId, Option<String>)>> {
    let mut plain: Vec<(String, PointId)> = Vec::new();
    let instant = |date: &str| parse_moments(date, &now())[0].end_ms;
    for entry in entries {
        let record = &entry.record;
        let hex = record.id.to_hex();
        plain.extend((1..=hex.len()).map(|len| (hex[..len].to_owned(), record.id)));
        let newer = |same_domain: bool, strictly: bool| {
            entries
                .iter()
                .filter(|other| !same_domain || other.record.domain == record.domain)
                .filter(|other| {
                    let (a, b) = (other.record.time_ms, record.time_ms);
                    a > b || (!strictly && a == b)
                })
                .count()
        };
        // a point of an instant shared by several may stand at any of their ranks
        for (name, same_domain) in [(record.domain.as_str(), true), ("latest", false)] {
            for rank in newer(same_domain, true)..newer(same_domain, false) {
                plain.push((format!("{name}~{rank}"), record.id));
                if rank == 0 {
                    plain.push((name.to_owned(), record.id));
                }
            }
        }
        for date in dates {
            let end = instant(date);
            let newest = entries
                .iter()
                .filter(|other| other.record.domain == record.domain && other.record.time_ms < end)
                .map(|other| other.record.time_ms)
                .max();
            if newest == Some(record.time_ms) {
                plain.push((format!("{}@{date}", record.domain), record.id));
            }
        }
        if let Some(checkpoint) = &record.checkpoint {
            plain.push((format!("{}@{checkpoint}", record.domain), record.id));
        }
    }
    let mut all: BTreeMap<String, BTreeSet<(PointId, Option<String>)>> = BTreeMap::new();
    for (text, id) in plain {
        // all 32 digits of an id mean nothing else
        if text.parse::<PointId>().is_ok_and(|whole| whole != id) {
            continue;
        }
        let record = &entries.iter().find(|entry| entry.record.id == id).unwrap().record;
        for disk in &record.disks {
            let with_disk = (id, Some(disk.target.clone()));
            all.entry(format!("{text}:{}", disk.target)).or_default().insert(with_disk);
        }
        all.entry(text).or_default().insert((id, None));
    }
    all
}

/// Each time to the second also to the minute, which a disk named `00` could be read behind.
const DATES: [&str; 8] = [
    "sat",
    "saturday",
    "2026-07-05",
    "2026-07-03T12:00",
    "2026-07-03T12:00:00",
    "2026-07-04T22:00Z",
    "2026-07-06T00:00",
    "2026-07-06T00:00:00",
];

fn points() -> impl Strategy<Value = Vec<PointEntry>> {
    let domain = prop::sample::select(vec![
        "web", "db", "ab", "a", "latest", "web~1", "web:vda", "web@sat", "latest~1", "a@cp", "00", "web:00",
    ]);
    let checkpoint =
        prop::option::of(prop::sample::select(vec!["cp", "sat", "2026-07-05", "sat~1", "cp:vda"]));
    let disks = prop::sample::select(vec![&["vda"][..], &["vda", "vdb"], &["00"], &[]]);
    // ids and times from small spaces, so that they meet
    let one = (0u8..4, 0u8..3, domain, 0i64..12, checkpoint, disks);
    prop::collection::vec(one, 0..9).prop_map(|list| {
        let start = ms("2026-07-02T22:00:00Z");
        let mut entries: Vec<PointEntry> = Vec::new();
        for (high, low, domain, half_days, checkpoint, disks) in list {
            let time_ms = start + half_days * DAY_MS / 2;
            let new = entry([0xa0 + high, 0xb0 + low], domain, time_ms, checkpoint, disks);
            if entries.iter().all(|old| old.record.id != new.record.id) {
                entries.push(new);
            }
        }
        entries
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// A selector gives a point exactly if one point alone can be spelled so.
    #[test]
    fn selection_is_the_inverse_of_spelling(entries in points()) {
        let all = spellings(&entries, &DATES);
        for (text, meanings) in &all {
            let first = meanings.first().cloned().unwrap();
            match select(&entries, text, &now()) {
                Ok(selected) => {
                    let got = (selected.entry.record.id, selected.disk.map(str::to_owned));
                    prop_assert!(meanings.len() == 1, "{text:?} gave {got:?} of {meanings:?}");
                    prop_assert_eq!(got, first, "{}", text);
                }
                Err(Error::Selector { candidates, .. }) => {
                    // a disk that only some of the points have is refused as well, the others being listed
                    let points: BTreeSet<_> = meanings.iter().map(|(id, _)| id).collect();
                    let fits = |text: &str| all.get(text).map_or(0, BTreeSet::len);
                    let prefix = text.rsplit_once(':').map_or("", |(prefix, _)| prefix);
                    prop_assert!(points.len() > 1 || meanings.len() > 1 || fits(prefix) > 1, "{text:?}: {candidates:?}");
                    for id in points {
                        prop_assert!(candidates.iter().any(|line| line.starts_with(&short_id(&entries, *id))));
                    }
                }
                Err(error) => prop_assert!(false, "{text:?}: {error}"),
            }
        }
    }

    #[test]
    fn no_text_makes_it_panic(entries in points(), text in "[a-z0-9@~:T.Zé+-]{0,24}|\\PC{0,12}") {
        let _ = select(&entries, &text, &now());
        let _ = select_scope(&entries, &text, &now());
        let _ = select_base(&entries, "web", &text, &now());
    }
}

#[test]
fn any_selector_fits_or_is_refused() {
    let test = concat!(module_path!(), "::alone_selectors");
    crate::mutate::finish_alone(crate::mutate::start_alone(test, &[]));
}

#[test]
#[ignore = "measures its own process: run by any_selector_fits_or_is_refused"]
fn alone_selectors() {
    let week = week();
    let samples: Vec<Vec<u8>> =
        ["12", "latest~2", "web", "web~5", "web@2026-07-01T02:00-01:00", "web@saturday:vdb", "web@cp1"]
            .into_iter()
            .map(|text| text.as_bytes().to_vec())
            .collect();
    crate::mutate::fuzz("selectors", &samples, true, 6.0, &mut |bytes| {
        let text = String::from_utf8_lossy(bytes);
        if let Ok(selected) = select(&week, &text, &now()) {
            assert!(week.contains(selected.entry));
        }
        let _ = select_scope(&week, &text, &now());
        let _ = parse_moments(&text, &now());
    });
}

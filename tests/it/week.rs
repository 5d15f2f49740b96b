//! The acceptance story: a week of one domain, every level, every point restored and compared.

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use crate::support::{Lab, Vmkeep, number, point, run};

const DISKS: [&str; 3] = ["vda", "vdb", "vdc"];

struct Week {
    lab: Lab,
    vmkeep: Vmkeep,
    days: Vec<(String, Value, PathBuf)>,
}

impl Week {
    /// Records what the guest reads, and backs it up: the domain is idle in between.
    fn day(&mut self, day: &str, level: &str) -> Value {
        let truth = self.vmkeep.path(day);
        std::fs::create_dir(&truth).unwrap();
        for disk in DISKS {
            self.lab.truth("web01", disk, &truth.join(format!("{disk}.raw")));
        }
        let summary = self.vmkeep.backup(&["web01", "-l", level]);
        assert_eq!(summary["level"], level_name(level), "{summary}");
        self.days.push((day.to_owned(), summary.clone(), truth));
        summary
    }

    fn id(&self, day: &str) -> String {
        point(&self.days.iter().find(|(name, ..)| name == day).unwrap().1)
    }

    /// Returns the ranges of a disk in which two points differ, by the program's own account.
    fn diff(&self, a: &str, b: &str, disk: &str) -> Vec<(u64, u64)> {
        let document = self.vmkeep.json(&["diff", &self.id(a), &self.id(b)]);
        let disks = document["disks"].as_array().unwrap_or_else(|| panic!("{document}"));
        let Some(found) = disks.iter().find(|found| found["disk"] == disk) else { return Vec::new() };
        let ranges = found["ranges"].as_array().unwrap();
        ranges.iter().map(|range| (range[0].as_u64().unwrap(), range[1].as_u64().unwrap())).collect()
    }

    /// Returns the dirty ranges of a disk since a day's checkpoint, by QEMU's account.
    fn dirty_since(&self, day: &str, disk: &str) -> Vec<(u64, u64)> {
        let checkpoint = self.days.iter().find(|(name, ..)| name == day).unwrap().1["checkpoint"].clone();
        self.lab.cmd(&["begin", "web01", checkpoint.as_str().unwrap(), ""]);
        let listed = self.lab.cmd(&["dirty", "web01", disk]);
        self.lab.cmd(&["end", "web01"]);
        listed
            .lines()
            .map(|line| {
                let mut numbers = line.split_whitespace().map(|number| number.parse().unwrap());
                (numbers.next().unwrap(), numbers.next().unwrap())
            })
            .collect()
    }
}

fn level_name(argument: &str) -> &str {
    match argument {
        "inc" => "incremental",
        "diff" => "differential",
        other => other,
    }
}

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;

#[test]
fn a_week_of_a_domain_restores_day_by_day() {
    let lab = Lab::start();
    lab.cmd(&["define", "web01", "vda:qcow2:256M", "vdb:qcow2:64M", "vdc:raw:32M"]);
    let vmkeep = Vmkeep::init(Some(&lab));
    let mut week = Week { lab, vmkeep, days: Vec::new() };
    let write = |week: &Week, disk: &str, offset: &str, len: &str, pattern: &str| {
        week.lab.write("web01", disk, offset, len, pattern);
    };

    write(&week, "vda", "1M", "20M", "0x11");
    write(&week, "vdb", "0", "4M", "0x12");
    write(&week, "vdc", "3M", "1M", "0x13");
    let full = week.day("mon", "full");
    assert!(number(&full, "new_bytes") > 0);
    assert_eq!(full["base"], Value::Null);

    // 4 KiB inside one 64 KiB extent
    write(&week, "vda", "40M", "4k", "0x21");
    let inc = week.day("tue", "inc");
    assert_eq!(number(&inc, "changed_bytes"), 4 * K, "{inc}");
    assert_eq!(number(&inc, "new_bytes"), 4 * K, "{inc}");
    assert_eq!(dirty_of(&inc, "vda"), 64 * K);

    // a discard and a write of zeroes over what the full has
    week.lab.cmd(&["discard", "web01", "vda", "2M", "1M"]);
    write(&week, "vda", "5M", "128k", "-z");
    write(&week, "vdb", "10M", "64k", "0x31");
    week.day("wed", "inc");

    write(&week, "vda", "60M", "192k", "0x41");
    let thu = week.day("thu", "diff");
    assert_eq!(thu["base"], week.id("mon").as_str());
    assert_only_that_day(&thu, 192 * K);
    assert_eq!(dirty_of(&thu, "vda"), 192 * K, "a differential reads what an incremental would");

    write(&week, "vda", "61M", "64k", "0x51");
    let fri = week.day("fri", "inc");
    assert_eq!(fri["base"], week.id("thu").as_str());

    write(&week, "vdb", "20M", "64k", "0x61");
    let sat = week.day("sat", "diff");
    assert_eq!(sat["base"], week.id("mon").as_str());
    assert_only_that_day(&sat, 64 * K);
    assert_eq!(dirty_of(&sat, "vda"), 0);

    assert_eq!(number(&thu, "since_base_bytes"), M + 128 * K + 4 * K + 192 * K + 64 * K);
    assert_differences(&week);
    assert_each_day_restores(&week);
    assert_saturday_stands_alone(&week);
}

/// `diff` lists exactly the union of all changes since the full.
fn assert_differences(week: &Week) {
    let union = [(2 * M, M), (5 * M, 128 * K), (40 * M, 4 * K), (60 * M, 192 * K)];
    assert_eq!(week.diff("mon", "thu", "vda"), union);
    assert_eq!(week.diff("mon", "thu", "vdb"), [(10 * M, 64 * K)]);
    assert_eq!(week.diff("mon", "sat", "vdb"), [(10 * M, 64 * K), (20 * M, 64 * K)]);
    // QEMU says the same, in the bitmap's units of 64 KiB
    let coarse: Vec<(u64, u64)> = week
        .diff("mon", "sat", "vda")
        .iter()
        .map(|(start, len)| (*start, len.next_multiple_of(64 * K)))
        .collect();
    assert_eq!(week.dirty_since("mon", "vda"), coarse);
}

fn assert_each_day_restores(week: &Week) {
    let explained = week.vmkeep.ok(&["show", &week.id("sat"), "--explain"]).to_lowercase();
    assert!(explained.contains("full") && explained.contains("diff"), "{explained}");
    for (_, summary, truth) in &week.days {
        week.vmkeep.assert_restores(&point(summary), truth, "raw");
    }
    week.vmkeep.ok(&["verify", "--data"]);
    // only the last full's and the newest checkpoint stay
    let checkpoints = week.lab.checkpoints("web01");
    assert_eq!(checkpoints.len(), 2, "{checkpoints:?}");
}

/// Saturday restores after all other points, the full included, were forgotten.
fn assert_saturday_stands_alone(week: &Week) {
    let sat_id = week.id("sat");
    let others: Vec<String> = ["mon", "tue", "wed", "thu", "fri"].iter().map(|day| week.id(day)).collect();
    let mut forget = vec!["forget", "-y", "--force"];
    forget.extend(others.iter().map(String::as_str));
    week.vmkeep.ok(&forget);
    week.vmkeep.ok(&["prune"]);
    let truth = &week.days.last().unwrap().2;
    week.vmkeep.assert_restores(&sat_id, truth, "raw");
    week.vmkeep.assert_restores(&sat_id, truth, "qcow2");
    week.vmkeep.assert_restores("latest", truth, "raw");
    assert_zeroes_stay_unallocated(week, &sat_id);
}

/// What a disk's bitmap said.
fn dirty_of(summary: &Value, disk: &str) -> u64 {
    let disks = summary["disks"].as_array().unwrap_or_else(|| panic!("{summary}"));
    let found = disks.iter().find(|found| found["disk"] == disk).unwrap_or_else(|| panic!("{summary}"));
    found["stats"]["dirty_bytes"].as_u64().unwrap_or_else(|| panic!("{summary}"))
}

/// Nothing that was stored before is stored again.
fn assert_only_that_day(summary: &Value, len: u64) {
    assert_eq!(number(summary, "changed_bytes"), len, "{summary}");
    assert!(number(summary, "new_bytes") <= len, "{summary}");
}

/// By another tool's account: zeroes of a restored image are holes.
fn assert_zeroes_stay_unallocated(week: &Week, id: &str) {
    let target = week.vmkeep.path("vdb.qcow2");
    let argument = format!("vdb={}", target.display());
    week.vmkeep.ok(&["restore", id, "--to", &argument, "--format", "qcow2"]);
    let served = format!("[ qemu-nbd -r -f qcow2 {} ]", target.display());
    let words = served.split(' ');
    let map = run(Command::new("nbdinfo").args(["--json", "--map"]).arg("--").args(words));
    let map: Vec<Value> = serde_json::from_str(&map).unwrap_or_else(|error| panic!("{error}: {map}"));
    let data: u64 = map
        .iter()
        .filter(|extent| extent["type"] == 0)
        .map(|extent| extent["length"].as_u64().unwrap())
        .sum();
    assert_eq!(data, 4 * M + 2 * 64 * K, "{map:?}");
}

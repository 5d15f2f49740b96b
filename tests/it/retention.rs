//! Forgetting by name and by policy, holds, and having points back: at the command line.

use std::fs;

use serde_json::Value;

use crate::support::{Vmkeep, point, text};

/// Points of two domains, each with a MiB of its own.
struct Kept {
    vmkeep: Vmkeep,
    web: Vec<String>,
    db: Vec<String>,
}

impl Kept {
    fn new(web: u32, db: u32) -> Self {
        let vmkeep = Vmkeep::init(None);
        let mut kept = Self { vmkeep, web: Vec::new(), db: Vec::new() };
        for round in 0..web {
            let point = kept.backup("web", round, &[]);
            kept.web.push(point);
        }
        for round in 0..db {
            let point = kept.backup("db", 100 + round, &["--tag", "monthly"]);
            kept.db.push(point);
        }
        kept
    }

    fn backup(&self, domain: &str, seed: u32, args: &[&str]) -> String {
        let noise = |n: u64| ((n << 32) + u64::from(seed) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = |n: u64| (noise(n) ^ (noise(n) >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40;
        let image = self.vmkeep.path("disk.raw");
        fs::write(&image, (0..1u64 << 20).map(|n| mixed(n) as u8).collect::<Vec<u8>>()).unwrap();
        let mut all = vec!["--file", image.to_str().unwrap(), "--name", domain];
        all.extend(args);
        point(&self.vmkeep.backup(&all))
    }

    fn points(&self) -> Vec<String> {
        ids(&self.vmkeep.json(&["points"])["points"])
    }
}

fn ids(points: &Value) -> Vec<String> {
    let id = |point: &Value| point.get("point").unwrap_or(point).as_str().unwrap().to_owned();
    points.as_array().unwrap().iter().map(id).collect()
}

#[test]
fn a_policy_keeps_what_it_says_and_shows_why() {
    let kept = Kept::new(5, 3);
    let dry = kept.vmkeep.json(&["forget", "--keep-last", "3", "-n"]);
    assert_eq!(ids(&dry["points"]), kept.web[..2]);
    let decisions = dry["decisions"].as_array().unwrap();
    assert_eq!(decisions.len(), 8);
    assert_eq!(decisions[7]["reasons"][0], "last");
    // each point has a MiB of noise that no other has
    let freed = dry["freed"]["content_bytes"].as_u64().unwrap();
    assert_eq!(freed, 2 << 20);
    assert_eq!(decisions[0]["freed"]["content_bytes"].as_u64().unwrap(), 1 << 20);
    assert_eq!(kept.points().len(), 8, "a dry run changes nothing");
    let table = kept.vmkeep.ok(&["forget", "--keep-last", "3", "-n"]);
    assert!(table.contains("2.00 MiB of content"), "{table}");

    let said = kept.vmkeep.ok(&["forget", "--keep-last", "3", "-y", "--prune"]);
    assert!(said.contains("forgot 2 points") && said.contains("dropped 2 forgotten points"), "{said}");
    assert_eq!(kept.points().len(), 6);
    // everything is within the last year
    assert!(ids(&kept.vmkeep.json(&["forget", "--keep-within", "1y", "-n"])["points"]).is_empty());
    // one domain, or one tag
    let only = kept.vmkeep.json(&["forget", "db", "--keep-last", "2", "-n"]);
    assert_eq!((ids(&only["points"]).len(), only["decisions"].as_array().unwrap().len()), (1, 3));
    let tagged = kept.vmkeep.json(&["forget", "--keep-tag", "monthly", "--keep-last", "2", "-n"]);
    assert_eq!(ids(&tagged["points"]), kept.web[2..3]);
}

#[test]
fn what_is_likely_a_mistake_needs_force() {
    let kept = Kept::new(5, 0);
    for (args, why) in [
        (vec!["forget", "-y", &kept.web[4]], "newest two"),
        (vec!["forget", "-y", &kept.web[0], &kept.web[1], &kept.web[2]], "more than half"),
        (vec!["forget", "-y", "--keep-last", "1"], "more than half"),
    ] {
        let said = kept.vmkeep.fails(&args, 1);
        assert!(said.contains(why) && said.contains("--force"), "{said}");
    }
    assert!(kept.vmkeep.fails(&["forget", "-y", "--keep-last", "0"], 2).contains("keeps nothing"));
    assert!(kept.vmkeep.fails(&["forget", "-y", "nobody", "--keep-last", "1"], 2).contains("nobody"));
    assert!(kept.vmkeep.fails(&["forget", "--keep-within", "3x", "-n"], 2).contains("3x"));
    assert_eq!(kept.points().len(), 5);
    // a first backup that was verified stays, although the policy would drop it
    kept.vmkeep.ok(&["verify", &kept.web[0]]);
    let dry = kept.vmkeep.json(&["forget", "--keep-last", "3", "-n"]);
    assert_eq!(ids(&dry["points"]), kept.web[1..2]);
    kept.vmkeep.ok(&["forget", "-y", "--force", "--keep-last", "1"]);
    assert_eq!(kept.points(), kept.web[4..]);
}

#[test]
fn holds_and_second_thoughts() {
    let kept = Kept::new(5, 0);
    let first = kept.web[0].as_str();
    kept.vmkeep.ok(&["hold", first, "--reason", "audit 2026"]);
    assert!(kept.vmkeep.ok(&["points"]).contains("held"));
    let said = kept.vmkeep.fails(&["forget", "-y", "--force", first], 1);
    assert!(said.contains("audit 2026") && said.contains("unhold"), "{said}");
    let dry = kept.vmkeep.json(&["forget", "--force", "--keep-last", "1", "-n"]);
    assert!(!ids(&dry["points"]).contains(&kept.web[0]));
    kept.vmkeep.ok(&["unhold", first]);
    kept.vmkeep.ok(&["forget", "-y", first, &kept.web[1]]);
    assert_eq!(ids(&kept.vmkeep.json(&["points", "--forgotten"])["points"]), kept.web[..2]);
    kept.vmkeep.ok(&["undelete", first]);
    assert_eq!(kept.points(), [&kept.web[..1], &kept.web[2..]].concat());
    kept.vmkeep.ok(&["prune"]);
    kept.vmkeep.fails(&["undelete", &kept.web[1]], 2);
    kept.vmkeep.ok(&["verify"]);
    assert!(kept.vmkeep.fails(&["hold", first, "--until", "2001-01-01"], 2).contains("2001-01-01"));
}

#[test]
fn what_a_point_alone_holds() {
    let kept = Kept::new(3, 0);
    let stats = kept.vmkeep.json(&["stats", "--unique"]);
    let points = stats["unique"]["points"].as_array().unwrap();
    assert!(points.iter().all(|point| point["content_bytes"] == 1 << 20), "{points:?}");
    assert_eq!(stats["unique"]["together"]["content_bytes"], 3 << 20);
    assert!(kept.vmkeep.ok(&["stats", "--unique"]).contains("1.00 MiB"));
}

/// Points can be forgotten without their maps.
#[test]
fn a_plan_for_points_whose_maps_are_lost() {
    let kept = Kept::new(5, 0);
    let mut folders = vec![kept.vmkeep.repository().join("packs")];
    let mut lost = 0;
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
            match entry.metadata().unwrap() {
                meta if meta.is_dir() => folders.push(entry.path()),
                // those of the content have a MiB of noise
                meta if meta.len() < 1 << 20 => {
                    fs::remove_file(entry.path()).unwrap();
                    lost += 1;
                }
                _ => {}
            }
        }
    }
    assert_eq!(lost, 2 * 5);
    let plan = kept.vmkeep.command(&["forget", "--keep-last", "3", "-n"]).output().unwrap();
    let (said, warned) = (text(&plan), String::from_utf8_lossy(&plan.stderr));
    assert!(plan.status.success() && said.contains("would forget 2 points\n"), "{said}");
    assert!(warned.contains("what this would free cannot be told: ") && warned.contains("chunk "), "{said}");
    let plan = kept.vmkeep.json(&["forget", "--keep-last", "3", "-n"]);
    assert_eq!((ids(&plan["points"]), &plan["dry_run"]), (kept.web[..2].to_vec(), &Value::Bool(true)));
    assert!(plan["freed"].is_null(), "{plan}");
    kept.vmkeep.fails(&["stats", "--unique"], 4);
    kept.vmkeep.ok(&["forget", "--keep-last", "3", "-y"]);
    assert_eq!(kept.points(), kept.web[2..]);
}

#[test]
fn a_dry_run_shows_the_plan_and_then_what_it_would_refuse() {
    let kept = Kept::new(5, 0);
    let rows = |said: &str| -> Vec<String> {
        // all but the last column, what a point that goes would free
        let cells =
            |line: &str| line.split_whitespace().take(9).map(str::to_owned).collect::<Vec<_>>().join(" ");
        said.lines().filter(|line| line.contains(" web ")).map(cells).collect()
    };
    // the newest and one more are kept: three of five go
    let said = kept.vmkeep.fails(&["forget", "--keep-daily", "1", "-n"], 1);
    let forced = kept.vmkeep.ok(&["forget", "--keep-daily", "1", "-n", "--force"]);
    assert_eq!(rows(&said).len(), 5, "{said}");
    assert_eq!(rows(&said), rows(&forced), "{said}\n{forced}");
    let table = said.find("guarded").unwrap_or_else(|| panic!("{said}"));
    assert!(said.contains("daily 2") && said.contains("newest two"), "{said}");
    assert!(said.find("more than half").unwrap() > table, "{said}");
    assert!(said.contains("would forget 3 points") && said.contains("1 guarded would go"), "{said}");
    assert!(forced.contains("would forget 4 points, 1 guarded"), "{forced}");
    // by name, and with a hold in the way
    let said = kept.vmkeep.fails(&["forget", &kept.web[4], "-n"], 1);
    assert!(rows(&said)[0].contains("guarded") && said.contains("--force"), "{said}");
    kept.vmkeep.ok(&["hold", &kept.web[0], "--reason", "audit"]);
    let said = kept.vmkeep.fails(&["forget", &kept.web[0], "-n"], 1);
    assert!(rows(&said).len() == 1 && said.contains("audit"), "{said}");
    let refused = kept.vmkeep.command(&["--json", "forget", &kept.web[4], "-n"]).output().unwrap();
    let lines: Vec<Value> = String::from_utf8(refused.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let summary = lines.iter().find(|line| line["message_type"] == "summary").unwrap();
    crate::cli::assert_valid("forget", summary);
    assert_eq!(lines.last().unwrap()["exit_code"], 1);
}

#[test]
fn a_dry_run_shows_the_prune_behind_it() {
    let kept = Kept::new(5, 0);
    let args = ["forget", &kept.web[0], &kept.web[1], "--prune"];
    let dry = kept.vmkeep.ok(&[&args[..], &["-n"]].concat());
    assert!(dry.contains("would drop 2 forgotten points"), "{dry}");
    let said = kept.vmkeep.ok(&[&args[..], &["-y"]].concat());
    let of_prune = |said: &str| {
        let line = said
            .lines()
            .find(|line| line.contains("forgotten points and"))
            .unwrap_or_else(|| panic!("{said}"));
        line.split("points and").nth(1).unwrap().split(';').next().unwrap().to_owned()
    };
    assert_eq!(of_prune(&dry), of_prune(&said));
}

#[test]
fn a_tag_does_not_move_the_guards() {
    let kept = Kept::new(2, 0);
    let mut tagged = Vec::new();
    for seed in 10..13 {
        tagged.push(kept.backup("web", seed, &["--tag", "old"]));
    }
    for seed in 20..24 {
        kept.backup("web", seed, &[]);
    }
    let dry = kept.vmkeep.json(&["forget", "--tag", "old", "--keep-last", "1", "-n"]);
    assert_eq!(ids(&dry["points"]), tagged[..2]);
}

#[test]
fn nothing_is_released_where_nothing_was_held() {
    let kept = Kept::new(2, 0);
    for args in [vec!["unhold", &kept.web[0]], vec!["unhold", "-n", &kept.web[0]]] {
        let said = kept.vmkeep.ok(&args);
        assert!(said.contains("nothing held 1 point") && !said.contains("release"), "{said}");
        assert!(ids(&kept.vmkeep.json(&args)["points"]).is_empty());
    }
    kept.vmkeep.ok(&["hold", &kept.web[1]]);
    let said = kept.vmkeep.ok(&["unhold", &kept.web[0], &kept.web[1]]);
    assert!(said.contains("nothing held 1 point") && said.contains("released 1 point"), "{said}");
    assert!(!kept.vmkeep.ok(&["points"]).contains("held"));
}

//! Forgetting by name and by policy, holds, and having points back: at the command line.

use std::fs;

use serde_json::Value;

use crate::support::{Vmkeep, point};

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

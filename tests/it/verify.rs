//! Verify in its levels, what it records, and how damage heals: at the command line.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::support::{Vmkeep, number, point};

const MIB: usize = 1 << 20;

/// A repository of points of one disk.
struct Kept {
    vmkeep: Vmkeep,
    content: Vec<u8>,
    points: Vec<String>,
    /// What the disk was at each point.
    was: Vec<Vec<u8>>,
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    })
    .take(len)
    .collect()
}

impl Kept {
    /// The first point has 4 MiB of noise, each later one changes 256 KiB.
    fn new(points: u64) -> Self {
        let vmkeep = Vmkeep::init(None);
        let mut kept = Self { vmkeep, content: noise(1, 4 * MIB), points: Vec::new(), was: Vec::new() };
        kept.content.resize(6 * MIB, 0);
        for round in 0..points {
            let at = usize::try_from(round).unwrap() * MIB / 2;
            kept.content[at..at + MIB / 4].copy_from_slice(&noise(100 + round, MIB / 4));
            kept.backup();
        }
        kept
    }

    /// The same, but no point changes what an earlier one had: the disk still has all of it.
    fn growing(points: u64) -> Self {
        let mut kept = Self::new(1);
        for round in 1..points {
            let at = 5 * MIB + usize::try_from(round).unwrap() * MIB / 8;
            kept.content[at..at + MIB / 8].copy_from_slice(&noise(100 + round, MIB / 8));
            kept.backup();
        }
        kept
    }

    fn backup(&mut self) -> Value {
        let image = self.vmkeep.path("disk.raw");
        fs::write(&image, &self.content).unwrap();
        let said = self.vmkeep.backup(&["--file", image.to_str().unwrap(), "--name", "web"]);
        self.points.push(point(&said));
        self.was.push(self.content.clone());
        said
    }

    /// Packs, the largest first.
    fn packs(&self) -> Vec<PathBuf> {
        let mut packs: Vec<PathBuf> = fs::read_dir(self.vmkeep.repository().join("packs"))
            .unwrap()
            .flat_map(|folder| fs::read_dir(folder.unwrap().path()).unwrap())
            .map(|entry| entry.unwrap().path())
            .collect();
        packs.sort_by_key(|path| std::cmp::Reverse(fs::metadata(path).unwrap().len()));
        packs
    }

    fn verify(&self, args: &[&str]) -> (Value, i32) {
        let mut all = vec!["verify"];
        all.extend(args);
        self.vmkeep.json_with_code(&all)
    }

    fn assert_all_restore(&self) {
        for (id, was) in self.points.iter().zip(&self.was) {
            assert!(self.restored(id, &[]) == *was, "point {id} restores differently");
        }
    }

    fn restored(&self, id: &str, args: &[&str]) -> Vec<u8> {
        let target = self.vmkeep.path("restored.raw");
        let _ = fs::remove_file(&target);
        let to = format!("vda={}", target.display());
        let mut all = vec!["restore", id, "--to", &to];
        all.extend(args);
        self.vmkeep.json_with_code(&all);
        fs::read(&target).unwrap_or_default()
    }
}

fn flip(path: &Path, at: u64) {
    let mut bytes = fs::read(path).unwrap();
    let at = usize::try_from(at).unwrap();
    bytes[at] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

fn states(kept: &Kept) -> Vec<Value> {
    let points = kept.vmkeep.json(&["points"]);
    points["points"].as_array().unwrap().iter().map(|point| point["state"]["verified"].clone()).collect()
}

#[test]
fn what_was_verified_is_shown_and_not_done_again() {
    let mut kept = Kept::new(2);
    assert!(states(&kept).iter().all(Value::is_null));
    kept.verify(&["--structure"]);
    assert!(states(&kept).iter().all(|state| state["level"] == "structure" && state["sound"] == true));
    kept.verify(&["-n"]);
    assert_eq!(states(&kept)[0]["level"], "structure", "a dry run records nothing");
    kept.verify(&[]);
    assert_eq!(states(&kept)[0]["level"], "data");
    kept.content[5 * MIB] = 1;
    kept.backup();
    let (said, _) = kept.verify(&["--older-than", "1d"]);
    assert_eq!((&said["points"], &said["skipped_points"]), (&1.into(), &2.into()));
    let (said, _) = kept.verify(&["--older-than", "1d", "--restore"]);
    assert_eq!(said["points"], 3, "data is less than restore");
    let hashes: Vec<&str> =
        said["restored"].as_array().unwrap().iter().map(|disk| disk["blake3"].as_str().unwrap()).collect();
    let expected: Vec<String> = kept.was.iter().map(|was| blake3::hash(was).to_hex().to_string()).collect();
    assert_eq!(hashes, expected);
    // what looks at less takes nothing back
    for later in [&["--structure"][..], &["--sample", "1/2"]] {
        kept.verify(later);
        assert!(states(&kept).iter().all(|state| state["level"] == "restore"), "{later:?}");
        assert!(!kept.vmkeep.ok(&["points"]).contains("structure"));
    }
    // unless it finds damage
    let pack = kept.packs().swap_remove(0);
    fs::remove_file(pack).unwrap();
    kept.verify(&["--structure"]);
    assert!(states(&kept).iter().any(|state| state["sound"] == false));
}

#[test]
fn samples_cover_everything_in_turn() {
    let kept = Kept::new(6);
    let packs = kept.packs();
    let last = packs.last().unwrap();
    flip(last, fs::metadata(last).unwrap().len() / 2);
    let codes: Vec<i32> = (0..4).map(|_| kept.verify(&["--sample", "1/4"]).1).collect();
    assert!(codes.contains(&4), "{codes:?}");
    let (said, _) = kept.verify(&["--sample", "1", "-n"]);
    assert_eq!(said["sample"]["packs"], 1, "at least one pack is read");
}

#[test]
fn a_damaged_chunk_counts_as_absent_and_heals() {
    let mut kept = Kept::growing(3);
    let pack = kept.packs().swap_remove(0);
    // in the first pack are the chunks of the first point
    flip(&pack, 1 << 20);
    let (said, code) = kept.verify(&[]);
    assert_eq!((code, said["recorded"].as_u64()), (4, Some(1)), "{said}");
    let damaged = said["damaged_points"].as_array().unwrap();
    assert!(!damaged.is_empty());
    assert!(kept.vmkeep.ok(&["points"]).contains("damaged"));
    let (again, code) = kept.verify(&["--structure"]);
    assert_eq!((code, &again["damaged_points"]), (4, &said["damaged_points"]), "what is recorded is known");
    let bad = fs::read_dir(kept.vmkeep.repository().join("bad")).unwrap().next().unwrap().unwrap();
    let record = kept.vmkeep.json(&["cat", "damage", bad.file_name().to_str().unwrap()]);
    assert_eq!(record["pack"].as_str(), pack.file_name().unwrap().to_str());
    assert!(!record["chunks"].as_array().unwrap().is_empty(), "{record}");
    // prune does not delete what is needed to know what is lost
    kept.vmkeep.json_with_code(&["prune"]);
    let old = kept.restored(&kept.points[0].clone(), &["--on-damage", "zero"]);
    let lost: Vec<usize> = (0..old.len())
        .step_by(4096)
        .filter(|at| old[*at..at + 4096] != kept.was[0][*at..at + 4096])
        .collect();
    assert!(!lost.is_empty() && lost.iter().all(|at| old[*at..at + 4096].iter().all(|byte| *byte == 0)));
    // the disk still has the content: nothing of it changed
    let stored = number(&kept.backup(), "new_bytes");
    assert!(stored >= (lost.len() * 4096) as u64 && stored < 2 << 20, "{stored}");
    let (said, code) = kept.verify(&["--structure"]);
    assert_eq!(code, 0, "{said}");
    kept.assert_all_restore();
    assert!(!kept.vmkeep.ok(&["points"]).contains("damaged"));
}

#[test]
fn a_missing_pack_heals() {
    let mut kept = Kept::growing(3);
    let pack = kept.packs().swap_remove(0);
    fs::remove_file(&pack).unwrap();
    let (said, code) = kept.verify(&["--structure"]);
    assert_eq!((code, said["recorded"].as_u64()), (4, Some(1)), "{said}");
    kept.backup();
    let (said, code) = kept.verify(&["--data"]);
    // the pack is still missing, but no point needs it any more
    assert!(said["damaged_points"].as_array().unwrap().is_empty(), "{code}: {said}");
    kept.assert_all_restore();
    kept.vmkeep.ok(&["prune"]);
    let (said, code) = kept.verify(&[]);
    assert_eq!(code, 0, "{said}");
}

#[test]
fn a_point_is_compared_with_an_image() {
    let kept = Kept::new(2);
    let image = kept.vmkeep.path("disk.raw");
    let name = image.to_str().unwrap();
    let (_, code) = kept.verify(&[&kept.points[1], "--against", name]);
    assert_eq!(code, 0);
    let said = kept.vmkeep.ok(&["verify", &kept.points[1], "--against", name]);
    assert!(said.contains("; nothing differs"), "{said}");
    let (said, code) = kept.verify(&[&kept.points[0], "--against", name]);
    assert_eq!((code, &said["disks"][0]["differing"]), (4, &serde_json::json!([[MIB / 2, MIB / 4]])));
    let mut content = kept.content.clone();
    content[5 * MIB + 5000] = 7;
    content.resize(7 * MIB, 0);
    fs::write(&image, content).unwrap();
    let (said, _) = kept.verify(&[&kept.points[1], "--against", name]);
    assert_eq!(said["disks"][0]["differing"], serde_json::json!([[5 * MIB + 4096, 4096]]));
    assert_eq!(said["disks"][0]["found_size"], 7 * MIB);
    kept.vmkeep.fails(&["verify", &kept.points[1], "--against", "/no/such"], 1);
    // what the point has lost is named, and the rest compared
    for pack in kept.packs() {
        let bytes = fs::read(&pack).unwrap();
        let is_data = bytes.len() > MIB;
        if is_data {
            flip(&pack, bytes.len() as u64 / 2);
        }
    }
    let (said, code) = kept.verify(&[&kept.points[1], "--against", name]);
    let disk = &said["disks"][0];
    assert_eq!((code, &disk["differing"]), (4, &serde_json::json!([[5 * MIB + 4096, 4096]])), "{said}");
    let lost = disk["lost_bytes"].as_u64().unwrap();
    assert!(lost > 0 && lost + disk["compared_bytes"].as_u64().unwrap() == disk["size"].as_u64().unwrap());
    let said = kept.vmkeep.fails(&["verify", &kept.points[1], "--against", name], 4);
    assert!(said.contains(" lost at ") && said.contains(" differ at "), "{said}");
    // with the map itself all of it is lost
    for pack in kept.packs() {
        fs::remove_file(pack).unwrap();
    }
    let (said, code) = kept.verify(&[&kept.points[1], "--against", name]);
    let disk = &said["disks"][0];
    let whole = serde_json::json!([[0, disk["size"]]]);
    assert_eq!((code, &disk["lost"], disk["compared_bytes"].as_u64()), (4, &whole, Some(0)), "{said}");
}

#[test]
fn repair_brings_back_what_is_somewhere_else() {
    let kept = Kept::new(3);
    let copy = kept.vmkeep.path("copy");
    let status = std::process::Command::new("cp").arg("-a").arg(kept.vmkeep.repository()).arg(&copy).status();
    assert!(status.unwrap().success());
    for pack in kept.packs() {
        fs::remove_file(pack).unwrap();
    }
    assert_eq!(kept.verify(&[]).1, 4);
    let (said, code) = kept.vmkeep.json_with_code(&["repair", "packs"]);
    assert_eq!(code, 4, "{said}");
    let from = copy.to_str().unwrap();
    let (dry, _) = kept.vmkeep.json_with_code(&["repair", "packs", "--from", from, "-n"]);
    assert!(dry["from_repository"].as_u64().unwrap() > 0);
    let (said, code) = kept.vmkeep.json_with_code(&["repair", "packs", "--from", from]);
    assert_eq!((code, &said["lost"]), (0, &0.into()), "{said}");
    kept.vmkeep.ok(&["prune"]);
    assert_eq!(kept.verify(&[]).1, 0);
    kept.assert_all_restore();
}

#[test]
fn what_stays_lost_is_said_by_a_repaired_point() {
    let kept = Kept::new(2);
    fs::remove_file(kept.packs().pop().unwrap()).unwrap();
    let pack = kept.packs().swap_remove(0);
    flip(&pack, 2 << 20);
    kept.verify(&[]);
    let (said, code) = kept.vmkeep.json_with_code(&["repair", "points"]);
    assert_eq!(code, 0, "{said}");
    let made = said["points"].as_array().unwrap();
    assert!(!made.is_empty());
    let id = made[0]["repaired"].as_str().unwrap();
    let target = kept.vmkeep.path("out");
    let output = target.to_str().unwrap();
    kept.vmkeep.fails(&["restore", id, "-o", output], 4);
    let (said, code) = kept.vmkeep.json_with_code(&["restore", id, "-o", output, "--on-damage", "zero"]);
    let missing: u64 =
        said["disks"][0]["missing"].as_array().unwrap().iter().map(|range| range[1].as_u64().unwrap()).sum();
    assert_eq!((code, missing), (4, made[0]["lost_bytes"].as_u64().unwrap()));
    let map = fs::read_to_string(target.join("vda.missing")).unwrap();
    assert_eq!(map.lines().count(), said["disks"][0]["missing"].as_array().unwrap().len());
    // the plainest selectors still name one point, and the copy can be told from it
    for selector in ["web", "web~0", "web~1", "latest"] {
        kept.vmkeep.ok(&["show", selector]);
    }
}

#[test]
fn a_map_of_what_is_missing_goes_with_what_was_missing() {
    let mut kept = Kept::growing(2);
    flip(&kept.packs().swap_remove(0), 1 << 20);
    kept.verify(&[]);
    let target = kept.vmkeep.path("out");
    let output = target.to_str().unwrap();
    let restore = ["restore", "web", "-o", output, "--on-damage", "zero", "--force"];
    kept.vmkeep.fails(&restore, 4);
    let file = target.join("vda.raw");
    let to = format!("vda={}", file.display());
    kept.vmkeep.fails(&["restore", "web", "--to", &to, "--on-damage", "zero", "--force"], 4);
    let maps = [target.join("vda.missing"), target.join("vda.raw.missing")];
    assert!(maps.iter().all(|map| map.exists()));
    kept.backup();
    kept.vmkeep.ok(&restore);
    assert!(!maps[0].exists() && fs::read(&file).unwrap() == kept.content);
    kept.vmkeep.ok(&["restore", "web", "--to", &to, "--force"]);
    assert!(!maps[1].exists());
}

#[test]
fn a_lost_side_file_is_missing_and_said_so() {
    let repository = crate::fixtures::copy("two_points");
    let cache = tempfile::tempdir().unwrap();
    let out = cache.path().join("out");
    let run = |args: &[&str]| {
        let mut command = std::process::Command::new(crate::support::VMKEEP);
        command.arg("-r").arg(repository.path()).args(args);
        command.env("VMKEEP_CACHE_DIR", cache.path()).env("HOME", cache.path());
        let output = command.output().unwrap();
        (crate::support::text(&output), output.status.code().unwrap())
    };
    let restore =
        ["--json", "restore", "latest", "-o", out.to_str().unwrap(), "--force", "--on-damage", "zero"];
    assert_eq!(run(&restore).1, 0);
    let (nvram, map) = (out.join("nvram"), out.join("nvram.missing"));
    let size = fs::metadata(&nvram).unwrap().len();
    assert!(!map.exists());
    fs::remove_file(&nvram).unwrap();
    // the pack of the side file
    let pack =
        repository.path().join("packs/11/11de51452776ed6ce3ab4626bf0a6a1a5b274a4a1a1150340f3eb9c6d937e34c");
    flip(&pack, 8890);
    let (said, code) = run(&restore);
    assert_eq!(code, 4, "{said}");
    let mut lines = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let summary = lines.find(|line| line["message_type"] == "summary").unwrap();
    crate::cli::assert_valid("restore", &summary);
    let expected = serde_json::json!([{
        "file": "nvram", "target": nvram.to_str().unwrap(), "size": size, "missing": [[0, size]],
    }]);
    assert_eq!(summary["lost_files"], expected);
    assert_eq!(fs::read_to_string(&map).unwrap(), format!("0 {size}\n"));
    assert!(!nvram.exists());
    let (said, code) = run(&restore[1..]);
    assert!(code == 4 && said.contains("nvram: lost"), "{said}");
    flip(&pack, 8890);
    let (said, code) = run(&restore);
    assert!(code == 0 && nvram.exists() && !map.exists(), "{said}");
}

#[test]
fn a_finding_names_its_object_once() {
    let kept = Kept::new(2);
    let index = kept.vmkeep.repository().join("index");
    let segment = fs::read_dir(index).unwrap().next().unwrap().unwrap().path();
    flip(&segment, 70);
    let said = kept.vmkeep.fails(&["verify", "-n"], 4);
    let name = segment.file_name().unwrap().to_str().unwrap();
    let line = said
        .lines()
        .find(|line| line.starts_with(&format!("index/{name}: ")))
        .unwrap_or_else(|| panic!("{said}"));
    assert_eq!(line.matches(name).count(), 1, "{line}");
}

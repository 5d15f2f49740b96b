//! The command line on image files: exit codes, messages that name the object, JSON by its schema, and dry runs that
//! change nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::support::{Vmkeep, number, point, run, text};

/// A repository with two points of a disk of 2 MiB, and the disk.
struct Kept {
    vmkeep: Vmkeep,
    image: PathBuf,
    points: Vec<String>,
}

impl Kept {
    fn new() -> Self {
        let vmkeep = Vmkeep::init(None);
        let image = vmkeep.path("disk.raw");
        let mut kept = Self { vmkeep, image, points: Vec::new() };
        for round in 0..2u32 {
            let mut content: Vec<u8> =
                (0..1u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
            content[4096..8192].fill(round as u8);
            content.resize(2 << 20, 0);
            fs::write(&kept.image, content).unwrap();
            kept.points.push(point(&kept.backup(&[])));
        }
        kept
    }

    fn backup(&self, args: &[&str]) -> Value {
        let mut all = vec!["--file", self.image.to_str().unwrap(), "--name", "web"];
        all.extend(args);
        self.vmkeep.backup(&all)
    }
}

/// Returns all files below a directory and their content.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    found
}

/// A library that is a file of text stands for one that is missing.
#[test]
#[cfg(feature = "libvirt")]
fn what_asks_for_no_domain_needs_no_libvirt() {
    let linked_by = b"Linker: LLD";
    if !fs::read(crate::support::VMKEEP).unwrap().windows(linked_by.len()).any(|text| text == linked_by) {
        // other linkers have each command need the library: see src/source/domain/delay_load.rs
        return;
    }
    let kept = Kept::new();
    let missing = kept.vmkeep.path("missing");
    fs::create_dir(&missing).unwrap();
    fs::write(missing.join("libvirt.so.0"), "no library").unwrap();
    let without =
        |args: &[&str]| kept.vmkeep.command(args).env("LD_LIBRARY_PATH", &missing).output().unwrap();
    let target = kept.vmkeep.path("restored.raw");
    let restored = without(&["restore", "latest", "-o", target.to_str().unwrap()]);
    assert_eq!(restored.status.code(), Some(0), "{}", text(&restored));
    let refused = without(&["backup", "web01"]);
    assert_eq!(refused.status.code(), Some(13), "{}", text(&refused));
    assert!(text(&refused).contains("libvirt.so.0"), "{}", text(&refused));
}

#[test]
fn usage_and_missing_things_have_their_codes() {
    let kept = Kept::new();
    let vmkeep = &kept.vmkeep;
    vmkeep.fails(&["backup", "--no-such-option"], 2);
    vmkeep.fails(&["nonsense"], 2);
    assert!(vmkeep.fails(&["show", "0123456789abcdef"], 2).contains("0123456789abcdef"));
    assert!(vmkeep.fails(&["backup", "--file", "/no/such.raw", "--name", "x"], 1).contains("/no/such.raw"));
    let said = vmkeep.fails(&["forget", "--force", &kept.points[0]], 2);
    assert!(said.contains("-y"), "{said}");
    assert_eq!(vmkeep.json(&["points"])["points"].as_array().unwrap().len(), 2);
}

#[test]
fn a_selector_that_fits_two_points_lists_both() {
    let kept = Kept::new();
    // ids are random: all of one digit stand for those that begin alike
    let mut all = kept.points.clone();
    let alike = loop {
        let mut seen = BTreeMap::new();
        let twin = all
            .iter()
            .find_map(|id| seen.insert(id[..1].to_owned(), id.clone()).map(|other| (other, id.clone())));
        match twin {
            Some(twin) => break twin,
            None => all.push(point(&kept.backup(&[]))),
        }
    };
    let said = kept.vmkeep.fails(&["show", &alike.0[..1]], 2);
    for id in [&alike.0, &alike.1] {
        assert!(said.contains(&id[..6]), "{said}");
    }
}

#[test]
fn a_dry_run_changes_nothing() {
    let kept = Kept::new();
    let before = files(&kept.vmkeep.repository());
    kept.vmkeep.ok(&["backup", "--file", kept.image.to_str().unwrap(), "--name", "web", "-n"]);
    kept.vmkeep.ok(&["forget", "-n", "--force", &kept.points[0]]);
    kept.vmkeep.ok(&["forget", "-n", "--force", "--keep-last", "1"]);
    kept.vmkeep.ok(&["hold", "-n", &kept.points[0]]);
    kept.vmkeep.ok(&["unhold", "-n", &kept.points[0]]);
    kept.vmkeep.ok(&["prune", "-n"]);
    let target = kept.vmkeep.path("restored");
    kept.vmkeep.ok(&["restore", &kept.points[1], "-o", target.to_str().unwrap(), "-n"]);
    assert!(!target.exists());
    assert_eq!(files(&kept.vmkeep.repository()), before);
}

#[test]
fn a_restore_overwrites_only_if_forced() {
    let kept = Kept::new();
    let target = kept.vmkeep.path("target.raw");
    fs::write(&target, b"precious").unwrap();
    let to = format!("vda={}", target.display());
    let said = kept.vmkeep.fails(&["restore", &kept.points[1], "--to", &to], 1);
    assert!(said.contains("target.raw"), "{said}");
    assert_eq!(fs::read(&target).unwrap(), b"precious");
    kept.vmkeep.ok(&["restore", &kept.points[1], "--to", &to, "--force"]);
    assert_eq!(fs::read(&target).unwrap(), fs::read(&kept.image).unwrap());
    let qcow2 = kept.vmkeep.path("target.qcow2");
    let to = format!("vda={}", qcow2.display());
    kept.vmkeep.ok(&["restore", &kept.points[1], "--to", &to, "--format", "qcow2"]);
    for made in [&target, &qcow2] {
        assert_eq!(fs::metadata(made).unwrap().permissions().mode() & 0o077, 0, "{made:?} is nobody else's");
    }
}

#[test]
fn a_qcow2_image_is_kept_by_what_it_holds() {
    let kept = Kept::new();
    let (raw, image) = (kept.image.to_str().unwrap().to_owned(), kept.vmkeep.path("disk.qcow2"));
    run(Command::new("qemu-img").args(["convert", "-O", "qcow2", &raw]).arg(&image));
    let summary = kept.vmkeep.backup(&["--file", image.to_str().unwrap(), "--name", "web", "-l", "inc"]);
    assert_eq!(number(&summary, "changed_bytes"), 0, "the same content as the point before: {summary}");
    kept.vmkeep.assert_restores(&point(&summary), &directory_of(&kept, "truth"), "raw");

    // a guest could have written this to a raw disk
    let forged = kept.vmkeep.path("forged.raw");
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", &raw]).arg(&forged));
    let said = kept.vmkeep.fails(&["backup", "--file", forged.to_str().unwrap(), "--name", "f"], 1);
    assert!(said.contains("forged.raw") && said.contains("--image-format"), "{said}");
    let args = ["--file", forged.to_str().unwrap(), "--name", "f", "--image-format", "raw"];
    let as_raw = kept.vmkeep.backup(&args);
    assert_eq!(
        kept.vmkeep.json(&["show", &point(&as_raw)])["disks"][0]["size"],
        fs::metadata(&forged).unwrap().len()
    );
}

/// Makes a directory with the disk as the other side of a comparison.
fn directory_of(kept: &Kept, name: &str) -> PathBuf {
    let dir = kept.vmkeep.path(name);
    fs::create_dir(&dir).unwrap();
    fs::copy(&kept.image, dir.join("vda.raw")).unwrap();
    dir
}

#[test]
fn a_repository_that_is_none_or_not_whole_is_named() {
    let kept = Kept::new();
    let config = kept.vmkeep.repository().join("config");
    let copy = kept.vmkeep.repository().join("config.copy");
    let whole = fs::read(&config).unwrap();
    let mut newer = whole.clone();
    // the version stands behind the magic
    newer[8] = newer[8].wrapping_add(1);
    let mut foreign = whole.clone();
    foreign[0] ^= 1;
    for (content, word) in
        [(&whole[..0], "config"), (&whole[..20], "config"), (&foreign[..], "magic"), (&newer[..], "")]
    {
        fs::write(&config, content).unwrap();
        // one of the two is enough, and it is said
        fs::write(&copy, &whole).unwrap();
        let output = kept.vmkeep.command(&["points"]).output().unwrap();
        let said = text(&output);
        assert!(output.status.success() && said.contains("repair index"), "{said}");
        fs::write(&copy, content).unwrap();
        let said = text(&kept.vmkeep.command(&["points"]).output().unwrap());
        let output = kept.vmkeep.command(&["points"]).output().unwrap();
        assert!(!output.status.success() && output.status.code().is_some_and(|code| code < 100), "{said}");
        assert!(said.contains("config") && said.contains(word) && !said.contains("panicked"), "{said}");
    }
    fs::remove_file(&config).unwrap();
    let init = || {
        let output = kept.vmkeep.command(&["init"]).output().unwrap();
        assert!(!output.status.success(), "init over a repository");
        text(&output)
    };
    fs::write(&copy, &whole).unwrap();
    assert!(init().contains("exists already"));
    let mended = kept.vmkeep.command(&["repair", "index"]).output().unwrap();
    assert!(text(&mended).contains("config is put anew"), "{}", text(&mended));
    assert_eq!(fs::read(&config).unwrap(), whole);
    fs::remove_file(&config).unwrap();
    fs::remove_file(&copy).unwrap();
    let said = text(&kept.vmkeep.command(&["points"]).output().unwrap());
    assert!(said.contains(kept.vmkeep.repository().to_str().unwrap()), "{said}");
    let said = init();
    assert!(said.contains("config is lost") && !config.exists() && !copy.exists(), "{said}");
}

#[test]
fn damage_has_its_code_and_names_the_object() {
    let kept = Kept::new();
    let objects = ["packs", "index", "outcomes"].map(|folder| files(&kept.vmkeep.repository().join(folder)));
    for object in objects.iter().flat_map(BTreeMap::keys) {
        let whole = fs::read(object).unwrap();
        fs::set_permissions(object, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(object, &whole[..whole.len() / 2]).unwrap();
        let output = kept.vmkeep.command(&["verify", "--data"]).output().unwrap();
        let name = object.file_name().unwrap().to_str().unwrap();
        assert_eq!(output.status.code(), Some(4), "{object:?}: {}", text(&output));
        assert!(text(&output).contains(&name[..16]), "{name}: {}", text(&output));
        let findings = kept.vmkeep.command(&["verify", "--data", "--json"]).output().unwrap();
        let last = String::from_utf8(findings.stdout).unwrap();
        assert_valid("verify", &serde_json::from_str(last.lines().last().unwrap()).unwrap());
        fs::write(object, whole).unwrap();
    }
    kept.vmkeep.ok(&["verify", "--data"]);
}

#[test]
fn every_command_explains_itself() {
    let vmkeep = Vmkeep::init(None);
    let help = vmkeep.ok(&["--help"]);
    let listed = help.lines().skip_while(|line| !line.starts_with("Commands:")).skip(1);
    let commands: Vec<&str> = listed
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert!(commands.len() > 10, "{help}");
    for command in commands.into_iter().filter(|command| *command != "help") {
        let help = vmkeep.ok(&[command, "--help"]);
        assert!(help.contains("Usage: vmkeep"), "{command}: {help}");
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(vmkeep.ok(&["completions", shell]).contains("vmkeep"), "{shell}");
    }
    assert!(vmkeep.ok(&["man"]).contains(".TH"));
}

#[test]
fn a_reader_that_goes_away_is_no_crash() {
    let kept = Kept::new();
    let mut child =
        kept.vmkeep.command(&["man"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let said = text(&child.wait_with_output().unwrap());
    assert!(!said.contains("panicked"), "{said}");
}

fn schemas() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/schemas")
}

/// Fails unless a document is as the schema of that name says.
#[track_caller]
pub fn assert_valid(name: &str, document: &Value) {
    let schema = fs::read(schemas().join(format!("{name}.json"))).unwrap();
    let validator = jsonschema::validator_for(&serde_json::from_slice(&schema).unwrap()).unwrap();
    let faults: Vec<String> =
        validator.iter_errors(document).map(|fault| format!("{}: {fault}", fault.instance_path())).collect();
    assert!(faults.is_empty(), "{name}: {faults:#?}\n{document:#}");
    assert!(!validator.is_valid(&serde_json::json!({ "schema": 1 })), "{name} accepts anything");
}

#[test]
fn json_is_as_its_schema_says() {
    let kept = Kept::new();
    let [first, second] = [kept.points[0].as_str(), kept.points[1].as_str()];
    let image = kept.image.to_str().unwrap();
    let target = kept.vmkeep.path("out");
    let target = target.to_str().unwrap();
    let commands: [(&str, &[&str]); 31] = [
        ("backup", &["backup", "--file", image, "--name", "web"]),
        ("backup", &["backup", "--file", image, "--name", "web", "-n", "-l", "full"]),
        ("points", &["points"]),
        ("points", &["points", "nobody"]),
        ("show", &["show", second]),
        ("show", &["show", second, "--extents"]),
        ("show", &["show", second, "--explain"]),
        ("diff", &["diff", first, second]),
        ("stats", &["stats"]),
        ("restore", &["restore", second, "-o", target]),
        ("stats", &["stats", "--unique"]),
        ("forget", &["forget", "-n", "--keep-last", "1", "--force"]),
        ("hold", &["hold", first, "--until", "1d"]),
        ("points", &["points"]),
        ("hold", &["unhold", first]),
        ("forget", &["forget", "-y", "--force", first]),
        ("points", &["points", "--forgotten"]),
        ("hold", &["undelete", first]),
        ("forget", &["forget", "-y", "--force", first]),
        ("prune", &["prune", "-n"]),
        ("prune", &["prune"]),
        ("verify", &["verify", "--structure"]),
        ("verify", &["verify", "--data"]),
        ("verify", &["verify", "--sample", "1/2"]),
        ("verify", &["verify", "--packs", "--older-than", "1d"]),
        ("verify", &["verify", second, "--restore"]),
        ("repair", &["repair", "index"]),
        ("repair", &["repair", "packs"]),
        ("repair", &["repair", "points"]),
        ("against", &["verify", second, "--against", image]),
        ("version", &["version"]),
    ];
    let mut used = BTreeSet::new();
    for (name, args) in commands {
        assert_valid(name, &kept.vmkeep.json(args));
        used.insert(format!("{name}.json"));
    }
    let there: BTreeSet<String> = fs::read_dir(schemas())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    // these need a domain, and have a file of tests of their own
    used.extend(["checkpoints.json", "doctor.json"].map(str::to_owned));
    assert_eq!(used, there);
}

/// The headings of docs/errors.md quote messages: what stands between the names in them has to be in the source.
#[test]
fn the_errors_that_are_explained_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources: String = files(&root.join("src"))
        .into_iter()
        .filter(|(path, _)| path.extension().is_some_and(|found| found == "rs"))
        .map(|(_, content)| String::from_utf8(content).unwrap())
        .collect();
    // a message may go over several lines of source
    let sources: String = sources.replace("\\\n", "").split_whitespace().collect::<Vec<_>>().join(" ");
    let text = fs::read_to_string(root.join("docs/errors.md")).unwrap();
    let mut checked = 0;
    for heading in text.lines().filter_map(|line| line.strip_prefix("### ")) {
        for part in heading.split('…').map(str::trim).filter(|part| !part.is_empty()) {
            assert!(sources.contains(part), "no message has {part:?} of {heading:?}");
            checked += 1;
        }
    }
    assert!(checked > 15, "{checked}");
}

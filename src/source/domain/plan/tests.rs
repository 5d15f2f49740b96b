use super::*;

fn disk(target: &str) -> DiskXml {
    DiskXml {
        target: target.into(),
        device: Device::Disk,
        format: "qcow2".into(),
        kind: "file".into(),
        path: Some(format!("/i/{target}").into()),
        has_source: true,
        read_only: false,
        shareable: false,
        encrypted: false,
    }
}

fn names(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

fn targets(selection: &Selection) -> Vec<&str> {
    selection.disks.iter().map(|disk| disk.target.as_str()).collect()
}

#[test]
fn only_writable_disks_with_content_of_their_own_are_taken() {
    let disks = [
        disk("vda"),
        DiskXml { device: Device::Other("cdrom".into()), ..disk("hdc") },
        DiskXml { device: Device::Other("lun".into()), ..disk("sda") },
        DiskXml { has_source: false, ..disk("vdb") },
        DiskXml { read_only: true, ..disk("vdc") },
        DiskXml { shareable: true, ..disk("vdd") },
        DiskXml { kind: "vhostuser".into(), ..disk("vde") },
        DiskXml { kind: "network".into(), path: None, ..disk("vdf") },
    ];
    let selection = select("domain d", &disks, &[], &[]).unwrap();
    assert_eq!(targets(&selection), ["vda", "vdf"]);
    let excluded: Vec<&str> = selection.excluded.iter().map(|(target, _)| target.as_str()).collect();
    assert_eq!(excluded, ["hdc", "sda", "vdb", "vdc", "vdd", "vde"]);
    assert_eq!(selection.excluded[0].1, "it is a cdrom");
}

#[test]
fn include_and_exclude_name_disks_that_exist() {
    let disks = [disk("vda"), disk("vdb"), DiskXml { read_only: true, ..disk("vdc") }];
    let select =
        |include: &[&str], exclude: &[&str]| select("domain d", &disks, &names(include), &names(exclude));
    assert_eq!(targets(&select(&["vdb"], &[]).unwrap()), ["vdb"]);
    assert_eq!(targets(&select(&[], &["vdb"]).unwrap()), ["vda"]);
    assert_eq!(targets(&select(&[], &["vdc"]).unwrap()), ["vda", "vdb"]);
    for (include, exclude) in [(&["vdx"][..], &[][..]), (&[], &["vdx"])] {
        let error = select(include, exclude).unwrap_err();
        assert!(matches!(error, Error::Usage(_)), "{error}");
        assert_eq!(error.to_string(), "domain d has no disk vdx; it has vda, vdb, vdc");
    }
    let error = select(&["vda", "vdc"], &[]).unwrap_err().to_string();
    assert_eq!(error, "domain d: disk vdc cannot be backed up: it is read-only");
    let error = select(&["vda"], &["vda"]).unwrap_err().to_string();
    assert!(error.contains("no disk is left") && error.contains("vda: it was excluded"), "{error}");
}

fn base(name: &str, disks: &[(&str, u64)], tracked: Option<&[&str]>) -> KnownBase {
    KnownBase {
        base: BaseCheckpoint {
            name: name.into(),
            disks: disks.iter().map(|(target, size)| ((*target).to_owned(), *size)).collect(),
        },
        tracked: tracked.map(|targets| targets.iter().map(|target| (*target).to_owned()).collect()),
    }
}

fn mode(choice: &Choice) -> (&str, Option<&str>) {
    match &choice.mode {
        DiskMode::Incremental { checkpoint } => (checkpoint, None),
        DiskMode::Full { reason } => ("", reason.as_deref()),
    }
}

#[test]
fn the_first_base_that_serves_is_taken() {
    let both = [
        base("c2", &[("vda", 10)], Some(&["vda"])),
        base("c1", &[("vda", 10), ("vdb", 10)], Some(&["vda", "vdb"])),
    ];
    let none = Broken::new();
    assert_eq!(mode(&choose(&disk("vda"), 10, &both, &none)), ("c2", None));
    assert_eq!(mode(&choose(&disk("vdb"), 10, &both, &none)), ("c1", None));
    let broken = Broken::from([(("vda".to_owned(), "c2".to_owned()), "broken".to_owned())]);
    assert_eq!(mode(&choose(&disk("vda"), 10, &both, &broken)), ("c1", None));
    let added = choose(&disk("vdc"), 10, &both, &none);
    assert_eq!(mode(&added), ("", Some("checkpoint c2 did not track it; checkpoint c1 did not track it")));
}

#[test]
fn every_reason_for_a_full_is_given() {
    let none = Broken::new();
    let full = |disk: &DiskXml, size: u64, bases: &[KnownBase], broken: &Broken| {
        let choice = choose(disk, size, bases, broken);
        let (checkpoint, reason) = mode(&choice);
        assert_eq!(checkpoint, "");
        reason.map(str::to_owned)
    };
    assert_eq!(full(&disk("vda"), 10, &[], &none), None, "asked for");
    let gone = [base("c1", &[("vda", 10)], None)];
    assert_eq!(full(&disk("vda"), 10, &gone, &none).as_deref(), Some("checkpoint c1 is gone"));
    let other = [base("c1", &[("vda", 10)], Some(&["vdb"]))];
    assert_eq!(full(&disk("vda"), 10, &other, &none).as_deref(), Some("checkpoint c1 has no bitmap of it"));
    let sound = [base("c1", &[("vda", 10)], Some(&["vda"]))];
    assert_eq!(full(&disk("vda"), 9, &sound, &none).as_deref(), Some("it shrank from 10 to 9 bytes"));
    let raw = DiskXml { format: "raw".into(), ..disk("vda") };
    let reason = full(&raw, 10, &sound, &none);
    assert_eq!(reason.as_deref(), Some("an image of format raw keeps no dirty bitmap"));
    let broken = Broken::from([(("vda".to_owned(), "c1".to_owned()), "broken".to_owned())]);
    assert_eq!(full(&disk("vda"), 10, &sound, &broken).as_deref(), Some("broken"));
}

#[test]
fn a_grown_disk_stays_incremental_and_its_old_size_is_known() {
    let bases = [base("c1", &[("vda", 10)], Some(&["vda"]))];
    let choice = choose(&disk("vda"), 30, &bases, &Broken::new());
    assert_eq!((mode(&choice), choice.size_then), (("c1", None), 10));
}

#[test]
fn an_error_is_about_what_it_quotes() {
    let used = [("vda", "c2"), ("vdb", "c2"), ("vdc", "c1")].map(|(a, b)| (a.to_owned(), b.to_owned()));
    let blame = |message: &str| {
        blamed(message, &used).into_iter().map(|(disk, _)| disk).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(blame("missing or broken bitmap 'c2' for disk 'vdb'"), "vdb");
    assert_eq!(blame("Checkpoint 'c1' for incremental backup of disk 'vdc' not found"), "vdc");
    assert_eq!(blame("irgendwas mit 'vda'"), "vda");
    assert_eq!(blame("quelque chose"), "vda vdb vdc");
}

#[test]
fn a_base_that_serves_no_disk_is_spent() {
    let bases = [("new", ["vda", "vdb"].as_slice()), ("old", &["vda"])].map(|(name, disks)| BaseCheckpoint {
        name: name.into(),
        disks: disks.iter().map(|disk| ((*disk).to_owned(), 10)).collect(),
    });
    let since = |name: &str| DiskMode::Incremental { checkpoint: name.into() };
    let full = DiskMode::Full { reason: None };
    let spent = |modes: &[(&str, &DiskMode)]| super::spent(&bases, modes).join(" ");
    assert_eq!(spent(&[("vda", &since("new")), ("vdb", &full)]), "", "the old one was not asked");
    assert_eq!(spent(&[("vda", &since("old")), ("vdb", &full)]), "new");
    assert_eq!(spent(&[("vda", &full), ("vdb", &full)]), "new old");
    assert_eq!(spent(&[("vda", &full)]), "old", "vdb may have a bitmap");
    assert_eq!(spent(&[("vdb", &full)]), "");
}

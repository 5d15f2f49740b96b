use super::domain::{Case, examine};
use super::*;
use crate::ops::checkpoints::Known;
use crate::ops::checkpoints::tests::{disk, facts, known, name};
use crate::source::domain::{
    AgentFacts, BitmapState, DomainFacts, JobFacts, ScratchPlace, Version, Versions,
};

fn place(free: u64) -> ScratchPlace {
    ScratchPlace { path: "/var/tmp".into(), free: Ok(free), excess: 0 }
}

/// Returns the findings about a domain that a repository knows and the user named.
fn findings(facts: &DomainFacts) -> Vec<Diagnosis> {
    let (known, place) = (known(), place(u64::MAX));
    examine(facts, &Case { known: Some(&known), place: &place, named: true, end_job: false })
}

fn kinds(found: &[Diagnosis]) -> Vec<&str> {
    found.iter().map(|diagnosis| diagnosis.kind).collect()
}

#[track_caller]
fn only(found: Vec<Diagnosis>) -> Diagnosis {
    assert_eq!(found.len(), 1, "{:?}", kinds(&found));
    found.into_iter().next().unwrap()
}

/// The newest and the last full's are there and sound, with `more` on the same disk.
fn sound_but(more: &[(&str, BitmapState, bool)]) -> DomainFacts {
    let (first, third) = (name(1), name(3));
    let mut bitmaps =
        vec![(first.as_str(), BitmapState::Sound, true), (third.as_str(), BitmapState::Sound, true)];
    bitmaps.retain(|(name, ..)| more.iter().all(|(other, ..)| other != name));
    bitmaps.extend(more);
    facts(vec![disk("vda", &bitmaps)])
}

#[test]
fn what_is_as_it_should_be_is_no_finding() {
    assert_eq!(findings(&sound_but(&[])), []);
    let others =
        [("theirs", BitmapState::Sound, true), ("vmkeep-0000000b-0000000000000001", BitmapState::Busy, true)];
    assert_eq!(findings(&sound_but(&others)), []);
    let busy = name(3);
    assert_eq!(findings(&sound_but(&[(&busy, BitmapState::Busy, true)])), []);
}

#[test]
fn a_lost_bitmap_is_told_in_the_words_of_libvirt() {
    let newest = name(3);
    for (state, kind, words) in [
        (BitmapState::Missing, "bitmap-missing", "not found in backing chain of 'vda'"),
        (BitmapState::Inconsistent, "bitmap-inconsistent", "is inconsistent and cannot be used"),
        (BitmapState::Disabled, "bitmap-disabled", "is disabled"),
        (BitmapState::Broken, "bitmap-broken", "missing or broken bitmap"),
    ] {
        let found = only(findings(&sound_but(&[(&newest, state, true)])));
        assert_eq!((found.kind, found.severity), (kind, Severity::Problem));
        assert!(found.problem.contains(words) && found.problem.contains(&newest), "{}", found.problem);
        assert!(found.problem.starts_with("checkpoint inconsistent: "), "{}", found.problem);
        assert!(found.meaning.contains("in full"), "{}", found.meaning);
        let whole = Remedy::DeleteCheckpoint { name: newest.clone(), disks: vec!["vda".into()] };
        assert_eq!(found.remedy, Some(whole));
    }
}

#[test]
fn a_disk_without_its_bitmap_does_not_cost_the_others_theirs() {
    let (full, newest) = (name(1), name(3));
    let of = |state| [(full.as_str(), BitmapState::Sound, true), (newest.as_str(), state, true)];
    let disks = vec![disk("vda", &of(BitmapState::Sound)), disk("vdb", &of(BitmapState::Inconsistent))];
    let found = findings(&facts(disks));
    let broken: Vec<&Diagnosis> = found.iter().filter(|found| found.kind == "bitmap-inconsistent").collect();
    let narrow = Remedy::NarrowCheckpoint { name: newest.clone(), broken: vec!["vdb".into()] };
    assert_eq!((broken.len(), broken[0].remedy.clone()), (1, Some(narrow)));
    assert!(kinds(&found).contains(&"untracked-disk"), "vdb is in no point: {:?}", kinds(&found));
}

#[test]
fn what_cannot_be_seen_is_not_lost() {
    let newest = name(3);
    let mut domain = sound_but(&[(&newest, BitmapState::Unknown, true)]);
    domain.disks[0].unreadable = Some("No such file or directory".into());
    let found = only(findings(&domain));
    assert_eq!((found.kind, found.remedy), ("unreadable-disk", None));
}

#[test]
fn what_no_backup_needs_is_deleted_and_others_never_are() {
    for (number, created, kind, severity) in [
        (2, true, "superseded-checkpoint", Severity::Problem),
        (7, true, "leftover-checkpoint", Severity::Problem),
        (9, true, "forgotten-checkpoint", Severity::Note),
        (2, false, "bitmap-without-checkpoint", Severity::Problem),
        (7, false, "bitmap-without-checkpoint", Severity::Problem),
    ] {
        let name = name(number);
        let found = only(findings(&sound_but(&[(&name, BitmapState::Sound, created)])));
        assert_eq!((found.kind, found.severity), (kind, severity));
        let delete = Remedy::DeleteCheckpoint { name, disks: vec!["vda".into()] };
        assert_eq!(found.remedy, Some(delete));
    }
    let other = "vmkeep-0000000b-0000000000000001";
    for (name, state, created) in [
        (other, BitmapState::Inconsistent, true),
        ("theirs", BitmapState::Missing, true),
        (other, BitmapState::Sound, false),
        ("theirs", BitmapState::Inconsistent, false),
    ] {
        let found = only(findings(&sound_but(&[(name, state, created)])));
        assert_eq!((found.severity, found.remedy), (Severity::Note, None), "{name}");
    }
}

#[test]
fn what_a_running_backup_made_is_left_alone() {
    let mut at_work = known();
    at_work.at_work = true;
    let place = place(u64::MAX);
    let case = Case { known: Some(&at_work), place: &place, named: true, end_job: false };
    let new = name(7);
    assert_eq!(examine(&sound_but(&[(&new, BitmapState::Sound, true)]), &case), []);
    // without a repository nobody's checkpoint is ours
    let case = Case { known: None, ..case };
    let found = examine(&sound_but(&[(&new, BitmapState::Inconsistent, true)]), &case);
    assert!(found.iter().all(|found| found.remedy.is_none()), "{found:?}");
    assert!(found[0].problem.contains("of a vmkeep repository"), "{}", found[0].problem);
}

#[test]
fn a_checkpoint_that_libvirt_forgot_is_told_to_it() {
    let newest = name(3);
    let lost = sound_but(&[(&newest, BitmapState::Sound, false)]);
    let found = only(findings(&lost));
    assert_eq!((found.kind, found.severity), ("checkpoint-unknown-to-libvirt", Severity::Problem));
    assert!(
        matches!(&found.remedy, Some(Remedy::TellCheckpoint { base, created: 3 }) if base.name == newest)
    );
    // nothing of it is left, as all can see while the domain is off
    let first = name(1);
    let without = facts(vec![disk("vda", &[(&first, BitmapState::Sound, true)])]);
    let found = only(findings(&without));
    assert_eq!((found.kind, found.severity, found.remedy), ("checkpoint-gone", Severity::Note, None));
    // of a running one only QEMU knows
    let found = only(findings(&DomainFacts { running: true, ..without.clone() }));
    assert_eq!((found.kind, found.severity), ("checkpoint-unknown-to-libvirt", Severity::Note));
    assert!(found.remedy.is_some());
    let found = only(findings(&DomainFacts { running: true, asked_qemu: true, ..without }));
    assert_eq!(found.kind, "checkpoint-gone");
    // the last full's is deleted by backups, once it serves no disk
    let third = name(3);
    assert_eq!(findings(&facts(vec![disk("vda", &[(&third, BitmapState::Sound, true)])])), []);
}

#[test]
fn jobs_are_told_apart() {
    let with = |job| DomainFacts { running: true, job, ..sound_but(&[]) };
    let found = only(findings(&with(JobFacts::Killed { socket: "/v/vmkeep-job-1/nbd".into() })));
    assert!(found.remedy.is_some() && found.severity == Severity::Problem);
    let foreign = with(JobFacts::Foreign { socket: Some("/v/theirs".into()) });
    let found = only(findings(&foreign));
    assert_eq!((found.kind, found.remedy), ("job-of-another-program", None));
    assert!(
        found.problem.contains("/v/theirs") && found.meaning.contains("cannot acquire state change lock")
    );
    let (known, place) = (known(), place(u64::MAX));
    let case = Case { known: Some(&known), place: &place, named: true, end_job: true };
    assert!(only(examine(&foreign, &case)).remedy.is_some());
    assert!(only(examine(&foreign, &Case { named: false, ..case })).remedy.is_none(), "it has to be named");
    for harmless in [JobFacts::Alive { socket: "/v/vmkeep-job-1/nbd".into() }, JobFacts::Other] {
        assert_eq!(only(findings(&with(harmless))).severity, Severity::Note);
    }
}

#[test]
fn the_agent_is_judged() {
    let with = |agent| DomainFacts { running: true, agent, ..sound_but(&[]) };
    assert_eq!(findings(&with(AgentFacts::Answers)), []);
    assert_eq!(only(findings(&with(AgentFacts::NoChannel))).severity, Severity::Note);
    let silent = only(findings(&with(AgentFacts::Silent("x".into()))));
    assert!(
        silent.severity == Severity::Problem && silent.problem.starts_with("Guest agent is not responding")
    );
    let frozen = with(AgentFacts::Frozen);
    assert_eq!(only(findings(&frozen)).remedy, Some(Remedy::Thaw));
    let (known, place) = (known(), place(u64::MAX));
    let unnamed = Case { known: Some(&known), place: &place, named: false, end_job: false };
    assert_eq!(only(examine(&frozen, &unnamed)).remedy, None, "it may be somebody's snapshot");
    let alive = DomainFacts { job: JobFacts::Alive { socket: "/v/vmkeep-job-1/nbd".into() }, ..frozen };
    assert_eq!(kinds(&findings(&alive)), ["job-running"], "a backup freezes it for its instant");
}

#[test]
fn disks_and_space_are_judged() {
    let mut raw = disk("vdb", &[]);
    raw.format = "raw".into();
    let mut old = disk("vdc", &[]);
    old.is_old_qcow2 = true;
    let mut gone = disk("vdd", &[]);
    gone.unreadable = Some("No such file or directory".into());
    let mut cdrom = disk("hda", &[]);
    cdrom.left_out = Some("it is a cdrom".into());
    let domain = DomainFacts { saved_memory: true, ..facts(vec![raw, old, gone, cdrom]) };
    let place = place(1 << 20);
    let nothing = Known::default();
    let case = Case { known: Some(&nothing), place: &place, named: true, end_job: false };
    let found = examine(&domain, &case);
    assert_eq!(
        kinds(&found),
        ["no-bitmaps", "old-qcow2", "unreadable-disk", "scratch-space", "saved-memory"]
    );
    assert!(found[0].problem.contains("unsupported for storage type raw"));
    assert!(found[1].advice.contains("qemu-img amend -o compat=1.1 /img/vdc"), "{}", found[1].advice);
    let problems: Vec<&str> =
        found.iter().filter(|found| found.severity == Severity::Problem).map(|found| found.kind).collect();
    assert_eq!(problems, ["unreadable-disk", "scratch-space"]);
    let mut large = facts(vec![disk("vda", &[])]);
    large.disks[0].size = Some(1 << 40);
    let enough = ScratchPlace { free: Ok(1 << 30), ..place.clone() };
    let found = only(examine(&large, &Case { place: &enough, ..case }));
    assert_eq!((found.kind, found.severity), ("scratch-space", Severity::Note));
}

#[test]
fn old_versions_are_told() {
    let versions = |libvirt, qemu| Versions { libvirt, qemu };
    assert_eq!(host::too_old(versions(Version(9, 0, 0), Some(Version(6, 1, 0)))), []);
    let found = host::too_old(versions(Version(7, 5, 0), Some(Version(5, 2, 0))));
    assert_eq!(kinds(&found), ["too-old", "too-old"]);
    assert!(found[0].problem.contains("libvirt is of version 7.5.0") && found[1].problem.contains("QEMU"));
    assert_eq!(kinds(&host::too_old(versions(Version(9, 0, 0), None))), ["no-qemu"]);
}

#[test]
fn places_that_cannot_be_used_are_told() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(host::cache(&dir.path().join("not/yet"), &[]), []);
    assert_eq!(host::cache(dir.path(), &["it is rebuilt".into()])[0].severity, Severity::Note);
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    for path in [file.clone(), file.join("below")] {
        let found = only(host::cache(&path, &[]));
        assert!(
            found.kind == "cache-unusable" && found.problem.contains("no directory"),
            "{}",
            found.problem
        );
    }
    assert_eq!(host::place(&place(1)), None);
    let long = ScratchPlace { excess: 9, ..place(1) };
    assert!(host::place(&long).unwrap().problem.contains("9 bytes too long for a socket"));
    let gone = ScratchPlace { free: Err("No such file or directory".into()), ..place(1) };
    assert_eq!(host::place(&gone).unwrap().severity, Severity::Problem);
}

/// Every kind is in the document that explains them.
#[test]
fn every_kind_is_explained() {
    let text = include_str!("../../../docs/errors.md");
    let sources = [include_str!("domain.rs"), include_str!("host.rs"), include_str!("mend.rs")].concat();
    let words = sources.split('"').filter(|word| {
        let is_kind = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        word.len() > 5 && !word.starts_with("qemu-") && word.contains('-') && word.chars().all(is_kind)
    });
    let mut count = 0;
    for kind in words.chain(["frozen"]) {
        assert!(text.contains(&format!("`{kind}`")), "{kind} is not explained");
        count += 1;
    }
    assert!(count > 25, "{count}");
}

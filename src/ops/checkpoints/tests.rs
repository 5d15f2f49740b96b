use super::*;
use crate::format::point::{Consistency, DiskRecord, Manifest, PointRecord, PointStats, SourceKind};
use crate::source::domain::{AgentFacts, BitmapFacts, CheckpointFacts, DiskFacts};

pub const PREFIX: &str = "vmkeep-0000000a-";

/// Returns the name of the checkpoint of the point of that number.
pub fn name(number: u8) -> String {
    format!("{PREFIX}{number:016x}")
}

/// A point with disk vda and, if `tracked`, a checkpoint.
pub fn point(number: u8, level: Level, tracked: bool) -> PointEntry {
    let disk = DiskRecord {
        target: "vda".into(),
        manifest: Manifest { size: 1 << 20, height: 0, root: None },
        format: "qcow2".into(),
        level,
        full_reason: None,
        has_bitmap: tracked,
    };
    let record = PointRecord {
        id: PointId::from_bytes([number; 16]),
        domain: "web".into(),
        domain_uuid: None,
        time_ms: i64::from(number) * 1000,
        level,
        base: None,
        predecessor: None,
        checkpoint: tracked.then(|| name(number)),
        source: SourceKind::Running,
        consistency: Consistency::Crash,
        disks: vec![disk],
        files: Vec::new(),
        xml_inactive: None,
        xml_live: None,
        tags: Vec::new(),
        host: "h".into(),
        program: "p".into(),
    };
    PointEntry { record: record.into(), stats: PointStats::default() }
}

/// A full, two incrementals and a copy; the first incremental's checkpoint is superseded, point 9 was forgotten.
pub fn known() -> Known {
    let points = [
        point(1, Level::Full, true),
        point(2, Level::Incremental, true),
        point(3, Level::Incremental, true),
        point(4, Level::Copy, false),
    ];
    Known::new(PREFIX.into(), &points, &[point(9, Level::Incremental, true)], false)
}

pub fn disk(target: &str, bitmaps: &[(&str, BitmapState, bool)]) -> DiskFacts {
    let bitmap = |(name, state, has_checkpoint): &(&str, BitmapState, bool)| BitmapFacts {
        name: (*name).to_owned(),
        state: *state,
        dirty_bytes: None,
        has_checkpoint: *has_checkpoint,
    };
    DiskFacts {
        target: target.into(),
        format: "qcow2".into(),
        size: Some(1 << 20),
        image: Some(format!("/img/{target}").into()),
        left_out: None,
        is_old_qcow2: false,
        unreadable: None,
        bitmaps: bitmaps.iter().map(bitmap).collect(),
    }
}

/// A domain that is off; its checkpoints are those that its bitmaps are said to have.
pub fn facts(disks: Vec<DiskFacts>) -> DomainFacts {
    let mut names: Vec<String> = Vec::new();
    for bitmap in disks.iter().flat_map(|disk| &disk.bitmaps).filter(|bitmap| bitmap.has_checkpoint) {
        names.push(bitmap.name.clone());
    }
    names.sort();
    names.dedup();
    let tracks = |name: &str| -> Vec<String> {
        let has = |disk: &&DiskFacts| disk.bitmaps.iter().any(|b| b.name == name && b.has_checkpoint);
        disks.iter().filter(has).map(|disk| disk.target.clone()).collect()
    };
    let checkpoints =
        names.iter().map(|name| CheckpointFacts { name: name.clone(), created: 1, disks: tracks(name) });
    DomainFacts {
        name: "web".into(),
        uuid: "6f1c2d3e-0000-4000-8000-000000000000".into(),
        running: false,
        crashed: false,
        saved_memory: false,
        checkpoints: checkpoints.collect(),
        disks,
        job: JobFacts::None,
        agent: AgentFacts::Unasked,
        asked_qemu: false,
    }
}

#[test]
fn each_checkpoint_has_its_standing() {
    let known = known();
    let standing = |name: &str| known.standing(name).0;
    assert_eq!(standing(&name(3)), Standing::Newest);
    assert_eq!(standing(&name(1)), Standing::LastFull);
    assert_eq!(known.standing(&name(2)), (Standing::Superseded, Some(PointId::from_bytes([2; 16]))));
    assert_eq!(known.standing(&name(9)), (Standing::Forgotten, Some(PointId::from_bytes([9; 16]))));
    assert_eq!(standing(&name(7)), Standing::Unknown);
    assert_eq!(standing("vmkeep-0000000b-0000000000000001"), Standing::OtherRepository);
    for foreign in ["virtnbdbackup.0", "vmkeep-mine", "vmkeep-0000000b-1", ""] {
        assert_eq!(standing(foreign), Standing::Foreign, "{foreign}");
    }
    let at_work = Known { at_work: true, ..known.clone() };
    assert_eq!(at_work.standing(&name(7)).0, Standing::AtWork);
    assert_eq!(at_work.standing(&name(2)).0, Standing::Superseded);
    let one = Known::new(PREFIX.into(), &[point(1, Level::Full, true)], &[], false);
    assert_eq!(one.standing(&name(1)).0, Standing::NewestAndLastFull);
    assert_eq!(one.needed().count(), 1);
    assert_eq!(Known::default().standing("anything").0, Standing::Foreign, "no prefix owns nothing");
}

#[test]
fn only_what_can_serve_no_backup_is_deleted() {
    use BitmapState::{Inconsistent, Missing, Sound};
    let names: Vec<String> = (0..10).map(name).collect();
    let other = "vmkeep-0000000b-0000000000000001";
    let vda = [
        (names[1].as_str(), Sound, true),
        (&names[2], Sound, true),
        (&names[3], Sound, true),
        (&names[7], Sound, false),
        (&names[9], Inconsistent, true),
        (other, Inconsistent, true),
        ("theirs", Sound, false),
    ];
    let reports = describe(&facts(vec![disk("vda", &vda)]), &known());
    let useless: Vec<&str> =
        reports.iter().filter(|found| found.useless.is_some()).map(|found| found.name.as_str()).collect();
    assert_eq!(useless, [&names[2], &names[9], &names[7]]);
    assert_eq!(reports.len(), 7);
    assert_eq!(reports.iter().filter(|found| found.created.is_none()).count(), 2);

    // the newest one goes only if no disk has a bitmap that serves
    let broken = [(names[3].as_str(), Inconsistent, true)];
    let sound = [(names[3].as_str(), Sound, true)];
    let useless = |disks| {
        let reports = describe(&facts(disks), &known());
        reports.iter().find(|found| found.name == names[3]).unwrap().useless.is_some()
    };
    assert!(useless(vec![disk("vda", &broken)]));
    assert!(!useless(vec![disk("vda", &broken), disk("vdb", &sound)]));
    assert!(useless(vec![disk("vda", &[(&names[3], Missing, true)])]), "libvirt still lists it");
    assert!(!useless(vec![disk("vda", &[])]), "nothing of it is left");
}

#[test]
fn a_bitmap_that_a_point_relies_on_is_missed() {
    let reports = describe(&facts(vec![disk("vda", &[]), disk("vdb", &[])]), &known());
    let missed: Vec<_> = reports.iter().map(|found| (found.name.clone(), found.disks.len())).collect();
    assert_eq!(missed, [(name(1), 1), (name(3), 1)], "vdb was in no point");
    // of a running domain that was not asked nothing is known
    let running = DomainFacts { running: true, ..facts(vec![disk("vda", &[])]) };
    assert!(describe(&running, &known()).iter().all(|found| found.disks.is_empty()));
}

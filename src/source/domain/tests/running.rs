use std::time::{Duration, Instant};

use super::keeper::{Keeper, Lab, MIB, kill, run};
use crate::error::{Error, ErrorClass};
use crate::extent::RangeSet;
use crate::monitor::Recorder;
use crate::source::domain::{DiskMode, Freeze, Hypervisor};

#[test]
fn levels_of_every_kind_of_disk() {
    let disks = [
        "vda:qcow2:16M",
        "vdb:qcow2:8M:cluster_size=4k",
        "vdc:raw:4M",
        "vdd:qcow2:1M:readonly",
        "sda:cdrom:1M",
    ];
    let mut keeper = Keeper::of("kinds", &disks);
    keeper.virsh("change-media", &["sda", "--eject"]);
    keeper.write("vda", "1M", "64k", "0x11");
    keeper.write("vdc", "1M", "64k", "0x12");
    let full = keeper.full();
    assert_eq!(full.summary(), "vda full vdb full vdc full");
    assert!(full.modes.values().all(|mode| *mode == DiskMode::Full { reason: None }));
    assert_eq!(full.excluded.len(), 2, "{:?}", full.excluded);
    assert_eq!(full.warnings, [""; 0]);

    keeper.write("vda", "2M", "512", "0x21");
    keeper.write("vda", "1M", "4k", "-z");
    keeper.write("vdb", "3M", "4k", "0x22");
    keeper.write("vdc", "2M", "64k", "0x23");
    let plan = {
        let request = keeper.request(false);
        keeper.hypervisor.plan(&request, &Recorder::new()).unwrap()
    };
    let forecast: Vec<_> = plan.disks.iter().map(|disk| disk.dirty_bytes).collect();
    assert_eq!(forecast, [Some(131_072), Some(4096), None]);
    let inc = keeper.inc();
    assert_eq!(inc.summary(), "vda inc vdb inc vdc full");
    assert_eq!(inc.reason("vdc"), "an image of format raw keeps no dirty bitmap");
    assert_eq!((inc.dirty_kib("vda"), inc.dirty_kib("vdb")), ("1024+64 2048+64".into(), "3072+4".into()));

    // a differential, natively from the full's checkpoint
    keeper.write("vda", "5M", "64k", "0x31");
    let mut request = keeper.request(false);
    request.bases = vec![keeper.points[0].base.clone().unwrap()];
    let diff = keeper.back_up(&request);
    assert_eq!(diff.dirty_kib("vda"), "1024+64 2048+64 5120+64");
    assert_eq!(keeper.checkpoints(), keeper.keep(), "the last full's and the newest");

    let mut request = keeper.request(false);
    request.exclude = vec!["vdb".into()];
    let some = keeper.back_up(&request);
    assert_eq!(some.summary(), "vda inc vdc full");
    let inc = keeper.inc();
    assert_eq!(inc.summary(), "vda inc vdb full vdc full");
    assert!(inc.reason("vdb").ends_with("did not track it"), "{}", inc.reason("vdb"));
    let mut request = keeper.request(false);
    request.include = vec!["vdz".into()];
    assert_eq!(keeper.refused(&request).class(), ErrorClass::Usage);
}

#[test]
fn two_repositories_keep_one_domain() {
    let mut one = Keeper::of("shared", &["vda:qcow2:8M"]);
    let mut two = Keeper::another(one.lab.clone(), "shared", "vmkeep-0000000b-");
    one.full();
    one.write("vda", "1M", "64k", "0x11");
    two.full();
    one.write("vda", "2M", "64k", "0x12");
    assert_eq!(one.inc().dirty_kib("vda"), "1024+64 2048+64");
    assert_eq!(two.inc().dirty_kib("vda"), "2048+64");
    one.virsh("checkpoint-create-as", &["foreign", "--diskspec", "vda,checkpoint=bitmap"]);
    one.full();
    let mut expected = [one.keep(), two.keep(), vec!["foreign".into()]].concat();
    expected.sort();
    expected.dedup();
    assert_eq!(one.checkpoints(), expected);
}

#[test]
fn what_a_killed_run_left_is_removed() {
    let mut keeper = Keeper::of("killed", &["vda:qcow2:8M"]);
    keeper.full();
    keeper.write("vda", "1M", "64k", "0x11");
    let request = keeper.request(false);
    let dead = request.new_checkpoint.clone().unwrap();
    let backup = keeper.begin(&request).unwrap();

    // somebody else's run is not a leftover while it lives, and nobody waits for it
    let started = Instant::now();
    let next = keeper.request(false);
    let error = keeper.refused(&next);
    assert!(matches!(&error, Error::Busy { why, .. } if why.contains("another vmkeep")), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert!(keeper.checkpoints().contains(&dead));

    kill(backup);
    let inc = keeper.inc();
    assert_eq!(inc.dirty_kib("vda"), "1024+64");
    assert!(!keeper.checkpoints().contains(&dead));
}

#[test]
fn the_job_of_another_program_is_named() {
    let mut keeper = Keeper::of("foreign", &["vda:qcow2:8M"]);
    keeper.lab("begin", &[]);
    let started = Instant::now();
    let request = keeper.request(true);
    let error = keeper.refused(&request);
    assert_eq!(error.class(), ErrorClass::FencedOrBusy);
    assert!(error.to_string().contains("foreign.sock"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert_eq!(keeper.checkpoints(), [""; 0]);
    keeper.lab("end", &[]);
    keeper.full();
}

#[test]
fn bitmaps_that_are_broken_or_gone() {
    let mut keeper = Keeper::of("broken", &["vda:qcow2:8M", "vdb:qcow2:8M"]);
    keeper.full();
    keeper.lab("crash", &[]);
    keeper.lab("on", &[]);
    let plan = {
        let request = keeper.request(false);
        keeper.hypervisor.plan(&request, &Recorder::new()).unwrap()
    };
    assert!(plan.disks.iter().all(|disk| matches!(disk.mode, DiskMode::Full { reason: Some(_) })));
    let after = keeper.inc();
    assert_eq!(after.summary(), "vda full vdb full");
    assert!(after.reason("vda").contains("missing or broken"), "{}", after.reason("vda"));
    keeper.write("vda", "1M", "64k", "0x11");
    assert_eq!(keeper.inc().dirty_kib("vda"), "1024+64");

    // one bitmap is gone: the other disk need not suffer
    let old = keeper.last_checkpoint();
    keeper.lab("off", &[]);
    run("qemu-img", &["bitmap", "--remove", &keeper.image("vdb"), &old]);
    keeper.lab("on", &[]);
    let inc = keeper.inc();
    assert_eq!(inc.summary(), "vda inc vdb full");
    assert!(inc.reason("vdb").contains("missing or broken"), "{}", inc.reason("vdb"));
    keeper.full();
    assert_eq!(keeper.checkpoints(), [keeper.last_checkpoint()]);
    let bitmaps = keeper.lab("bitmaps", &[]);
    assert!(!bitmaps.contains(&old), "the other disk's bitmap of it stays: {bitmaps}");

    // libvirt forgot: the bitmap still knows
    keeper.write("vda", "2M", "64k", "0x12");
    let old = keeper.last_checkpoint();
    keeper.virsh("checkpoint-delete", &[&old, "--metadata"]);
    let inc = keeper.inc();
    assert_eq!((inc.summary().as_str(), inc.dirty_kib("vda").as_str()), ("vda inc vdb inc", "2048+64"));
    keeper.virsh("checkpoint-delete", &[&keeper.last_checkpoint()]);
    let inc = keeper.inc();
    assert_eq!(inc.summary(), "vda full vdb full");
    assert!(inc.reason("vda").ends_with("is gone"), "{}", inc.reason("vda"));
}

#[test]
fn disks_are_added_and_grow() {
    let mut keeper = Keeper::of("grown", &["vda:qcow2:8M"]);
    keeper.full();
    let image = format!("{}.more", keeper.image("vda"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", &image, "4M"]);
    let attach = [
        "vdb",
        "--driver",
        "qemu",
        "--subdriver",
        "qcow2",
        "--targetbus",
        "virtio",
        "--persistent",
        "--alias",
        "ua-vdb",
    ];
    keeper.virsh("attach-disk", &[&[image.as_str()], &attach[..]].concat());
    keeper.write("vda", "1M", "64k", "0x11");
    let inc = keeper.inc();
    assert_eq!(inc.summary(), "vda inc vdb full");
    assert!(inc.reason("vdb").ends_with("did not track it"), "{}", inc.reason("vdb"));
    keeper.virsh("blockresize", &["vda", "12M"]);
    keeper.write("vda", "2M", "64k", "0x12");
    let inc = keeper.inc();
    assert_eq!((inc.summary().as_str(), inc.sizes["vda"]), ("vda inc vdb inc", 12 * MIB));
    assert_eq!(inc.dirty_kib("vda"), "2048+64 8192+4096");
    assert_eq!(keeper.inc().dirty_kib("vda"), "");
    keeper.virsh("detach-disk", &["vdb", "--config"]);
    keeper.lab("off", &[]);
    keeper.lab("on", &[]);
    assert_eq!(keeper.inc().summary(), "vda inc");
}

#[test]
fn the_domain_stops_during_the_backup() {
    let mut keeper = Keeper::of("stopped", &["vda:qcow2:8M"]);
    keeper.write("vda", "1M", "64k", "0x11");
    keeper.full();
    keeper.write("vda", "2M", "64k", "0x12");
    let monitor = Recorder::new();
    let request = keeper.request(false);
    let mut backup = keeper.begin(&request).unwrap();
    keeper.lab("off", &[]);
    let mut disks = backup.take_disks();
    let error = disks[0].source.dirty(&monitor).unwrap_err();
    assert!(error.to_string().starts_with("domain stopped cannot be reached: it stopped while"), "{error}");
    drop(disks);
    backup.abandon(&monitor);
    assert_eq!(monitor.warnings(), [""; 0]);
    keeper.nothing_left();
    assert_eq!(keeper.checkpoints(), keeper.keep(), "its own is gone, the base stays");
    keeper.lab("on", &[]);
    assert_eq!(keeper.inc().dirty_kib("vda"), "2048+64");

    // everything had been read: nothing is lost
    let request = keeper.request(false);
    let mut backup = keeper.begin(&request).unwrap();
    keeper.lab("off", &[]);
    backup.end_job(&monitor).unwrap();
    assert!(backup.warnings()[0].starts_with("the domain stopped after"), "{:?}", backup.warnings());
    drop(backup);
    keeper.nothing_left();
    keeper.lab("on", &[]);

    let request = keeper.request(false);
    let mut backup = keeper.begin(&request).unwrap();
    keeper.virsh("domjobabort", &[]);
    let mut disks = backup.take_disks();
    // the server goes a moment after the answer
    let deadline = Instant::now() + Duration::from_secs(20);
    let error = loop {
        assert!(Instant::now() < deadline, "the disk can still be read");
        if let Err(error) = disks[0].source.read(&RangeSet::whole(8 * MIB), &monitor, &mut |_, _| Ok(())) {
            break error;
        }
    };
    assert!(error.to_string().contains("ended by somebody else"), "{error}");
    drop(backup);
    assert_eq!(keeper.inc().summary(), "vda inc");
}

#[test]
fn the_domain_is_left_as_it_was() {
    let mut keeper = Keeper::of("still", &["--agent", "vda:qcow2:8M"]);
    let mut request = keeper.request(true);
    request.freeze = Freeze::Require;
    let error = keeper.refused(&request);
    assert_eq!(error.class(), ErrorClass::DomainUnreachable, "{error}");
    keeper.nothing_left();
    assert_eq!(keeper.checkpoints(), [""; 0]);

    request.freeze = Freeze::Auto;
    request.pause = true;
    let backup = keeper.begin(&request).unwrap();
    assert!(backup.info().paused && !backup.info().frozen && backup.info().running);
    assert!(backup.warnings()[0].starts_with("not frozen"), "{:?}", backup.warnings());
    assert!(backup.info().xml_live.is_some());
    assert_eq!(keeper.virsh("domstate", &[]).trim(), "running");
    drop(backup);
    keeper.nothing_left();
    assert_eq!(keeper.checkpoints(), [""; 0], "a failed backup leaves no checkpoint");

    keeper.virsh("suspend", &[]);
    let backup = keeper.begin(&request).unwrap();
    assert!(backup.info().paused);
    drop(backup);
    assert_eq!(keeper.virsh("domstate", &[]).trim(), "paused");
    keeper.virsh("resume", &[]);

    let cancelled = Recorder::new();
    cancelled.cancel();
    assert!(matches!(keeper.hypervisor.begin(&request, &cancelled), Err(Error::Cancelled)));
    request.scratch_dir = Some("/var/tmp/no such directory".into());
    assert!(matches!(keeper.refused(&request), Error::Io { .. }));
    keeper.nothing_left();
    assert_eq!(keeper.checkpoints(), [""; 0]);
}

#[test]
fn an_image_without_room_for_bitmaps_is_read_in_full() {
    let mut keeper = Keeper::of("oldformat", &["vda:qcow2:8M:compat=0.10", "vdb:qcow2:8M"]);
    let full = keeper.full();
    assert!(full.warnings[0].contains("qcow2 version 2"), "{:?}", full.warnings);
    let inc = keeper.inc();
    assert_eq!(inc.summary(), "vda full vdb inc");
    let mut request = keeper.request(true);
    request.include = vec!["vda".into()];
    let full = keeper.back_up(&request);
    assert_eq!(full.checkpoint, None);
    assert!(full.warnings.iter().any(|warning| warning.starts_with("no checkpoint is made")));
}

#[test]
fn who_is_not_there_is_named() {
    let lab = Lab::shared();
    let hypervisor = lab.hypervisor();
    let mut keeper = Keeper::another(lab, "nobody", "vmkeep-0000000a-");
    let request = keeper.request(true);
    let error = hypervisor.begin(&request, &Recorder::new()).err().unwrap();
    assert_eq!(error.to_string(), "domain nobody does not exist");
    let error = Hypervisor::connect(Some("qemu+unix:///session?socket=/nowhere")).err().unwrap();
    assert_eq!(error.class(), ErrorClass::DomainUnreachable);
    assert!(!hypervisor.domains().unwrap().contains(&"nobody".to_owned()));
}

#[test]
fn the_daemon_restarts_during_the_backup() {
    let mut keeper = Keeper::alone("restarted", &["vda:qcow2:8M"]);
    keeper.full();
    keeper.write("vda", "1M", "64k", "0x11");
    let monitor = Recorder::new();
    let request = keeper.request(false);
    let mut backup = keeper.begin(&request).unwrap();
    keeper.lab.restart();
    let mut disks = backup.take_disks();
    assert_eq!(disks[0].source.dirty(&monitor).unwrap().unwrap().total_bytes(), 65_536);
    drop(disks);
    backup.end_job(&monitor).unwrap();
    assert_eq!(backup.warnings(), [""; 0]);
    assert_eq!(backup.finish(&[], &monitor).unwrap(), [""; 0]);
    keeper.nothing_left();
    assert_eq!(keeper.checkpoints(), [request.new_checkpoint.unwrap()]);
}

#[test]
fn snapshots_do_not_lose_what_was_written() {
    let mut keeper = Keeper::of("overlay", &["vda:qcow2:8M"]);
    keeper.full();
    keeper.write("vda", "1M", "64k", "0x11");
    keeper.virsh("snapshot-create-as", &["s1", "--disk-only", "--no-metadata"]);
    keeper.write("vda", "2M", "64k", "0x12");
    let mut request = keeper.request(false);
    // compared below with the full's content, which needs no new checkpoint
    request.new_checkpoint = None;
    let inc = keeper.back_up(&request);
    assert_eq!(inc.dirty_kib("vda"), "1024+64 2048+64");
    assert_eq!(inc.checkpoint, None);
    keeper.lab("off", &[]);
    let off = keeper.inc();
    assert!(off.reason("vda").ends_with("spread over a chain of images"), "{}", off.reason("vda"));
    keeper.lab("on", &[]);
    keeper.write("vda", "3M", "64k", "0x13");
    assert_eq!(keeper.inc().dirty_kib("vda"), "3072+64");
}

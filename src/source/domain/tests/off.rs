use super::keeper::{Keeper, bitmaps, kill, run};
use crate::error::ErrorClass;
use crate::monitor::Recorder;

#[test]
fn the_same_levels_whether_it_runs_or_not() {
    let mut keeper = Keeper::of("off", &["--off", "vda:qcow2:8M", "vdb:raw:4M", "vdc:qcow2:4M"]);
    let full = keeper.full();
    assert_eq!(full.summary(), "vda full vdb full vdc full");
    keeper.lab("on", &[]);
    keeper.write("vda", "1M", "64k", "0x11");
    keeper.write("vdb", "1M", "64k", "0x12");
    let inc = keeper.inc();
    assert_eq!(inc.summary(), "vda inc vdb full vdc inc");
    assert_eq!((inc.dirty_kib("vda"), inc.dirty_kib("vdc")), ("1024+64".into(), String::new()));
    keeper.write("vda", "2M", "64k", "0x13");
    keeper.write("vdc", "1M", "64k", "0x14");
    keeper.lab("off", &[]);
    let inc = keeper.inc();
    assert_eq!(inc.summary(), "vda inc vdb full vdc inc");
    assert_eq!((inc.dirty_kib("vda"), inc.dirty_kib("vdc")), ("2048+64".into(), "1024+64".into()));
    assert_eq!(keeper.checkpoints(), keeper.keep());
    assert_eq!(bitmaps(&keeper.image("vda")), keeper.keep());
    run("qemu-img", &["resize", "-q", &keeper.image("vdc"), "6M"]);
    let inc = keeper.inc();
    assert_eq!((inc.dirty_kib("vda"), inc.dirty_kib("vdc")), (String::new(), "4096+2048".into()));
    keeper.lab("on", &[]);
    keeper.write("vda", "3M", "64k", "0x15");
    assert_eq!(keeper.inc().dirty_kib("vda"), "3072+64");
}

#[test]
fn it_cannot_start_during_the_backup_and_is_left_as_it_was() {
    let mut keeper = Keeper::of("asleep", &["--off", "vda:qcow2:8M", "vdb:qcow2:4M"]);
    keeper.full();
    let request = keeper.request(false);
    let mut backup = keeper.begin(&request).unwrap();
    assert!(!backup.info().running && backup.info().xml_live.is_none());
    assert!(keeper.lab.fails(&["on", "asleep"]), "its images are locked");
    backup.end_job(&Recorder::new()).unwrap();
    keeper.lab("on", &[]);
    // it runs now: the checkpoint has to go another way
    drop(backup);
    keeper.nothing_left();
    assert_eq!(keeper.checkpoints(), keeper.keep());
    keeper.lab("off", &[]);
    assert_eq!(bitmaps(&keeper.image("vda")), keeper.keep());

    let request = keeper.request(false);
    drop(keeper.begin(&request).unwrap());
    keeper.nothing_left();
    assert_eq!((keeper.checkpoints(), bitmaps(&keeper.image("vda"))), (keeper.keep(), keeper.keep()));
}

#[test]
fn leftovers_of_killed_runs_and_broken_bitmaps() {
    let mut keeper = Keeper::of("leftover", &["--off", "vda:qcow2:8M", "vdb:qcow2:4M"]);
    keeper.full();
    let request = keeper.request(false);
    kill(keeper.begin(&request).unwrap());
    assert_eq!(bitmaps(&keeper.image("vda")).len(), 2);
    // a run killed in the middle of it all: libvirt knows nothing of this one
    run("qemu-img", &["bitmap", "--add", &keeper.image("vdb"), "vmkeep-0000000a-orphan"]);
    run("qemu-img", &["bitmap", "--add", &keeper.image("vdb"), "vmkeep-0000000b-foreign"]);
    let inc = keeper.inc();
    assert_eq!((inc.summary().as_str(), keeper.checkpoints()), ("vda inc vdb inc", keeper.keep()));
    assert_eq!(bitmaps(&keeper.image("vda")), keeper.keep());
    let foreign = bitmaps(&keeper.image("vdb")).pop().unwrap();
    assert_eq!(foreign, "vmkeep-0000000b-foreign");

    // killed between telling libvirt and adding the bitmaps, then started
    let request = keeper.request(false);
    let dead = request.new_checkpoint.clone().unwrap();
    kill(keeper.begin(&request).unwrap());
    run("qemu-img", &["bitmap", "--remove", &keeper.image("vdb"), &dead]);
    keeper.lab("on", &[]);
    assert_eq!(keeper.inc().summary(), "vda inc vdb inc");
    assert_eq!(keeper.checkpoints(), keeper.keep());
    assert!(!keeper.lab("bitmaps", &[]).contains(&dead));

    // the bitmaps of this checkpoint never reached the images
    keeper.lab("crash", &[]);
    let inc = keeper.inc();
    assert_eq!(inc.summary(), "vda full vdb full");
    assert!(inc.reason("vda").ends_with("is missing"), "{}", inc.reason("vda"));
    // these were there when the domain started
    keeper.lab("on", &[]);
    keeper.lab("crash", &[]);
    let inc = keeper.inc();
    assert_eq!(inc.summary(), "vda full vdb full");
    assert!(inc.reason("vda").ends_with("is broken"), "{}", inc.reason("vda"));
    keeper.full();
    assert_eq!(bitmaps(&keeper.image("vda")), keeper.keep(), "broken ones are removed");
    run("qemu-img", &["bitmap", "--remove", &keeper.image("vdb"), &keeper.last_checkpoint()]);
    let inc = keeper.inc();
    assert_eq!(inc.summary(), "vda inc vdb full");
    assert!(inc.reason("vdb").ends_with("is missing"), "{}", inc.reason("vdb"));
}

#[test]
fn what_cannot_be_read_while_off_is_an_error() {
    let mut keeper = Keeper::of("gone", &["--off", "vda:qcow2:8M", "vdb:qcow2:4M"]);
    let image = keeper.image("vdb");
    std::fs::rename(&image, format!("{image}.away")).unwrap();
    let request = keeper.request(true);
    let error = keeper.refused(&request);
    assert!(error.class() != ErrorClass::Damage && error.to_string().contains("vdb"), "{error}");
    keeper.nothing_left();
    assert_eq!((keeper.checkpoints(), bitmaps(&keeper.image("vda"))), (vec![], vec![]));
    std::fs::rename(format!("{image}.away"), image).unwrap();
    keeper.full();
}

//! Sessions of one process at the same time: they share the repository, the local index on disk and the memory of their
//! pipelines, and each makes its point as if it were alone.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use super::*;
use crate::ops::backup::{ImageBackupOptions, ImageInput, backup_source};
use crate::ops::prune::{PruneOptions, prune};

const MACHINES: u64 = 4;
const DISK_LEN: usize = 3 << 20;
/// What a machine writes in a round, and what all of them write.
const OWN_LEN: usize = 40 << 10;
const COMMON_LEN: usize = 64 << 10;

/// Backs one machine up `rounds` times; returns its points.
fn live(
    repository: &Repository,
    machine: u64,
    rounds: std::ops::Range<u64>,
    disk: &mut [u8],
) -> Vec<(Kept, u64)> {
    let mut kept = Vec::new();
    for round in rounds {
        let own = round as usize * OWN_LEN;
        noise(1000 * machine + round, &mut disk[own..own + OWN_LEN]);
        let common = (1 << 20) + round as usize * COMMON_LEN;
        noise(round, &mut disk[common..common + COMMON_LEN]);
        let options = ImageBackupOptions {
            domain: format!("m{machine}"),
            disk: "vda".into(),
            input: ImageInput::File { path: PathBuf::new(), format: None },
            level: RequestedLevel::Auto,
            tags: Vec::new(),
            read_limit: None,
            dry_run: false,
        };
        let mut source = Frozen { content: disk.to_vec(), dirty: None, read_bytes: 0 };
        let report = backup_source(repository, &options, &mut source, &Recorder::new()).unwrap();
        let contents = BTreeMap::from([("vda".to_owned(), disk.to_vec())]);
        let point = Kept { id: report.record.id, number: round as u32, level: Level::Full, contents };
        kept.push((point, report.stats.changed_bytes));
    }
    kept
}

/// Has all machines live at the same time.
fn live_together(world: &mut World, disks: &mut [Vec<u8>], rounds: std::ops::Range<u64>) -> Vec<u64> {
    let repository = &world.repository;
    let made: Vec<Vec<(Kept, u64)>> = std::thread::scope(|scope| {
        let machines: Vec<_> = (1..)
            .zip(disks)
            .map(|(machine, disk)| {
                let rounds = rounds.clone();
                scope.spawn(move || live(repository, machine, rounds, disk))
            })
            .collect();
        machines.into_iter().map(|machine| machine.join().unwrap()).collect()
    });
    let (kept, changed): (Vec<Kept>, Vec<u64>) = made.into_iter().flatten().unzip();
    world.kept.extend(kept);
    changed
}

#[test]
fn each_makes_its_points_as_if_it_were_alone() {
    let cache = tempfile::tempdir().unwrap();
    let mut world = World::new(&[]);
    world.cache = Some(cache.path().to_owned());
    world.reopen();
    let mut disks = vec![vec![0; DISK_LEN]; MACHINES as usize];
    let changed = live_together(&mut world, &mut disks, 0..6);
    // no predecessor ever seemed to be lost
    assert!(changed.iter().all(|bytes| *bytes == (OWN_LEN + COMMON_LEN) as u64), "{changed:?}");
    world.check_reads();

    // somebody else prunes meanwhile: segments go, and the index is filled anew under running sessions
    let environment = Environment {
        timing: Timing { poll: std::time::Duration::from_millis(1), ..Timing::default() },
        ..environment()
    };
    let storage = Box::new(world.storage.clone());
    let other = Repository::open(storage, None, &environment, &Recorder::new()).unwrap();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let options = PruneOptions { max_unused_permille: 0, ..PruneOptions::default() };
            while !is_over.load(Ordering::SeqCst) {
                prune(&other, &options, &Recorder::new()).unwrap();
            }
        });
        live_together(&mut world, &mut disks, 6..12);
        is_over.store(true, Ordering::SeqCst);
    });
    world.check_reads();
    let options = VerifyOptions { level: VerifyLevel::Data, ..VerifyOptions::default() };
    assert_eq!(verify(&world.repository, &options, &Recorder::new()).unwrap().findings, []);
}

//! The order of writes of `repo-format.md`, section 18, as the library does it, operation by operation.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::{Arc, Mutex};

use vmkeep::error::Result;
use vmkeep::format::name::{Folder, ObjectName};
use vmkeep::id::PointId;
use vmkeep::monitor::Recorder;
use vmkeep::ops::RequestedLevel;
use vmkeep::ops::backup::{ImageBackupOptions, ImageInput, backup_image};
use vmkeep::ops::forget::forget;
use vmkeep::ops::prune::{PruneOptions, prune};
use vmkeep::repo::{CreateOptions, Repository};
use vmkeep::storage::memory::MemoryStorage;
use vmkeep::storage::{Listed, Storage};

use crate::fixtures;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Put(ObjectName),
    Replace(ObjectName),
    List(Folder),
    Delete(ObjectName),
    Sync(Folder),
}

/// Writes down what succeeded.
#[derive(Debug, Clone, Default)]
struct Recording {
    storage: MemoryStorage,
    steps: Arc<Mutex<Vec<Step>>>,
}

impl Recording {
    fn note<T>(&self, step: Step, result: Result<T>) -> Result<T> {
        if result.is_ok() {
            self.steps.lock().unwrap().push(step);
        }
        result
    }

    fn take(&self) -> Vec<Step> {
        std::mem::take(&mut self.steps.lock().unwrap())
    }
}

impl Storage for Recording {
    fn url(&self) -> String {
        self.storage.url()
    }

    fn put_new(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        self.note(Step::Put(name), self.storage.put_new(name, bytes))
    }

    fn replace(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        self.note(Step::Replace(name), self.storage.replace(name, bytes))
    }

    fn get(&self, name: ObjectName, max_len: u64) -> Result<Vec<u8>> {
        self.storage.get(name, max_len)
    }

    fn get_range(&self, name: ObjectName, offset: u64, len: u64) -> Result<Vec<u8>> {
        self.storage.get_range(name, offset, len)
    }

    fn len(&self, name: ObjectName) -> Result<u64> {
        self.storage.len(name)
    }

    fn list(&self, folder: Folder) -> Result<Vec<Listed>> {
        self.note(Step::List(folder), self.storage.list(folder))
    }

    fn delete(&self, name: ObjectName) -> Result<()> {
        self.note(Step::Delete(name), self.storage.delete(name))
    }

    fn sync_deletes(&self, folder: Folder) -> Result<()> {
        self.note(Step::Sync(folder), self.storage.sync_deletes(folder))
    }
}

/// Position of the first step that fits, of which there has to be one.
fn first(steps: &[Step], fits: impl Fn(&Step) -> bool) -> usize {
    steps.iter().position(fits).unwrap_or_else(|| panic!("it is missing in {steps:#?}"))
}

/// Position of the last step that fits.
fn last(steps: &[Step], fits: impl Fn(&Step) -> bool) -> usize {
    steps.iter().rposition(fits).unwrap_or_else(|| panic!("it is missing in {steps:#?}"))
}

fn puts_session(step: &Step) -> bool {
    matches!(step, Step::Put(ObjectName::Session(_)))
}

fn puts_outcome(step: &Step) -> bool {
    matches!(step, Step::Put(ObjectName::Outcome(_)))
}

fn puts_pack(step: &Step) -> bool {
    matches!(step, Step::Put(ObjectName::Pack(_)))
}

fn puts_segment(step: &Step) -> bool {
    matches!(step, Step::Put(ObjectName::Segment(_)))
}

fn ascending(positions: &[usize]) {
    assert!(positions.is_sorted(), "{positions:?}");
}

struct World {
    recording: Recording,
    repository: Repository,
    directory: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let recording = Recording::default();
        let storage = Box::new(recording.clone());
        let repository =
            Repository::create(storage, &CreateOptions::default(), &fixtures::environment()).unwrap();
        Self { recording, repository, directory: tempfile::tempdir().unwrap() }
    }

    fn image(&self) -> std::path::PathBuf {
        self.directory.path().join("disk.raw")
    }

    fn backup(&self, seed: u8) -> (PointId, Vec<Step>) {
        write_image(&self.image(), seed);
        let options = ImageBackupOptions {
            domain: "web".into(),
            disk: "vda".into(),
            input: ImageInput::File { path: self.image(), format: None },
            level: RequestedLevel::Auto,
            tags: vec![],
            read_limit: None,
            dry_run: false,
        };
        let report = backup_image(&self.repository, &options, &Recorder::new()).unwrap();
        (report.record.id, self.recording.take())
    }

    fn prune(&self) -> Vec<Step> {
        let options = PruneOptions { max_unused_permille: 0, ..PruneOptions::default() };
        prune(&self.repository, &options, &Recorder::new()).unwrap();
        self.recording.take()
    }

    fn forget(&self, points: &[PointId]) -> Vec<Step> {
        forget(&self.repository, points, "", false, &Recorder::new()).unwrap();
        self.recording.take()
    }
}

/// 3 MiB that stay and 200 KiB that are another day's.
fn write_image(path: &Path, seed: u8) {
    let mut bytes = vec![0; 3 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes[1 << 20..][..200 << 10]);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn making_a_repository() {
    let steps = World::new().recording.take();
    let reserve = first(&steps, |step| *step == Step::Put(ObjectName::Reserve));
    let config = first(&steps, |step| *step == Step::Put(ObjectName::Config));
    let probe = first(&steps, |step| matches!(step, Step::Delete(ObjectName::Heartbeat(_))));
    let copy = first(&steps, |step| *step == Step::Put(ObjectName::ConfigCopy));
    ascending(&[probe, reserve, config, copy]);
    assert_eq!((config + 1, copy + 1), (copy, steps.len()), "nothing but its copy comes behind config");
}

#[test]
fn a_backup() {
    let world = World::new();
    world.recording.take();
    for seed in [1, 2] {
        let (_, steps) = world.backup(seed);
        let listed = |folder| first(&steps, |step| *step == Step::List(folder));
        // B1, and B2 in its order
        let begin = [
            first(&steps, puts_session),
            listed(Folder::Marks),
            listed(Folder::Outcomes),
            listed(Folder::Segments),
        ];
        ascending(&begin);
        ascending(&[listed(Folder::Segments), listed(Folder::Packs), first(&steps, puts_pack)]);
        ascending(&[listed(Folder::Segments), listed(Folder::Damage), first(&steps, puts_pack)]);
        // B3 to B7
        ascending(&[
            last(&steps, puts_pack),
            last(&steps, puts_segment),
            last(&steps, |step| *step == Step::List(Folder::Marks)),
            first(&steps, puts_outcome),
            first(&steps, |step| matches!(step, Step::Delete(ObjectName::Heartbeat(_)))),
            first(&steps, |step| matches!(step, Step::Delete(ObjectName::Session(_)))),
        ]);
    }
}

#[test]
fn forgetting() {
    let world = World::new();
    let (point, _) = world.backup(1);
    let steps = world.forget(&[point]);
    ascending(&[
        first(&steps, puts_session),
        first(&steps, |step| matches!(step, Step::Put(ObjectName::Tombstone(_)))),
        first(&steps, puts_outcome),
        first(&steps, |step| matches!(step, Step::Delete(ObjectName::Session(_)))),
    ]);
}

#[test]
fn a_prune() {
    let world = World::new();
    let (old, _) = world.backup(1);
    world.backup(2);
    world.forget(&[old]);
    let steps = world.prune();
    let mark = first(&steps, |step| matches!(step, Step::Put(ObjectName::Mark(_))));
    let behind = |fits: &dyn Fn(&Step) -> bool| mark + first(&steps[mark..], fits);
    // P1 to P5: sessions are listed after the mark, outcomes after that
    let sessions = behind(&|step| *step == Step::List(Folder::Sessions));
    let outcomes = sessions + first(&steps[sessions..], |step| *step == Step::List(Folder::Outcomes));
    ascending(&[first(&steps, puts_session), mark, sessions, outcomes, first(&steps, puts_pack)]);
    // P6 to P11
    let deletes =
        |fits: fn(&ObjectName) -> bool| move |step: &Step| matches!(step, Step::Delete(name) if fits(name));
    let segments = deletes(|name| matches!(name, ObjectName::Segment(_)));
    let packs = deletes(|name| matches!(name, ObjectName::Pack(_)));
    let points = deletes(|name| matches!(name, ObjectName::Outcome(_)));
    let marks = deletes(|name| matches!(name, ObjectName::Mark(_)));
    let synced = |folder| move |step: &Step| *step == Step::Sync(folder);
    ascending(&[
        last(&steps, puts_pack),
        last(&steps, puts_segment),
        first(&steps, puts_outcome),
        first(&steps, segments),
        last(&steps, segments),
        first(&steps, synced(Folder::Segments)),
        first(&steps, packs),
        last(&steps, packs),
        first(&steps, synced(Folder::Packs)),
        first(&steps, points),
        first(&steps, synced(Folder::Outcomes)),
        first(&steps, marks),
        first(&steps, synced(Folder::Marks)),
    ]);
}

/// I2, over a life of backups, forgetting and pruning. The name of an outcome is free again once its point was swept,
/// but no session will ever have that id.
#[test]
fn objects_are_created_once_and_names_are_not_used_again() {
    let world = World::new();
    let mut steps = world.recording.take();
    let mut points = Vec::new();
    for seed in [1, 2, 1, 3, 2] {
        let (point, more) = world.backup(seed);
        steps.extend(more);
        points.push(point);
        if points.len() >= 3 {
            steps.extend(world.forget(&[points.remove(0)]));
            steps.extend(world.prune());
        }
    }
    let mut put: HashMap<ObjectName, usize> = HashMap::new();
    for step in &steps {
        match step {
            Step::Put(name) => *put.entry(*name).or_default() += 1,
            Step::Replace(name) => assert!(matches!(name, ObjectName::Heartbeat(_)), "{name} was replaced"),
            _ => {}
        }
    }
    put.iter().for_each(|(name, times)| assert_eq!(*times, 1, "{name}"));
    // the content of the first day came again on the third, after its packs had been deleted or not
    let deleted: HashSet<ObjectName> = steps
        .iter()
        .filter_map(|step| if let Step::Delete(name) = step { Some(*name) } else { None })
        .collect();
    let packs = put.keys().filter(|name| matches!(name, ObjectName::Pack(_)));
    assert!(packs.filter(|name| deleted.contains(name)).count() >= 2, "no pack was ever deleted");
}

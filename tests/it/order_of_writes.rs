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
use vmkeep::ops::forget::{forget, hold, undelete, unhold};
use vmkeep::ops::prune::{PruneOptions, prune};
use vmkeep::ops::repair::packs::PacksOptions;
use vmkeep::ops::repair::{repair_index, repair_packs, repair_points};
use vmkeep::ops::verify::{VerifyLevel, VerifyOptions, verify};
use vmkeep::repo::{CreateOptions, Repository};
use vmkeep::storage::memory::MemoryStorage;
use vmkeep::storage::{Listed, Storage};

use crate::fixtures;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Put(ObjectName),
    Replace(ObjectName),
    List(Folder),
    /// At a pack.
    Look,
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
        let len = self.storage.len(name);
        if let ObjectName::Pack(_) = name { self.note(Step::Look, len) } else { len }
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
        self.steps_of(|repository| forget(repository, points, "", false, &Recorder::new()).map(drop))
    }

    fn verify(&self) -> Vec<Step> {
        let options = VerifyOptions { level: VerifyLevel::Data, record: true, ..VerifyOptions::default() };
        self.steps_of(|repository| verify(repository, &options, &Recorder::new()).map(drop))
    }

    fn steps_of(&self, run: impl FnOnce(&Repository) -> Result<()>) -> Vec<Step> {
        run(&self.repository).unwrap();
        self.recording.take()
    }

    /// Changes a byte in the middle of the longest pack.
    fn spoil_content(&self) {
        let packs = self.recording.storage.list(Folder::Packs).unwrap();
        let longest = packs.into_iter().max_by_key(|listed| listed.len).unwrap();
        self.recording.storage.tamper(longest.name, |mut bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            Some(bytes)
        });
    }
}

/// Positions of a session's registration and outcome. What it puts, it puts in between; then it is taken off the list.
fn session_around(steps: &[Step]) -> (usize, usize) {
    let [registered, outcome] = [first(steps, puts_session), last(steps, puts_outcome)];
    let gone = last(steps, |step| matches!(step, Step::Delete(ObjectName::Session(_))));
    ascending(&[registered, outcome, gone]);
    let puts = |step: &Step| matches!(step, Step::Put(_) | Step::Replace(_));
    assert_eq!((first(steps, puts), last(steps, puts)), (registered, outcome), "{steps:#?}");
    (registered, outcome)
}

/// 3 MiB that stay and 200 KiB that are another day's.
fn write_image(path: &Path, seed: u8) {
    let mut bytes = vec![0; 3 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes[1 << 20..][..200 << 10]);
    std::fs::write(path, bytes).unwrap();
}

/// R1: what it relies on is read by a registered session, and what it stored is listed before its outcome.
fn registered_first(steps: &[Step]) {
    let (registered, outcome) = session_around(steps);
    let listed = |folder| registered + first(&steps[registered..], |step| *step == Step::List(folder));
    ascending(&[registered, listed(Folder::Marks), listed(Folder::Outcomes), listed(Folder::Segments)]);
    ascending(&[
        listed(Folder::Segments),
        first(steps, puts_pack),
        last(steps, puts_pack),
        last(steps, puts_segment),
        outcome,
    ]);
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
        ascending(&[listed(Folder::Segments), listed(Folder::Damage), first(&steps, puts_pack)]);
        // of the first one's packs the second looks at those that it meets; there may be many others
        assert!(!steps.contains(&Step::List(Folder::Packs)), "{steps:#?}");
        if seed == 2 {
            ascending(&[listed(Folder::Segments), first(&steps, |step| *step == Step::Look)]);
        }
        // B3 to B8
        let outcome = first(&steps, puts_outcome);
        let lists_marks = |step: &Step| *step == Step::List(Folder::Marks);
        ascending(&[
            last(&steps, puts_pack),
            last(&steps, puts_segment),
            last(&steps[..outcome], lists_marks),
            outcome,
            first(&steps, |step| matches!(step, Step::Delete(ObjectName::Heartbeat(_)))),
            first(&steps, |step| matches!(step, Step::Delete(ObjectName::Session(_)))),
            last(&steps, lists_marks),
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
fn a_hold_and_its_release() {
    let world = World::new();
    let (point, _) = world.backup(1);
    let steps = world.steps_of(|repository| hold(repository, point, None, "", &Recorder::new()));
    let (registered, outcome) = session_around(&steps);
    // H1: the marks are looked at by a session that a later prune waits for
    let marks = first(&steps, |step| *step == Step::List(Folder::Marks));
    ascending(&[registered, marks, outcome]);
    // H3: no session, one deletion
    let steps = world.steps_of(|repository| unhold(repository, point, &Recorder::new()).map(drop));
    ascending(&[
        first(&steps, |step| matches!(step, Step::Delete(ObjectName::Outcome(_)))),
        first(&steps, |step| *step == Step::Sync(Folder::Outcomes)),
    ]);
    assert!(!steps.iter().any(|step| matches!(step, Step::Put(_) | Step::Replace(_))), "{steps:#?}");
}

#[test]
fn undeleting() {
    let world = World::new();
    let points = [world.backup(1).0, world.backup(2).0];
    // one tombstone that names both: the other point stays forgotten at every instant
    world.forget(&points);
    let run = |repository: &Repository| undelete(repository, points[0], &Recorder::new());
    let steps = world.steps_of(run);
    let (registered, outcome) = session_around(&steps);
    let deletes_tombstone = |step: &Step| matches!(step, Step::Delete(ObjectName::Tombstone(_)));
    let others = first(&steps, |step| matches!(step, Step::Put(ObjectName::Tombstone(_))));
    ascending(&[
        registered,
        first(&steps, |step| *step == Step::List(Folder::Marks)),
        others,
        // that forget's own outcome: its tombstone counts
        others + first(&steps[others..], puts_outcome),
        first(&steps, deletes_tombstone),
        last(&steps, deletes_tombstone),
        first(&steps, |step| *step == Step::Sync(Folder::Tombstones)),
        outcome,
    ]);
}

#[test]
fn a_verify_and_repairs() {
    let world = World::new();
    let (point, _) = world.backup(1);
    session_around(&world.verify());
    world.spoil_content();
    // V1 and V2
    let steps = world.verify();
    let (registered, outcome) = session_around(&steps);
    let records = |step: &Step| matches!(step, Step::Put(ObjectName::Damage(..)));
    ascending(&[registered, first(&steps, records), last(&steps, records), outcome]);
    assert!(!steps.iter().any(puts_pack), "a verify stores nothing: {steps:#?}");

    // R1 and R2: from an image that still has it
    registered_first(&world.steps_of(|repository| {
        let input = ImageInput::File { path: world.image(), format: None };
        let options = PacksOptions { from: None, from_disk: Some(input), dry_run: false };
        let report = repair_packs(repository, &options, &Recorder::new())?;
        assert!(report.from_disk > 0 && report.lost == 0, "{report:?}");
        Ok(())
    }));

    // of packs that no segment lists any more
    let segments = world.recording.storage.list(Folder::Segments).unwrap();
    segments.iter().for_each(|listed| world.recording.storage.tamper(listed.name, |_| None));
    let steps = world.steps_of(|repository| repair_index(repository, false, &Recorder::new()).map(drop));
    let (registered, outcome) = session_around(&steps);
    ascending(&[registered, first(&steps, puts_segment), last(&steps, puts_segment), outcome]);

    // a point of which something is lost for good: its copy is made in a session of its own, inside the repair's
    let packs = world.recording.storage.list(Folder::Packs).unwrap();
    let content = packs.iter().filter(|listed| listed.len > 100 << 10);
    content.for_each(|listed| world.recording.storage.tamper(listed.name, |_| None));
    world.verify();
    let steps = world.steps_of(|repository| {
        let report = repair_points(repository, false, &Recorder::new())?;
        assert_eq!(report.points.iter().map(|made| made.point).collect::<Vec<_>>(), [point]);
        Ok(())
    });
    registered_first(&steps);
    let sessions: Vec<usize> = (0..steps.len()).filter(|at| puts_session(&steps[*at])).collect();
    let outcomes: Vec<usize> = (0..steps.len()).filter(|at| puts_outcome(&steps[*at])).collect();
    assert_eq!((sessions.len(), outcomes.len()), (2, 2), "{steps:#?}");
    // the marks are read by the copy's own session, and again before it is committed
    let marks: Vec<usize> = (0..steps.len()).filter(|at| steps[*at] == Step::List(Folder::Marks)).collect();
    assert!(marks.iter().any(|at| (sessions[1]..first(&steps, puts_pack)).contains(at)), "{steps:#?}");
    assert!(marks.iter().any(|at| (last(&steps, puts_segment)..outcomes[0]).contains(at)), "{steps:#?}");
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

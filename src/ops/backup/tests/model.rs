//! Random lives of a domain and its repository against a model in memory.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::format::name::Folder;
use crate::ops::repair;
use crate::storage::Storage;

#[derive(Debug, Clone)]
enum Step {
    /// Content that only this seed and length have.
    Write {
        disk: usize,
        offset: u64,
        len: u64,
        seed: u64,
    },
    Zero {
        disk: usize,
        offset: u64,
        len: u64,
    },
    /// What stands elsewhere, maybe on another disk, block-aligned.
    Copy {
        from: usize,
        to: usize,
        offset: u64,
        target: u64,
        len: u64,
    },
    Resize {
        disk: usize,
        size: u64,
    },
    Backup(RequestedLevel),
    LoseBitmaps {
        disk: usize,
    },
    Reopen,
    Diff(usize, usize),
    Forget(usize),
    Undelete(usize),
    Hold(usize),
    Unhold(usize),
    /// Changes a bit of a pack, cuts it short or removes it; then everything is verified.
    Damage {
        pack: usize,
        how: Harm,
    },
    RepairIndex,
    RepairPacks,
    Prune,
    /// Something happens to the local index, if it is on disk.
    Index(IndexHarm),
}

#[derive(Debug, Clone)]
enum IndexHarm {
    Remove,
    /// Its files are written over.
    Spoil(u64),
    /// Its files are cut short.
    Cut(u64),
    /// Another program has it open ...
    Lock,
    /// ... and ends.
    Unlock,
}

#[derive(Debug, Clone)]
enum Harm {
    Flip(u64),
    Cut(u64),
    Remove,
}

const SIZE: u64 = 2 << 20;

fn step() -> impl Strategy<Value = Step> {
    let disk = 0..2usize;
    let offset = prop_oneof![2 => 0..SIZE, 1 => (0..SIZE / BLOCK).prop_map(|no| no * BLOCK)];
    let len = prop_oneof![3 => 1..20_000u64, 1 => 1..(1u64 << 20)];
    let level = prop_oneof![
        Just(RequestedLevel::Auto),
        Just(RequestedLevel::Is(Level::Full)),
        Just(RequestedLevel::Is(Level::Incremental)),
        Just(RequestedLevel::Is(Level::Differential)),
        Just(RequestedLevel::Is(Level::Latest)),
        Just(RequestedLevel::Is(Level::Copy)),
    ];
    prop_oneof![
        5 => (disk.clone(), offset.clone(), len.clone(), 0..8u64)
            .prop_map(|(disk, offset, len, seed)| Step::Write { disk, offset, len, seed }),
        2 => (disk.clone(), offset.clone(), len.clone())
            .prop_map(|(disk, offset, len)| Step::Zero { disk, offset, len }),
        2 => (disk.clone(), disk.clone(), 0..SIZE / BLOCK, 0..SIZE / BLOCK, len)
            .prop_map(|(from, to, offset, target, len)| Step::Copy {
                from, to, offset: offset * BLOCK, target: target * BLOCK, len,
            }),
        1 => (disk.clone(), 0..SIZE).prop_map(|(disk, size)| Step::Resize { disk, size: size / 512 * 512 }),
        5 => level.prop_map(Step::Backup),
        1 => disk.prop_map(|disk| Step::LoseBitmaps { disk }),
        1 => Just(Step::Reopen),
        2 => (any::<usize>(), any::<usize>()).prop_map(|(a, b)| Step::Diff(a, b)),
        2 => any::<usize>().prop_map(Step::Forget),
        1 => any::<usize>().prop_map(Step::Undelete),
        1 => any::<usize>().prop_map(Step::Hold),
        1 => any::<usize>().prop_map(Step::Unhold),
        1 => (any::<usize>(), harm()).prop_map(|(pack, how)| Step::Damage { pack, how }),
        1 => Just(Step::RepairIndex),
        1 => Just(Step::RepairPacks),
        2 => Just(Step::Prune),
        2 => index_harm().prop_map(Step::Index),
    ]
}

fn index_harm() -> impl Strategy<Value = IndexHarm> {
    prop_oneof![
        Just(IndexHarm::Remove),
        any::<u64>().prop_map(IndexHarm::Spoil),
        (0..5000u64).prop_map(IndexHarm::Cut),
        Just(IndexHarm::Lock),
        Just(IndexHarm::Unlock),
    ]
}

fn harm() -> impl Strategy<Value = Harm> {
    prop_oneof![
        3 => any::<u64>().prop_map(Harm::Flip),
        1 => any::<u64>().prop_map(Harm::Cut),
        1 => Just(Harm::Remove),
    ]
}

/// The domain, and what is known of its points beside the repository.
struct Model {
    world: World,
    /// Forgotten and not pruned.
    forgotten: Vec<Kept>,
    held: BTreeSet<PointId>,
    damaged: BTreeSet<PointId>,
    /// By backup, the bytes that were dirty and those that had changed.
    read: Vec<(u64, u64)>,
    cache: Option<tempfile::TempDir>,
    /// Another program that has the index open.
    other: Option<Repository>,
}

fn apply(model: &mut Model, step: Step) {
    let world = &mut model.world;

    match step {
        Step::Write { disk, offset, len, seed } => {
            world.disk(disk).change(offset, len, |bytes| noise(seed, bytes));
        }
        Step::Zero { disk, offset, len } => world.disk(disk).change(offset, len, |bytes| bytes.fill(0)),
        Step::Copy { from, to, offset, target, len } => {
            let source = &world.disk(from).content;
            let start = (offset as usize).min(source.len());
            let copy = source[start..(start + len as usize).min(source.len())].to_vec();
            world.disk(to).change(target, copy.len() as u64, |bytes| {
                let len = bytes.len();
                bytes.copy_from_slice(&copy[..len]);
            });
        }
        Step::Resize { disk, size } => {
            let disk = world.disk(disk);
            if size < disk.content.len() as u64 {
                // a disk that shrinks is another disk
                disk.bitmaps.clear();
            }
            disk.content.resize(size as usize, 0);
        }
        Step::Backup(level) => {
            let stats = world.backup(level).stats;
            model.read.push((stats.dirty_bytes, stats.changed_bytes));
        }
        Step::LoseBitmaps { disk } => world.disk(disk).bitmaps.clear(),
        Step::Reopen => world.reopen(),
        Step::Diff(a, b) => {
            let count = world.kept.len();
            if count > 0 && model.damaged.is_empty() {
                world.check_diff(a % count, b % count);
            }
        }
        Step::Damage { pack, how } => model.damage(pack, &how),
        Step::RepairIndex => {
            repair::repair_index(&world.repository, false, &Recorder::new()).unwrap();
        }
        Step::RepairPacks => {
            let options = repair::PacksOptions::default();
            repair::repair_packs(&world.repository, &options, &Recorder::new()).unwrap();
            model.look_for_damage();
        }
        Step::Prune => model.prune(),
        Step::Index(harm) => model.harm_index(&harm),
        Step::Forget(_) | Step::Undelete(_) | Step::Hold(_) | Step::Unhold(_) => model.points(&step),
    }
}

impl Model {
    /// Where the program is built without an index on disk, `on_disk` changes nothing.
    fn new(sizes: &[u64], on_disk: bool) -> Self {
        let mut model = Self {
            world: World::new(sizes),
            forgotten: Vec::new(),
            held: BTreeSet::new(),
            damaged: BTreeSet::new(),
            read: Vec::new(),
            cache: on_disk.then(|| tempfile::tempdir().unwrap()),
            other: None,
        };
        model.world.cache = model.cache.as_ref().map(|cache| cache.path().to_owned());
        model.world.reopen();
        model
    }

    /// Returns what must not depend on the local index: points and what was read for them.
    fn results(&self) -> impl PartialEq + std::fmt::Debug + use<> {
        let list = |list: &[Kept]| list.iter().map(|kept| (kept.number, kept.level)).collect::<Vec<_>>();
        (
            list(&self.world.kept),
            list(&self.forgotten),
            self.held.len(),
            self.damaged.len(),
            self.read.clone(),
        )
    }

    fn harm_index(&mut self, harm: &IndexHarm) {
        let Some(cache) = self.cache.as_ref().map(|cache| cache.path().to_owned()) else { return };
        match harm {
            IndexHarm::Remove => for_each_file(&cache, &mut |path| std::fs::remove_file(path)),
            IndexHarm::Spoil(seed) => for_each_file(&cache, &mut |path| {
                let mut bytes = vec![0; std::fs::metadata(path)?.len() as usize];
                noise(*seed, &mut bytes);
                std::fs::write(path, bytes)
            }),
            IndexHarm::Cut(len) => for_each_file(&cache, &mut |path| {
                let file = std::fs::OpenOptions::new().write(true).open(path)?;
                file.set_len(file.metadata()?.len().min(*len))
            }),
            IndexHarm::Lock if self.other.is_none() => {
                self.world.cache = None;
                self.world.reopen();
                let storage = Box::new(self.world.storage.clone());
                let (directory, silent) = (Some(cache.as_path()), Recorder::new());
                self.other = Some(Repository::open(storage, directory, &environment(), &silent).unwrap());
                self.world.cache = Some(cache);
                self.world.reopen();
            }
            IndexHarm::Lock => {}
            IndexHarm::Unlock => {
                self.other = None;
                self.world.reopen();
            }
        }
    }

    fn points(&mut self, step: &Step) {
        let silent = Recorder::new();
        let repository = &self.world.repository;
        let (list, no) = match step {
            Step::Undelete(no) => (&mut self.forgotten, *no),
            Step::Forget(no) | Step::Hold(no) | Step::Unhold(no) => (&mut self.world.kept, *no),
            _ => return,
        };
        if list.is_empty() {
            return;
        }
        let no = no % list.len();
        let id = list[no].id;
        match step {
            Step::Hold(_) => {
                forget::hold(repository, id, None, "test", &silent).unwrap();
                self.held.insert(id);
            }
            Step::Unhold(_) => {
                assert_eq!(forget::unhold(repository, id, &silent).unwrap() > 0, self.held.remove(&id));
            }
            Step::Undelete(_) => {
                forget::undelete(repository, id, &silent).unwrap();
                let back = self.forgotten.remove(no);
                self.world.kept.push(back);
                self.world.kept.sort_by_key(|kept| kept.number);
                // no verify looks at a forgotten point
                self.look_for_damage();
            }
            _ => {
                let forgotten = forget::forget(repository, &[id], "test", false, &silent);
                assert_eq!(forgotten.is_err(), self.held.contains(&id));
                if forgotten.is_ok() {
                    let gone = self.world.kept.remove(no);
                    self.forgotten.push(gone);
                }
            }
        }
    }

    fn damage(&mut self, pack: usize, how: &Harm) {
        let packs = self.world.storage.list(Folder::Packs).unwrap();
        if packs.is_empty() {
            return;
        }
        let listed = packs[pack % packs.len()];
        self.world.storage.tamper(listed.name, |mut bytes| {
            let at = |place: u64| usize::try_from(place % listed.len).unwrap();
            match how {
                Harm::Flip(bit) => bytes[at(bit / 8)] ^= 1 << (bit % 8),
                Harm::Cut(place) => bytes.truncate(at(*place)),
                Harm::Remove => return None,
            }
            Some(bytes)
        });
        self.look_for_damage();
    }

    fn look_for_damage(&mut self) {
        let options = VerifyOptions { level: VerifyLevel::Data, record: true, ..VerifyOptions::default() };
        let report = verify(&self.world.repository, &options, &Recorder::new()).unwrap();
        self.damaged = report.damaged_points.into_iter().collect();
    }

    /// A prune deletes nothing while anything is lost; else it leaves nothing that was forgotten.
    fn prune(&mut self) {
        let options = PruneOptions { max_unused_permille: 0, ..PruneOptions::default() };
        let pruned = prune(&self.world.repository, &options, &Recorder::new());
        match pruned {
            Ok(_) => self.forgotten.clear(),
            Err(error) => assert!(error.is_damage() && !self.damaged.is_empty(), "{error:?}"),
        }
    }

    /// Without what is lost for good, everything is in order again.
    fn end(&mut self) {
        for kept in std::mem::take(&mut self.world.kept) {
            if self.damaged.contains(&kept.id) {
                forget::unhold(&self.world.repository, kept.id, &Recorder::new()).unwrap();
                forget::forget(&self.world.repository, &[kept.id], "test", false, &Recorder::new()).unwrap();
            } else {
                self.world.kept.push(kept);
            }
        }
        let options = repair::PacksOptions::default();
        repair::repair_packs(&self.world.repository, &options, &Recorder::new()).unwrap();
        let options = PruneOptions { max_unused_permille: 0, ..PruneOptions::default() };
        prune(&self.world.repository, &options, &Recorder::new()).unwrap();
        self.world.reopen();
        self.world.check_all();
    }

    /// Every point restores to what it was, or is known to be damaged and says where; the newest is whole.
    fn check(&mut self) {
        let repository = &self.world.repository;
        let silent = Recorder::new();
        let (catalog, view) = repository.refresh(&silent).unwrap();
        let reader = ChunkReader::new(repository, &view);
        let newest = self.world.kept.last().map(|kept| kept.id);
        for kept in &self.world.kept {
            let mut lost = false;
            for disk in &catalog.point(kept.id).unwrap().record.disks {
                let content = &kept.contents[&disk.target];
                let give = |limits| {
                    let sink = Buffer(Mutex::new(vec![0xee; content.len()]));
                    let zero = OnDamage::Zero;
                    let read =
                        read_disk_by(&reader, &disk.manifest, &sink, zero, &silent, &|_| {}, limits).unwrap();
                    (read, sink.0.into_inner().unwrap())
                };
                let (read, found) = give(Limits::default());
                // each was the newest one once
                if Some(kept.id) == newest || !read.missing.is_empty() {
                    assert!(give(Limits::EVERYTHING) == (read.clone(), found.clone()));
                }
                assert_eq!(disk.manifest.size, content.len() as u64);
                let mut expected = content.clone();
                for range in read.missing.iter() {
                    expected[range.start() as usize..range.end() as usize].fill(0);
                }
                let wrong = found.iter().zip(&expected).position(|(a, b)| a != b);
                assert_eq!(wrong, None, "{} of point {} differs", disk.target, kept.id);
                lost |= !read.missing.is_empty();
            }
            if !lost {
                // a backup has healed it; or only its nvram is lost, which is not looked at here
                continue;
            }
            assert!(self.damaged.contains(&kept.id), "point {} lost something unnoticed", kept.id);
        }
    }
}

fn for_each_file(dir: &Path, harm: &mut dyn FnMut(&Path) -> std::io::Result<()>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            for_each_file(&path, harm);
        } else {
            // the index itself replaces files meanwhile
            let _ = harm(&path);
        }
    }
}

/// So many sequences; with `VMKEEP_TEST_LONG` set, the long number.
fn cases() -> u32 {
    if std::env::var_os("VMKEEP_TEST_LONG").is_some() { 10_000 } else { 256 }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn every_point_restores_whatever_happened(
        sizes in prop::collection::vec(0..SIZE / 512, 2),
        steps in prop::collection::vec(step(), 1..30),
        index in 0..8u8,
    ) {
        let sizes: Vec<u64> = sizes.into_iter().map(|sectors| sectors * 512).collect();
        // half of the lives have their index on disk, some of them are lived again without
        let mut model = Model::new(&sizes, index < 4);
        let mut twin = (index == 0).then(|| Model::new(&sizes, false));
        for step in steps {
            if matches!(step, Step::Damage { .. }) && twin.is_some() {
                // which pack is which is a matter of chance
                continue;
            }
            let backed_up = matches!(step, Step::Backup(_));
            apply(&mut model, step.clone());
            model.check();
            if let Some(twin) = &mut twin {
                apply(twin, step);
                prop_assert_eq!(model.results(), twin.results());
            }
            if let Some(newest) = model.world.kept.iter().max_by_key(|kept| kept.number).filter(|_| backed_up) {
                prop_assert!(!model.damaged.contains(&newest.id));
            }
        }
        model.end();
    }
}

use std::collections::BTreeMap;
use std::path::Path;

use proptest::prelude::*;

use super::{Index, Location, MemoryIndex, open_index, synchronize};
use crate::error::{Error, Result};
use crate::format::node::ChunkKind;
use crate::format::pack::{FrameEntry, PackKind};
use crate::format::segment::{Segment, SegmentChunk, SegmentPack};
use crate::id::{ChunkId, PackId, RepositoryId, SegmentId, SessionId};
use crate::monitor::Recorder;

const REPOSITORY: RepositoryId = RepositoryId::from_bytes([7; 16]);

fn chunk_id(number: u64) -> ChunkId {
    ChunkId::from_bytes(*blake3::hash(&number.to_le_bytes()).as_bytes())
}

fn segment_id(number: u8) -> SegmentId {
    SegmentId::from_bytes([number; 32])
}

/// A segment of one pack, named by `number`, that holds chunks of these numbers.
fn segment(number: u8, chunks: impl IntoIterator<Item = u64>) -> (SegmentId, Segment) {
    let mut chunks: Vec<SegmentChunk> = chunks
        .into_iter()
        .map(|n| {
            let kind = if n % 5 == 0 { ChunkKind::Node } else { ChunkKind::Data };
            SegmentChunk { id: chunk_id(n), kind, pack: 0, frame: (n % 2) as u32, offset: n as u32, len: 1 }
        })
        .collect();
    chunks.sort_unstable_by_key(|chunk| chunk.id);
    chunks.dedup_by_key(|chunk| chunk.id);
    let frame = |offset| FrameEntry { offset, stored_len: 100, raw_len: u32::MAX };
    let pack = SegmentPack {
        id: PackId::from_bytes([number; 32]),
        kind: PackKind::Data,
        stored_len: 1 << 20,
        frames: vec![frame(64), frame(4096)],
    };
    (
        segment_id(number),
        Segment { owner: SessionId::from_bytes([1; 16]), number: 0, packs: vec![pack], chunks },
    )
}

/// Opens the index of this folder, which must need no explanation.
fn open_quietly(dir: &Path) -> Box<dyn Index> {
    let opened = open_index(Some(dir), REPOSITORY);
    assert_eq!(opened.notes, Vec::<String>::new());
    opened.index
}

/// Brings an index up to date with these segments; returns how many were loaded.
fn bring(index: &dyn Index, segments: &[(SegmentId, Segment)]) -> usize {
    let listed: Vec<SegmentId> = segments.iter().map(|(id, _)| *id).collect();
    let mut loaded = 0;
    let mut load = |wanted: SegmentId| -> Result<Option<Segment>> {
        loaded += 1;
        Ok(segments.iter().find(|(id, _)| *id == wanted).map(|(_, segment)| segment.clone()))
    };
    synchronize(index, &listed, &|_| true, &mut load, &mut || (), &Recorder::new()).unwrap();
    loaded
}

fn packs(index: &dyn Index, numbers: impl IntoIterator<Item = u64>) -> Vec<Vec<PackId>> {
    let ids: Vec<ChunkId> = numbers.into_iter().map(chunk_id).collect();
    let pack = |place: Location| place.pack;
    index.lookup(&ids).unwrap().into_iter().map(|places| places.into_iter().map(pack).collect()).collect()
}

fn sorted(mut places: Vec<Location>) -> Vec<Location> {
    places.sort_unstable_by_key(|place| place.pack);
    places
}

#[test]
fn places_come_back_in_the_order_asked() {
    let dir = tempfile::tempdir().unwrap();
    for index in [Box::new(MemoryIndex::default()) as Box<dyn Index>, open_quietly(dir.path())] {
        assert_eq!(bring(index.as_ref(), &[segment(1, 0..100), segment(2, 50..150)]), 2);
        let (one, two) = (PackId::from_bytes([1; 32]), PackId::from_bytes([2; 32]));
        assert_eq!(
            packs(index.as_ref(), [149, 7, 1000, 60, 7]),
            [vec![two], vec![one], vec![], vec![one, two], vec![one]]
        );
        let place = index.lookup(&[chunk_id(60)]).unwrap().remove(0).remove(0);
        let frame = FrameEntry { offset: 64, stored_len: 100, raw_len: u32::MAX };
        assert_eq!(place, Location { pack: one, frame, kind: ChunkKind::Node, offset: 60, len: 1 });
    }
}

#[cfg(feature = "rocksdb")]
#[test]
fn what_was_applied_is_not_loaded_again_and_survives() {
    let dir = tempfile::tempdir().unwrap();
    let (small, large) = (segment(1, 0..10), segment(2, 5..40_000));
    assert_eq!(bring(open_quietly(dir.path()).as_ref(), &[small.clone(), large.clone()]), 2);
    let index = open_quietly(dir.path());
    assert_eq!(bring(index.as_ref(), &[small, large, segment(3, [77_777])]), 1);
    assert_eq!(packs(index.as_ref(), [7, 39_999, 77_777, 50_000]).iter().map(Vec::len).sum::<usize>(), 4);
}

#[test]
fn a_segment_that_is_gone_takes_its_places_along() {
    let dir = tempfile::tempdir().unwrap();
    for index in [Box::new(MemoryIndex::default()) as Box<dyn Index>, open_quietly(dir.path())] {
        bring(index.as_ref(), &[segment(1, 0..10), segment(2, 20..30)]);
        assert_eq!(bring(index.as_ref(), &[segment(2, 20..30)]), 1);
        assert_eq!(packs(index.as_ref(), [5, 25]), [vec![], vec![PackId::from_bytes([2; 32])]]);
        assert!(index.applied().unwrap().into_keys().eq([segment_id(2)]));
    }
}

#[test]
fn a_segment_whose_owner_does_not_count_any_more_takes_its_places_along() {
    let dir = tempfile::tempdir().unwrap();
    for index in [Box::new(MemoryIndex::default()) as Box<dyn Index>, open_quietly(dir.path())] {
        let (one, two) = (segment(1, 0..10), segment(2, 20..30));
        let owner = one.1.owner;
        bring(index.as_ref(), &[one, two]);
        let mut load = |_| Ok(None);
        let listed = [segment_id(1), segment_id(2)];
        let counts = |id| id != owner;
        synchronize(index.as_ref(), &listed, &counts, &mut load, &mut || (), &Recorder::new()).unwrap();
        assert_eq!(packs(index.as_ref(), [5, 25]), [vec![], vec![]], "all is asked for again");
    }
}

#[test]
fn an_uncommitted_segment_is_asked_for_each_time() {
    let index = MemoryIndex::default();
    for _ in 0..2 {
        let mut asked = 0;
        let mut load = |_| {
            asked += 1;
            Ok(None)
        };
        synchronize(&index, &[segment_id(1)], &|_| true, &mut load, &mut || (), &Recorder::new()).unwrap();
        assert_eq!(asked, 1);
    }
}

#[test]
fn a_failing_load_and_a_cancelled_run_fail() {
    let index = MemoryIndex::default();
    let mut load = |_| Err(Error::Cancelled);
    assert!(
        synchronize(&index, &[segment_id(1)], &|_| true, &mut load, &mut || (), &Recorder::new()).is_err()
    );
    let monitor = Recorder::new();
    monitor.cancel();
    let result = synchronize(&index, &[segment_id(1)], &|_| true, &mut |_| Ok(None), &mut || (), &monitor);
    assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn the_index_on_disk_answers_as_the_one_in_memory(
        steps in prop::collection::vec((prop::collection::btree_map(0u8..12, 0u64..40, 0..8), any::<bool>()), 1..6)
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut index = open_quietly(dir.path());
        for (step, reopen) in steps {
            // a segment's content follows from its number, as it does from its id
            let step: BTreeMap<u8, u64> = step.into_keys().map(|n| (n, u64::from(n) * 3)).collect();
            let segments: Vec<_> = step.into_iter().map(|(n, from)| segment(n, from..from + 9)).collect();
            let memory = MemoryIndex::default();
            bring(&memory, &segments);
            bring(index.as_ref(), &segments);
            prop_assert_eq!(index.applied().unwrap(), memory.applied().unwrap());
            let ids: Vec<ChunkId> = (0..60).map(chunk_id).collect();
            let both = index.lookup(&ids).unwrap().into_iter().zip(memory.lookup(&ids).unwrap());
            for (found, expected) in both {
                prop_assert_eq!(sorted(found), sorted(expected));
            }
            if reopen {
                drop(index);
                index = open_quietly(dir.path());
            }
        }
    }
}

#[cfg(feature = "rocksdb")]
mod on_disk {
    use super::*;
    use std::fs;
    use std::path::PathBuf;

    fn folder(dir: &Path) -> PathBuf {
        dir.join(REPOSITORY.to_hex()).join("index")
    }

    /// Fills an index and closes it; returns what it was filled with.
    fn filled(dir: &Path) -> Vec<(SegmentId, Segment)> {
        let segments = vec![segment(1, 0..20_000), segment(2, 30_000..30_100)];
        bring(open_quietly(dir).as_ref(), &segments);
        segments
    }

    fn assert_whole(index: &dyn Index) {
        let numbers = (0..20_000).step_by(97).chain(30_000..30_100);
        assert!(packs(index, numbers).iter().all(|places| places.len() == 1));
    }

    #[test]
    fn two_processes_cannot_share_it_and_the_second_has_one_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let segments = filled(dir.path());
        let _first = open_quietly(dir.path());
        let second = open_index(Some(dir.path()), REPOSITORY);
        assert!(second.notes.iter().any(|note| note.contains("in memory")), "{:?}", second.notes);
        assert_eq!(bring(second.index.as_ref(), &segments), 2);
        assert_whole(second.index.as_ref());
    }

    #[test]
    fn each_file_may_be_gone_cut_or_overwritten() {
        let pristine = tempfile::tempdir().unwrap();
        let segments = filled(pristine.path());
        let names: Vec<_> =
            fs::read_dir(folder(pristine.path())).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(names.len() > 4, "{names:?}");
        let harms: [fn(&Path); 3] = [
            |path| fs::remove_file(path).unwrap(),
            |path| fs::OpenOptions::new().write(true).open(path).unwrap().set_len(3).unwrap(),
            |path| fs::write(path, vec![0x5a; fs::metadata(path).unwrap().len() as usize]).unwrap(),
        ];
        for name in &names {
            for (number, harm) in harms.iter().enumerate() {
                let dir = tempfile::tempdir().unwrap();
                fs::create_dir_all(folder(dir.path())).unwrap();
                for file in &names {
                    fs::copy(folder(pristine.path()).join(file), folder(dir.path()).join(file)).unwrap();
                }
                harm(&folder(dir.path()).join(name));
                survives(dir.path(), &segments, &format!("{name:?}, harm {number}"));
            }
        }
    }

    /// What the repository does with an index: if it fails, it is not used again, and the next one is whole.
    fn survives(dir: &Path, segments: &[(SegmentId, Segment)], what: &str) {
        let listed: Vec<SegmentId> = segments.iter().map(|(id, _)| *id).collect();
        for attempt in 0..3 {
            let opened = open_index(Some(dir), REPOSITORY);
            let mut load =
                |id| Ok(segments.iter().find(|(known, _)| *known == id).map(|(_, segment)| segment.clone()));
            let ids: Vec<ChunkId> = (0..20_000).chain(30_000..30_100).map(chunk_id).collect();
            let done = synchronize(
                opened.index.as_ref(),
                &listed,
                &|_| true,
                &mut load,
                &mut || (),
                &Recorder::new(),
            )
            .and_then(|()| opened.index.lookup(&ids));
            match done {
                // missing places cost space, never content; wrong ones are found by the chunk's id
                Ok(found) => {
                    assert_eq!(found.len(), ids.len());
                    if attempt > 0 {
                        assert!(found.iter().all(|places| places.len() == 1), "{what}");
                    }
                    if found.iter().all(|places| places.len() == 1) {
                        return;
                    }
                }
                Err(error) => assert!(attempt < 2, "{what}: {error:?}"),
            }
        }
        panic!("{what}: not whole after three openings");
    }

    #[test]
    fn another_schema_and_rubbish_in_its_place_are_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let segments = filled(dir.path());
        let other = RepositoryId::from_bytes([8; 16]);
        fs::create_dir_all(dir.path().join(other.to_hex())).unwrap();
        fs::rename(folder(dir.path()), dir.path().join(other.to_hex()).join("index")).unwrap();
        let opened = open_index(Some(dir.path()), other);
        assert!(opened.notes.iter().any(|note| note.contains("another schema")), "{:?}", opened.notes);
        assert_eq!(bring(opened.index.as_ref(), &segments), 2);
        drop(opened);

        fs::write(folder(dir.path()), b"a file").unwrap();
        let opened = open_index(Some(dir.path()), REPOSITORY);
        assert_eq!(opened.notes.len(), 1, "{:?}", opened.notes);
        assert_eq!(bring(opened.index.as_ref(), &segments), 2);
        assert_whole(opened.index.as_ref());
    }

    #[test]
    fn a_cache_that_cannot_be_written_means_an_index_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), b"").unwrap();
        let opened = open_index(Some(&dir.path().join("file")), REPOSITORY);
        assert_eq!(opened.notes.len(), 1, "{:?}", opened.notes);
        assert_eq!(bring(opened.index.as_ref(), &[segment(1, 0..10)]), 1);
    }
}

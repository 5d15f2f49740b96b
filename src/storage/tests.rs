//! The contract of [`Storage`], held against every storage.

use super::local::LocalStorage;
use super::memory::MemoryStorage;
use super::overlay::OverlayStorage;
use super::*;
use crate::error::FormatFault;
use crate::id::{PackId, SegmentId, SessionId};

/// Runs a check on a fresh storage of each kind.
fn on_each(check: impl Fn(&dyn Storage)) {
    let dir = tempfile::tempdir().unwrap();
    check(&LocalStorage::create(&dir.path().join("new")).unwrap());
    check(&MemoryStorage::new());
    check(&OverlayStorage::new(Box::new(MemoryStorage::new())));
}

fn pack(number: u8) -> ObjectName {
    ObjectName::Pack(PackId::from_bytes([number; 32]))
}

/// A name in each folder.
fn names() -> Vec<(Option<Folder>, ObjectName)> {
    let session = SessionId::from_bytes([5; 16]);
    vec![
        (None, ObjectName::Config),
        (None, ObjectName::ConfigCopy),
        (None, ObjectName::Reserve),
        (Some(Folder::Keys), ObjectName::Key(session)),
        (Some(Folder::Packs), pack(5)),
        (Some(Folder::Segments), ObjectName::Segment(SegmentId::from_bytes([5; 32]))),
        (Some(Folder::Sessions), ObjectName::Session(session)),
        (Some(Folder::Outcomes), ObjectName::Outcome(session)),
        (Some(Folder::Marks), ObjectName::Mark(session)),
        (Some(Folder::Tombstones), ObjectName::Tombstone(session)),
        (Some(Folder::Damage), ObjectName::Damage(PackId::from_bytes([6; 32]), session)),
    ]
}

#[test]
fn objects_of_every_kind_come_back_and_are_listed() {
    on_each(|storage| {
        for (folder, name) in names() {
            assert!(matches!(storage.get(name, 10), Err(Error::NotFound { .. })), "{name}");
            assert!(matches!(storage.len(name), Err(Error::NotFound { .. })), "{name}");
            assert!(matches!(storage.get_range(name, 0, 1), Err(Error::NotFound { .. })), "{name}");
            storage.put_new(name, b"content").unwrap();
            assert_eq!(storage.get(name, 7).unwrap(), b"content");
            assert_eq!(storage.len(name).unwrap(), 7);
            let Some(folder) = folder else { continue };
            assert_eq!(storage.list(folder).unwrap(), [Listed { name, len: 7 }]);
            assert_eq!(storage.names(folder).unwrap(), [name]);
        }
    });
}

#[test]
fn a_name_is_given_once() {
    on_each(|storage| {
        for (_, name) in names() {
            storage.put_new(name, b"first").unwrap();
            assert!(matches!(storage.put_new(name, b"second"), Err(Error::Exists { .. })), "{name}");
            assert_eq!(storage.get(name, 10).unwrap(), b"first");
        }
    });
}

#[test]
fn of_many_who_create_one_object_one_succeeds() {
    on_each(|storage| {
        for round in 0..20 {
            let one = |who: u8| {
                let done = storage.put_new(pack(round), &[who; 4096]);
                assert!(matches!(done, Ok(()) | Err(Error::Exists { .. })), "{done:?}");
                done.is_ok().then_some(who)
            };
            let winners: Vec<u8> = std::thread::scope(|scope| {
                let racers: Vec<_> = (0..4).map(|who| scope.spawn(move || one(who))).collect();
                racers.into_iter().filter_map(|racer| racer.join().unwrap()).collect()
            });
            assert_eq!(winners.len(), 1);
            assert_eq!(storage.get(pack(round), 4096).unwrap(), [winners[0]; 4096]);
        }
    });
}

#[test]
fn reads_are_bounded_and_exact() {
    on_each(|storage| {
        storage.put_new(pack(1), b"0123456789").unwrap();
        assert!(matches!(storage.get(pack(1), 9), Err(Error::Malformed { .. })));
        assert_eq!(storage.get_range(pack(1), 3, 4).unwrap(), b"3456");
        assert_eq!(storage.get_range(pack(1), 10, 0).unwrap(), b"");
        for (offset, len) in [(7, 4), (11, 1), (u64::MAX, 1), (1 << 62, 3)] {
            let found = storage.get_range(pack(1), offset, len);
            let Err(Error::Malformed { fault, .. }) = found else { panic!("{offset} {len}: {found:?}") };
            assert!(matches!(fault, FormatFault::Truncated { .. }), "{offset} {len}: {fault}");
        }
        let mut memory = *b"what was here";
        storage.get_range_into(pack(1), 2, &mut memory[..8]).unwrap();
        assert_eq!(&memory, b"23456789 here", "no byte more");
        storage.get_range_into(pack(1), 10, &mut []).unwrap();
        for (offset, len) in [(7, 4), (11, 1), (u64::MAX, 1)] {
            let found = storage.get_range_into(pack(1), offset, &mut memory[..len]);
            let Err(Error::Malformed { fault, .. }) = found else { panic!("{offset} {len}: {found:?}") };
            assert!(matches!(fault, FormatFault::Truncated { .. }), "{offset} {len}: {fault}");
        }
        let missing = storage.get_range_into(pack(2), 0, &mut memory);
        assert!(matches!(missing, Err(Error::NotFound { .. })), "{missing:?}");
    });
}

#[test]
fn listings_are_sorted_and_deletes_may_be_repeated() {
    on_each(|storage| {
        for number in [9, 3, 7, 1] {
            storage.put_new(pack(number), &vec![0; usize::from(number)]).unwrap();
        }
        storage.delete(pack(7)).unwrap();
        storage.delete(pack(7)).unwrap();
        storage.sync_deletes(Folder::Packs).unwrap();
        let expected = [1, 3, 9].map(|number| Listed { name: pack(number), len: u64::from(number) });
        assert_eq!(storage.list(Folder::Packs).unwrap(), expected);
        for folder in Folder::ALL.into_iter().filter(|folder| *folder != Folder::Packs) {
            assert_eq!(storage.list(folder).unwrap(), []);
        }
    });
}

#[test]
fn only_a_heartbeat_is_replaced() {
    on_each(|storage| {
        let name = ObjectName::Heartbeat(SessionId::from_bytes([5; 16]));
        for content in [b"one".as_slice(), b"three"] {
            storage.replace(name, content).unwrap();
            assert_eq!(storage.get(name, 10).unwrap(), content);
        }
    });
}

#[test]
fn a_folder_that_is_gone_is_not_an_empty_one() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("new");
    let storage = LocalStorage::create(&root).unwrap();
    for folder in Folder::ALL {
        assert_eq!(storage.list(folder).unwrap(), []);
    }
    for entry in std::fs::read_dir(&root).unwrap() {
        std::fs::remove_dir_all(entry.unwrap().path()).unwrap();
    }
    for folder in Folder::ALL {
        assert!(matches!(storage.list(folder), Err(Error::Io { .. })), "{folder:?}");
    }
}

#[test]
fn a_filler_grows_and_is_never_shorter() {
    on_each(|storage| {
        for (wanted, len) in [(3 << 20, 3 << 20), (1 << 20, 3 << 20), (5_000_001, 5_000_001)] {
            storage.put_filler(ObjectName::Reserve, wanted, [9; 32]).unwrap();
            assert_eq!(storage.len(ObjectName::Reserve).unwrap(), len);
        }
        let bytes = storage.get(ObjectName::Reserve, 8 << 20).unwrap();
        let zeroes = bytes.iter().filter(|byte| **byte == 0).count();
        assert!(zeroes < bytes.len() / 100, "{zeroes} zeroes: a file system may keep it in less");
        storage.delete(ObjectName::Reserve).unwrap();
        storage.put_filler(ObjectName::Reserve, 4 << 20, [9; 32]).unwrap();
        assert_eq!(storage.len(ObjectName::Reserve).unwrap(), 4 << 20);
    });
}

#[test]
fn a_filler_for_which_there_is_no_room_stays_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let storage = LocalStorage::create(&dir.path().join("new")).unwrap();
    storage.put_filler(ObjectName::Reserve, 1 << 20, [9; 32]).unwrap();
    let error = storage.put_filler(ObjectName::Reserve, 1 << 60, [9; 32]).unwrap_err();
    assert!(error.is_storage_full(), "{error}");
    assert_eq!(storage.len(ObjectName::Reserve).unwrap(), 1 << 20);
    assert_eq!(std::fs::read_dir(dir.path().join("new/tmp")).unwrap().count(), 0);
}

#[test]
fn a_filler_is_not_written_through_a_link() {
    let dir = tempfile::tempdir().unwrap();
    let storage = LocalStorage::create(&dir.path().join("new")).unwrap();
    let other = dir.path().join("other");
    std::fs::write(&other, b"mine").unwrap();
    std::os::unix::fs::symlink(&other, dir.path().join("new/reserve")).unwrap();
    assert!(storage.put_filler(ObjectName::Reserve, 2 << 20, [9; 32]).is_err());
    assert_eq!(std::fs::read(&other).unwrap(), b"mine");
}

#[test]
fn what_is_no_file_is_not_listed_and_a_link_to_one_is() {
    let dir = tempfile::tempdir().unwrap();
    let storage = LocalStorage::create(&dir.path().join("new")).unwrap();
    storage.put_new(pack(5), b"content").unwrap();
    let folder = dir.path().join("new/packs/05");
    let hex = |number: u8| PackId::from_bytes([number; 32]).to_string();
    let as_pack = |number: u8| dir.path().join(format!("new/packs/05/05{}", hex(number).split_at(2).1));
    assert!(folder.is_dir());
    std::fs::write(dir.path().join("moved"), b"elsewhere").unwrap();
    std::os::unix::fs::symlink(dir.path().join("moved"), as_pack(6)).unwrap();
    std::os::unix::fs::symlink(dir.path().join("nowhere"), as_pack(7)).unwrap();
    std::fs::create_dir(as_pack(8)).unwrap();
    let listed = storage.list(Folder::Packs).unwrap();
    assert_eq!(listed.iter().map(|listed| listed.len).collect::<Vec<_>>(), [7, 9]);
    let names: Vec<ObjectName> = listed.iter().map(|listed| listed.name).collect();
    assert_eq!(storage.names(Folder::Packs).unwrap(), names);
}

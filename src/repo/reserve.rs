//! Space that is given back when there is none left: a prune has to write what stays of segments before it may delete
//! anything.

use super::{Repository, random};
use crate::error::{Error, Result};
use crate::format::name::{Folder, ObjectName};
use crate::monitor::Monitor;
use crate::storage::Storage;

/// Bytes of the reserve of a new repository.
pub(super) const MIN_LEN: u64 = 1 << 20;
/// Up to here the reserve grows to twice its length, then by so much. Bytes.
const STEP_LEN: u64 = 64 << 20;
/// About what the segments of 3 TiB of content take. Bytes.
const MAX_LEN: u64 = 4 << 30;

/// Returns the length of the reserve beside segments of so many bytes: room for all of them, and what a prune writes
/// besides.
fn wanted_len(segments_len: u64) -> u64 {
    let len = segments_len.saturating_add(segments_len / 4).min(MAX_LEN);
    let len = if len <= STEP_LEN { len.next_power_of_two() } else { len.next_multiple_of(STEP_LEN) };
    len.clamp(MIN_LEN, MAX_LEN)
}

impl Repository {
    /// Puts the reserve back once there is space again, or a longer one in its place: as long as all segments together, and
    /// a quarter more. At most 4 GiB are reserved. What cannot be put is no reason to call anything failed.
    pub fn put_reserve(&self, monitor: &dyn Monitor) {
        if let Err(error) = self.try_put_reserve() {
            monitor.note(&format!("the reserve for a full storage could not be put: {error}"));
        }
    }

    fn try_put_reserve(&self) -> Result<()> {
        let storage = self.storage();
        let segments_len = storage.list(Folder::Segments)?.iter().map(|listed| listed.len).sum();
        let len = wanted_len(segments_len);
        let found = match storage.len(ObjectName::Reserve) {
            Ok(found) if found >= len => return Ok(()),
            Ok(found) => found,
            Err(Error::NotFound { .. }) => return put_reserve(storage, len),
            Err(error) => return Err(error),
        };
        storage.delete(ObjectName::Reserve)?;
        put_reserve(storage, len).inspect_err(|_| {
            // less is better than none
            let _ = put_reserve(storage, found);
        })
    }
}

/// Puts the reserve unless it is there.
pub(super) fn put_reserve(storage: &dyn Storage, len: u64) -> Result<()> {
    match storage.put_filler(ObjectName::Reserve, len, random()?) {
        Err(Error::Exists { .. }) | Ok(()) => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{CreateOptions, Environment, Timing};
    use super::*;
    use crate::monitor::Recorder;
    use crate::storage::fault::{FailingStorage, Fault};
    use crate::storage::memory::MemoryStorage;

    fn environment() -> Environment {
        Environment {
            host: "host".into(),
            boot_id: "boot".into(),
            process_id: 1,
            program: "test".into(),
            now_ms: || 1_000_000,
            timing: Timing::default(),
        }
    }

    #[test]
    fn it_has_room_for_all_segments() {
        let mib = 1 << 20;
        assert_eq!([0, mib, 10 * mib, 51 * mib].map(wanted_len), [mib, 2 * mib, 16 * mib, 64 * mib]);
        assert_eq!([52 * mib, 900 * mib, u64::MAX].map(wanted_len), [128 * mib, 1152 * mib, MAX_LEN]);
    }

    #[test]
    fn one_that_cannot_grow_stays() {
        let storage = MemoryStorage::new();
        Repository::create(Box::new(storage.clone()), &CreateOptions::default(), &environment()).unwrap();
        // a segment as long as it takes, whatever is in it
        let segment = ObjectName::Segment(crate::id::SegmentId::from_bytes([1; 32]));
        storage.put_new(segment, &vec![0; 3 << 20]).unwrap();
        let grow = |fault: Option<u64>| {
            // opening, listing, length, delete, put
            let failing = FailingStorage::new(storage.clone(), fault.unwrap_or(u64::MAX - 1), Fault::NoSpace);
            let opened = Repository::open(Box::new(failing.clone()), None, &environment(), &Recorder::new());
            let monitor = Recorder::new();
            if let Ok(repository) = opened {
                repository.put_reserve(&monitor);
            }
            (failing.has_failed(), monitor.notes().len(), storage.len(ObjectName::Reserve))
        };
        let mut told = 0;
        for at in 0.. {
            let (has_failed, notes, len) = grow(Some(at));
            assert!(len.is_ok(), "operation {at}: there is no reserve");
            told += notes;
            if !has_failed {
                break;
            }
        }
        assert!(told > 1, "{told}");
        assert_eq!(storage.len(ObjectName::Reserve).unwrap(), 4 << 20);
        assert_eq!(grow(None).1, 0);
    }
}

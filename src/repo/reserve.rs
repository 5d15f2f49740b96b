//! Space that is given back when there is none left: a prune has to write what stays of segments before it may delete
//! anything.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

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

/// Up to this part of the segments that were looked at, a process puts more before it looks at them again.
const LITTLE_PART: u64 = 16;

/// Returns the length of the reserve beside segments of so many bytes: room for all of them, and what a prune writes
/// besides.
fn wanted_len(segments_len: u64) -> u64 {
    let len = segments_len.saturating_add(segments_len / 4).min(MAX_LEN);
    let len = if len <= STEP_LEN { len.next_power_of_two() } else { len.next_multiple_of(STEP_LEN) };
    len.clamp(MIN_LEN, MAX_LEN)
}

/// What there was when the reserve had the length that it should have.
#[derive(Debug)]
pub(super) struct SeenReserve {
    /// Bytes of all segments.
    segments_len: u64,
    /// Of [`super::share::Share::segments_put`], then.
    put: u64,
}

impl Repository {
    /// Puts the reserve where there is none, and makes it longer where it should be: as long as all segments together, and a
    /// quarter more; at most 4 GiB. What cannot be put is no reason to call anything failed.
    pub fn put_reserve(&self, monitor: &dyn Monitor) {
        note_failure(self.grow(), monitor);
    }

    /// As [`Repository::put_reserve`], where there is one and no prune is at work: that one may have given it back, and need
    /// the room. Looks at the segments again only once this process has put much more of them: what other programs put in that
    /// time has room in the quarter more, if they are not many, and they see to it at their end.
    pub fn grow_reserve(&self, monitor: &dyn Monitor) {
        let grow = || {
            let len = match self.storage().len(ObjectName::Reserve) {
                Ok(len) => len,
                Err(Error::NotFound { .. }) => return Ok(()),
                Err(error) => return Err(error),
            };
            if !self.is_enough(len) && self.storage().list(Folder::Marks)?.is_empty() {
                self.grow()?;
            }
            Ok(())
        };
        note_failure(grow(), monitor);
    }

    /// Returns true if a reserve of so many bytes is long enough as far as is known without a look at the segments.
    fn is_enough(&self, len: u64) -> bool {
        let seen = self.share.reserve.lock().unwrap_or_else(PoisonError::into_inner);
        seen.as_ref().is_some_and(|seen| {
            let put = self.share.segments_put.load(Ordering::Relaxed).saturating_sub(seen.put);
            let is_little = put <= seen.segments_len / LITTLE_PART;
            is_little && wanted_len(seen.segments_len.saturating_add(put)) <= len
        })
    }

    fn grow(&self) -> Result<()> {
        let mut seen = self.share.reserve.lock().unwrap_or_else(PoisonError::into_inner);
        *seen = None;
        // before they are listed: one that is put meanwhile is counted twice rather than not at all
        let put = self.share.segments_put.load(Ordering::Relaxed);
        let segments_len = self.storage().list(Folder::Segments)?.iter().map(|listed| listed.len).sum();
        put_reserve(self.storage(), wanted_len(segments_len))?;
        *seen = Some(SeenReserve { segments_len, put });
        Ok(())
    }
}

fn note_failure(put: Result<()>, monitor: &dyn Monitor) {
    if let Err(error) = put {
        monitor.note(&format!("the reserve for a full storage could not be put: {error}"));
    }
}

/// Makes the reserve at least so long.
pub(super) fn put_reserve(storage: &dyn Storage, len: u64) -> Result<()> {
    match storage.put_filler(ObjectName::Reserve, len, random()?) {
        Err(Error::Exists { .. }) | Ok(()) => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::super::writer::put_segment;
    use super::super::{CreateOptions, Environment};
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::id::SessionId;
    use crate::monitor::Recorder;
    use crate::storage::fault::{FailingStorage, Fault};
    use crate::storage::hooked::HookedStorage;
    use crate::storage::memory::MemoryStorage;

    #[test]
    fn it_has_room_for_all_segments() {
        let mib = 1 << 20;
        assert_eq!([0, mib, 10 * mib, 51 * mib].map(wanted_len), [mib, 2 * mib, 16 * mib, 64 * mib]);
        assert_eq!([52 * mib, 900 * mib, u64::MAX].map(wanted_len), [128 * mib, 1152 * mib, MAX_LEN]);
    }

    #[test]
    fn a_backup_leaves_it_to_a_prune_that_has_given_it_back() {
        let storage = MemoryStorage::new();
        let created = Repository::create(
            Box::new(storage.clone()),
            &CreateOptions::default(),
            &Environment::of_a_test(),
        );
        let repository = created.unwrap();
        let segment = ObjectName::Segment(crate::id::SegmentId::from_bytes([1; 32]));
        storage.put_new(segment, &vec![0; 3 << 20]).unwrap();
        let mark = ObjectName::Mark(crate::id::SessionId::from_bytes([2; 16]));
        storage.put_new(mark, b"").unwrap();
        let silent = Recorder::new();
        let len = || storage.len(ObjectName::Reserve).ok();
        repository.grow_reserve(&silent);
        assert_eq!(len(), Some(MIN_LEN), "a prune is at work");
        storage.delete(mark).unwrap();
        repository.grow_reserve(&silent);
        assert_eq!(len(), Some(4 << 20));
        storage.delete(ObjectName::Reserve).unwrap();
        repository.grow_reserve(&silent);
        assert_eq!(len(), None, "given back");
        repository.put_reserve(&silent);
        assert_eq!(len(), Some(4 << 20));
        assert_eq!(silent.notes().len(), 0, "{:?}", silent.notes());
    }

    #[test]
    fn segments_are_looked_at_when_this_process_has_put_enough_of_them() {
        let looks = Arc::new(AtomicU64::new(0));
        let storage = HookedStorage::new(&MemoryStorage::new()).before_list({
            let looks = Arc::clone(&looks);
            move |folder| {
                looks.fetch_add(u64::from(folder == Folder::Segments), Ordering::Relaxed);
            }
        });
        let created = Repository::create(
            Box::new(storage.clone()),
            &CreateOptions::default(),
            &Environment::of_a_test(),
        );
        let repository = created.unwrap();
        looks.store(0, Ordering::Relaxed);
        let silent = Recorder::new();
        let put = |number: u8, len: usize| {
            let segment = ObjectName::Segment(crate::id::SegmentId::from_bytes([number; 32]));
            storage.put_new(segment, &vec![0; len]).unwrap();
            repository.share.segments_put.fetch_add(len as u64, Ordering::Relaxed);
            repository.grow_reserve(&silent);
            (looks.load(Ordering::Relaxed), storage.len(ObjectName::Reserve).unwrap())
        };
        assert_eq!(put(1, 32 << 10), (1, MIN_LEN));
        assert_eq!(put(2, 1 << 10), (1, MIN_LEN), "little has changed");
        assert_eq!(put(3, 2 << 10), (2, MIN_LEN), "what others put may have come beside it");
        assert_eq!(put(4, 1 << 20), (3, 2 << 20));
        assert_eq!(put(5, 1 << 10), (3, 2 << 20));
        assert_eq!(put(6, 1 << 20), (4, 4 << 20));
        // a prune of another program has given it back, and put one that was enough for what it left
        storage.delete(ObjectName::Reserve).unwrap();
        storage.put_new(ObjectName::Reserve, &[0; 1 << 20]).unwrap();
        assert_eq!(put(7, 1 << 10), (5, 4 << 20));
        let before = repository.share.segments_put.load(Ordering::Relaxed);
        let (_, len) =
            put_segment(&repository, SessionId::from_bytes([1; 16]), 0, Vec::new(), Vec::new()).unwrap();
        assert_eq!(repository.share.segments_put.load(Ordering::Relaxed), before + len);
    }

    #[test]
    fn one_that_cannot_grow_stays() {
        let storage = MemoryStorage::new();
        Repository::create(Box::new(storage.clone()), &CreateOptions::default(), &Environment::of_a_test())
            .unwrap();
        // a segment as long as it takes, whatever is in it
        let segment = ObjectName::Segment(crate::id::SegmentId::from_bytes([1; 32]));
        storage.put_new(segment, &vec![0; 3 << 20]).unwrap();
        let grow = |fault: Option<u64>| {
            // opening, listing, length, delete, put
            let failing = FailingStorage::new(storage.clone(), fault.unwrap_or(u64::MAX - 1), Fault::NoSpace);
            let opened = Repository::open(
                Box::new(failing.clone()),
                None,
                &Environment::of_a_test(),
                &Recorder::new(),
            );
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

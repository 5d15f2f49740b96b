//! What sessions of one process that write at the same time share: together they take hardly more memory than one
//! alone.
//!
//! Each may have its part of what stands between the stages of a pipeline, and the parts change as sessions come and go:
//! one that goes on alone has all of it again. Nobody waits for what another session holds, so no session stands still
//! for a slow one. Packs are cut shorter only while several sessions fill long ones. Readers share one cache of frames.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use super::Repository;
use super::frames::{FrameCache, SpareFrames};
use super::reserve::SeenReserve;

/// So many packs of the target's length may stand in memory while several sessions write.
const FULL_PACKS: u64 = 1;
/// A pack is not ended early before it has this part of the target's length.
const EARLY_PART: u64 = 8;

/// What the sessions of one repository share.
#[derive(Debug, Default)]
pub(super) struct Share {
    /// Sessions that write now.
    writing: AtomicUsize,
    /// Bytes of packs that are not stored yet.
    pack_bytes: AtomicUsize,
    /// Those who hold much in memory besides.
    sparing: AtomicUsize,
    /// What was last seen of the reserve; held by whoever makes it longer.
    pub(super) reserve: Mutex<Option<SeenReserve>>,
    /// Bytes of the segments that sessions of this process have put.
    pub(super) segments_put: AtomicU64,
    /// What the readers of now share; it goes with the last of them.
    pub(super) frames: Mutex<Weak<FrameCache>>,
    pub(super) spare_frames: Arc<SpareFrames>,
}

impl Share {
    /// Counts a session as one that writes, until the guard is dropped.
    pub(super) fn write(&self) -> Writing<'_> {
        self.writing.fetch_add(1, Ordering::SeqCst);
        Writing(self)
    }

    /// Returns how many sessions write now; at least 1.
    fn writing(&self) -> usize {
        self.writing.load(Ordering::SeqCst).max(1)
    }

    /// Has sessions that begin to write take as little memory as they can, until the guard is dropped.
    fn spare(&self) -> Sparing<'_> {
        self.sparing.fetch_add(1, Ordering::SeqCst);
        Sparing(self)
    }

    /// Returns true if somebody needs the memory for something else.
    pub(super) fn is_sparing(&self) -> bool {
        self.sparing.load(Ordering::SeqCst) > 0
    }

    /// Returns true while no other session writes.
    pub(super) fn is_alone(&self) -> bool {
        self.writing() == 1
    }

    /// Counts the bytes of packs from their frames until they are stored, or given up.
    pub(super) fn count_packs(&self) -> PackBytes<'_> {
        PackBytes { share: self, held: AtomicUsize::new(0) }
    }

    /// Returns the length from which on a pack is full.
    pub(super) fn pack_len(&self, target_len: u64) -> u64 {
        let held = self.pack_bytes.load(Ordering::SeqCst) as u64;
        let is_short = !self.is_alone() && held > target_len.saturating_mul(FULL_PACKS);
        if is_short { target_len / EARLY_PART } else { target_len }
    }
}

/// A session that writes.
pub(super) struct Writing<'a>(&'a Share);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.writing.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Somebody who needs the memory for something else.
#[derive(Debug)]
pub(crate) struct Sparing<'a>(&'a Share);

impl Drop for Sparing<'_> {
    fn drop(&mut self) {
        self.0.sparing.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Repository {
    /// Until the guard is dropped, packs are put one at a time, and their memory is given back: for one who
    /// holds much in memory besides. A pack takes 32 MiB by default.
    pub(crate) fn spare_memory(&self) -> Sparing<'_> {
        self.share.spare()
    }
}

/// The bytes of one session's packs.
pub(super) struct PackBytes<'a> {
    share: &'a Share,
    held: AtomicUsize,
}

impl PackBytes<'_> {
    /// Notes bytes that were appended to a pack.
    pub(super) fn add(&self, len: usize) {
        self.held.fetch_add(len, Ordering::SeqCst);
        self.share.pack_bytes.fetch_add(len, Ordering::SeqCst);
    }

    /// Notes that bytes are in memory no longer. A pack has a few more than its frames.
    pub(super) fn remove(&self, len: usize) {
        let take = |held: usize| Some(held.saturating_sub(len));
        let before = self.held.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take).unwrap_or(0);
        self.share.pack_bytes.fetch_sub(before.min(len), Ordering::SeqCst);
    }
}

impl Drop for PackBytes<'_> {
    fn drop(&mut self) {
        self.remove(usize::MAX);
    }
}

/// How much of something a session may hold.
#[derive(Debug, Clone, Copy)]
pub(super) struct Portion {
    /// Alone.
    pub most: usize,
    /// However many others there are.
    pub least: usize,
}

#[derive(Debug, Default)]
struct Held {
    count: usize,
    is_closed: bool,
}

/// Counts what stands between two stages of a session's pipeline, and keeps it within the session's portion.
pub(super) struct Permits<'a> {
    share: &'a Share,
    portion: Portion,
    held: Mutex<Held>,
    changed: Condvar,
}

impl<'a> Permits<'a> {
    pub(super) fn new(share: &'a Share, portion: Portion) -> Self {
        Self { share, portion, held: Mutex::default(), changed: Condvar::new() }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns how many there may be now.
    fn limit(&self) -> usize {
        (self.portion.most / self.share.writing()).max(self.portion.least).max(1)
    }

    /// Waits until there may be one more. Returns false if the stage that gives back has ended.
    pub(super) fn take(&self) -> bool {
        let mut held = self.held();
        // whoever waits holds one at least, and giving that back wakes it: it then sees what has become of the limit
        while !held.is_closed && held.count >= self.limit() {
            held = self.changed.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        held.count += 1;
        !held.is_closed
    }

    /// Gives one back.
    pub(super) fn give_back(&self) {
        let mut held = self.held();
        held.count = held.count.saturating_sub(1);
        drop(held);
        self.changed.notify_all();
    }

    /// Has nobody wait any more once the guard is dropped: the stage that gives back has ended, however it did.
    pub(super) fn close_at_end(&self) -> Closing<'_> {
        Closing(self)
    }
}

/// A stage that gives permits back.
pub(super) struct Closing<'a>(&'a Permits<'a>);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.held().is_closed = true;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const PORTION: Portion = Portion { most: 12, least: 2 };

    #[test]
    fn the_portion_shrinks_and_grows_with_the_others() {
        let share = Share::default();
        let permits = Permits::new(&share, PORTION);
        assert_eq!(permits.limit(), 12, "nobody writes");
        let first = share.write();
        assert_eq!((permits.limit(), share.is_alone()), (12, true));
        let others: Vec<Writing<'_>> = (0..3).map(|_| share.write()).collect();
        assert_eq!((permits.limit(), share.is_alone()), (3, false));
        let crowd: Vec<Writing<'_>> = (0..50).map(|_| share.write()).collect();
        assert_eq!(permits.limit(), 2);
        drop((crowd, others));
        assert_eq!(permits.limit(), 12);
        drop(first);
    }

    #[test]
    fn whoever_waits_goes_on_when_one_is_given_back_or_the_stage_has_ended() {
        let share = Share::default();
        let permits = Permits::new(&share, Portion { most: 1, least: 1 });
        assert!(permits.take());
        std::thread::scope(|scope| {
            let closing = permits.close_at_end();
            let waiting = scope.spawn(|| (permits.take(), permits.take()));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!waiting.is_finished());
            permits.give_back();
            std::thread::sleep(Duration::from_millis(20));
            assert!(!waiting.is_finished(), "the second has to wait too");
            drop(closing);
            assert_eq!(waiting.join().unwrap(), (true, false));
        });
    }

    #[test]
    fn packs_are_short_only_while_several_sessions_fill_long_ones() {
        let share = Share::default();
        let (first, packs) = (share.write(), share.count_packs());
        packs.add(3000);
        assert_eq!(share.pack_len(800), 800, "alone");
        let second = share.write();
        assert_eq!(share.pack_len(800), 100);
        packs.remove(2500);
        assert_eq!(share.pack_len(800), 800, "{share:?}");
        packs.add(2500);
        drop(packs);
        assert_eq!(share.pack_len(800), 800, "given up");
        assert_eq!(share.pack_bytes.load(Ordering::SeqCst), 0);
        drop((first, second));
    }
}

//! Memory for content on its way through a backup: aligned for reads around the page cache, and used again.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex};

/// What positions, lengths and memory of a read or write around the page cache have to be multiples of, bytes. No disk that
/// is in use wants more.
pub const ALIGN: usize = 4096;

/// Returns the bytes from the beginning of `memory` to the first that is aligned.
pub fn to_aligned(memory: &[u8]) -> usize {
    memory.as_ptr().align_offset(ALIGN).min(ALIGN)
}

/// Shorter buffers are the allocator's matter, bytes: it gives their memory to the next ones itself.
const MIN_POOLED_LEN: usize = 32 << 10;
/// Spare memory is as long as so many of the longest buffers at most: as many as are read ahead and looked at. What there is most
/// of makes room.
const MAX_SPARE_BUFFERS: usize = 64;

/// Memory of buffers that are gone: new memory has to be cleared by the system first.
#[derive(Debug)]
pub struct BufferPool {
    /// Of the longest buffers.
    len: usize,
    spare: Mutex<Spare>,
}

/// What nobody uses, by the bytes that there is room for.
#[derive(Debug, Default)]
struct Spare {
    by_room: BTreeMap<usize, Vec<Vec<u8>>>,
    bytes: usize,
}

impl BufferPool {
    /// Creates a pool of buffers of up to `len` bytes.
    pub fn new(len: usize) -> Arc<Self> {
        Arc::new(Self { len, spare: Mutex::default() })
    }

    /// Returns true for a length of which memory is used again.
    pub fn keeps(&self, len: usize) -> bool {
        (MIN_POOLED_LEN..=self.len).contains(&len)
    }

    /// Returns an aligned buffer of `len` bytes; they are not zero, but what an earlier one has held.
    pub fn take(self: &Arc<Self>, len: usize) -> Buffer {
        let is_pooled = self.keeps(len);
        // few lengths of memory, so that the next buffer finds one; less than half of it is for nothing
        let room = if is_pooled { len.next_power_of_two().min(self.len) } else { len };
        let spare =
            if is_pooled { self.spare.lock().ok().and_then(|mut spare| spare.take(room)) } else { None };
        let memory = spare.unwrap_or_else(|| vec![0; room + ALIGN]);
        let start = to_aligned(&memory);
        Buffer { memory, range: start..start + len, pool: is_pooled.then(|| Arc::clone(self)) }
    }

    fn give(&self, memory: Vec<u8>) {
        if let Ok(mut spare) = self.spare.lock() {
            spare.bytes += memory.len();
            spare.by_room.entry(memory.len() - ALIGN).or_default().push(memory);
            while spare.bytes > (self.len + ALIGN).saturating_mul(MAX_SPARE_BUFFERS)
                && let Some((room, _)) = spare.by_room.iter().max_by_key(|(room, kept)| *room * kept.len())
            {
                let room = *room;
                drop(spare.take(room));
            }
        }
    }
}

impl Spare {
    fn take(&mut self, room: usize) -> Option<Vec<u8>> {
        let memory = self.by_room.get_mut(&room)?.pop()?;
        self.bytes -= memory.len();
        Some(memory)
    }
}

/// Bytes that stand somewhere in their memory.
pub struct Buffer {
    memory: Vec<u8>,
    range: Range<usize>,
    /// Where the memory goes.
    pool: Option<Arc<BufferPool>>,
}

impl Buffer {
    /// Creates an aligned buffer that is empty, and gets up to `len` bytes without being moved ([`Buffer::extend`]).
    pub fn with_room(len: usize) -> Self {
        let mut memory: Vec<u8> = Vec::with_capacity(len.saturating_add(ALIGN));
        let start = to_aligned(&memory);
        memory.resize(start, 0);
        Self { memory, range: start..start, pool: None }
    }

    /// Returns true if it is aligned, and can have `len` bytes without being moved.
    pub fn has_room(&self, len: usize) -> bool {
        to_aligned(self) == 0 && self.memory.capacity() - self.range.start >= len
    }

    /// Appends `bytes`. If there is no room for them, everything is moved, and may not be aligned any more; a pool does not get
    /// its memory back.
    pub fn extend(&mut self, bytes: &[u8]) {
        // its memory is of another length now
        self.pool = None;
        self.memory.truncate(self.range.end);
        self.memory.extend_from_slice(bytes);
        self.range.end = self.memory.len();
    }

    /// Cuts off what stands behind `at` bytes and returns a copy of it.
    pub fn split_off(&mut self, at: usize) -> Self {
        let tail = self.get(at..).unwrap_or_default().to_vec();
        self.truncate(at);
        tail.into()
    }

    /// Cuts off what stands outside `range`.
    pub fn narrow(&mut self, range: Range<usize>) {
        self.truncate(range.end);
        self.range.start = self.range.end.min(self.range.start.saturating_add(range.start));
    }

    /// Cuts off what stands behind `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        self.range.end = self.range.end.min(self.range.start.saturating_add(len));
    }
}

impl From<Vec<u8>> for Buffer {
    fn from(memory: Vec<u8>) -> Self {
        Self { range: 0..memory.len(), memory, pool: None }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.memory.get(self.range.clone()).unwrap_or_default()
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.memory.get_mut(self.range.clone()).unwrap_or_default()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(pool) = &self.pool {
            pool.give(std::mem::take(&mut self.memory));
        }
    }
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        self.to_vec().into()
    }
}

impl PartialEq for Buffer {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Buffer {}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.len())
    }
}

/// What reading a range gave.
#[derive(Clone, PartialEq, Eq)]
pub enum Payload {
    /// Its bytes, as many as the range is long.
    Data(Buffer),
    /// Nothing but zeroes, known without having been transferred.
    Zero,
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Data(bytes) => write!(f, "Data({} bytes)", bytes.len()),
            Self::Zero => f.write_str("Zero"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_and_used_again() {
        let pool = BufferPool::new(1 << 20);
        let mut one = pool.take(1 << 20);
        assert_eq!((one.len(), one.as_ptr().align_offset(ALIGN)), (1 << 20, 0));
        one.fill(7);
        let place = one.as_ptr();
        let other = pool.take((1 << 19) + 1);
        assert_ne!(other.as_ptr(), place);
        drop(one);
        let again = pool.take(600_000);
        assert_eq!((again.as_ptr(), again.len(), again[0]), (place, 600_000, 7));
        let short = pool.take(4096);
        assert_eq!((short.len(), short.as_ptr().align_offset(ALIGN)), (4096, 0));
        let middle = pool.take(65_537);
        assert_eq!((middle.len(), middle.memory.len()), (65_537, (128 << 10) + ALIGN));
        let mut longer = pool.take(1 << 18);
        longer.extend(&[7]);
        drop(longer);
        assert_eq!(pool.spare.lock().unwrap().bytes, 0, "one that has grown is not given back");
        drop((again, other, short, middle));
        let kept = |room: usize| pool.spare.lock().unwrap().by_room.get(&room).map_or(0, Vec::len);
        assert_eq!((kept(1 << 20), kept(128 << 10), kept(4096)), (2, 1, 0), "a short one is not kept");
        drop((0..100).map(|_| pool.take(1 << 20)).collect::<Vec<_>>());
        assert_eq!((kept(1 << 20), kept(128 << 10)), (MAX_SPARE_BUFFERS - 1, 1), "not for ever more");
    }

    #[test]
    fn room_is_filled_in_place() {
        let mut buffer = Buffer::with_room(1 << 20);
        let place = buffer.as_ptr();
        assert_eq!((buffer.len(), place.align_offset(ALIGN)), (0, 0));
        assert!(buffer.has_room(1 << 20) && !buffer.has_room(1 << 21) && !Buffer::from(vec![1]).has_room(2));
        buffer.extend(&[1; 5000]);
        buffer.truncate(4999);
        buffer.extend(&vec![2; (1 << 20) - 4999]);
        assert_eq!((buffer.as_ptr(), buffer.len()), (place, 1 << 20));
        assert!(buffer[..4999].iter().all(|byte| *byte == 1) && buffer[4999..].iter().all(|byte| *byte == 2));
        buffer.truncate(0);
        buffer.extend(&[3; 2 << 20]);
        assert_eq!(
            (buffer.len(), buffer[0], buffer[(2 << 20) - 1]),
            (2 << 20, 3, 3),
            "more than there is room for"
        );
    }

    #[test]
    fn what_is_cut_off_is_a_copy() {
        let mut buffer = Buffer::from(vec![1, 2, 3, 4]);
        let tail = buffer.split_off(3);
        assert_eq!((&*buffer, &*tail), (&[1, 2, 3][..], &[4][..]));
        assert!(buffer.split_off(9).is_empty());
        let copy = buffer.clone();
        assert!(copy == buffer && copy.len() == 3);
        buffer.narrow(1..9);
        assert_eq!(&*buffer, &[2, 3]);
        buffer.narrow(1..2);
        assert_eq!(&*buffer, &[3]);
    }
}

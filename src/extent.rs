//! Byte ranges of a disk, and what is known about them.

use std::fmt;

/// A half-open range of bytes, never empty by construction through [`ByteRange::new`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ByteRange {
    start: u64,
    len: u64,
}

impl ByteRange {
    /// Returns the range of `len` bytes from `start`; `None` if it is empty or its end exceeds `u64`.
    pub fn new(start: u64, len: u64) -> Option<Self> {
        (len > 0 && start.checked_add(len).is_some()).then_some(Self { start, len })
    }

    /// Returns the range between two positions; `None` if it is empty or turned round.
    pub fn between(start: u64, end: u64) -> Option<Self> {
        Self::new(start, end.checked_sub(start)?)
    }

    /// First byte.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Length in bytes, at least 1.
    // a range cannot be empty, so `is_empty` would be a constant
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The byte after the last.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }

    /// Returns what both ranges cover.
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        Self::between(self.start.max(other.start), self.end().min(other.end()))
    }

    /// Returns the smallest range of whole blocks of `block` bytes around this one, ending at `limit` at most.
    pub fn aligned_out(&self, block: u64, limit: u64) -> Option<Self> {
        let start = self.start - self.start % block;
        let end = self.end().checked_next_multiple_of(block).unwrap_or(u64::MAX).min(limit);
        Self::between(start, end)
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.start, self.len)
    }
}

/// What reading an extent gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ExtentState {
    /// It has to be read.
    Data,
    /// It reads as zeroes: a hole, or written so. It need not be read.
    Zero,
}

/// A range and its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    pub range: ByteRange,
    pub state: ExtentState,
}

/// A set of bytes, kept as sorted ranges that neither overlap nor touch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RangeSet {
    ranges: Vec<ByteRange>,
}

impl RangeSet {
    /// Returns the empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the set of `[0, len)`.
    pub fn whole(len: u64) -> Self {
        ByteRange::new(0, len).into_iter().collect()
    }

    /// Returns the ranges in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = ByteRange> + '_ {
        self.ranges.iter().copied()
    }

    /// Returns the ranges as a slice, in order.
    pub fn as_slice(&self) -> &[ByteRange] {
        &self.ranges
    }

    /// Returns how many ranges there are.
    pub fn count(&self) -> usize {
        self.ranges.len()
    }

    /// Returns true if no byte is in the set.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Returns how many bytes are in the set.
    pub fn total_bytes(&self) -> u64 {
        self.ranges.iter().map(ByteRange::len).fold(0, u64::saturating_add)
    }

    /// Adds a range that starts at or after the last one's start: O(1), for building in order.
    pub fn push(&mut self, range: ByteRange) {
        match self.ranges.last_mut() {
            Some(last) if range.start() < last.start() => self.insert_all([range]),
            Some(last) if range.start() <= last.end() => {
                if range.end() > last.end() {
                    last.len = range.end() - last.start;
                }
            }
            _ => self.ranges.push(range),
        }
    }

    fn insert_all(&mut self, more: impl IntoIterator<Item = ByteRange>) {
        let mut all = std::mem::take(&mut self.ranges);
        all.extend(more);
        all.sort_unstable();
        for range in all {
            self.push(range);
        }
    }

    /// Returns the bytes in either set.
    pub fn union(&self, other: &Self) -> Self {
        let mut result = self.clone();
        result.insert_all(other.iter());
        result
    }

    /// Returns the bytes in both sets.
    pub fn intersection(&self, other: &Self) -> Self {
        let mut result = Self::new();
        let (mut left, mut right) = (self.iter().peekable(), other.iter().peekable());
        while let (Some(a), Some(b)) = (left.peek(), right.peek()) {
            if let Some(both) = a.intersection(b) {
                result.push(both);
            }
            if a.end() <= b.end() {
                left.next();
            } else {
                right.next();
            }
        }
        result
    }

    /// Returns the bytes of `[0, len)` that are not in the set.
    pub fn complement(&self, len: u64) -> Self {
        let mut result = Self::new();
        let mut position = 0;
        for range in self.iter() {
            if let Some(gap) = ByteRange::between(position, range.start().min(len)) {
                result.push(gap);
            }
            position = position.max(range.end());
        }
        if let Some(gap) = ByteRange::between(position, len) {
            result.push(gap);
        }
        result
    }

    /// Returns the bytes of this set that are not in the other.
    pub fn difference(&self, other: &Self) -> Self {
        let end = self.ranges.last().map_or(0, ByteRange::end);
        self.intersection(&other.complement(end))
    }

    /// Returns the set with every range widened to whole blocks of `block` bytes, ending at `limit` at most.
    pub fn aligned_out(&self, block: u64, limit: u64) -> Self {
        self.iter().filter_map(|range| range.aligned_out(block, limit)).collect()
    }
}

impl FromIterator<ByteRange> for RangeSet {
    fn from_iter<I: IntoIterator<Item = ByteRange>>(ranges: I) -> Self {
        let mut result = Self::new();
        result.insert_all(ranges);
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sets() -> impl Strategy<Value = Vec<bool>> {
        proptest::collection::vec(any::<bool>(), 0..64)
    }

    fn set_of(bits: &[bool]) -> RangeSet {
        bits.iter()
            .enumerate()
            .filter(|(_, bit)| **bit)
            .filter_map(|(i, _)| ByteRange::new(i as u64, 1))
            .collect()
    }

    fn bits_of(set: &RangeSet, len: usize) -> Vec<bool> {
        let mut bits = vec![false; len];
        for range in set.iter() {
            for position in range.start()..range.end() {
                bits[position as usize] = true;
            }
        }
        bits
    }

    proptest! {
        #[test]
        fn set_operations_agree_with_bits(a in sets(), b in sets()) {
            let len = 64;
            let (left, right) = (set_of(&a), set_of(&b));
            let bit = |bits: &[bool], i: usize| bits.get(i).copied().unwrap_or(false);
            let expect = |f: &dyn Fn(bool, bool) -> bool| -> Vec<bool> {
                (0..len).map(|i| f(bit(&a, i), bit(&b, i))).collect()
            };
            prop_assert_eq!(bits_of(&left.union(&right), len), expect(&|x, y| x || y));
            prop_assert_eq!(bits_of(&left.intersection(&right), len), expect(&|x, y| x && y));
            prop_assert_eq!(bits_of(&left.difference(&right), len), expect(&|x, y| x && !y));
            prop_assert_eq!(bits_of(&left.complement(len as u64), len), expect(&|x, _| !x));
            for set in [left.union(&right), left.intersection(&right), left.difference(&right)] {
                prop_assert!(set.as_slice().windows(2).all(|pair| pair[0].end() < pair[1].start()));
            }
        }
    }

    #[test]
    fn ranges_cannot_be_empty_or_wrap() {
        assert_eq!(ByteRange::new(5, 0), None);
        assert_eq!(ByteRange::new(u64::MAX, 2), None);
        assert_eq!(ByteRange::between(7, 3), None);
    }

    #[test]
    fn aligning_stops_at_the_limit() {
        let range = ByteRange::new(5000, 100).and_then(|range| range.aligned_out(4096, 8000));
        assert_eq!(range, ByteRange::new(4096, 3904));
    }
}

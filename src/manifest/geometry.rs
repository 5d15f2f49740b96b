//! The arithmetic of a tree.

use crate::error::{Error, FormatFault, Result};
use crate::extent::ByteRange;
use crate::format::config::Config;
use crate::format::limits::{FANOUT_RANGE, LEAF_LEN_RANGE};

/// How a repository's trees divide a disk. Both numbers are powers of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    leaf_len: u64,
    fanout: u32,
}

/// A place in a tree: the `number`th node from the left of all that a level may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// 0 for leaves.
    pub(super) level: u8,
    pub(super) number: u64,
}

impl Geometry {
    /// Creates a geometry of leaves of `leaf_len` bytes and nodes of at most `fanout` children.
    ///
    /// # Errors
    /// [`Error::Malformed`] for numbers out of the format's bounds.
    pub fn new(leaf_len: u64, fanout: u32) -> Result<Self> {
        let invalid = |what, found| {
            Err(Error::malformed("the repository's config", FormatFault::Invalid { what, found }))
        };
        if !leaf_len.is_power_of_two() || !LEAF_LEN_RANGE.contains(&leaf_len) {
            return invalid("leaf_len", leaf_len.to_string());
        }
        if !fanout.is_power_of_two() || !FANOUT_RANGE.contains(&fanout) {
            return invalid("fanout", fanout.to_string());
        }
        Ok(Self { leaf_len, fanout })
    }

    /// Returns the geometry of a repository's trees.
    ///
    /// # Errors
    /// As [`Geometry::new`].
    pub fn of(config: &Config) -> Result<Self> {
        Self::new(config.leaf_len, config.fanout)
    }

    /// Bytes of a disk that a leaf covers.
    pub fn leaf_len(&self) -> u64 {
        self.leaf_len
    }

    /// Most children of an inner node.
    pub fn fanout(&self) -> u32 {
        self.fanout
    }

    fn fanout_shift(&self, levels: u8) -> u32 {
        self.fanout.trailing_zeros() * u32::from(levels)
    }

    /// Returns the bytes that a node of a level covers; `u64::MAX` if they are more.
    pub fn span(&self, level: u8) -> u64 {
        let shift = self.leaf_len.trailing_zeros() + self.fanout_shift(level);
        1u64.checked_shl(shift).unwrap_or(u64::MAX)
    }

    /// Returns the level of the root of a disk of `size` bytes: the lowest that covers it.
    pub fn height_for(&self, size: u64) -> u8 {
        // at most 63 bits are left to cover, a level covers at least one
        (0..=u8::MAX).find(|level| self.span(*level) >= size).unwrap_or(u8::MAX)
    }

    /// Returns how many leaves a disk of `size` bytes has, zero ones included.
    pub fn leaf_count(&self, size: u64) -> u64 {
        size.div_ceil(self.leaf_len)
    }

    /// Returns the range that a leaf covers on a disk of `size` bytes; `None` if it is beyond its end.
    pub fn leaf_range(&self, number: u64, size: u64) -> Option<ByteRange> {
        self.range(Place { level: 0, number }, size)
    }

    /// Returns the range that a place covers on a disk of `size` bytes; `None` if it is beyond its end.
    pub(super) fn range(&self, place: Place, size: u64) -> Option<ByteRange> {
        let span = self.span(place.level);
        let start = place.number.checked_mul(span)?;
        ByteRange::between(start, start.saturating_add(span).min(size))
    }

    /// Returns the place of a child.
    pub(super) fn child(&self, place: Place, slot: u16) -> Option<Place> {
        let number = place.number.checked_mul(u64::from(self.fanout))?.checked_add(u64::from(slot))?;
        Some(Place { level: place.level.checked_sub(1)?, number })
    }

    /// Returns the place `levels` above.
    pub(super) fn above(&self, place: Place, levels: u8) -> Place {
        let number = place.number.checked_shr(self.fanout_shift(levels)).unwrap_or(0);
        Place { level: place.level.saturating_add(levels), number }
    }

    /// Returns the slot of a place in its parent.
    // the mask leaves at most 10 bits
    #[allow(clippy::cast_possible_truncation)]
    pub(super) fn slot(&self, place: Place) -> u16 {
        (place.number & u64::from(self.fanout - 1)) as u16
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::limits::{MAX_DISK_LEN, MAX_TREE_HEIGHT};

    #[test]
    fn every_allowed_disk_has_an_allowed_height() {
        for leaf_shift in 16..=26 {
            for fanout_shift in 1..=10 {
                let geometry = Geometry::new(1 << leaf_shift, 1 << fanout_shift).unwrap();
                assert!(geometry.height_for(MAX_DISK_LEN) <= MAX_TREE_HEIGHT);
                for size in [0, 1, 1 << leaf_shift, (1 << leaf_shift) + 1, 1 << 40, MAX_DISK_LEN] {
                    let height = geometry.height_for(size);
                    assert!(geometry.span(height) >= size);
                    assert!(height == 0 || geometry.span(height - 1) < size);
                }
            }
        }
        assert!(Geometry::new(1 << 15, 2).is_err() && Geometry::new(100_000, 2).is_err());
        assert!(Geometry::new(1 << 20, 1).is_err() && Geometry::new(1 << 20, 48).is_err());
    }

    #[test]
    fn places_know_their_neighbours() {
        let geometry = Geometry::new(1 << 20, 16).unwrap();
        let place = Place { level: 0, number: 0x1234 };
        assert_eq!(geometry.slot(place), 4);
        let parent = geometry.above(place, 1);
        assert_eq!(parent, Place { level: 1, number: 0x123 });
        assert_eq!(geometry.child(parent, 4), Some(place));
        assert_eq!(geometry.above(place, 60), Place { level: 60, number: 0 });
        assert_eq!(geometry.leaf_range(2, (2 << 20) + 5), ByteRange::new(2 << 20, 5));
        assert_eq!(geometry.leaf_range(3, (2 << 20) + 5), None);
        assert_eq!(geometry.leaf_range(u64::MAX, u64::MAX), None);
        assert_eq!((geometry.leaf_count(0), geometry.leaf_count((2 << 20) + 5)), (0, 3));
    }
}

//! Where the content of disks comes from: a running domain, an NBD export, an image file, a block device.

use crate::error::Result;
use crate::extent::{ByteRange, RangeSet};
use crate::monitor::Monitor;

mod ahead;
#[cfg(feature = "libvirt")]
pub mod domain;
pub mod image;
pub mod nbd;
pub mod qemu_nbd;

pub use crate::buffer::Payload;

/// The size of the windows of a disk that no buffer of [`DiskSource::read`] crosses, in bytes.
pub const READ_WINDOW: u64 = 1 << 20;

/// One disk (or image) at one instant, readable at any position.
pub trait DiskSource: Send {
    /// Returns a name for messages and progress: "vda of web01", a path, a URI.
    fn label(&self) -> String;

    /// Returns the size of the disk in bytes.
    fn size(&self) -> u64;

    /// Returns what the dirty bitmap says changed; `None` where there is no bitmap to ask, so that the
    /// whole disk is a candidate.
    ///
    /// # Errors
    /// [`Error::Cancelled`](crate::error::Error::Cancelled), or what the source answers or refuses.
    fn dirty(&mut self, monitor: &dyn Monitor) -> Result<Option<RangeSet>>;

    /// Returns which bytes of `within` have to be read: the others of them read as zero.
    ///
    /// # Errors
    /// As for [`DiskSource::dirty`].
    fn data(&mut self, within: &RangeSet, monitor: &dyn Monitor) -> Result<RangeSet>;

    /// Reads `ranges` in order into `sink`, every byte once. Each buffer lies within one window of
    /// [`READ_WINDOW`] bytes and has the length of its range.
    ///
    /// # Errors
    /// As for [`DiskSource::dirty`]; a range beyond the disk; and what `sink` returns, after which nothing
    /// more is read.
    fn read(
        &mut self,
        ranges: &RangeSet,
        monitor: &dyn Monitor,
        sink: &mut dyn FnMut(ByteRange, Payload) -> Result<()>,
    ) -> Result<()>;
}

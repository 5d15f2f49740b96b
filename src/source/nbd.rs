//! An export of an NBD server as a disk.

use super::{DiskSource, Payload};
use crate::error::Result;
use crate::extent::{ByteRange, RangeSet};
use crate::monitor::Monitor;
use crate::nbd::{
    ALLOCATION_CONTEXT, Address, Connection, DIRTY_BITMAP_PREFIX, IN_FLIGHT, Options, STATE_DIRTY, STATE_ZERO,
};

/// Extents that are kept of what the server says of the whole disk, 16 bytes each.
const MAX_KEPT_EXTENTS: usize = 1 << 18;

/// An open export.
pub struct NbdDisk {
    label: String,
    connection: Connection,
    has_bitmap: bool,
    /// What holds data on the whole disk, where that was told beside the bitmap.
    allocated: Option<RangeSet>,
}

impl NbdDisk {
    /// Connects to an export, with the dirty bitmap of that name where one is given.
    ///
    /// # Errors
    /// As [`Connection::open`]; a bitmap that the server does not have is an error.
    pub fn open(
        address: &Address,
        export: &str,
        dirty_bitmap: Option<&str>,
        label: String,
        monitor: &dyn Monitor,
    ) -> Result<Self> {
        let mut contexts = vec![ALLOCATION_CONTEXT.to_owned()];
        contexts.extend(dirty_bitmap.map(|name| format!("{DIRTY_BITMAP_PREFIX}{name}")));
        let connection = Connection::open(address, export, &contexts, &Options::default(), monitor)?;
        Ok(Self { label, connection, has_bitmap: dirty_bitmap.is_some(), allocated: None })
    }
}

impl DiskSource for NbdDisk {
    fn label(&self) -> String {
        self.label.clone()
    }

    fn size(&self) -> u64 {
        self.connection.size()
    }

    fn dirty(&mut self, monitor: &dyn Monitor) -> Result<Option<RangeSet>> {
        if !self.has_bitmap {
            return Ok(None);
        }
        let mut dirty = RangeSet::new();
        // both contexts come in one reply: to ask for each dirty range anew would take a round trip each
        let (mut allocated, mut extents) = (RangeSet::new(), 0);
        if let Some(whole) = ByteRange::new(0, self.size()) {
            self.connection.block_status(whole, monitor, &mut |context, range, state| {
                if context == 1 && state & STATE_DIRTY != 0 {
                    dirty.push(range);
                }
                if context == 0 && state & STATE_ZERO == 0 && extents < MAX_KEPT_EXTENTS {
                    allocated.push(range);
                    extents += 1;
                }
                Ok(())
            })?;
        }
        self.allocated = (extents < MAX_KEPT_EXTENTS).then_some(allocated);
        Ok(Some(dirty))
    }

    fn data(&mut self, within: &RangeSet, monitor: &dyn Monitor) -> Result<RangeSet> {
        if let Some(allocated) = &self.allocated {
            return Ok(allocated.intersection(within));
        }
        let mut data = RangeSet::new();
        for range in within.iter() {
            self.connection.block_status(range, monitor, &mut |context, range, state| {
                if context == 0 && state & STATE_ZERO == 0 {
                    data.push(range);
                }
                Ok(())
            })?;
        }
        Ok(data)
    }

    fn read(
        &mut self,
        ranges: &RangeSet,
        monitor: &dyn Monitor,
        sink: &mut dyn FnMut(ByteRange, Payload) -> Result<()>,
    ) -> Result<()> {
        self.connection.read_pipelined(&mut ranges.iter(), IN_FLIGHT, monitor, sink)
    }
}

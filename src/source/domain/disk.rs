//! A disk of a domain as a source: what its server exports, seen with the domain in mind.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::ffi::{Guest, NO_DOMAIN, Power};
use crate::error::{Error, Result};
use crate::extent::{ByteRange, RangeSet};
use crate::monitor::Monitor;
use crate::source::{DiskSource, Payload};

/// How long libvirt may take to notice that a QEMU is gone whose connection broke.
const NOTICE: Duration = Duration::from_millis(100);
const NOTICES: u32 = 20;

/// One disk of a domain.
pub(super) struct GuestDisk {
    label: String,
    /// Bytes.
    size: u64,
    /// `None` once reading it has failed.
    inner: Option<Box<dyn DiskSource>>,
    /// The size of the disk when its bitmap began, in bytes; `None` if it is read in full.
    size_then: Option<u64>,
    /// The domain that runs, to tell why a connection broke.
    guest: Option<Arc<Guest>>,
}

impl GuestDisk {
    pub fn new(inner: Box<dyn DiskSource>, size_then: Option<u64>, guest: Option<Arc<Guest>>) -> Self {
        Self { label: inner.label(), size: inner.size(), inner: Some(inner), size_then, guest }
    }

    fn inner(&mut self) -> Result<&mut Box<dyn DiskSource>> {
        let gone =
            || Error::Unreachable { object: self.label.clone(), reason: "reading it failed before".into() };
        self.inner.as_mut().ok_or_else(gone)
    }

    /// Puts the domain's end before the broken connection that it caused.
    fn explain<T>(&mut self, result: Result<T>) -> Result<T> {
        let (Err(error @ (Error::Nbd { .. } | Error::Io { .. })), Some(guest)) = (&result, &self.guest)
        else {
            return result;
        };
        // A QEMU that is to stop first waits until the replies that it owes are read, and meanwhile libvirt does
        // not answer for the domain; after 15 s it kills QEMU, whose bitmaps are lost then.
        self.inner = None;
        for _ in 0..NOTICES {
            let reason = match (guest.power(), guest.backup_xml()) {
                (Ok(Power::Off), _) => "it stopped while it was being backed up",
                (Err(fault), _) if fault.code == NO_DOMAIN => "it stopped while it was being backed up",
                (Ok(_), Ok(None)) => "its backup job was ended by somebody else",
                // libvirt cannot be asked
                (Err(_), _) => return result,
                _ => {
                    thread::sleep(NOTICE);
                    continue;
                }
            };
            let reason = format!("{reason} ({error})");
            return Err(Error::Unreachable { object: guest.object(), reason });
        }
        result
    }
}

impl DiskSource for GuestDisk {
    fn label(&self) -> String {
        self.label.clone()
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn dirty(&mut self, monitor: &dyn Monitor) -> Result<Option<RangeSet>> {
        let Some(size_then) = self.size_then else { return Ok(None) };
        let dirty = self.inner()?.dirty(monitor);
        let dirty = self.explain(dirty)?;
        // nobody marked what was added to the disk: it was not there
        let grown: RangeSet = ByteRange::between(size_then, self.size()).into_iter().collect();
        Ok(dirty.map(|dirty| dirty.union(&grown)))
    }

    fn data(&mut self, within: &RangeSet, monitor: &dyn Monitor) -> Result<RangeSet> {
        let data = self.inner()?.data(within, monitor);
        self.explain(data)
    }

    fn read(
        &mut self,
        ranges: &RangeSet,
        monitor: &dyn Monitor,
        sink: &mut dyn FnMut(ByteRange, Payload) -> Result<()>,
    ) -> Result<()> {
        let mut sink_failed = false;
        let read = self.inner()?.read(ranges, monitor, &mut |range, payload| {
            sink(range, payload).inspect_err(|_| sink_failed = true)
        });
        if sink_failed { read } else { self.explain(read) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::Recorder;

    /// A disk of which the first block is dirty.
    struct Still(u64);

    impl DiskSource for Still {
        fn label(&self) -> String {
            "still".into()
        }

        fn size(&self) -> u64 {
            self.0
        }

        fn dirty(&mut self, _: &dyn Monitor) -> Result<Option<RangeSet>> {
            Ok(Some(RangeSet::whole(4096)))
        }

        fn data(&mut self, within: &RangeSet, _: &dyn Monitor) -> Result<RangeSet> {
            Ok(within.clone())
        }

        fn read(
            &mut self,
            ranges: &RangeSet,
            _: &dyn Monitor,
            sink: &mut dyn FnMut(ByteRange, Payload) -> Result<()>,
        ) -> Result<()> {
            ranges.iter().try_for_each(|range| sink(range, Payload::Zero))
        }
    }

    #[test]
    fn what_a_disk_grew_by_is_dirty() {
        let dirty =
            |size_then| GuestDisk::new(Box::new(Still(65_536)), size_then, None).dirty(&Recorder::new());
        assert_eq!(dirty(None).unwrap(), None, "read in full");
        assert_eq!(dirty(Some(65_536)).unwrap(), Some(RangeSet::whole(4096)));
        let grown = RangeSet::whole(4096).union(&ByteRange::new(32_768, 32_768).into_iter().collect());
        assert_eq!(dirty(Some(32_768)).unwrap(), Some(grown));
    }
}

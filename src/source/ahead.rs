//! Reading a file or a device in order, by several threads ahead of who takes what was read.
//!
//! What is in the page cache is taken from there. Else most is read around it: a backup reads a disk once, and in the
//! cache it would only push out what the host's guests use; making room there costs about as much as hashing the content.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, IoSliceMut};
use std::num::NonZeroU64;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::fs::{Advice, OFlags};
use rustix::io::ReadWriteFlags;

use super::{Payload, READ_WINDOW};
use crate::buffer::{ALIGN, Buffer, BufferPool};
use crate::error::{Error, Result};
use crate::extent::{ByteRange, RangeSet};
use crate::monitor::Monitor;

/// Threads that read: a fast disk is idle while one of them hands on what it has read, and at every hole.
const READERS: usize = 3;
/// Groups of ranges that are read ahead, each of about a read's length, around the page cache: while new content is compressed
/// the disk reads on, and where the content is known the cores do not wait for it. 40 MiB, and up to three times that where windows
/// are half full, or a little more.
const AHEAD_GROUPS: usize = 40;
/// Of what is in the page cache: more would only leave the processor's caches before it is looked at.
const CACHED_AHEAD_GROUPS: usize = 6;
/// So much of a window is worth to be read around the page cache. Bytes.
const MIN_DIRECT_LEN: u64 = 32 << 10;
/// One of so many groups is looked for in the page cache, and the others believed to be where it is: a look at what is not
/// there has the system read it.
const GROUPS_A_LOOK: u64 = 16;

/// Ranges that are read together, each within one window; and their number.
type Group = (u64, Vec<ByteRange>);
/// What was read of a group.
type Contents = (u64, std::io::Result<Vec<(ByteRange, Buffer)>>);

/// Reads `ranges` of a file in order into `sink`, each buffer within one window of [`READ_WINDOW`] bytes.
///
/// # Errors
/// [`Error::Io`] with the file's `path`, [`Error::Cancelled`], and what `sink` returns.
pub(super) fn read_in_order(
    file: &File,
    path: &Path,
    ranges: &RangeSet,
    monitor: &dyn Monitor,
    sink: &mut dyn FnMut(ByteRange, Payload) -> Result<()>,
) -> Result<()> {
    let reader = &AheadReader::new(file);
    std::thread::scope(|scope| {
        let (group_sender, group_receiver) = bounded::<Group>(AHEAD_GROUPS);
        let (sender, receiver) = bounded::<Contents>(AHEAD_GROUPS);
        for _ in 0..READERS {
            let (groups, contents) = (group_receiver.clone(), sender.clone());
            scope.spawn(move || reader.run(&groups, &contents));
        }
        drop((group_receiver, sender));
        let mut groups = (0..).zip(Groups::new(ranges));
        let mut early = BTreeMap::new();
        let (mut sent, mut next) = (0, 0);
        loop {
            // where the content is shows with the first group
            let ahead = if next > 0 && reader.reads_around() { AHEAD_GROUPS } else { CACHED_AHEAD_GROUPS };
            while sent < next + ahead as u64
                && let Some(group) = groups.next()
            {
                group_sender.send(group).map_err(|_| Error::Cancelled)?;
                sent += 1;
            }
            if next == sent {
                return Ok(());
            }
            monitor.check()?;
            let Some(contents) = early.remove(&next) else {
                let (number, contents) = receiver.recv().map_err(|_| Error::Cancelled)?;
                early.insert(number, contents);
                continue;
            };
            next += 1;
            for (part, bytes) in contents.map_err(|error| Error::io("read", path.display(), error))? {
                sink(part, Payload::Data(bytes))?;
            }
        }
    })
}

/// Ranges cut at windows, in groups of at least a window's length together.
struct Groups<'a> {
    ranges: std::slice::Iter<'a, ByteRange>,
    rest: Option<ByteRange>,
}

impl<'a> Groups<'a> {
    fn new(ranges: &'a RangeSet) -> Self {
        Self { ranges: ranges.as_slice().iter(), rest: None }
    }
}

impl Iterator for Groups<'_> {
    type Item = Vec<ByteRange>;

    fn next(&mut self) -> Option<Vec<ByteRange>> {
        let (mut group, mut group_len) = (Vec::new(), 0);
        while group_len < READ_WINDOW
            && let Some(range) = self.rest.take().or_else(|| self.ranges.next().copied())
        {
            let window_end = (range.start() / READ_WINDOW + 1).saturating_mul(READ_WINDOW);
            let end = range.end().min(window_end);
            self.rest = ByteRange::between(end, range.end());
            let part = ByteRange::between(range.start(), end)?;
            group_len += part.len();
            group.push(part);
        }
        (!group.is_empty()).then_some(group)
    }
}

/// What the readers of a file share.
struct AheadReader<'a> {
    file: &'a File,
    /// The same file around the page cache, where the file system can.
    direct: Option<File>,
    /// Falls when a read shows that it cannot.
    is_direct: AtomicBool,
    /// What was looked for in the page cache was there.
    is_cached: AtomicBool,
    pool: Arc<BufferPool>,
}

impl<'a> AheadReader<'a> {
    fn new(file: &'a File) -> Self {
        let direct = open_direct(file);
        Self {
            file,
            is_direct: AtomicBool::new(direct.is_some()),
            direct,
            is_cached: AtomicBool::new(false),
            pool: BufferPool::new(usize::try_from(READ_WINDOW).unwrap_or(0)),
        }
    }

    /// Reads groups until there are no more, or nobody takes them.
    fn run(&self, groups: &Receiver<Group>, contents: &Sender<Contents>) {
        for (number, group) in groups {
            let read = AssertUnwindSafe(|| self.read_group(number, &group));
            // whoever waits for this group would wait for ever
            let read =
                catch_unwind(read).unwrap_or_else(|_| Err(std::io::Error::other("a reader has failed")));
            if contents.send((number, read)).is_err() {
                return;
            }
        }
    }

    fn read_group(&self, number: u64, group: &[ByteRange]) -> std::io::Result<Vec<(ByteRange, Buffer)>> {
        if let Some(first) = group.first()
            && number.is_multiple_of(GROUPS_A_LOOK)
            && self.is_direct.load(Ordering::Relaxed)
        {
            self.is_cached.store(self.is_in_cache(first.start()), Ordering::Relaxed);
        }
        let mut contents = Vec::with_capacity(group.len());
        for parts in group.chunk_by(|one, next| one.start() / READ_WINDOW == next.start() / READ_WINDOW) {
            if !self.read_around(parts, &mut contents)? {
                self.read_through(parts, &mut contents)?;
            }
        }
        Ok(contents)
    }

    /// Returns true if reads go around the page cache, where they are worth it.
    fn reads_around(&self) -> bool {
        self.is_direct.load(Ordering::Relaxed) && !self.is_cached.load(Ordering::Relaxed)
    }

    /// Returns true if a byte can be had at once.
    fn is_in_cache(&self, at: u64) -> bool {
        let mut byte = [0];
        let mut one = [IoSliceMut::new(&mut byte)];
        matches!(rustix::io::preadv2(self.file, &mut one, at, ReadWriteFlags::NOWAIT), Ok(1))
    }

    /// Reads parts of one window around the page cache: all that lies between them at once, since holes cost hardly anything.
    /// Returns false, and has read nothing, where that is not possible or not worth it.
    fn read_around(
        &self,
        parts: &[ByteRange],
        contents: &mut Vec<(ByteRange, Buffer)>,
    ) -> std::io::Result<bool> {
        let (Some(direct), [first, ..], [.., last]) = (&self.direct, parts, parts) else { return Ok(false) };
        if !self.reads_around() || parts.iter().map(ByteRange::len).sum::<u64>() < MIN_DIRECT_LEN {
            return Ok(false);
        }
        let start = first.start() - first.start() % ALIGN as u64;
        let place = |position: u64| usize::try_from(position - start).unwrap_or(usize::MAX);
        // a file may end before the last block does
        let needed = place(last.end());
        let mut bytes = self.pool.take(needed.next_multiple_of(ALIGN));
        match read_at_least(direct, &mut bytes, needed, start) {
            Err(error) if error.kind() == ErrorKind::InvalidInput => {
                self.is_direct.store(false, Ordering::Relaxed);
                return Ok(false);
            }
            other => other?,
        }
        bytes.truncate(needed);
        if let [part] = parts
            && part.start() == start
        {
            contents.push((*part, bytes));
            return Ok(true);
        }
        contents.extend(parts.iter().map(|part| {
            let own = bytes.get(place(part.start())..place(part.end())).unwrap_or_default();
            (*part, own.to_vec().into())
        }));
        Ok(true)
    }

    /// Reads parts through the page cache, each for itself.
    fn read_through(
        &self,
        parts: &[ByteRange],
        contents: &mut Vec<(ByteRange, Buffer)>,
    ) -> std::io::Result<()> {
        for part in parts {
            // a hint: what cannot be fetched cannot be read either, and that is noticed then
            let len = NonZeroU64::new(part.len());
            let _ = rustix::fs::fadvise(self.file, part.start(), len, Advice::WillNeed);
        }
        for part in parts {
            // within a window
            let mut bytes = self.pool.take(usize::try_from(part.len()).unwrap_or(usize::MAX));
            self.file.read_exact_at(&mut bytes, part.start())?;
            contents.push((*part, bytes));
        }
        Ok(())
    }
}

/// Reads at least `needed` bytes from `offset` on, and more up to the buffer's length where there is more.
fn read_at_least(file: &File, buffer: &mut [u8], needed: usize, offset: u64) -> std::io::Result<()> {
    let mut filled = 0;
    while filled < needed {
        let rest = buffer.get_mut(filled..).unwrap_or_default();
        match file.read_at(rest, offset + filled as u64) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Opens an open file once more for reading around the page cache; `None` where that is not possible.
fn open_direct(file: &File) -> Option<File> {
    let flags = i32::try_from((OFlags::DIRECT | OFlags::NONBLOCK).bits()).ok()?;
    // by its name it might be another file by now
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    OpenOptions::new().read(true).custom_flags(flags).open(path).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::Recorder;

    /// A file with content of all lengths, and the ranges of it that are read.
    fn example(directory: &Path) -> (File, Vec<u8>, RangeSet) {
        let mut content = vec![0; (9 << 20) + 777];
        blake3::Hasher::new().update(b"ahead").finalize_xof().fill(&mut content);
        let path = directory.join("disk");
        std::fs::write(&path, &content).unwrap();
        let range = |start, end| ByteRange::between(start, end).unwrap();
        let small = (0..300).map(|n| range((5 << 20) + n * 8192, (5 << 20) + n * 8192 + 4096));
        let long = [
            range(4096, (3 << 20) + 8192),
            range(4 << 20, (4 << 20) + 513),
            range(8 << 20, content.len() as u64),
        ];
        let ranges = small.chain(long).collect();
        (File::open(path).unwrap(), content, ranges)
    }

    fn read(file: &File, ranges: &RangeSet) -> Result<Vec<(ByteRange, Payload)>> {
        let mut parts = Vec::new();
        read_in_order(file, Path::new("disk"), ranges, &Recorder::new(), &mut |part, payload| {
            parts.push((part, payload));
            Ok(())
        })?;
        Ok(parts)
    }

    fn check(directory: &Path) {
        let (file, content, ranges) = example(directory);
        for is_dropped in [true, false, true] {
            if is_dropped {
                file.sync_all().unwrap();
                let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
            }
            let parts = read(&file, &ranges).unwrap();
            let met: RangeSet = parts.iter().map(|(part, _)| *part).collect();
            assert_eq!(met, ranges);
            assert!(parts.windows(2).all(|two| two[0].0.end() <= two[1].0.start()));
            for (part, payload) in &parts {
                let Payload::Data(bytes) = payload else { panic!("{part}") };
                assert_eq!(part.start() / READ_WINDOW, (part.end() - 1) / READ_WINDOW);
                assert!(**bytes == content[part.start() as usize..part.end() as usize], "{part}");
            }
        }
    }

    #[test]
    fn every_byte_comes_once_and_in_order() {
        check(tempfile::tempdir().unwrap().path());
        // a file system in memory may know no other way than its cache
        if let Ok(memory) = tempfile::tempdir_in("/dev/shm") {
            check(memory.path());
        }
    }

    #[test]
    fn a_file_that_ends_too_soon_and_a_sink_that_fails_end_it() {
        let directory = tempfile::tempdir().unwrap();
        let (file, content, _) = example(directory.path());
        let beyond = RangeSet::whole(content.len() as u64 + 1);
        let error = read(&file, &beyond).unwrap_err();
        assert!(matches!(&error, Error::Io { .. }), "{error}");
        let mut left = 3;
        let mut sink = |_, _| {
            left -= 1;
            if left > 0 { Ok(()) } else { Err(Error::Usage("enough".into())) }
        };
        let whole = RangeSet::whole(content.len() as u64);
        let ended = read_in_order(&file, Path::new("disk"), &whole, &Recorder::new(), &mut sink);
        assert!(matches!(ended, Err(Error::Usage(_))));
    }
}

//! A raw image file, written around the page cache: what is restored is used by a QEMU that opens it anew, a copy in
//! the cache would only push other things out of it, and would have to be synced at the end.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::target::{DiskTarget, PartialFile};
use crate::buffer::to_aligned;
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::monitor::Monitor;
use crate::ops::content::{DiskBytes, Sink};
use crate::repo::is_zero;
use crate::storage::direct::{self, ALIGN};

/// Zeroes from this length on stay a hole; fewer cost less to write than another call. Bytes.
const MIN_HOLE_LEN: usize = 16 << 10;
/// Content that is written at once, bytes.
const WINDOW_LEN: usize = 1 << 20;
/// Windows that are filled, wait or are written.
const WINDOWS: usize = 16;
/// Threads that wait for the disk: with two of them it was idle at times.
const WRITERS: usize = 4;

/// Content of the file that lies together.
struct Window {
    /// One block more than it takes, so that there is an aligned place in it.
    memory: Vec<u8>,
    /// Where in the file, bytes.
    offset: u64,
    len: usize,
}

impl Window {
    fn new() -> Self {
        Self { memory: Vec::new(), offset: 0, len: 0 }
    }

    /// Returns where in the memory its content begins: aligned as its place in the file is.
    fn start(&self) -> usize {
        to_aligned(&self.memory) + usize::try_from(self.offset % ALIGN as u64).unwrap_or(0)
    }

    fn begin(&mut self, offset: u64) {
        // a small disk does not need all of them
        self.memory.resize(WINDOW_LEN + 2 * ALIGN, 0);
        self.offset = offset;
        self.len = 0;
    }

    fn end(&self) -> u64 {
        self.offset + self.len as u64
    }

    /// Takes as much as there is room for; returns the rest. A full window ends at a block's end.
    fn push<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let in_block = usize::try_from(self.offset % ALIGN as u64).unwrap_or(0);
        let room = (WINDOW_LEN - in_block).saturating_sub(self.len);
        let (now, rest) = bytes.split_at(room.min(bytes.len()));
        let from = self.start() + self.len;
        if let Some(place) = self.memory.get_mut(from..from + now.len()) {
            place.copy_from_slice(now);
        }
        self.len += now.len();
        rest
    }

    fn content(&self) -> &[u8] {
        let start = self.start();
        self.memory.get(start..start + self.len).unwrap_or_default()
    }
}

/// A new sparse file: what is not written reads as zero.
pub(super) struct RawTarget {
    partial: Option<PartialFile>,
    work: Arc<Work>,
    empty: Receiver<Window>,
    full: Option<Sender<Window>>,
    writers: Vec<JoinHandle<()>>,
}

impl RawTarget {
    pub fn create(path: &Path, size: u64, force: bool) -> Result<Self> {
        let partial = PartialFile::new(path, force)?;
        let file = partial.create()?;
        file.set_len(size).map_err(|source| Error::io("set the size of", path.display(), source))?;
        let direct = partial.open_direct();
        let work = Arc::new(Work {
            is_direct: AtomicBool::new(direct.is_some()),
            direct,
            file,
            path: path.to_path_buf(),
            failure: Mutex::default(),
        });
        let (give_back, empty) = bounded(WINDOWS);
        let (full, to_write) = bounded(WINDOWS);
        for _ in 0..WINDOWS {
            // there is room for all of them
            let _ = give_back.send(Window::new());
        }
        let writers = (0..WRITERS)
            .map(|_| {
                let (work, windows, give_back) = (Arc::clone(&work), to_write.clone(), give_back.clone());
                std::thread::spawn(move || work.write_all(&windows, &give_back))
            })
            .collect();
        Ok(Self { partial: Some(partial), work, empty, full: Some(full), writers })
    }

    /// Waits until everything is written.
    fn join(&mut self) {
        self.full = None;
        for writer in self.writers.drain(..) {
            if writer.join().is_err() {
                self.work.fail(Error::Cancelled);
            }
        }
    }

    fn put(&self, window: Window) -> Result<()> {
        if self.work.has_failed() {
            return Err(self.work.failed());
        }
        match &self.full {
            Some(full) => full.send(window).map_err(|_| self.work.failed()),
            None => Err(Error::Cancelled),
        }
    }
}

impl Drop for RawTarget {
    fn drop(&mut self) {
        self.join();
    }
}

impl Sink for RawTarget {
    fn write(&self, contents: Vec<DiskBytes>) -> Result<()> {
        let mut open: Option<Window> = None;
        for content in &contents {
            let (mut offset, mut bytes) = (content.offset, &*content.bytes);
            while !bytes.is_empty() {
                let mut window = match open.take() {
                    Some(window) if window.end() == offset => window,
                    other => {
                        other.map_or(Ok(()), |window| self.put(window))?;
                        let mut window = self.empty.recv().map_err(|_| self.work.failed())?;
                        window.begin(offset);
                        window
                    }
                };
                let rest = window.push(bytes);
                offset += (bytes.len() - rest.len()) as u64;
                bytes = rest;
                // what is left of it goes into another one
                if bytes.is_empty() { open = Some(window) } else { self.put(window)? }
            }
        }
        open.map_or(Ok(()), |window| self.put(window))
    }

    fn zero(&self, _range: ByteRange) -> Result<()> {
        Ok(())
    }
}

impl DiskTarget for RawTarget {
    fn finish(mut self: Box<Self>, _monitor: &dyn Monitor) -> Result<()> {
        self.join();
        if self.work.has_failed() {
            return Err(self.work.failed());
        }
        let Some(partial) = self.partial.take() else { return Err(Error::Cancelled) };
        self.work.file.sync_all().map_err(|source| Error::io("sync", partial.path.display(), source))?;
        partial.name()
    }
}

/// What the writers share.
struct Work {
    file: File,
    /// The same file without the page cache, where the file system can.
    direct: Option<File>,
    /// Falls when a write shows that it cannot.
    is_direct: AtomicBool,
    path: PathBuf,
    /// The first thing that went wrong.
    failure: Mutex<Option<Error>>,
}

impl Work {
    fn fail(&self, error: Error) {
        if let Ok(mut slot) = self.failure.lock() {
            slot.get_or_insert(error);
        }
    }

    fn has_failed(&self) -> bool {
        self.failure.lock().map_or(true, |slot| slot.is_some())
    }

    /// What a writer failed with; that nobody takes or returns windows is only what followed.
    fn failed(&self) -> Error {
        self.failure.lock().ok().and_then(|mut slot| slot.take()).unwrap_or(Error::Cancelled)
    }

    /// Writes until there is no more. After a failure the rest is dropped, so that nobody waits for room.
    fn write_all(&self, windows: &Receiver<Window>, give_back: &Sender<Window>) {
        for window in windows {
            if !self.has_failed()
                && let Err(source) = self.write(&window)
            {
                self.fail(Error::io("write", self.path.display(), source));
            }
            let _ = give_back.send(window);
        }
    }

    /// Writes what is not zero. Parts of blocks, at both ends, go through the page cache: another part of the
    /// same block may come from another window.
    fn write(&self, window: &Window) -> std::io::Result<()> {
        let content = window.content();
        let to_block = window.offset.next_multiple_of(ALIGN as u64) - window.offset;
        let head = usize::try_from(to_block).unwrap_or(0).min(content.len());
        let (before, rest) = content.split_at(head);
        let (blocks, after) = rest.split_at(rest.len() / ALIGN * ALIGN);
        self.write_part(before, window.offset)?;
        let first = window.offset + head as u64;
        let mut run = 0..0;
        for (number, block) in blocks.chunks(ALIGN).enumerate() {
            if is_zero(block) {
                continue;
            }
            let start = number * ALIGN;
            if run.end + MIN_HOLE_LEN <= start || run.is_empty() {
                self.write_blocks(blocks.get(run.clone()).unwrap_or_default(), first + run.start as u64)?;
                run.start = start;
            }
            run.end = start + block.len();
        }
        self.write_blocks(blocks.get(run.clone()).unwrap_or_default(), first + run.start as u64)?;
        self.write_part(after, first + blocks.len() as u64)
    }

    fn write_part(&self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        if is_zero(bytes) { Ok(()) } else { self.file.write_all_at(bytes, offset) }
    }

    fn write_blocks(&self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        if let (true, Some(file)) = (self.is_direct.load(Ordering::Relaxed), &self.direct) {
            match file.write_all_at(bytes, offset) {
                Err(error) if direct::is_refusal(&error) => {
                    self.is_direct.store(false, Ordering::Relaxed);
                }
                other => return other,
            }
        }
        self.file.write_all_at(bytes, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::Recorder;
    use crate::repo::reader::ChunkBytes;

    /// Pieces of odd lengths, from several threads, with gaps: the file is what they say, and zeroes are holes.
    fn write_and_compare(directory: &Path) {
        let path = directory.join("disk.raw");
        let size = (9 << 20) + 512;
        let mut expected = vec![0u8; size];
        let mut pieces = Vec::new();
        let (mut offset, mut number) = (777, 0usize);
        while offset + 300_000 < size {
            let len = 1 + number * 7919 % 123_457;
            let fill = if number % 5 == 0 { 0 } else { number as u8 | 1 };
            expected[offset..offset + len].fill(fill);
            pieces.push((offset as u64, vec![fill; len]));
            offset += len + if number % 3 == 0 { 8192 + number } else { 0 };
            number += 1;
        }
        expected[size - 100..].fill(9);
        pieces.push(((size - 100) as u64, vec![9; 100]));
        let target = RawTarget::create(&path, size as u64, false).unwrap();
        std::thread::scope(|scope| {
            for half in pieces.chunks(pieces.len() / 2) {
                let target = &target;
                scope.spawn(move || {
                    for few in half.chunks(7) {
                        let few = few.iter().map(|(offset, bytes)| DiskBytes {
                            offset: *offset,
                            bytes: ChunkBytes::of(bytes.clone()),
                        });
                        target.write(few.collect()).unwrap();
                    }
                });
            }
        });
        Box::new(target).finish(&Recorder::new()).unwrap();
        assert!(std::fs::read(&path).unwrap() == expected);
    }

    #[test]
    fn odd_pieces_make_the_file() {
        write_and_compare(tempfile::tempdir().unwrap().path());
    }

    #[test]
    fn without_direct_writes() {
        // a file system in memory may know no other way
        let memory = Path::new("/dev/shm");
        if memory.is_dir() {
            write_and_compare(tempfile::tempdir_in(memory).unwrap().path());
        }
    }

    #[test]
    fn what_cannot_be_written_fails_and_leaves_nothing() {
        let full = Path::new("/dev/full");
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        let mut target = RawTarget::create(&path, 1 << 20, false).unwrap();
        target.join();
        let work = Work {
            file: File::options().write(true).open(full).unwrap(),
            direct: None,
            is_direct: AtomicBool::new(false),
            path: full.into(),
            failure: Mutex::default(),
        };
        let mut window = Window::new();
        window.begin(4096);
        window.push(&[1; 8192]);
        assert!(work.write(&window).is_err());
        drop(target);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}

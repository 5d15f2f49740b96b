//! Restoring into a hash: what a restore would write is there, in order, every byte once.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex};

use serde::Serialize;

use super::points::{add_range, maps};
use super::{Findings, VerifyReport};
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::name::ObjectName;
use crate::id::PointId;
use crate::monitor::Monitor;
use crate::ops::content::{DiskBytes, OnDamage, Sink, read_disk};
use crate::repo::PointEntry;
use crate::repo::reader::ChunkReader;

/// Zeroes hashed at once, bytes.
const ZERO_LEN: u64 = 1 << 20;

/// A disk that was restored into a hash.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RestoredHash {
    pub point: PointId,
    /// Target name of the disk, or name of a file kept beside the disks.
    pub disk: String,
    /// Bytes.
    pub size: u64,
    /// BLAKE3 of the content: `b3sum` of a raw image says the same.
    pub blake3: String,
}

/// Restores every disk of the points, reading several batches at once.
pub(super) fn restore_points(
    reader: &ChunkReader<'_>,
    points: &[&PointEntry],
    monitor: &dyn Monitor,
    findings: &mut Findings,
    report: &mut VerifyReport,
) -> Result<()> {
    for entry in points {
        let record = &entry.record;
        for (name, manifest) in maps(record) {
            let label = format!("{name} of {} {}", record.domain, record.id.short());
            let task = monitor.start(&label, manifest.size);
            let sink = Hash::new();
            let advance = |bytes| monitor.advance(task, bytes);
            let read = read_disk(reader, manifest, &sink, OnDamage::Fail, monitor, &advance);
            monitor.finish(task);
            match read.and_then(|_| sink.finish(manifest.size)) {
                Ok(blake3) => report.restored.push(RestoredHash {
                    point: record.id,
                    disk: name.to_owned(),
                    size: manifest.size,
                    blake3,
                }),
                Err(Error::Cancelled) => return Err(Error::Cancelled),
                Err(error) if error.is_damage() => {
                    let object = ObjectName::Outcome(record.id.into()).to_string();
                    let finding = findings.at(object, &format!("{name} cannot be restored: {error}"));
                    let known =
                        finding.affected.iter().any(|known| known.point == record.id && known.disk == name);
                    if let Some(whole) = ByteRange::new(0, manifest.size).filter(|_| !known) {
                        add_range(finding, record.id, &record.domain, name, whole);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// Content that may come before its turn; who brings more waits. Bytes.
const MAX_EARLY: usize = 32 << 20;

/// Puts pieces in order and hashes them. Batches are taken up in the order of the disk, so that somebody is always at
/// work on the one whose turn it is, and need not wait.
struct Hash {
    state: Mutex<State>,
    moved: Condvar,
}

struct State {
    hasher: blake3::Hasher,
    position: u64,
    early: BTreeMap<u64, Piece>,
    /// Bytes of content in them.
    early_len: usize,
    is_stopped: bool,
}

enum Piece {
    Data(Vec<u8>),
    Zero(u64),
}

impl Hash {
    fn new() -> Self {
        let state = State {
            hasher: blake3::Hasher::new(),
            position: 0,
            early: BTreeMap::new(),
            early_len: 0,
            is_stopped: false,
        };
        Self { state: Mutex::new(state), moved: Condvar::new() }
    }

    fn take(&self, offset: u64, piece: Piece) -> Result<()> {
        let mut state = self.state.lock().map_err(|_| Error::Cancelled)?;
        // zeroes take no memory, and who brings them may hold the content before them
        if let Piece::Data(bytes) = &piece {
            let must_wait = |state: &mut State| {
                offset > state.position && state.early_len + bytes.len() > MAX_EARLY && !state.is_stopped
            };
            state = self.moved.wait_while(state, must_wait).map_err(|_| Error::Cancelled)?;
            state.early_len += bytes.len();
        }
        if state.is_stopped {
            return Err(Error::Cancelled);
        }
        if offset < state.position || state.early.insert(offset, piece).is_some() {
            return Err(Error::Damaged(format!("byte {offset} is mapped twice")));
        }
        let State { hasher, position, early, early_len, .. } = &mut *state;
        while let Some(piece) = early.remove(position) {
            *position += match piece {
                Piece::Data(bytes) => {
                    hasher.update(&bytes);
                    *early_len -= bytes.len();
                    bytes.len() as u64
                }
                Piece::Zero(len) => {
                    hash_zeroes(hasher, len);
                    len
                }
            };
        }
        self.moved.notify_all();
        Ok(())
    }

    /// Returns the hash, if every byte of `size` has come.
    fn finish(self, size: u64) -> Result<String> {
        let state = self.state.into_inner().map_err(|_| Error::Cancelled)?;
        if state.position != size || !state.early.is_empty() {
            let position = state.position;
            return Err(Error::Damaged(format!(
                "the map ends or has a gap at {position}, the disk has {size} bytes"
            )));
        }
        Ok(state.hasher.finalize().to_hex().to_string())
    }
}

fn hash_zeroes(hasher: &mut blake3::Hasher, len: u64) {
    let zeroes = vec![0; usize::try_from(len.min(ZERO_LEN)).unwrap_or(0)];
    let mut left = len;
    while left > 0 {
        let part = usize::try_from(left.min(ZERO_LEN)).unwrap_or(0);
        hasher.update(zeroes.get(..part).unwrap_or_default());
        left -= part as u64;
    }
}

impl Sink for Hash {
    fn write(&self, contents: Vec<DiskBytes>) -> Result<()> {
        contents
            .into_iter()
            .try_for_each(|content| self.take(content.offset, Piece::Data(content.bytes.to_vec())))
    }

    fn zero(&self, range: ByteRange) -> Result<()> {
        self.take(range.start(), Piece::Zero(range.len()))
    }

    fn stop(&self) {
        if let Ok(mut state) = self.state.lock() {
            state.is_stopped = true;
        }
        self.moved.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::Recorder;
    use crate::ops::RequestedLevel;
    use crate::ops::backup::tests::{World, write};
    use crate::ops::content::{Limits, read_disk_by};

    const PIECE: usize = 8 << 20;

    #[test]
    fn what_comes_early_waits_for_its_turn() {
        let hash = Hash::new();
        std::thread::scope(|scope| {
            // the last piece waits: before it there is as much as may come early
            let late = scope.spawn(|| {
                (1..=5).try_for_each(|n| hash.take((n * PIECE) as u64, Piece::Data(vec![n as u8; PIECE])))
            });
            std::thread::sleep(std::time::Duration::from_millis(100));
            assert!(hash.state.lock().unwrap().early_len <= MAX_EARLY);
            assert!(!late.is_finished());
            hash.take(0, Piece::Data(vec![0; PIECE])).unwrap();
            late.join().unwrap().unwrap();
        });
        let expected: Vec<u8> = (0..6).flat_map(|n| vec![n; PIECE]).collect();
        assert_eq!(hash.finish(expected.len() as u64).unwrap(), blake3::hash(&expected).to_hex().to_string());
    }

    #[test]
    fn what_is_read_together_is_hashed_in_order() {
        let len = 60 << 20;
        let mut world = World::new(&[len]);
        // between zeroes, and more than may come early
        (0..len >> 22).for_each(|part| write(&mut world, (part << 22) + (300 << 10), 3 << 20, part));
        world.backup(RequestedLevel::Auto);
        let (catalog, view) = world.repository.refresh(&Recorder::new()).unwrap();
        let reader = ChunkReader::new(&world.repository, &view);
        let manifest = &catalog.points()[0].record.disks[0].manifest;
        for content_len in [96 << 20, 10 << 20] {
            let limits = Limits { content_len, ..Limits::EVERYTHING };
            let (hash, fail) = (Hash::new(), OnDamage::Fail);
            read_disk_by(&reader, manifest, &hash, fail, &Recorder::new(), &|_| {}, limits).unwrap();
            assert_eq!(hash.finish(len).unwrap(), blake3::hash(world.content(0)).to_hex().to_string());
        }
    }

    #[test]
    fn nobody_waits_for_what_does_not_come() {
        let hash = Hash::new();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                (1..=5).try_for_each(|n| hash.take((n * PIECE) as u64, Piece::Data(vec![1; PIECE])))
            });
            std::thread::sleep(std::time::Duration::from_millis(50));
            hash.stop();
            assert!(matches!(waiting.join().unwrap(), Err(Error::Cancelled)));
        });
    }
}

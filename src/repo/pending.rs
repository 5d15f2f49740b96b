//! The chunks that a session has stored: no index knows them before its commit, and a first backup of a large disk has
//! tens of millions. The newest are in memory, older ones in sorted runs in a file without a name beside the local index.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::Repository;
use crate::id::ChunkId;

/// Ids in memory: a hash table of 2^20 places holds no more before it grows. About 35 MiB.
const RECENT: usize = 900_000;
/// From one id in a run whose beginning is kept in memory to the next one.
const STRIDE: usize = 128;
/// Ids for each word of a filter: 64 bits for 6 ids.
const IDS_PER_WORD: usize = 6;

impl Repository {
    /// Makes a set for the chunks of a session.
    pub(crate) fn pending(&self) -> Pending {
        Pending::new(self.cache_dir.as_ref().map(|dir| dir.join(self.id().to_hex())))
    }
}

/// A set of chunk ids, whose memory grows by less than 2 bytes for each beyond the first million.
#[derive(Debug, Default)]
pub struct Pending {
    recent: HashSet<ChunkId>,
    /// `recent` may have so many.
    limit: usize,
    dir: Option<PathBuf>,
    file: Option<File>,
    runs: Vec<Run>,
}

impl Pending {
    /// Makes an empty set, which may keep a file in `dir`. Without one, or if that fails, all of it stays in memory.
    pub fn new(dir: Option<PathBuf>) -> Self {
        Self::with_limit(dir, RECENT)
    }

    fn with_limit(dir: Option<PathBuf>, limit: usize) -> Self {
        let limit = if dir.is_some() { limit } else { usize::MAX };
        Self { limit, dir, ..Self::default() }
    }

    /// Returns true if the id is in the set. Where the file cannot be read, older ids are not: then their chunks are
    /// stored twice, and a prune drops one of them.
    pub fn contains(&self, id: &ChunkId) -> bool {
        let is_older = |file: &File| self.runs.iter().any(|run| run.contains(file, id).unwrap_or(false));
        self.recent.contains(id) || self.file.as_ref().is_some_and(is_older)
    }

    /// Adds an id; returns false if it is there already.
    pub fn insert(&mut self, id: ChunkId) -> bool {
        if self.contains(&id) {
            return false;
        }
        if self.recent.len() >= self.limit && self.put_away().is_err() {
            self.limit = usize::MAX;
        }
        self.recent.insert(id)
    }

    /// Adds ids.
    pub fn extend(&mut self, ids: impl IntoIterator<Item = ChunkId>) {
        for id in ids {
            self.insert(id);
        }
    }

    /// Moves what is in memory to a run.
    fn put_away(&mut self) -> std::io::Result<()> {
        let file = match (&self.file, &self.dir) {
            (Some(file), _) => file,
            (None, Some(dir)) => {
                std::fs::create_dir_all(dir)?;
                self.file.insert(tempfile::tempfile_in(dir)?)
            }
            (None, None) => return Err(std::io::ErrorKind::NotFound.into()),
        };
        let mut ids: Vec<ChunkId> = self.recent.iter().copied().collect();
        ids.sort_unstable();
        let offset = self.runs.iter().map(|run| run.count * ChunkId::LEN).sum::<usize>();
        let mut run = Run::new(offset as u64, ids.len());
        let mut bytes = Vec::with_capacity(STRIDE * ChunkId::LEN);
        for (number, part) in ids.chunks(STRIDE).enumerate() {
            bytes.clear();
            part.iter().for_each(|id| bytes.extend_from_slice(id.as_bytes()));
            file.write_all_at(&bytes, (offset + number * STRIDE * ChunkId::LEN) as u64)?;
            run.first.extend(part.first());
            part.iter().for_each(|id| run.note(id));
        }
        self.runs.push(run);
        self.recent.clear();
        Ok(())
    }
}

/// Sorted ids in the file, and what of them is in memory.
#[derive(Debug)]
struct Run {
    /// In the file, bytes.
    offset: u64,
    count: usize,
    /// The first of every [`STRIDE`] ids.
    first: Vec<ChunkId>,
    /// A Bloom filter: the bits of an id are in one word.
    filter: Vec<u64>,
}

impl Run {
    fn new(offset: u64, count: usize) -> Self {
        Self { offset, count, first: Vec::new(), filter: vec![0; count / IDS_PER_WORD + 1] }
    }

    /// Returns which word of the filter is an id's, and four bits in it: ids are evenly distributed.
    fn bits(&self, id: &ChunkId) -> (usize, u64) {
        let number = |from: usize| {
            id.as_bytes().iter().skip(from).take(8).fold(0u64, |all, byte| all << 8 | u64::from(*byte))
        };
        let word = number(8) % self.filter.len() as u64;
        let places = number(16);
        let mask = (0..4).fold(0, |mask, nth| mask | 1 << (places >> (8 * nth) & 63));
        (usize::try_from(word).unwrap_or(0), mask)
    }

    fn note(&mut self, id: &ChunkId) {
        let (word, mask) = self.bits(id);
        if let Some(word) = self.filter.get_mut(word) {
            *word |= mask;
        }
    }

    fn contains(&self, file: &File, id: &ChunkId) -> std::io::Result<bool> {
        let (word, mask) = self.bits(id);
        if self.filter.get(word).is_none_or(|word| word & mask != mask) {
            return Ok(false);
        }
        let Some(part) = self.first.partition_point(|first| first <= id).checked_sub(1) else {
            return Ok(false);
        };
        let count = (self.count - part * STRIDE).min(STRIDE);
        let mut bytes = [0; STRIDE * ChunkId::LEN];
        let bytes = bytes.get_mut(..count * ChunkId::LEN).unwrap_or_default();
        file.read_exact_at(bytes, self.offset + (part * STRIDE * ChunkId::LEN) as u64)?;
        Ok(bytes.chunks_exact(ChunkId::LEN).any(|other| other == id.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u32) -> ChunkId {
        ChunkId::from_bytes(*blake3::hash(&number.to_le_bytes()).as_bytes())
    }

    #[test]
    fn what_has_left_memory_is_still_in_the_set() {
        let dir = tempfile::tempdir().unwrap();
        let mut set = Pending::with_limit(Some(dir.path().join("later")), 1000);
        for number in 0..10_500 {
            assert!(set.insert(id(number)) && !set.insert(id(number)));
        }
        assert_eq!((set.runs.len(), set.recent.len()), (10, 500));
        assert!((0..10_500).all(|number| set.contains(&id(number)) && !set.insert(id(number))));
        assert!(!(10_500..21_000).any(|number| set.contains(&id(number))));
        let passed = |run: &Run| {
            let passes = |number: &u32| {
                let (word, mask) = run.bits(&id(*number));
                run.filter[word] & mask == mask
            };
            (20_000..30_000).filter(passes).count()
        };
        let wrong = set.runs.iter().map(passed).max().unwrap();
        assert!(wrong < 600, "{wrong} of 10,000 ids that are not there pass a filter");
        assert_eq!(std::fs::read_dir(dir.path().join("later")).unwrap().count(), 0, "the file has no name");
    }

    #[test]
    fn without_a_place_for_the_file_all_stays_in_memory() {
        for dir in [None, Some("/dev/null/nowhere".into())] {
            let mut set = Pending::with_limit(dir, 10);
            assert!((0..1000).all(|number| set.insert(id(number))));
            assert!(set.runs.is_empty() && (0..1000).all(|number| set.contains(&id(number))));
        }
    }

    #[test]
    fn a_file_that_cannot_be_read_hides_what_is_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut set = Pending::with_limit(Some(dir.path().into()), 10);
        set.extend((0..15).map(id));
        set.file.as_ref().unwrap().set_len(0).unwrap();
        assert!(!set.contains(&id(3)) && set.contains(&id(12)));
    }
}

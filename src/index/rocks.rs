//! The index on disk: RocksDB, with a key for every place of a chunk.
//!
//! Keys begin with a tag. `0 ‖ name` is state, `1 ‖ segment id` says that a segment was applied, and whose it is, and
//! `2 ‖ chunk id ‖ pack id` is a place. A segment is marked after its places are there, so that a run that was cut
//! off does the same work once more.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use rocksdb::{
    BlockBasedIndexType, BlockBasedOptions, Cache, DB, ErrorKind, IngestExternalFileOptions, LogLevel,
    Options, ReadOptions, SliceTransform, SstFileWriter, WriteBatch,
};

use super::{Index, Location, locate};
use crate::error::{Error, Result};
use crate::format::node::ChunkKind;
use crate::format::pack::FrameEntry;
use crate::format::segment::Segment;
use crate::id::{ChunkId, PackId, RepositoryId, SegmentId, SessionId};

/// To be raised whenever keys or values change: an index of another schema is built anew.
const SCHEMA: u8 = 2;
const TAG_STATE: u8 = 0;
const TAG_SEGMENT: u8 = 1;
const TAG_CHUNK: u8 = 2;
const PREFIX_LEN: usize = 1 + ChunkId::LEN;
const KEY_LEN: usize = PREFIX_LEN + PackId::LEN;
const VALUE_LEN: usize = 21;
/// Blocks, filters and the index of blocks together, bytes.
const CACHE_LEN: usize = 40 << 20;
/// Bytes of each of two write buffers.
const BUFFER_LEN: usize = 8 << 20;
/// From so many chunks on, a sorted file is written instead of going through log and buffers.
const BULK_CHUNKS: usize = 16 * 1024;
/// An index of so many bytes is read ahead when it is opened: that of a million chunks.
const WARM_LEN: u64 = 96 << 20;

/// Room for more than 32 MiB of entries; only what is used of it is memory.
const ROOM_ENTRIES: usize = (33 << 20) / size_of::<(Key, Value)>();

type Key = [u8; KEY_LEN];
type Value = [u8; VALUE_LEN];

/// An index in a folder of its own. One process at a time has it open.
#[derive(Debug)]
pub(super) struct RocksIndex {
    dir: PathBuf,
    state: Vec<u8>,
    /// None only after a failed [`Index::clear`].
    db: RwLock<Option<DB>>,
}

impl RocksIndex {
    /// Opens or creates the index; one that is broken, or of another schema or repository, is deleted first, with a
    /// note.
    ///
    /// # Errors
    /// Another process has it open, or the folder cannot be written.
    pub(super) fn open(dir: &Path, repository: RepositoryId, notes: &mut Vec<String>) -> Result<Self> {
        let parent = dir.parent().unwrap_or(dir);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)
            .map_err(|source| Error::io("create", parent.display().to_string(), source))?;
        let mut state = vec![SCHEMA];
        state.extend_from_slice(repository.as_bytes());
        if broken_mark(dir).exists() {
            notes.push(format!("the index {} was broken and is rebuilt", dir.display()));
            remove(dir)?;
        }
        warm(dir);
        let db = match open_checked(dir, &state) {
            Ok(db) => db,
            Err(Refusal::Locked(error)) => return Err(failed(dir, "open", error)),
            Err(Refusal::Unusable(reason)) => {
                notes.push(format!("the index {} is rebuilt: {reason}", dir.display()));
                remove(dir)?;
                open_checked(dir, &state).map_err(|refusal| match refusal {
                    Refusal::Locked(error) => failed(dir, "open", error),
                    Refusal::Unusable(reason) => failed(dir, "open", reason),
                })?
            }
        };
        Ok(Self { dir: dir.to_owned(), state, db: RwLock::new(Some(db)) })
    }

    /// Runs `work` on the database. An index that turns out to be broken is marked, for the next one to begin anew.
    fn with<T>(
        &self,
        action: &'static str,
        work: impl FnOnce(&DB) -> Result<T, rocksdb::Error>,
    ) -> Result<T> {
        let db = self.db.read().unwrap_or_else(PoisonError::into_inner);
        let Some(db) = db.as_ref() else { return Err(failed(&self.dir, action, "it is closed".into())) };
        work(db).map_err(|error| {
            if matches!(error.kind(), ErrorKind::Corruption | ErrorKind::IOError) {
                // nothing is lost if this fails too: the next one finds the same damage
                let _ = fs::write(broken_mark(&self.dir), b"");
            }
            failed(&self.dir, action, error.into_string())
        })
    }

    fn write_batch(&self, entries: &[(Key, Value)], segments: &[(SegmentId, Segment)]) -> Result<()> {
        let mut batch = WriteBatch::default();
        for (key, value) in entries {
            batch.put(key, value);
        }
        for (id, segment) in segments {
            batch.put(segment_key(*id), segment.owner.as_bytes());
        }
        self.with("write", |db| db.write(batch))
    }

    /// Writes a sorted file and hands it over. `entries` are sorted and without repetition.
    fn ingest(&self, entries: &[(Key, Value)]) -> Result<()> {
        let path = self.dir.join("bulk.sst.tmp");
        self.with("write", |db| {
            let options = options();
            let mut writer = SstFileWriter::create(&options);
            writer.open(&path)?;
            for (key, value) in entries {
                writer.put(key, value)?;
            }
            writer.finish()?;
            let mut how = IngestExternalFileOptions::default();
            how.set_move_files(true);
            db.ingest_external_file_opts(&how, vec![&path])
        })?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io("remove", path.display().to_string(), error))
            }
            _ => Ok(()),
        }
    }
}

impl Index for RocksIndex {
    fn applied(&self) -> Result<HashMap<SegmentId, SessionId>> {
        self.with("read", |db| {
            let mut found = HashMap::new();
            let mut iterator = db.raw_iterator_opt(whole_range());
            iterator.seek([TAG_SEGMENT]);
            while let Some([TAG_SEGMENT, id @ ..]) = iterator.key() {
                // one without an owner that can be read is nobody's, and begins the index anew
                let owner = iterator.value().and_then(|owner| owner.try_into().ok()).unwrap_or_default();
                if let Ok(id) = id.try_into() {
                    found.insert(SegmentId::from_bytes(id), SessionId::from_bytes(owner));
                }
                iterator.next();
            }
            iterator.status().map(|()| found)
        })
    }

    fn apply(&self, segments: &[(SegmentId, Segment)]) -> Result<()> {
        let count: usize = segments.iter().map(|(_, segment)| segment.chunks.len()).sum();
        // glibc keeps freed memory of up to the length of the longest that it has had from the system for itself, up to
        // 32 MiB: what is longer goes back, and leaves the rest as it is
        let room = if count < BULK_CHUNKS { count } else { count.max(ROOM_ENTRIES) };
        let mut entries = Vec::with_capacity(room);
        for (_, segment) in segments {
            let places = segment.chunks.iter().filter_map(|chunk| {
                let location = locate(segment, chunk)?;
                Some((chunk_key(chunk.id, location.pack), encode(&location)))
            });
            entries.extend(places);
        }
        if entries.len() < BULK_CHUNKS {
            return self.write_batch(&entries, segments);
        }
        entries.sort_unstable();
        entries.dedup_by(|later, earlier| later.0 == earlier.0);
        self.ingest(&entries)?;
        self.write_batch(&[], segments)
    }

    fn clear(&self) -> Result<()> {
        let mut slot = self.db.write().unwrap_or_else(PoisonError::into_inner);
        // closed before its files go
        drop(slot.take());
        remove(&self.dir)?;
        let db = open_checked(&self.dir, &self.state).map_err(|refusal| match refusal {
            Refusal::Locked(reason) | Refusal::Unusable(reason) => failed(&self.dir, "open", reason),
        })?;
        *slot = Some(db);
        Ok(())
    }

    fn lookup(&self, ids: &[ChunkId]) -> Result<Vec<Vec<Location>>> {
        let mut order: Vec<(usize, ChunkId)> = ids.iter().copied().enumerate().collect();
        // neighbours in the index are found in one block
        order.sort_unstable_by_key(|(_, id)| *id);
        let mut found = vec![Vec::new(); ids.len()];
        self.with("read", |db| {
            let mut how = ReadOptions::default();
            how.set_prefix_same_as_start(true);
            let mut iterator = db.raw_iterator_opt(how);
            for (at, id) in order {
                let prefix = chunk_prefix(id);
                let Some(places) = found.get_mut(at) else { continue };
                iterator.seek(prefix);
                while let Some(key) = iterator.key() {
                    let Some(pack) = key.strip_prefix(&prefix) else { break };
                    places.extend(iterator.value().and_then(|value| decode(pack, value)));
                    iterator.next();
                }
                iterator.status()?;
            }
            Ok(())
        })?;
        Ok(found)
    }
}

/// Has the system read an index of at most [`WARM_LEN`] bytes as a whole, in the background: what is asked of it stands all
/// over it, and each block for itself would be waited for.
fn warm(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    let is_sorted_file = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "sst");
    let files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(is_sorted_file).collect();
    let len: u64 = files.iter().filter_map(|path| fs::metadata(path).ok()).map(|found| found.len()).sum();
    if len > WARM_LEN {
        return;
    }
    for path in files {
        if let Ok(file) = fs::File::open(path) {
            // a hint: what cannot be read is noticed when it is asked for
            let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::WillNeed);
        }
    }
}

/// Why a database was not opened.
enum Refusal {
    /// By another process; its content is good.
    Locked(String),
    Unusable(String),
}

fn open_checked(dir: &Path, state: &[u8]) -> Result<DB, Refusal> {
    let unusable = |error: rocksdb::Error| Refusal::Unusable(error.into_string());
    let is_new = !dir.join("CURRENT").exists();
    let db = DB::open(&options(), dir).map_err(|error| {
        // RocksDB has no kind of its own for this
        let is_locked = error.kind() == ErrorKind::IOError && error.as_ref().contains("lock");
        if is_locked { Refusal::Locked(error.into_string()) } else { unusable(error) }
    })?;
    let key = [TAG_STATE];
    if is_new {
        db.put(key, state).map_err(unusable)?;
    }
    match db.get(key).map_err(unusable)? {
        Some(found) if found == state => Ok(db),
        _ => Err(Refusal::Unusable("it is of another schema or repository".into())),
    }
}

fn options() -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(&Cache::new_lru_cache(CACHE_LEN));
    table.set_cache_index_and_filter_blocks(true);
    table.set_index_type(BlockBasedIndexType::TwoLevelIndexSearch);
    table.set_partition_filters(true);
    table.set_bloom_filter(10.0, false);
    // asked for by chunk, never by chunk and pack
    table.set_whole_key_filtering(false);
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_block_based_table_factory(&table);
    options.set_prefix_extractor(SliceTransform::create_fixed_prefix(PREFIX_LEN));
    options.set_write_buffer_size(BUFFER_LEN);
    options.set_max_write_buffer_number(2);
    options.set_max_total_wal_size(4 * BUFFER_LEN as u64);
    options.set_max_open_files(128);
    options.set_max_background_jobs(2);
    options.set_log_level(LogLevel::Error);
    options.set_keep_log_file_num(1);
    options
}

/// Options for what crosses chunks.
fn whole_range() -> ReadOptions {
    let mut how = ReadOptions::default();
    how.set_total_order_seek(true);
    how
}

fn broken_mark(dir: &Path) -> PathBuf {
    dir.with_extension("broken")
}

fn remove(dir: &Path) -> Result<()> {
    let gone = |done: io::Result<()>| match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    // the mark goes last: cut off in between, the folder is removed next time
    let by_kind = match fs::symlink_metadata(dir) {
        Ok(found) if !found.is_dir() => fs::remove_file(dir),
        _ => fs::remove_dir_all(dir),
    };
    gone(by_kind)
        .and_then(|()| gone(fs::remove_file(broken_mark(dir))))
        .map_err(|source| Error::io("remove", dir.display().to_string(), source))
}

fn failed(dir: &Path, action: &'static str, reason: String) -> Error {
    Error::io(action, format!("the index {}", dir.display()), io::Error::other(reason))
}

fn segment_key(id: SegmentId) -> Vec<u8> {
    let mut key = vec![TAG_SEGMENT];
    key.extend_from_slice(id.as_bytes());
    key
}

fn chunk_prefix(id: ChunkId) -> [u8; PREFIX_LEN] {
    let mut key = [TAG_CHUNK; PREFIX_LEN];
    for (byte, value) in key.iter_mut().skip(1).zip(id.as_bytes()) {
        *byte = *value;
    }
    key
}

fn chunk_key(id: ChunkId, pack: PackId) -> Key {
    let mut key = [0; KEY_LEN];
    let bytes = chunk_prefix(id).into_iter().chain(*pack.as_bytes());
    for (byte, value) in key.iter_mut().zip(bytes) {
        *byte = value;
    }
    key
}

fn encode(location: &Location) -> Value {
    let mut value = [0; VALUE_LEN];
    let frame = location.frame;
    let numbers = [frame.offset, frame.stored_len, frame.raw_len, location.offset, location.len];
    let bytes =
        std::iter::once(location.kind.as_byte()).chain(numbers.into_iter().flat_map(u32::to_le_bytes));
    for (byte, from) in value.iter_mut().zip(bytes) {
        *byte = from;
    }
    value
}

/// Returns the place of a key's rest and a value; none if they are not what [`encode`] writes.
fn decode(pack: &[u8], value: &[u8]) -> Option<Location> {
    let pack = PackId::from_bytes(pack.try_into().ok()?);
    let (kind, numbers) = value.split_first()?;
    let mut numbers = numbers.chunks_exact(4).map(|four| four.try_into().map(u32::from_le_bytes));
    let mut next = || numbers.next()?.ok();
    let frame = FrameEntry { offset: next()?, stored_len: next()?, raw_len: next()? };
    Some(Location { pack, frame, kind: ChunkKind::from_byte(*kind)?, offset: next()?, len: next()? })
}

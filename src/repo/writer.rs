//! Writing a session's chunks: frames are compressed by workers, collected into packs, packs are put, and
//! only then the segments that list them.
//!
//! ```text
//! body (caller's thread) ──── Work ────► compress × cores ── EncodedFrame ──► pack thread
//!                 storage ◄── put threads: packs ◄── FinishedPack ──┘
//!                     ▲            └── StoredPack ──► list thread: segments ──┐
//!                     └───────────────────────────────────────────────────────┘
//! ```
//!
//! Waiting for the storage to sync a pack keeps nobody else from computing.
//!
//! Sessions of one process that write at the same time share memory (module `share`), but no chunks: what two of them meet at
//! once, each stores for itself. To rely on what another session has not committed yet, one would have to wait for its end,
//! and to have kept the content for the case that it fails. A prune drops the copy.

use std::collections::{BTreeMap, HashSet};
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::pending::Pending;
use super::reader::ChunkReader;
use super::rules::Rule;
use super::share::{PackBytes, Permits, Portion};
use super::{Repository, random};
use crate::buffer::Buffer;
use crate::chunk::{EncodedFrame, FinishedPack, FrameBuilder, FramedChunk, PackBuilder, RawFrame};
use crate::error::{Context, Error, Result};
use crate::format::limits::SEGMENT_TARGET_CHUNKS;
use crate::format::name::ObjectName;
use crate::format::node::ChunkKind;
use crate::format::pack::{FrameEntry, PackKind, PackTable};
use crate::format::segment::{Segment, SegmentChunk, SegmentPack};
use crate::id::{ChunkId, PackId, SegmentId, SessionId};
use crate::manifest::NodeWriter;

/// Frames that wait for compression: 4 × about 1.3 MiB.
const RAW_QUEUE: usize = 4;
/// Frames that wait for the pack thread: 8 × 1.3 MiB, however short they have become.
const ENCODED_QUEUE: usize = 8;
/// Frames between body and pack in all, so that one slow worker does not let the others pile up: 12 × 1.3 MiB.
const FRAMES_IN_FLIGHT: Portion = Portion { most: 12, least: 2 };
/// Behind a pack's target this part of it is room for its last frame and its table.
const PACK_ROOM: u64 = 8;
/// Packs that are durable and wait for being listed: a table each.
const STORED_QUEUE: usize = 4;
/// Plaintext of a frame of metadata, bytes: nodes are read one by one and hardly compress.
const METADATA_FRAME_LEN: u32 = 64 << 10;

/// What a session put into the repository.
#[derive(Debug, Default)]
pub struct Written {
    /// Bytes of data packs.
    pub data_bytes: u64,
    /// Bytes of metadata packs and segments.
    pub metadata_bytes: u64,
    pub packs: HashSet<PackId>,
    pub segments: Vec<SegmentId>,
    /// What it stored but copies, in one set for each time.
    pub chunks: Vec<Pending>,
    /// Older packs that the session's manifests rely on.
    pub reused: HashSet<PackId>,
}

impl Written {
    /// Returns true if the session has stored a chunk.
    pub fn has(&self, id: &ChunkId) -> bool {
        self.chunks.iter().any(|set| set.contains(id))
    }

    /// Adds what the session put later, and relies on since.
    pub fn add(&mut self, later: Self) {
        self.data_bytes += later.data_bytes;
        self.metadata_bytes += later.metadata_bytes;
        self.packs.extend(later.packs);
        self.segments.extend(later.segments);
        self.chunks.extend(later.chunks);
        self.reused = later.reused;
    }
}

/// The first failure of any worker: what the others meet afterwards only follows from it.
#[derive(Debug, Default)]
struct FirstFailure(Mutex<Option<Error>>);

impl FirstFailure {
    fn set(&self, error: Error) {
        if let Ok(mut slot) = self.0.lock() {
            slot.get_or_insert(error);
        }
    }

    fn is_set(&self) -> bool {
        self.0.lock().map_or(true, |slot| slot.is_some())
    }

    fn take(&self) -> Option<Error> {
        self.0.lock().ok().and_then(|mut slot| slot.take())
    }
}

struct Job<T> {
    sequence: u64,
    kind: PackKind,
    frame: T,
}

/// What a worker makes a frame of.
enum Work {
    Raw(RawFrame),
    Copy(FrameCopy),
}

impl Work {
    fn encode(self, reader: &ChunkReader<'_>, level: i32) -> Result<EncodedFrame> {
        match self {
            Self::Raw(frame) => frame.encode(level),
            Self::Copy(copy) => copy.encode(reader, level),
        }
    }
}

/// A frame of another pack, all of whose chunks are to be stored again.
#[derive(Debug)]
pub struct FrameCopy {
    pub pack: PackId,
    pub entry: FrameEntry,
    /// All of them, as they stand in it.
    pub chunks: Vec<FramedChunk>,
    /// What it means for the caller if one of them cannot be read.
    pub failing: &'static str,
}

impl FrameCopy {
    fn encode(self, reader: &ChunkReader<'_>, level: i32) -> Result<EncodedFrame> {
        let Self { pack, entry, chunks, failing } = self;
        if let Ok(frame) = reader.whole_frame(pack, &entry, chunks.clone()) {
            return Ok(frame);
        }
        // what is bad there may be good somewhere else; one after the other, since each keeps the frame that it comes from
        let read = |chunk: &FramedChunk| {
            let content = reader.read_at(chunk.kind, chunk.id, &[]).context(|| failing)?;
            Ok((chunk.kind, chunk.id, content))
        };
        RawFrame::of(chunks.iter().map(read))?.encode(level)
    }
}

/// Takes chunks of a running session; used by one thread.
pub struct SessionWriter<'a> {
    reader: &'a ChunkReader<'a>,
    hasher: crate::chunk::IdHasher,
    data: FrameBuilder,
    metadata: FrameBuilder,
    frames: Sender<Job<Work>>,
    permits: &'a Permits<'a>,
    sequence: u64,
    pending: Pending,
    reused: HashSet<PackId>,
    new_bytes: u64,
}

impl std::fmt::Debug for SessionWriter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SessionWriter").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

impl<'a> SessionWriter<'a> {
    fn new(
        repository: &Repository,
        reader: &'a ChunkReader<'a>,
        frames: Sender<Job<Work>>,
        permits: &'a Permits<'a>,
    ) -> Self {
        Self {
            reader,
            hasher: repository.hasher().clone(),
            data: FrameBuilder::new(repository.config().frame_target_len),
            metadata: FrameBuilder::new(METADATA_FRAME_LEN),
            frames,
            permits,
            sequence: 0,
            pending: repository.pending(),
            reused: HashSet::new(),
            new_bytes: 0,
        }
    }

    /// Returns the bytes of disk content that the repository did not have.
    pub fn new_bytes(&self) -> u64 {
        self.new_bytes
    }

    /// Stores a chunk of disk content unless `known` says in which older pack it is, or the session has it.
    ///
    /// # Errors
    /// The failure of a worker; the chunk's own if it exceeds the format's bounds.
    pub fn put_data(&mut self, id: ChunkId, plain: &[u8], known: Option<PackId>) -> Result<()> {
        if let Some(pack) = known {
            self.reused.insert(pack);
            return Ok(());
        }
        if !self.pending.insert(id) {
            return Ok(());
        }
        self.new_bytes += plain.len() as u64;
        if let Some(frame) = self.data.push(ChunkKind::Data, id, plain)? {
            self.send(PackKind::Data, frame)?;
        }
        Ok(())
    }

    /// Stores a chunk of metadata, in two packs, unless it is known.
    ///
    /// # Errors
    /// As [`SessionWriter::put_data`].
    pub fn put_metadata(&mut self, kind: ChunkKind, plain: &[u8]) -> Result<ChunkId> {
        let id = self.hasher.chunk_id(kind, plain);
        if self.pending.contains(&id) {
            return Ok(id);
        }
        if let Some(pack) = self.reader.known(kind, &[id])?.pop().flatten() {
            self.reused.insert(pack);
            return Ok(id);
        }
        self.pending.insert(id);
        if let Some(frame) = self.metadata.push(kind, id, plain)? {
            self.send(PackKind::Metadata, frame)?;
        }
        Ok(id)
    }

    /// Notes that the session relies on a chunk in an older pack.
    pub fn rely_on(&mut self, pack: PackId) {
        self.reused.insert(pack);
    }

    /// Stores a chunk whatever is known of it, each time it is called; metadata in two packs.
    ///
    /// # Errors
    /// As [`SessionWriter::put_data`].
    pub fn copy(&mut self, kind: ChunkKind, id: ChunkId, plain: &[u8]) -> Result<()> {
        let (builder, pack) = match kind {
            ChunkKind::Data => (&mut self.data, PackKind::Data),
            _ => (&mut self.metadata, PackKind::Metadata),
        };
        match builder.push(kind, id, plain)? {
            Some(frame) => self.send(pack, frame),
            None => Ok(()),
        }
    }

    /// Stores all chunks of a frame of data again, as [`SessionWriter::copy`] would, but as the frame that they are: it is
    /// opened and every chunk checked, and not compressed again. Where that fails they are read from wherever they are.
    ///
    /// # Errors
    /// As [`SessionWriter::put_data`].
    pub fn copy_frame(&mut self, copy: FrameCopy) -> Result<()> {
        self.send_work(PackKind::Data, Work::Copy(copy))
    }

    fn send(&mut self, kind: PackKind, frame: RawFrame) -> Result<()> {
        self.send_work(kind, Work::Raw(frame))
    }

    fn send_work(&mut self, kind: PackKind, frame: Work) -> Result<()> {
        let sequence = self.sequence;
        self.sequence += 1;
        // the receivers are gone only after a failure, which `write_session` reports in place of this
        if !self.permits.take() {
            return Err(Error::Cancelled);
        }
        self.frames.send(Job { sequence, kind, frame }).map_err(|_| Error::Cancelled)
    }

    fn flush(&mut self) -> Result<()> {
        if let Some(frame) = self.data.flush() {
            self.send(PackKind::Data, frame)?;
        }
        if let Some(frame) = self.metadata.flush() {
            self.send(PackKind::Metadata, frame)?;
        }
        Ok(())
    }
}

impl NodeWriter for SessionWriter<'_> {
    fn write_node(&mut self, plain: Vec<u8>) -> Result<ChunkId> {
        self.put_metadata(ChunkKind::Node, &plain)
    }
}

/// Runs `body` with a writer, then waits until every chunk, pack and segment is durable.
///
/// # Errors
/// The first failure of body or workers. Whatever was stored by then is referred to by nothing.
pub fn write_session<T>(
    repository: &Repository,
    reader: &ChunkReader<'_>,
    session: SessionId,
    body: impl FnOnce(&mut SessionWriter<'_>) -> Result<T>,
) -> Result<(T, Written)> {
    write_more(repository, reader, session, &Written::default(), body)
}

/// As [`write_session`], for a session that has put something before.
///
/// # Errors
/// As [`write_session`].
pub fn write_more<T>(
    repository: &Repository,
    reader: &ChunkReader<'_>,
    session: SessionId,
    before: &Written,
    body: impl FnOnce(&mut SessionWriter<'_>) -> Result<T>,
) -> Result<(T, Written)> {
    // as many segments have a number already
    let number = u32::try_from(before.segments.len()).unwrap_or(u32::MAX);
    let failure = FirstFailure::default();
    let share = &repository.share;
    let _writing = share.write();
    let permits = &Permits::new(share, FRAMES_IN_FLIGHT);
    let held = &share.count_packs();
    let result = std::thread::scope(|scope| {
        let (raw_sender, raw_receiver) = bounded::<Job<Work>>(RAW_QUEUE);
        let (encoded_sender, encoded_receiver) = bounded::<Job<EncodedFrame>>(ENCODED_QUEUE);
        let level = repository.config().zstd_level;
        for _ in 0..worker_count() {
            let (frames, encoded, failure) = (raw_receiver.clone(), encoded_sender.clone(), &failure);
            scope.spawn(move || compress(&frames, &encoded, permits, (reader, level), failure));
        }
        drop((raw_receiver, encoded_sender));
        let failed = &failure;
        let puts = if share.is_sparing() { 1 } else { repository.storage().puts_at_once().max(1) };
        // none is queued, 32 MiB each by default: the pack thread holds the next one while others are put
        let (pack_sender, pack_receiver) = bounded::<FinishedPack>(0);
        let (stored_sender, stored_receiver) = bounded::<StoredPack>(STORED_QUEUE);
        let (used_sender, used_receiver) = bounded::<Buffer>(puts);
        scope.spawn(move || {
            let packer = Packer::new(repository, held, pack_sender, used_receiver);
            let result = packer.run(&encoded_receiver, permits);
            // where a put thread has failed before, this only follows from it
            result.map_err(|error| failed.set(error))
        });
        for _ in 0..puts {
            let (packs, stored, used) = (pack_receiver.clone(), stored_sender.clone(), used_sender.clone());
            scope.spawn(move || {
                put_packs(repository, held, &packs, &stored, &used, failed).map_err(|error| failed.set(error))
            });
        }
        drop((pack_receiver, stored_sender, used_sender));
        let lister = scope.spawn(move || {
            let lister = Lister::new(repository, session, number);
            lister.run(&stored_receiver).map_err(|error| failed.set(error))
        });
        let mut writer = SessionWriter::new(repository, reader, raw_sender, permits);
        let result = body(&mut writer).and_then(|value| writer.flush().map(|()| value));
        let reused = std::mem::take(&mut writer.reused);
        let chunks = std::mem::take(&mut writer.pending);
        // closes the queue: all threads finish what is in it and end
        drop(writer);
        let written = lister.join();
        let value = result?;
        match written {
            Ok(Ok(written)) => Ok((value, Written { reused, chunks: vec![chunks], ..written })),
            // the failure is in its slot
            Ok(Err(())) => Err(Error::Cancelled),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    });
    match failure.take() {
        Some(error) => Err(error),
        None => result,
    }
}

/// Returns how many threads a stage that computes gets.
pub(super) fn worker_count() -> usize {
    std::thread::available_parallelism().map_or(2, std::num::NonZero::get).clamp(1, 16)
}

fn compress(
    frames: &Receiver<Job<Work>>,
    encoded: &Sender<Job<EncodedFrame>>,
    permits: &Permits<'_>,
    (reader, level): (&ChunkReader<'_>, i32),
    failure: &FirstFailure,
) {
    // frames behind one that failed wait for it until the end, and keep their permits
    let _closing = permits.close_at_end();
    for job in frames {
        match job.frame.encode(reader, level) {
            Ok(frame) => {
                let job = Job { sequence: job.sequence, kind: job.kind, frame };
                if encoded.send(job).is_err() {
                    return;
                }
            }
            Err(error) => return failure.set(error),
        }
    }
}

/// Collects frames into packs.
struct Packer<'a> {
    repository: &'a Repository,
    held: &'a PackBytes<'a>,
    data: Option<PackBuilder>,
    metadata: Option<PackBuilder>,
    packs: Sender<FinishedPack>,
    /// Memory of packs that are stored.
    used: Receiver<Buffer>,
}

impl<'a> Packer<'a> {
    fn new(
        repository: &'a Repository,
        held: &'a PackBytes<'a>,
        packs: Sender<FinishedPack>,
        used: Receiver<Buffer>,
    ) -> Self {
        Self { repository, held, data: None, metadata: None, packs, used }
    }

    fn run(mut self, frames: &Receiver<Job<EncodedFrame>>, permits: &Permits<'_>) -> Result<()> {
        let _closing = permits.close_at_end();
        // workers finish out of order; frames go into packs in the order of the disk
        let mut early = BTreeMap::new();
        let mut next = 0;
        for job in frames {
            early.insert(job.sequence, job);
            while let Some(job) = early.remove(&next) {
                next += 1;
                permits.give_back();
                self.push(job.kind, &job.frame)?;
            }
        }
        if !early.is_empty() {
            // a compressor failed and its frame is missing: its error is the one that counts
            return Err(Error::Cancelled);
        }
        self.finish_pack(PackKind::Data)?;
        self.finish_pack(PackKind::Metadata)
    }

    fn slot(&mut self, kind: PackKind) -> &mut Option<PackBuilder> {
        match kind {
            PackKind::Data => &mut self.data,
            PackKind::Metadata => &mut self.metadata,
        }
    }

    fn push(&mut self, kind: PackKind, frame: &EncodedFrame) -> Result<()> {
        let target = self.repository.config().pack_target_len;
        let repository = self.repository.id();
        let used = self.used.clone();
        let (share, held) = (&self.repository.share, self.held);
        let slot = self.slot(kind);
        let builder = match slot {
            Some(builder) => builder,
            None => {
                let memory = pack_memory(target, &used);
                slot.insert(PackBuilder::reusing(memory, kind, repository, random()?))
            }
        };
        builder.push(frame)?;
        let is_full = builder.is_full(share.pack_len(target));
        held.add(frame.bytes.len());
        if is_full {
            self.finish_pack(kind)?;
        }
        Ok(())
    }

    fn finish_pack(&mut self, kind: PackKind) -> Result<()> {
        let Some(builder) = self.slot(kind).take() else { return Ok(()) };
        let pack = builder.finish()?;
        let twin = match kind {
            PackKind::Metadata if !self.repository.breaks(Rule::MetadataTwice) => Some(pack.twin(random()?)?),
            PackKind::Data | PackKind::Metadata => None,
        };
        self.held.add(twin.as_ref().map_or(0, |twin| twin.bytes.len()));
        for pack in [Some(pack), twin].into_iter().flatten() {
            self.packs.send(pack).map_err(|_| Error::Cancelled)?;
        }
        Ok(())
    }
}

/// Returns memory for a pack at once: of one before it, if that has room for as much. What a short one does not use is never
/// there; and of so much the allocator keeps nothing for itself when it is freed, as it does of the pieces in which it would
/// grow.
fn pack_memory(target_len: u64, used: &Receiver<Buffer>) -> Buffer {
    let len = usize::try_from(target_len.saturating_add(target_len / PACK_ROOM)).unwrap_or(0);
    let spare = used.try_iter().find(|memory| memory.has_room(len));
    spare.unwrap_or_else(|| Buffer::with_room(len))
}

/// A pack that is durable.
struct StoredPack {
    id: PackId,
    kind: PackKind,
    stored_len: u64,
    table: PackTable,
}

/// Puts packs until there are no more; hands on what is to be listed, and their memory.
fn put_packs(
    repository: &Repository,
    held: &PackBytes<'_>,
    packs: &Receiver<FinishedPack>,
    stored: &Sender<StoredPack>,
    used: &Sender<Buffer>,
    failed: &FirstFailure,
) -> Result<()> {
    for FinishedPack { id, kind, bytes, table } in packs {
        if failed.is_set() {
            // nobody needs the rest: ends the stages before this one too
            return Err(Error::Cancelled);
        }
        repository.storage().put_new(ObjectName::Pack(id), &bytes)?;
        let pack = StoredPack { id, kind, stored_len: bytes.len() as u64, table };
        // the list thread is gone only after a failure
        stored.send(pack).map_err(|_| Error::Cancelled)?;
        held.remove(bytes.len());
        if repository.share.is_alone() && !repository.share.is_sparing() {
            // where nobody takes it, it is freed
            let _ = used.try_send(bytes);
        }
    }
    Ok(())
}

/// Puts the segments that list packs.
struct Lister<'a> {
    repository: &'a Repository,
    session: SessionId,
    packs: Vec<SegmentPack>,
    chunks: Vec<SegmentChunk>,
    segment_number: u32,
    written: Written,
}

impl<'a> Lister<'a> {
    fn new(repository: &'a Repository, session: SessionId, segment_number: u32) -> Self {
        Self {
            repository,
            session,
            packs: Vec::new(),
            chunks: Vec::new(),
            segment_number,
            written: Written::default(),
        }
    }

    /// Lists packs until there are no more. What came before a failure of another stage is listed too: it is durable,
    /// whoever refers to it.
    fn run(mut self, packs: &Receiver<StoredPack>) -> Result<Written> {
        for pack in packs {
            self.list(pack);
            if self.chunks.len() >= SEGMENT_TARGET_CHUNKS {
                self.finish_segment()?;
            }
        }
        self.finish_segment()?;
        Ok(self.written)
    }

    fn list(&mut self, pack: StoredPack) {
        self.written.packs.insert(pack.id);
        match pack.kind {
            PackKind::Data => self.written.data_bytes += pack.stored_len,
            PackKind::Metadata => self.written.metadata_bytes += pack.stored_len,
        }
        let number = u32::try_from(self.packs.len()).unwrap_or(u32::MAX);
        self.chunks.extend(pack.table.chunks.iter().map(|chunk| SegmentChunk::in_pack(chunk, number)));
        let StoredPack { id, kind, stored_len, table } = pack;
        self.packs.push(SegmentPack { id, kind, stored_len, frames: table.frames });
    }

    /// Puts the segment of the packs so far. They are durable: `put_new` has returned for each.
    fn finish_segment(&mut self) -> Result<()> {
        if self.packs.is_empty() {
            return Ok(());
        }
        let packs = std::mem::take(&mut self.packs);
        let chunks = std::mem::take(&mut self.chunks);
        let (id, len) = put_segment(self.repository, self.session, self.segment_number, packs, chunks)?;
        self.segment_number += 1;
        self.written.metadata_bytes += len;
        self.written.segments.push(id);
        Ok(())
    }
}

/// Puts a segment; the packs that it lists have to be durable. Returns its id and length in bytes.
///
/// # Errors
/// Those of the storage; [`Error::Malformed`] if it exceeds the format's bounds.
pub fn put_segment(
    repository: &Repository,
    owner: SessionId,
    number: u32,
    packs: Vec<SegmentPack>,
    mut chunks: Vec<SegmentChunk>,
) -> Result<(SegmentId, u64)> {
    chunks.sort_unstable_by_key(|chunk| (chunk.id, chunk.pack));
    let segment = Segment { owner, number, packs, chunks };
    let bytes =
        segment.to_object(repository.id()).map_err(|fault| Error::malformed("the new segment", fault))?;
    let id = SegmentId::from_bytes(*blake3::hash(&bytes).as_bytes());
    repository.storage().put_new(ObjectName::Segment(id), &bytes)?;
    let len = bytes.len() as u64;
    repository.share.segments_put.fetch_add(len, Ordering::Relaxed);
    Ok((id, len))
}

//! Frames: chunks compressed together.

use std::cell::RefCell;
use std::ops::Deref;
use std::sync::{Arc, LazyLock, Mutex};

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::CParameter;

use crate::buffer::{Buffer, BufferPool};
use crate::chunk::IdHasher;
use crate::error::{Error, FormatFault, Result};
use crate::format::envelope::{CODEC_STORED, CODEC_ZSTD};
use crate::format::limits::{MAX_CHUNK_LEN, MAX_FRAME_CHUNKS, MAX_FRAME_RAW_LEN};
use crate::format::node::ChunkKind;
use crate::format::pack::{FRAME_HEADER_LEN, FrameEntry, FrameHeader, frame_chunks};
use crate::id::ChunkId;

/// The level that new repositories get.
pub const DEFAULT_ZSTD_LEVEL: i32 = 3;

/// Largest target of a frame's plaintext, bytes: with one more chunk and the list it is below
/// [`MAX_FRAME_RAW_LEN`].
const MAX_TARGET_LEN: u32 = 2 << 20;

const _: () = assert!(MAX_TARGET_LEN + MAX_CHUNK_LEN + 4 + 4 * MAX_FRAME_CHUNKS <= MAX_FRAME_RAW_LEN);

/// A chunk on its way into a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawChunk {
    pub kind: ChunkKind,
    pub id: ChunkId,
    /// Bytes of plaintext.
    pub len: u32,
}

/// Room in front of a frame's chunks for the header and the list of them, bytes: the list of 256 chunks, as 1 MiB of scattered
/// blocks of 4 KiB has, is put there without moving them, and few frames have more.
const ROOM: usize = FRAME_HEADER_LEN + list_len(256);

/// Bytes of the list of so many chunks.
const fn list_len(chunks: usize) -> usize {
    4 + 4 * chunks
}

/// Memory of frames on their way into a pack, used again by the next ones: of plaintext, and of what it is compressed to, up to
/// the default length. As much of it is kept as frames were ever on their way at once, within the pool's bound.
static MEMORY: LazyLock<Arc<BufferPool>> = LazyLock::new(|| BufferPool::new(room_for(1 << 20)));

/// Bytes in which a frame begins: enough for nearly all, since what fills one passes the target by a part of a chunk.
const fn room_for(target_len: usize) -> usize {
    ROOM + target_len + target_len / 4
}

/// Chunks that will be compressed together.
#[derive(Debug, Clone)]
pub struct RawFrame {
    chunks: Vec<RawChunk>,
    /// [`ROOM`] bytes, then the chunks, one behind the other, then room for more.
    memory: Buffer,
    /// Where in `memory` the chunks end.
    end: usize,
}

/// A chunk and its place in a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FramedChunk {
    pub kind: ChunkKind,
    pub id: ChunkId,
    /// First byte in the frame's plaintext.
    pub offset: u32,
    /// Bytes of plaintext.
    pub len: u32,
}

impl FramedChunk {
    /// Returns true if these, in their order, are all chunks of a frame whose plaintext has `raw_len` bytes: with the list of
    /// them they fill it.
    pub fn fill(chunks: &[Self], raw_len: u32) -> bool {
        let end = chunks.iter().try_fold(list_len(chunks.len()), |end, chunk| {
            (chunk.offset as usize == end).then(|| end.saturating_add(chunk.len as usize))
        });
        end == Some(raw_len as usize)
    }
}

/// A frame as it stands in a pack, and what is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedFrame {
    /// Header and content.
    pub bytes: Buffer,
    /// Bytes of plaintext, its list of chunks included.
    pub raw_len: u32,
    /// Bytes of content as stored, behind the header.
    pub stored_len: u32,
    pub chunks: Vec<FramedChunk>,
}

/// Returns memory for `len` bytes of a frame as stored; they hold anything.
pub fn frame_memory(len: usize) -> Buffer {
    MEMORY.take(len)
}

impl EncodedFrame {
    /// Takes up a frame as it stands in a pack, so that it can be put into another one as it is. `bytes` are its header and
    /// content, as `entry` places them; it has to hold just these chunks, in this order, and each is checked against its id.
    /// CPU-bound; meant for worker threads.
    ///
    /// # Errors
    /// Any [`FormatFault`].
    pub fn taken_up(
        bytes: Buffer,
        entry: &FrameEntry,
        chunks: Vec<FramedChunk>,
        hasher: &IdHasher,
    ) -> Result<Self, FormatFault> {
        with_workspace(|workspace| {
            let plain = match open_frame_into(&bytes, entry, &mut workspace.checked)? {
                Plaintext::Stored(front) => bytes.get(front..).unwrap_or_default(),
                Plaintext::Unpacked => workspace.checked.as_slice(),
            };
            check_chunks(plain, &chunks, hasher)
        })?;
        Ok(Self { bytes, raw_len: entry.raw_len, stored_len: entry.stored_len, chunks })
    }
}

/// Makes sure that a frame's plaintext holds just these chunks.
fn check_chunks(plain: &[u8], chunks: &[FramedChunk], hasher: &IdHasher) -> Result<(), FormatFault> {
    let listed = frame_chunks(plain)?;
    if listed.len() != chunks.len() {
        let (found, expected) = (listed.len().to_string(), chunks.len().to_string());
        return Err(FormatFault::Mismatch { what: "the number of chunks", found, expected });
    }
    for (listed, chunk) in listed.iter().zip(chunks) {
        let is_listed = (listed.kind, listed.offset, listed.len) == (chunk.kind, chunk.offset, chunk.len);
        let start = chunk.offset as usize;
        let content = plain.get(start..start + chunk.len as usize).filter(|_| is_listed);
        if content.is_none_or(|content| hasher.chunk_id(chunk.kind, content) != chunk.id) {
            return Err(FormatFault::ChunkId { expected: chunk.id });
        }
    }
    Ok(())
}

/// Collects chunks into frames, in the order in which they come.
#[derive(Debug)]
pub struct FrameBuilder {
    target_len: usize,
    frame: RawFrame,
}

impl FrameBuilder {
    /// Creates a builder that ends a frame once its chunks have `target_len` bytes (at most 2 MiB).
    pub fn new(target_len: u32) -> Self {
        Self { target_len: target_len.min(MAX_TARGET_LEN) as usize, frame: RawFrame::begun() }
    }

    /// Adds a chunk; returns the frame if that filled it.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the chunk is empty or longer than [`MAX_CHUNK_LEN`].
    pub fn push(&mut self, kind: ChunkKind, id: ChunkId, plain: &[u8]) -> Result<Option<RawFrame>> {
        let len = chunk_len(id, plain)?;
        self.frame.push(RawChunk { kind, id, len }, plain, room_for(self.target_len));
        let full = self.frame.content_len() >= self.target_len
            || self.frame.chunks.len() >= MAX_FRAME_CHUNKS as usize;
        Ok(if full { self.flush() } else { None })
    }

    /// Returns the frame begun, if it has a chunk.
    pub fn flush(&mut self) -> Option<RawFrame> {
        let frame = std::mem::replace(&mut self.frame, RawFrame::begun());
        (!frame.chunks.is_empty()).then_some(frame)
    }

    /// Returns the bytes of the chunks in the frame begun.
    pub fn pending_bytes(&self) -> usize {
        self.frame.content_len()
    }
}

/// What a worker thread reuses from frame to frame.
#[derive(Default)]
struct Workspace {
    compressor: Option<(i32, Compressor<'static>)>,
    /// For a first look at what seems to be noise.
    probe: Option<Compressor<'static>>,
    probed: Vec<u8>,
    checked: Vec<u8>,
}

/// Those that nobody uses now, several MiB each. There are as many as frames were ever encoded at once, which is fewer than
/// all threads of sessions that write at the same time.
static WORKSPACES: Mutex<Vec<Workspace>> = Mutex::new(Vec::new());

/// Does something with a workspace that is nobody else's meanwhile.
fn with_workspace<T>(work: impl FnOnce(&mut Workspace) -> T) -> T {
    let mut workspace = WORKSPACES.lock().ok().and_then(|mut spare| spare.pop()).unwrap_or_default();
    let result = work(&mut workspace);
    if let Ok(mut spare) = WORKSPACES.lock() {
        spare.push(workspace);
    }
    result
}

thread_local! {
    static DECOMPRESSOR: RefCell<Decompressor<'static>> = RefCell::new(Decompressor::default());
}

impl RawFrame {
    /// Without a chunk, and without memory; it is none until it has one.
    fn begun() -> Self {
        Self { chunks: Vec::new(), memory: Vec::new().into(), end: ROOM }
    }

    /// Returns a frame of these chunks, each of which is let go before the next one is taken.
    ///
    /// # Errors
    /// The first one among them; [`Error::Malformed`] if a chunk, their number or all of them exceed the format's bounds.
    pub fn of<B: Deref<Target = [u8]>>(
        chunks: impl IntoIterator<Item = Result<(ChunkKind, ChunkId, B)>>,
    ) -> Result<Self> {
        let mut frame = Self::begun();
        for chunk in chunks {
            let (kind, id, plain) = chunk?;
            let len = chunk_len(id, &plain)?;
            bounded("the frame", frame.content_len() + plain.len())?;
            if frame.chunks.len() >= MAX_FRAME_CHUNKS as usize {
                let (what, max) = ("the number of chunks", u64::from(MAX_FRAME_CHUNKS));
                return Err(Error::malformed(
                    "a new frame",
                    FormatFault::TooLarge { what, found: max + 1, max },
                ));
            }
            frame.push(RawChunk { kind, id, len }, &plain, room_for(1 << 20));
        }
        Ok(frame)
    }

    /// Returns the chunks in order.
    pub fn chunks(&self) -> &[RawChunk] {
        &self.chunks
    }

    /// Returns the bytes of all chunks.
    pub fn content_len(&self) -> usize {
        self.end - ROOM
    }

    /// Adds a chunk; where there is no room for it, room of at least `room` bytes is made.
    fn push(&mut self, chunk: RawChunk, plain: &[u8], room: usize) {
        let end = self.end + plain.len();
        if self.memory.len() < end {
            let mut memory = MEMORY.take(end.max(room));
            memory.iter_mut().zip(self.memory.iter().take(self.end)).for_each(|(place, byte)| *place = *byte);
            self.memory = memory;
        }
        if let Some(place) = self.memory.get_mut(self.end..end) {
            place.copy_from_slice(plain);
        }
        self.end = end;
        self.chunks.push(chunk);
    }

    /// Compresses the frame, then decompresses the result and compares: a faulty encoder or memory is
    /// noticed while the disk can still be read again. CPU-bound; meant for worker threads.
    ///
    /// # Errors
    /// [`Error::Damaged`] if the comparison fails.
    pub fn encode(self, zstd_level: i32) -> Result<EncodedFrame> {
        with_workspace(|workspace| self.encode_in(workspace, zstd_level))
    }

    fn encode_in(self, workspace: &mut Workspace, zstd_level: i32) -> Result<EncodedFrame> {
        let chunks = self.framed_chunks();
        let mut bytes = self.with_header_and_list();
        let plain = bytes.get(FRAME_HEADER_LEN..).unwrap_or_default();
        let raw_len = bounded("the frame", plain.len())?;
        let mut header = FrameHeader { codec: CODEC_STORED, raw_len, stored_len: raw_len };
        // what is stored as it is was not done anything to that could be undone and compared
        if let Some(mut packed) = workspace.compress(plain, zstd_level) {
            let stored_len = bounded("the stored frame", packed.len() - FRAME_HEADER_LEN)?;
            header = FrameHeader { codec: CODEC_ZSTD, raw_len, stored_len };
            put_header(&header, &mut packed);
            check_encoding(&packed, plain, &mut workspace.checked)?;
            bytes = packed;
        }
        put_header(&header, &mut bytes);
        Ok(EncodedFrame { bytes, raw_len, stored_len: header.stored_len, chunks })
    }

    /// Returns room for the header and then the frame's plaintext: the list of its chunks, and the chunks. Those are moved only
    /// where the list is longer than the room for it.
    fn with_header_and_list(self) -> Buffer {
        // whoever made it bounds the number of chunks
        let count = u32::try_from(self.chunks.len()).unwrap_or(u32::MAX);
        let mut front = Vec::with_capacity(FRAME_HEADER_LEN + list_len(self.chunks.len()));
        front.resize(FRAME_HEADER_LEN, 0);
        front.extend_from_slice(&count.to_le_bytes());
        for chunk in &self.chunks {
            front.extend_from_slice(&(u32::from(chunk.kind.as_byte()) << 24 | chunk.len).to_le_bytes());
        }
        let Self { mut memory, end, .. } = self;
        let Some(start) = ROOM.checked_sub(front.len()) else {
            front.extend_from_slice(memory.get(ROOM..end).unwrap_or_default());
            return front.into();
        };
        memory.narrow(start..end);
        memory.iter_mut().zip(front).for_each(|(place, byte)| *place = byte);
        memory
    }

    fn framed_chunks(&self) -> Vec<FramedChunk> {
        let list_len = u32::try_from(list_len(self.chunks.len())).unwrap_or(u32::MAX);
        let place = |next: &mut u32, chunk: &RawChunk| {
            let offset = *next;
            *next = offset.saturating_add(chunk.len);
            Some(FramedChunk { kind: chunk.kind, id: chunk.id, offset, len: chunk.len })
        };
        self.chunks.iter().scan(list_len, place).collect()
    }
}

/// Returns what compresses frames. At the default level its tables are smaller than zstd's own choice for a MiB, 320 KiB
/// together: they stay in the caches of a processor that does everything else besides, which saves 5% of a first backup's
/// CPU time at 0.8% more bytes.
fn compressor(level: i32) -> std::io::Result<Compressor<'static>> {
    let mut compressor = Compressor::new(level)?;
    if level == DEFAULT_ZSTD_LEVEL {
        compressor.set_parameter(CParameter::HashLog(16))?;
        compressor.set_parameter(CParameter::ChainLog(14))?;
    }
    Ok(compressor)
}

impl Workspace {
    /// Returns room for a header and what `plain` is compressed to; `None` where that is not shorter.
    fn compress(&mut self, plain: &[u8], level: i32) -> Option<Buffer> {
        if is_noise(plain) && !self.finds_repetition(plain) {
            return None;
        }
        if self.compressor.as_ref().is_none_or(|(made_for, _)| *made_for != level) {
            self.compressor = compressor(level).ok().map(|compressor| (level, compressor));
        }
        let (_, compressor) = self.compressor.as_mut()?;
        let mut packed = MEMORY.take(FRAME_HEADER_LEN + zstd::zstd_safe::compress_bound(plain.len()));
        let content = packed.get_mut(FRAME_HEADER_LEN..)?;
        let len = compressor.compress_to_buffer(plain, content).ok().filter(|len| *len < plain.len())?;
        packed.truncate(FRAME_HEADER_LEN + len);
        Some(packed)
    }

    /// Returns true if a part of `plain` gets shorter by compression of the quick sort.
    fn finds_repetition(&mut self, plain: &[u8]) -> bool {
        let middle = plain.len().saturating_sub(PROBE_LEN) / 2;
        let part = plain.get(middle..).map_or(plain, |rest| rest.get(..PROBE_LEN).unwrap_or(rest));
        if self.probe.is_none() {
            self.probe = Compressor::new(1).ok();
        }
        let Some(probe) = &mut self.probe else { return true };
        self.probed.clear();
        self.probed.reserve(zstd::zstd_safe::compress_bound(part.len()));
        probe.compress_to_buffer(part, &mut self.probed).is_ok_and(|len| len < part.len())
    }
}

/// Pieces of a frame in which bytes are counted, and bytes of each.
const SAMPLES: usize = 32;
const SAMPLE_LEN: usize = 512;
/// What is compressed of a frame whose bytes look like noise, bytes.
const PROBE_LEN: usize = 32 << 10;

/// Returns true if every byte value is about as frequent as every other, as in what is compressed or encrypted already:
/// the time to compress that again is mostly for nothing.
///
/// Bytes are counted in samples, and their frequencies compared with equal ones (Pearson's chi-squared: 255 on average for
/// noise, with a standard deviation of 23). At the limit a coder of single bytes would save 0.4 %.
fn is_noise(plain: &[u8]) -> bool {
    const LIMIT: u64 = 700;
    let Some(step) = plain.len().checked_div(SAMPLES).filter(|step| *step >= SAMPLE_LEN) else {
        return false;
    };
    let mut counts = [0u64; 256];
    for sample in plain.chunks_exact(step) {
        for byte in sample.iter().take(SAMPLE_LEN) {
            if let Some(count) = counts.get_mut(usize::from(*byte)) {
                *count += 1;
            }
        }
    }
    let total: u64 = counts.iter().sum();
    let squares: u64 = counts.iter().map(|count| count * count).sum();
    squares * 256 < total * (total + LIMIT)
}

/// Writes a frame's header over the room for it.
fn put_header(header: &FrameHeader, bytes: &mut [u8]) {
    bytes.iter_mut().zip(header.encode()).for_each(|(place, byte)| *place = byte);
}

/// Returns the length of a chunk that may be in a frame.
fn chunk_len(id: ChunkId, plain: &[u8]) -> Result<u32> {
    match u32::try_from(plain.len()) {
        Ok(len) if (1..=MAX_CHUNK_LEN).contains(&len) => Ok(len),
        _ => {
            let fault = FormatFault::Invalid { what: "a chunk's length", found: plain.len().to_string() };
            Err(Error::malformed(format!("chunk {id}"), fault))
        }
    }
}

fn bounded(what: &'static str, len: usize) -> Result<u32> {
    match u32::try_from(len) {
        Ok(len) if len <= MAX_FRAME_RAW_LEN => Ok(len),
        _ => {
            let max = u64::from(MAX_FRAME_RAW_LEN);
            Err(Error::malformed("a new frame", FormatFault::TooLarge { what, found: len as u64, max }))
        }
    }
}

fn check_encoding(bytes: &[u8], plain: &[u8], scratch: &mut Vec<u8>) -> Result<()> {
    let opened = FrameHeader::decode(bytes).and_then(|header| {
        let content = bytes.get(FRAME_HEADER_LEN..).unwrap_or_default();
        unpack(&header, content, scratch)
    });
    if opened.is_ok() && scratch.as_slice() == plain {
        return Ok(());
    }
    Err(Error::Damaged(format!(
        "a new frame of {} bytes does not decompress to what went into it: memory or compressor is faulty",
        plain.len()
    )))
}

/// Undoes the compression of a frame's content into `plain`, which it replaces.
///
/// # Errors
/// Any [`FormatFault`]. No more than the `raw_len` of the header (bounded by its decoding) is allocated.
fn unpack(header: &FrameHeader, content: &[u8], plain: &mut Vec<u8>) -> Result<(), FormatFault> {
    let expected = u64::from(header.raw_len);
    plain.clear();
    match header.codec {
        CODEC_STORED if content.len() as u64 == expected => plain.extend_from_slice(content),
        CODEC_STORED => return Err(FormatFault::Decompress { expected }),
        CODEC_ZSTD if !is_zstd_frame_of(expected, content) => {
            return Err(FormatFault::Decompress { expected });
        }
        CODEC_ZSTD => {
            plain.reserve(header.raw_len as usize);
            DECOMPRESSOR
                .with_borrow_mut(|decompressor| decompressor.decompress_to_buffer(content, plain))
                .map_err(|_| FormatFault::Decompress { expected })?;
        }
        other => return Err(FormatFault::Codec(other)),
    }
    if plain.len() as u64 == expected { Ok(()) } else { Err(FormatFault::Decompress { expected }) }
}

/// Returns the plaintext length that a zstd frame states at its front, bytes.
pub(super) fn stated_raw_len(content: &[u8]) -> Option<u64> {
    zstd::zstd_safe::get_frame_content_size(content).ok().flatten()
}

/// Returns true if `content` is one zstd frame, and no more, that states `raw_len` bytes; looks at headers only.
fn is_zstd_frame_of(raw_len: u64, content: &[u8]) -> bool {
    stated_raw_len(content) == Some(raw_len)
        && zstd::zstd_safe::find_frame_compressed_size(content) == Ok(content.len())
}

/// Returns a frame's plaintext: the list of its chunks, then the chunks
/// ([`frame_chunks`](crate::format::pack::frame_chunks) reads the list).
///
/// `bytes` are the frame's header and content, as `entry` places them. Allocates `entry.raw_len` bytes, which are
/// at most [`MAX_FRAME_RAW_LEN`]. The chunks are not checked against their ids.
///
/// # Errors
/// Any [`FormatFault`]; one if header and entry disagree.
pub fn open_frame(bytes: &[u8], entry: &FrameEntry) -> Result<Vec<u8>, FormatFault> {
    let mut plain = Vec::new();
    match open_frame_into(bytes, entry, &mut plain)? {
        Plaintext::Stored(front) => Ok(bytes.get(front..).unwrap_or_default().to_vec()),
        Plaintext::Unpacked => Ok(plain),
    }
}

/// Where the plaintext of a frame that was opened stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plaintext {
    /// In the frame itself, from this byte on: it was stored as it is.
    Stored(usize),
    /// In the memory for it.
    Unpacked,
}

/// As [`open_frame`], into memory that is used again, unless the frame holds its plaintext as it is. What `plain` held is gone.
///
/// # Errors
/// As [`open_frame`].
pub fn open_frame_into(
    bytes: &[u8],
    entry: &FrameEntry,
    plain: &mut Vec<u8>,
) -> Result<Plaintext, FormatFault> {
    let header = FrameHeader::decode(bytes)?;
    for (what, found, expected) in [
        ("the plaintext's length", header.raw_len, entry.raw_len),
        ("the stored length", header.stored_len, entry.stored_len),
    ] {
        if found != expected {
            let (found, expected) = (found.to_string(), expected.to_string());
            return Err(FormatFault::Mismatch { what, found, expected });
        }
    }
    let content = bytes.get(FRAME_HEADER_LEN..).unwrap_or_default();
    let (found, needed) = (content.len() as u64, u64::from(header.stored_len));
    if found < needed {
        let header_len = FRAME_HEADER_LEN as u64;
        return Err(FormatFault::Truncated { found: found + header_len, needed: needed + header_len });
    }
    if found > needed {
        return Err(FormatFault::Trailing { extra: found - needed });
    }
    if header.codec == CODEC_STORED && header.stored_len == header.raw_len {
        return Ok(Plaintext::Stored(FRAME_HEADER_LEN));
    }
    unpack(&header, content, plain)?;
    Ok(Plaintext::Unpacked)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that nothing compresses.
    fn noise(len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    #[test]
    fn noise_is_not_compressed_and_what_only_looks_like_it_is() {
        let mut workspace = Workspace::default();
        assert!(is_noise(&noise(512 << 10)));
        assert!(workspace.compress(&noise(512 << 10), 3).is_none());
        // every byte value as often as any other, and yet the same again and again
        let repeated = noise(24 << 10).repeat(21);
        assert!(is_noise(&repeated));
        assert!(workspace.compress(&repeated, 3).unwrap().len() < 32 << 10);
        let text: Vec<u8> = noise(512 << 10).iter().map(|byte| byte % 64).collect();
        assert!(!is_noise(&text) && workspace.compress(&text, 3).is_some());
        // too short to tell
        assert!(!is_noise(&noise(1000)));
    }

    #[test]
    fn the_encode_check_notices_a_wrong_frame() {
        let mut builder = FrameBuilder::new(4096);
        let id = ChunkId::from_bytes([7; 32]);
        let frame = builder.push(ChunkKind::Data, id, &[5; 8192]).unwrap().unwrap();
        let encoded = frame.clone().encode(3).unwrap();
        let whole = frame.with_header_and_list();
        let (mut plain, mut scratch) = (whole[FRAME_HEADER_LEN..].to_vec(), Vec::new());
        assert!(check_encoding(&encoded.bytes, &plain, &mut scratch).is_ok());
        plain[100] ^= 1;
        assert!(matches!(check_encoding(&encoded.bytes, &plain, &mut scratch), Err(Error::Damaged(_))));
        plain[100] ^= 1;
        let cut = &encoded.bytes[..encoded.bytes.len() - 1];
        assert!(matches!(check_encoding(cut, &plain, &mut scratch), Err(Error::Damaged(_))));
    }
}

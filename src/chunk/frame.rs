//! Frames: chunks compressed together.

use std::cell::RefCell;
use std::sync::Mutex;

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::CParameter;

use crate::error::{Error, FormatFault, Result};
use crate::format::envelope::{CODEC_STORED, CODEC_ZSTD};
use crate::format::limits::{MAX_CHUNK_LEN, MAX_FRAME_CHUNKS, MAX_FRAME_RAW_LEN};
use crate::format::node::ChunkKind;
use crate::format::pack::{FRAME_HEADER_LEN, FrameEntry, FrameHeader};
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

/// Room in front of a frame's chunks for the header and the list of them, bytes: the list of 255 chunks is put there
/// without moving them, and few frames have more.
const ROOM: usize = FRAME_HEADER_LEN + list_len(255);

/// Bytes of the list of so many chunks.
const fn list_len(chunks: usize) -> usize {
    4 + 4 * chunks
}

/// Chunks that will be compressed together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawFrame {
    chunks: Vec<RawChunk>,
    /// [`ROOM`] bytes, then the chunks, one behind the other.
    content: Vec<u8>,
}

impl Default for RawFrame {
    fn default() -> Self {
        Self { chunks: Vec::new(), content: vec![0; ROOM] }
    }
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

/// A frame as it stands in a pack, and what is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedFrame {
    /// Header and content.
    pub bytes: Vec<u8>,
    /// Bytes of plaintext, its list of chunks included.
    pub raw_len: u32,
    /// Bytes of content as stored, behind the header.
    pub stored_len: u32,
    pub chunks: Vec<FramedChunk>,
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
        Self { target_len: target_len.min(MAX_TARGET_LEN) as usize, frame: RawFrame::default() }
    }

    /// Adds a chunk; returns the frame if that filled it.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the chunk is empty or longer than [`MAX_CHUNK_LEN`].
    pub fn push(&mut self, kind: ChunkKind, id: ChunkId, plain: &[u8]) -> Result<Option<RawFrame>> {
        let len = match u32::try_from(plain.len()) {
            Ok(len) if (1..=MAX_CHUNK_LEN).contains(&len) => len,
            _ => {
                let found = plain.len().to_string();
                let fault = FormatFault::Invalid { what: "a chunk's length", found };
                return Err(Error::malformed(format!("chunk {id}"), fault));
            }
        };
        if self.frame.chunks.is_empty() {
            // one allocation for most frames: what fills it passes the target by a part of a chunk
            self.frame.content.reserve_exact(self.target_len + self.target_len / 4 + plain.len());
        }
        self.frame.chunks.push(RawChunk { kind, id, len });
        self.frame.content.extend_from_slice(plain);
        let full = self.frame.content_len() >= self.target_len
            || self.frame.chunks.len() >= MAX_FRAME_CHUNKS as usize;
        Ok(if full { self.flush() } else { None })
    }

    /// Returns the frame begun, if it has a chunk.
    pub fn flush(&mut self) -> Option<RawFrame> {
        let frame = std::mem::take(&mut self.frame);
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
    packed: Vec<u8>,
    checked: Vec<u8>,
}

/// Those that nobody uses now, several MiB each. There are as many as frames were ever encoded at once, which is fewer than
/// all threads of sessions that write at the same time.
static WORKSPACES: Mutex<Vec<Workspace>> = Mutex::new(Vec::new());

thread_local! {
    static DECOMPRESSOR: RefCell<Decompressor<'static>> = RefCell::new(Decompressor::default());
}

impl RawFrame {
    /// Returns the chunks in order.
    pub fn chunks(&self) -> &[RawChunk] {
        &self.chunks
    }

    /// Returns the bytes of all chunks.
    pub fn content_len(&self) -> usize {
        self.content.len() - ROOM
    }

    /// Compresses the frame, then decompresses the result and compares: a faulty encoder or memory is
    /// noticed while the disk can still be read again. CPU-bound; meant for worker threads.
    ///
    /// # Errors
    /// [`Error::Damaged`] if the comparison fails.
    pub fn encode(self, zstd_level: i32) -> Result<EncodedFrame> {
        let chunks = self.framed_chunks();
        let (mut whole, start) = self.with_header_and_list();
        let plain = whole.get(start + FRAME_HEADER_LEN..).unwrap_or_default();
        let raw_len = bounded("the frame", plain.len())?;
        let mut workspace = WORKSPACES.lock().ok().and_then(|mut spare| spare.pop()).unwrap_or_default();
        if workspace.compress(plain, zstd_level) {
            let stored_len = bounded("the stored frame", workspace.packed.len())?;
            let header = FrameHeader { codec: CODEC_ZSTD, raw_len, stored_len }.encode();
            let mut bytes = Vec::with_capacity(header.len() + workspace.packed.len());
            bytes.extend_from_slice(&header);
            bytes.extend_from_slice(&workspace.packed);
            check_encoding(&bytes, plain, &mut workspace.checked)?;
            whole = bytes;
        } else {
            // the content stays as it is: nothing was done that could be undone and compared
            whole.drain(..start);
            let header = FrameHeader { codec: CODEC_STORED, raw_len, stored_len: raw_len }.encode();
            whole.iter_mut().zip(header).for_each(|(place, byte)| *place = byte);
        }
        if let Ok(mut spare) = WORKSPACES.lock() {
            spare.push(workspace);
        }
        let stored_len = bounded("the stored frame", whole.len() - FRAME_HEADER_LEN)?;
        Ok(EncodedFrame { bytes: whole, raw_len, stored_len, chunks })
    }

    /// Returns memory in which, from a position on that is returned too, there is room for the header and then the frame's
    /// plaintext: the list of its chunks, and the chunks. Those are moved only where the list is longer than the room for it.
    fn with_header_and_list(self) -> (Vec<u8>, usize) {
        // the builder bounds the number of chunks
        let count = u32::try_from(self.chunks.len()).unwrap_or(u32::MAX);
        let mut front = Vec::with_capacity(FRAME_HEADER_LEN + list_len(self.chunks.len()));
        front.resize(FRAME_HEADER_LEN, 0);
        front.extend_from_slice(&count.to_le_bytes());
        for chunk in &self.chunks {
            front.extend_from_slice(&(u32::from(chunk.kind.as_byte()) << 24 | chunk.len).to_le_bytes());
        }
        let Self { mut content, .. } = self;
        match ROOM.checked_sub(front.len()) {
            Some(unused) => {
                content.iter_mut().skip(unused).zip(front).for_each(|(place, byte)| *place = byte);
                (content, unused)
            }
            None => {
                drop(content.splice(..ROOM, front));
                (content, 0)
            }
        }
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
    /// Compresses `plain` into `packed`; returns false where that does not make it shorter.
    fn compress(&mut self, plain: &[u8], level: i32) -> bool {
        if is_noise(plain) && !self.finds_repetition(plain) {
            return false;
        }
        if self.compressor.as_ref().is_none_or(|(made_for, _)| *made_for != level) {
            self.compressor = compressor(level).ok().map(|compressor| (level, compressor));
        }
        let Some((_, compressor)) = &mut self.compressor else {
            return false;
        };
        self.packed.clear();
        self.packed.reserve(zstd::zstd_safe::compress_bound(plain.len()));
        let packed = compressor.compress_to_buffer(plain, &mut self.packed);
        packed.is_ok_and(|len| len < plain.len())
    }

    /// Returns true if a part of `plain` gets shorter by compression of the quick sort.
    fn finds_repetition(&mut self, plain: &[u8]) -> bool {
        let middle = plain.len().saturating_sub(PROBE_LEN) / 2;
        let part = plain.get(middle..).map_or(plain, |rest| rest.get(..PROBE_LEN).unwrap_or(rest));
        if self.probe.is_none() {
            self.probe = Compressor::new(1).ok();
        }
        let Some(probe) = &mut self.probe else { return true };
        self.packed.clear();
        self.packed.reserve(zstd::zstd_safe::compress_bound(part.len()));
        probe.compress_to_buffer(part, &mut self.packed).is_ok_and(|len| len < part.len())
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
        let mut workspace =
            Workspace { compressor: None, probe: None, packed: Vec::new(), checked: Vec::new() };
        assert!(is_noise(&noise(512 << 10)));
        assert!(!workspace.compress(&noise(512 << 10), 3));
        // every byte value as often as any other, and yet the same again and again
        let repeated = noise(24 << 10).repeat(21);
        assert!(is_noise(&repeated) && workspace.compress(&repeated, 3));
        assert!(workspace.packed.len() < 32 << 10);
        let text: Vec<u8> = noise(512 << 10).iter().map(|byte| byte % 64).collect();
        assert!(!is_noise(&text) && workspace.compress(&text, 3));
        // too short to tell
        assert!(!is_noise(&noise(1000)));
    }

    #[test]
    fn the_encode_check_notices_a_wrong_frame() {
        let mut builder = FrameBuilder::new(4096);
        let id = ChunkId::from_bytes([7; 32]);
        let frame = builder.push(ChunkKind::Data, id, &[5; 8192]).unwrap().unwrap();
        let encoded = frame.clone().encode(3).unwrap();
        let (whole, start) = frame.with_header_and_list();
        let (mut plain, mut scratch) = (whole[start + FRAME_HEADER_LEN..].to_vec(), Vec::new());
        assert!(check_encoding(&encoded.bytes, &plain, &mut scratch).is_ok());
        plain[100] ^= 1;
        assert!(matches!(check_encoding(&encoded.bytes, &plain, &mut scratch), Err(Error::Damaged(_))));
        plain[100] ^= 1;
        let cut = &encoded.bytes[..encoded.bytes.len() - 1];
        assert!(matches!(check_encoding(cut, &plain, &mut scratch), Err(Error::Damaged(_))));
    }
}

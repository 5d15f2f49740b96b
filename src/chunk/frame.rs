//! Frames: chunks compressed together.

use std::cell::RefCell;

use zstd::bulk::{Compressor, Decompressor};

use crate::error::{Error, FormatFault, Result};
use crate::format::envelope::{CODEC_STORED, CODEC_ZSTD};
use crate::format::limits::{MAX_CHUNK_LEN, MAX_FRAME_CHUNKS, MAX_FRAME_RAW_LEN};
use crate::format::node::ChunkKind;
use crate::format::pack::{FRAME_HEADER_LEN, FrameEntry, FrameHeader};
use crate::id::ChunkId;

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

/// Chunks that will be compressed together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RawFrame {
    chunks: Vec<RawChunk>,
    /// The chunks, one behind the other.
    content: Vec<u8>,
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
            self.frame.content.reserve(self.target_len + self.target_len / 4 + plain.len());
        }
        self.frame.chunks.push(RawChunk { kind, id, len });
        self.frame.content.extend_from_slice(plain);
        let full = self.frame.content.len() >= self.target_len
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
        self.frame.content.len()
    }
}

/// What a worker thread reuses from frame to frame.
struct Workspace {
    compressor: Option<(i32, Compressor<'static>)>,
    plain: Vec<u8>,
    packed: Vec<u8>,
    checked: Vec<u8>,
}

thread_local! {
    static WORKSPACE: RefCell<Workspace> = const {
        RefCell::new(Workspace { compressor: None, plain: Vec::new(), packed: Vec::new(), checked: Vec::new() })
    };
    static DECOMPRESSOR: RefCell<Decompressor<'static>> = RefCell::new(Decompressor::default());
}

impl RawFrame {
    /// Returns the chunks in order.
    pub fn chunks(&self) -> &[RawChunk] {
        &self.chunks
    }

    /// Returns the bytes of all chunks.
    pub fn content_len(&self) -> usize {
        self.content.len()
    }

    /// Compresses the frame, then decompresses the result and compares: a faulty encoder or memory is
    /// noticed while the disk can still be read again. CPU-bound; meant for worker threads.
    ///
    /// # Errors
    /// [`Error::Damaged`] if the comparison fails.
    pub fn encode(&self, zstd_level: i32) -> Result<EncodedFrame> {
        WORKSPACE.with_borrow_mut(|workspace| {
            self.write_plain(&mut workspace.plain);
            let packed = workspace.compress(zstd_level);
            let (codec, stored) = match packed {
                true => (CODEC_ZSTD, &workspace.packed),
                false => (CODEC_STORED, &workspace.plain),
            };
            let header = FrameHeader {
                codec,
                raw_len: bounded("the frame", workspace.plain.len())?,
                stored_len: bounded("the stored frame", stored.len())?,
            };
            let mut bytes = Vec::with_capacity(FRAME_HEADER_LEN + stored.len());
            bytes.extend_from_slice(&header.encode());
            bytes.extend_from_slice(stored);
            check_encoding(&bytes, &workspace.plain, &mut workspace.checked)?;
            let chunks = self.framed_chunks();
            Ok(EncodedFrame { bytes, raw_len: header.raw_len, stored_len: header.stored_len, chunks })
        })
    }

    fn write_plain(&self, plain: &mut Vec<u8>) {
        plain.clear();
        plain.reserve(4 + 4 * self.chunks.len() + self.content.len());
        // the builder bounds the number of chunks
        let count = u32::try_from(self.chunks.len()).unwrap_or(u32::MAX);
        plain.extend_from_slice(&count.to_le_bytes());
        for chunk in &self.chunks {
            plain.extend_from_slice(&(u32::from(chunk.kind.as_byte()) << 24 | chunk.len).to_le_bytes());
        }
        plain.extend_from_slice(&self.content);
    }

    fn framed_chunks(&self) -> Vec<FramedChunk> {
        let list_len = u32::try_from(4 + 4 * self.chunks.len()).unwrap_or(u32::MAX);
        let place = |next: &mut u32, chunk: &RawChunk| {
            let offset = *next;
            *next = offset.saturating_add(chunk.len);
            Some(FramedChunk { kind: chunk.kind, id: chunk.id, offset, len: chunk.len })
        };
        self.chunks.iter().scan(list_len, place).collect()
    }
}

impl Workspace {
    /// Compresses `plain` into `packed`; returns false where that does not make it shorter.
    fn compress(&mut self, level: i32) -> bool {
        if self.compressor.as_ref().is_none_or(|(made_for, _)| *made_for != level) {
            self.compressor = Compressor::new(level).ok().map(|compressor| (level, compressor));
        }
        let Some((_, compressor)) = &mut self.compressor else {
            return false;
        };
        self.packed.clear();
        self.packed.reserve(zstd::zstd_safe::compress_bound(self.plain.len()));
        let packed = compressor.compress_to_buffer(&self.plain, &mut self.packed);
        packed.is_ok_and(|len| len < self.plain.len())
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
    let mut plain = Vec::new();
    unpack(&header, content, &mut plain)?;
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_encode_check_notices_a_wrong_frame() {
        let mut builder = FrameBuilder::new(4096);
        let id = ChunkId::from_bytes([7; 32]);
        let frame = builder.push(ChunkKind::Data, id, &[5; 8192]).unwrap().unwrap();
        let encoded = frame.encode(3).unwrap();
        let (mut plain, mut scratch) = (Vec::new(), Vec::new());
        frame.write_plain(&mut plain);
        assert!(check_encoding(&encoded.bytes, &plain, &mut scratch).is_ok());
        plain[100] ^= 1;
        assert!(matches!(check_encoding(&encoded.bytes, &plain, &mut scratch), Err(Error::Damaged(_))));
        plain[100] ^= 1;
        let cut = &encoded.bytes[..encoded.bytes.len() - 1];
        assert!(matches!(check_encoding(cut, &plain, &mut scratch), Err(Error::Damaged(_))));
    }
}

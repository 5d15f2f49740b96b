//! Frames of a pack whose table or tail is lost.

use crate::chunk::frame::{open_frame, stated_raw_len};
use crate::format::envelope::{CODEC_STORED, CODEC_ZSTD};
use crate::format::limits::MAX_PACK_LEN;
use crate::format::pack::{FRAME_HEADER_LEN, FRAME_MAGIC, FrameChunk, FrameEntry, FrameHeader, frame_chunks};

/// Bytes that may be read and decompressed in vain before a scan gives up: a minute or two of work. Only a disk
/// whose owner filled it with false frames gets there, and only where damage laid its content bare.
const WASTE_LIMIT: u64 = 256 << 30;

/// A frame found by its looks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SalvagedFrame {
    pub entry: FrameEntry,
    /// The chunks, by their place in `plain`.
    pub chunks: Vec<FrameChunk>,
    pub plain: Vec<u8>,
}

impl SalvagedFrame {
    /// Returns the chunks with their content; one that reaches beyond the frame is left out.
    pub fn contents(&self) -> impl Iterator<Item = (&FrameChunk, &[u8])> {
        self.chunks.iter().filter_map(|chunk| {
            let start = chunk.offset as usize;
            Some((chunk, self.plain.get(start..start.saturating_add(chunk.len as usize))?))
        })
    }
}

/// Scans bytes for frames that open, one after the other; a frame at a time is in memory.
///
/// The ids of the chunks are not known: the caller computes them, and a chunk counts only for what it then is. So
/// nothing is believed that a guest's disk may hold and that looks like a frame.
#[derive(Debug)]
pub struct Salvage<'a> {
    bytes: &'a [u8],
    position: usize,
    wasted_bytes: u64,
}

impl<'a> Salvage<'a> {
    /// Begins a scan; bytes behind the longest pack are left out.
    pub fn new(bytes: &'a [u8]) -> Self {
        let len = usize::try_from(MAX_PACK_LEN).unwrap_or(usize::MAX).min(bytes.len());
        Self { bytes: bytes.get(..len).unwrap_or_default(), position: 0, wasted_bytes: 0 }
    }

    /// Goes on with what other scans have wasted: they share one limit.
    #[must_use]
    pub fn behind(self, wasted_bytes: u64) -> Self {
        Self { wasted_bytes, ..self }
    }

    /// Returns the bytes that were read and decompressed in vain.
    pub fn wasted_bytes(&self) -> u64 {
        self.wasted_bytes
    }

    /// Returns true if the scan gave up because too much looked like a frame and was none.
    pub fn gave_up(&self) -> bool {
        self.wasted_bytes > WASTE_LIMIT
    }

    fn open_at(&mut self, start: usize) -> Option<SalvagedFrame> {
        let rest = self.bytes.get(start..)?;
        let header = FrameHeader::decode(rest).ok()?;
        let framed = rest.get(..FRAME_HEADER_LEN + header.stored_len as usize)?;
        let entry = FrameEntry {
            offset: u32::try_from(start).ok()?,
            stored_len: header.stored_len,
            raw_len: header.raw_len,
        };
        if !is_plausible(&header, framed.get(FRAME_HEADER_LEN..)?) {
            return None;
        }
        let plain = open_frame(framed, &entry).ok();
        let found = plain.and_then(|plain| {
            let chunks = frame_chunks(&plain).ok()?;
            Some(SalvagedFrame { entry, chunks, plain })
        });
        if found.is_none() {
            self.wasted_bytes += u64::from(header.raw_len) + u64::from(header.stored_len);
        }
        found
    }
}

/// Returns false for what costs little to see that it is no frame.
fn is_plausible(header: &FrameHeader, content: &[u8]) -> bool {
    match header.codec {
        CODEC_STORED => header.raw_len == header.stored_len && frame_chunks(content).is_ok(),
        CODEC_ZSTD => stated_raw_len(content) == Some(u64::from(header.raw_len)),
        _ => false,
    }
}

impl Iterator for Salvage<'_> {
    type Item = SalvagedFrame;

    fn next(&mut self) -> Option<SalvagedFrame> {
        while !self.gave_up() {
            let rest = self.bytes.get(self.position..)?;
            let start = self.position + rest.windows(FRAME_MAGIC.len()).position(|w| w == FRAME_MAGIC)?;
            if let Some(frame) = self.open_at(start) {
                self.position = usize::try_from(frame.entry.end()).ok()?;
                return Some(frame);
            }
            self.position = start + FRAME_MAGIC.len();
        }
        None
    }
}

//! Packs: the files that hold frames of chunks and the table that finds them.
//!
//! ```text
//! header, 64 bytes
//!      0   8  magic "vmkpPACK"
//!      8   2  format version
//!     10   1  kind: 0 data, 1 metadata
//!     11   1  seal of frames and table: 0 none
//!     12   4  zero
//!     16  16  repository id
//!     32  32  random salt: no two packs have one id
//! frames, one behind the other; each
//!      0   4  magic "FRM1"
//!      4   1  codec: 0 stored, 1 zstd
//!      5   1  seal: 0 none
//!      6   2  zero
//!      8   4  raw_len
//!     12   4  stored_len
//!     16   n  content
//! table, `table_stored_len` bytes: codec-encoded [`PackTable`], compressed as the footer says
//! footer, 64 bytes
//!      0   8  table_offset
//!      8   4  table_raw_len
//!     12   4  table_stored_len
//!     16   1  codec of the table
//!     17   1  seal of the table: 0 none
//!     18   6  zero
//!     24  32  BLAKE3-256 of the table as stored
//!     56   8  magic "vmkpTAIL"
//! ```
//!
//! The plaintext of a frame is the number of its chunks (u32), for each chunk `kind << 24 | length` (u32),
//! then the chunks. So a frame explains itself, also where table and segment are lost.

use bincode::{Decode, Encode};

use crate::error::FormatFault;
use crate::format::codec;
use crate::format::envelope::{Fields, SEAL_NONE, compress, decompress};
use crate::format::limits::{
    FORMAT_VERSION, MAX_CHUNK_LEN, MAX_FRAME_CHUNKS, MAX_FRAME_RAW_LEN, MAX_PACK_LEN, MAX_PACK_TABLE_LEN,
};
use crate::format::node::ChunkKind;
use crate::id::{ChunkId, RepositoryId};

/// Bytes before the first frame.
pub const PACK_HEADER_LEN: usize = 64;
/// Bytes before a frame's content.
pub const FRAME_HEADER_LEN: usize = 16;
/// Bytes behind the table.
pub const PACK_FOOTER_LEN: usize = 64;

const PACK_MAGIC: [u8; 8] = *b"vmkpPACK";
const TAIL_MAGIC: [u8; 8] = *b"vmkpTAIL";
/// First bytes of a frame; a salvage scan looks for them.
pub const FRAME_MAGIC: [u8; 4] = *b"FRM1";
const TABLE_ZSTD_LEVEL: i32 = 3;

/// What a pack holds: disk content, or nodes and copies of points.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub enum PackKind {
    Data,
    Metadata,
}

impl PackKind {
    const fn as_byte(self) -> u8 {
        match self {
            Self::Data => 0,
            Self::Metadata => 1,
        }
    }
}

/// A pack's first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackHeader {
    pub kind: PackKind,
    pub repository: RepositoryId,
    pub salt: [u8; 32],
}

impl PackHeader {
    /// Encodes the header.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(PACK_HEADER_LEN);
        bytes.extend_from_slice(&PACK_MAGIC);
        bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes.extend_from_slice(&[self.kind.as_byte(), SEAL_NONE, 0, 0, 0, 0]);
        bytes.extend_from_slice(self.repository.as_bytes());
        bytes.extend_from_slice(&self.salt);
        bytes
    }

    /// Decodes the header off the front of `bytes`.
    ///
    /// # Errors
    /// Any [`FormatFault`].
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatFault> {
        let mut fields = Fields::new(bytes);
        fields.magic(PACK_MAGIC)?;
        fields.version()?;
        let [kind, seal] = fields.take()?;
        fields.zero::<4>("a reserved field")?;
        let kind = match kind {
            0 => PackKind::Data,
            1 => PackKind::Metadata,
            other => return Err(FormatFault::Invalid { what: "the pack's kind", found: other.to_string() }),
        };
        if seal != SEAL_NONE {
            return Err(FormatFault::Seal(seal));
        }
        Ok(Self { kind, repository: RepositoryId::from_bytes(fields.take()?), salt: fields.take()? })
    }
}

/// Where a frame stands and how it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
pub struct FrameEntry {
    /// First byte of the frame's header in the pack.
    pub offset: u32,
    /// Bytes of content as stored, behind the header.
    pub stored_len: u32,
    /// Bytes of plaintext, its list of chunk lengths included.
    pub raw_len: u32,
}

impl FrameEntry {
    /// Returns the byte behind the frame.
    pub fn end(&self) -> u64 {
        u64::from(self.offset) + FRAME_HEADER_LEN as u64 + u64::from(self.stored_len)
    }
}

/// A chunk of a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct TableChunk {
    pub id: ChunkId,
    pub kind: ChunkKind,
    /// Which frame of the pack.
    pub frame: u32,
    /// First byte in the frame's plaintext.
    pub offset: u32,
    pub len: u32,
}

/// The table of a pack: frames and chunks in the order in which they stand in it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct PackTable {
    pub frames: Vec<FrameEntry>,
    pub chunks: Vec<TableChunk>,
}

/// A pack's last bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackFooter {
    pub table_offset: u64,
    pub table_raw_len: u32,
    pub table_stored_len: u32,
    pub table_codec: u8,
    pub table_hash: [u8; 32],
}

impl PackFooter {
    /// Decodes the last [`PACK_FOOTER_LEN`] bytes of a pack of `pack_len` bytes.
    ///
    /// # Errors
    /// Any [`FormatFault`].
    pub fn decode(bytes: &[u8], pack_len: u64) -> Result<Self, FormatFault> {
        let mut fields = Fields::new(bytes);
        let table_offset = u64::from_le_bytes(fields.take()?);
        let table_raw_len = u32::from_le_bytes(fields.take()?);
        let table_stored_len = u32::from_le_bytes(fields.take()?);
        let [table_codec, seal] = fields.take()?;
        fields.zero::<6>("a reserved field")?;
        let table_hash = fields.take()?;
        fields.magic(TAIL_MAGIC)?;
        if seal != SEAL_NONE {
            return Err(FormatFault::Seal(seal));
        }
        let footer = Self { table_offset, table_raw_len, table_stored_len, table_codec, table_hash };
        let max = u64::from(MAX_PACK_TABLE_LEN);
        if table_raw_len > MAX_PACK_TABLE_LEN {
            return Err(FormatFault::TooLarge { what: "the table", found: u64::from(table_raw_len), max });
        }
        let end = table_offset.checked_add(u64::from(table_stored_len) + PACK_FOOTER_LEN as u64);
        if end != Some(pack_len) || table_offset < PACK_HEADER_LEN as u64 {
            return Err(FormatFault::Mismatch {
                what: "the end of the table",
                found: format!("{end:?}"),
                expected: pack_len.to_string(),
            });
        }
        Ok(footer)
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(PACK_FOOTER_LEN);
        bytes.extend_from_slice(&self.table_offset.to_le_bytes());
        bytes.extend_from_slice(&self.table_raw_len.to_le_bytes());
        bytes.extend_from_slice(&self.table_stored_len.to_le_bytes());
        bytes.extend_from_slice(&[self.table_codec, SEAL_NONE, 0, 0, 0, 0, 0, 0]);
        bytes.extend_from_slice(&self.table_hash);
        bytes.extend_from_slice(&TAIL_MAGIC);
        bytes
    }
}

impl PackTable {
    /// Encodes table and footer, to be written at `table_offset`.
    ///
    /// # Errors
    /// [`FormatFault::TooLarge`] if the table or the pack exceeds its bound.
    pub fn encode_tail(&self, table_offset: u64) -> Result<Vec<u8>, FormatFault> {
        let plain = codec::encode(self)?;
        let max = u64::from(MAX_PACK_TABLE_LEN);
        let too_large = |found: usize| FormatFault::TooLarge { what: "the table", found: found as u64, max };
        if plain.len() as u64 > max {
            return Err(too_large(plain.len()));
        }
        let (table_codec, stored) = compress(&plain, TABLE_ZSTD_LEVEL);
        let footer = PackFooter {
            table_offset,
            table_raw_len: u32::try_from(plain.len()).map_err(|_| too_large(plain.len()))?,
            table_stored_len: u32::try_from(stored.len()).map_err(|_| too_large(stored.len()))?,
            table_codec,
            table_hash: *blake3::hash(&stored).as_bytes(),
        };
        let mut tail = stored;
        tail.extend_from_slice(&footer.encode());
        let found = table_offset + tail.len() as u64;
        if found > MAX_PACK_LEN {
            return Err(FormatFault::TooLarge { what: "the pack", found, max: MAX_PACK_LEN });
        }
        Ok(tail)
    }

    /// Decodes the table's stored bytes and checks it against itself and against the pack's length.
    ///
    /// # Errors
    /// Any [`FormatFault`].
    pub fn decode(stored: &[u8], footer: &PackFooter) -> Result<Self, FormatFault> {
        if blake3::hash(stored).as_bytes() != &footer.table_hash {
            return Err(FormatFault::Checksum);
        }
        let plain = decompress(footer.table_codec, stored, footer.table_raw_len)?;
        let table: Self = codec::decode(&plain)?;
        table.check(footer.table_offset)?;
        Ok(table)
    }

    /// Checks that frames stand one behind the other below `end` and that every chunk is inside its frame.
    ///
    /// # Errors
    /// [`FormatFault::Invalid`] naming the entry.
    pub fn check(&self, end: u64) -> Result<(), FormatFault> {
        let mut position = PACK_HEADER_LEN as u64;
        for frame in &self.frames {
            let ordered = u64::from(frame.offset) >= position && frame.end() <= end;
            if !ordered || frame.raw_len > MAX_FRAME_RAW_LEN || frame.stored_len > MAX_FRAME_RAW_LEN {
                return Err(FormatFault::Invalid { what: "a frame's place", found: format!("{frame:?}") });
            }
            position = frame.end();
        }
        for chunk in &self.chunks {
            let frame = usize::try_from(chunk.frame).ok().and_then(|index| self.frames.get(index));
            let chunk_end = chunk.offset.checked_add(chunk.len);
            let inside = frame.zip(chunk_end).is_some_and(|(frame, end)| end <= frame.raw_len);
            if !inside || chunk.len == 0 || chunk.len > MAX_CHUNK_LEN {
                return Err(FormatFault::Invalid { what: "a chunk's place", found: format!("{chunk:?}") });
            }
        }
        Ok(())
    }
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    pub codec: u8,
    pub raw_len: u32,
    pub stored_len: u32,
}

impl FrameHeader {
    /// Encodes the header.
    pub fn encode(&self) -> [u8; FRAME_HEADER_LEN] {
        let mut bytes = [0; FRAME_HEADER_LEN];
        let mut fields = Vec::with_capacity(FRAME_HEADER_LEN);
        fields.extend_from_slice(&FRAME_MAGIC);
        fields.extend_from_slice(&[self.codec, SEAL_NONE, 0, 0]);
        fields.extend_from_slice(&self.raw_len.to_le_bytes());
        fields.extend_from_slice(&self.stored_len.to_le_bytes());
        bytes.copy_from_slice(&fields);
        bytes
    }

    /// Decodes the header off the front of `bytes`.
    ///
    /// # Errors
    /// Any [`FormatFault`].
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatFault> {
        let mut fields = Fields::new(bytes);
        fields.magic(FRAME_MAGIC)?;
        let [codec, seal] = fields.take()?;
        fields.zero::<2>("a reserved field")?;
        let raw_len = u32::from_le_bytes(fields.take()?);
        let stored_len = u32::from_le_bytes(fields.take()?);
        if seal != SEAL_NONE {
            return Err(FormatFault::Seal(seal));
        }
        for (what, len) in [("the frame", raw_len), ("the stored frame", stored_len)] {
            if len > MAX_FRAME_RAW_LEN {
                let max = u64::from(MAX_FRAME_RAW_LEN);
                return Err(FormatFault::TooLarge { what, found: u64::from(len), max });
            }
        }
        Ok(Self { codec, raw_len, stored_len })
    }
}

/// One chunk in the plaintext of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameChunk {
    pub kind: ChunkKind,
    /// First byte in the plaintext.
    pub offset: u32,
    pub len: u32,
}

/// Reads the list of chunks at the front of a frame's plaintext.
///
/// # Errors
/// Any [`FormatFault`]; the chunks must fill the plaintext exactly.
pub fn frame_chunks(plain: &[u8]) -> Result<Vec<FrameChunk>, FormatFault> {
    let mut fields = Fields::new(plain);
    let count = u32::from_le_bytes(fields.take()?);
    if count == 0 || count > MAX_FRAME_CHUNKS {
        let max = u64::from(MAX_FRAME_CHUNKS);
        return Err(FormatFault::TooLarge { what: "the number of chunks", found: u64::from(count), max });
    }
    let mut chunks = Vec::with_capacity(count as usize);
    let mut offset = 4 + 4 * count;
    for _ in 0..count {
        let word = u32::from_le_bytes(fields.take()?);
        let [_, _, _, kind] = word.to_le_bytes();
        let len = word & 0x00ff_ffff;
        let kind = ChunkKind::from_byte(kind)
            .ok_or(FormatFault::Invalid { what: "a chunk's kind", found: kind.to_string() })?;
        if len == 0 || len > MAX_CHUNK_LEN {
            return Err(FormatFault::Invalid { what: "a chunk's length", found: len.to_string() });
        }
        chunks.push(FrameChunk { kind, offset, len });
        // at most 8192 chunks of at most 1 MiB each could wrap: saturate, the comparison below fails
        offset = offset.saturating_add(len);
    }
    if u64::from(offset) == plain.len() as u64 {
        return Ok(chunks);
    }
    Err(FormatFault::Mismatch {
        what: "the length of the frame",
        found: plain.len().to_string(),
        expected: offset.to_string(),
    })
}

//! Packs: frames lined up in a file, with the table that finds them.

use crate::buffer::Buffer;
use crate::chunk::frame::EncodedFrame;
use crate::error::{Error, FormatFault, Result};
use crate::format::limits::{MAX_PACK_LEN, MAX_PACK_TABLE_LEN};
use crate::format::pack::{
    FrameEntry, PACK_FOOTER_LEN, PACK_HEADER_LEN, PackFooter, PackHeader, PackKind, PackTable, TableChunk,
};
use crate::id::{PackId, RepositoryId};

/// Encoded bytes of a chunk in a table: id, kind, frame, offset, length.
const TABLE_CHUNK_LEN: u64 = 32 + 4 + 4 + 4 + 4;
/// Encoded bytes of a frame in a table: offset, two lengths.
const TABLE_FRAME_LEN: u64 = 12;
/// Encoded bytes of the two list lengths of a table.
const TABLE_BASE_LEN: u64 = 16;

/// First guess at the bytes of table and footer; most tables come with one read, bytes.
const TAIL_GUESS_LEN: u64 = 64 << 10;

/// A pack ready to be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FinishedPack {
    pub id: PackId,
    pub kind: PackKind,
    /// The whole file.
    pub bytes: Buffer,
    pub table: PackTable,
}

impl FinishedPack {
    /// Returns the same content under another salt, so under another id: metadata is kept twice.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the bytes are no pack.
    pub fn twin(&self, salt: [u8; 32]) -> Result<Self> {
        let fault = |fault| Error::malformed(format!("pack {}", self.id), fault);
        let header = PackHeader { salt, ..PackHeader::decode(&self.bytes).map_err(fault)? };
        let mut bytes = Buffer::with_room(self.bytes.len());
        bytes.extend(&header.encode());
        bytes.extend(self.bytes.get(PACK_HEADER_LEN..).unwrap_or_default());
        let id = PackId::from_bytes(*blake3::hash(&bytes).as_bytes());
        Ok(Self { id, kind: self.kind, bytes, table: self.table.clone() })
    }
}

/// Lines frames up in a pack; hashes as they come, so that the end is cheap.
#[derive(Debug)]
pub struct PackBuilder {
    kind: PackKind,
    bytes: Buffer,
    hasher: blake3::Hasher,
    table: PackTable,
}

impl PackBuilder {
    /// Begins a pack; the salt has to be drawn at random, so that no two packs have one id.
    pub fn new(kind: PackKind, repository: RepositoryId, salt: [u8; 32]) -> Self {
        Self::reusing(Buffer::with_room(0), kind, repository, salt)
    }

    /// As [`PackBuilder::new`], in memory that another pack had: new memory has to be cleared by the system first.
    pub fn reusing(mut bytes: Buffer, kind: PackKind, repository: RepositoryId, salt: [u8; 32]) -> Self {
        bytes.truncate(0);
        bytes.extend(&PackHeader { kind, repository, salt }.encode());
        let mut hasher = blake3::Hasher::new();
        hasher.update(&bytes);
        Self { kind, bytes, hasher, table: PackTable::default() }
    }

    /// Appends a frame.
    ///
    /// # Errors
    /// [`Error::Malformed`] if pack or table would exceed its bound; the pack is as before.
    pub fn push(&mut self, frame: &EncodedFrame) -> Result<()> {
        let offset = self.fit(frame)?;
        let index = u32::try_from(self.table.frames.len()).unwrap_or(u32::MAX);
        self.bytes.extend(&frame.bytes);
        self.hasher.update(&frame.bytes);
        self.table.frames.push(FrameEntry { offset, stored_len: frame.stored_len, raw_len: frame.raw_len });
        self.table.chunks.extend(frame.chunks.iter().map(|chunk| TableChunk {
            id: chunk.id,
            kind: chunk.kind,
            frame: index,
            offset: chunk.offset,
            len: chunk.len,
        }));
        Ok(())
    }

    /// Returns the offset of a frame that fits.
    fn fit(&self, frame: &EncodedFrame) -> Result<u32> {
        let table_len =
            self.table_len() + TABLE_FRAME_LEN + TABLE_CHUNK_LEN.saturating_mul(frame.chunks.len() as u64);
        let end = self.len() + frame.bytes.len() as u64 + table_len + PACK_FOOTER_LEN as u64;
        for (what, found, max) in
            [("the table", table_len, u64::from(MAX_PACK_TABLE_LEN)), ("the pack", end, MAX_PACK_LEN)]
        {
            if found > max {
                return Err(Error::malformed("a new pack", FormatFault::TooLarge { what, found, max }));
            }
        }
        u32::try_from(self.len()).map_err(|_| {
            let fault = FormatFault::TooLarge { what: "the pack", found: self.len(), max: MAX_PACK_LEN };
            Error::malformed("a new pack", fault)
        })
    }

    fn table_len(&self) -> u64 {
        TABLE_BASE_LEN
            + TABLE_FRAME_LEN.saturating_mul(self.table.frames.len() as u64)
            + TABLE_CHUNK_LEN.saturating_mul(self.table.chunks.len() as u64)
    }

    /// Returns the bytes so far, header included, without table and footer.
    pub fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Returns true if no frame was pushed.
    pub fn is_empty(&self) -> bool {
        self.table.frames.is_empty()
    }

    /// Returns true once the pack has `target_len` bytes, or its table half of what a table may have.
    pub fn is_full(&self, target_len: u64) -> bool {
        self.len() >= target_len || self.table_len() >= u64::from(MAX_PACK_TABLE_LEN) / 2
    }

    /// Writes table and footer and names the pack.
    ///
    /// # Errors
    /// [`Error::Malformed`] if pack or table exceeds its bound.
    pub fn finish(self) -> Result<FinishedPack> {
        let Self { kind, mut bytes, mut hasher, table } = self;
        let tail = table
            .encode_tail(bytes.len() as u64)
            .map_err(|fault| Error::malformed("the table of a new pack", fault))?;
        bytes.extend(&tail);
        hasher.update(&tail);
        Ok(FinishedPack { id: PackId::from_bytes(*hasher.finalize().as_bytes()), kind, bytes, table })
    }
}

/// Reads the table of a pack of `pack_len` bytes; `read(offset, len)` returns exactly that range of it.
///
/// Reads the last 64 KiB, and a second time only if the table is longer. At most
/// [`MAX_PACK_TABLE_LEN`] and a footer are asked for.
///
/// # Errors
/// Those of `read`; [`Error::Malformed`] naming the pack.
pub fn read_pack_table(
    id: PackId,
    pack_len: u64,
    read: &mut dyn FnMut(u64, u64) -> Result<Vec<u8>>,
) -> Result<PackTable> {
    read_short_pack_table(id, pack_len, MAX_PACK_TABLE_LEN, read)
}

/// As [`read_pack_table`], but a table of more than `max_raw_len` bytes of plaintext is refused before it is read.
///
/// # Errors
/// As [`read_pack_table`].
pub fn read_short_pack_table(
    id: PackId,
    pack_len: u64,
    max_raw_len: u32,
    read: &mut dyn FnMut(u64, u64) -> Result<Vec<u8>>,
) -> Result<PackTable> {
    let malformed = |fault| Error::malformed(format!("pack {id}"), fault);
    let smallest = (PACK_HEADER_LEN + PACK_FOOTER_LEN) as u64;
    if pack_len < smallest {
        return Err(malformed(FormatFault::Truncated { found: pack_len, needed: smallest }));
    }
    if pack_len > MAX_PACK_LEN {
        let fault = FormatFault::TooLarge { what: "the pack", found: pack_len, max: MAX_PACK_LEN };
        return Err(malformed(fault));
    }
    let mut read_exactly = |offset: u64, len: u64| {
        let bytes = read(offset, len)?;
        match bytes.len() as u64 {
            found if found == len => Ok(bytes),
            found => Err(malformed(FormatFault::Truncated { found: offset + found, needed: offset + len })),
        }
    };
    let guess_start = pack_len.saturating_sub(TAIL_GUESS_LEN);
    let tail = read_exactly(guess_start, pack_len - guess_start)?;
    let (before, footer) = tail
        .split_last_chunk::<PACK_FOOTER_LEN>()
        .ok_or_else(|| malformed(FormatFault::Truncated { found: pack_len, needed: smallest }))?;
    let footer = PackFooter::decode(footer, pack_len).map_err(malformed)?;
    if footer.table_stored_len > MAX_PACK_TABLE_LEN {
        let (found, max) = (u64::from(footer.table_stored_len), u64::from(MAX_PACK_TABLE_LEN));
        return Err(malformed(FormatFault::TooLarge { what: "the stored table", found, max }));
    }
    if footer.table_raw_len > max_raw_len {
        let (found, max) = (u64::from(footer.table_raw_len), u64::from(max_raw_len));
        return Err(malformed(FormatFault::TooLarge { what: "the table", found, max }));
    }
    let in_guess = footer.table_offset.checked_sub(guess_start).and_then(|skip| usize::try_from(skip).ok());
    match in_guess.and_then(|skip| before.get(skip..)) {
        Some(stored) => PackTable::decode(stored, &footer).map_err(malformed),
        None => {
            let stored = read_exactly(footer.table_offset, u64::from(footer.table_stored_len))?;
            PackTable::decode(&stored, &footer).map_err(malformed)
        }
    }
}

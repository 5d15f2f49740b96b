//! What every whole object (all but packs) is wrapped in: magic, version, repository, body, checksum.
//!
//! ```text
//! offset len
//!      0   8  magic, by kind
//!      8   2  format version
//!     10   1  codec of the body: 0 stored, 1 zstd
//!     11   1  seal: 0 none; 1 XChaCha20-Poly1305 and 2 AES-256-GCM-SIV are reserved
//!     12   4  zero
//!     16  16  repository id
//!     32  24  nonce, zero where nothing is sealed
//!     56   4  raw_len, length of the body's plaintext
//!     60   4  stored_len, length of the body as stored
//!     64   n  body
//!   64+n  32  BLAKE3-256 of everything before
//! ```

use std::cell::RefCell;

use zstd::bulk::Decompressor;

use crate::error::FormatFault;
use crate::format::limits::{FORMAT_VERSION, MAX_OUTCOME_LEN, MAX_SEGMENT_LEN, MAX_SMALL_OBJECT_LEN};
use crate::id::RepositoryId;

/// Bytes before the body.
pub const HEADER_LEN: usize = 64;
/// Bytes behind the body.
pub const CHECKSUM_LEN: usize = 32;
/// Body as it is.
pub const CODEC_STORED: u8 = 0;
/// Body compressed by zstd, one frame with its content size.
pub const CODEC_ZSTD: u8 = 1;
/// Body in the clear.
pub const SEAL_NONE: u8 = 0;
/// zstd level for bodies of whole objects.
const ZSTD_LEVEL: i32 = 3;
/// That of long bodies, bytes: such are segments, which are nearly all ids. A higher one takes twice as long and saves 2 %.
const LONG_ZSTD_LEVEL: i32 = 1;
const LONG_BODY: usize = 1 << 20;

thread_local! {
    /// Making one takes longer than most bodies do.
    static DECOMPRESSOR: RefCell<Decompressor<'static>> = RefCell::new(Decompressor::default());
}

/// What kind of object an envelope holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ObjectKind {
    Config,
    Segment,
    Session,
    Outcome,
    Mark,
    Tombstone,
    Damage,
}

impl ObjectKind {
    /// Returns the first eight bytes of such an object.
    pub const fn magic(self) -> [u8; 8] {
        match self {
            Self::Config => *b"vmkpCONF",
            Self::Segment => *b"vmkpSEGM",
            Self::Session => *b"vmkpSESS",
            Self::Outcome => *b"vmkpOUTC",
            Self::Mark => *b"vmkpMARK",
            Self::Tombstone => *b"vmkpTOMB",
            Self::Damage => *b"vmkpDAMG",
        }
    }

    /// Returns the bound of the body's plaintext, bytes.
    pub const fn max_body_len(self) -> u32 {
        match self {
            Self::Segment => MAX_SEGMENT_LEN,
            Self::Outcome => MAX_OUTCOME_LEN,
            _ => MAX_SMALL_OBJECT_LEN,
        }
    }

    /// Returns the most bytes that such an object can have; a reader asks the storage for no more.
    pub const fn max_object_len(self) -> u64 {
        (self.max_body_len() as usize + HEADER_LEN + CHECKSUM_LEN) as u64
    }
}

/// An object taken out of its envelope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opened {
    pub repository: RepositoryId,
    pub body: Vec<u8>,
}

fn narrow(what: &'static str, len: usize, max: u32) -> Result<u32, FormatFault> {
    match u32::try_from(len) {
        Ok(len) if len <= max => Ok(len),
        _ => Err(FormatFault::TooLarge { what, found: len as u64, max: u64::from(max) }),
    }
}

/// Compresses `plain` where that makes it shorter; returns the codec and the bytes to store.
pub(crate) fn compress(plain: &[u8], level: i32) -> (u8, Vec<u8>) {
    match zstd::bulk::compress(plain, level) {
        Ok(packed) if packed.len() < plain.len() => (CODEC_ZSTD, packed),
        _ => (CODEC_STORED, plain.to_vec()),
    }
}

/// Undoes [`compress`] into a buffer of exactly `raw_len` bytes, which the caller has bounded.
pub(crate) fn decompress(codec: u8, stored: &[u8], raw_len: u32) -> Result<Vec<u8>, FormatFault> {
    let expected = u64::from(raw_len);
    let plain = match codec {
        CODEC_STORED => stored.to_vec(),
        CODEC_ZSTD => DECOMPRESSOR
            .with_borrow_mut(|decompressor| decompressor.decompress(stored, raw_len as usize))
            .map_err(|_| FormatFault::Decompress { expected })?,
        other => return Err(FormatFault::Codec(other)),
    };
    if plain.len() as u64 == expected { Ok(plain) } else { Err(FormatFault::Decompress { expected }) }
}

/// Wraps an encoded body.
///
/// # Errors
/// [`FormatFault::TooLarge`] if the body exceeds the bound of its kind.
pub fn wrap(kind: ObjectKind, repository: RepositoryId, body: &[u8]) -> Result<Vec<u8>, FormatFault> {
    let raw_len = narrow("the body's length", body.len(), kind.max_body_len())?;
    let level = if body.len() >= LONG_BODY { LONG_ZSTD_LEVEL } else { ZSTD_LEVEL };
    let (codec, stored) = compress(body, level);
    let stored_len = narrow("the stored length", stored.len(), kind.max_body_len())?;
    let mut bytes = Vec::with_capacity(HEADER_LEN + stored.len() + CHECKSUM_LEN);
    bytes.extend_from_slice(&kind.magic());
    bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    bytes.extend_from_slice(&[codec, SEAL_NONE, 0, 0, 0, 0]);
    bytes.extend_from_slice(repository.as_bytes());
    bytes.extend_from_slice(&[0; 24]);
    bytes.extend_from_slice(&raw_len.to_le_bytes());
    bytes.extend_from_slice(&stored_len.to_le_bytes());
    bytes.extend_from_slice(&stored);
    let checksum = blake3::hash(&bytes);
    bytes.extend_from_slice(checksum.as_bytes());
    Ok(bytes)
}

/// Reads fixed fields off the front of a slice.
pub(crate) struct Fields<'a> {
    bytes: &'a [u8],
    needed: u64,
}

impl<'a> Fields<'a> {
    /// Begins at the front of `bytes`.
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, needed: 0 }
    }

    /// Takes the next `N` bytes.
    pub(crate) fn take<const N: usize>(&mut self) -> Result<[u8; N], FormatFault> {
        let found = self.needed + self.bytes.len() as u64;
        self.needed += N as u64;
        let (head, rest) = self
            .bytes
            .split_first_chunk::<N>()
            .ok_or(FormatFault::Truncated { found, needed: self.needed })?;
        self.bytes = rest;
        Ok(*head)
    }

    /// Takes `N` bytes that are reserved and must be zero in this version.
    pub(crate) fn zero<const N: usize>(&mut self, what: &'static str) -> Result<(), FormatFault> {
        let found = self.take::<N>()?;
        if found.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        Err(FormatFault::Invalid { what, found: format!("{found:02x?}") })
    }

    /// Takes a magic number.
    pub(crate) fn magic<const N: usize>(&mut self, expected: [u8; N]) -> Result<(), FormatFault> {
        let found = self.take::<N>()?;
        if found == expected {
            return Ok(());
        }
        Err(FormatFault::Magic { found: found.to_vec(), expected: expected.to_vec() })
    }

    /// Takes a format version that this program reads.
    pub(crate) fn version(&mut self) -> Result<(), FormatFault> {
        let found = u16::from_le_bytes(self.take()?);
        if (1..=FORMAT_VERSION).contains(&found) {
            return Ok(());
        }
        Err(FormatFault::Version { found, supported: FORMAT_VERSION })
    }
}

/// Takes an object out of its envelope and checks everything that the envelope states.
///
/// # Errors
/// The first [`FormatFault`] met, in the order of the fields; the checksum is checked before the body is
/// decompressed.
pub fn open(kind: ObjectKind, bytes: &[u8]) -> Result<Opened, FormatFault> {
    let mut fields = Fields::new(bytes);
    fields.magic(kind.magic())?;
    fields.version()?;
    let [codec, seal] = fields.take()?;
    fields.zero::<4>("a reserved field")?;
    let repository = RepositoryId::from_bytes(fields.take()?);
    let nonce: [u8; 24] = fields.take()?;
    let raw_len = u32::from_le_bytes(fields.take()?);
    let stored_len = u32::from_le_bytes(fields.take()?);
    let max = kind.max_body_len();
    for (what, len) in [("the body's length", raw_len), ("the stored length", stored_len)] {
        if len > max {
            return Err(FormatFault::TooLarge { what, found: u64::from(len), max: u64::from(max) });
        }
    }
    let needed = HEADER_LEN as u64 + u64::from(stored_len) + CHECKSUM_LEN as u64;
    let found = bytes.len() as u64;
    if found < needed {
        return Err(FormatFault::Truncated { found, needed });
    }
    if found > needed {
        return Err(FormatFault::Trailing { extra: found - needed });
    }
    let (covered, checksum) = bytes.split_at(bytes.len() - CHECKSUM_LEN);
    if blake3::hash(covered).as_bytes() != checksum {
        return Err(FormatFault::Checksum);
    }
    if seal != SEAL_NONE || nonce != [0; 24] {
        return Err(FormatFault::Seal(seal));
    }
    let stored = covered.get(HEADER_LEN..).unwrap_or_default();
    Ok(Opened { repository, body: decompress(codec, stored, raw_len)? })
}

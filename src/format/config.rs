//! The object `config`: what a repository is and how its content is cut.

use bincode::{Decode, Encode};

use crate::error::FormatFault;
use crate::format::codec;
use crate::format::envelope::{self, ObjectKind};
use crate::format::limits::{
    BLOCK_LEN, FANOUT_RANGE, FORMAT_VERSION, FRAME_TARGET_RANGE, LEAF_LEN_RANGE, MAX_CHUNK_LEN,
    PACK_TARGET_RANGE, ZSTD_LEVEL_RANGE,
};
use crate::id::{KeyDomainId, RepositoryId};

/// Parameters of the cutter. Changing them costs deduplication, never correctness.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct CutterParams {
    /// Which cutter: 1 = FastCDC (2020 gear table, normalization level 1) with cuts moved to blocks of 4 KiB.
    pub algorithm: u8,
    /// Shortest, average and longest chunk, bytes; powers of two, multiples of 4 KiB.
    pub min_len: u32,
    pub average_len: u32,
    pub max_len: u32,
}

impl Default for CutterParams {
    fn default() -> Self {
        Self { algorithm: 1, min_len: 8 << 10, average_len: 32 << 10, max_len: 128 << 10 }
    }
}

/// What the storage was found to do when the repository was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct StorageTraits {
    /// A second create of one name fails. Without it only one writer at a time is safe.
    pub create_if_absent: bool,
}

/// The decoded object.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Config {
    /// Again the version of the envelope: the two must agree.
    pub format_version: u16,
    pub repository: RepositoryId,
    pub key_domain: KeyDomainId,
    /// Bits that a program must know to read the repository; none is defined yet.
    pub required_features: u64,
    /// Bits that a program may ignore.
    pub optional_features: u64,
    /// `None`: sealed, the key comes from a key slot. `Some`: plain, this published key makes the chunk ids.
    pub plain_id_key: Option<[u8; 32]>,
    /// Milliseconds since 1970-01-01T00:00:00Z, of the host that made it: for people only.
    pub created_ms: i64,
    pub cutter: CutterParams,
    /// Bytes of a disk that one manifest leaf covers; a power of two.
    pub leaf_len: u64,
    /// Children of an inner manifest node; a power of two.
    pub fanout: u32,
    /// Plaintext after which a writer ends a frame, bytes.
    pub frame_target_len: u32,
    /// File length after which a writer ends a pack, bytes.
    pub pack_target_len: u64,
    pub zstd_level: i32,
    pub storage: StorageTraits,
}

/// Features of [`Config::required_features`] that this program knows.
pub const KNOWN_FEATURES: u64 = 0;

fn invalid(what: &'static str, found: impl std::fmt::Display) -> FormatFault {
    FormatFault::Invalid { what, found: found.to_string() }
}

impl Config {
    /// Encodes the whole object.
    ///
    /// # Errors
    /// As [`envelope::wrap`].
    pub fn to_object(&self) -> Result<Vec<u8>, FormatFault> {
        envelope::wrap(ObjectKind::Config, self.repository, &codec::encode(self)?)
    }

    /// Decodes and checks the whole object.
    ///
    /// # Errors
    /// Any [`FormatFault`]; an unknown required feature is one.
    pub fn from_object(bytes: &[u8]) -> Result<Self, FormatFault> {
        let opened = envelope::open(ObjectKind::Config, bytes)?;
        let config: Self = codec::decode(&opened.body)?;
        if config.repository != opened.repository {
            return Err(FormatFault::ForeignRepository {
                found: opened.repository.to_hex(),
                expected: config.repository.to_hex(),
            });
        }
        config.check()?;
        Ok(config)
    }

    /// Checks every value against the bounds of the format.
    ///
    /// # Errors
    /// [`FormatFault::Invalid`] naming the field, or what is unknown.
    pub fn check(&self) -> Result<(), FormatFault> {
        if self.format_version == 0 || self.format_version > FORMAT_VERSION {
            return Err(FormatFault::Version { found: self.format_version, supported: FORMAT_VERSION });
        }
        let unknown = self.required_features & !KNOWN_FEATURES;
        if unknown != 0 {
            return Err(FormatFault::Features { unknown });
        }
        if self.plain_id_key.is_none() {
            return Err(FormatFault::Seal(1));
        }
        self.cutter.check()?;
        if !self.leaf_len.is_power_of_two() || !LEAF_LEN_RANGE.contains(&self.leaf_len) {
            return Err(invalid("leaf_len", self.leaf_len));
        }
        if !self.fanout.is_power_of_two() || !FANOUT_RANGE.contains(&self.fanout) {
            return Err(invalid("fanout", self.fanout));
        }
        if !FRAME_TARGET_RANGE.contains(&self.frame_target_len) {
            return Err(invalid("frame_target_len", self.frame_target_len));
        }
        if !PACK_TARGET_RANGE.contains(&self.pack_target_len) {
            return Err(invalid("pack_target_len", self.pack_target_len));
        }
        if !ZSTD_LEVEL_RANGE.contains(&self.zstd_level) {
            return Err(invalid("zstd_level", self.zstd_level));
        }
        Ok(())
    }
}

impl CutterParams {
    /// Checks the parameters against the bounds of the format.
    ///
    /// # Errors
    /// [`FormatFault::Invalid`] naming the parameter.
    pub fn check(&self) -> Result<(), FormatFault> {
        if self.algorithm != 1 {
            return Err(invalid("the cutter", self.algorithm));
        }
        let block = u32::try_from(BLOCK_LEN).unwrap_or(u32::MAX);
        for (what, len) in [
            ("the cutter's shortest chunk", self.min_len),
            ("the cutter's average chunk", self.average_len),
            ("the cutter's longest chunk", self.max_len),
        ] {
            if !len.is_power_of_two() || len < block || len > MAX_CHUNK_LEN {
                return Err(invalid(what, len));
            }
        }
        if self.min_len > self.average_len || self.average_len > self.max_len {
            return Err(invalid(
                "the order of the cutter's lengths",
                format!("{} {} {}", self.min_len, self.average_len, self.max_len),
            ));
        }
        Ok(())
    }
}

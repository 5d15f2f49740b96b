//! The only file that knows the encoder: little endian, fixed-width integers, bounded.
//!
//! Rules (also in `repo-format.md`, "Conventions"): integers are little endian at their full width; `bool`
//! is one byte 0 or 1; an enum is its variant's number as `u32`, then its fields; `Option` is one byte 0 or 1,
//! then the value; a list or string is its length as `u64`, then its items; structs and arrays are their
//! fields in order, without padding. Nothing may follow the last field.

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use bincode::{Decode, Encode};

use crate::error::FormatFault;

/// Memory that a value may claim, bytes: above every object's own bound.
const CLAIM_LIMIT: usize = 96 << 20;

fn configuration<const LIMIT: usize>() -> Configuration<LittleEndian, Fixint, Limit<LIMIT>> {
    bincode::config::standard().with_little_endian().with_fixed_int_encoding().with_limit::<LIMIT>()
}

/// Encodes a value.
///
/// # Errors
/// [`FormatFault::Decode`] if the value is larger than any object may be.
pub fn encode<T: Encode>(value: &T) -> Result<Vec<u8>, FormatFault> {
    bincode::encode_to_vec(value, configuration::<CLAIM_LIMIT>())
        .map_err(|error| FormatFault::Decode(error.to_string()))
}

/// Decodes a value that must fill `bytes` exactly.
///
/// What a hostile length can allocate depends on how many bytes there are: no item takes more than 8 times as
/// much in memory as encoded, so there are limits of at least 16 times the input, up to a bound for all.
///
/// # Errors
/// [`FormatFault::Decode`] for bytes that are no such value, [`FormatFault::Trailing`] for bytes behind it.
pub fn decode<T: Decode<()>>(bytes: &[u8]) -> Result<T, FormatFault> {
    match bytes.len() {
        0..=0x1000 => decode_within::<T, { 64 << 10 }>(bytes),
        0x1001..=0x1_0000 => decode_within::<T, { 1 << 20 }>(bytes),
        0x1_0001..=0x10_0000 => decode_within::<T, { 16 << 20 }>(bytes),
        _ => decode_within::<T, CLAIM_LIMIT>(bytes),
    }
}

fn decode_within<T: Decode<()>, const LIMIT: usize>(bytes: &[u8]) -> Result<T, FormatFault> {
    let (value, used) = bincode::decode_from_slice(bytes, configuration::<LIMIT>())
        .map_err(|error| FormatFault::Decode(error.to_string()))?;
    match bytes.len().checked_sub(used) {
        Some(0) => Ok(value),
        extra => Err(FormatFault::Trailing { extra: extra.unwrap_or(0) as u64 }),
    }
}

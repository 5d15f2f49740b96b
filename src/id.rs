//! Newtypes for everything that has an identity, and the hexadecimal form in which people meet it.

use std::fmt;
use std::str::FromStr;

use bincode::{Decode, Encode};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Why a text is not an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an id has {expected} lower-case hexadecimal digits, this has {found}: {text:?}")]
pub struct ParseIdError {
    expected: usize,
    found: usize,
    text: String,
}

fn decode_hex<const N: usize>(text: &str) -> Result<[u8; N], ParseIdError> {
    let error = || ParseIdError { expected: N * 2, found: text.len(), text: text.chars().take(80).collect() };
    if text.len() != N * 2 {
        return Err(error());
    }
    let mut bytes = [0u8; N];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let digit = |c: u8| match c {
            b'0'..=b'9' => Some(c - b'0'),
            b'a'..=b'f' => Some(c - b'a' + 10),
            _ => None,
        };
        let (Some(high), Some(low)) =
            (pair.first().copied().and_then(digit), pair.get(1).copied().and_then(digit))
        else {
            return Err(error());
        };
        *byte = high << 4 | low;
    }
    Ok(bytes)
}

fn encode_hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from(if value < 10 { b'0' + value } else { b'a' + value - 10 });
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
        pub struct $name([u8; $len]);

        impl $name {
            /// Length in bytes.
            pub const LEN: usize = $len;

            /// Wraps raw bytes.
            pub const fn from_bytes(bytes: [u8; $len]) -> Self {
                Self(bytes)
            }

            /// Returns the raw bytes.
            pub const fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }

            /// Returns all digits, lower case.
            pub fn to_hex(&self) -> String {
                encode_hex(&self.0)
            }

            /// Returns the first eight digits, for people.
            pub fn short(&self) -> String {
                encode_hex(self.0.get(..4).unwrap_or_default())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.to_hex())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.short())
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                decode_hex(text).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.to_hex())
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

id_type!(
    /// Identity of a chunk: keyed BLAKE3-256 of a type byte and the plaintext.
    ChunkId, 32
);
id_type!(
    /// Identity of a pack: BLAKE3-256 of the file's bytes.
    PackId, 32
);
id_type!(
    /// Identity of an index segment: BLAKE3-256 of the object's bytes.
    SegmentId, 32
);
id_type!(
    /// Identity of a session: 16 random bytes.
    SessionId, 16
);
id_type!(
    /// Identity of a point: that of the session whose outcome it is.
    PointId, 16
);
id_type!(
    /// Identity of a repository: 16 random bytes, drawn at `init`.
    RepositoryId, 16
);
id_type!(
    /// Identity of a key domain: repositories of one key domain give one content one chunk id.
    KeyDomainId, 16
);

impl From<SessionId> for PointId {
    fn from(id: SessionId) -> Self {
        Self(id.0)
    }
}

impl From<PointId> for SessionId {
    fn from(id: PointId) -> Self {
        Self(id.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_goes_there_and_back() {
        let id = SessionId::from_bytes([0xa5; 16]);
        assert_eq!(id.to_hex().parse::<SessionId>(), Ok(id));
        assert_eq!(id.short(), "a5a5a5a5");
    }

    #[test]
    fn what_is_no_id_is_refused() {
        for text in ["", "a5", &"A5".repeat(16), &"g0".repeat(16), &"a5".repeat(17), &"é".repeat(16)] {
            assert!(text.parse::<SessionId>().is_err(), "{text}");
        }
    }
}

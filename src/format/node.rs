//! Nodes of a manifest: the copy-on-write radix tree that maps one disk at one point.
//!
//! A leaf covers `leaf_len` bytes of the disk; an inner node at level `l` covers `leaf_len * fanout^l`.
//! A subtree that reads as zero is absent. A node is stored as a chunk of kind [`ChunkKind::Node`].

use bincode::{Decode, Encode};

use crate::error::FormatFault;
use crate::format::codec;
use crate::format::limits::{FANOUT_RANGE, MAX_CHUNK_LEN, MAX_LEAF_ENTRIES, MAX_TREE_HEIGHT};
use crate::id::ChunkId;

/// What a chunk holds. The number goes into its id, so that a chunk of one kind is never taken for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[repr(u8)]
pub enum ChunkKind {
    /// Content of a disk or of a side file.
    Data = 0,
    /// A manifest node.
    Node = 1,
    /// The copy of a point's record.
    Point = 2,
}

impl ChunkKind {
    /// Returns the type byte.
    pub const fn as_byte(self) -> u8 {
        self as u8
    }

    /// Returns the kind of a type byte.
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Data),
            1 => Some(Self::Node),
            2 => Some(Self::Point),
            _ => None,
        }
    }
}

/// Consecutive bytes of a leaf's range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum LeafEntry {
    /// `len` bytes read as zero.
    Zero { len: u32 },
    /// `len` bytes are those of chunk `id` from `offset`.
    Chunk { len: u32, offset: u32, id: ChunkId },
    /// `len` bytes could not be recovered; only repair writes this.
    Unreadable { len: u32 },
}

impl LeafEntry {
    /// Length in bytes of the disk.
    pub const fn len(&self) -> u32 {
        match self {
            Self::Zero { len } | Self::Chunk { len, .. } | Self::Unreadable { len } => *len,
        }
    }

    /// Returns true for an entry of no length, which no valid leaf has.
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A child of an inner node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Child {
    /// Which `1/fanout` of the parent's range it covers.
    pub slot: u16,
    pub id: ChunkId,
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Node {
    /// Entries that cover the leaf's range exactly (up to the disk's end in the last leaf).
    Leaf { entries: Vec<LeafEntry> },
    /// Children in order of their slots; what is absent reads as zero.
    Inner { level: u8, children: Vec<Child> },
}

impl Node {
    /// Encodes the plaintext of the node's chunk.
    ///
    /// # Errors
    /// [`FormatFault::TooLarge`] if it exceeds a chunk.
    pub fn encode(&self) -> Result<Vec<u8>, FormatFault> {
        let bytes = codec::encode(self)?;
        let max = u64::from(MAX_CHUNK_LEN);
        if bytes.len() as u64 > max {
            return Err(FormatFault::TooLarge { what: "a node", found: bytes.len() as u64, max });
        }
        Ok(bytes)
    }

    /// Decodes a node and checks all that can be checked without its parent: order, counts, levels.
    ///
    /// # Errors
    /// Any [`FormatFault`].
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatFault> {
        let node: Self = codec::decode(bytes)?;
        match &node {
            Self::Leaf { entries } => check_entries(entries)?,
            Self::Inner { level, children } => check_children(*level, children)?,
        }
        Ok(node)
    }
}

fn check_entries(entries: &[LeafEntry]) -> Result<(), FormatFault> {
    let found = entries.len() as u64;
    if entries.len() > MAX_LEAF_ENTRIES {
        return Err(FormatFault::TooLarge {
            what: "the number of entries",
            found,
            max: MAX_LEAF_ENTRIES as u64,
        });
    }
    for entry in entries {
        let end = match entry {
            LeafEntry::Chunk { len, offset, .. } => offset.checked_add(*len),
            LeafEntry::Zero { len } | LeafEntry::Unreadable { len } => Some(*len),
        };
        let fits = match entry {
            LeafEntry::Chunk { .. } => end.is_some_and(|end| end <= MAX_CHUNK_LEN),
            _ => true,
        };
        if entry.is_empty() || !fits {
            return Err(FormatFault::Invalid { what: "a leaf entry", found: format!("{entry:?}") });
        }
    }
    Ok(())
}

fn check_children(level: u8, children: &[Child]) -> Result<(), FormatFault> {
    if level == 0 || level > MAX_TREE_HEIGHT {
        return Err(FormatFault::Invalid { what: "a node's level", found: level.to_string() });
    }
    let max = *FANOUT_RANGE.end();
    let ordered = children.windows(2).all(|pair| match pair {
        [a, b] => a.slot < b.slot,
        _ => true,
    });
    let in_range = children.iter().all(|child| u32::from(child.slot) < max);
    if !ordered || !in_range || children.is_empty() {
        return Err(FormatFault::Invalid {
            what: "a node's children",
            found: format!("{} slots, out of order or range", children.len()),
        });
    }
    Ok(())
}

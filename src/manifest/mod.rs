//! Manifests: the maps of disks, as copy-on-write radix trees that share what did not change.
//!
//! A leaf covers `leaf_len` bytes of the disk; an inner node of level `l` covers `leaf_len * fanout^l`. What reads as
//! zero throughout is absent. Trees are canonical: one content of one disk gives one root, however it came about (as long
//! as the entries name the same chunks), so that equal subtrees have equal ids and are shared and skipped.
//!
//! [`TreeWriter`] makes a map from a predecessor and what changed, [`Cursor`] looks up, [`diff`] compares, [`walk`] visits
//! all there is and [`walk_new`] what another map does not share. Every node read is checked against its place: kind, level, slots, the exact cover of its range and
//! the disk's end. No cost depends on the disk's size, only on what is stored.

mod cursor;
mod diff;
mod geometry;
mod tree;
mod walk;
mod writer;

use std::sync::Arc;

pub use cursor::{Cursor, Entries};
pub use diff::diff;
pub use geometry::Geometry;
pub use tree::Leaf;
pub use walk::{NodeAt, Visitor, walk, walk_new};
pub use writer::TreeWriter;

use crate::error::Result;
use crate::format::node::{LeafEntry, Node};
use crate::id::ChunkId;

#[cfg(test)]
mod tests;

/// Reads nodes of manifests.
pub trait NodeReader: Sync {
    /// Returns the node of an id, its plaintext checked against the id and decoded by [`Node::decode`].
    ///
    /// # Errors
    /// [`Error::MissingChunk`](crate::error::Error::MissingChunk) and whatever reading gives.
    fn read_node(&self, id: ChunkId) -> Result<Arc<Node>>;
}

/// Stores nodes of manifests.
pub trait NodeWriter {
    /// Stores the plaintext of a node, if it is not there yet, and returns its id. Children come before their parents.
    ///
    /// # Errors
    /// Whatever storing gives.
    fn write_node(&mut self, plain: Vec<u8>) -> Result<ChunkId>;
}

/// What the bytes of a range are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryRef {
    /// They read as zero.
    Zero,
    /// They are those of chunk `id` from `offset`.
    Chunk { id: ChunkId, offset: u32 },
    /// They could not be recovered.
    Unreadable,
}

impl EntryRef {
    /// Returns what a leaf's entry says from `skip` bytes behind its start.
    fn of(entry: &LeafEntry, skip: u32) -> Self {
        match entry {
            LeafEntry::Zero { .. } => Self::Zero,
            LeafEntry::Chunk { offset, id, .. } => {
                Self::Chunk { id: *id, offset: offset.saturating_add(skip) }
            }
            LeafEntry::Unreadable { .. } => Self::Unreadable,
        }
    }
}

//! Visiting all that a manifest reaches.

use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::point::Manifest;
use crate::id::ChunkId;
use crate::manifest::geometry::{Geometry, Place};
use crate::manifest::tree::{Checked, Tree};
use crate::manifest::{EntryRef, NodeReader};

/// A node and its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeAt {
    pub id: ChunkId,
    /// 0 for leaves.
    pub level: u8,
    /// What it covers, up to the disk's end.
    pub range: ByteRange,
}

/// Receives what a walk meets, in the order of the disk, parents before children.
pub trait Visitor {
    /// Meets a node, before it is read. Returns false to leave out all below it.
    ///
    /// A visitor that leaves out what it has seen knows by the id what is reachable; whether the tree is sound it
    /// knows only if level and length of the range were the same too.
    ///
    /// # Errors
    /// An error ends the walk.
    fn node(&mut self, node: NodeAt) -> Result<bool>;

    /// Meets an entry of a leaf, zeroes included; absent subtrees are not reported.
    ///
    /// # Errors
    /// An error ends the walk.
    fn entry(&mut self, range: ByteRange, entry: EntryRef) -> Result<()>;

    /// Meets a node that cannot be read or is not sound; what it covers is lost. `Ok` goes on behind it.
    ///
    /// # Errors
    /// The error that ends the walk; by default the one it is given.
    fn fault(&mut self, node: NodeAt, error: Error) -> Result<()> {
        let _ = node;
        Err(error)
    }
}

/// Visits every node and entry of a manifest and checks the structure of what it reads: levels, slots, exact cover,
/// nothing beyond the disk's end.
///
/// # Errors
/// [`Error::Malformed`] if the manifest's size and height do not belong together; those of the visitor.
pub fn walk(
    geometry: Geometry,
    manifest: &Manifest,
    nodes: &dyn NodeReader,
    visitor: &mut dyn Visitor,
) -> Result<()> {
    let tree = Tree::open(geometry, *manifest, nodes)?;
    match manifest.root {
        Some(root) => visit(&tree, tree.top(), root, visitor),
        None => Ok(()),
    }
}

/// Recurses at most as deep as the tree is high, which the disk's size bounds.
fn visit(tree: &Tree<'_>, place: Place, id: ChunkId, visitor: &mut dyn Visitor) -> Result<()> {
    // its parent was checked to have no child beyond the disk's end
    let Some(range) = tree.range(place) else { return Ok(()) };
    let node = NodeAt { id, level: place.level, range };
    if !visitor.node(node)? {
        return Ok(());
    }
    match tree.read(place, id) {
        Ok(Checked::Inner(inner)) => {
            inner.children().iter().try_for_each(|child| match tree.geometry.child(place, child.slot) {
                Some(below) => visit(tree, below, child.id, visitor),
                None => Ok(()),
            })
        }
        Ok(Checked::Leaf(leaf)) => {
            let mut position = range.start();
            for entry in leaf.entries() {
                if let Some(range) = ByteRange::new(position, u64::from(entry.len())) {
                    visitor.entry(range, EntryRef::of(entry, 0))?;
                    position = range.end();
                }
            }
            Ok(())
        }
        Err(Error::Cancelled) => Err(Error::Cancelled),
        Err(error) => visitor.fault(node, error),
    }
}

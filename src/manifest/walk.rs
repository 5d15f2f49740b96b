//! Visiting all that a manifest reaches, or what of it another one does not.

use std::collections::{HashMap, HashSet};

use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::node::LeafEntry;
use crate::format::point::Manifest;
use crate::id::ChunkId;
use crate::manifest::diff::{Sub, children_of, leaf_of};
use crate::manifest::geometry::{Geometry, Place};
use crate::manifest::tree::{Checked, Leaf, Tree};
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

/// Visits the nodes of a manifest that `old` does not have at the same place, and of their leaves the entries of chunks
/// that the old leaf does not name; what the old one shares is not read. What cannot be read of the old one counts as not
/// shared.
///
/// # Errors
/// As [`walk`].
pub fn walk_new(
    geometry: Geometry,
    old: &Manifest,
    new: &Manifest,
    nodes: &dyn NodeReader,
    visitor: &mut dyn Visitor,
) -> Result<()> {
    let (old, new) = (Tree::open(geometry, *old, nodes)?, Tree::open(geometry, *new, nodes)?);
    let top = Place { level: old.manifest.height.max(new.manifest.height), number: 0 };
    let (sub_old, sub_new) = (Sub::at_top(&old, top), Sub::at_top(&new, top));
    visit_new(&old, &new, top, (sub_old, sub_new), visitor)
}

/// Recurses at most as deep as the higher tree.
fn visit_new(
    old: &Tree<'_>,
    new: &Tree<'_>,
    place: Place,
    (sub_old, sub_new): (Sub, Sub),
    visitor: &mut dyn Visitor,
) -> Result<()> {
    let Some(range) = new.range(place) else { return Ok(()) };
    // content-addressed: equal ids are equal subtrees
    if sub_new == Sub::Zero || sub_old == sub_new {
        return Ok(());
    }
    let faulty = |error: Error, visitor: &mut dyn Visitor| match sub_new {
        Sub::Node(id) if !matches!(error, Error::Cancelled) => {
            visitor.fault(NodeAt { id, level: place.level, range }, error)
        }
        _ => Err(error),
    };
    if let Sub::Node(id) = sub_new
        && !visitor.node(NodeAt { id, level: place.level, range })?
    {
        return Ok(());
    }
    if place.level == 0 {
        let beside = leaf_of(old, place, sub_old).ok().flatten();
        return match leaf_of(new, place, sub_new) {
            Ok(leaf) => visit_new_entries(range, beside.as_ref(), leaf.as_ref(), visitor),
            Err(error) => faulty(error, visitor),
        };
    }
    let beside: HashMap<u16, Sub> =
        children_of(old, place, sub_old).unwrap_or_default().into_iter().collect();
    match children_of(new, place, sub_new) {
        Ok(children) => children.into_iter().try_for_each(|(slot, sub)| {
            let Some(child) = new.geometry.child(place, slot) else { return Ok(()) };
            let sub_old = beside.get(&slot).copied().unwrap_or(Sub::Zero);
            visit_new(old, new, child, (sub_old, sub), visitor)
        }),
        Err(error) => faulty(error, visitor),
    }
}

fn visit_new_entries(
    range: ByteRange,
    old: Option<&Leaf>,
    new: Option<&Leaf>,
    visitor: &mut dyn Visitor,
) -> Result<()> {
    let shared: HashSet<ChunkId> = old.iter().flat_map(|leaf| leaf.entries()).filter_map(chunk_of).collect();
    let mut position = range.start();
    for entry in new.iter().flat_map(|leaf| leaf.entries()) {
        if let Some(range) = ByteRange::new(position, u64::from(entry.len())) {
            if chunk_of(entry).is_none_or(|id| !shared.contains(&id)) {
                visitor.entry(range, EntryRef::of(entry, 0))?;
            }
            position = range.end();
        }
    }
    Ok(())
}

fn chunk_of(entry: &LeafEntry) -> Option<ChunkId> {
    match entry {
        LeafEntry::Chunk { id, .. } => Some(*id),
        LeafEntry::Zero { .. } | LeafEntry::Unreadable { .. } => None,
    }
}

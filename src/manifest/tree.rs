//! Reading a tree with every node checked against its place.

use std::sync::Arc;

use crate::error::{Error, FormatFault, Result};
use crate::extent::ByteRange;
use crate::format::limits::MAX_DISK_LEN;
use crate::format::node::{Child, LeafEntry, Node};
use crate::format::point::Manifest;
use crate::id::ChunkId;
use crate::manifest::NodeReader;
use crate::manifest::geometry::{Geometry, Place};

/// A leaf whose entries cover its range exactly. Clones share.
#[derive(Debug, Clone)]
pub struct Leaf(Arc<Node>);

impl Leaf {
    /// Returns the entries, in order.
    pub fn entries(&self) -> &[LeafEntry] {
        match &*self.0 {
            Node::Leaf { entries } => entries,
            Node::Inner { .. } => &[],
        }
    }
}

/// An inner node whose children are all inside the disk.
#[derive(Debug, Clone)]
pub(super) struct Inner(Arc<Node>);

impl Inner {
    /// Returns the children, in order of their slots.
    pub(super) fn children(&self) -> &[Child] {
        match &*self.0 {
            Node::Inner { children, .. } => children,
            Node::Leaf { .. } => &[],
        }
    }

    /// Returns the child of a slot.
    pub(super) fn child(&self, slot: u16) -> Option<ChunkId> {
        let children = self.children();
        let index = children.binary_search_by_key(&slot, |child| child.slot).ok()?;
        children.get(index).map(|child| child.id)
    }
}

/// A node of either kind.
pub(super) enum Checked {
    Leaf(Leaf),
    Inner(Inner),
}

/// A manifest and where its nodes are.
#[derive(Clone, Copy)]
pub(super) struct Tree<'a> {
    pub(super) geometry: Geometry,
    pub(super) manifest: Manifest,
    nodes: &'a dyn NodeReader,
}

fn malformed(id: ChunkId, fault: FormatFault) -> Error {
    Error::malformed(format!("manifest node {id}"), fault)
}

fn mismatch(what: &'static str, found: impl ToString, expected: impl ToString) -> FormatFault {
    FormatFault::Mismatch { what, found: found.to_string(), expected: expected.to_string() }
}

impl<'a> Tree<'a> {
    /// Opens a manifest after checking its size and height.
    pub(super) fn open(geometry: Geometry, manifest: Manifest, nodes: &'a dyn NodeReader) -> Result<Self> {
        let Manifest { size, height, root } = manifest;
        let object = || match root {
            Some(id) => format!("the manifest of root {id}"),
            None => "an empty manifest".into(),
        };
        if size > MAX_DISK_LEN {
            let fault = FormatFault::TooLarge { what: "a disk", found: size, max: MAX_DISK_LEN };
            return Err(Error::malformed(object(), fault));
        }
        let expected = geometry.height_for(size);
        if height != expected {
            return Err(Error::malformed(object(), mismatch("its height", height, expected)));
        }
        if size == 0 && root.is_some() {
            return Err(Error::malformed(object(), mismatch("the root of an empty disk", "there", "absent")));
        }
        Ok(Self { geometry, manifest, nodes })
    }

    /// Returns the root's place.
    pub(super) fn top(&self) -> Place {
        Place { level: self.manifest.height, number: 0 }
    }

    /// Returns the range of a place on this disk.
    pub(super) fn range(&self, place: Place) -> Option<ByteRange> {
        self.geometry.range(place, self.manifest.size)
    }

    /// Reads the node at a place.
    pub(super) fn read(&self, place: Place, id: ChunkId) -> Result<Checked> {
        let node = self.nodes.read_node(id)?;
        let range = self.range(place).ok_or_else(|| {
            malformed(id, mismatch("its place", "beyond the disk's end", self.manifest.size))
        })?;
        match (&*node, place.level) {
            (Node::Leaf { entries }, 0) => {
                let covered: u64 = entries.iter().map(|entry| u64::from(entry.len())).sum();
                if covered != range.len() {
                    let fault = mismatch("the bytes that its entries cover", covered, range.len());
                    return Err(malformed(id, fault));
                }
                Ok(Checked::Leaf(Leaf(node)))
            }
            (Node::Inner { level, children }, 1..) if *level == place.level => {
                self.check_children(place, children).map_err(|fault| malformed(id, fault))?;
                Ok(Checked::Inner(Inner(node)))
            }
            (node, _) => {
                let found = match node {
                    Node::Leaf { .. } => 0,
                    Node::Inner { level, .. } => *level,
                };
                Err(malformed(id, mismatch("its level", found, place.level)))
            }
        }
    }

    fn check_children(&self, place: Place, children: &[Child]) -> Result<(), FormatFault> {
        // slots ascend (Node::decode), so the last one is the highest
        let Some(last) = children.last() else {
            return Err(mismatch("the number of its children", 0, "1 or more"));
        };
        if u32::from(last.slot) >= self.geometry.fanout() {
            return Err(FormatFault::TooLarge {
                what: "a child's slot",
                found: u64::from(last.slot),
                max: u64::from(self.geometry.fanout()) - 1,
            });
        }
        let child = self.geometry.child(place, last.slot);
        match child.and_then(|child| self.range(child)) {
            Some(_) => Ok(()),
            None => Err(FormatFault::Invalid {
                what: "a child's place",
                found: format!("slot {} is beyond the disk's {} bytes", last.slot, self.manifest.size),
            }),
        }
    }

    /// Reads the inner node at a place above the leaves.
    pub(super) fn inner(&self, place: Place, id: ChunkId) -> Result<Inner> {
        match self.read(place, id)? {
            Checked::Inner(inner) => Ok(inner),
            Checked::Leaf(_) => Err(malformed(id, mismatch("its level", 0, place.level))),
        }
    }

    /// Reads the leaf of a number.
    pub(super) fn leaf(&self, number: u64, id: ChunkId) -> Result<Leaf> {
        match self.read(Place { level: 0, number }, id)? {
            Checked::Leaf(leaf) => Ok(leaf),
            Checked::Inner(_) => Err(malformed(id, mismatch("its level", "above 0", 0))),
        }
    }
}

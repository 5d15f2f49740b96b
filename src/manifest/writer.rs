//! Making a map from its predecessor and what changed.

use crate::error::{Error, FormatFault, Result};
use crate::format::limits::{MAX_DISK_LEN, MAX_LEAF_ENTRIES};
use crate::format::node::{Child, LeafEntry, Node};
use crate::format::point::Manifest;
use crate::id::ChunkId;
use crate::manifest::geometry::{Geometry, Place};
use crate::manifest::tree::Tree;
use crate::manifest::{NodeReader, NodeWriter};

/// An inner node that is being made. There is one per level, each the parent of the next.
struct Open {
    place: Place,
    /// The node of the predecessor at this place; `None` if there is none, or if it cannot stay as it is.
    old_id: Option<ChunkId>,
    old: Vec<Child>,
    /// How many of `old` were copied or replaced.
    old_done: usize,
    new: Vec<Child>,
}

impl Open {
    fn old_child(&self, slot: u16) -> Option<ChunkId> {
        let index = self.old.binary_search_by_key(&slot, |child| child.slot).ok()?;
        self.old.get(index).map(|child| child.id)
    }

    /// Copies the old children before a slot.
    fn copy_before(&mut self, slot: u16) {
        let rest = self.old.get(self.old_done..).unwrap_or_default();
        let count = rest.partition_point(|child| child.slot < slot);
        self.new.extend(rest.iter().take(count));
        self.old_done += count;
    }

    /// Sets the child of a slot that is behind all set before.
    fn set(&mut self, slot: u16, id: Option<ChunkId>) {
        self.copy_before(slot);
        self.new.extend(id.map(|id| Child { slot, id }));
        if self.old.get(self.old_done).is_some_and(|child| child.slot == slot) {
            self.old_done += 1;
        }
    }
}

/// Makes a map from a predecessor and replaced leaves, from left to right. Untouched subtrees are shared, not read.
///
/// Memory: a node per level. Nodes are written children first; each changed leaf costs at most its path. The
/// disk may have grown (the new end is zero) or shrunk (what is beyond the new end is dropped).
pub struct TreeWriter<'a> {
    geometry: Geometry,
    size: u64,
    height: u8,
    old: Tree<'a>,
    /// The predecessor's subtree at the place of the new root, if its root is not lower.
    old_top: Option<ChunkId>,
    /// The root so far: with leaves only, or when nothing was opened.
    root: Option<ChunkId>,
    /// From the root down.
    open: Vec<Open>,
    next_leaf: u64,
    /// The leaf at the end of the shorter disk: its length changes although nobody put it.
    edge_leaf: Option<u64>,
    nodes: &'a mut dyn NodeWriter,
}

impl<'a> TreeWriter<'a> {
    /// Begins the map of a disk of `size` bytes. `predecessor`: the map that holds where no leaf is put; none: all zero.
    ///
    /// # Errors
    /// [`Error::Malformed`] if the predecessor's size and height do not belong together; those of the
    /// [`NodeReader`] if the disk shrank.
    pub fn new(
        geometry: Geometry,
        size: u64,
        predecessor: Option<Manifest>,
        reader: &'a dyn NodeReader,
        nodes: &'a mut dyn NodeWriter,
    ) -> Result<Self> {
        if size > MAX_DISK_LEN {
            let fault = FormatFault::TooLarge { what: "a disk", found: size, max: MAX_DISK_LEN };
            return Err(Error::malformed("a new manifest", fault));
        }
        let nothing = Manifest { size, height: geometry.height_for(size), root: None };
        let old = Tree::open(geometry, predecessor.unwrap_or(nothing), reader)?;
        let height = nothing.height;
        let old_top = subtree_on_the_left(&old, height)?;
        let mut writer = Self {
            geometry,
            size,
            height,
            old,
            old_top,
            root: old_top,
            open: Vec::new(),
            next_leaf: 0,
            edge_leaf: edge_leaf(geometry, old.manifest.size, size),
            nodes,
        };
        if height > old.manifest.height && old.manifest.root.is_some() {
            // the old root becomes a child on the left edge: its new parents have to be made in any case
            writer.open_path(Place { level: old.manifest.height + 1, number: 0 })?;
        }
        Ok(writer)
    }

    /// Returns the disk's size, bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Replaces a leaf. Leaves come in ascending order of their numbers; `entries` cover the leaf's range exactly (up to
    /// the disk's end), in any split: zeroes and neighbours in one chunk are joined.
    ///
    /// # Errors
    /// [`Error::Malformed`] for entries or an order that are wrong; those of reader and writer.
    pub fn put_leaf(&mut self, number: u64, entries: &[LeafEntry]) -> Result<()> {
        let object = || format!("leaf {number} of a new manifest");
        if number < self.next_leaf {
            let fault = FormatFault::Mismatch {
                what: "its number",
                found: number.to_string(),
                expected: format!("{} or more", self.next_leaf),
            };
            return Err(Error::malformed(object(), fault));
        }
        self.adjust_edge_leaf(|edge| edge < number)?;
        self.edge_leaf = self.edge_leaf.filter(|edge| *edge != number);
        self.write_leaf(number, entries)
    }

    /// Completes the map.
    ///
    /// # Errors
    /// Those of reader and writer; [`Error::Malformed`] naming a node of the predecessor.
    pub fn finish(mut self) -> Result<Manifest> {
        self.adjust_edge_leaf(|_| true)?;
        if self.size < self.old.manifest.size && self.size > 0 && self.height > 0 {
            // opening a node drops its children beyond the end: only those on the right edge have any
            let last_leaf = Place { level: 0, number: self.geometry.leaf_count(self.size) - 1 };
            self.open_path(self.geometry.above(last_leaf, 1))?;
        }
        while !self.open.is_empty() {
            self.close_last()?;
        }
        let root = self.root.filter(|_| self.size > 0);
        Ok(Manifest { size: self.size, height: self.height, root })
    }

    /// Gives the leaf at the shorter disk's end its new length, if it is due and was not put.
    fn adjust_edge_leaf(&mut self, is_due: impl Fn(u64) -> bool) -> Result<()> {
        let Some(number) = self.edge_leaf.filter(|edge| is_due(*edge)) else {
            return Ok(());
        };
        self.edge_leaf = None;
        let Some(id) = self.old_leaf_id(number)? else {
            return Ok(());
        };
        let leaf = self.old.leaf(number, id)?;
        let len = self.geometry.leaf_range(number, self.size).map_or(0, |range| range.len());
        self.write_leaf(number, &with_length(leaf.entries(), len))
    }

    fn old_leaf_id(&mut self, number: u64) -> Result<Option<ChunkId>> {
        if self.height == 0 {
            return Ok(self.old_top);
        }
        let place = Place { level: 0, number };
        self.open_path(self.geometry.above(place, 1))?;
        Ok(self.open.last().and_then(|parent| parent.old_child(self.geometry.slot(place))))
    }

    fn write_leaf(&mut self, number: u64, entries: &[LeafEntry]) -> Result<()> {
        let fault = |fault| Error::malformed(format!("leaf {number} of a new manifest"), fault);
        let Some(range) = self.geometry.leaf_range(number, self.size) else {
            let found = format!("{number}, beyond the disk's {} bytes", self.size);
            return Err(fault(FormatFault::Invalid { what: "its number", found }));
        };
        let id = match canonical(entries, range.len()).map_err(fault)? {
            Some(entries) => {
                let plain = Node::Leaf { entries }.encode().map_err(fault)?;
                Some(self.nodes.write_node(plain)?)
            }
            None => None,
        };
        self.next_leaf = number + 1;
        let place = Place { level: 0, number };
        if self.height == 0 {
            self.root = id;
            return Ok(());
        }
        self.open_path(self.geometry.above(place, 1))?;
        let slot = self.geometry.slot(place);
        if let Some(parent) = self.open.last_mut() {
            parent.set(slot, id);
        }
        Ok(())
    }

    /// Closes what is left of a place and opens the nodes from the root down to it.
    fn open_path(&mut self, target: Place) -> Result<()> {
        while let Some(last) = self.open.last() {
            let levels = last.place.level.checked_sub(target.level);
            if levels.is_some_and(|levels| self.geometry.above(target, levels) == last.place) {
                break;
            }
            self.close_last()?;
        }
        let highest = self.open.last().map_or(self.height, |last| last.place.level.saturating_sub(1));
        for level in (target.level..=highest).rev() {
            self.open_node(self.geometry.above(target, level - target.level))?;
        }
        Ok(())
    }

    /// Opens the node at a place, whose parent is the last one open.
    fn open_node(&mut self, place: Place) -> Result<()> {
        let old_root_level = self.old.manifest.height;
        let mut node = Open { place, old_id: None, old: Vec::new(), old_done: 0, new: Vec::new() };
        if place.number == 0 && place.level > old_root_level {
            // above the old root; directly above it, the old root is the child on the left
            let is_parent = place.level == old_root_level + 1;
            node.old = self
                .old
                .manifest
                .root
                .filter(|_| is_parent)
                .map(|id| Child { slot: 0, id })
                .into_iter()
                .collect();
        } else {
            let id = match self.open.last() {
                Some(parent) => parent.old_child(self.geometry.slot(place)),
                None => self.old_top,
            };
            if let Some(id) = id {
                let inner = self.old.inner(place, id)?;
                let inside = |child: &&Child| {
                    let child = self.geometry.child(place, child.slot);
                    child.is_some_and(|child| self.geometry.range(child, self.size).is_some())
                };
                node.old = inner.children().iter().filter(inside).copied().collect();
                node.old_id = (node.old.len() == inner.children().len()).then_some(id);
            }
        }
        self.open.push(node);
        Ok(())
    }

    fn close_last(&mut self) -> Result<()> {
        let Some(mut node) = self.open.pop() else {
            return Ok(());
        };
        node.copy_before(u16::MAX);
        let id = match node.old_id {
            Some(id) if node.new == node.old => Some(id),
            _ if node.new.is_empty() => None,
            _ => {
                let level = node.place.level;
                let plain = Node::Inner { level, children: node.new }
                    .encode()
                    .map_err(|fault| Error::malformed("a new manifest node", fault))?;
                Some(self.nodes.write_node(plain)?)
            }
        };
        match self.open.last_mut() {
            Some(parent) => parent.set(self.geometry.slot(node.place), id),
            None => self.root = id,
        }
        Ok(())
    }
}

/// Returns the subtree on the left edge at a level not above the tree's root; `None` also above it.
fn subtree_on_the_left(tree: &Tree<'_>, level: u8) -> Result<Option<ChunkId>> {
    let top = tree.top();
    if level > top.level {
        return Ok(None);
    }
    let mut id = tree.manifest.root;
    for above in (level + 1..=top.level).rev() {
        let Some(node_id) = id else { break };
        id = tree.inner(Place { level: above, number: 0 }, node_id)?.child(0);
    }
    Ok(id)
}

/// Returns the leaf that has another length on a disk of `new` bytes than on one of `old` bytes, where it is on both.
fn edge_leaf(geometry: Geometry, old: u64, new: u64) -> Option<u64> {
    let number = geometry.leaf_count(old.min(new)).checked_sub(1)?;
    (geometry.leaf_range(number, old) != geometry.leaf_range(number, new)).then_some(number)
}

/// Returns entries cut, or extended by zeroes, to `len` bytes.
fn with_length(entries: &[LeafEntry], len: u64) -> Vec<LeafEntry> {
    let mut rest = len;
    let mut result = Vec::with_capacity(entries.len() + 1);
    let narrow = |len: u64| u32::try_from(len).unwrap_or(u32::MAX);
    for entry in entries {
        let len = narrow(rest.min(u64::from(entry.len())));
        if len == 0 {
            break;
        }
        result.push(match *entry {
            LeafEntry::Zero { .. } => LeafEntry::Zero { len },
            LeafEntry::Chunk { offset, id, .. } => LeafEntry::Chunk { len, offset, id },
            LeafEntry::Unreadable { .. } => LeafEntry::Unreadable { len },
        });
        rest -= u64::from(len);
    }
    if rest > 0 {
        // a leaf's range is at most 64 MiB
        result.push(LeafEntry::Zero { len: narrow(rest) });
    }
    result
}

/// Joins neighbours and checks the cover; returns `None` if all is zero.
fn canonical(entries: &[LeafEntry], len: u64) -> Result<Option<Vec<LeafEntry>>, FormatFault> {
    let covered: u64 = entries.iter().map(|entry| u64::from(entry.len())).sum();
    if covered != len {
        let (found, expected) = (covered.to_string(), len.to_string());
        return Err(FormatFault::Mismatch { what: "the bytes that its entries cover", found, expected });
    }
    let mut joined: Vec<LeafEntry> = Vec::with_capacity(entries.len().min(MAX_LEAF_ENTRIES));
    for entry in entries.iter().filter(|entry| !entry.is_empty()) {
        match joined.last_mut().and_then(|last| join(last, entry).map(|both| (last, both))) {
            Some((last, both)) => *last = both,
            None => joined.push(*entry),
        }
    }
    if joined.len() > MAX_LEAF_ENTRIES {
        let (found, max) = (joined.len() as u64, MAX_LEAF_ENTRIES as u64);
        return Err(FormatFault::TooLarge { what: "the number of entries", found, max });
    }
    Ok((!matches!(joined.as_slice(), [] | [LeafEntry::Zero { .. }])).then_some(joined))
}

/// Returns the one entry that says what two neighbours say, if there is one.
fn join(first: &LeafEntry, second: &LeafEntry) -> Option<LeafEntry> {
    let len = first.len().checked_add(second.len())?;
    match (*first, *second) {
        (LeafEntry::Zero { .. }, LeafEntry::Zero { .. }) => Some(LeafEntry::Zero { len }),
        (LeafEntry::Unreadable { .. }, LeafEntry::Unreadable { .. }) => Some(LeafEntry::Unreadable { len }),
        (
            LeafEntry::Chunk { len: before, offset, id },
            LeafEntry::Chunk { offset: next, id: next_id, .. },
        ) => (id == next_id && offset.checked_add(before) == Some(next)).then_some(LeafEntry::Chunk {
            len,
            offset,
            id,
        }),
        _ => None,
    }
}

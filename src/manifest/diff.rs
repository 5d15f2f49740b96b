//! Which bytes of two maps differ.

use crate::error::Result;
use crate::extent::ByteRange;
use crate::format::node::LeafEntry;
use crate::format::point::Manifest;
use crate::id::ChunkId;
use crate::manifest::geometry::{Geometry, Place};
use crate::manifest::tree::{Leaf, Tree};
use crate::manifest::{EntryRef, NodeReader};
use crate::monitor::Monitor;

/// Reports the ranges whose references differ, in order and as long as they go; equal subtrees are not read.
///
/// A byte is equal in both if it reads as zero in both, or is the same byte of the same chunk, or is unreadable in
/// both. Of disks of two sizes, all that only one has differs. Equal content in chunks that were cut
/// differently is reported as different: the result covers every difference, and may cover more.
///
/// # Errors
/// [`Error::Cancelled`](crate::error::Error::Cancelled), those of the [`NodeReader`], and
/// [`Error::Malformed`](crate::error::Error::Malformed) naming the node.
pub fn diff(
    geometry: Geometry,
    a: &Manifest,
    b: &Manifest,
    nodes: &dyn NodeReader,
    monitor: &dyn Monitor,
    sink: &mut dyn FnMut(ByteRange),
) -> Result<()> {
    let (a, b) = (Tree::open(geometry, *a, nodes)?, Tree::open(geometry, *b, nodes)?);
    let (shorter, longer) = (a.manifest.size.min(b.manifest.size), a.manifest.size.max(b.manifest.size));
    let top = Place { level: a.manifest.height.max(b.manifest.height), number: 0 };
    let (sub_a, sub_b) = (Sub::at_top(&a, top), Sub::at_top(&b, top));
    let mut differ = Differ { a, b, common: shorter, monitor, out: Joined { pending: None, sink } };
    differ.compare(top, sub_a, sub_b)?;
    differ.out.push(shorter, longer);
    differ.out.finish();
    Ok(())
}

/// One of the two trees at some place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sub {
    /// It reads as zero.
    Zero,
    Node(ChunkId),
    /// The place is above the root of the lower tree, and on its left edge.
    AboveRoot,
}

impl Sub {
    fn of(id: Option<ChunkId>) -> Self {
        id.map_or(Self::Zero, Self::Node)
    }

    /// Returns a tree's content at a place on the left edge, at or above its root.
    fn at_top(tree: &Tree<'_>, place: Place) -> Self {
        match tree.manifest.root {
            Some(_) if place.level > tree.manifest.height => Self::AboveRoot,
            root => Self::of(root),
        }
    }
}

struct Differ<'a, 's> {
    a: Tree<'a>,
    b: Tree<'a>,
    /// Bytes that both disks have.
    common: u64,
    monitor: &'a dyn Monitor,
    out: Joined<'s>,
}

impl Differ<'_, '_> {
    /// Recurses at most as deep as the higher tree, which its size bounds.
    fn compare(&mut self, place: Place, a: Sub, b: Sub) -> Result<()> {
        // content-addressed: equal ids are equal subtrees
        if a == b {
            return Ok(());
        }
        let Some(range) = self.a.geometry.range(place, self.common) else {
            return Ok(());
        };
        self.monitor.check()?;
        if place.level == 0 {
            let (a, b) = (leaf_of(&self.a, place, a)?, leaf_of(&self.b, place, b)?);
            self.compare_leaves(range, a.as_ref(), b.as_ref());
            return Ok(());
        }
        let (a, b) = (children_of(&self.a, place, a)?, children_of(&self.b, place, b)?);
        let (mut a, mut b) = (a.into_iter().peekable(), b.into_iter().peekable());
        while let Some(slot) = [a.peek(), b.peek()].into_iter().flatten().map(|(slot, _)| *slot).min() {
            let sub_a = a.next_if(|(at, _)| *at == slot).map_or(Sub::Zero, |(_, sub)| sub);
            let sub_b = b.next_if(|(at, _)| *at == slot).map_or(Sub::Zero, |(_, sub)| sub);
            if let Some(child) = self.a.geometry.child(place, slot) {
                self.compare(child, sub_a, sub_b)?;
            }
        }
        Ok(())
    }

    fn compare_leaves(&mut self, range: ByteRange, a: Option<&Leaf>, b: Option<&Leaf>) {
        let (mut a, mut b) = (Pieces::new(range, a), Pieces::new(range, b));
        let mut position = range.start();
        while position < range.end() {
            let (end_a, entry_a) = a.at(position);
            let (end_b, entry_b) = b.at(position);
            let end = end_a.min(end_b).min(range.end());
            if entry_a != entry_b {
                self.out.push(position, end);
            }
            position = end;
        }
    }
}

fn leaf_of(tree: &Tree<'_>, place: Place, sub: Sub) -> Result<Option<Leaf>> {
    match sub {
        Sub::Node(id) => tree.leaf(place.number, id).map(Some),
        Sub::Zero | Sub::AboveRoot => Ok(None),
    }
}

fn children_of(tree: &Tree<'_>, place: Place, sub: Sub) -> Result<Vec<(u16, Sub)>> {
    Ok(match sub {
        Sub::Zero => Vec::new(),
        Sub::AboveRoot => {
            tree.geometry.child(place, 0).map(|child| (0, Sub::at_top(tree, child))).into_iter().collect()
        }
        Sub::Node(id) => {
            tree.inner(place, id)?.children().iter().map(|child| (child.slot, Sub::Node(child.id))).collect()
        }
    })
}

/// Steps through the entries of a leaf, or through zeroes.
struct Pieces<'a> {
    entries: &'a [LeafEntry],
    /// Where the first entry starts.
    start: u64,
    end: u64,
}

impl<'a> Pieces<'a> {
    fn new(range: ByteRange, leaf: Option<&'a Leaf>) -> Self {
        Self { entries: leaf.map_or(&[], |leaf| leaf.entries()), start: range.start(), end: range.end() }
    }

    /// Returns what stands at a position, not before the last one asked for, and where that ends (behind the position).
    fn at(&mut self, position: u64) -> (u64, EntryRef) {
        while let Some((first, rest)) = self.entries.split_first() {
            let end = self.start + u64::from(first.len());
            if position < end {
                let skip = u32::try_from(position - self.start).unwrap_or(0);
                return (end, EntryRef::of(first, skip));
            }
            self.entries = rest;
            self.start = end;
        }
        (self.end, EntryRef::Zero)
    }
}

/// Joins ranges that touch.
struct Joined<'s> {
    pending: Option<ByteRange>,
    sink: &'s mut dyn FnMut(ByteRange),
}

impl Joined<'_> {
    fn push(&mut self, start: u64, end: u64) {
        let Some(range) = ByteRange::between(start, end) else { return };
        self.pending = match self.pending {
            Some(before) if before.end() == start => ByteRange::between(before.start(), end),
            Some(before) => {
                (self.sink)(before);
                Some(range)
            }
            None => Some(range),
        };
    }

    fn finish(&mut self) {
        if let Some(range) = self.pending.take() {
            (self.sink)(range);
        }
    }
}

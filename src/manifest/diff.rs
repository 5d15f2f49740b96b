//! Which bytes of two maps differ.

use std::collections::{HashMap, VecDeque};

use crate::error::{Error, FormatFault, Result};
use crate::extent::ByteRange;
use crate::format::node::LeafEntry;
use crate::format::point::Manifest;
use crate::id::ChunkId;
use crate::manifest::geometry::{Geometry, Place};
use crate::manifest::tree::{Leaf, Tree};
use crate::manifest::{EntryRef, NodeReader};
use crate::monitor::Monitor;

/// Pairs of subtrees that are remembered, ...
const MAX_REMEMBERED: usize = 1 << 14;
/// ... with what differs, if it is so few ranges.
const MAX_RANGES: usize = 32;
/// So many ranges may come from pairs that were met before: a map of a few nodes can describe more of them than any
/// machine can list.
const MAX_REPEATED: u64 = 1 << 18;

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
    let out = Joined { recent: VecDeque::new(), begun: 0, sink };
    let mut differ = Differ { a, b, common: shorter, monitor, remembered: HashMap::new(), repeated: 0, out };
    differ.compare(top, sub_a, sub_b)?;
    differ.out.push(shorter, longer);
    differ.out.finish();
    Ok(())
}

/// One of the two trees at some place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Sub {
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
    pub(super) fn at_top(tree: &Tree<'_>, place: Place) -> Self {
        match tree.manifest.root {
            Some(_) if place.level > tree.manifest.height => Self::AboveRoot,
            root => Self::of(root),
        }
    }
}

/// What differs between a pair of subtrees.
enum Remembered {
    /// Relative to the place.
    Ranges(Vec<ByteRange>),
    /// So many ranges.
    Many(u64),
}

struct Differ<'a, 's> {
    a: Tree<'a>,
    b: Tree<'a>,
    /// Bytes that both disks have.
    common: u64,
    monitor: &'a dyn Monitor,
    /// By level. A disk that repeats itself is compared once.
    remembered: HashMap<(u8, Sub, Sub), Remembered>,
    /// Ranges of pairs that were met before.
    repeated: u64,
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
        // at the disk's end a subtree is cut, and above a root it is not only what its id says
        let is_whole = self.a.geometry.range(place, u64::MAX >> 1) == Some(range)
            && a != Sub::AboveRoot
            && b != Sub::AboveRoot;
        if !is_whole {
            return self.compare_anew(place, range, a, b);
        }
        let key = (place.level, a, b);
        match self.remembered.get(&key) {
            Some(Remembered::Ranges(ranges)) => {
                self.repeated += ranges.len() as u64;
                for part in ranges {
                    self.out.push(range.start() + part.start(), range.start() + part.end());
                }
                return self.refuse_endless();
            }
            Some(Remembered::Many(count)) => {
                self.repeated = self.repeated.saturating_add(*count);
                self.refuse_endless()?;
                return self.compare_anew(place, range, a, b);
            }
            None => {}
        }
        let before = self.out.begun;
        self.compare_anew(place, range, a, b)?;
        if self.remembered.len() < MAX_REMEMBERED {
            let few = self.out.since(before, range).map(Remembered::Ranges);
            self.remembered.insert(key, few.unwrap_or(Remembered::Many(self.out.begun - before)));
        }
        Ok(())
    }

    fn refuse_endless(&self) -> Result<()> {
        if self.repeated <= MAX_REPEATED {
            return Ok(());
        }
        let found = format!("more than {MAX_REPEATED} of the same ranges");
        let what = "a comparison of maps that repeat themselves";
        Err(Error::malformed("the maps", FormatFault::Invalid { what, found }))
    }

    fn compare_anew(&mut self, place: Place, range: ByteRange, a: Sub, b: Sub) -> Result<()> {
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

pub(super) fn leaf_of(tree: &Tree<'_>, place: Place, sub: Sub) -> Result<Option<Leaf>> {
    match sub {
        Sub::Node(id) => tree.leaf(place.number, id).map(Some),
        Sub::Zero | Sub::AboveRoot => Ok(None),
    }
}

pub(super) fn children_of(tree: &Tree<'_>, place: Place, sub: Sub) -> Result<Vec<(u16, Sub)>> {
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
    /// The last ranges; the newest may still grow and was not handed on.
    recent: VecDeque<ByteRange>,
    /// How many ranges were begun.
    begun: u64,
    sink: &'s mut dyn FnMut(ByteRange),
}

impl Joined<'_> {
    fn push(&mut self, start: u64, end: u64) {
        let Some(range) = ByteRange::between(start, end) else { return };
        if let Some(last) = self.recent.back_mut() {
            if last.end() == start {
                *last = ByteRange::between(last.start(), end).unwrap_or(*last);
                return;
            }
            (self.sink)(*last);
        }
        self.recent.push_back(range);
        self.begun += 1;
        if self.recent.len() > MAX_RANGES + 1 {
            self.recent.pop_front();
        }
    }

    /// Returns what of `within` was pushed since so many ranges had been begun, relative to it; `None` if it is too much.
    /// Nothing behind `within` has been pushed yet.
    fn since(&self, begun: u64, within: ByteRange) -> Option<Vec<ByteRange>> {
        // one more: the range before may have grown into it
        let count = usize::try_from(self.begun - begun).ok().filter(|count| *count <= MAX_RANGES)? + 1;
        let skip = self.recent.len().saturating_sub(count);
        let inside = self.recent.iter().skip(skip).filter_map(|range| range.intersection(&within));
        let relative = inside.filter_map(|range| {
            ByteRange::between(range.start() - within.start(), range.end() - within.start())
        });
        Some(relative.collect())
    }

    fn finish(&mut self) {
        if let Some(range) = self.recent.pop_back() {
            (self.sink)(range);
        }
    }
}

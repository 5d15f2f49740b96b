//! Looking up what a range of a disk is.

use crate::error::Result;
use crate::extent::ByteRange;
use crate::format::point::Manifest;
use crate::id::ChunkId;
use crate::manifest::geometry::{Geometry, Place};
use crate::manifest::tree::{Inner, Leaf, Tree};
use crate::manifest::{EntryRef, NodeReader};

/// Finds leaves of a manifest; keeps the path to the last one, so that neighbours cost no read.
///
/// Holds one node per level. For several threads make several cursors.
pub struct Cursor<'a> {
    tree: Tree<'a>,
    /// By level from 1: the inner node read last and its number.
    path: Vec<Option<(u64, ChunkId, Inner)>>,
    leaf: Option<(u64, Leaf)>,
    /// The node that was read last.
    at: Place,
}

/// What a search for a leaf met.
enum Found {
    Leaf(Leaf),
    /// Nothing from this place down: it reads as zero.
    Absent(Place),
}

impl<'a> Cursor<'a> {
    /// Creates a cursor; reads nothing yet.
    ///
    /// # Errors
    /// [`Error::Malformed`](crate::error::Error::Malformed) if size and height do not belong together.
    pub fn new(geometry: Geometry, manifest: &Manifest, nodes: &'a dyn NodeReader) -> Result<Self> {
        let tree = Tree::open(geometry, *manifest, nodes)?;
        let at = Place { level: manifest.height, number: 0 };
        Ok(Self { tree, path: vec![None; usize::from(manifest.height)], leaf: None, at })
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.tree.manifest.size
    }

    /// Returns the range of the node that was read last: behind an error, what is lost with it.
    pub fn last_range(&self) -> Option<ByteRange> {
        self.tree.range(self.at)
    }

    /// Returns a leaf's entries; `None` if it reads as zero, or is beyond the disk's end.
    ///
    /// # Errors
    /// Those of the [`NodeReader`]; [`Error::Malformed`](crate::error::Error::Malformed) naming the node.
    pub fn leaf(&mut self, number: u64) -> Result<Option<Leaf>> {
        if self.tree.range(Place { level: 0, number }).is_none() {
            return Ok(None);
        }
        match self.find(number)? {
            Found::Leaf(leaf) => Ok(Some(leaf)),
            Found::Absent(_) => Ok(None),
        }
    }

    /// Returns what a range is, piece by piece in order, without gaps; what is beyond the disk's end is left out.
    /// Neighbouring zeroes are one piece, also over absent subtrees. Ends behind the first error.
    pub fn entries(&mut self, range: ByteRange) -> Entries<'_, 'a> {
        let end = range.end().min(self.size());
        Entries { cursor: self, position: range.start(), end, leaf: None, ahead: None }
    }

    fn find(&mut self, number: u64) -> Result<Found> {
        match &self.leaf {
            Some((cached, leaf)) if *cached == number => return Ok(Found::Leaf(leaf.clone())),
            _ => {}
        }
        let geometry = self.tree.geometry;
        let leaf_place = Place { level: 0, number };
        let mut id = self.tree.manifest.root;
        for level in (1..=self.tree.manifest.height).rev() {
            let place = geometry.above(leaf_place, level);
            let Some(node_id) = id else { return Ok(Found::Absent(place)) };
            let slot = geometry.slot(geometry.above(leaf_place, level - 1));
            id = self.child(place, node_id, slot)?;
        }
        let Some(id) = id else { return Ok(Found::Absent(leaf_place)) };
        self.at = leaf_place;
        let leaf = self.tree.leaf(number, id)?;
        self.leaf = Some((number, leaf.clone()));
        Ok(Found::Leaf(leaf))
    }

    /// Returns a child of the inner node at a place, which it keeps.
    fn child(&mut self, place: Place, id: ChunkId, slot: u16) -> Result<Option<ChunkId>> {
        let kept = self.path.get_mut(usize::from(place.level).saturating_sub(1));
        match kept {
            Some(Some((number, kept_id, inner))) if *number == place.number && *kept_id == id => {
                Ok(inner.child(slot))
            }
            kept => {
                self.at = place;
                let inner = self.tree.inner(place, id)?;
                let child = inner.child(slot);
                if let Some(kept) = kept {
                    *kept = Some((place.number, id, inner));
                }
                Ok(child)
            }
        }
    }
}

/// A leaf on its way out, and how far it has got.
struct OpenLeaf {
    leaf: Leaf,
    index: usize,
    /// Where entry `index` starts on the disk.
    entry_start: u64,
}

/// Iterator of [`Cursor::entries`].
pub struct Entries<'c, 'a> {
    cursor: &'c mut Cursor<'a>,
    position: u64,
    end: u64,
    leaf: Option<OpenLeaf>,
    /// What was met behind zeroes that had to be read to their end.
    ahead: Option<Result<(ByteRange, EntryRef)>>,
}

impl Entries<'_, '_> {
    /// Returns the next piece, which neither crosses an entry nor an absent subtree.
    fn piece(&mut self) -> Result<Option<(ByteRange, EntryRef)>> {
        while self.position < self.end {
            if self.leaf.is_none() {
                let number = self.position / self.cursor.tree.geometry.leaf_len();
                match self.cursor.find(number)? {
                    Found::Absent(place) => {
                        let absent_end = self.cursor.tree.range(place).map_or(self.end, |range| range.end());
                        return Ok(self.advance(absent_end, EntryRef::Zero));
                    }
                    Found::Leaf(leaf) => {
                        let entry_start = number * self.cursor.tree.geometry.leaf_len();
                        self.leaf = Some(OpenLeaf { leaf, index: 0, entry_start });
                    }
                }
            }
            if let Some((entry_end, entry)) = self.next_entry() {
                return Ok(self.advance(entry_end, entry));
            }
            self.leaf = None;
        }
        Ok(None)
    }

    /// Returns the entry at the position and its end; `None` behind the leaf's last.
    fn next_entry(&mut self) -> Option<(u64, EntryRef)> {
        let open = self.leaf.as_mut()?;
        loop {
            let entry = open.leaf.entries().get(open.index)?;
            let entry_end = open.entry_start + u64::from(entry.len());
            if self.position < entry_end {
                // inside the entry, so it fits its 32 bits
                let skip = u32::try_from(self.position - open.entry_start).unwrap_or(0);
                return Some((entry_end, EntryRef::of(entry, skip)));
            }
            open.index += 1;
            open.entry_start = entry_end;
        }
    }

    /// Returns the next piece or the error that ends the iteration.
    fn pull(&mut self) -> Option<Result<(ByteRange, EntryRef)>> {
        let piece = self.piece();
        if piece.is_err() {
            self.position = self.end;
        }
        piece.transpose()
    }

    fn advance(&mut self, piece_end: u64, entry: EntryRef) -> Option<(ByteRange, EntryRef)> {
        let range = ByteRange::between(self.position, piece_end.min(self.end));
        self.position = piece_end;
        range.map(|range| (range, entry))
    }
}

impl Iterator for Entries<'_, '_> {
    type Item = Result<(ByteRange, EntryRef)>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut first = self.ahead.take().or_else(|| self.pull())?;
        while let Ok((zeroes, EntryRef::Zero)) = &mut first {
            match self.pull() {
                Some(Ok((more, EntryRef::Zero))) => {
                    // pieces have no gaps between them
                    *zeroes = ByteRange::between(zeroes.start(), more.end()).unwrap_or(*zeroes);
                }
                other => {
                    self.ahead = other;
                    break;
                }
            }
        }
        Some(first)
    }
}

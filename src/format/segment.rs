//! Index segments: which packs a session wrote and where in them each chunk is.

use bincode::{Decode, Encode};

use crate::error::FormatFault;
use crate::format::codec;
use crate::format::envelope::{self, ObjectKind};
use crate::format::limits::{MAX_CHUNK_LEN, MAX_FRAME_RAW_LEN, MAX_PACK_LEN};
use crate::format::node::ChunkKind;
use crate::format::pack::{FrameEntry, PackKind, TableChunk};
use crate::id::{ChunkId, PackId, RepositoryId, SessionId};

/// A pack that a segment speaks of.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct SegmentPack {
    pub id: PackId,
    pub kind: PackKind,
    /// Length of the file, bytes.
    pub stored_len: u64,
    pub frames: Vec<FrameEntry>,
}

/// A chunk and its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct SegmentChunk {
    pub id: ChunkId,
    pub kind: ChunkKind,
    /// Which of the segment's packs.
    pub pack: u32,
    /// Which frame of that pack.
    pub frame: u32,
    /// First byte in the frame's plaintext.
    pub offset: u32,
    pub len: u32,
}

impl SegmentChunk {
    /// Says of a chunk what its pack's table says; `pack`: the number of the pack in the segment.
    pub fn in_pack(chunk: &TableChunk, pack: u32) -> Self {
        let TableChunk { id, kind, frame, offset, len } = *chunk;
        Self { id, kind, pack, frame, offset, len }
    }
}

/// A decoded segment. It counts only if the outcome of its owner is committed.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Segment {
    pub owner: SessionId,
    /// Number of this segment among its owner's, from 0: with it no two segments have one id.
    pub number: u32,
    pub packs: Vec<SegmentPack>,
    /// Sorted by chunk id, then pack; a metadata chunk stands in two packs.
    pub chunks: Vec<SegmentChunk>,
}

impl Segment {
    /// Encodes the whole object.
    ///
    /// # Errors
    /// As [`envelope::wrap`].
    pub fn to_object(&self, repository: RepositoryId) -> Result<Vec<u8>, FormatFault> {
        envelope::wrap(ObjectKind::Segment, repository, &codec::encode(self)?)
    }

    /// Decodes the whole object and checks it against itself.
    ///
    /// # Errors
    /// Any [`FormatFault`].
    pub fn from_object(bytes: &[u8], repository: RepositoryId) -> Result<Self, FormatFault> {
        let segment: Self = open_own(ObjectKind::Segment, bytes, repository)?;
        segment.check()?;
        Ok(segment)
    }

    fn check(&self) -> Result<(), FormatFault> {
        for pack in &self.packs {
            let inside = pack.frames.iter().all(|frame| {
                let longest = frame.stored_len.max(frame.raw_len);
                frame.end() <= pack.stored_len && longest <= MAX_FRAME_RAW_LEN
            });
            if !inside || pack.stored_len > MAX_PACK_LEN {
                return Err(FormatFault::Invalid { what: "a pack of the segment", found: pack.id.to_hex() });
            }
        }
        for chunk in &self.chunks {
            let frame =
                self.packs.get(chunk.pack as usize).and_then(|pack| pack.frames.get(chunk.frame as usize));
            let end = chunk.offset.checked_add(chunk.len);
            let inside = frame.zip(end).is_some_and(|(frame, end)| end <= frame.raw_len);
            if !inside || chunk.len == 0 || chunk.len > MAX_CHUNK_LEN {
                return Err(FormatFault::Invalid {
                    what: "a chunk of the segment",
                    found: chunk.id.to_hex(),
                });
            }
        }
        let sorted = self.chunks.is_sorted_by(|a, b| (a.id, a.pack) < (b.id, b.pack));
        if sorted {
            return Ok(());
        }
        Err(FormatFault::Invalid { what: "the order of the chunks", found: "not sorted".into() })
    }
}

/// Opens an envelope that must belong to `repository`, and decodes its body.
pub(crate) fn open_own<T: Decode<()>>(
    kind: ObjectKind,
    bytes: &[u8],
    repository: RepositoryId,
) -> Result<T, FormatFault> {
    let opened = envelope::open(kind, bytes)?;
    if opened.repository != repository {
        return Err(FormatFault::ForeignRepository {
            found: opened.repository.to_hex(),
            expected: repository.to_hex(),
        });
    }
    codec::decode(&opened.body)
}

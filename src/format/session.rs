//! Sessions, their outcomes, and the other small objects of the protocol.

use std::sync::Arc;

use bincode::{Decode, Encode};

use crate::error::FormatFault;
use crate::format::codec;
use crate::format::envelope::{self, ObjectKind};
use crate::format::point::{PointRecord, PointStats};
use crate::format::segment::open_own;
use crate::id::{ChunkId, PackId, PointId, RepositoryId, SegmentId, SessionId};

/// What a session is going to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum SessionKind {
    Backup,
    Prune,
    Forget,
    Copy,
    Repair,
    Verify,
    Restore,
}

/// `sessions/<sid>`: registered work.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct SessionRecord {
    pub kind: SessionKind,
    pub host: String,
    /// Boot id of that host: with it a process id says whether the process can still live.
    pub boot_id: String,
    pub process_id: u32,
    /// Milliseconds since 1970, by that host's clock: for people only, nothing depends on it.
    pub started_ms: i64,
    /// Program and version.
    pub program: String,
}

/// `outcomes/<sid>`: the one object that decides how a session ended.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Outcome {
    /// The session made this point, which from now on is complete and durable.
    Point { record: Arc<PointRecord>, stats: PointStats },
    /// The session (a prune) deletes these: packs and points that its mark names, and segments that its own replace.
    Sweep { packs: Vec<PackId>, points: Vec<PointId>, segments: Vec<SegmentId> },
    /// The session changed what it was to change; its tombstones and segments count. (Damage records count at once.)
    Done,
    /// The session is over and nothing of it counts.
    Abort { by: SessionId, why: String },
    /// A hold: this point may not be forgotten or dropped until `until_ms` (milliseconds since 1970; `None`: ever), or
    /// until this outcome is deleted.
    Hold { point: PointId, until_ms: Option<i64>, reason: String },
    /// A verify of an early version: [`Outcome::Found`] without its place in the order.
    Verified { record: VerifiedRecord },
    /// A verify: what it found out. It informs; nothing is concluded from it that could lose anything. `order` is 1 more than
    /// that of every verify that this one knew of: of two the later one counts, whatever the clocks said. `scope`: what it
    /// read a sample of, if it did.
    Found { record: VerifiedRecord, order: u64, scope: Option<SampleScope> },
}

/// How thoroughly a repository was verified. Each level finds what those before it find of the same points, but
/// packs, which knows no points.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum VerifiedLevel {
    Structure,
    Packs,
    Data,
    Restore,
    Against,
}

/// What a verify found out.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct VerifiedRecord {
    pub level: VerifiedLevel,
    /// Milliseconds since 1970, for people, and for leaving out what was verified lately.
    pub time_ms: i64,
    /// Points of which everything was looked at and found good.
    pub sound: Vec<PointId>,
    /// Points that a restore would not give back in full.
    pub damaged: Vec<PointId>,
    /// The last pack that a sample read; the next one of the same scope goes on behind it.
    pub cursor: Option<PackId>,
}

/// What a sample is a sample of.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Encode, Decode)]
pub struct SampleScope {
    /// At which its packs are read.
    pub level: VerifiedLevel,
    /// Of whose points: sorted; none: everything.
    pub domains: Vec<String>,
}

/// `gc/<sid>.mark`: what a prune is about to delete.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Mark {
    pub packs: Vec<PackId>,
    pub points: Vec<PointId>,
}

/// `forget/<sid>`: points that are no longer shown. It counts once the outcome of `<sid>` is [`Outcome::Done`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Tombstone {
    pub points: Vec<PointId>,
    pub reason: String,
    /// Milliseconds since 1970, for people only.
    pub time_ms: i64,
}

/// Stands in a damage record for bytes of the pack that belong to no chunk.
pub const OUTSIDE_CHUNKS: ChunkId = ChunkId::from_bytes([0; 32]);

/// `bad/<pack id>.<sid>`: chunks of that pack known to be bad; empty = the whole pack.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Damage {
    pub pack: PackId,
    pub chunks: Vec<ChunkId>,
}

macro_rules! object {
    ($type:ty, $kind:expr) => {
        impl $type {
            /// Encodes the whole object.
            ///
            /// # Errors
            /// As [`envelope::wrap`].
            pub fn to_object(&self, repository: RepositoryId) -> Result<Vec<u8>, FormatFault> {
                envelope::wrap($kind, repository, &codec::encode(self)?)
            }

            /// Decodes the whole object, which must belong to `repository`.
            ///
            /// # Errors
            /// Any [`FormatFault`].
            pub fn from_object(bytes: &[u8], repository: RepositoryId) -> Result<Self, FormatFault> {
                open_own($kind, bytes, repository)
            }
        }
    };
}

object!(SessionRecord, ObjectKind::Session);
object!(Mark, ObjectKind::Mark);
object!(Tombstone, ObjectKind::Tombstone);
object!(Damage, ObjectKind::Damage);

impl Outcome {
    /// Encodes the whole object.
    ///
    /// # Errors
    /// As [`envelope::wrap`].
    pub fn to_object(&self, repository: RepositoryId) -> Result<Vec<u8>, FormatFault> {
        envelope::wrap(ObjectKind::Outcome, repository, &codec::encode(self)?)
    }

    /// Decodes the whole object, which must belong to `repository` and, if it is a point, be a valid one.
    ///
    /// # Errors
    /// Any [`FormatFault`].
    pub fn from_object(bytes: &[u8], repository: RepositoryId) -> Result<Self, FormatFault> {
        let outcome: Self = open_own(ObjectKind::Outcome, bytes, repository)?;
        if let Self::Point { record, .. } = &outcome {
            record.check()?;
        }
        Ok(outcome)
    }
}

//! What can be done with a repository, one verb per file: `verb(&Repository, &VerbOptions, &dyn Monitor)`.

pub mod against;
pub mod backup;
pub mod cat;
#[cfg(feature = "libvirt")]
pub mod checkpoints;
pub mod content;
pub mod diff;
#[cfg(feature = "libvirt")]
pub mod doctor;
pub mod explain;
pub mod forget;
pub mod freed;
pub mod levels;
mod lost_points;
mod marked;
pub mod points;
pub mod prune;
mod record;
pub mod repair;
pub mod repaired;
pub mod restore;
pub mod retention;
pub mod select;
pub mod stats;
pub mod verify;

use serde::Serialize;

use crate::format::point::Level;
use crate::id::{ChunkId, PackId, PointId};
pub use crate::repo::PointEntry;

/// One thing that verify noticed. Findings are data, not errors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The object that is wrong, by its name in the repository.
    pub object: String,
    /// What is wrong with it.
    pub problem: String,
    pub pack: Option<PackId>,
    /// Chunks that are lost by it.
    pub chunks: Vec<ChunkId>,
    /// What a restore would miss.
    pub affected: Vec<Affected>,
}

/// A part of a disk at a point.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Affected {
    pub point: PointId,
    pub domain: String,
    pub disk: String,
    /// First byte and length, bytes.
    pub ranges: Vec<(u64, u64)>,
}

/// The level that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RequestedLevel {
    /// Incremental where a valid base exists, else full.
    #[default]
    Auto,
    Is(Level),
}

#[cfg(test)]
mod tests;

//! From bytes of a disk to packs and back: cut, name, frame, pack.
//!
//! [`Cutter`] cuts a run into chunks and [`IdHasher`] names them. [`FrameBuilder`] collects chunks into
//! [`RawFrame`]s, which worker threads compress and check ([`RawFrame::encode`]). [`PackBuilder`] lines the
//! frames up in a file. Reading goes the other way: [`read_pack_table`], then [`open_frame`]; where a table is
//! lost, [`Salvage`] finds the frames by their looks. A frame that goes from one pack to another unchanged
//! is checked on the way ([`EncodedFrame::taken_up`]). No I/O here: bytes come and go as slices.

mod cutter;
mod frame;
mod hasher;
mod pack;
mod salvage;

pub use cutter::Cutter;
pub use frame::{
    DEFAULT_ZSTD_LEVEL, EncodedFrame, FrameBuilder, FramedChunk, Plaintext, RawChunk, RawFrame, frame_memory,
    open_frame, open_frame_into,
};
pub use hasher::IdHasher;
pub use pack::{FinishedPack, PackBuilder, read_pack_table, read_short_pack_table};
pub use salvage::{Salvage, SalvagedFrame};

#[cfg(test)]
mod tests;

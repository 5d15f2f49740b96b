//! Bytes to structs and back: the twin of `repo-format.md`. Pure: no I/O, no clock, no randomness.
//!
//! Every bound is a constant of [`limits`]; every encoding is pinned by a test vector; nothing here
//! allocates more than the bound of the object that it decodes.

pub mod codec;
pub mod config;
pub mod envelope;
pub mod limits;
pub mod name;
pub mod node;
pub mod pack;
pub mod point;
pub mod segment;
pub mod session;

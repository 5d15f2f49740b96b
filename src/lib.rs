//! A content-addressed, deduplicating backup repository for libvirt/QEMU virtual machines.

#![deny(unsafe_code)]
// unit tests may panic, that is how they fail; the library may not
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation))]

pub mod chunk;
pub mod error;
pub mod extent;
pub mod format;
pub mod id;
pub mod index;
pub mod manifest;
pub mod monitor;
pub mod nbd;
pub mod ops;
pub mod repo;
pub mod source;
pub mod storage;

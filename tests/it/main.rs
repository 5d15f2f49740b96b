//! Tests of the whole: one binary, one module per subject.

mod decoder;
mod fixtures;
mod format;
mod hostile_bytes;
mod house;

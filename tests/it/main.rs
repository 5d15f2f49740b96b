//! Tests of the whole: one binary, one module per subject.

mod fixtures;
mod format;

//! Tests of the whole: one binary, one module per subject.

mod format;

//! Tests of the whole: one binary, one module per subject.

mod damage;
mod decoder;
mod domain;
mod fixtures;
mod format;
mod killed;
mod support;
mod week;

//! `repo-format.md` against the code: constants, encodings, the worked example.

mod constants;
mod document;
mod fields;
pub mod smallest;
mod vectors;

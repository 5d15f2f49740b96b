//! The integration tests: one binary, so that they are linked once.

mod damage;
mod domain;
mod killed;
mod support;
mod week;

//! The `vmkeep` program: arguments in, library calls, text or JSON out.

#![deny(unsafe_code)]
// as in the library: unit tests may panic, the program may not
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation))]

mod cli;
#[cfg(test)]
#[path = "../tests/it/mutate.rs"]
mod mutate;

fn main() -> std::process::ExitCode {
    cli::run()
}

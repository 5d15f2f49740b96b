//! The `vmkeep` program.

fn main() {}

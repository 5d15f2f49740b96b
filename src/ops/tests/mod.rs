//! What no crash, no failing operation and no other program may do to a repository.

mod crash;
mod failing;
mod schedule;

/// The process of the other tests' environment, but one that is not there any more: what it left can be ended.
fn dead_environment() -> crate::repo::Environment {
    crate::repo::Environment { process_id: u32::MAX, ..crate::ops::backup::tests::environment() }
}

/// Returns true if the long tests were asked for.
fn is_long() -> bool {
    std::env::var_os("VMKEEP_TEST_LONG").is_some()
}

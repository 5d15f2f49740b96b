//! What no crash, no failing operation and no other program may do to a repository.

mod crash;
mod failing;
mod moments;
mod schedule;

use crate::repo::rules::Rule;

/// The process of the other tests' environment, but one that is not there any more: what it left can be ended.
fn dead_environment() -> crate::repo::Environment {
    crate::repo::Environment { process_id: u32::MAX, ..crate::ops::backup::tests::environment() }
}

/// Returns true if the long tests were asked for.
fn is_long() -> bool {
    std::env::var_os("VMKEEP_TEST_LONG").is_some()
}

#[test]
fn each_rule_is_one_that_a_test_takes_away() {
    let lists: [&[Rule]; 4] = [&schedule::RULES, &moments::RULES, &crash::RULES, &failing::RULES];
    let mut taken = lists.concat();
    for rule in Rule::ALL {
        let before = taken.len();
        taken.retain(|other| *other != rule);
        assert_eq!(before - taken.len(), 1, "{rule:?}");
    }
    assert_eq!(taken, []);
    let said = format!("| - | {} rules | |", Rule::ALL.len());
    assert!(include_str!("../../../docs/reliability.md").contains(&said), "{said}");
}

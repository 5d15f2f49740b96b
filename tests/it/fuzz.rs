//! Every decoder of the format for a while, in processes of their own whose memory is measured.

use crate::hostile_bytes::decoders;
use crate::mutate::{finish_alone, fuzz, start_alone};

#[test]
#[ignore = "measures its own process: run by decoders_stand_random_changes"]
fn alone_decoders() {
    let part = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let (first, step) = (part("VMKEEP_TEST_FIRST").unwrap_or(0), part("VMKEEP_TEST_STEP").unwrap_or(1));
    for decoder in decoders().into_iter().skip(first).step_by(step) {
        fuzz(decoder.name, &decoder.samples, false, 1.9, &mut |bytes| (decoder.decode)(bytes));
    }
}

#[test]
fn decoders_stand_random_changes() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let test = concat!(module_path!(), "::alone_decoders");
    let parts = (0..cores).map(|first| [("VMKEEP_TEST_FIRST", first), ("VMKEEP_TEST_STEP", cores)]);
    let children: Vec<_> = parts.map(|part| start_alone(test, &part)).collect();
    children.into_iter().for_each(finish_alone);
}

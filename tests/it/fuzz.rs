//! Every decoder of the format for a while, in processes of their own whose memory is measured.

use crate::hostile_bytes::decoders;
use crate::mutate::fuzz;

/// Memory that decoding may take, beside 16 times its input.
const MAX_MEMORY: u64 = 64 << 20;

/// Peak of the process's memory, bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[test]
#[ignore = "measures its own process: run by decoders_stand_random_changes"]
fn alone_decoders() {
    let part = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let (first, step) = (part("VMKEEP_TEST_FIRST").unwrap_or(0), part("VMKEEP_TEST_STEP").unwrap_or(1));
    for decoder in decoders().into_iter().skip(first).step_by(step) {
        let mut longest = 0;
        fuzz(decoder.name, &decoder.samples, false, 1.8, &mut |bytes| {
            longest = longest.max(bytes.len() as u64);
            (decoder.decode)(bytes);
        });
        assert!(peak() <= MAX_MEMORY + 16 * longest, "{}: {} MiB", decoder.name, peak() >> 20);
    }
    println!("at most {} MiB of memory", peak() >> 20);
}

#[test]
fn decoders_stand_random_changes() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let children: Vec<_> = (0..cores)
        .map(|first| {
            std::process::Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "fuzz::alone_decoders", "--ignored", "--test-threads=1", "--nocapture"])
                .env("VMKEEP_TEST_FIRST", first.to_string())
                .env("VMKEEP_TEST_STEP", cores.to_string())
                .stdout(std::process::Stdio::piped())
                .stderr(std::process::Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    for child in children {
        let child = child.wait_with_output().unwrap();
        let said =
            format!("{}{}", String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
        println!("{said}");
        assert!(child.status.success() && said.contains("1 passed"), "{said}");
    }
}

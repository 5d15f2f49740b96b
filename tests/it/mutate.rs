//! Fuzzing on stable: samples are changed at random, again and again for a while, in a process of its own whose memory is
//! measured. Unit tests of the library and of the program include this file too.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Memory that a process may take, beside 16 times its input, bytes.
const MAX_MEMORY: u64 = 64 << 20;

/// Numbers that lengths and counts are made of to hurt.
const NUMBERS: [u64; 14] = [
    0,
    1,
    2,
    0x7f,
    0xff,
    1 << 12,
    1 << 16,
    1 << 20,
    1 << 24,
    1 << 31,
    0xffff_ffff,
    1 << 40,
    1 << 63,
    u64::MAX,
];

/// A source of numbers that can be repeated.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from((self.0 >> 11) % limit.max(1) as u64).unwrap_or(0)
    }
}

/// Time that this thread has computed; the kernel counts it in ns.
fn computed() -> Option<Duration> {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    Some(Duration::from_nanos(stat.split_whitespace().next()?.parse().ok()?))
}

/// Calls `run` with changed samples until the time is over: `seconds`, or with `VMKEEP_TEST_LONG` ten minutes in which
/// this thread computes, however busy the machine is. Prints how many there were. What was tried last is in the message if `run` panics.
///
/// The process has to have taken little memory in all: call it in one of its own, by [`alone`].
///
/// `text`: the samples are texts, and what a person might mistype is tried more often than any bytes.
pub fn fuzz(name: &str, samples: &[Vec<u8>], text: bool, seconds: f64, run: &mut dyn FnMut(&[u8])) {
    let long = std::env::var_os("VMKEEP_TEST_LONG").is_some();
    let budget = if long { Duration::from_secs(600) } else { Duration::from_secs_f64(seconds) };
    let (start, begun, mut count) = (Instant::now(), computed(), 0u64);
    let spent = || match (begun, computed()) {
        (Some(begun), Some(now)) if long => now - begun,
        _ => start.elapsed(),
    };
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut longest = 0;
    // asking the kernel each time would be most of the work
    while !count.is_multiple_of(64) || spent() < budget {
        let mut bytes = samples[random.below(samples.len())].clone();
        for _ in 0..=random.below(6) {
            change(&mut random, &mut bytes, samples, text);
        }
        longest = longest.max(bytes.len() as u64);
        let tried = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(&bytes)));
        if let Err(panic) = tried {
            println!("{name}: number {count}: {}", String::from_utf8_lossy(&bytes).escape_debug());
            println!("{bytes:02x?}");
            std::panic::resume_unwind(panic);
        }
        count += 1;
    }
    let peak = peak();
    println!("{name}: {count} inputs in {:.1} s, at most {} MiB", spent().as_secs_f64(), peak >> 20);
    assert!(peak <= MAX_MEMORY + 16 * longest, "{name}: {peak} bytes of memory for inputs of {longest}");
}

/// Peak of the process's memory, bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// Starts an ignored test of this binary, by its whole path, in a process of its own.
pub fn start_alone(test: &str, variables: &[(&str, usize)]) -> Child {
    let name = test.split_once("::").map_or(test, |(_, name)| name);
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--ignored", "--test-threads=1", "--nocapture"])
        .envs(variables.iter().map(|(variable, value)| (variable, value.to_string())))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits for such a test, and fails with it.
pub fn finish_alone(child: Child) {
    let child = child.wait_with_output().unwrap();
    let said =
        format!("{}{}", String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    println!("{said}");
    assert!(child.status.success() && said.contains("1 passed"), "{said}");
}

fn change(random: &mut Random, bytes: &mut Vec<u8>, samples: &[Vec<u8>], text: bool) {
    const CHARACTERS: &[u8] = b"0123456789-+.:/@~%<>&;'\"= \n\tTZkMGTdhmy\xc3\xa9\xff\0";
    let at = random.below(bytes.len());
    match random.below(if text { 9 } else { 7 }) {
        0 if !bytes.is_empty() => bytes[at] ^= 1 << random.below(8),
        1 | 2 => {
            let number = NUMBERS[random.below(NUMBERS.len())];
            let number = number.wrapping_add(random.below(3) as u64).wrapping_sub(1);
            let width = [1, 2, 4, 8][random.below(4)];
            let encoded = if random.below(4) == 0 { number.to_be_bytes() } else { number.to_le_bytes() };
            let skip = if random.below(4) == 0 { 8 - width } else { 0 };
            bytes.iter_mut().skip(at).zip(&encoded[skip..skip + width]).for_each(|(to, from)| *to = *from);
        }
        3 => bytes.truncate(at),
        4 => {
            let new: Vec<u8> = (0..random.below(24)).map(|_| random.below(256) as u8).collect();
            bytes.splice(at..at, new);
        }
        // a part of another sample takes the place of the rest, or is put in
        5 => {
            let other = &samples[random.below(samples.len())];
            let from = random.below(other.len());
            let part = other.get(from..).unwrap_or_default().to_vec();
            let end = if random.below(2) == 0 { bytes.len() } else { at };
            bytes.splice(at..end, part);
            bytes.truncate(1 << 16);
        }
        6 => {
            let len = random.below(64).min(bytes.len() - at.min(bytes.len()));
            let part = bytes.get(at..at + len).unwrap_or_default().to_vec();
            for _ in 0..random.below(8) {
                bytes.splice(at..at, part.iter().copied());
            }
        }
        _ if text => bytes.insert(at, CHARACTERS[random.below(CHARACTERS.len())]),
        _ => {}
    }
}

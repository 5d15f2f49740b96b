//! A backup that is killed at any moment leaves nothing visible, and nothing in the way.

use std::io::Write;
use std::process::Stdio;
use std::time::Duration;

use crate::support::{Vmkeep, point};

/// Deterministic noise, so that a failure can be repeated.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

#[test]
fn killed_fifty_times_and_still_fine() {
    let vmkeep = Vmkeep::init(None);
    let image = vmkeep.path("disk.img");
    let path = image.to_str().unwrap();
    std::fs::write(&image, noise(0, 48 << 20)).unwrap();
    let backup = ["backup", "--file", path, "--name", "web01"];
    vmkeep.backup(&backup[1..]);
    let mut killed = 0;
    for round in 0..50u64 {
        // each round has something new to store
        let mut file = std::fs::OpenOptions::new().write(true).open(&image).unwrap();
        file.write_all(&noise(1 + round, 24 << 20)).unwrap();
        let mut child = vmkeep.command(&backup).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // spread over the whole run, which takes some 100 ms
        std::thread::sleep(Duration::from_millis(2 + round * 4));
        child.kill().unwrap();
        killed += u32::from(!child.wait().unwrap().success());
        if round % 10 == 9 {
            vmkeep.ok(&["verify", "--structure"]);
        }
    }
    assert!(killed >= 25, "only {killed} runs were still at work when they were killed");
    vmkeep.ok(&["verify", "--structure"]);
    let last = vmkeep.backup(&backup[1..]);
    vmkeep.ok(&["verify", "--data"]);
    let target = vmkeep.path("restored.img");
    let argument = format!("vda={}", target.display());
    vmkeep.ok(&["restore", &point(&last), "--to", &argument]);
    assert!(std::fs::read(&target).unwrap() == std::fs::read(&image).unwrap());
}

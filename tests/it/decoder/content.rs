//! What the disks of the fixture `two_points` read as: made of BLAKE3, known without any repository.

/// Text that compresses to about a half and is the same everywhere.
fn text(seed: u8, len: usize) -> Vec<u8> {
    let mut noise = vec![0; len / 2 + 1];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut noise);
    let digits = noise.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.map(|digit| b"0123456789abcdef"[usize::from(digit)]).take(len).collect()
}

fn put(disk: &mut [u8], at: usize, bytes: &[u8]) {
    disk[at..at + bytes.len()].copy_from_slice(bytes);
}

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// A sparse disk of 20 MiB and one sector: two levels of inner nodes, most of them absent.
pub fn vda(point: usize) -> Vec<u8> {
    let mut disk = vec![0; 20 * MIB + 512];
    put(&mut disk, 0, &text(1, 60 * KIB));
    put(&mut disk, MIB - 32 * KIB, &text(2, 90 * KIB + 100));
    put(&mut disk, 17 * MIB + 4 * KIB, &text(3, 40 * KIB));
    put(&mut disk, 20 * MIB, &text(4, 512));
    if point >= 1 {
        // overwritten in part, zeroed in part, and a leaf that was absent
        put(&mut disk, 20 * KIB + 100, &text(5, 5 * KIB));
        put(&mut disk, MIB, &vec![0; 24 * KIB]);
        put(&mut disk, 5 * MIB, &text(6, 9 * KIB));
        put(&mut disk, 17 * MIB + 4 * KIB, &vec![0; 40 * KIB]);
    }
    if point >= 2 {
        put(&mut disk, 9 * MIB, &text(7, 3 * KIB));
    }
    disk
}

/// A small disk of which the second point has more: two leaves in place of one.
pub fn vdb(point: usize) -> Vec<u8> {
    let mut disk = vec![0; if point == 0 { 300 * KIB + 512 } else { 2 * MIB }];
    put(&mut disk, 8 * KIB, &text(1, 60 * KIB));
    put(&mut disk, 128 * KIB, &text(8, 20 * KIB));
    if point >= 1 {
        put(&mut disk, 300 * KIB, &text(9, 4 * KIB));
    }
    disk
}

/// A side file.
pub fn nvram(point: usize) -> Vec<u8> {
    text(u8::try_from(20 + point).unwrap(), 777)
}

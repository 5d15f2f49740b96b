//! Which packs a sample reads. Pure.

use crate::id::PackId;

/// How much a sample reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sample {
    /// `parts` of `of` equal parts of all bytes in packs.
    Parts { parts: u64, of: u64 },
    /// So many bytes.
    Bytes(u64),
}

/// Returns the packs to read, in the order of their ids, from behind `cursor` on and round again: at least one, and
/// as many as it takes to reach the sample's length. `packs` are all packs with their lengths, in bytes.
///
/// Of packs that do not change, `of` samples of one part read each at least once: each reads on where the one before
/// it stopped, and at least its share.
pub fn choose(mut packs: Vec<(PackId, u64)>, sample: Sample, cursor: Option<PackId>) -> Vec<PackId> {
    packs.sort_unstable();
    let total: u128 = packs.iter().map(|(_, len)| u128::from(*len)).sum();
    let wanted = match sample {
        Sample::Parts { parts, of } => (total * u128::from(parts)).div_ceil(u128::from(of.max(1))),
        Sample::Bytes(bytes) => u128::from(bytes),
    };
    let first = packs.partition_point(|(id, _)| cursor.is_some_and(|cursor| *id <= cursor));
    packs.rotate_left(first);
    let mut chosen = Vec::new();
    let mut read = 0;
    for (id, len) in packs {
        if !chosen.is_empty() && read >= wanted {
            break;
        }
        read += u128::from(len);
        chosen.push(id);
    }
    chosen
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn packs(lens: &[u64]) -> Vec<(PackId, u64)> {
        let id = |no: usize| PackId::from_bytes([u8::try_from(no).unwrap(); 32]);
        lens.iter().enumerate().map(|(no, len)| (id(no), *len)).collect()
    }

    #[test]
    fn a_sample_goes_on_where_the_last_one_stopped() {
        let all = packs(&[10, 10, 10, 10]);
        let first = choose(all.clone(), Sample::Bytes(15), None);
        assert_eq!(first, [all[0].0, all[1].0]);
        let second = choose(all.clone(), Sample::Bytes(15), first.last().copied());
        assert_eq!(second, [all[2].0, all[3].0]);
        assert_eq!(choose(all.clone(), Sample::Bytes(1), second.last().copied()), [all[0].0], "round again");
        assert_eq!(choose(all.clone(), Sample::Bytes(u64::MAX), None).len(), 4);
        assert_eq!(choose(Vec::new(), Sample::Bytes(1), None), []);
    }

    proptest! {
        #[test]
        fn so_many_parts_cover_everything(
            lens in prop::collection::vec(1u64..1 << 30, 1..60),
            of in 1u64..20,
            start in prop::option::of(0u8..60),
        ) {
            let all = packs(&lens);
            let mut cursor = start.map(|no| PackId::from_bytes([no; 32]));
            let mut seen = BTreeSet::new();
            for _ in 0..of {
                let chosen = choose(all.clone(), Sample::Parts { parts: 1, of }, cursor);
                cursor = chosen.last().copied();
                seen.extend(chosen);
            }
            prop_assert_eq!(seen.len(), all.len());
        }
    }
}

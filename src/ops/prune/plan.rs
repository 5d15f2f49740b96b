//! Which packs to delete, and which to write anew first. Pure: a plan may be stale, which costs space, never data.

use crate::format::pack::PackKind;
use crate::id::PackId;

/// What is known of one pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PackUse {
    pub id: PackId,
    pub kind: PackKind,
    /// Length of the file, bytes.
    pub stored_len: u64,
    /// Plaintext of its chunks, and of those of them that are needed here. Bytes.
    pub raw_len: u64,
    pub live_len: u64,
    /// Something of it is recorded as damaged: what is left is written anew in any case.
    pub is_damaged: bool,
}

impl PackUse {
    /// A pack that no segment speaks of.
    pub(super) fn of_nobody(id: PackId, stored_len: u64) -> Self {
        Self { id, kind: PackKind::Data, stored_len, raw_len: 0, live_len: 0, is_damaged: false }
    }

    /// Returns the stored bytes that nothing needs, as far as plaintext tells.
    pub(super) fn unused_len(&self) -> u64 {
        if self.raw_len == 0 {
            return self.stored_len;
        }
        let unused = u128::from(self.stored_len) * u128::from(self.raw_len - self.live_len.min(self.raw_len));
        u64::try_from(unused / u128::from(self.raw_len)).unwrap_or(u64::MAX)
    }
}

/// Bounds of a plan.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Unused bytes that may stay, per thousand of all that is stored.
    pub max_unused_permille: u64,
    /// Stored bytes that may be written anew.
    pub max_repack: u64,
    /// Length that a pack should have.
    pub pack_target_len: u64,
}

/// What is to be done with the packs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct PackPlan {
    /// Nothing in them is needed.
    pub delete: Vec<PackUse>,
    /// What is needed of them is written anew.
    pub repack: Vec<PackUse>,
}

/// So many small packs of one kind stay; more are put together.
const SMALL_PACKS: usize = 16;

/// Chooses.
pub(super) fn choose(mut packs: Vec<PackUse>, bounds: Bounds) -> PackPlan {
    packs.sort_by_key(|pack| pack.id);
    let (mut keep, delete): (Vec<_>, Vec<_>) = packs.into_iter().partition(|pack| pack.live_len > 0);
    let total: u64 = keep.iter().map(|pack| pack.stored_len).sum();
    let allowed = total / 1000 * bounds.max_unused_permille;
    let mut unused: u64 = keep.iter().map(PackUse::unused_len).sum();
    // where most is won for what has to be written
    keep.sort_by_key(|pack| {
        let share = u128::from(pack.unused_len()) * 1_000_000 / u128::from(pack.stored_len.max(1));
        (std::cmp::Reverse(share), pack.id)
    });
    let mut plan = PackPlan { delete, repack: Vec::new() };
    let mut budget = bounds.max_repack;
    let mut stay = Vec::new();
    for pack in keep {
        let wanted = pack.is_damaged || (pack.unused_len() > 0 && unused > allowed);
        if wanted && pack.stored_len <= budget {
            budget -= pack.stored_len;
            unused -= pack.unused_len().min(unused);
            plan.repack.push(pack);
        } else {
            stay.push(pack);
        }
    }
    for kind in [PackKind::Data, PackKind::Metadata] {
        let small: Vec<&PackUse> = stay
            .iter()
            .filter(|pack| pack.kind == kind && pack.stored_len < bounds.pack_target_len / 4)
            .collect();
        let len: u64 = small.iter().map(|pack| pack.stored_len).sum();
        if small.len() > SMALL_PACKS && len <= budget {
            budget -= len;
            plan.repack.extend(small.into_iter().cloned());
        }
    }
    plan.repack.sort_by_key(|pack| pack.id);
    plan
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pack(no: u8, stored: u64, live_percent: u64) -> PackUse {
        PackUse {
            id: PackId::from_bytes([no; 32]),
            kind: PackKind::Data,
            stored_len: stored,
            raw_len: stored * 2,
            live_len: stored * 2 * live_percent / 100,
            is_damaged: false,
        }
    }

    const BOUNDS: Bounds = Bounds { max_unused_permille: 50, max_repack: u64::MAX, pack_target_len: 1000 };

    fn ids(packs: &[PackUse]) -> Vec<u8> {
        packs.iter().map(|pack| pack.id.as_bytes()[0]).collect()
    }

    #[test]
    fn dead_packs_go_and_full_ones_stay() {
        let plan = choose(vec![pack(1, 1000, 0), pack(2, 1000, 100)], BOUNDS);
        assert_eq!((ids(&plan.delete), ids(&plan.repack)), (vec![1], vec![]));
    }

    #[test]
    fn the_emptiest_are_written_anew_until_little_is_unused() {
        let packs = vec![pack(1, 1000, 90), pack(2, 1000, 10), pack(3, 1000, 97), pack(4, 1000, 50)];
        // 1530 unused of 4000; 200 may stay: without 2 and 4 it is 130
        let plan = choose(packs, BOUNDS);
        assert_eq!((ids(&plan.delete), ids(&plan.repack)), (vec![], vec![2, 4]));
    }

    #[test]
    fn no_more_is_written_than_allowed() {
        let packs = vec![pack(1, 1000, 10), pack(2, 1000, 20), pack(3, 400, 30)];
        let plan = choose(packs, Bounds { max_repack: 1500, ..BOUNDS });
        assert_eq!(ids(&plan.repack), [1, 3]);
    }

    #[test]
    fn a_damaged_pack_is_written_anew_however_full_it_is() {
        let damaged = PackUse { is_damaged: true, ..pack(2, 1000, 100) };
        let plan = choose(vec![pack(1, 1000, 100), damaged], BOUNDS);
        assert_eq!((ids(&plan.delete), ids(&plan.repack)), (vec![], vec![2]));
    }

    #[test]
    fn many_small_packs_become_few() {
        let packs: Vec<_> = (0..20).map(|no| pack(no, 100, 100)).collect();
        assert_eq!(choose(packs, BOUNDS).repack.len(), 20);
        let packs: Vec<_> = (0..10).map(|no| pack(no, 100, 100)).collect();
        assert_eq!(choose(packs, BOUNDS).repack.len(), 0);
    }
}

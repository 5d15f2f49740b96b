//! The rules that keep a repository safe, by name, so that a test can take each away and see that it is missed.

use super::Repository;

/// A rule of the protocol (`repo-format.md` §18). Outside of tests none is ever broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    /// B1: a session is registered before it reads.
    RegisterFirst,
    /// B2: nothing in a marked pack is relied on.
    HeedMarks,
    /// B2: nothing is compared with a marked point.
    HeedMarkedBases,
    /// B2: marks are read before segments and before packs are looked at.
    MarksBeforeSegments,
    /// B2: a segment counts only with its owner's outcome.
    SegmentsNeedOutcomes,
    /// B2: what the local index knows of a segment counts as long as the outcome of its owner.
    AppliedMustCount,
    /// B2: nothing is relied on in a pack that is not there.
    HitMustBeThere,
    /// B2: nothing is relied on that is recorded as damaged.
    HeedDamage,
    /// B3: metadata goes to two packs.
    MetadataTwice,
    /// B5: the marks are looked at again before the outcome is put.
    LookAgain,
    /// B6: the outcome is put after every pack and segment.
    CommitLast,
    /// B6: an outcome is created exclusively.
    ExclusiveOutcome,
    /// B6: an outcome whose sync failed is no success.
    DoubtFailedSync,
    /// P1: a second prune withdraws.
    OnePrune,
    /// P1: a sweep that an earlier prune had decided is carried out before its mark goes.
    FinishSweeps,
    /// P3, P4: sessions are listed after the mark is there, ...
    MarkBeforeFence,
    /// ... and waited for.
    Fence,
    /// P5: what is live is computed after the fence.
    RecomputeLive,
    /// P5: if anything that is live cannot be read, nothing is deleted.
    StopIfMissing,
    /// P6: what stays of segments that go is listed anew.
    ListSurvivors,
    /// P7, P8: nothing is deleted before the sweep is decided.
    DecideBeforeSweep,
    /// P8, P9: segments go before packs.
    SegmentsBeforePacks,
    /// P11: the mark goes last.
    MarkLast,
    /// U1: a marked point cannot be had back.
    HeedMarkedPoints,
    /// R2: a repaired point is made of one that is there and in no mark.
    RepairOfPointsThatStay,
    /// U3, U4: the tombstone goes before the outcome is there.
    UndeleteBeforeOutcome,
}

impl Rule {
    /// All of them, in order.
    #[cfg(test)]
    pub(crate) const ALL: [Self; Self::UndeleteBeforeOutcome as usize + 1] = [
        Self::RegisterFirst,
        Self::HeedMarks,
        Self::HeedMarkedBases,
        Self::MarksBeforeSegments,
        Self::SegmentsNeedOutcomes,
        Self::AppliedMustCount,
        Self::HitMustBeThere,
        Self::HeedDamage,
        Self::MetadataTwice,
        Self::LookAgain,
        Self::CommitLast,
        Self::ExclusiveOutcome,
        Self::DoubtFailedSync,
        Self::OnePrune,
        Self::FinishSweeps,
        Self::MarkBeforeFence,
        Self::Fence,
        Self::RecomputeLive,
        Self::StopIfMissing,
        Self::ListSurvivors,
        Self::DecideBeforeSweep,
        Self::SegmentsBeforePacks,
        Self::MarkLast,
        Self::HeedMarkedPoints,
        Self::RepairOfPointsThatStay,
        Self::UndeleteBeforeOutcome,
    ];
}

impl Repository {
    /// Returns true if a test has taken this rule away.
    pub(crate) fn breaks(&self, rule: Rule) -> bool {
        #[cfg(test)]
        let broken = self.environment().timing.broken;
        #[cfg(not(test))]
        let broken: Option<Rule> = None;
        broken == Some(rule)
    }
}

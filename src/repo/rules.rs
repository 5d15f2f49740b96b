//! The rules that keep a repository safe, by name, so that a test can take each away and see that it is missed.

use super::Repository;

/// A rule of the protocol (`repo-format.md` §18). Outside of tests none is ever broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    /// B1: a session is registered before it reads.
    #[cfg(test)]
    RegisterFirst,
    /// B2: nothing in a marked pack is relied on.
    HeedMarks,
    /// B2: marks are read before segments and listings.
    MarksBeforeSegments,
    /// B2: a segment counts only with its owner's outcome.
    SegmentsNeedOutcomes,
    /// B5: marks are looked at again before the commit.
    LookAgain,
    /// B6: an outcome is created exclusively.
    ExclusiveOutcome,
    /// P3, P4: sessions are listed after the mark is there, ...
    MarkBeforeFence,
    /// ... and waited for.
    Fence,
    /// P5: what is live is computed after the fence.
    RecomputeLive,
    /// P7, P8: nothing is deleted before the sweep is decided.
    DecideBeforeSweep,
    /// P8, P9: segments go before packs.
    SegmentsBeforePacks,
    /// U1: a marked point cannot be had back.
    HeedMarkedPoints,
    /// R2: a repaired point is made of one that is there and in no mark.
    RepairOfPointsThatStay,
    /// U3, U4: the tombstone goes before the outcome is there.
    UndeleteBeforeOutcome,
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

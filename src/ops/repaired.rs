//! Copies that a repair made of damaged points, beside those points.
//!
//! Both are of one instant and share every chunk. The copy's map says which ranges are lost; the damaged point still names
//! what was there, so it may heal, and never restores less than its copy. Hence, as long as both are there, the damaged
//! point stands for both: selectors by domain or time, guards and policies go by it. The copy is named by its id.

use std::collections::{BTreeMap, BTreeSet};

use crate::format::name::ObjectName;
use crate::id::PointId;
use crate::ops::PointEntry;
use crate::ops::verify::VerifyReport;

/// Returns the copies among `entries`, each with the point that it was made of, where that one is among them too.
pub fn copies(entries: &[PointEntry]) -> BTreeMap<PointId, PointId> {
    let mut copies: BTreeMap<PointId, PointId> =
        entries.iter().filter_map(|entry| Some((entry.record.id, entry.record.repaired_from()?))).collect();
    if !copies.is_empty() {
        let there: BTreeSet<PointId> = entries.iter().map(|entry| entry.record.id).collect();
        copies.retain(|_, original| there.contains(original));
    }
    copies
}

/// Adds to what a verify found of copies that their points are whole again, where it has looked at both.
pub(super) fn tell_healed(points: &[&PointEntry], report: &mut VerifyReport) {
    let looked_at: BTreeSet<PointId> = points.iter().map(|entry| entry.record.id).collect();
    for entry in points {
        let (copy, original) = (entry.record.id, entry.record.repaired_from());
        let is_whole = |id: &PointId| looked_at.contains(id) && !report.damaged_points.contains(id);
        let Some(original) = original.filter(is_whole) else { continue };
        let object = ObjectName::Outcome(copy.into()).to_string();
        for finding in report.findings.iter_mut().filter(|finding| finding.object == object) {
            finding.problem += &format!(
                "; point {}, which it was made of, is whole again: `vmkeep forget {}` drops this copy",
                original.short(),
                copy.short()
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::name::Folder;
    use crate::format::point::Level;
    use crate::monitor::Recorder;
    use crate::ops::RequestedLevel;
    use crate::ops::backup::tests::{World, write};
    use crate::ops::forget::{check_guards, forget};
    use crate::ops::repair::repair_points;
    use crate::ops::select::select;
    use crate::ops::verify::{VerifyLevel, VerifyOptions, verify};
    use crate::storage::Storage;
    use crate::storage::memory::MemoryStorage;

    fn check(world: &World) -> VerifyReport {
        let options = VerifyOptions { level: VerifyLevel::Data, record: true, ..VerifyOptions::default() };
        verify(&world.repository, &options, &Recorder::new()).unwrap()
    }

    fn entries(world: &World) -> Vec<PointEntry> {
        world.repository.catalog(&Recorder::new()).unwrap().points().to_vec()
    }

    /// Points with something of the newest lost, and repaired; what is in its pack, by the pack's name.
    fn damaged(points: u64) -> (World, BTreeMap<PointId, PointId>, ObjectName, Vec<u8>) {
        let storage = MemoryStorage::new();
        let mut world = World::on(storage.clone(), &[4 << 20]);
        let mut before = Vec::new();
        for day in 0..points {
            before = storage.list(Folder::Packs).unwrap();
            write(&mut world, day * (256 << 10), 256 << 10, day);
            world.backup(RequestedLevel::Is(if day == 0 { Level::Full } else { Level::Incremental }));
        }
        let new = storage.list(Folder::Packs).unwrap().into_iter().filter(|listed| !before.contains(listed));
        let name = new.max_by_key(|listed| listed.len).unwrap().name;
        let bytes = storage.get(name, u64::MAX).unwrap();
        storage.tamper(name, |_| None);
        world.reopen();
        assert_eq!(check(&world).damaged_points.len(), 1);
        let made = repair_points(&world.repository, false, &Recorder::new()).unwrap();
        assert_eq!(made.points.len(), 1);
        let copies = copies(&entries(&world));
        assert_eq!(copies.len(), 1, "what a repair makes is known as a copy");
        (world, copies, name, bytes)
    }

    #[test]
    fn plain_selectors_and_guards_take_a_copy_and_its_point_for_one() {
        let (world, copies, ..) = damaged(5);
        let (copy, original) = copies.into_iter().next().unwrap();
        let ids: Vec<PointId> = world.kept.iter().map(|kept| kept.id).collect();
        assert_eq!(ids[4], original);
        let all = entries(&world);
        let now = jiff::Timestamp::UNIX_EPOCH.to_zoned_datetime(jiff::tz::TimeZone::UTC);
        let domain = all[0].record.domain.clone();
        let pick = |text: &str| select(&all, text, &now).map(|selected| selected.entry.record.id).unwrap();
        assert_eq!(pick(&domain), original);
        assert_eq!(pick("latest"), original);
        for steps in 0..5 {
            assert_eq!(pick(&format!("{domain}~{steps}")), ids[4 - steps], "~{steps}");
        }
        assert_eq!(pick(&format!("{domain}@2999-01-01")), original);
        assert_eq!(pick(&copy.to_hex()), copy, "its id names it");

        let silent = Recorder::new();
        let catalog = world.repository.catalog(&silent).unwrap();
        check_guards(&catalog, &[copy], i64::MAX).unwrap();
        for id in &ids[3..] {
            let refused = check_guards(&catalog, &[*id], i64::MAX).unwrap_err().to_string();
            assert!(refused.contains("newest two"), "{refused}");
        }
        // two of five, whatever there is of copies; three are more than half
        check_guards(&catalog, &[ids[0], ids[1], copy], i64::MAX).unwrap();
        let refused = check_guards(&catalog, &ids[..3], i64::MAX).unwrap_err().to_string();
        assert!(refused.contains("3 of the 5 points"), "{refused}");

        // by itself it is a point as any other
        forget(&world.repository, &[original], "test", false, &silent).unwrap();
        let all = entries(&world);
        assert_eq!(select(&all, &domain, &now).unwrap().entry.record.id, copy);
        let catalog = world.repository.catalog(&silent).unwrap();
        assert!(check_guards(&catalog, &[copy], i64::MAX).is_err());
    }

    #[test]
    fn a_copy_of_a_point_that_has_healed_may_go() {
        let (mut world, copies, name, bytes) = damaged(3);
        let (copy, original) = copies.into_iter().next().unwrap();
        let object = ObjectName::Outcome(copy.into()).to_string();
        let said = |report: &VerifyReport| -> String {
            let found = report.findings.iter().find(|finding| finding.object == object);
            found.map(|finding| finding.problem.clone()).unwrap_or_default()
        };
        let report = check(&world);
        assert!(!said(&report).contains("whole again"), "{report:?}");
        world.storage.put_new(name, &bytes).unwrap();
        world.reopen();
        let report = check(&world);
        assert_eq!(report.damaged_points, [copy], "{report:?}");
        let told = said(&report);
        assert!(told.contains(&original.short()) && told.contains("forget"), "{told}");
        forget(&world.repository, &[copy], "test", false, &Recorder::new()).unwrap();
        assert_eq!(check(&world).findings, []);
    }
}

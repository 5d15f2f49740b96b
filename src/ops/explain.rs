//! What a point would need in the classic world of full, incremental and differential files. Pure.
//!
//! Nothing here is needed to restore: every point is complete. It answers the question that an administrator
//! asks who knows backups as chains: "Full(Mon) + Diff(Sat)".

use crate::format::point::Level;
use crate::id::PointId;
use crate::ops::PointEntry;

/// One member of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link<'a> {
    /// A point that the repository shows.
    Point(&'a PointEntry),
    /// A base that was forgotten. What it was itself compared with is not known any more.
    Forgotten(PointId),
}

/// Returns the chain of a point, the oldest member first and the point itself last; `None` if it is not among
/// `entries`.
///
/// A full or a copy ends a chain, as does a base that was forgotten, or one that comes a second time (which
/// only a forged repository has).
pub fn chain(entries: &[PointEntry], id: PointId) -> Option<Vec<Link<'_>>> {
    let find = |id: PointId| entries.iter().find(|entry| entry.record.id == id);
    let mut last = find(id)?;
    let mut links = vec![Link::Point(last)];
    while let Some(base) = last.record.base {
        if matches!(last.record.level, Level::Full | Level::Copy) {
            break;
        }
        let Some(entry) = find(base) else {
            links.push(Link::Forgotten(base));
            break;
        };
        if links.iter().any(|link| link.id() == base) {
            break;
        }
        links.push(Link::Point(entry));
        last = entry;
    }
    links.reverse();
    Some(links)
}

impl Link<'_> {
    /// Returns the id of the member.
    pub fn id(&self) -> PointId {
        match self {
            Self::Point(entry) => entry.record.id,
            Self::Forgotten(id) => *id,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::point::{Consistency, PointRecord, PointStats, SourceKind};

    fn id(number: u8) -> PointId {
        PointId::from_bytes([number; 16])
    }

    fn entry(number: u8, level: Level, base: Option<u8>) -> PointEntry {
        let record = PointRecord {
            id: id(number),
            domain: "web".into(),
            domain_uuid: None,
            time_ms: i64::from(number),
            level,
            base: base.map(id),
            predecessor: None,
            checkpoint: None,
            source: SourceKind::Running,
            consistency: Consistency::Crash,
            disks: Vec::new(),
            files: Vec::new(),
            xml_inactive: None,
            xml_live: None,
            tags: Vec::new(),
            host: "h".into(),
            program: "p".into(),
        };
        PointEntry { record: record.into(), stats: PointStats::default() }
    }

    /// Full(1) Inc(2) Inc(3) Diff(4) Inc(5) Diff(6)
    fn week() -> Vec<PointEntry> {
        vec![
            entry(1, Level::Full, None),
            entry(2, Level::Incremental, Some(1)),
            entry(3, Level::Incremental, Some(2)),
            entry(4, Level::Differential, Some(1)),
            entry(5, Level::Incremental, Some(4)),
            entry(6, Level::Differential, Some(1)),
        ]
    }

    fn ids(entries: &[PointEntry], of: u8) -> Vec<PointId> {
        chain(entries, id(of)).unwrap().iter().map(Link::id).collect()
    }

    #[test]
    fn a_week_has_the_classic_chains() {
        let week = week();
        assert_eq!(ids(&week, 1), [id(1)]);
        assert_eq!(ids(&week, 3), [id(1), id(2), id(3)]);
        assert_eq!(ids(&week, 5), [id(1), id(4), id(5)]);
        assert_eq!(ids(&week, 6), [id(1), id(6)]);
        assert_eq!(chain(&week, id(9)), None);
    }

    #[test]
    fn a_forgotten_base_is_shown_as_such() {
        let mut week = week();
        week.retain(|entry| entry.record.id != id(1));
        assert_eq!(chain(&week, id(6)).unwrap()[0], Link::Forgotten(id(1)));
        assert_eq!(ids(&week, 5), [id(1), id(4), id(5)]);
    }

    #[test]
    fn a_forged_circle_ends() {
        let circle = [entry(1, Level::Incremental, Some(2)), entry(2, Level::Incremental, Some(1))];
        assert_eq!(ids(&circle, 1), [id(2), id(1)]);
        let own = [entry(3, Level::Differential, Some(3))];
        assert_eq!(ids(&own, 3), [id(3)]);
    }
}

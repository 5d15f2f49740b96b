//! What a verify leaves in the repository: damage records, and what it found out about points.

use std::collections::{BTreeMap, BTreeSet};

use super::{Bad, Verified};
use crate::error::{Error, Result};
use crate::format::name::ObjectName;
use crate::format::session::{Damage, Outcome, SampleScope, SessionKind, VerifiedLevel, VerifiedRecord};
use crate::id::{ChunkId, PackId, PointId};
use crate::monitor::Monitor;
use crate::repo::Repository;
use crate::repo::session::Session;
use crate::repo::view::View;

/// Begins the session of a verify that records; `None` where the repository cannot be written to.
pub(super) fn begin(repository: &Repository, monitor: &dyn Monitor) -> Result<Option<Session>> {
    match Session::begin(repository, SessionKind::Verify) {
        Ok(session) => Ok(Some(session)),
        Err(error) if is_read_only(&error) => {
            monitor.note(&format!("the result is not recorded: {error}"));
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn is_read_only(error: &Error) -> bool {
    use std::io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    match error {
        Error::Context { source, .. } => is_read_only(source),
        Error::Io { source, .. } => {
            matches!(source.kind(), PermissionDenied | ReadOnlyFilesystem | StorageFull | QuotaExceeded)
        }
        _ => false,
    }
}

/// Records what was found out: the damage first, then the rest, which ends the session.
pub(super) fn record(
    repository: &Repository,
    session: Session,
    level: VerifiedLevel,
    verified: &mut Verified,
) -> Result<()> {
    verified.report.recorded = put_damage(repository, &session, &verified.view, &verified.bad)?;
    commit(repository, session, level, verified)
}

/// Records what is bad and not recorded yet; returns how many records were put.
fn put_damage(repository: &Repository, session: &Session, view: &View, bad: &Bad) -> Result<u64> {
    let mut by_pack: BTreeMap<PackId, BTreeSet<ChunkId>> = BTreeMap::new();
    for (pack, chunk) in &bad.chunks {
        if !bad.packs.contains(pack) && !view.is_condemned(*pack, chunk) {
            by_pack.entry(*pack).or_default().insert(*chunk);
        }
    }
    // no chunk named: all of them
    let new = bad.packs.iter().filter(|pack| !view.is_condemned_whole(**pack));
    by_pack.extend(new.map(|pack| (*pack, BTreeSet::new())));
    let count = by_pack.len() as u64;
    for (pack, chunks) in by_pack {
        let name = ObjectName::Damage(pack, session.id());
        let damage = Damage { pack, chunks: chunks.into_iter().collect() };
        let bytes = damage.to_object(repository.id()).map_err(|fault| Error::malformed(name, fault))?;
        repository.storage().put_new(name, &bytes)?;
    }
    Ok(count)
}

/// Ends the session with what was found out.
fn commit(
    repository: &Repository,
    session: Session,
    level: VerifiedLevel,
    verified: &Verified,
) -> Result<()> {
    let Verified { report, points, .. } = verified;
    let damaged: BTreeSet<PointId> = report.damaged_points.iter().copied().collect();
    let sound = points.iter().copied().filter(|id| !damaged.contains(id));
    let record = VerifiedRecord {
        // a sample has not looked at all content of any point
        level: if report.sample.is_some() { VerifiedLevel::Structure } else { level },
        time_ms: (repository.environment().now_ms)(),
        sound: sound.collect(),
        damaged: report.damaged_points.clone(),
        cursor: report.sample.and_then(|sample| sample.cursor),
    };
    let scope = report.sample.map(|_| SampleScope { level, domains: verified.domains.clone() });
    session.commit(&Outcome::Found { record, order: verified.newest_order.saturating_add(1), scope })
}

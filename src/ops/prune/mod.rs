//! Prune: reclaims what no point reaches, while backups go on.
//!
//! 1. end or finish what an earlier prune left; choose points to drop and packs (maybe stale: costs space, no data)
//! 2. put the mark: from now on new sessions rely on none of those packs and points
//! 3. fence: every session that was registered before has ended when this returns
//! 4. find out anew what is live, unless the same points stay as before; write what is live of the marked packs anew; if
//!    anything live is missing, or would have too few copies, stop
//! 5. put the outcome, a sweep: now the new segments count
//! 6. delete segments, packs, outcomes of dropped points, and the mark last: whoever finds the sweep can redo it

mod live;
mod plan;
mod rewrite;
mod segments;
mod sweep;

use std::collections::{HashMap, HashSet};

use serde::Serialize;

use self::live::Live;
use self::plan::{Bounds, PackPlan, PackUse, choose};
use self::segments::{for_each_segment, refuse_unknown};
use crate::error::{Context, Error, Result};
use crate::format::limits::SEGMENT_TARGET_CHUNKS;
use crate::format::name::{Folder, ObjectName};
use crate::format::point::PointRecord;
use crate::format::segment::Segment;
use crate::format::session::{Mark, Outcome, SessionKind};
use crate::id::{ChunkId, PackId, PointId, SegmentId};
use crate::index::locate;
use crate::monitor::Monitor;
use crate::ops::lost_points;
use crate::repo::reader::ChunkReader;
use crate::repo::rules::Rule;
use crate::repo::segments::SegmentCache;
use crate::repo::session::Session;
use crate::repo::view::View;
use crate::repo::{Catalog, Repository};
use crate::storage::Leftover;

/// So many small segments stay as they are; more are put together.
const SMALL_SEGMENTS: usize = 16;

/// How to prune.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PruneOptions {
    /// Unused bytes that may stay, per thousand of all that is stored.
    pub max_unused_permille: u64,
    /// Stored bytes to write anew at most.
    pub max_repack_bytes: u64,
    pub dry_run: bool,
}

impl Default for PruneOptions {
    fn default() -> Self {
        Self { max_unused_permille: 50, max_repack_bytes: u64::MAX, dry_run: false }
    }
}

/// What a prune does with a pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PackAction {
    /// Nothing in it is needed.
    Delete,
    /// What is needed of it is written anew.
    Rewrite,
}

/// One pack of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PlannedPack {
    pub pack: PackId,
    pub action: PackAction,
    pub stored_bytes: u64,
    /// Those of them that nothing needs, as far as plaintext tells.
    pub unused_bytes: u64,
}

/// What was done, or with a dry run what would be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PruneReport {
    /// Forgotten points that are gone for good.
    pub dropped_points: Vec<PointId>,
    pub live_chunks: u64,
    /// The plan: every pack that goes.
    pub packs: Vec<PlannedPack>,
    pub deleted_packs: u64,
    pub deleted_bytes: u64,
    /// Packs of which a part was written anew; they are among the deleted ones.
    pub repacked_packs: u64,
    pub repacked_bytes: u64,
    /// Bytes of new packs and segments.
    pub written_bytes: u64,
    pub deleted_segments: u64,
    /// Small segments that were put together; they are among the deleted ones.
    pub merged_segments: u64,
    /// Bytes in packs, before and after.
    pub stored_before_bytes: u64,
    pub stored_after_bytes: u64,
    pub dry_run: bool,
}

/// Prunes.
///
/// # Errors
/// [`Error::Busy`] while another prune runs; [`Error::Damaged`] if anything that a point needs is missing: then
/// nothing was deleted; [`Error::Fenced`]; those of the storage. A prune that failed has done no harm.
pub fn prune(repository: &Repository, options: &PruneOptions, monitor: &dyn Monitor) -> Result<PruneReport> {
    match prune_once(repository, options, monitor) {
        Err(error) if error.is_storage_full() && !options.dry_run => {
            monitor.note("no space is left: giving the reserve back, and writing as little as possible");
            repository.storage().delete(ObjectName::Reserve)?;
            let thrifty = PruneOptions { max_repack_bytes: 0, ..options.clone() };
            let report = prune_once(repository, &thrifty, monitor)?;
            put_spare(repository, monitor);
            Ok(report)
        }
        Ok(report) if !options.dry_run => {
            put_spare(repository, monitor);
            Ok(report)
        }
        other => other,
    }
}

/// Puts a config where it is missing, and the reserve back. What cannot be put is no reason to call a prune failed.
fn put_spare(repository: &Repository, monitor: &dyn Monitor) {
    if let Err(error) = repository.put_missing_config() {
        monitor.note(&format!("a config that is missing could not be put: {error}"));
    }
    repository.put_reserve(monitor);
}

fn prune_once(repository: &Repository, options: &PruneOptions, monitor: &dyn Monitor) -> Result<PruneReport> {
    let segments = SegmentCache::new(repository);
    if options.dry_run {
        let (catalog, view) = repository.refresh_and_look(monitor)?;
        sweep::note_decided(repository, monitor)?;
        let (chosen, live) = choose_all(&segments, &catalog, &view, options, monitor)?;
        refuse_missing(&segments, &catalog, &view, live, monitor)?;
        return Ok(chosen.report(true));
    }
    let session = Session::begin(repository, SessionKind::Prune)?;
    repository.clear_dead_sessions(session.id())?;
    if !repository.breaks(Rule::OnePrune) {
        refuse_second_prune(repository, &session, monitor)?;
    }
    // whoever writes these now is registered, and is waited for before they are removed
    let leftovers = repository.storage().leftovers()?;
    sweep::clear_marks(repository, session.id(), monitor).context(|| "while ending an earlier prune")?;
    let (catalog, view) = repository.refresh_and_look(monitor)?;
    let (chosen, live) =
        choose_all(&segments, &catalog, &view, options, monitor).map_err(|error| session.cause_of(error))?;
    if chosen.is_nothing() {
        if repository.open_sessions()?.iter().all(|other| other.id == session.id()) {
            remove_leftovers(repository, &leftovers, monitor)?;
        }
        session.commit(&Outcome::Done)?;
        sweep::delete_spent(repository, monitor)?;
        return Ok(chosen.report(false));
    }
    let mark = Mark { packs: chosen.packs().map(|pack| pack.id).collect(), points: chosen.drop.clone() };
    let id = session.id();
    let name = ObjectName::Mark(id);
    let bytes = mark.to_object(repository.id()).map_err(|fault| Error::malformed(name, fault))?;
    if repository.breaks(Rule::MarkBeforeFence) {
        repository.fence(id, monitor)?;
    }
    repository.storage().put_new(name, &bytes)?;
    let before = Before { segments: &segments, catalog: &catalog, live };
    let swept = rewrite_and_commit(repository, session, &mark, &chosen, before, monitor);
    if swept.is_err() {
        // what went wrong is told; a mark that stays is cleared by whoever prunes next
        let _ = sweep::clear_aborted(repository, id);
    }
    let (sweep, written_bytes) = swept?;
    let deleted_segments = sweep::carry_out(repository, &sweep, monitor)?;
    sweep::delete_spent(repository, monitor)?;
    remove_leftovers(repository, &leftovers, monitor)?;
    let mut report = chosen.report(false);
    report.dropped_points = sweep.points;
    report.written_bytes = written_bytes;
    report.deleted_segments = deleted_segments;
    report.stored_after_bytes =
        repository.storage().list(Folder::Packs)?.iter().map(|listed| listed.len).sum();
    Ok(report)
}

/// Removes what killed programs had not finished writing.
fn remove_leftovers(repository: &Repository, leftovers: &[Leftover], monitor: &dyn Monitor) -> Result<()> {
    if leftovers.is_empty() {
        return Ok(());
    }
    repository.storage().remove_leftovers(leftovers)?;
    let bytes: u64 = leftovers.iter().map(|left| left.len).sum();
    monitor.note(&format!("removed {} unfinished files of {bytes} bytes", leftovers.len()));
    Ok(())
}

/// Two prunes at once would wait for one another. One that lives shows it within a heartbeat. That there is a process of
/// its id does not tell: another program may have it by now, or the prune hangs.
///
/// Of two that begin at the same moment and see one another, one goes on: that of the lower id gives the other time to
/// withdraw first.
fn refuse_second_prune(repository: &Repository, own: &Session, monitor: &dyn Monitor) -> Result<()> {
    for other in repository.open_sessions()? {
        let is_prune = other.record.as_ref().is_some_and(|record| record.kind == SessionKind::Prune);
        if other.id == own.id() || !is_prune {
            continue;
        }
        let host = other.record.map(|record| record.host).unwrap_or_default();
        monitor.note(&format!("waiting for a sign of life of a prune on {host} (session {})", other.id));
        let signs = if own.id() < other.id { 3 } else { 1 };
        if repository.shows_life(other.id, signs, monitor)? {
            return Err(Error::Busy {
                object: repository.storage().url(),
                why: format!("another prune runs on {host} (session {})", other.id),
            });
        }
        repository.end_session(other.id, own.id(), "it showed no sign of life")?;
    }
    Ok(())
}

/// What was chosen before anybody was told.
struct Chosen {
    plan: PackPlan,
    drop: Vec<PointId>,
    /// Small segments to be put together, and some that have nothing to say: of aborted sessions, or not readable.
    merge: HashSet<SegmentId>,
    live_chunks: usize,
    stored_before: u64,
}

impl Chosen {
    fn packs(&self) -> impl Iterator<Item = &PackUse> {
        self.plan.delete.iter().chain(&self.plan.repack)
    }

    fn is_nothing(&self) -> bool {
        self.packs().next().is_none() && self.drop.is_empty() && self.merge.is_empty()
    }

    fn report(&self, dry_run: bool) -> PruneReport {
        let len = |packs: &[PackUse]| packs.iter().map(|pack| pack.stored_len).sum::<u64>();
        let (deleted, repacked) = (len(&self.plan.delete), len(&self.plan.repack));
        let planned = |action: PackAction| {
            move |pack: &PackUse| PlannedPack {
                pack: pack.id,
                action,
                stored_bytes: pack.stored_len,
                unused_bytes: pack.unused_len(),
            }
        };
        let rewritten = self.plan.repack.iter().map(planned(PackAction::Rewrite));
        let kept: u64 = self
            .plan
            .repack
            .iter()
            .map(|pack| pack.stored_len - pack.unused_len().min(pack.stored_len))
            .sum();
        PruneReport {
            dropped_points: self.drop.clone(),
            live_chunks: self.live_chunks as u64,
            packs: self.plan.delete.iter().map(planned(PackAction::Delete)).chain(rewritten).collect(),
            deleted_packs: (self.plan.delete.len() + self.plan.repack.len()) as u64,
            deleted_bytes: deleted + repacked,
            repacked_packs: self.plan.repack.len() as u64,
            repacked_bytes: repacked,
            written_bytes: 0,
            deleted_segments: 0,
            merged_segments: self.merge.len() as u64,
            stored_before_bytes: self.stored_before,
            stored_after_bytes: (self.stored_before + kept).saturating_sub(deleted + repacked),
            dry_run,
        }
    }
}

fn choose_all(
    segments: &SegmentCache<'_>,
    catalog: &Catalog,
    view: &View,
    options: &PruneOptions,
    monitor: &dyn Monitor,
) -> Result<(Chosen, Live)> {
    let repository = segments.repository();
    refuse_unreadable(catalog)?;
    let reader = ChunkReader::sparing(repository, view);
    refuse_lost(segments, catalog, &reader, monitor)?;
    let drop = droppable(repository, catalog);
    let dropped = drop.iter().copied().collect();
    let mut live = Live::of(repository, &reader, kept_records(catalog, &dropped), monitor)?;
    let mut uses: HashMap<PackId, PackUse> = HashMap::new();
    let mut small = HashSet::new();
    let healed = healed(segments, catalog, view, monitor)?;
    let packs = view.pack_lens()?;
    let spare = for_each_segment(segments, catalog, monitor, &mut |id, segment| {
        add_uses(segment, view, &healed, &mut live, &mut uses)?;
        if segment.chunks.len() < SEGMENT_TARGET_CHUNKS / 4 {
            small.insert(id);
        }
        Ok(())
    })?;
    refuse_unknown(&spare.unreadable, &uses.keys().copied().collect(), view)?;
    refuse_unlisted(live.missing())?;
    for id in view.damaged_packs() {
        // what is left of it is written anew, and the record of its damage goes with it
        uses.entry(id).and_modify(|pack| pack.is_damaged = true);
    }
    // a dry run ends nobody: those whose process is gone are as good as ended
    let (dead, open): (Vec<_>, Vec<_>) =
        repository.open_sessions()?.into_iter().partition(|session| repository.is_dead_here(session));
    if open.iter().all(|session| is_prune(session.record.as_ref())) {
        // packs that no segment speaks of: nobody is at work, so they are what killed sessions left
        for (id, len) in &packs {
            uses.entry(*id).or_insert(PackUse::of_nobody(*id, *len));
        }
    }
    let mut merge =
        if small.len() > SMALL_SEGMENTS && options.max_repack_bytes > 0 { small } else { HashSet::new() };
    merge.extend(spare.all(&dead.iter().map(|session| session.id).collect()));
    let bounds = Bounds {
        max_unused_permille: options.max_unused_permille,
        max_repack: options.max_repack_bytes,
        pack_target_len: repository.config().pack_target_len,
    };
    let chosen = Chosen {
        plan: choose(uses.into_values().collect(), bounds),
        drop,
        merge,
        live_chunks: live.len(),
        stored_before: packs.iter().map(|(_, len)| len).sum(),
    };
    Ok((chosen, live))
}

/// What no segment lists that counts is nowhere as far as a plan goes, even if its pack is there.
fn refuse_unlisted(missing: usize) -> Result<()> {
    match missing {
        0 => Ok(()),
        count => Err(Error::Damaged(format!(
            "{count} chunks that points need are in no pack that a segment lists; nothing is deleted before `vmkeep repair \
             index` or, if that does not find them, `vmkeep repair points`"
        ))),
    }
}

/// Finds out for a dry run what the prune itself would meet when it writes packs anew: that something cannot be had from
/// anywhere.
fn refuse_missing(
    segments: &SegmentCache<'_>,
    catalog: &Catalog,
    view: &View,
    mut live: Live,
    monitor: &dyn Monitor,
) -> Result<()> {
    if !view.has_lost() {
        return Ok(());
    }
    let reader = ChunkReader::new(segments.repository(), view);
    live.recount();
    // what is recorded as damaged may be readable again, as the prune would find
    for reads in [false, true] {
        if reads && live.missing() == 0 {
            break;
        }
        for_each_segment(segments, catalog, monitor, &mut |_, segment| {
            for chunk in &segment.chunks {
                let Some(place) = locate(segment, chunk) else { continue };
                let is_there = match reads {
                    false => view.is_good(&chunk.id, &place),
                    true => live.lacks(&chunk.id) && reader.read_at(chunk.kind, chunk.id, &[place]).is_ok(),
                };
                if is_there {
                    live.found(&chunk.id);
                }
            }
            Ok(())
        })?;
    }
    rewrite::refuse_missing(&live)
}

fn is_prune(record: Option<&crate::format::session::SessionRecord>) -> bool {
    record.is_some_and(|record| record.kind == SessionKind::Prune)
}

/// Returns the forgotten points that no hold keeps.
fn droppable(repository: &Repository, catalog: &Catalog) -> Vec<PointId> {
    let now_ms = (repository.environment().now_ms)();
    let forgotten = catalog.forgotten().iter().map(|entry| entry.record.id);
    forgotten.filter(|id| catalog.held(*id, now_ms).is_none()).collect()
}

/// Returns the records of the points that are not dropped, forgotten ones among them.
fn kept_records<'a>(
    catalog: &'a Catalog,
    dropped: &HashSet<PointId>,
) -> impl Iterator<Item = &'a PointRecord> {
    let all = catalog.points().iter().chain(catalog.forgotten()).map(|entry| entry.record.as_ref());
    all.filter(|record| !dropped.contains(&record.id))
}

/// Returns the chunks that are recorded as damaged somewhere and have a good copy elsewhere.
fn healed(
    segments: &SegmentCache<'_>,
    catalog: &Catalog,
    view: &View,
    monitor: &dyn Monitor,
) -> Result<HashSet<ChunkId>> {
    let (mut condemned, mut healed) = (HashSet::new(), HashSet::new());
    if !view.has_damage() {
        return Ok(healed);
    }
    let each = |take: &mut dyn FnMut(ChunkId, PackId)| {
        let all = &mut |_, segment: &Segment| {
            for chunk in &segment.chunks {
                if let Some(pack) = segment.packs.get(chunk.pack as usize) {
                    take(chunk.id, pack.id);
                }
            }
            Ok(())
        };
        for_each_segment(segments, catalog, monitor, all).map(drop)
    };
    each(&mut |id, pack| {
        if view.is_condemned(pack, &id) {
            condemned.insert(id);
        }
    })?;
    each(&mut |id, pack| {
        if condemned.contains(&id) && view.has_pack(pack) && !view.is_condemned(pack, &id) {
            healed.insert(id);
        }
    })?;
    Ok(healed)
}

/// Counts what of a segment's packs is needed there. A copy beyond those needed is not, nor a damaged one of what has
/// healed; a pack that is not there any more has nothing, so that what speaks of it goes too.
fn add_uses(
    segment: &Segment,
    view: &View,
    healed: &HashSet<ChunkId>,
    live: &mut Live,
    uses: &mut HashMap<PackId, PackUse>,
) -> Result<()> {
    let mut counted: Vec<Option<(u64, u64)>> =
        segment.packs.iter().map(|pack| (!uses.contains_key(&pack.id)).then_some((0, 0))).collect();
    for chunk in &segment.chunks {
        let there = segment.packs.get(chunk.pack as usize).is_some_and(|pack| {
            let spoiled = healed.contains(&chunk.id) && view.is_condemned(pack.id, &chunk.id);
            view.has_pack(pack.id) && !spoiled
        });
        if let (true, Some(Some((raw, needed)))) = (there, counted.get_mut(chunk.pack as usize)) {
            *raw += u64::from(chunk.len);
            if live.found(&chunk.id) {
                *needed += u64::from(chunk.len);
            }
        }
    }
    for (pack, lens) in segment.packs.iter().zip(counted) {
        let Some((raw_len, live_len)) = lens else { continue };
        let (id, kind) = (pack.id, pack.kind);
        let stored_len = view.pack_len(id)?.unwrap_or(0);
        uses.insert(id, PackUse { id, kind, stored_len, raw_len, live_len, is_damaged: false });
    }
    Ok(())
}

/// A point whose outcome is lost looks like what a killed session left.
fn refuse_lost(
    segments: &SegmentCache<'_>,
    catalog: &Catalog,
    reader: &ChunkReader<'_>,
    monitor: &dyn Monitor,
) -> Result<()> {
    let lost = lost_points::find(segments, catalog, reader, monitor)?;
    match lost.points.iter().find(|lost| lost.is_complete) {
        None => Ok(()),
        Some(lost) => Err(Error::Damaged(format!(
            "{} is missing, which made a point of {}; nothing is deleted before `vmkeep repair points`",
            ObjectName::Outcome(lost.record.id.into()),
            lost.record.domain,
        ))),
    }
}

/// What cannot be read might be what makes something live.
fn refuse_unreadable(catalog: &Catalog) -> Result<()> {
    match catalog.problems().first() {
        None => Ok(()),
        Some((name, problem)) => Err(Error::Damaged(format!(
            "{name} cannot be read ({problem}); nothing is deleted while it is not known what it names: see \
             `vmkeep repair points`"
        ))),
    }
}

/// A sweep that was decided.
#[derive(Debug)]
struct Sweep {
    session: crate::id::SessionId,
    packs: Vec<PackId>,
    points: Vec<PointId>,
    segments: Vec<SegmentId>,
}

/// What was seen before the fence.
struct Before<'a> {
    /// What they hold does not change; which there are is found out anew.
    segments: &'a SegmentCache<'a>,
    catalog: &'a Catalog,
    live: Live,
}

impl Before<'_> {
    /// Returns what points reach that stay. Maps do not change: of the same points it is what it was before the fence.
    fn live_of(
        self,
        repository: &Repository,
        reader: &ChunkReader<'_>,
        kept: &[&PointRecord],
        mark: &Mark,
        monitor: &dyn Monitor,
    ) -> Result<Live> {
        let ids: HashSet<PointId> = kept.iter().map(|record| record.id).collect();
        let dropped = mark.points.iter().copied().collect();
        let was: HashSet<PointId> = kept_records(self.catalog, &dropped).map(|record| record.id).collect();
        if was == ids {
            return Ok(self.live);
        }
        // not both of them in memory
        drop(self.live);
        Live::of(repository, reader, kept.iter().copied(), monitor)
    }
}

/// Steps 3 to 5: returns what may be deleted now, and the bytes written.
fn rewrite_and_commit(
    repository: &Repository,
    session: Session,
    mark: &Mark,
    chosen: &Chosen,
    before: Before<'_>,
    monitor: &dyn Monitor,
) -> Result<(Sweep, u64)> {
    // what a prune misses that slept may be what another one, which has ended it, has moved
    let (sweep, bytes) = decide(repository, &session, mark, chosen, before, monitor)
        .map_err(|error| session.cause_of(error))?;
    let (packs, points, segments) = (sweep.packs.clone(), sweep.points.clone(), sweep.segments.clone());
    session.commit(&Outcome::Sweep { packs, points, segments })?;
    Ok((sweep, bytes))
}

/// Returns what is to be deleted, once nothing that stays is in it any more, and the bytes written anew.
fn decide(
    repository: &Repository,
    session: &Session,
    mark: &Mark,
    chosen: &Chosen,
    before: Before<'_>,
    monitor: &dyn Monitor,
) -> Result<(Sweep, u64)> {
    if !repository.breaks(Rule::Fence) && !repository.breaks(Rule::MarkBeforeFence) {
        repository.fence(session.id(), monitor)?;
    }
    let (fresh, view) = repository.refresh_and_look(monitor)?;
    let catalog = if repository.breaks(Rule::RecomputeLive) { before.catalog } else { &fresh };
    refuse_unreadable(catalog)?;
    // a point that was had back or held since the choice is not dropped
    let forgotten: HashSet<PointId> = droppable(repository, catalog).into_iter().collect();
    let points: Vec<PointId> = mark.points.iter().filter(|id| forgotten.contains(id)).copied().collect();
    let dropped: HashSet<PointId> = points.iter().copied().collect();
    let mut kept: Vec<&PointRecord> = kept_records(catalog, &dropped).collect();
    kept.sort_by_key(|record| (record.time_ms, record.id));
    let _sparing = repository.spare_memory();
    let reader = ChunkReader::sparing(repository, &view);
    // a point that was made, and lost its outcome, since the choice
    let segments = before.segments;
    refuse_lost(segments, catalog, &reader, monitor)?;
    let live = before.live_of(repository, &reader, &kept, mark, monitor)?;
    let marked: HashSet<PackId> = mark.packs.iter().copied().collect();
    let scope = rewrite::Scope {
        segments,
        catalog,
        view: &view,
        kept: &kept,
        marked: &marked,
        dropped: &dropped,
        merged: &chosen.merge,
    };
    let rewritten = rewrite::rewrite(repository, &reader, session, &scope, live, chosen, monitor)?;
    monitor.check()?;
    let id = session.id();
    let sweep = Sweep { session: id, packs: mark.packs.clone(), points, segments: rewritten.replaced };
    if repository.breaks(Rule::DecideBeforeSweep) {
        sweep::carry_out(repository, &sweep, monitor)?;
    }
    Ok((sweep, rewritten.bytes))
}

#[cfg(test)]
mod tests;

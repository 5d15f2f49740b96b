//! Verifying: every object is what it should be, and every point has all that it needs.
//!
//! * structure: listings, outcomes, segments and manifests; every chunk that a point names has a place in a
//!   pack that is there and not recorded as damaged, and every node two
//! * packs: besides, every pack that a segment lists which counts is read, and its bytes are those that its name promises
//! * data: besides, every chunk in it has the content that its id promises
//! * restore: besides, every disk of the points is restored into a hash
//!
//! What is found can be recorded: then writers treat damaged chunks as absent, and the next backup that meets their
//! content heals the points that need them. Nothing is ever deleted.
//!
//! A pack that no such segment lists is counted and not read. It is the work of a session that runs, or what a killed one
//! left and a prune deletes: no point needs it. If it is what a lost segment listed, points miss its chunks: those are read
//! and the pack is named, for `repair index` to list it again.

mod packs;
mod points;
mod record;
mod restored;
pub mod sample;
mod small;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashSet};

use serde::Serialize;

use self::points::Sound;
use self::sample::{Sample, choose};
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::format::limits::SEGMENT_TARGET_CHUNKS;
use crate::format::name::{Folder, ObjectName};
use crate::format::node::ChunkKind;
use crate::format::segment::Segment;
use crate::format::session::{SampleScope, VerifiedLevel};
use crate::id::{ChunkId, PackId, PointId, SegmentId};
use crate::index::{Location, locate};
use crate::monitor::Monitor;
use crate::ops::{Finding, lost_points};
use crate::repo::catalog::Ended;
use crate::repo::reader::ChunkReader;
use crate::repo::segments::SegmentCache;
use crate::repo::view::View;
use crate::repo::{Catalog, PointEntry, Repository};

pub use self::restored::RestoredHash;

/// A verify that a prune has overtaken is begun again, this often.
const MAX_ATTEMPTS: u32 = 3;

/// How much is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum VerifyLevel {
    Structure,
    Packs,
    #[default]
    Data,
    Restore,
}

impl From<VerifyLevel> for VerifiedLevel {
    fn from(level: VerifyLevel) -> Self {
        match level {
            VerifyLevel::Structure => Self::Structure,
            VerifyLevel::Packs => Self::Packs,
            VerifyLevel::Data => Self::Data,
            VerifyLevel::Restore => Self::Restore,
        }
    }
}

/// What to verify.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VerifyOptions {
    pub level: VerifyLevel,
    /// Only what these points need; empty: everything.
    pub points: Vec<PointId>,
    /// Leave out points that a verify of this level found sound at or after this time, milliseconds since 1970.
    pub older_than_ms: Option<i64>,
    /// Read only some of the packs, other ones each time.
    pub sample: Option<Sample>,
    /// Put damage records, and what was found out.
    pub record: bool,
}

/// What a sample covered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Sampled {
    pub packs: u64,
    /// Of so many.
    pub of_packs: u64,
    /// The last one in their order.
    pub cursor: Option<PackId>,
}

/// What was verified and found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    pub findings: Vec<Finding>,
    pub points: u64,
    /// Points that were left out because they were verified lately.
    pub skipped_points: u64,
    /// Points that a restore would not give back in full.
    pub damaged_points: Vec<PointId>,
    pub packs: u64,
    /// Chunks whose content was checked, or with [`VerifyLevel::Structure`] whose place was.
    pub chunks: u64,
    /// Bytes of packs that were read.
    pub bytes: u64,
    /// Packs that no segment lists which counts, and their bytes: not read. Counted where everything is looked at.
    pub unlisted_packs: u64,
    pub unlisted_bytes: u64,
    pub sample: Option<Sampled>,
    /// With [`VerifyLevel::Restore`]: every disk that was restored.
    pub restored: Vec<RestoredHash>,
    /// Damage records that were put.
    pub recorded: u64,
}

/// What was found to be bad; both kinds together say whether a place of a chunk is good.
#[derive(Debug, Default)]
struct Bad {
    packs: HashSet<PackId>,
    chunks: HashSet<(PackId, ChunkId)>,
    /// Packs that segments list which count.
    listed: HashSet<PackId>,
    /// Packs that were read: what was recorded of them before does not matter.
    read: HashSet<PackId>,
}

impl Bad {
    /// Returns true if a place of a chunk is in a pack that is listed, and not bad.
    fn spares(&self, view: &View, kind: ChunkKind, id: ChunkId, place: &Location) -> bool {
        place.kind == kind && self.listed.contains(&place.pack) && !self.has(view, place.pack, id)
    }

    fn has(&self, view: &View, pack: PackId, chunk: ChunkId) -> bool {
        let found = self.packs.contains(&pack) || self.chunks.contains(&(pack, chunk));
        found || (!self.read.contains(&pack) && view.is_condemned(pack, &chunk))
    }
}

/// Findings by the name of their object, so that one object is named once.
#[derive(Debug, Default)]
struct Findings(BTreeMap<String, Finding>);

impl Findings {
    fn at(&mut self, object: String, problem: &str) -> &mut Finding {
        // an error names its object, too
        let rest = problem.strip_prefix(&object).and_then(|rest| rest.strip_prefix(": "));
        let problem = rest.unwrap_or(problem);
        self.0.entry(object.clone()).or_insert_with(|| Finding {
            object,
            problem: problem.to_owned(),
            pack: None,
            chunks: Vec::new(),
            affected: Vec::new(),
        })
    }

    fn at_pack(&mut self, pack: PackId, problem: &str) -> &mut Finding {
        let finding = self.at(ObjectName::Pack(pack).to_string(), problem);
        finding.pack = Some(pack);
        finding
    }
}

/// Verifies a repository. What is wrong with it are findings, not errors.
///
/// # Errors
/// [`Error::NotFound`] for a point that is none; a storage that fails for another reason than a bad object;
/// [`Error::Cancelled`].
pub fn verify(
    repository: &Repository,
    options: &VerifyOptions,
    monitor: &dyn Monitor,
) -> Result<VerifyReport> {
    let session = if options.record { record::begin(repository, monitor)? } else { None };
    let mut attempt = 1;
    let mut verified = loop {
        let before = repository.segments()?;
        let verified = verify_once(repository, options, monitor)?;
        let changed = !verified.report.findings.is_empty() && repository.segments()? != before;
        if !changed || attempt == MAX_ATTEMPTS {
            break verified;
        }
        attempt += 1;
        monitor.note("a prune or backup ended meanwhile: looking again at what seems to be missing");
    };
    if let Some(session) = session {
        match record::record(repository, session, options.level.into(), &mut verified) {
            // what was found is not lost for it
            Err(error) if !verified.report.findings.is_empty() && !matches!(error, Error::Cancelled) => {
                monitor.warn(&format!("the result is not recorded: {error}"));
            }
            recorded => recorded?,
        }
    }
    Ok(verified.report)
}

/// What was looked at and found.
struct Verified {
    report: VerifyReport,
    bad: Bad,
    view: View,
    points: Vec<PointId>,
    /// Whose points they are, if points were named: sorted.
    domains: Vec<String>,
    /// The place of the newest verify before this one in their order.
    newest_order: u64,
}

fn verify_once(repository: &Repository, options: &VerifyOptions, monitor: &dyn Monitor) -> Result<Verified> {
    let (catalog, view) = repository.refresh_to_read(monitor)?;
    // each is judged: one listing tells of all
    view.pack_lens()?;
    let all = chosen_points(&catalog, &options.points)?;
    let now_ms = (repository.environment().now_ms)();
    let is_due = |entry: &&PointEntry| is_due(&catalog, entry, options, now_ms);
    let points: Vec<&PointEntry> = all.iter().copied().filter(is_due).collect();
    let domains = sampled_domains(&all, options);
    let skipped_points = (all.len() - points.len()) as u64;
    let mut findings = Findings::default();
    let mut report = VerifyReport { points: points.len() as u64, skipped_points, ..VerifyReport::default() };
    for (name, problem) in catalog.problems() {
        findings.at(name.to_string(), problem);
    }
    for (name, problem) in repository.config_problems()? {
        findings.at(name.to_string(), &problem);
    }
    let wanted = wanted_packs(repository, &catalog, &view, &points, (options, &domains), &mut report)?;
    let (mut bad, mut sound) = (Bad::default(), Sound::default());
    let scope =
        Scope { repository, catalog: &catalog, view: &view, wanted: wanted.as_ref(), level: options.level };
    verify_segments(&scope, monitor, (&mut bad, &mut sound), &mut findings, &mut report)?;
    let reader = ChunkReader::new(repository, &view);
    if wanted.is_none() {
        check_folders(repository, &mut findings)?;
        for (_, len) in view.pack_lens()?.iter().filter(|(id, _)| !bad.listed.contains(id)) {
            report.unlisted_packs += 1;
            report.unlisted_bytes += len;
        }
        for lost in lost_points::find(&SegmentCache::passing(repository), &catalog, &reader, monitor)?.points
        {
            let name = ObjectName::Outcome(lost.record.id.into());
            let rest = if lost.is_complete {
                "; `vmkeep repair points` brings it back"
            } else {
                ", and parts of it too"
            };
            let problem = format!("the outcome of a point of {} is missing{rest}", lost.record.domain);
            let finding = findings.at(name.to_string(), &problem);
            for (disk, manifest) in points::maps(&lost.record) {
                if let Some(whole) = ByteRange::new(0, manifest.size) {
                    points::add_range(finding, lost.record.id, &lost.record.domain, disk, whole);
                }
            }
        }
    }
    points::verify_points(&scope, &reader, &points, (&bad, sound), monitor, &mut findings, &mut report)?;
    if options.level == VerifyLevel::Restore {
        restored::restore_points(&reader, &points, monitor, &mut findings, &mut report)?;
    }
    report.findings = findings.0.into_values().collect();
    let damaged: BTreeSet<PointId> =
        report.findings.iter().flat_map(|finding| &finding.affected).map(|affected| affected.point).collect();
    report.damaged_points = damaged.into_iter().collect();
    crate::ops::repaired::tell_healed(&points, &mut report);
    let points = points.iter().map(|entry| entry.record.id).collect();
    let newest_order = catalog.verified().last().map_or(0, |newest| newest.order);
    Ok(Verified { report, bad, view, points, domains, newest_order })
}

/// Returns true unless a verify of this level has found the point sound lately enough. One that by this clock is yet to come
/// proves nothing.
fn is_due(catalog: &Catalog, entry: &PointEntry, options: &VerifyOptions, now_ms: i64) -> bool {
    let Some(older_than_ms) = options.older_than_ms else { return true };
    let state = catalog.verified_state(entry.record.id, options.level.into());
    !state.is_some_and(|state| state.sound && (older_than_ms..=now_ms).contains(&state.time_ms))
}

/// Returns the domains of the points that were named, sorted.
fn sampled_domains(points: &[&PointEntry], options: &VerifyOptions) -> Vec<String> {
    if options.points.is_empty() {
        return Vec::new();
    }
    let domains: BTreeSet<&String> = points.iter().map(|entry| &entry.record.domain).collect();
    domains.into_iter().cloned().collect()
}

/// Returns the packs to read; `None`: all of them.
fn wanted_packs(
    repository: &Repository,
    catalog: &Catalog,
    view: &View,
    points: &[&PointEntry],
    (options, domains): (&VerifyOptions, &[String]),
    report: &mut VerifyReport,
) -> Result<Option<HashSet<PackId>>> {
    let everything = options.points.is_empty() && report.skipped_points == 0;
    let needed = if everything { None } else { Some(points::needed_packs(repository, view, points)?) };
    let Some(sample) = options.sample else { return Ok(needed) };
    let is_needed = |id: &PackId| needed.as_ref().is_none_or(|needed| needed.contains(id));
    let packs: Vec<(PackId, u64)> = view.pack_lens()?.into_iter().filter(|(id, _)| is_needed(id)).collect();
    let of_packs = packs.len() as u64;
    // each scope has a cursor of its own: the packs of one are not those of another
    let is_same = |scope: &SampleScope| scope.level == options.level.into() && scope.domains == domains;
    let last = catalog.verified().iter().rev().find(|verified| verified.scope.as_ref().is_some_and(is_same));
    let cursor = last.and_then(|verified| verified.record.cursor);
    let chosen = choose(packs, sample, cursor);
    report.sample =
        Some(Sampled { packs: chosen.len() as u64, of_packs, cursor: chosen.last().copied().or(cursor) });
    Ok(Some(chosen.into_iter().collect()))
}

/// What is looked at.
struct Scope<'a> {
    repository: &'a Repository,
    catalog: &'a Catalog,
    view: &'a View,
    wanted: Option<&'a HashSet<PackId>>,
    level: VerifyLevel,
}

/// Checks every segment that counts, and reads packs of several segments together: few of them would not keep all
/// cores busy to their end.
fn verify_segments(
    scope: &Scope<'_>,
    monitor: &dyn Monitor,
    (bad, sound): (&mut Bad, &mut Sound),
    findings: &mut Findings,
    report: &mut VerifyReport,
) -> Result<()> {
    let mut group: Vec<Segment> = Vec::new();
    for id in scope.repository.segments()? {
        monitor.check()?;
        let Some(segment) = load_counted(scope, id, findings)? else { continue };
        check_pack_list(&segment, scope, bad, findings, report)?;
        if scope.level < VerifyLevel::Packs {
            sound.note_segment(&segment, scope.view, bad);
            continue;
        }
        group.push(segment);
        if group.iter().map(|segment| segment.chunks.len()).sum::<usize>() >= SEGMENT_TARGET_CHUNKS {
            judge_packs(scope, &mut group, monitor, (bad, sound), findings, report)?;
        }
    }
    judge_packs(scope, &mut group, monitor, (bad, sound), findings, report)?;
    if !bad.packs.is_empty() || !bad.chunks.is_empty() {
        // a later segment may have shown something about a pack that an earlier one lists too
        *sound = Sound::default();
    }
    Ok(())
}

/// Reads the packs of these segments, and notes what of them is in order. They are gone then.
fn judge_packs(
    scope: &Scope<'_>,
    group: &mut Vec<Segment>,
    monitor: &dyn Monitor,
    (bad, sound): (&mut Bad, &mut Sound),
    findings: &mut Findings,
    report: &mut VerifyReport,
) -> Result<()> {
    packs::verify_packs(scope, group, monitor, bad, findings, report)?;
    group.drain(..).for_each(|segment| sound.note_segment(&segment, scope.view, bad));
    Ok(())
}

/// Returns a segment if it is there, whole, and its owner has committed.
fn load_counted(scope: &Scope<'_>, id: SegmentId, findings: &mut Findings) -> Result<Option<Segment>> {
    match scope.repository.load_segment(id) {
        Ok(segment) if scope.catalog.ended(segment.owner) == Some(Ended::Committed) => Ok(Some(segment)),
        // deleted by a prune since it was listed
        Ok(_) | Err(Error::NotFound { .. }) => Ok(None),
        Err(error) if scope.repository.is_of_object(&error) => {
            findings.at(ObjectName::Segment(id).to_string(), &error.cause());
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn chosen_points<'a>(catalog: &'a Catalog, wanted: &[PointId]) -> Result<Vec<&'a PointEntry>> {
    if wanted.is_empty() {
        return Ok(catalog.points().iter().collect());
    }
    wanted
        .iter()
        .map(|id| catalog.point(*id).ok_or_else(|| Error::NotFound { object: format!("point {id}") }))
        .collect()
}

/// Checks that the packs of a segment are there, at their lengths.
fn check_pack_list(
    segment: &Segment,
    scope: &Scope<'_>,
    bad: &mut Bad,
    findings: &mut Findings,
    report: &mut VerifyReport,
) -> Result<()> {
    for (no, pack) in segment.packs.iter().enumerate() {
        bad.listed.insert(pack.id);
        let len = scope.view.pack_len(pack.id)?;
        // one that is missing is in no sample, and is noticed all the same
        if len.is_some() && scope.wanted.is_some_and(|wanted| !wanted.contains(&pack.id)) {
            continue;
        }
        report.packs += u64::from(!bad.read.contains(&pack.id));
        match len {
            None => {
                findings.at_pack(pack.id, "the pack is missing");
                bad.packs.insert(pack.id);
            }
            Some(len) if len != pack.stored_len => {
                let problem = format!("the pack has {len} bytes, its segment says {}", pack.stored_len);
                findings.at_pack(pack.id, &problem);
                bad.chunks.extend(cut_off(segment, no, len));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Returns the chunks that stood behind the end of a pack which has only `len` bytes.
fn cut_off(segment: &Segment, pack: usize, len: u64) -> impl Iterator<Item = (PackId, ChunkId)> {
    segment.chunks.iter().filter(move |chunk| chunk.pack as usize == pack).filter_map(move |chunk| {
        let place = locate(segment, chunk)?;
        (place.frame.end() > len).then_some((place.pack, chunk.id))
    })
}

/// Lists every folder, so that one that cannot be listed is noticed, and looks at objects that nothing else reads.
fn check_folders(repository: &Repository, findings: &mut Findings) -> Result<()> {
    for folder in Folder::ALL {
        match repository.storage().list(folder) {
            Ok(listed) => small::check(repository, &listed, findings)?,
            Err(Error::Cancelled) => return Err(Error::Cancelled),
            Err(error) => {
                findings.at(folder.as_str().to_owned(), &error.to_string());
            }
        }
    }
    Ok(())
}

//! Verifying: every object is what it should be, and every point has all that it needs.
//!
//! * structure: listings, outcomes, segments and manifests; every chunk that a point names has a place in a
//!   pack that is there, and every node two
//! * data: besides, every pack is read, its bytes are those its name promises, and every chunk in it has the
//!   content that its id promises

mod packs;
mod points;

use std::collections::{BTreeMap, HashSet};

use serde::Serialize;

use crate::error::{Error, Result};
use crate::format::name::{Folder, ObjectName};
use crate::format::segment::Segment;
use crate::id::{ChunkId, PackId, PointId};
use crate::monitor::Monitor;
use crate::ops::Finding;
use crate::repo::catalog::Ended;
use crate::repo::reader::ChunkReader;
use crate::repo::view::View;
use crate::repo::{Catalog, PointEntry, Repository};

/// How much is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum VerifyLevel {
    Structure,
    #[default]
    Data,
}

/// What to verify.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VerifyOptions {
    pub level: VerifyLevel,
    /// Only what these points need; empty: everything.
    pub points: Vec<PointId>,
}

/// What was verified and found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    pub findings: Vec<Finding>,
    pub points: u64,
    pub packs: u64,
    /// Chunks whose content was checked, or with [`VerifyLevel::Structure`] whose place was.
    pub chunks: u64,
    /// Bytes of packs that were read.
    pub bytes: u64,
}

/// What is known to be bad; both kinds together say whether a place of a chunk is good.
#[derive(Debug, Default)]
struct Bad {
    packs: HashSet<PackId>,
    chunks: HashSet<(PackId, ChunkId)>,
}

impl Bad {
    fn has(&self, pack: PackId, chunk: ChunkId) -> bool {
        self.packs.contains(&pack) || self.chunks.contains(&(pack, chunk))
    }
}

/// Findings by the name of their object, so that one object is named once.
#[derive(Debug, Default)]
struct Findings(BTreeMap<String, Finding>);

impl Findings {
    fn at(&mut self, object: String, problem: &str) -> &mut Finding {
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

/// Verifies a repository, changing nothing. What is wrong with it are findings, not errors.
///
/// # Errors
/// [`Error::NotFound`] for a point that is none; a storage that fails for another reason than a bad object;
/// [`Error::Cancelled`].
pub fn verify(
    repository: &Repository,
    options: &VerifyOptions,
    monitor: &dyn Monitor,
) -> Result<VerifyReport> {
    let (catalog, view) = repository.refresh(monitor)?;
    let points = chosen_points(&catalog, &options.points)?;
    let mut findings = Findings::default();
    let mut report = VerifyReport { points: points.len() as u64, ..VerifyReport::default() };
    for (name, problem) in catalog.problems() {
        findings.at(name.to_string(), problem);
    }
    let mut bad = Bad::default();
    let wanted = if options.points.is_empty() {
        None
    } else {
        Some(points::needed_packs(repository, &view, &points)?)
    };
    for id in repository.segments()? {
        monitor.check()?;
        let name = ObjectName::Segment(id);
        let segment = match repository.load_segment(id) {
            Ok(segment) => segment,
            Err(error @ Error::Malformed { .. }) => {
                findings.at(name.to_string(), &error.to_string());
                continue;
            }
            // deleted by a prune since it was listed
            Err(Error::NotFound { .. }) => continue,
            Err(error) => return Err(error),
        };
        if catalog.ended(segment.owner) != Some(Ended::Committed) {
            continue;
        }
        check_pack_list(&segment, &view, wanted.as_ref(), &mut findings, &mut report);
        if options.level == VerifyLevel::Data {
            let scope = packs::Scope { segment: &segment, view: &view, wanted: wanted.as_ref() };
            packs::verify_packs(repository, &scope, monitor, &mut bad, &mut findings, &mut report)?;
        }
    }
    if wanted.is_none() {
        check_folders(repository, &mut findings)?;
    }
    let reader = ChunkReader::new(repository, &view);
    points::verify_points(repository, &reader, &points, &bad, monitor, &mut findings, &mut report)?;
    report.findings = findings.0.into_values().collect();
    Ok(report)
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
    view: &View,
    wanted: Option<&HashSet<PackId>>,
    findings: &mut Findings,
    report: &mut VerifyReport,
) {
    for pack in &segment.packs {
        if wanted.is_some_and(|wanted| !wanted.contains(&pack.id)) {
            continue;
        }
        report.packs += 1;
        match view.packs().get(&pack.id) {
            None => {
                findings.at_pack(pack.id, "the pack is missing");
            }
            Some(len) if *len != pack.stored_len => {
                let problem = format!("the pack has {len} bytes, its segment says {}", pack.stored_len);
                findings.at_pack(pack.id, &problem);
            }
            Some(_) => {}
        }
    }
}

/// Lists the folders that nothing else has listed, so that one that cannot be listed is noticed.
fn check_folders(repository: &Repository, findings: &mut Findings) -> Result<()> {
    for folder in Folder::ALL {
        match repository.storage().list(folder) {
            Ok(_) => {}
            Err(Error::Cancelled) => return Err(Error::Cancelled),
            Err(error) => {
                findings.at(folder.as_str().to_owned(), &error.to_string());
            }
        }
    }
    Ok(())
}

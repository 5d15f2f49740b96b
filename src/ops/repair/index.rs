//! Segments for packs that none lists, and the config.

use std::collections::HashSet;

use serde::Serialize;

use crate::chunk::read_pack_table;
use crate::error::{Error, FormatFault, Result};
use crate::format::limits::{MAX_PACK_LEN, SEGMENT_TARGET_CHUNKS};
use crate::format::name::ObjectName;
use crate::format::pack::{PACK_HEADER_LEN, PackHeader};
use crate::format::segment::{SegmentChunk, SegmentPack};
use crate::format::session::{Outcome, SessionKind};
use crate::id::PackId;
use crate::monitor::Monitor;
use crate::repo::Repository;
use crate::repo::catalog::Ended;
use crate::repo::session::Session;
use crate::repo::view::View;
use crate::repo::writer::put_segment;

/// What was repaired.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct IndexReport {
    /// Config, or its copy, that was missing or damaged and is put anew.
    pub configs: Vec<String>,
    /// Segments that cannot be read.
    pub unreadable_segments: u64,
    /// Packs that no segment listed and one lists now.
    pub packs: u64,
    pub chunks: u64,
    /// Packs that are damaged themselves, by name, and how.
    pub skipped: Vec<(String, String)>,
    pub dry_run: bool,
}

/// Puts the config or its copy where one is damaged or missing, and lists every whole pack that no segment that counts lists, in new segments. What sessions left that were killed is
/// listed too: it is content like any other, and a prune takes what nothing needs.
///
/// # Errors
/// [`Error::Malformed`] if config and copy are of two repositories; those of the storage; [`Error::Fenced`] by a prune.
pub fn repair_index(repository: &Repository, dry_run: bool, monitor: &dyn Monitor) -> Result<IndexReport> {
    // before anything is put in the name of a repository that may be another one
    let configs = repository.repair_config(dry_run)?.iter().map(ToString::to_string).collect();
    let session = if dry_run { None } else { Some(Session::begin(repository, SessionKind::Repair)?) };
    // packs before segments: those that come meanwhile have segments of their own
    let (catalog, view) = repository.refresh_and_look(monitor)?;
    let mut report = IndexReport { configs, dry_run, ..IndexReport::default() };
    let mut listed: HashSet<PackId> = HashSet::new();
    for id in repository.segments()? {
        match repository.load_segment(id) {
            Ok(segment) if catalog.ended(segment.owner) == Some(Ended::Committed) => {
                listed.extend(segment.packs.iter().map(|pack| pack.id));
            }
            Ok(_) | Err(Error::NotFound { .. }) => {}
            Err(error) if repository.is_of_object(&error) => report.unreadable_segments += 1,
            Err(error) => return Err(error),
        }
    }
    let missing = unlisted(&view, &listed)?;
    let task = monitor.start("packs", missing.iter().map(|(_, len)| len).sum());
    let mut batch = Batch::default();
    for (id, len) in missing {
        monitor.check()?;
        monitor.advance(task, len);
        match batch.take(repository, id) {
            Ok(chunks) => {
                report.packs += 1;
                report.chunks += chunks;
            }
            Err(error) if repository.is_of_object(&error) => {
                let (name, cause) = (ObjectName::Pack(id).to_string(), error.cause());
                let why =
                    cause.strip_prefix(&name).map_or(cause.as_str(), |rest| rest.trim_start_matches(": "));
                report.skipped.push((name, why.to_owned()));
            }
            // a prune has deleted it
            Err(Error::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        if batch.chunks.len() >= SEGMENT_TARGET_CHUNKS {
            batch.put(repository, session.as_ref())?;
        }
    }
    batch.put(repository, session.as_ref())?;
    monitor.finish(task);
    match session {
        Some(session) => session.commit(&Outcome::Done).map(|()| report),
        None => Ok(report),
    }
}

/// Returns the packs to list, and their lengths in bytes. One that a prune has marked is about to go, and one that has gone
/// needs no listing.
fn unlisted(view: &View, listed: &HashSet<PackId>) -> Result<Vec<(PackId, u64)>> {
    let marked = &view.marks().packs;
    let mut missing = view.pack_lens()?;
    missing.retain(|(id, _)| !listed.contains(id) && !marked.contains(id));
    missing.sort_unstable();
    Ok(missing)
}

/// Packs of the next segment.
#[derive(Default)]
struct Batch {
    packs: Vec<SegmentPack>,
    chunks: Vec<SegmentChunk>,
    number: u32,
}

impl Batch {
    /// Reads a pack as a whole: a segment is believed by writers, so the table must be the one that was written.
    fn take(&mut self, repository: &Repository, id: PackId) -> Result<u64> {
        let name = ObjectName::Pack(id);
        let bytes = repository.storage().get(name, MAX_PACK_LEN)?;
        if blake3::hash(&bytes).as_bytes() != id.as_bytes() {
            return Err(Error::malformed(name, FormatFault::Checksum));
        }
        let head = bytes.get(..PACK_HEADER_LEN).unwrap_or(&bytes);
        let header = PackHeader::decode(head).map_err(|fault| Error::malformed(name, fault))?;
        if header.repository != repository.id() {
            let (found, expected) = (header.repository.to_hex(), repository.id().to_hex());
            return Err(Error::malformed(name, FormatFault::ForeignRepository { found, expected }));
        }
        let len = bytes.len() as u64;
        let mut read = |offset: u64, len: u64| {
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            let end = start.saturating_add(usize::try_from(len).unwrap_or(usize::MAX));
            let fault = FormatFault::Truncated { found: bytes.len() as u64, needed: end as u64 };
            bytes.get(start..end).map(<[u8]>::to_vec).ok_or_else(|| Error::malformed(name, fault))
        };
        let table = read_pack_table(id, len, &mut read)?;
        let number = u32::try_from(self.packs.len()).unwrap_or(u32::MAX);
        self.chunks.extend(table.chunks.iter().map(|chunk| SegmentChunk::in_pack(chunk, number)));
        self.packs.push(SegmentPack { id, kind: header.kind, stored_len: len, frames: table.frames });
        Ok(table.chunks.len() as u64)
    }

    fn put(&mut self, repository: &Repository, session: Option<&Session>) -> Result<()> {
        let (packs, chunks) = (std::mem::take(&mut self.packs), std::mem::take(&mut self.chunks));
        let Some(session) = session.filter(|_| !packs.is_empty()) else { return Ok(()) };
        put_segment(repository, session.id(), self.number, packs, chunks)?;
        self.number += 1;
        Ok(())
    }
}

//! Reading packs whole: bytes against the name, chunks against their ids.

use std::sync::Mutex;

use rayon::iter::{IntoParallelRefIterator, ParallelIterator};

use super::{Bad, Findings, Scope, VerifyLevel, VerifyReport};
use crate::chunk;
use crate::error::{Error, Result};
use crate::format::limits::MAX_PACK_LEN;
use crate::format::name::ObjectName;
use crate::format::pack::FrameEntry;
use crate::format::segment::{Segment, SegmentChunk, SegmentPack};
use crate::format::session::OUTSIDE_CHUNKS;
use crate::id::{ChunkId, PackId};
use crate::monitor::Monitor;

/// What reading one pack gave.
#[derive(Debug, Default)]
struct PackVerdict {
    problem: Option<String>,
    /// Nothing of it can be read, or it was not looked at chunk by chunk.
    all_bad: bool,
    bad_chunks: Vec<ChunkId>,
    chunks: u64,
    bytes: u64,
}

/// Reads every pack of a segment that is there, unless it was read before; several at once, each in one sweep.
pub(super) fn verify_packs(
    scope: &Scope<'_>,
    segment: &Segment,
    monitor: &dyn Monitor,
    bad: &mut Bad,
    findings: &mut Findings,
    report: &mut VerifyReport,
) -> Result<()> {
    let jobs: Vec<(usize, &SegmentPack)> = segment
        .packs
        .iter()
        .enumerate()
        .filter(|(_, pack)| scope.view.packs().contains_key(&pack.id))
        .filter(|(_, pack)| scope.wanted.is_none_or(|wanted| wanted.contains(&pack.id)))
        .collect();
    let total = jobs.iter().map(|(_, pack)| pack.stored_len).sum();
    let task = monitor.start("packs", total);
    let mut by_pack: Vec<Vec<&SegmentChunk>> = vec![Vec::new(); segment.packs.len()];
    for chunk in &segment.chunks {
        if let Some(list) = by_pack.get_mut(chunk.pack as usize) {
            list.push(chunk);
        }
    }
    let verdicts: Mutex<Vec<(PackId, PackVerdict)>> = Mutex::new(Vec::new());
    jobs.par_iter().try_for_each(|(number, pack)| {
        monitor.check()?;
        let chunks = by_pack.get(*number).map(Vec::as_slice).unwrap_or_default();
        let verdict = verify_pack(scope, pack, chunks)?;
        monitor.advance(task, verdict.bytes);
        if let Ok(mut list) = verdicts.lock() {
            list.push((pack.id, verdict));
        }
        Ok::<(), Error>(())
    })?;
    monitor.finish(task);
    for (pack, verdict) in verdicts.into_inner().unwrap_or_default() {
        report.chunks += verdict.chunks;
        report.bytes += verdict.bytes;
        bad.read.insert(pack);
        if let Some(problem) = verdict.problem {
            findings.at_pack(pack, &problem).chunks.extend(&verdict.bad_chunks);
            if verdict.all_bad {
                bad.packs.insert(pack);
            }
            if verdict.bad_chunks.is_empty() {
                bad.chunks.insert((pack, OUTSIDE_CHUNKS));
            }
            bad.chunks.extend(verdict.bad_chunks.into_iter().map(|chunk| (pack, chunk)));
        }
    }
    Ok(())
}

fn verify_pack(scope: &Scope<'_>, pack: &SegmentPack, chunks: &[&SegmentChunk]) -> Result<PackVerdict> {
    let repository = scope.repository;
    let name = ObjectName::Pack(pack.id);
    let mut verdict = PackVerdict::default();
    let bytes = match repository.storage().get(name, MAX_PACK_LEN) {
        Ok(bytes) => bytes,
        Err(Error::Cancelled) => return Err(Error::Cancelled),
        // one pack that cannot be read is damage; a storage that cannot be reached is not
        Err(error @ Error::Io { .. }) if !repository.is_reachable() => {
            return Err(error);
        }
        // nor is what this process may not do, or has no room for
        Err(error) if error.is_local() => return Err(error),
        Err(error) => {
            verdict.problem = Some(describe(&error));
            verdict.all_bad = true;
            verdict.bad_chunks = chunks.iter().map(|chunk| chunk.id).collect();
            return Ok(verdict);
        }
    };
    verdict.bytes = bytes.len() as u64;
    if blake3::hash(&bytes).as_bytes() != pack.id.as_bytes() {
        verdict.problem = Some("its bytes are not those that its name promises".into());
    }
    if scope.level == VerifyLevel::Packs {
        verdict.all_bad = verdict.problem.is_some();
        if verdict.all_bad {
            verdict.bad_chunks = chunks.iter().map(|chunk| chunk.id).collect();
        }
        return Ok(verdict);
    }
    let mut in_order: Vec<&&SegmentChunk> = chunks.iter().collect();
    in_order.sort_unstable_by_key(|chunk| (chunk.frame, chunk.offset));
    let mut open: Option<(u32, Option<Vec<u8>>)> = None;
    for chunk in in_order {
        if open.as_ref().is_none_or(|(frame, _)| *frame != chunk.frame) {
            let entry = pack.frames.get(chunk.frame as usize);
            open = Some((chunk.frame, entry.and_then(|entry| open_frame(&bytes, entry))));
        }
        let start = chunk.offset as usize;
        let content = open
            .as_ref()
            .and_then(|(_, plain)| plain.as_ref())
            .and_then(|plain| plain.get(start..start + chunk.len as usize));
        verdict.chunks += 1;
        if content.is_none_or(|content| repository.hasher().chunk_id(chunk.kind, content) != chunk.id) {
            verdict.bad_chunks.push(chunk.id);
        }
    }
    if !verdict.bad_chunks.is_empty() {
        let count = verdict.bad_chunks.len();
        let why = verdict.problem.take().unwrap_or_else(|| "its segment does not fit its content".into());
        verdict.problem = Some(format!("{why}; {count} of {} chunks are bad", chunks.len()));
    }
    Ok(verdict)
}

fn open_frame(pack: &[u8], entry: &FrameEntry) -> Option<Vec<u8>> {
    let start = entry.offset as usize;
    let end = usize::try_from(entry.end()).ok()?;
    chunk::open_frame(pack.get(start..end)?, entry).ok()
}

fn describe(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

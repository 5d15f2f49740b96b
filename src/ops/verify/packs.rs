//! Reading packs whole: bytes against the name, chunks against their ids.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::iter::{IntoParallelIterator, ParallelIterator};

use super::{Bad, Findings, Scope, VerifyLevel, VerifyReport};
use crate::chunk::{self, Plaintext};
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

/// A pack to read, and what its segment says is in it.
struct Job<'a> {
    pack: &'a SegmentPack,
    chunks: Vec<&'a SegmentChunk>,
}

/// Returns the wanted packs of segments that are there.
fn jobs_of<'a>(scope: &Scope<'_>, segments: &'a [Segment]) -> Vec<Job<'a>> {
    let mut jobs = Vec::new();
    for segment in segments {
        let mut by_pack: Vec<Vec<&SegmentChunk>> = vec![Vec::new(); segment.packs.len()];
        for chunk in &segment.chunks {
            if let Some(list) = by_pack.get_mut(chunk.pack as usize) {
                list.push(chunk);
            }
        }
        let packs = segment.packs.iter().zip(by_pack).filter(|(pack, _)| {
            scope.view.has_pack(pack.id) && scope.wanted.is_none_or(|wanted| wanted.contains(&pack.id))
        });
        jobs.extend(packs.map(|(pack, chunks)| Job { pack, chunks }));
    }
    jobs
}

/// Reads every wanted pack of some segments that is there; several at once, each in one sweep.
pub(super) fn verify_packs(
    scope: &Scope<'_>,
    segments: &[Segment],
    monitor: &dyn Monitor,
    bad: &mut Bad,
    findings: &mut Findings,
    report: &mut VerifyReport,
) -> Result<()> {
    if segments.is_empty() {
        return Ok(());
    }
    let jobs = jobs_of(scope, segments);
    let total = jobs.iter().map(|job| job.pack.stored_len).sum();
    let task = monitor.start("packs", total);
    let verdicts: Mutex<Vec<(PackId, PackVerdict)>> = Mutex::new(Vec::new());
    let spare: Mutex<Vec<Memory>> = Mutex::default();
    let jobs_ahead = Ahead { jobs: &jobs, next: AtomicUsize::new(0) };
    (0..jobs.len()).into_par_iter().try_for_each(|_| {
        monitor.check()?;
        let Some(Job { pack, chunks }) = jobs_ahead.take(scope) else { return Ok(()) };
        let mut memory = spare.lock().ok().and_then(|mut spare| spare.pop()).unwrap_or_default();
        let verdict = verify_pack(scope, pack, chunks, &mut memory)?;
        monitor.advance(task, verdict.bytes);
        if let Ok(mut spare) = spare.lock() {
            spare.push(memory);
        }
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

/// What a worker uses again from pack to pack: new memory has to be cleared by the system first.
#[derive(Default)]
struct Memory {
    pack: Vec<u8>,
    frame: Vec<u8>,
}

/// Hands packs out in order, and has the storage fetch the one after the next meanwhile.
struct Ahead<'a> {
    jobs: &'a [Job<'a>],
    next: AtomicUsize,
}

impl<'a> Ahead<'a> {
    fn take(&self, scope: &Scope<'_>) -> Option<&'a Job<'a>> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let coming = self.jobs.get(number + rayon::current_num_threads());
        if let Some(Job { pack, .. }) = coming {
            scope.repository.storage().prefetch(ObjectName::Pack(pack.id), 0, pack.stored_len);
        }
        self.jobs.get(number)
    }
}

fn verify_pack(
    scope: &Scope<'_>,
    pack: &SegmentPack,
    chunks: &[&SegmentChunk],
    memory: &mut Memory,
) -> Result<PackVerdict> {
    let repository = scope.repository;
    let name = ObjectName::Pack(pack.id);
    let mut verdict = PackVerdict::default();
    let Memory { pack: bytes, frame: plain } = memory;
    match repository.storage().get_into(name, MAX_PACK_LEN, bytes) {
        Ok(()) => {}
        Err(Error::Cancelled) => return Err(Error::Cancelled),
        Err(error) if error.is_io() && !repository.is_of_object(&error) => return Err(error),
        Err(error) => {
            verdict.problem = Some(error.cause());
            verdict.all_bad = true;
            verdict.bad_chunks = chunks.iter().map(|chunk| chunk.id).collect();
            return Ok(verdict);
        }
    }
    verdict.bytes = bytes.len() as u64;
    if blake3::hash(bytes).as_bytes() != pack.id.as_bytes() {
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
    // the frame that was opened last, and where its plaintext stands if it could be
    let mut open: Option<(u32, Option<InPack>)> = None;
    for chunk in in_order {
        if open.is_none_or(|(frame, _)| frame != chunk.frame) {
            let opened =
                pack.frames.get(chunk.frame as usize).and_then(|entry| open_frame(bytes, entry, plain));
            open = Some((chunk.frame, opened));
        }
        let start = chunk.offset as usize;
        let frame = match open.and_then(|(_, place)| place) {
            Some(InPack::Stored { start, end }) => bytes.get(start..end),
            Some(InPack::Unpacked) => Some(plain.as_slice()),
            None => None,
        };
        let content = frame.and_then(|frame| frame.get(start..start + chunk.len as usize));
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

/// Where the plaintext of a pack's frame stands.
#[derive(Clone, Copy)]
enum InPack {
    /// In the pack: bytes of it.
    Stored { start: usize, end: usize },
    /// In the memory for it.
    Unpacked,
}

/// Opens a frame of a pack, into `plain` if that has to be; `None` if that is not possible.
fn open_frame(pack: &[u8], entry: &FrameEntry, plain: &mut Vec<u8>) -> Option<InPack> {
    let start = entry.offset as usize;
    let end = usize::try_from(entry.end()).ok()?;
    match chunk::open_frame_into(pack.get(start..end)?, entry, plain).ok()? {
        Plaintext::Stored(front) => Some(InPack::Stored { start: start + front, end }),
        Plaintext::Unpacked => Some(InPack::Unpacked),
    }
}

//! Chunks without a good copy: salvaged from wherever their content still is, and stored anew.

use serde::Serialize;

use super::lacking::{self, Lacking};
use crate::buffer::Payload;
use crate::chunk::Salvage;
use crate::error::{Error, Result};
use crate::extent::{ByteRange, RangeSet};
use crate::format::limits::{MAX_CHUNK_LEN, MAX_PACK_LEN};
use crate::format::name::ObjectName;
use crate::format::node::ChunkKind;
use crate::format::point::PointRecord;
use crate::format::session::{Outcome, SessionKind};
use crate::id::{ChunkId, PackId, SessionId};
use crate::monitor::Monitor;
use crate::ops::backup::{ImageInput, open_image_input};
use crate::repo::Repository;
use crate::repo::reader::ChunkReader;
use crate::repo::session::Session;
use crate::repo::writer::{SessionWriter, write_session};
use crate::source::DiskSource;

/// What a round found may name more that is lacking: nodes below nodes.
const MAX_ROUNDS: u32 = 64;

/// Where to look beside the repository itself.
#[derive(Default)]
pub struct PacksOptions<'a> {
    /// A repository of the same key domain.
    pub from: Option<&'a Repository>,
    /// An image that has, or had, the content of a disk.
    pub from_disk: Option<ImageInput>,
    pub dry_run: bool,
}

/// What was repaired.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PacksReport {
    /// Chunks that points need and that had too few good copies.
    pub lacking: u64,
    /// Of them stored anew: from other copies in the repository, from damaged packs, from another repository, from an
    /// image.
    pub from_copies: u64,
    pub salvaged: u64,
    pub from_repository: u64,
    pub from_disk: u64,
    /// What is still lost.
    pub lost: u64,
    pub stored_bytes: u64,
    pub dry_run: bool,
}

impl PacksReport {
    fn recovered(&self) -> u64 {
        self.from_copies + self.salvaged + self.from_repository + self.from_disk
    }
}

/// Stores chunks anew that points need and that have too few good copies.
///
/// # Errors
/// [`Error::Refused`] for a repository of another key domain; those of the storages and of the image;
/// [`Error::Fenced`] by a prune.
pub fn repair_packs(
    repository: &Repository,
    options: &PacksOptions<'_>,
    monitor: &dyn Monitor,
) -> Result<PacksReport> {
    if let Some(other) = options.from
        && other.config().key_domain != repository.config().key_domain
    {
        return Err(Error::Refused {
            object: other.storage().url(),
            reason: "it names chunks by another key: the same content has other ids there".into(),
            hint: Some("only a copy of this repository can give chunks back".into()),
        });
    }
    let mut total = PacksReport { dry_run: options.dry_run, ..PacksReport::default() };
    for _ in 0..MAX_ROUNDS {
        let round = repair_round(repository, options, monitor)?;
        let recovered = round.recovered();
        total.lacking = total.lacking.max(total.recovered() + round.lacking);
        total.from_copies += round.from_copies;
        total.salvaged += round.salvaged;
        total.from_repository += round.from_repository;
        total.from_disk += round.from_disk;
        total.stored_bytes += round.stored_bytes;
        total.lost = round.lacking - recovered;
        if recovered == 0 || options.dry_run {
            break;
        }
    }
    Ok(total)
}

fn repair_round(
    repository: &Repository,
    options: &PacksOptions<'_>,
    monitor: &dyn Monitor,
) -> Result<PacksReport> {
    // a dry run puts nothing, so it need not be registered
    let session = match options.dry_run {
        true => None,
        false => Some(Session::begin(repository, SessionKind::Repair)?),
    };
    let owner = session.as_ref().map_or(SessionId::from_bytes([0; 16]), Session::id);
    let end = |session: Option<Session>| session.map_or(Ok(()), |session| session.commit(&Outcome::Done));
    let (catalog, view) = repository.refresh_and_look(monitor)?;
    let reader = ChunkReader::new(repository, &view);
    let records: Vec<&PointRecord> = catalog.points().iter().map(|entry| entry.record.as_ref()).collect();
    let task = monitor.start("points", 0);
    let mut lacking = lacking::find(repository, &reader, &records, monitor)?;
    monitor.finish(task);
    let mut report = PacksReport { lacking: lacking.chunks.len() as u64, ..PacksReport::default() };
    if lacking.chunks.is_empty() {
        return end(session).map(|()| report);
    }
    let ((), written) = write_session(repository, &reader, owner, |writer| {
        let mut recovery =
            Recovery { repository, lacking: &mut lacking, writer, monitor, dry_run: options.dry_run };
        report.from_copies = recovery.read_copies(&reader)?;
        report.salvaged = recovery.salvage(view.damaged_packs().collect())?;
        if let Some(other) = options.from {
            report.from_repository = recovery.ask_repository(other)?;
        }
        if let Some(input) = &options.from_disk {
            let (mut source, ..) = open_image_input(input, monitor)?;
            report.from_disk = recovery.read_image(source.as_mut())?;
        }
        Ok(())
    })?;
    report.stored_bytes = written.data_bytes + written.metadata_bytes;
    end(session)?;
    Ok(report)
}

/// Stores what is found and takes it off the list.
struct Recovery<'a, 'w> {
    repository: &'a Repository,
    lacking: &'a mut Lacking,
    writer: &'a mut SessionWriter<'w>,
    monitor: &'a dyn Monitor,
    dry_run: bool,
}

impl Recovery<'_, '_> {
    /// Takes content that is a chunk that lacks copies. Returns whether it is one.
    fn take(&mut self, kind: ChunkKind, id: ChunkId, content: &[u8]) -> Result<bool> {
        if self.repository.hasher().chunk_id(kind, content) != id || self.lacking.chunks.remove(&id).is_none()
        {
            return Ok(false);
        }
        if !self.dry_run {
            self.writer.copy(kind, id, content)?;
        }
        Ok(true)
    }

    fn wanted(&self) -> Vec<(ChunkId, ChunkKind)> {
        let mut wanted: Vec<_> = self.lacking.chunks.iter().map(|(id, lack)| (*id, lack.kind)).collect();
        wanted.sort_unstable_by_key(|(id, _)| *id);
        wanted
    }

    /// Copies that can be read although they were not good enough: condemned by mistake, or the only one of two.
    fn read_copies(&mut self, reader: &ChunkReader<'_>) -> Result<u64> {
        let mut found = 0;
        for (id, kind) in self.wanted() {
            self.monitor.check()?;
            let known = self.lacking.chunks.get(&id).and_then(|lack| lack.content.clone());
            let taken = match known {
                Some(content) => self.take(kind, id, &content)?,
                None => match reader.read(kind, id) {
                    Ok(content) => self.take(kind, id, &content)?,
                    Err(error) if error.is_damage() || matches!(error, Error::NotFound { .. }) => false,
                    Err(error) => return Err(error),
                },
            };
            found += u64::from(taken);
        }
        Ok(found)
    }

    fn ask_repository(&mut self, other: &Repository) -> Result<u64> {
        let (_, view) = other.refresh_to_read(self.monitor)?;
        let reader = ChunkReader::new(other, &view);
        // what a point record says is this repository's own
        self.read_copies(&reader)
    }

    /// Scans damaged packs for frames that still open.
    fn salvage(&mut self, mut packs: Vec<PackId>) -> Result<u64> {
        packs.sort_unstable();
        let mut found = 0;
        for pack in packs {
            self.monitor.check()?;
            if self.lacking.chunks.is_empty() {
                break;
            }
            let bytes = match self.repository.storage().get(ObjectName::Pack(pack), MAX_PACK_LEN) {
                Ok(bytes) => bytes,
                Err(Error::NotFound { .. } | Error::Malformed { .. } | Error::Io { .. }) => continue,
                Err(error) => return Err(error),
            };
            let mut salvage = Salvage::new(&bytes);
            for frame in &mut salvage {
                for (chunk, content) in frame.contents() {
                    let id = self.repository.hasher().chunk_id(chunk.kind, content);
                    found += u64::from(self.take(chunk.kind, id, content)?);
                }
            }
            if salvage.gave_up() {
                self.monitor.warn(&format!("{}: the scan for frames gave up", ObjectName::Pack(pack)));
            }
        }
        Ok(found)
    }

    /// Reads the places where the chunks stood on a disk.
    fn read_image(&mut self, source: &mut dyn DiskSource) -> Result<u64> {
        let size = source.size();
        let mut places: Vec<(ByteRange, ChunkId)> = Vec::new();
        for (id, lack) in &self.lacking.chunks {
            let inside = lack.places.iter().filter(|place| place.end() <= size);
            let plausible = inside.filter(|place| place.len() <= u64::from(MAX_CHUNK_LEN));
            places.extend(plausible.map(|place| (*place, *id)));
        }
        places.sort_unstable();
        let mut found = 0;
        for (place, id) in places {
            self.monitor.check()?;
            let content = read_range(source, place, self.monitor)?;
            found += u64::from(self.take(ChunkKind::Data, id, &content)?);
        }
        Ok(found)
    }
}

fn read_range(source: &mut dyn DiskSource, range: ByteRange, monitor: &dyn Monitor) -> Result<Vec<u8>> {
    let mut content = vec![0; usize::try_from(range.len()).unwrap_or(0)];
    let wanted: RangeSet = [range].into_iter().collect();
    source.read(&wanted, monitor, &mut |part, payload| {
        let start = usize::try_from(part.start() - range.start()).unwrap_or(usize::MAX);
        if let Payload::Data(bytes) = payload
            && let Some(to) = content.get_mut(start..start.saturating_add(bytes.len()))
        {
            to.copy_from_slice(&bytes);
        }
        Ok(())
    })?;
    Ok(content)
}

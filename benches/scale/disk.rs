//! A disk that holds here and there something that is nowhere twice, and a storage that does not keep all of it.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use vmkeep::buffer::Payload;
use vmkeep::error::{Error, Result};
use vmkeep::extent::{ByteRange, RangeSet};
use vmkeep::format::name::{Folder, ObjectName};
use vmkeep::format::pack::{PACK_FOOTER_LEN, PACK_HEADER_LEN, PackFooter, PackHeader, PackKind};
use vmkeep::id::PackId;
use vmkeep::monitor::Monitor;
use vmkeep::source::{DiskSource, READ_WINDOW};
use vmkeep::storage::{Listed, Storage};

use super::Random;

pub const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
/// What QEMU's bitmaps count in.
const GRANULE: u64 = 65536;
/// Runs of 1 GiB that later points write to.
const HOT_RUNS: u64 = 16;

/// Whether packs of data are kept with their content at this moment.
static KEEPS_CONTENT: AtomicBool = AtomicBool::new(true);

/// Keeps packs of data without their content, but where it is read again.
#[derive(Debug)]
pub struct Hollow {
    inner: Box<dyn Storage>,
    /// Length, what is kept of the end, by name.
    packs: Mutex<HashMap<PackId, (u64, PathBuf)>>,
    dir: PathBuf,
}

impl Hollow {
    pub fn open(inner: Box<dyn Storage>, dir: PathBuf) -> Self {
        let mut packs = HashMap::new();
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let mut len = [0; 8];
            std::fs::File::open(&path).unwrap().read_exact(&mut len).unwrap();
            let name = blake3::Hash::from_hex(path.file_name().unwrap().to_str().unwrap()).unwrap();
            let id = PackId::from_bytes(*name.as_bytes());
            packs.insert(id, (u64::from_le_bytes(len), path));
        }
        Self { inner, packs: Mutex::new(packs), dir }
    }

    fn kept(&self, name: ObjectName) -> Option<(u64, Vec<u8>)> {
        let ObjectName::Pack(id) = name else { return None };
        let (len, path) = self.packs.lock().unwrap().get(&id).cloned()?;
        Some((len, std::fs::read(path).unwrap().split_off(8)))
    }
}

impl Storage for Hollow {
    fn url(&self) -> String {
        self.inner.url()
    }

    fn put_filler(&self, name: ObjectName, len: u64, seed: [u8; 32]) -> Result<()> {
        self.inner.put_filler(name, len, seed)
    }

    fn put_new(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        let ObjectName::Pack(id) = name else { return self.inner.put_new(name, bytes) };
        let is_data = PackHeader::decode(&bytes[..PACK_HEADER_LEN]).unwrap().kind == PackKind::Data;
        if !is_data || KEEPS_CONTENT.load(Ordering::SeqCst) {
            return self.inner.put_new(name, bytes);
        }
        let footer = PackFooter::decode(&bytes[bytes.len() - PACK_FOOTER_LEN..], bytes.len() as u64).unwrap();
        let path = self.dir.join(id.to_hex());
        let (len, tail) = ((bytes.len() as u64).to_le_bytes(), &bytes[footer.table_offset as usize..]);
        std::fs::write(&path, [&len[..], &bytes[..PACK_HEADER_LEN], tail].concat()).unwrap();
        self.packs.lock().unwrap().insert(id, (bytes.len() as u64, path));
        Ok(())
    }

    fn replace(&self, name: ObjectName, bytes: &[u8]) -> Result<()> {
        self.inner.replace(name, bytes)
    }

    fn get(&self, name: ObjectName, max_len: u64) -> Result<Vec<u8>> {
        match self.kept(name) {
            Some((len, _)) => self.get_range(name, 0, len),
            None => self.inner.get(name, max_len),
        }
    }

    fn get_range(&self, name: ObjectName, offset: u64, len: u64) -> Result<Vec<u8>> {
        let Some((total, kept)) = self.kept(name) else { return self.inner.get_range(name, offset, len) };
        let (head, tail) = kept.split_at(PACK_HEADER_LEN);
        let hole = total as usize - kept.len();
        let byte = |at: usize| match at {
            at if at < head.len() => head[at],
            at => tail.get((at - head.len()).wrapping_sub(hole)).copied().unwrap_or(0),
        };
        Ok((offset as usize..(offset + len) as usize).map(byte).collect())
    }

    fn len(&self, name: ObjectName) -> Result<u64> {
        self.kept(name).map_or_else(|| self.inner.len(name), |(len, _)| Ok(len))
    }

    fn list(&self, folder: Folder) -> Result<Vec<Listed>> {
        let mut listed = self.inner.list(folder)?;
        if folder == Folder::Packs {
            let packs = self.packs.lock().unwrap();
            listed
                .extend(packs.iter().map(|(id, (len, _))| Listed { name: ObjectName::Pack(*id), len: *len }));
            listed.sort_unstable();
        }
        Ok(listed)
    }

    fn names(&self, folder: Folder) -> Result<Vec<ObjectName>> {
        match folder {
            Folder::Packs => Ok(self.list(folder)?.into_iter().map(|listed| listed.name).collect()),
            _ => self.inner.names(folder),
        }
    }

    fn delete(&self, name: ObjectName) -> Result<()> {
        if let ObjectName::Pack(id) = name
            && let Some((_, path)) = self.packs.lock().unwrap().remove(&id)
        {
            return std::fs::remove_file(&path).map_err(|error| Error::io("remove", path.display(), error));
        }
        self.inner.delete(name)
    }

    fn sync_deletes(&self, folder: Folder) -> Result<()> {
        self.inner.sync_deletes(folder)
    }
}

/// A disk that holds here and there something that is nowhere twice.
pub struct Sparse {
    /// Bytes.
    len: u64,
    data: RangeSet,
    /// What later points write to, in order.
    hot: Vec<ByteRange>,
    /// How often blocks were written again.
    versions: BTreeMap<u64, u64>,
    /// How often the first granule of every MiB was.
    rounds: u64,
    dirty: Option<RangeSet>,
    /// Bytes of one bit each; else nothing compresses it.
    pub is_thin: bool,
}

impl Sparse {
    /// A disk of which every 16th GiB holds data.
    pub fn new(gib: u64, len: u64) -> Self {
        let run = |n: u64| ByteRange::new(n * 16 * GIB, GIB).unwrap();
        let data = (0..gib).map(run).collect();
        let hot = (0..gib).filter(|n| is_hot(*n, gib)).map(run).collect();
        Self { len, data, hot, versions: BTreeMap::new(), rounds: 0, dirty: None, is_thin: false }
    }

    /// A disk with a block of data in every MiB, so that no node of its map is thin, and `full` of the MiB full: evenly apart,
    /// and what later points write to. Its content is thin.
    pub fn spread(full: u64, len: u64) -> Self {
        let hot: Vec<ByteRange> = (0..full).map(|n| ByteRange::new(len / full * n, MIB).unwrap()).collect();
        let blocks = (0..len / MIB).map(|n| ByteRange::new(n * MIB, BLOCK).unwrap());
        let mut data: Vec<ByteRange> = hot.iter().copied().chain(blocks).collect();
        data.sort_unstable();
        let data = data.into_iter().collect();
        Self { len, data, hot, versions: BTreeMap::new(), rounds: 0, dirty: None, is_thin: true }
    }

    /// Writes the first granule of every MiB.
    pub fn write_everywhere(&mut self) {
        self.rounds += 1;
        let starts = self.data.iter().flat_map(|run| (run.start()..run.end()).step_by(1 << 20));
        self.dirty = Some(starts.map(|start| ByteRange::new(start, GRANULE).unwrap()).collect());
    }

    /// Has the content of packs kept while they may hold what later points write to. What is put was read a while before.
    fn choose_what_is_kept(&self, position: u64) {
        // the next run begins 15 GiB behind the end of one
        let is_near = |run: &ByteRange| position < run.end() + 15 * GIB + GIB / 4;
        let before = self.hot.partition_point(|run| run.start() <= position);
        let last = before.checked_sub(1).and_then(|at| self.hot.get(at));
        KEEPS_CONTENT.store(last.is_some_and(is_near), Ordering::SeqCst);
    }

    /// Writes blocks of 4 KiB anywhere in the hot runs.
    pub fn write(&mut self, count: u64, random: &mut Random) {
        let mut dirty = Vec::new();
        for _ in 0..count {
            let run = self.hot[(random.next() % self.hot.len() as u64) as usize];
            let at = run.start() + random.next() % (run.len() / BLOCK) * BLOCK;
            *self.versions.entry(at / BLOCK).or_default() += 1;
            dirty.push(ByteRange::new(at / GRANULE * GRANULE, GRANULE).unwrap());
        }
        dirty.sort_unstable();
        self.dirty = Some(dirty.into_iter().collect());
    }

    fn fill(&self, range: ByteRange) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(range.len() as usize);
        for block in range.start() / BLOCK..range.end() / BLOCK {
            let mut version = self.versions.get(&block).copied().unwrap_or(0);
            if block % ((1 << 20) / BLOCK) < GRANULE / BLOCK {
                version += self.rounds;
            }
            let mut random = Random((block + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (version << 48));
            if self.is_thin {
                let words = (0..BLOCK / 64).flat_map(|_| random.next().to_le_bytes());
                words.for_each(|bits| bytes.extend_from_slice(&spread(bits).to_le_bytes()));
                continue;
            }
            for _ in 0..BLOCK / 8 {
                bytes.extend_from_slice(&random.next().to_le_bytes());
            }
        }
        bytes
    }
}

/// Returns true for a run of the data that later points write to: every 64th of 1024.
fn is_hot(run: u64, runs: u64) -> bool {
    let stride = (runs / HOT_RUNS).max(1);
    run % stride == stride - 1
}

/// Returns a byte for each bit, 0 or 1.
fn spread(bits: u8) -> u64 {
    let apart = (u64::from(bits) * 0x0101_0101_0101_0101) & 0x8040_2010_0804_0201;
    ((apart + 0x7f7f_7f7f_7f7f_7f7f) >> 7) & 0x0101_0101_0101_0101
}

impl DiskSource for Sparse {
    fn label(&self) -> String {
        "a sparse disk".into()
    }

    fn size(&self) -> u64 {
        self.len
    }

    fn dirty(&mut self, _monitor: &dyn Monitor) -> Result<Option<RangeSet>> {
        Ok(self.dirty.clone())
    }

    fn data(&mut self, within: &RangeSet, _monitor: &dyn Monitor) -> Result<RangeSet> {
        Ok(self.data.intersection(within))
    }

    fn read(
        &mut self,
        ranges: &RangeSet,
        _monitor: &dyn Monitor,
        sink: &mut dyn FnMut(ByteRange, Payload) -> Result<()>,
    ) -> Result<()> {
        for range in ranges.iter() {
            let mut start = range.start();
            while start < range.end() {
                let end = range.end().min((start / READ_WINDOW + 1) * READ_WINDOW);
                let part = ByteRange::between(start, end).unwrap();
                if self.dirty.is_none() {
                    self.choose_what_is_kept(start);
                }
                sink(part, Payload::Data(self.fill(part).into()))?;
                start = end;
            }
        }
        Ok(())
    }
}

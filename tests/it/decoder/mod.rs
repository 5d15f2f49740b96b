//! A second reader of the format, written from `repo-format.md` alone: std, BLAKE3 and zstd, and nothing of vmkeep.
//!
//! It restores a committed repository that vmkeep made. If the document leaves out a byte, this fails to read it; if
//! the library changes one, this still reads the old repository. `§` are sections of the document.

pub mod content;
mod fixture;
mod read;
mod tests;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};

use read::{Cursor, Fault, check, frame_plain, hex, u32_at, u64_at, unpack};

type Id = [u8; 32];
type Sid = [u8; 16];

/// Where a chunk stands.
#[derive(Clone)]
struct Place {
    pack: Id,
    kind: u8,
    frame_offset: usize,
    frame_stored_len: usize,
    frame_raw_len: usize,
    offset: usize,
    len: usize,
}

/// The map of a disk: §12.
struct Manifest {
    size: u64,
    height: u8,
    root: Option<Id>,
}

/// What a restore needs of a point: §13.
struct Point {
    id: Sid,
    domain: String,
    disks: Vec<(String, Manifest)>,
    files: Vec<(String, Manifest)>,
}

/// How a session ended: §14.
enum Outcome {
    Point(Point),
    Sweep,
    Done,
    Abort,
    Hold,
    Verified,
}

struct Repository {
    root: PathBuf,
    id: [u8; 16],
    id_key: [u8; 32],
    leaf_len: u64,
    fanout: u64,
    outcomes: BTreeMap<Sid, Outcome>,
    forgotten: HashSet<Sid>,
    places: HashMap<Id, Vec<Place>>,
}

/// Takes an object out of its envelope, §6; returns repository id and body.
fn envelope(bytes: &[u8], magic: &[u8; 8]) -> Result<([u8; 16], Vec<u8>), Fault> {
    check(bytes.len() >= 96, "an object is shorter than its envelope")?;
    check(bytes[..8] == magic[..], "another magic")?;
    check(bytes[8..10] == [1, 0], "another version")?;
    check(bytes[11..16] == [0; 5] && bytes[32..56] == [0; 24], "a seal, or a field that is not zero")?;
    let (raw_len, stored_len) = (u32_at(bytes, 56), u32_at(bytes, 60));
    check(raw_len <= 64 << 20 && bytes.len() == 96 + stored_len, "a length out of bounds")?;
    let (covered, hash) = bytes.split_at(bytes.len() - 32);
    check(blake3::hash(covered).as_bytes() == hash, "the hash of an envelope does not match")?;
    let mut repository = [0; 16];
    repository.copy_from_slice(&bytes[16..32]);
    Ok((repository, unpack(bytes[10], &covered[64..], raw_len)?))
}

impl Repository {
    /// Reads `config` or its copy, outcomes and tombstones: §7, §19 steps 1 and 2.
    fn open(root: &Path) -> Result<Self, Fault> {
        let read = |name| {
            let bytes = std::fs::read(root.join(name)).map_err(|error| error.to_string())?;
            envelope(&bytes, b"vmkpCONF")
        };
        let (envelope_id, body) = read("config").or_else(|fault| read("config.copy").map_err(|_| fault))?;
        let mut config = Cursor::new(&body);
        check(config.u16()? == 1, "another version")?;
        let id = config.array()?;
        check(id == envelope_id, "the two ids of config differ")?;
        let _key_domain: [u8; 16] = config.array()?;
        check(config.u64()? == 0, "a required feature")?;
        config.u64()?;
        let id_key = config.option(Cursor::array)?.ok_or("a sealed repository")?;
        config.u64()?;
        let _cutter: [u8; 13] = config.array()?;
        let (leaf_len, fanout) = (config.u64()?, u64::from(config.u32()?));
        let _advice: [u8; 4 + 8 + 4] = config.array()?;
        config.bool()?;
        config.end()?;
        let mut repository = Self {
            root: root.to_owned(),
            id,
            id_key,
            leaf_len,
            fanout,
            outcomes: BTreeMap::new(),
            forgotten: HashSet::new(),
            places: HashMap::new(),
        };
        repository.load_outcomes()?;
        repository.load_tombstones()?;
        Ok(repository)
    }

    /// Returns the files of a folder by their names.
    fn folder(&self, folder: &str) -> Result<Vec<(String, Vec<u8>)>, Fault> {
        let mut files = Vec::new();
        let failed = |error: std::io::Error| format!("{folder}: {error}");
        for entry in std::fs::read_dir(self.root.join(folder)).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            files.push((name, std::fs::read(&path).map_err(failed)?));
        }
        Ok(files)
    }

    fn own(&self, bytes: &[u8], magic: &[u8; 8]) -> Result<Vec<u8>, Fault> {
        let (repository, body) = envelope(bytes, magic)?;
        check(repository == self.id, "an object of another repository")?;
        Ok(body)
    }

    fn load_outcomes(&mut self) -> Result<(), Fault> {
        for (name, bytes) in self.folder("outcomes")? {
            let body = self.own(&bytes, b"vmkpOUTC")?;
            let (session, outcome) = (read::unhex(&name)?, outcome(&body)?);
            if let Outcome::Point(point) = &outcome {
                check(point.id == session, "the record of another point")?;
            }
            self.outcomes.insert(session, outcome);
        }
        Ok(())
    }

    fn is_committed(&self, session: &Sid) -> bool {
        matches!(self.outcomes.get(session), Some(Outcome::Point(_) | Outcome::Sweep | Outcome::Done))
    }

    /// §15: a tombstone counts if its session committed.
    fn load_tombstones(&mut self) -> Result<(), Fault> {
        for (name, bytes) in self.folder("forget")? {
            if self.is_committed(&read::unhex(&name)?) {
                let body = self.own(&bytes, b"vmkpTOMB")?;
                let points: Vec<Sid> = Cursor::new(&body).list(Cursor::array)?;
                self.forgotten.extend(points);
            }
        }
        Ok(())
    }

    /// Returns the points in order of their ids.
    fn points(&self) -> Vec<&Point> {
        let points = self.outcomes.values().filter_map(|outcome| match outcome {
            Outcome::Point(point) => Some(point),
            _ => None,
        });
        points.filter(|point| !self.forgotten.contains(&point.id)).collect()
    }

    /// Learns from the segments that count where chunks are: §11, §19 step 3.
    fn load_segments(&mut self) -> Result<(), Fault> {
        for (name, bytes) in self.folder("index")? {
            check(blake3::hash(&bytes).to_hex().as_str() == name, "a segment under a wrong name")?;
            let body = self.own(&bytes, b"vmkpSEGM")?;
            let mut cursor = Cursor::new(&body);
            let owner: Sid = cursor.array()?;
            cursor.u32()?;
            let packs = cursor.list(|cursor| {
                let id: Id = cursor.array()?;
                let _kind = cursor.u32()?;
                let _stored_len = cursor.u64()?;
                Ok((id, cursor.list(frame_entry)?))
            })?;
            let chunks = cursor.list(|cursor| {
                let (id, kind): (Id, u32) = (cursor.array()?, cursor.u32()?);
                let pack = packs.get(cursor.size()?).ok_or("no such pack")?;
                let place = place(cursor, pack.0, &pack.1, kind)?;
                Ok((id, place))
            })?;
            cursor.end()?;
            if self.is_committed(&owner) {
                self.add(chunks);
            }
        }
        Ok(())
    }

    fn add(&mut self, chunks: Vec<(Id, Place)>) {
        for (id, place) in chunks {
            self.places.entry(id).or_default().push(place);
        }
    }

    fn pack_path(&self, id: &Id) -> PathBuf {
        let name = hex(id);
        self.root.join("packs").join(&name[..2]).join(name)
    }

    fn packs(&self) -> Result<Vec<(Id, Vec<u8>)>, Fault> {
        let mut packs = Vec::new();
        for entry in std::fs::read_dir(self.root.join("packs")).map_err(|error| error.to_string())? {
            let directory = entry.map_err(|error| error.to_string())?.file_name();
            let files = self.folder(&format!("packs/{}", directory.to_string_lossy()))?;
            for (name, bytes) in files {
                check(blake3::hash(&bytes).to_hex().as_str() == name, "a pack under a wrong name")?;
                packs.push((read::unhex(&name)?, bytes));
            }
        }
        Ok(packs)
    }

    /// Learns from the tables of all packs where chunks are: §10, §19 step 5.
    fn load_pack_tables(&mut self) -> Result<(), Fault> {
        for (id, bytes) in self.packs()? {
            check(bytes.len() >= 128 && bytes[..10] == *b"vmkpPACK\x01\x00", "no pack")?;
            check(bytes[11..16] == [0; 5] && bytes[16..32] == self.id, "a pack of somebody else")?;
            let footer = &bytes[bytes.len() - 64..];
            check(footer[56..] == *b"vmkpTAIL" && footer[17..24] == [0; 7], "no footer")?;
            let (raw_len, stored_len) = (u32_at(footer, 8), u32_at(footer, 12));
            let start = u64_at(footer, 0) as usize;
            check(start + stored_len + 64 == bytes.len(), "a table out of place")?;
            let stored = &bytes[start..start + stored_len];
            check(blake3::hash(stored).as_bytes() == &footer[24..56], "the hash of a table does not match")?;
            let table = unpack(footer[16], stored, raw_len)?;
            let mut cursor = Cursor::new(&table);
            let frames = cursor.list(frame_entry)?;
            let chunks = cursor.list(|cursor| {
                let (chunk, kind): (Id, u32) = (cursor.array()?, cursor.u32()?);
                Ok((chunk, place(cursor, id, &frames, kind)?))
            })?;
            cursor.end()?;
            self.add(chunks);
        }
        Ok(())
    }

    /// Learns from the frames alone, as after the loss of all tables: §9.
    fn scan_packs(&mut self) -> Result<(), Fault> {
        for (pack, bytes) in self.packs()? {
            let mut at = 64;
            while bytes.get(at..at + 4) == Some(b"FRM1".as_slice()) {
                let (raw_len, stored_len) = (u32_at(&bytes, at + 8), u32_at(&bytes, at + 12));
                let plain = frame_plain(&bytes[at..at + 16 + stored_len], raw_len, stored_len)?;
                let count = u32_at(&plain, 0);
                let mut offset = 4 + 4 * count;
                for number in 0..count {
                    let word = u32_at(&plain, 4 + 4 * number);
                    let (kind, len) = ((word >> 24) as u8, word & 0xff_ffff);
                    let id = self.chunk_id(kind, &plain[offset..offset + len]);
                    let (frame_offset, frame_stored_len, frame_raw_len) = (at, stored_len, raw_len);
                    let place =
                        Place { pack, kind, frame_offset, frame_stored_len, frame_raw_len, offset, len };
                    self.places.entry(id).or_default().push(place);
                    offset += len;
                }
                check(offset == plain.len(), "chunks do not fill a frame")?;
                at += 16 + stored_len;
            }
        }
        Ok(())
    }

    /// §8
    fn chunk_id(&self, kind: u8, plain: &[u8]) -> Id {
        let mut hasher = blake3::Hasher::new_keyed(&self.id_key);
        hasher.update(&[kind]).update(plain);
        *hasher.finalize().as_bytes()
    }

    /// Returns a chunk: §19 step 4.
    fn chunk(&self, kind: u8, id: &Id) -> Result<Vec<u8>, Fault> {
        let mut last = format!("chunk {} is nowhere", hex(id));
        for place in self.places.get(id).into_iter().flatten().filter(|place| place.kind == kind) {
            match self.read_place(kind, id, place) {
                Ok(bytes) => return Ok(bytes),
                Err(fault) => last = fault,
            }
        }
        Err(last)
    }

    fn read_place(&self, kind: u8, id: &Id, place: &Place) -> Result<Vec<u8>, Fault> {
        let pack = std::fs::read(self.pack_path(&place.pack)).map_err(|error| error.to_string())?;
        let end = place.frame_offset + 16 + place.frame_stored_len;
        let frame = pack.get(place.frame_offset..end).ok_or("a frame beyond the end of its pack")?;
        let plain = frame_plain(frame, place.frame_raw_len, place.frame_stored_len)?;
        let bytes = plain.get(place.offset..place.offset + place.len).ok_or("a chunk beyond its frame")?;
        check(self.chunk_id(kind, bytes) == *id, "the content of a chunk is not what its id says")?;
        Ok(bytes.to_vec())
    }

    /// Restores a disk: §12.
    fn restore(&self, manifest: &Manifest) -> Result<Vec<u8>, Fault> {
        let mut height = 0;
        while self.leaf_len * self.fanout.pow(height) < manifest.size {
            height += 1;
        }
        check(u32::from(manifest.height) == height, "a tree of a wrong height")?;
        let mut disk = vec![0; manifest.size as usize];
        if let Some(root) = &manifest.root {
            self.restore_node(root, height, 0, &mut disk)?;
        }
        Ok(disk)
    }

    /// Restores what is below the node of a level and number.
    fn restore_node(&self, id: &Id, level: u32, number: u64, disk: &mut [u8]) -> Result<(), Fault> {
        let plain = self.chunk(1, id)?;
        let mut node = Cursor::new(&plain);
        let variant = node.u32()?;
        check((variant == 0) == (level == 0), "a node of another level")?;
        if variant == 0 {
            let start = (number * self.leaf_len) as usize;
            let end = disk.len().min(start + self.leaf_len as usize);
            let leaf = disk.get_mut(start..end).ok_or("a leaf beyond the end of the disk")?;
            return self.restore_leaf(node, leaf);
        }
        check(variant == 1 && u32::from(node.u8()?) == level, "a node of another level")?;
        let children = node.list(|cursor| Ok((cursor.u16()?, cursor.array()?)))?;
        node.end()?;
        check(!children.is_empty(), "an inner node without children")?;
        check(children.windows(2).all(|pair| pair[0].0 < pair[1].0), "slots out of order")?;
        for (slot, child) in children {
            check(u64::from(slot) < self.fanout, "a slot out of range")?;
            self.restore_node(&child, level - 1, number * self.fanout + u64::from(slot), disk)?;
        }
        Ok(())
    }

    fn restore_leaf(&self, mut node: Cursor<'_>, leaf: &mut [u8]) -> Result<(), Fault> {
        let count = node.u64()?;
        let mut at = 0;
        for _ in 0..count {
            let (variant, len) = (node.u32()?, node.size()?);
            let target = leaf.get_mut(at..at + len).filter(|target| !target.is_empty());
            let target = target.ok_or("entries that are empty or pass the end of their leaf")?;
            match variant {
                0 => {}
                1 => {
                    let (offset, id): (usize, Id) = (node.size()?, node.array()?);
                    let chunk = self.chunk(0, &id)?;
                    target.copy_from_slice(chunk.get(offset..offset + len).ok_or("beyond the chunk")?);
                }
                2 => return Err("an unreadable range".into()),
                _ => return Err("an unknown entry".into()),
            }
            at += len;
        }
        node.end()?;
        check(at == leaf.len(), "entries do not cover their leaf")
    }
}

/// A frame's offset, stored and raw length: §10.
fn frame_entry(cursor: &mut Cursor<'_>) -> Result<[usize; 3], Fault> {
    Ok([cursor.size()?, cursor.size()?, cursor.size()?])
}

/// The rest of a table's or segment's chunk, behind kind and pack.
fn place(cursor: &mut Cursor<'_>, pack: Id, frames: &[[usize; 3]], kind: u32) -> Result<Place, Fault> {
    let kind = u8::try_from(kind).map_err(|_| "an unknown kind")?;
    let frame = frames.get(cursor.size()?).ok_or("no such frame")?;
    let [frame_offset, frame_stored_len, frame_raw_len] = *frame;
    let (offset, len) = (cursor.size()?, cursor.size()?);
    Ok(Place { pack, kind, frame_offset, frame_stored_len, frame_raw_len, offset, len })
}

/// Decodes the body of an outcome: §14.
fn outcome(body: &[u8]) -> Result<Outcome, Fault> {
    let mut cursor = Cursor::new(body);
    let outcome = match cursor.u32()? {
        0 => {
            let point = point(&mut cursor)?;
            let _numbers: [u8; 48] = cursor.array()?;
            cursor.option(Cursor::u64)?;
            cursor.u64()?;
            Outcome::Point(point)
        }
        1 => {
            let _packs: Vec<Id> = cursor.list(Cursor::array)?;
            let _points: Vec<Sid> = cursor.list(Cursor::array)?;
            let _segments: Vec<Id> = cursor.list(Cursor::array)?;
            Outcome::Sweep
        }
        2 => Outcome::Done,
        3 => {
            let _by: Sid = cursor.array()?;
            cursor.string()?;
            Outcome::Abort
        }
        4 => {
            let _point: Sid = cursor.array()?;
            cursor.option(Cursor::u64)?;
            cursor.string()?;
            Outcome::Hold
        }
        kind @ (5 | 6) => {
            cursor.u32()?;
            cursor.u64()?;
            let _sound: Vec<Sid> = cursor.list(Cursor::array)?;
            let _damaged: Vec<Sid> = cursor.list(Cursor::array)?;
            let _cursor: Option<Id> = cursor.option(Cursor::array)?;
            if kind == 6 {
                cursor.u64()?;
                cursor.option(|cursor| {
                    cursor.u32()?;
                    cursor.list(Cursor::string)
                })?;
            }
            Outcome::Verified
        }
        _ => return Err("an unknown outcome".into()),
    };
    cursor.end()?;
    Ok(outcome)
}

/// Decodes a point record: §13.
fn point(cursor: &mut Cursor<'_>) -> Result<Point, Fault> {
    let (id, domain) = (cursor.array()?, cursor.string()?);
    cursor.option(Cursor::string)?;
    cursor.u64()?;
    cursor.u32()?;
    cursor.option(Cursor::array::<16>)?;
    cursor.option(Cursor::array::<16>)?;
    cursor.option(Cursor::string)?;
    cursor.u32()?;
    cursor.u32()?;
    let disks = cursor.list(|cursor| {
        let disk = (cursor.string()?, manifest(cursor)?);
        cursor.string()?;
        cursor.u32()?;
        cursor.option(Cursor::string)?;
        cursor.bool()?;
        Ok(disk)
    })?;
    let files = cursor.list(|cursor| Ok((cursor.string()?, manifest(cursor)?)))?;
    cursor.option(Cursor::string)?;
    cursor.option(Cursor::string)?;
    cursor.list(Cursor::string)?;
    cursor.string()?;
    cursor.string()?;
    Ok(Point { id, domain, disks, files })
}

fn manifest(cursor: &mut Cursor<'_>) -> Result<Manifest, Fault> {
    Ok(Manifest { size: cursor.u64()?, height: cursor.u8()?, root: cursor.option(Cursor::array)? })
}

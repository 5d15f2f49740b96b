//! Which packs a session may rely on: there, in no mark, not known to be bad.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::config::is_of_object;
use crate::error::{Error, Result};
use crate::format::envelope::ObjectKind;
use crate::format::name::{Folder, ObjectName};
use crate::format::session::{Damage, Mark};
use crate::id::{ChunkId, PackId, PointId, RepositoryId};
use crate::index::Location;
use crate::storage::Storage;

/// What is known to be bad in a pack.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Bad {
    Whole,
    Chunks(HashSet<ChunkId>),
}

/// The marks at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Marks {
    pub packs: HashSet<PackId>,
    pub points: HashSet<PointId>,
}

impl Marks {
    /// Reads every mark.
    ///
    /// # Errors
    /// A failed listing or read; a mark that cannot be decoded, since what it names may be deleted any moment.
    pub fn load(storage: &dyn Storage, repository: RepositoryId) -> Result<Self> {
        Self::load_or(storage, repository, &mut |_, error| Err(error))
    }

    /// As [`Marks::load`]; `refuse` says whether one that cannot be read is passed over.
    pub(super) fn load_or(
        storage: &dyn Storage,
        repository: RepositoryId,
        refuse: &mut dyn FnMut(ObjectName, Error) -> Result<()>,
    ) -> Result<Self> {
        let mut marks = Self::default();
        for listed in storage.list(Folder::Marks)? {
            let read = storage.get(listed.name, ObjectKind::Mark.max_object_len()).and_then(|bytes| {
                Mark::from_object(&bytes, repository).map_err(|fault| Error::malformed(listed.name, fault))
            });
            match read {
                Ok(mark) => {
                    marks.packs.extend(mark.packs);
                    marks.points.extend(mark.points);
                }
                // that prune is over
                Err(Error::NotFound { .. }) => {}
                Err(error) => refuse(listed.name, error)?,
            }
        }
        Ok(marks)
    }
}

/// What is known of packs.
#[derive(Debug, Default)]
struct Packs {
    /// Bytes; `None` of one that is not there.
    lens: HashMap<PackId, Option<u64>>,
    /// All were listed: there are no others.
    is_complete: bool,
}

/// What a session saw when it began, but of packs, at each of which it looks when it first meets it: a repository of many
/// points has many packs, of which a session meets few.
#[derive(Debug, Clone)]
pub struct View {
    storage: Arc<dyn Storage>,
    packs: Arc<RwLock<Packs>>,
    marks: Marks,
    bad: HashMap<PackId, Bad>,
    /// Why a pack could not be looked at, until somebody is told.
    failed: Arc<Mutex<Option<Error>>>,
    /// A verify has found that something is lost, whether or not there is a pack to record that of.
    is_anything_lost: bool,
}

impl View {
    /// Reads damage records; `marks` must have been read before (protocol: marks first, then segments, then what they speak of).
    ///
    /// # Errors
    /// A failed listing or read. A damage record that cannot be decoded condemns its whole pack.
    pub fn load(storage: &Arc<dyn Storage>, repository: RepositoryId, marks: Marks) -> Result<Self> {
        let storage = Arc::clone(storage);
        let mut bad: HashMap<PackId, Bad> = HashMap::new();
        for listed in storage.list(Folder::Damage)? {
            let ObjectName::Damage(pack, _) = listed.name else { continue };
            let bytes = match storage.get(listed.name, ObjectKind::Damage.max_object_len()) {
                Err(Error::NotFound { .. }) => continue,
                Err(error) if is_of_object(storage.as_ref(), &error) => Vec::new(),
                other => other?,
            };
            let chunks = match Damage::from_object(&bytes, repository) {
                Ok(damage) if !damage.chunks.is_empty() => damage.chunks,
                _ => {
                    bad.insert(pack, Bad::Whole);
                    continue;
                }
            };
            if let Bad::Chunks(known) = bad.entry(pack).or_insert_with(|| Bad::Chunks(HashSet::new())) {
                known.extend(chunks);
            }
        }
        let packs = Arc::default();
        Ok(Self { storage, packs, marks, bad, failed: Arc::default(), is_anything_lost: false })
    }

    #[cfg(test)]
    pub(super) fn of_a_test() -> Self {
        let storage = Arc::new(crate::storage::memory::MemoryStorage::new());
        let (packs, bad) = Default::default();
        Self { storage, packs, marks: Marks::default(), bad, failed: Arc::default(), is_anything_lost: false }
    }

    pub(super) fn set_lost(&mut self, is_anything_lost: bool) {
        self.is_anything_lost = is_anything_lost;
    }

    pub(super) fn set_marks(&mut self, marks: Marks) {
        self.marks = marks;
    }

    /// Returns true if a pack is known to be there. Of one that was not met nothing is known before all are listed:
    /// [`View::pack_lens`].
    pub fn has_pack(&self, id: PackId) -> bool {
        self.packs.read().unwrap_or_else(PoisonError::into_inner).lens.get(&id).is_some_and(Option::is_some)
    }

    /// Returns the length of a pack, bytes; `None` if it is not there.
    ///
    /// # Errors
    /// Those of the storage.
    pub fn pack_len(&self, id: PackId) -> Result<Option<u64>> {
        {
            let packs = self.packs.read().unwrap_or_else(PoisonError::into_inner);
            match packs.lens.get(&id) {
                Some(len) => return Ok(*len),
                None if packs.is_complete => return Ok(None),
                None => {}
            }
        }
        let len = match self.storage.len(ObjectName::Pack(id)) {
            Ok(len) => Some(len),
            Err(Error::NotFound { .. }) => None,
            // what has its name is no pack, nor would it be listed
            Err(error) if error.is_damage() => None,
            Err(error) => return Err(error),
        };
        let mut packs = self.packs.write().unwrap_or_else(PoisonError::into_inner);
        // who was first is right: all see the same
        let len = if packs.is_complete { None } else { len };
        Ok(*packs.lens.entry(id).or_insert(len))
    }

    /// Returns the packs that are there, or were when they were met, with their lengths in bytes. Looks at all that nobody has
    /// looked at yet; from then on there are no others.
    ///
    /// # Errors
    /// Those of the storage.
    pub fn pack_lens(&self) -> Result<Vec<(PackId, u64)>> {
        let mut packs = self.packs.write().unwrap_or_else(PoisonError::into_inner);
        if !packs.is_complete {
            for listed in self.storage.list(Folder::Packs)? {
                if let ObjectName::Pack(id) = listed.name {
                    packs.lens.entry(id).or_insert(Some(listed.len));
                }
            }
            packs.is_complete = true;
        }
        Ok(packs.lens.iter().filter_map(|(id, len)| Some((*id, (*len)?))).collect())
    }

    /// Says why a pack could not be looked at, if one could not since this was asked: what was said of its chunks is not
    /// true then.
    ///
    /// # Errors
    /// That.
    pub fn check_looks(&self) -> Result<()> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
    }

    /// Returns the marks that were there.
    pub fn marks(&self) -> &Marks {
        &self.marks
    }

    /// Returns true if a chunk can be read from there as far as is known: the pack is there and long enough. Whoever reads one
    /// that cannot be looked at learns why.
    pub fn is_readable(&self, location: &Location) -> bool {
        self.holds(location).unwrap_or(true)
    }

    fn holds(&self, location: &Location) -> Result<bool> {
        Ok(self.pack_len(location.pack)?.is_some_and(|len| location.frame.end() <= len))
    }

    /// Returns true if anything is recorded as damaged.
    pub fn has_damage(&self) -> bool {
        !self.bad.is_empty()
    }

    /// Returns true if anything is recorded as damaged or is known to be lost.
    pub fn has_lost(&self) -> bool {
        self.has_damage() || self.is_anything_lost
    }

    /// Returns the packs of which something is recorded as damaged.
    pub fn damaged_packs(&self) -> impl Iterator<Item = PackId> {
        self.bad.keys().copied()
    }

    /// Returns true if a damage record condemns everything in a pack.
    pub fn is_condemned_whole(&self, pack: PackId) -> bool {
        self.bad.get(&pack) == Some(&Bad::Whole)
    }

    /// Returns true if a damage record condemns a chunk in a pack.
    pub fn is_condemned(&self, pack: PackId, id: &ChunkId) -> bool {
        match self.bad.get(&pack) {
            None => false,
            Some(Bad::Whole) => true,
            Some(Bad::Chunks(chunks)) => chunks.contains(id),
        }
    }

    /// Returns true if a chunk is there as far as is known: readable, not recorded as damaged. A prune may be about to
    /// move it. Whoever has not looked at all packs ([`View::pack_lens`]) asks [`View::check_looks`] afterwards.
    pub fn is_good(&self, id: &ChunkId, location: &Location) -> bool {
        // what is condemned need not be looked at, and may be where nothing can be
        !self.is_condemned(location.pack, id)
            && self.holds(location).unwrap_or_else(|error| {
                *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                false
            })
    }

    /// Returns true if a prune has marked the pack.
    pub fn is_marked(&self, pack: PackId) -> bool {
        self.marks.packs.contains(&pack)
    }

    /// Returns true if a new point may rely on a chunk there: good, and in no pack that a prune has marked.
    pub fn is_usable(&self, id: &ChunkId, location: &Location) -> bool {
        self.is_good(id, location) && !self.is_marked(location.pack)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::node::ChunkKind;
    use crate::format::pack::{FRAME_HEADER_LEN, FrameEntry};
    use crate::storage::fault::{FailingStorage, Fault};
    use crate::storage::local::LocalStorage;
    use crate::storage::memory::MemoryStorage;

    fn pack(number: u8) -> PackId {
        PackId::from_bytes([number; 32])
    }

    fn place(number: u8, stored_len: u32) -> Location {
        let frame = FrameEntry { offset: 64, stored_len, raw_len: 100 };
        Location { pack: pack(number), frame, kind: ChunkKind::Data, offset: 0, len: 100 }
    }

    fn load(storage: impl Storage + 'static) -> View {
        let storage: Arc<dyn Storage> = Arc::new(storage);
        View::load(&storage, RepositoryId::from_bytes([1; 16]), Marks::default()).unwrap()
    }

    #[test]
    fn packs_are_looked_at_when_they_are_met() {
        let storage = MemoryStorage::new();
        for number in 1..=3 {
            storage.put_new(ObjectName::Pack(pack(number)), &[0; 200]).unwrap();
        }
        let view = load(storage.clone());
        let id = ChunkId::from_bytes([9; 32]);
        assert_eq!(view.pack_len(pack(1)).unwrap(), Some(200));
        storage.delete(ObjectName::Pack(pack(1))).unwrap();
        storage.delete(ObjectName::Pack(pack(2))).unwrap();
        storage.put_new(ObjectName::Pack(pack(4)), &[0; 200]).unwrap();
        assert_eq!(view.pack_len(pack(1)).unwrap(), Some(200), "as it was");
        assert_eq!(view.pack_len(pack(2)).unwrap(), None, "gone since");
        assert_eq!(view.pack_len(pack(4)).unwrap(), Some(200), "come since");
        assert_eq!(view.pack_len(pack(5)).unwrap(), None);
        let within = place(3, 200 - 64 - FRAME_HEADER_LEN as u32);
        assert!(view.is_readable(&within) && view.is_usable(&id, &within));
        let beyond = place(3, 201 - 64 - FRAME_HEADER_LEN as u32);
        assert!(!view.is_readable(&beyond) && !view.is_good(&id, &beyond), "the pack was cut off");
        let mut lens = view.pack_lens().unwrap();
        lens.sort_unstable();
        assert_eq!(lens, [(pack(1), 200), (pack(3), 200), (pack(4), 200)]);
        assert!(view.has_pack(pack(1)) && !view.has_pack(pack(2)));
        storage.put_new(ObjectName::Pack(pack(6)), &[0; 200]).unwrap();
        assert_eq!(view.pack_len(pack(6)).unwrap(), None, "all have been listed");
        let mut lens = load(storage).pack_lens().unwrap();
        lens.sort_unstable();
        assert_eq!(lens, [(pack(3), 200), (pack(4), 200), (pack(6), 200)]);
    }

    #[test]
    fn what_is_no_pack_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let storage = LocalStorage::create(&dir.path().join("new")).unwrap();
        std::fs::create_dir_all(dir.path().join("new").join(ObjectName::Pack(pack(0x11)).to_string()))
            .unwrap();
        std::fs::write(dir.path().join("new/packs/22"), b"").unwrap();
        let view = load(storage);
        for number in [0x11, 0x22, 0x33] {
            assert_eq!(view.pack_len(pack(number)).unwrap(), None, "{number:x}");
            assert!(!view.is_good(&ChunkId::from_bytes([9; 32]), &place(number, 100)));
        }
        view.check_looks().unwrap();
        assert_eq!(view.pack_lens().unwrap(), []);
    }

    #[test]
    fn a_pack_that_cannot_be_looked_at_is_told_of() {
        let storage = MemoryStorage::new();
        storage.put_new(ObjectName::Pack(pack(1)), &[0; 200]).unwrap();
        // behind a listing
        let view = load(FailingStorage::new(storage, 1, Fault::Eio));
        let (id, place) = (ChunkId::from_bytes([9; 32]), place(1, 100));
        assert!(!view.is_good(&id, &place));
        assert!(matches!(view.check_looks(), Err(Error::Io { .. })));
        assert!(view.is_good(&id, &place), "once only");
        view.check_looks().unwrap();
    }
}

//! stub
use crate::error::Result;
use crate::format::node::ChunkKind;
use crate::format::pack::FrameEntry;
use crate::format::segment::Segment;
use crate::id::{ChunkId, PackId, RepositoryId, SegmentId};
use crate::monitor::Monitor;
use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Mutex;
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Location {
    pub pack: PackId,
    pub frame: FrameEntry,
    pub kind: ChunkKind,
    pub offset: u32,
    pub len: u32,
}
pub trait Index: Send + Sync + std::fmt::Debug {
    fn applied(&self) -> Result<HashSet<SegmentId>>;
    fn apply(&self, id: SegmentId, segment: &Segment) -> Result<()>;
    fn clear(&self) -> Result<()>;
    fn lookup(&self, ids: &[ChunkId]) -> Result<Vec<Vec<Location>>>;
}
#[derive(Debug, Default)]
pub struct MemoryIndex(Mutex<(HashSet<SegmentId>, HashMap<ChunkId, Vec<Location>>)>);
impl Index for MemoryIndex {
    fn applied(&self) -> Result<HashSet<SegmentId>> {
        Ok(self.0.lock().unwrap().0.clone())
    }
    fn apply(&self, id: SegmentId, s: &Segment) -> Result<()> {
        let mut g = self.0.lock().unwrap();
        g.0.insert(id);
        for c in &s.chunks {
            let p = &s.packs[c.pack as usize];
            g.1.entry(c.id).or_default().push(Location {
                pack: p.id,
                frame: p.frames[c.frame as usize],
                kind: c.kind,
                offset: c.offset,
                len: c.len,
            });
        }
        Ok(())
    }
    fn clear(&self) -> Result<()> {
        *self.0.lock().unwrap() = Default::default();
        Ok(())
    }
    fn lookup(&self, ids: &[ChunkId]) -> Result<Vec<Vec<Location>>> {
        let g = self.0.lock().unwrap();
        Ok(ids.iter().map(|i| g.1.get(i).cloned().unwrap_or_default()).collect())
    }
}
pub struct OpenedIndex {
    pub index: Box<dyn Index>,
    pub notes: Vec<String>,
}
pub fn open_index(_c: Option<&Path>, _r: RepositoryId) -> OpenedIndex {
    OpenedIndex { index: Box::new(MemoryIndex::default()), notes: vec![] }
}
pub fn synchronize(
    index: &dyn Index,
    listed: &[SegmentId],
    load: &mut dyn FnMut(SegmentId) -> Result<Option<Segment>>,
    _m: &dyn Monitor,
) -> Result<()> {
    let a = index.applied()?;
    for id in listed {
        if !a.contains(id) {
            if let Some(s) = load(*id)? {
                index.apply(*id, &s)?;
            }
        }
    }
    Ok(())
}

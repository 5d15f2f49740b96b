//! Single objects, decoded, for people who look for what went wrong.

use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::format::envelope::ObjectKind;
use crate::format::name::ObjectName;
use crate::format::node::{ChunkKind, LeafEntry, Node};
use crate::format::session::{
    Damage, Mark, OUTSIDE_CHUNKS, Outcome, SampleScope, SessionRecord, Tombstone, VerifiedRecord,
};
use crate::id::{ChunkId, PackId, SegmentId, SessionId};
use crate::monitor::Monitor;
use crate::repo::Repository;
use crate::repo::reader::ChunkReader;

/// What to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CatKind {
    Config,
    Point,
    Outcome,
    Session,
    Segment,
    Pack,
    Node,
    Chunk,
    Mark,
    Tombstone,
    /// By the pack's id and the session's, as in its name: `PACK.SESSION`.
    Damage,
}

/// A decoded object, or the content of a chunk.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    Bytes(Vec<u8>),
    Object(Value),
}

/// Reads one object.
///
/// # Errors
/// [`Error::Usage`] for an id that is none; [`Error::NotFound`]; [`Error::Malformed`].
pub fn cat(repository: &Repository, kind: CatKind, id: &str, monitor: &dyn Monitor) -> Result<Content> {
    let value = match kind {
        CatKind::Config if id.is_empty() => config(repository),
        CatKind::Config => return Err(Error::Usage("the config has no id".into())),
        CatKind::Point => {
            let session: SessionId = parse(id)?;
            match outcome(repository, session)? {
                Outcome::Point { record, stats } => json!({ "record": record, "stats": stats }),
                _ => return Err(Error::NotFound { object: format!("point {id}") }),
            }
        }
        CatKind::Outcome => outcome_value(&outcome(repository, parse(id)?)?),
        CatKind::Session => session(repository, parse(id)?)?,
        CatKind::Segment => segment(repository, parse(id)?)?,
        CatKind::Pack => pack(repository, parse(id)?)?,
        CatKind::Node => node(repository, parse(id)?, monitor)?,
        CatKind::Chunk => return chunk(repository, parse(id)?, monitor).map(Content::Bytes),
        CatKind::Mark => {
            let mark = get(repository, ObjectName::Mark(parse(id)?), ObjectKind::Mark, Mark::from_object)?;
            json!({ "packs": mark.packs, "points": mark.points })
        }
        CatKind::Tombstone => {
            let name = ObjectName::Tombstone(parse(id)?);
            let tombstone = get(repository, name, ObjectKind::Tombstone, Tombstone::from_object)?;
            json!({ "points": tombstone.points, "reason": tombstone.reason, "time_ms": tombstone.time_ms })
        }
        CatKind::Damage => damage(repository, id)?,
    };
    Ok(Content::Object(value))
}

fn parse<T: std::str::FromStr>(id: &str) -> Result<T> {
    id.parse().map_err(|_| Error::Usage(format!("{id:?} is no whole id of such an object")))
}

type Decode<T> = fn(&[u8], crate::id::RepositoryId) -> Result<T, crate::error::FormatFault>;

fn get<T>(repository: &Repository, name: ObjectName, kind: ObjectKind, decode: Decode<T>) -> Result<T> {
    let bytes = repository.storage().get(name, kind.max_object_len())?;
    decode(&bytes, repository.id()).map_err(|fault| Error::malformed(name, fault))
}

fn config(repository: &Repository) -> Value {
    let config = repository.config();
    json!({
        "format_version": config.format_version,
        "repository": config.repository,
        "key_domain": config.key_domain.to_string(),
        "required_features": config.required_features,
        "optional_features": config.optional_features,
        "created_ms": config.created_ms,
        "cutter": {
            "algorithm": config.cutter.algorithm,
            "min_len": config.cutter.min_len,
            "average_len": config.cutter.average_len,
            "max_len": config.cutter.max_len,
        },
        "leaf_len": config.leaf_len,
        "fanout": config.fanout,
        "frame_target_len": config.frame_target_len,
        "pack_target_len": config.pack_target_len,
        "zstd_level": config.zstd_level,
        "create_if_absent": config.storage.create_if_absent,
    })
}

fn outcome(repository: &Repository, session: SessionId) -> Result<Outcome> {
    get(repository, ObjectName::Outcome(session), ObjectKind::Outcome, Outcome::from_object)
}

fn outcome_value(outcome: &Outcome) -> Value {
    match outcome {
        Outcome::Point { record, stats } => json!({ "outcome": "point", "record": record, "stats": stats }),
        Outcome::Sweep { packs, points, segments } => {
            json!({ "outcome": "sweep", "packs": packs, "points": points, "segments": segments })
        }
        Outcome::Done => json!({ "outcome": "done" }),
        Outcome::Hold { point, until_ms, reason } => {
            json!({ "outcome": "hold", "point": point, "until_ms": until_ms, "reason": reason })
        }
        Outcome::Verified { record } => verified(record, 0, None),
        Outcome::Found { record, order, scope } => verified(record, *order, scope.as_ref()),
        Outcome::Abort { by, why } => json!({ "outcome": "abort", "by": by.to_string(), "why": why }),
    }
}

fn verified(record: &VerifiedRecord, order: u64, scope: Option<&SampleScope>) -> Value {
    json!({
        "outcome": "verified",
        "order": order,
        "level": record.level,
        "time_ms": record.time_ms,
        "sound": record.sound,
        "damaged": record.damaged,
        "cursor": record.cursor,
        "scope": scope.map(|scope| json!({ "level": scope.level, "domains": scope.domains })),
    })
}

fn session(repository: &Repository, id: SessionId) -> Result<Value> {
    let record = get(repository, ObjectName::Session(id), ObjectKind::Session, SessionRecord::from_object)?;
    Ok(json!({
        "kind": format!("{:?}", record.kind).to_lowercase(),
        "host": record.host,
        "boot_id": record.boot_id,
        "process_id": record.process_id,
        "started_ms": record.started_ms,
        "program": record.program,
    }))
}

fn damage(repository: &Repository, id: &str) -> Result<Value> {
    let (pack, session) = id.split_once('.').unwrap_or((id, ""));
    let name = ObjectName::Damage(parse(pack)?, parse(session)?);
    let damage = get(repository, name, ObjectKind::Damage, Damage::from_object)?;
    // no chunk named: the whole pack; what is not a chunk's is not one
    let chunks: Vec<&ChunkId> = damage.chunks.iter().filter(|id| **id != OUTSIDE_CHUNKS).collect();
    Ok(json!({
        "pack": damage.pack,
        "whole_pack": damage.chunks.is_empty(),
        "outside_chunks": chunks.len() < damage.chunks.len(),
        "chunks": chunks,
    }))
}

fn segment(repository: &Repository, id: SegmentId) -> Result<Value> {
    let segment = repository.load_segment(id)?;
    let packs: Vec<Value> = segment
        .packs
        .iter()
        .map(|pack| json!({ "pack": pack.id, "stored_len": pack.stored_len, "frames": pack.frames.len() }))
        .collect();
    let chunks: Vec<Value> = segment
        .chunks
        .iter()
        .map(|chunk| {
            json!({
                "chunk": chunk.id, "kind": kind_word(chunk.kind), "pack": chunk.pack, "frame": chunk.frame,
                "offset": chunk.offset, "len": chunk.len,
            })
        })
        .collect();
    Ok(json!({
        "owner": segment.owner.to_string(), "number": segment.number, "packs": packs, "chunks": chunks,
    }))
}

fn kind_word(kind: ChunkKind) -> String {
    format!("{kind:?}").to_lowercase()
}

fn pack(repository: &Repository, id: PackId) -> Result<Value> {
    let len = repository.storage().len(ObjectName::Pack(id))?;
    let (header, table) = repository.read_pack_table(id, len)?;
    let frames: Vec<Value> = table
        .frames
        .iter()
        .map(|frame| json!({ "offset": frame.offset, "stored_len": frame.stored_len, "raw_len": frame.raw_len }))
        .collect();
    let chunks: Vec<Value> = table
        .chunks
        .iter()
        .map(|chunk| {
            json!({
                "chunk": chunk.id, "kind": kind_word(chunk.kind), "frame": chunk.frame, "offset": chunk.offset,
                "len": chunk.len,
            })
        })
        .collect();
    let kind = format!("{:?}", header.kind).to_lowercase();
    Ok(json!({ "pack": id, "kind": kind, "stored_len": len, "frames": frames, "chunks": chunks }))
}

fn node(repository: &Repository, id: ChunkId, monitor: &dyn Monitor) -> Result<Value> {
    use crate::manifest::NodeReader;
    let (_, view) = repository.refresh_to_read(monitor)?;
    let reader = ChunkReader::new(repository, &view);
    let node = reader.read_node(id)?;
    Ok(match node.as_ref() {
        Node::Leaf { entries } => {
            let entries: Vec<Value> = entries.iter().map(leaf_entry).collect();
            json!({ "node": "leaf", "entries": entries })
        }
        Node::Inner { level, children } => {
            let children: Vec<Value> =
                children.iter().map(|child| json!({ "slot": child.slot, "node": child.id })).collect();
            json!({ "node": "inner", "level": level, "children": children })
        }
    })
}

fn leaf_entry(entry: &LeafEntry) -> Value {
    match entry {
        LeafEntry::Zero { len } => json!({ "zero": len }),
        LeafEntry::Chunk { len, offset, id } => json!({ "chunk": id, "offset": offset, "len": len }),
        LeafEntry::Unreadable { len } => json!({ "unreadable": len }),
    }
}

fn chunk(repository: &Repository, id: ChunkId, monitor: &dyn Monitor) -> Result<Vec<u8>> {
    let (_, view) = repository.refresh_to_read(monitor)?;
    let reader = ChunkReader::new(repository, &view);
    let places = reader.locate(&[id])?.pop().unwrap_or_default();
    // the kind is part of what the id is made of
    let kind = places.first().map_or(ChunkKind::Data, |place| place.kind);
    Ok(reader.read_at(kind, id, &places)?.to_vec())
}

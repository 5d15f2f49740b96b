//! Every number and name that the document's tables state is the code's.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::Path;

use vmkeep::format::envelope::{CHECKSUM_LEN, HEADER_LEN, ObjectKind};
use vmkeep::format::limits::*;
use vmkeep::format::name::{Folder, ObjectName};
use vmkeep::id::{PackId, SegmentId, SessionId};
use vmkeep::repo::{CreateOptions, Environment, Repository, Timing};
use vmkeep::storage::memory::MemoryStorage;

use super::document::rows_under;

fn range<T: Display>(range: RangeInclusive<T>) -> String {
    format!("{} to {}", range.start(), range.end())
}

macro_rules! stated {
    ($($name:ident),*) => { [$((stringify!($name), $name.to_string())),*] };
    (ranges $($name:ident),*) => { [$((stringify!($name), range($name))),*] };
}

fn limits_of_the_code() -> BTreeMap<String, String> {
    let single = stated!(
        FORMAT_VERSION,
        BLOCK_LEN,
        MAX_CHUNK_LEN,
        MAX_FRAME_RAW_LEN,
        MAX_FRAME_CHUNKS,
        MAX_PACK_LEN,
        MAX_PACK_TABLE_LEN,
        MAX_SEGMENT_LEN,
        SEGMENT_TARGET_CHUNKS,
        MAX_SMALL_OBJECT_LEN,
        MAX_OUTCOME_LEN,
        MAX_XML_LEN,
        MAX_DISKS,
        MAX_NAME_LEN,
        MAX_DISK_LEN,
        MAX_LEAF_ENTRIES,
        MAX_TREE_HEIGHT
    );
    let ranges = stated!(
        ranges LEAF_LEN_RANGE,
        FANOUT_RANGE,
        FRAME_TARGET_RANGE,
        PACK_TARGET_RANGE,
        ZSTD_LEVEL_RANGE
    );
    single.into_iter().chain(ranges).map(|(name, value)| (name.to_owned(), value)).collect()
}

#[test]
fn the_document_states_every_limit() {
    let code = limits_of_the_code();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/format/limits.rs");
    let source = std::fs::read_to_string(source).unwrap();
    let declared = source.lines().filter_map(|line| line.strip_prefix("pub const ")?.split(':').next());
    for name in declared {
        assert!(code.contains_key(name), "this test does not know the limit {name}");
    }
    let document: BTreeMap<String, String> =
        rows_under("constant").into_iter().map(|row| (row.first, row.second)).collect();
    assert_eq!(document, code);
}

#[test]
fn the_document_states_every_magic_and_its_bound() {
    let kinds = [
        ("config", ObjectKind::Config),
        ("index segment", ObjectKind::Segment),
        ("session", ObjectKind::Session),
        ("outcome", ObjectKind::Outcome),
        ("mark", ObjectKind::Mark),
        ("tombstone", ObjectKind::Tombstone),
        ("damage record", ObjectKind::Damage),
    ];
    let limits = limits_of_the_code();
    let document: Vec<(String, String, String)> = rows_under("object")
        .into_iter()
        .map(|row| (row.first, row.second, limits.get(&row.third).unwrap().clone()))
        .collect();
    let code: Vec<(String, String, String)> = kinds
        .into_iter()
        .map(|(name, kind)| {
            let magic = String::from_utf8(kind.magic().to_vec()).unwrap();
            (name.to_owned(), magic, kind.max_body_len().to_string())
        })
        .collect();
    assert_eq!(document, code);
    for (_, kind) in kinds {
        let around = (HEADER_LEN + CHECKSUM_LEN) as u64;
        assert_eq!(kind.max_object_len(), u64::from(kind.max_body_len()) + around);
    }
    assert_eq!((HEADER_LEN, CHECKSUM_LEN), (64, 32));
}

#[test]
fn the_document_states_every_name() {
    let (session, long) = (SessionId::from_bytes([0x5e; 16]), [0x1d; 32]);
    let names = [
        ObjectName::Config,
        ObjectName::ConfigCopy,
        ObjectName::Key(session),
        ObjectName::Pack(PackId::from_bytes(long)),
        ObjectName::Segment(SegmentId::from_bytes(long)),
        ObjectName::Session(session),
        ObjectName::Heartbeat(session),
        ObjectName::Outcome(session),
        ObjectName::Mark(session),
        ObjectName::Tombstone(session),
        ObjectName::Damage(PackId::from_bytes(long), session),
        ObjectName::Reserve,
    ];
    let template = |name: ObjectName| {
        let sid = if matches!(name, ObjectName::Key(_)) { "<id>" } else { "<sid>" };
        name.to_string()
            .replace(&"1d".repeat(32), "<id>")
            .replace(&"5e".repeat(16), sid)
            .replace("/1d/", "/<xx>/")
    };
    let document: Vec<String> = rows_under("name").into_iter().map(|row| row.first).collect();
    assert_eq!(document, names.map(template));
    for folder in Folder::ALL {
        let prefix = format!("{}/", folder.as_str());
        assert!(document.iter().any(|name| name.starts_with(&prefix)), "{prefix}");
    }
}

#[test]
fn the_document_states_the_config_of_a_new_repository() {
    let environment = Environment {
        host: "h".into(),
        boot_id: "b".into(),
        process_id: 1,
        program: "test".into(),
        now_ms: || 0,
        timing: Timing::default(),
    };
    let options = CreateOptions::default();
    let repository = Repository::create(Box::new(MemoryStorage::new()), &options, &environment).unwrap();
    let config = repository.config();
    let code = [
        ("cutter.min_len", config.cutter.min_len.to_string()),
        ("cutter.average_len", config.cutter.average_len.to_string()),
        ("cutter.max_len", config.cutter.max_len.to_string()),
        ("leaf_len", config.leaf_len.to_string()),
        ("fanout", config.fanout.to_string()),
        ("frame_target_len", config.frame_target_len.to_string()),
        ("pack_target_len", config.pack_target_len.to_string()),
        ("zstd_level", config.zstd_level.to_string()),
    ]
    .map(|(name, value)| (name.to_owned(), value));
    let document: Vec<(String, String)> =
        rows_under("default").into_iter().map(|row| (row.first, row.second)).collect();
    assert_eq!(document, code);
}

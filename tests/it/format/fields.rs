//! Every record and enum that the document spells out has the fields and variants of the code, in that order.

use std::path::Path;

use super::document::{Row, rows_under};

fn source(file: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/format").join(file)).unwrap()
}

/// The lines between the braces of a declaration.
fn declaration(file: &str, head: &str) -> Vec<String> {
    let text = source(file);
    let (_, behind) =
        text.split_once(&format!("{head} {{\n")).unwrap_or_else(|| panic!("{file} has no {head}"));
    let (body, _) = behind.split_once("\n}").unwrap();
    body.lines().map(str::to_owned).collect()
}

/// Names and types of a struct's fields.
fn fields(file: &str, name: &str) -> Vec<(String, String)> {
    let lines = declaration(file, &format!("pub struct {name}"));
    let field = |line: &String| {
        let (name, kind) = line.strip_prefix("    pub ")?.trim_end_matches(',').split_once(": ")?;
        Some((name.to_owned(), kind.to_owned()))
    };
    lines.iter().filter_map(field).collect()
}

/// How the document writes a type of the code.
fn document_type(kind: &str) -> String {
    if let Some(item) = kind.strip_prefix("Option<").and_then(|rest| rest.strip_suffix('>')) {
        return format!("option of {}", document_type(item));
    }
    if let Some(item) = kind.strip_prefix("Vec<").and_then(|rest| rest.strip_suffix('>')) {
        return format!("list of {}", document_type(item));
    }
    let known = match kind {
        "String" | "Arc<str>" => "string",
        "ChunkId" | "PackId" => "[u8; 32]",
        "PointId" | "SessionId" | "RepositoryId" | "KeyDomainId" => "[u8; 16]",
        "FrameEntry" => "frame entry",
        "TableChunk" => "table chunk",
        "SegmentPack" => "segment pack",
        "SegmentChunk" => "segment chunk",
        "DiskRecord" => "disk record",
        "FileRecord" => "file record",
        "Manifest" => "manifest",
        "ChunkKind" | "PackKind" | "SessionKind" | "Level" | "SourceKind" | "Consistency"
        | "VerifiedLevel" => "enum",
        other => other,
    };
    known.to_owned()
}

fn assert_same(rows: &[Row], code: &[(String, String)], what: &str) {
    let document: Vec<(String, String)> = rows
        .iter()
        .map(|row| {
            // a table chunk stands "in the order …"
            let kind = row.second.split(", in the order").next().unwrap();
            (row.first.clone(), kind.to_owned())
        })
        .collect();
    let code: Vec<_> = code.iter().map(|(name, kind)| (name.clone(), document_type(kind))).collect();
    assert_eq!(document, code, "{what}");
}

#[test]
fn records_have_the_fields_of_the_code() {
    let records = [
        ("field of a frame entry", "pack.rs", "FrameEntry"),
        ("field of a table chunk", "pack.rs", "TableChunk"),
        ("field of a segment pack", "segment.rs", "SegmentPack"),
        ("field of a segment chunk", "segment.rs", "SegmentChunk"),
        ("field of a manifest", "point.rs", "Manifest"),
        ("field of a child", "node.rs", "Child"),
        ("field of a disk record", "point.rs", "DiskRecord"),
        ("field of a file record", "point.rs", "FileRecord"),
        ("field of the point's numbers", "point.rs", "PointStats"),
        ("field of a session", "session.rs", "SessionRecord"),
        ("field of a mark", "session.rs", "Mark"),
        ("field of a tombstone", "session.rs", "Tombstone"),
        ("field of a damage record", "session.rs", "Damage"),
        ("field of a verified record", "session.rs", "VerifiedRecord"),
        ("field of a sample scope", "session.rs", "SampleScope"),
    ];
    for (head, file, name) in records {
        assert_same(&rows_under(head), &fields(file, name), head);
    }
}

#[test]
fn bodies_have_the_fields_of_the_code() {
    // the cutter and what the storage can do are records inside `config`, which the document spells out in place
    let config = fields("config.rs", "Config").into_iter().flat_map(|(name, kind)| match name.as_str() {
        "cutter" => inside("cutter", fields("config.rs", "CutterParams")),
        "storage" => inside("storage", fields("config.rs", "StorageTraits")),
        _ => vec![(name, kind)],
    });
    let code: Vec<(String, String)> = config
        .chain(fields("pack.rs", "PackTable"))
        .chain(fields("segment.rs", "Segment"))
        .chain(fields("point.rs", "PointRecord"))
        .collect();
    assert_same(&rows_under("field"), &code, "config, table, segment, point record");
}

fn inside(prefix: &str, fields: Vec<(String, String)>) -> Vec<(String, String)> {
    fields.into_iter().map(|(name, kind)| (format!("{prefix}.{name}"), kind)).collect()
}

/// Variants with their numbers, as the document writes them.
fn variants(file: &str, name: &str) -> Vec<String> {
    let lines = declaration(file, &format!("pub enum {name}"));
    let variants = lines.iter().filter_map(|line| {
        let line = line.strip_prefix("    ").filter(|line| line.starts_with(char::is_uppercase))?;
        let end = line.find(|c: char| !c.is_alphanumeric()).unwrap_or(line.len());
        Some(line[..end].to_lowercase())
    });
    (0..).zip(variants).map(|(number, name): (u32, String)| format!("{number} {name}")).collect()
}

#[test]
fn enums_have_the_variants_of_the_code() {
    for (head, file, name) in [
        ("variant of a node", "node.rs", "Node"),
        ("variant of a leaf entry", "node.rs", "LeafEntry"),
        ("variant of an outcome", "session.rs", "Outcome"),
    ] {
        let document: Vec<String> = rows_under(head).into_iter().map(|row| row.first).collect();
        assert_eq!(document, variants(file, name));
    }
    let kinds: Vec<String> =
        rows_under("kind").into_iter().map(|row| format!("{} {}", row.second, row.first)).collect();
    assert_eq!(kinds, variants("node.rs", "ChunkKind"));
    // enums without fields stand inside a cell: "0 full, 1 incremental, …"
    let text = super::document::text();
    for (file, name) in [("session.rs", "SessionKind"), ("point.rs", "Level"), ("pack.rs", "PackKind")] {
        let listed = variants(file, name).join(", ");
        assert!(text.contains(&listed), "{name}: the document does not have {listed:?}");
    }
}

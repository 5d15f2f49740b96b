//! Taking `repo-format.md` apart.

use std::path::Path;

/// The first and second cell of a row of a table, without back quotes.
pub struct Row {
    pub first: String,
    pub second: String,
    pub third: String,
}

/// A fenced block.
pub struct Block {
    /// What follows the fence.
    pub title: String,
    pub lines: Vec<String>,
}

pub fn path() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("repo-format.md")
}

pub fn text() -> String {
    std::fs::read_to_string(path()).unwrap()
}

/// Every row of every table whose head begins with `first`.
pub fn rows_under(first: &str) -> Vec<Row> {
    let mut rows = Vec::new();
    let (mut inside, mut head) = (false, true);
    for line in text().lines() {
        let Some(line) = line.strip_prefix('|') else {
            (inside, head) = (false, true);
            continue;
        };
        let mut cells = line.split('|').map(|cell| cell.trim().replace('`', ""));
        let mut next = || cells.next().unwrap_or_default();
        let row = Row { first: next(), second: next(), third: next() };
        if head {
            (inside, head) = (row.first == first, false);
        } else if inside && !row.first.starts_with("---") {
            rows.push(row);
        }
    }
    assert!(!rows.is_empty(), "repo-format.md has no table that begins with {first:?}");
    rows
}

/// Every fenced block.
pub fn blocks() -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for line in text().lines() {
        match (line.strip_prefix("```"), open.as_mut()) {
            (Some(title), None) => open = Some(Block { title: title.to_owned(), lines: Vec::new() }),
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (None, Some(block)) => block.lines.push(line.to_owned()),
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "a fenced block of repo-format.md does not end");
    blocks
}

/// The numbers of the one block of a title.
pub fn numbers(title: &str) -> Vec<usize> {
    let block = blocks().into_iter().find(|block| block.title == title).unwrap();
    block.lines.iter().flat_map(|line| line.split_whitespace()).map(|n| n.parse().unwrap()).collect()
}

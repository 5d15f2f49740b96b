//! The rules of the house, as tests: who may use whom, how long things get, what nobody writes.

use std::path::{Path, PathBuf};

/// Modules of the library by layer. A module uses only layers below its own.
const LAYERS: [&[&str]; 7] = [
    &["id", "buffer", "extent"],
    &["error"],
    &["format", "monitor"],
    &["storage", "chunk", "nbd"],
    &["index", "manifest", "source"],
    &["repo"],
    &["ops"],
];
/// The only files that may be unsafe: libvirt's calls that the `virt` crate lacks, and loading it.
const FFI: [&str; 2] = ["src/source/domain/ffi.rs", "src/source/domain/delay_load.rs"];
const MAX_FILE_LINES: usize = 800;
const MAX_FUNCTION_LINES: usize = 70;
const MAX_MAIN_LINES: usize = 60;

/// A source file of the package.
struct Source {
    /// From the package's root, with slashes.
    path: String,
    text: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files_below(directory: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for entry in entries {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_symlink() || name == "target" || name == ".git" {
            continue;
        }
        if path.is_dir() {
            files_below(&path, found);
        } else {
            found.push(path);
        }
    }
}

fn sources(folders: &[&str]) -> Vec<Source> {
    let mut paths = Vec::new();
    folders.iter().for_each(|folder| files_below(&root().join(folder), &mut paths));
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "rs"));
    paths.sort();
    assert!(!paths.is_empty());
    let source = |path: PathBuf| Source {
        text: std::fs::read_to_string(&path).unwrap(),
        path: path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned(),
    };
    paths.into_iter().map(source).collect()
}

impl Source {
    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        (1..).zip(self.text.lines())
    }

    /// Lines without comments; a line is cut where one begins.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        self.lines().map(|(number, line)| (number, without_comment(line)))
    }

    fn is_test(&self) -> bool {
        self.path.ends_with("tests.rs") || self.path.contains("/tests/") || self.path.starts_with("tests/")
    }

    /// Code that is in the library or the program, without unit tests.
    fn shipped_code(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines: Vec<&str> = self.text.lines().collect();
        let inline = |pair: &[&str]| pair[0].starts_with("#[cfg(test)]") && pair[1].ends_with('{');
        let end = lines.windows(2).position(inline).unwrap_or(lines.len());
        let end = if self.is_test() { 0 } else { end };
        self.code().take(end)
    }

    fn is_program(&self) -> bool {
        self.path.starts_with("src/cli/") || self.path == "src/main.rs"
    }

    /// The module of the library right below the crate.
    fn module(&self) -> Option<&str> {
        let inside = self.path.strip_prefix("src/")?;
        let first = inside.split('/').next()?;
        let name = first.strip_suffix(".rs").unwrap_or(first);
        (!self.is_program() && name != "lib").then_some(name)
    }

    /// How many modules are above this file's own: 1 for `src/repo/mod.rs`.
    fn depth(&self) -> usize {
        let parts = self.path.split('/').count() - 1;
        if self.path.ends_with("/mod.rs") { parts - 1 } else { parts }
    }
}

/// Cuts a line where a comment begins; `://` is no comment, nor is what stands in a string before it.
fn without_comment(line: &str) -> &str {
    let start = line.match_indices("//").find(|(at, _)| {
        let before = &line[..*at];
        !before.ends_with(':') && before.matches('"').count().is_multiple_of(2)
    });
    start.map_or(line, |(at, _)| &line[..at])
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

fn identifier(text: &str) -> &str {
    let end = text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len());
    &text[..end]
}

/// Names right behind `prefix::`, also in a group: `prefix::{a::b, c}` gives a and c.
fn names_behind<'a>(code: &'a str, prefix: &str) -> Vec<&'a str> {
    let mut names = Vec::new();
    for (at, _) in code.match_indices(prefix) {
        let whole_word = !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':');
        let rest = &code[at + prefix.len()..];
        match rest.strip_prefix('{') {
            _ if !whole_word => {}
            None => names.push(identifier(rest)),
            Some(group) => {
                let mut depth = 0;
                let mut expect = true;
                for (at, c) in group.char_indices() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => expect = true,
                        c if expect && (c.is_alphabetic() || c == '_') => {
                            names.push(identifier(&group[at..]));
                            expect = false;
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    names
}

/// Every use of another module of the library: by `crate::`, or by enough `super::` to get there.
fn used_modules(source: &Source) -> Vec<String> {
    let code: String = source.code().map(|(_, line)| line.trim().to_owned() + "\n").collect();
    let mut used: Vec<String> = names_behind(&code, "crate::").into_iter().map(str::to_owned).collect();
    // an inline module of tests is one level deeper, so one `super` more gets it there too
    for ups in [source.depth(), source.depth() + 1] {
        let chain = "super::".repeat(ups);
        used.extend(names_behind(&code, &chain).into_iter().map(str::to_owned));
    }
    used.retain(|name| layer(name).is_some());
    used
}

fn assert_none(problems: &[String]) {
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

#[test]
fn modules_use_only_lower_layers() {
    let mut problems = Vec::new();
    for source in sources(&["src"]) {
        let Some(own) = source.module() else { continue };
        let Some(own_layer) = layer(own) else {
            problems
                .push(format!("{}: {own} has no layer: add it to LAYERS and to the crate page", source.path));
            continue;
        };
        for used in used_modules(&source) {
            if used != own && layer(&used).is_none_or(|used| used >= own_layer) {
                problems.push(format!("{} uses {used}, which is not below {own}", source.path));
            }
        }
    }
    problems.dedup();
    assert_none(&problems);
}

/// Cells of the rows of the crate page's table whose first cell begins with `first` and a number.
fn crate_page_rows(first: char) -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(root().join("src/lib.rs")).unwrap();
    let rows = text.lines().filter_map(|line| line.strip_prefix("//! | "));
    let cells = rows.map(|row| row.split('|').map(|cell| cell.trim().to_owned()).collect::<Vec<_>>());
    cells.filter(|row| row[0].strip_prefix(first).is_some_and(|rest| rest.parse::<u8>().is_ok())).collect()
}

fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

#[test]
fn the_crate_page_shows_the_layers() {
    let rows = crate_page_rows('L');
    assert_eq!(rows.len(), LAYERS.len());
    for (row, layer) in rows.iter().zip(LAYERS) {
        assert_eq!(quoted(&row[1]), layer, "{}", row[0]);
    }
}

#[test]
fn the_guards_of_the_invariants_exist() {
    let tests: Vec<String> = sources(&["src", "tests"]).into_iter().map(|source| source.text).collect();
    let rows = crate_page_rows('I');
    assert_eq!(rows.len(), 10);
    for row in rows {
        for guard in quoted(&row[2]) {
            let declared = format!("fn {guard}(");
            assert!(
                tests.iter().any(|text| text.contains(&declared)),
                "{}: there is no test {guard}",
                row[0]
            );
        }
    }
}

#[test]
fn names_in_groups_and_chains_are_found() {
    let names = names_behind("use crate::{error::{Error, Result}, id::PackId};\nx(crate::ops::y)", "crate::");
    assert_eq!(names, ["error", "id", "ops"]);
    assert_eq!(names_behind("othercrate::x", "crate::"), Vec::<&str>::new());
    let source = |path: &str, text: &str| Source { path: path.into(), text: text.into() };
    let sibling = source("src/chunk/frame.rs", "use super::super::nbd::x; // crate::ops\n");
    assert_eq!(used_modules(&sibling), ["nbd"]);
    assert_eq!(used_modules(&source("src/extent.rs", "use super::repo::x;")), ["repo"]);
    assert_eq!(without_comment("let a = \"http://x\"; // y"), "let a = \"http://x\"; ");
}

#[test]
fn the_program_is_apart_from_the_library() {
    let mut problems = Vec::new();
    for source in sources(&["src"]) {
        let main = source.path == "src/main.rs";
        if main && source.text.lines().count() > MAX_MAIN_LINES {
            problems.push(format!("{} has more than {MAX_MAIN_LINES} lines", source.path));
        }
        for (number, line) in source.code() {
            let of_program = ["clap::", "clap_complete::", "clap_mangen::", "indicatif::", "comfy_table::"];
            let named = of_program.iter().find(|name| line.contains(*name));
            if let Some(name) = named.filter(|_| !source.is_program()) {
                problems.push(format!("{}:{number} uses {name} outside of the program", source.path));
            }
        }
    }
    assert_none(&problems);
}

#[test]
fn the_library_neither_prints_nor_asks_the_clock() {
    let forbidden = [
        "println!",
        "eprintln!",
        "print!(",
        "dbg!(",
        "std::env::",
        "env::var",
        "SystemTime::now",
        "Timestamp::now",
        "Zoned::now",
        "process::exit",
    ];
    let mut problems = Vec::new();
    for source in sources(&["src"]).iter().filter(|source| !source.is_program()) {
        for (number, line) in source.shipped_code() {
            for word in forbidden.iter().filter(|word| line.contains(**word)) {
                problems.push(format!("{}:{number} has {word}", source.path));
            }
        }
    }
    assert_none(&problems);
}

#[test]
fn the_format_is_pure() {
    let forbidden = ["std::fs", "std::io", "std::net", "std::time", "std::thread", "getrandom", "Instant"];
    let mut problems = Vec::new();
    for source in sources(&["src/format"]) {
        for (number, line) in source.code() {
            for word in forbidden.iter().filter(|word| line.contains(**word)) {
                problems.push(format!("{}:{number} has {word}", source.path));
            }
        }
    }
    assert_none(&problems);
}

#[test]
fn unsafe_code_is_in_two_files() {
    let mut problems = Vec::new();
    for source in sources(&["src", "tests", "benches"]).iter().filter(|source| !FFI.contains(&&*source.path))
    {
        for (number, line) in source.code() {
            let word = concat!("un", "safe");
            let is_unsafe = [" {", "{", " fn", " impl", " extern", " trait"]
                .iter()
                .any(|behind| line.contains(&format!("{word}{behind}")));
            let is_allowed = line.contains(&format!("allow({word}_code"));
            if is_unsafe || is_allowed {
                problems.push(format!("{}:{number} is {word}", source.path));
            }
        }
    }
    assert_none(&problems);
}

#[test]
fn every_allow_has_a_reason() {
    let mut problems = Vec::new();
    for source in sources(&["src", "tests", "benches"]) {
        let lines: Vec<&str> = source.text.lines().map(str::trim_start).collect();
        for (index, line) in lines.iter().enumerate() {
            if !line.starts_with("#[allow") && !line.starts_with("#![allow") {
                continue;
            }
            let before = index.checked_sub(1).map_or("", |before| lines[before]);
            let commented = before.starts_with("//") && !before.starts_with("///");
            if !commented && !line.contains("// ") && !line.contains("reason = ") {
                problems.push(format!("{}:{}: {line} without a reason", source.path, index + 1));
            }
        }
    }
    assert_none(&problems);
}

/// Returns name and number of lines of every function, by the indentation that rustfmt gives.
fn functions(text: &str) -> Vec<(&str, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        let indent = line.len() - code.len();
        let words: Vec<&str> = code.split(' ').collect();
        let Some(at) = words.iter().position(|word| *word == "fn") else { continue };
        let qualifiers = ["pub", "const", "async", "extern", "default"];
        let known = |word: &&str| {
            qualifiers.contains(word) || word.starts_with("pub(") || *word == concat!("un", "safe")
        };
        if !words[..at].iter().all(|word| known(word) || word.starts_with('"') || *word == "super)") {
            continue;
        }
        let rest = lines[start..].iter().position(|line| {
            let code = line.trim_start();
            let ends = code.starts_with('}') || (code.starts_with(')') && code.ends_with(';'));
            ends && line.len() - code.len() == indent
        });
        let declared = code.ends_with(';') || code.ends_with("{}");
        let len = if declared { 1 } else { rest.map_or(1, |rest| rest + 1) };
        found.push((identifier(words.get(at + 1).copied().unwrap_or_default()), len));
    }
    found
}

#[test]
fn files_and_functions_stay_short() {
    let mut problems = Vec::new();
    for source in sources(&["src", "tests", "benches"]) {
        let lines = source.text.lines().count();
        if lines > MAX_FILE_LINES {
            problems.push(format!("{} has {lines} lines, at most {MAX_FILE_LINES} are wanted", source.path));
        }
        for (name, lines) in functions(&source.text) {
            if lines > MAX_FUNCTION_LINES {
                problems.push(format!("{}: {name} has {lines} lines", source.path));
            }
        }
    }
    assert_none(&problems);
}

#[test]
fn functions_are_measured() {
    let text = "impl A {\n    pub(super) fn long(\n        a: u8,\n    ) -> u8 {\n        a\n    }\n    fn declared(&self);\n}\n\
                fn one() {}\ntrait B {\n    fn wide(\n        a: u8,\n    ) -> u8;\n}\nlet f: fn() = x;\n";
    assert_eq!(functions(text), [("long", 5), ("declared", 1), ("one", 1), ("wide", 3)]);
}

#[test]
fn tests_can_fail_and_nothing_is_left_unfinished() {
    let mut problems = Vec::new();
    for source in sources(&["src", "tests", "benches"]) {
        for (number, line) in source.lines() {
            let code = line.trim();
            let ignored = code == concat!("#[ign", "ore]");
            let idle = code.starts_with("matches!(") && code.ends_with(");");
            let unfinished = [concat!("to", "do!("), concat!("unimpl", "emented!("), concat!("FIX", "ME")];
            if ignored || idle || unfinished.iter().any(|word| line.contains(word)) {
                problems.push(format!("{}:{number}: {code}", source.path));
            }
        }
    }
    assert_none(&problems);
}

#[test]
fn the_package_stands_alone() {
    // in two halves, so that this file does not find itself
    let forbidden = [
        concat!("/wo", "rk/"),
        concat!("/tmp/", "h/"),
        concat!("../", "shared"),
        concat!(".lib", "rary/"),
        concat!("artif", "actory"),
        concat!("index.", "crates.io"),
        concat!("deb.", "debian.org"),
        concat!("registry.", "npmjs"),
        concat!("files.", "pythonhosted"),
        concat!("Cla", "ude"),
        concat!("Anth", "ropic"),
        concat!("Chat", "GPT"),
    ];
    let mut paths = Vec::new();
    files_below(root(), &mut paths);
    let mut problems = Vec::new();
    for path in paths {
        let name = path.strip_prefix(root()).unwrap().display().to_string();
        if name.starts_with(".ci/") || name.starts_with("tests/fixtures/") {
            continue;
        }
        let text = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
        for word in forbidden.iter().filter(|word| text.contains(**word)) {
            problems.push(format!("{name} mentions {word}"));
        }
    }
    assert_none(&problems);
}

//! The documents for users: the program knows their commands and options, their links lead somewhere, and the first
//! backup that the README shows works as it is written.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::{Lab, VMKEEP, run};

/// Documents whose links are followed, beside those in `docs/`.
const DOCUMENTS: [&str; 5] =
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "repo-format.md"];

/// A document; a line is prose, or in a fenced block of a language.
struct Document {
    path: PathBuf,
    lines: Vec<(usize, Option<String>, String)>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

impl Document {
    fn read(path: PathBuf) -> Self {
        let text =
            std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut fence: Option<String> = None;
        let mut lines = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            match line.trim_start().strip_prefix("```") {
                Some(language) => fence = fence.is_none().then(|| language.trim().to_owned()),
                None => lines.push((number, fence.clone(), line.to_owned())),
            }
        }
        assert!(fence.is_none(), "{}: a fence is left open", path.display());
        Self { path, lines }
    }

    fn at(&self, number: usize) -> String {
        format!("{}:{number}", self.path.strip_prefix(root()).unwrap().display())
    }

    fn prose(&self) -> impl Iterator<Item = (usize, &str)> {
        self.lines
            .iter()
            .filter(|(_, fence, _)| fence.is_none())
            .map(|(number, _, line)| (*number, line.as_str()))
    }

    /// Commands of vmkeep: in blocks of a shell, and as code that begins with `vmkeep ` in the text.
    fn commands(&self) -> Vec<(usize, String)> {
        let mut found = Vec::new();
        for (number, fence, line) in &self.lines {
            match fence.as_deref() {
                Some("console" | "sh") => {
                    let line = line.trim_start();
                    found.push((*number, line.strip_prefix("$ ").unwrap_or(line).to_owned()));
                }
                Some(_) => {}
                None => {
                    found.extend(line.split('`').skip(1).step_by(2).map(|code| (*number, code.to_owned())))
                }
            }
        }
        found.retain(|(_, command)| command.starts_with("vmkeep "));
        found
    }

    /// Names of the headings, as a host of repositories makes them.
    fn anchors(&self) -> Vec<String> {
        let mut seen: HashMap<String, usize> = HashMap::new();
        let headings = self.prose().filter_map(|(_, line)| {
            line.trim_start_matches('#').strip_prefix(' ').filter(|_| line.starts_with('#'))
        });
        let slugs = headings.map(|heading| {
            let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
            let slug = kept.collect::<String>().trim().to_lowercase().replace(' ', "-");
            let again = seen.entry(slug.clone()).or_default();
            *again += 1;
            if *again == 1 { slug } else { format!("{slug}-{}", *again - 1) }
        });
        slugs.collect()
    }

    /// Targets of links that stay in the repository.
    fn links(&self) -> Vec<(usize, &str)> {
        let mut found = Vec::new();
        for (number, line) in self.prose() {
            let targets =
                line.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target);
            found.extend(targets.filter(|target| !target.contains("://")).map(|target| (number, target)));
        }
        found
    }
}

fn in_docs() -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    paths.sort();
    paths
}

/// What a command takes, by its own help.
struct Help {
    subcommands: Vec<String>,
    /// Each name of an option, and whether a value follows it.
    options: BTreeMap<String, bool>,
}

impl Help {
    fn of(subcommands: &[&str]) -> Self {
        Self::read(&run(Command::new(VMKEEP).args(subcommands).arg("--help")))
    }

    fn read(text: &str) -> Self {
        let mut help = Self { subcommands: Vec::new(), options: BTreeMap::new() };
        let (mut in_commands, mut last_takes_value) = (false, false);
        for line in text.lines() {
            let code = line.trim();
            let aliases = || bracketed(code).flat_map(|list| list.split(", "));
            if line.starts_with("Commands:") {
                in_commands = true;
            } else if !line.starts_with(' ') {
                in_commands = false;
            } else if in_commands {
                help.subcommands.extend(code.split(' ').next().map(str::to_owned));
                help.subcommands.extend(aliases().map(str::to_owned));
            } else if code.starts_with('-') {
                let names = code.split("  ").next().unwrap_or(code);
                last_takes_value = names.contains('<');
                let names = names.split([' ', ',']).filter(|word| word.starts_with('-'));
                help.options.extend(names.chain(aliases()).map(|name| (name.to_owned(), last_takes_value)));
            } else {
                help.options.extend(aliases().map(|name| (name.to_owned(), last_takes_value)));
            }
        }
        help
    }
}

/// The lists in `[alias: a, b]` and `[aliases: a, b]`.
fn bracketed(line: &str) -> impl Iterator<Item = &str> {
    line.split('[').skip(1).filter_map(|part| {
        let (kind, list) = part.split_once(']')?.0.split_once(": ")?;
        matches!(kind, "alias" | "aliases").then_some(list)
    })
}

/// Returns what is wrong with a command line, if anything is.
fn check(command: &str) -> Option<String> {
    let end = command.find([';', '|', '&', '>', '#']).unwrap_or(command.len());
    let mut path: Vec<&str> = Vec::new();
    let mut help = Help::of(&path);
    let mut words = command[..end].split_whitespace().skip(1);
    while let Some(word) = words.next() {
        if word.starts_with('-') && word.len() > 1 {
            let (name, value) = word.split_once('=').map_or((word, false), |(name, _)| (name, true));
            match help.options.get(name) {
                Some(takes_value) if *takes_value && !value => _ = words.next(),
                Some(_) => {}
                None => return Some(format!("`vmkeep {}` has no option {name}", path.join(" "))),
            }
        } else if !help.subcommands.is_empty() {
            if !help.subcommands.iter().any(|known| known == word) {
                return Some(format!("`vmkeep {}` has no command {word}", path.join(" ")));
            }
            if word != "help" {
                path.push(word);
                help = Help::of(&path);
            }
        }
    }
    None
}

#[test]
fn the_program_knows_what_the_documents_say() {
    let mut problems = Vec::new();
    let mut count = 0;
    let documents = DOCUMENTS.iter().map(|name| root().join(name)).chain(in_docs());
    for document in documents.map(Document::read) {
        for (number, command) in document.commands() {
            count += 1;
            problems
                .extend(check(&command).map(|what| format!("{}: {command}: {what}", document.at(number))));
        }
    }
    assert!(count > 30, "only {count} commands were found");
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

#[test]
fn links_lead_somewhere() {
    let mut problems = Vec::new();
    let mut count = 0;
    let documents = DOCUMENTS.iter().map(|name| root().join(name)).chain(in_docs());
    for document in documents.map(Document::read) {
        for (number, target) in document.links() {
            count += 1;
            let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
            let path = match file {
                "" => document.path.clone(),
                file => document.path.parent().unwrap().join(file),
            };
            if !path.exists() {
                problems.push(format!("{}: there is no {file}", document.at(number)));
            } else if !anchor.is_empty()
                && !Document::read(path).anchors().iter().any(|known| known == anchor)
            {
                problems.push(format!("{}: {target} names no heading", document.at(number)));
            }
        }
    }
    assert!(count > 50, "only {count} links were found");
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

#[test]
fn what_is_wrong_is_noticed() {
    for wrong in [
        "vmkeep backup --encrypt web01",
        "vmkeep repair disks",
        "vmkeep -r /x backup -l full --keep",
        "vmkeep config edit",
    ] {
        assert!(check(wrong).is_some(), "{wrong}");
    }
    for right in [
        "vmkeep -r /x ls",
        "vmkeep backup -l=full web01 --repo /x # --no",
        "vmkeep help backup",
        "vmkeep config show",
    ] {
        assert_eq!(check(right), None, "{right}");
    }
    let lines = ["# A `b`, c", "## A b c", "[x](#a-b-c-1)"].map(|line| (1, None, line.to_owned()));
    let document = Document { path: root().join("README.md"), lines: lines.into() };
    assert_eq!(document.anchors(), ["a-b-c", "a-b-c-1"]);
    assert_eq!(document.links(), [(1, "#a-b-c-1")]);
}

#[test]
fn the_first_backup_of_the_readme_works() {
    let lab = Lab::start();
    lab.cmd(&["define", "web01", "vda:qcow2:64M", "vdb:raw:16M"]);
    lab.write("web01", "vda", "1M", "2M", "0x11");
    let directory = tempfile::tempdir().unwrap();
    let truth = directory.path().join("truth.raw");
    lab.truth("web01", "vda", &truth);
    let readme = Document::read(root().join("README.md"));
    let lines = readme.lines.iter().filter(|(_, fence, _)| fence.as_deref() == Some("console"));
    let commands: Vec<&str> = lines.filter_map(|(_, _, line)| line.strip_prefix("$ ")).collect();
    assert_eq!(commands.len(), 10, "{commands:?}");
    let home = directory.path().to_str().unwrap();
    let script = commands.join("\n").replace("/srv/", &format!("{home}/"));
    let program = Path::new(VMKEEP).parent().unwrap();
    let path = std::env::var("PATH").unwrap();
    run(Command::new("bash")
        .args(["-e", "-c", &script])
        .env("PATH", format!("{}:{path}", program.display()))
        .env("HOME", home)
        .env("LIBVIRT_DEFAULT_URI", lab.uri())
        .env_remove("XDG_CONFIG_HOME")
        .env_remove("XDG_CACHE_HOME")
        .env_remove("VMKEEP_CACHE_DIR"));
    let restored = directory.path().join("restored/vda.raw");
    run(Command::new("cmp").arg(truth).arg(restored));
}

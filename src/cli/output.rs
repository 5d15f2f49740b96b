//! What goes to stdout: tables for people, JSON for programs.

use std::io::{IsTerminal, Write};

use comfy_table::{CellAlignment, ContentArrangement};
use serde::Serialize;
use vmkeep::error::{Error, Result};

/// Version of the JSON documents; it changes when a field goes away or changes its meaning.
pub const SCHEMA: u32 = 1;

/// Where and how much to print.
#[derive(Debug, Clone)]
pub struct Output {
    pub json: bool,
    pub quiet: bool,
    pub verbose: bool,
}

/// A JSON document or line: its body and the version.
#[derive(Serialize)]
struct Versioned<'a, T: Serialize> {
    schema: u32,
    #[serde(flatten)]
    body: &'a T,
}

impl Output {
    /// Returns an output for a program that could not even read its arguments.
    pub fn json_only() -> Self {
        Self { json: true, quiet: false, verbose: false }
    }

    /// Prints one JSON object, with `schema` added, on one line.
    ///
    /// # Errors
    /// [`Error::Io`] if stdout cannot be written.
    pub fn json_line<T: Serialize>(&self, body: &T) -> Result<()> {
        let mut line = serde_json::to_vec(&Versioned { schema: SCHEMA, body })
            .map_err(|error| Error::io("write", "standard output", error.into()))?;
        line.push(b'\n');
        self.bytes(&line)
    }

    /// Prints text with a line end.
    ///
    /// # Errors
    /// [`Error::Io`] if stdout cannot be written.
    pub fn line(&self, text: &str) -> Result<()> {
        self.bytes(format!("{}\n", printable(text)).as_bytes())
    }

    /// Prints bytes as they are.
    ///
    /// # Errors
    /// [`Error::Io`] if stdout cannot be written.
    pub fn bytes(&self, bytes: &[u8]) -> Result<()> {
        let mut stdout = std::io::stdout().lock();
        stdout
            .write_all(bytes)
            .and_then(|()| stdout.flush())
            .map_err(|error| Error::io("write", "standard output", error))
    }

    /// Says something about the run that is neither its result nor an error; on stderr, not with `-q`.
    pub fn remark(&self, text: &str) {
        if !self.quiet {
            let _ = writeln!(std::io::stderr(), "{}", printable(text));
        }
    }
}

/// Asks on a terminal; returns `None` where there is none to ask on.
pub fn confirm(question: &str) -> Option<bool> {
    if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return None;
    }
    let _ = write!(std::io::stderr(), "{} [y/N] ", printable(question));
    let mut answer = String::new();
    // a terminal that cannot be read has not agreed
    let read = std::io::stdin().read_line(&mut answer);
    Some(read.is_ok() && matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// Replaces control characters other than line ends and tabs: what comes from a repository or a domain may not
/// steer the terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}

/// A table without lines: columns two blanks apart, as wide as the terminal at most, one line a row when piped.
pub struct Table {
    inner: comfy_table::Table,
    right: Vec<bool>,
}

impl Table {
    /// Creates a table; a title that starts with `>` makes a column of numbers, set to the right.
    pub fn new(titles: &[&str]) -> Self {
        let mut inner = comfy_table::Table::new();
        inner.load_style(comfy_table::presets::NOTHING);
        match terminal_width() {
            Some(width) => inner.set_content_arrangement(ContentArrangement::Dynamic).set_width(width),
            None => inner.set_content_arrangement(ContentArrangement::Disabled),
        };
        let right: Vec<bool> = titles.iter().map(|title| title.starts_with('>')).collect();
        inner.set_header(titles.iter().map(|title| title.trim_start_matches('>')));
        Self { inner, right }
    }

    /// Adds a row, which should have a cell for each title.
    pub fn row<S: AsRef<str>>(&mut self, cells: impl IntoIterator<Item = S>) {
        // a line end in a cell would break the line that a script expects
        let cells = cells.into_iter().map(|cell| printable(cell.as_ref()).replace(['\n', '\t'], " "));
        self.inner.add_row(cells);
    }

    /// Returns the text, without blanks at the ends of lines.
    pub fn render(mut self) -> String {
        for (number, right) in self.right.iter().enumerate() {
            if let Some(column) = self.inner.column_mut(number) {
                column.set_padding((0, 2));
                if *right {
                    column.set_cell_alignment(CellAlignment::Right);
                }
            }
        }
        self.inner.lines().map(|line| format!("{}\n", line.trim_end())).collect()
    }
}

fn terminal_width() -> Option<u16> {
    let stdout = std::io::stdout();
    if !stdout.is_terminal() {
        return None;
    }
    // narrower than this no table is readable, whatever the terminal says
    rustix::termios::tcgetwinsize(stdout).ok().map(|size| size.ws_col.max(60))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piped_table_has_one_line_a_row() {
        let mut table = Table::new(&["ID", ">SIZE"]);
        table.row(["a".repeat(200).as_str(), "1"]);
        table.row(["b\nc", "100"]);
        let text = table.render();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[1].ends_with("  1") && lines[2].starts_with("b c "));
        assert!(lines.iter().all(|line| *line == line.trim_end()));
    }

    #[test]
    fn the_terminal_is_not_steered() {
        assert_eq!(printable("a\u{1b}[31mb\n"), "a\u{fffd}[31mb\n");
    }
}

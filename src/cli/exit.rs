//! How the program ends: exit codes, and how errors are told.

use std::io::Write;
use std::process::ExitCode;

use serde::Serialize;
use vmkeep::error::{Error, ErrorClass};

use super::output::{Output, printable};

/// Exit codes; restic's, extended. They are part of the interface: scripts depend on them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    Done = 0,
    Failed = 1,
    Usage = 2,
    /// Finished, but something was left out or, with `--strict`, not done as it was asked for; `doctor` left something
    /// that is wrong.
    Incomplete = 3,
    Damage = 4,
    NoRepository = 10,
    FencedOrBusy = 11,
    WrongKey = 12,
    DomainUnreachable = 13,
    Cancelled = 130,
}

impl Exit {
    /// Returns the number.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// Returns the code that an error ends the program with.
    pub fn of(error: &Error) -> Self {
        match error.class() {
            ErrorClass::Failed => Self::Failed,
            ErrorClass::Usage => Self::Usage,
            ErrorClass::Damage => Self::Damage,
            ErrorClass::NoRepository => Self::NoRepository,
            ErrorClass::FencedOrBusy => Self::FencedOrBusy,
            ErrorClass::WrongKey => Self::WrongKey,
            ErrorClass::DomainUnreachable => Self::DomainUnreachable,
            ErrorClass::Cancelled => Self::Cancelled,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// An error as `--json` prints it.
#[derive(Debug, Serialize)]
struct ErrorView<'a> {
    message_type: &'static str,
    /// What failed: the domain of a backup, where several run.
    #[serde(skip_serializing_if = "Option::is_none")]
    object: Option<&'a str>,
    error: String,
    causes: Vec<String>,
    hint: Option<String>,
    exit_code: u8,
}

/// Tells an error on stderr and, with `--json`, as a line on stdout; returns what to exit with.
pub fn report(output: &Output, object: Option<&str>, error: &Error) -> Exit {
    let exit = Exit::of(error);
    if is_closed_pipe(error) {
        // whoever read our output has seen enough, and wants no message about it
        return exit;
    }
    let causes = causes(error);
    let mut text = match object {
        Some(object) => format!("error: {object}: {error}\n"),
        None => format!("error: {error}\n"),
    };
    for cause in &causes {
        text.push_str(&format!("caused by: {cause}\n"));
    }
    if let Some(hint) = error.hint() {
        text.push_str(&format!("hint: {hint}\n"));
    }
    // nothing can be done about a stderr that cannot be written
    let _ = std::io::stderr().write_all(printable(&text).as_bytes());
    if output.json {
        let view = ErrorView {
            message_type: "error",
            object,
            error: error.to_string(),
            causes,
            hint: error.hint(),
            exit_code: exit.code(),
        };
        let _ = output.json_line(&view);
    }
    exit
}

/// Tells a mistake in the arguments; help and version texts come this way, too.
pub fn report_usage(error: &clap::Error, json: bool) -> Exit {
    let exit = if error.use_stderr() { Exit::Usage } else { Exit::Done };
    let _ = error.print();
    if json && exit == Exit::Usage {
        let text = error.to_string();
        let message = text.lines().next().unwrap_or_default();
        let view = ErrorView {
            message_type: "error",
            object: None,
            error: message.strip_prefix("error: ").unwrap_or(message).to_owned(),
            causes: Vec::new(),
            hint: None,
            exit_code: exit.code(),
        };
        let _ = Output::json_only().json_line(&view);
    }
    exit
}

fn causes(error: &Error) -> Vec<String> {
    let mut causes = Vec::new();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        causes.push(cause.to_string());
        next = cause.source();
    }
    causes
}

fn is_closed_pipe(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if source.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_codes_are_those_that_are_documented() {
        let code = |error: Error| Exit::of(&error).code();
        assert_eq!(code(Error::Usage("x".into())), 2);
        assert_eq!(code(Error::Damaged("x".into())), 4);
        assert_eq!(code(Error::NoRepository { url: "/x".into() }), 10);
        assert_eq!(code(Error::Busy { object: "x".into(), why: "y".into() }), 11);
        assert_eq!(code(Error::Unreachable { object: "x".into(), reason: "y".into() }), 13);
        assert_eq!(code(Error::Cancelled), 130);
        assert_eq!(code(Error::NotFound { object: "x".into() }), 1);
    }

    #[test]
    fn causes_are_listed_from_the_outside_in() {
        let source = std::io::Error::other("disk on fire");
        let error = Error::io("read", "/x", source);
        let error = Error::Context { context: "while looking".into(), source: Box::new(error) };
        assert_eq!(causes(&error), ["cannot read /x", "disk on fire"]);
    }
}

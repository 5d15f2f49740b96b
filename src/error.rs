//! Errors, named by the object that is wrong and not by the library that noticed.
//!
//! Messages are lower case, name the object and, where two values disagree, both. What helps is not in
//! the message but in [`Error::hint`]; what it led to is added by [`Context::context`] and chained.

use std::fmt;
use std::io;

use crate::id::{ChunkId, SessionId};

/// What the library returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What is wrong with the bytes of an object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatFault {
    #[error("the magic is {found:02x?}, expected {expected:02x?}")]
    Magic { found: Vec<u8>, expected: Vec<u8> },
    #[error("format version {found} is not known, this program reads up to {supported}")]
    Version { found: u16, supported: u16 },
    #[error("it needs the features {unknown:#x}, which this program does not know")]
    Features { unknown: u64 },
    #[error("it belongs to repository {found}, not to {expected}")]
    ForeignRepository { found: String, expected: String },
    #[error("it ends after {found} bytes, {needed} are needed")]
    Truncated { found: u64, needed: u64 },
    #[error("{extra} bytes follow its end")]
    Trailing { extra: u64 },
    #[error("{what} is {found}, at most {max} is allowed")]
    TooLarge { what: &'static str, found: u64, max: u64 },
    #[error("{what} is {found}, expected {expected}")]
    Mismatch { what: &'static str, found: String, expected: String },
    #[error("{what} is not valid: {found}")]
    Invalid { what: &'static str, found: String },
    #[error("its checksum does not match its content")]
    Checksum,
    #[error("its content does not have the chunk id {expected}")]
    ChunkId { expected: ChunkId },
    #[error("compression method {0} is not known")]
    Codec(u8),
    #[error("it is sealed by method {0}, which this program cannot open")]
    Seal(u8),
    #[error("it does not decompress to the {expected} bytes that it states")]
    Decompress { expected: u64 },
    #[error("it cannot be decoded: {0}")]
    Decode(String),
}

/// Everything that can go wrong, by object.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {object}")]
    Io {
        action: &'static str,
        object: String,
        #[source]
        source: io::Error,
    },
    #[error("{object} does not exist")]
    NotFound { object: String },
    #[error("{object} exists already")]
    Exists { object: String },
    /// Bytes that are not what they should be: damage, truncation, another version, an attack.
    #[error("{object}: {fault}")]
    Malformed { object: String, fault: FormatFault },
    #[error("chunk {id} of {wanted_by} is nowhere in the repository")]
    MissingChunk { id: ChunkId, wanted_by: String },
    #[error("there is no vmkeep repository at {url}")]
    NoRepository { url: String },
    #[error("session {session} was fenced by {by}: {why}")]
    Fenced { session: SessionId, by: String, why: String },
    #[error("{object} is busy: {why}")]
    Busy { object: String, why: String },
    /// An NBD server broke the protocol or reported an error.
    #[error("NBD server {peer}: {reason}")]
    Nbd { peer: String, reason: String },
    /// libvirt refused; `code` is its `virErrorNumber`.
    #[error("libvirt cannot {action} {object} (code {code}): {message}")]
    Libvirt { action: &'static str, object: String, code: i32, message: String },
    #[error("{object} cannot be reached: {reason}")]
    Unreachable { object: String, reason: String },
    /// A helper program (qemu-nbd, qemu-img) failed.
    #[error("{program} failed ({status}): {stderr}")]
    Command { program: String, status: String, stderr: String },
    #[error("{selector:?} fits {}", describe_candidates(.candidates))]
    Selector { selector: String, candidates: Vec<String> },
    /// The request makes no sense; nothing was done.
    #[error("{0}")]
    Usage(String),
    /// The request cannot be carried out in this state of things; nothing was done.
    #[error("{object}: {reason}")]
    Refused { object: String, reason: String, hint: Option<String> },
    #[error("damage: {0}")]
    Damaged(String),
    #[error("cancelled")]
    Cancelled,
    #[error("{context}")]
    Context {
        context: String,
        #[source]
        source: Box<Error>,
    },
}

fn describe_candidates(candidates: &[String]) -> String {
    if candidates.is_empty() {
        return "no point".into();
    }
    format!("{} points: {}", candidates.len(), candidates.join(", "))
}

/// What kind of failure it is; the binary turns it into an exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    Failed,
    Usage,
    Damage,
    NoRepository,
    FencedOrBusy,
    WrongKey,
    DomainUnreachable,
    Cancelled,
}

impl Error {
    /// Wraps an I/O error with what was done to which object.
    pub fn io(action: &'static str, object: impl fmt::Display, source: io::Error) -> Self {
        Self::Io { action, object: object.to_string(), source }
    }

    /// Names the object whose bytes are at fault.
    pub fn malformed(object: impl fmt::Display, fault: FormatFault) -> Self {
        Self::Malformed { object: object.to_string(), fault }
    }

    /// An NBD server that broke the protocol or reported an error.
    pub fn nbd(peer: impl fmt::Display, reason: impl fmt::Display) -> Self {
        Self::Nbd { peer: peer.to_string(), reason: reason.to_string() }
    }

    /// Returns the class of the innermost cause that has one.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Context { source, .. } => source.class(),
            Self::Usage(_) | Self::Selector { .. } => ErrorClass::Usage,
            Self::Damaged(_) | Self::Malformed { .. } | Self::MissingChunk { .. } => ErrorClass::Damage,
            Self::NoRepository { .. } => ErrorClass::NoRepository,
            Self::Fenced { .. } | Self::Busy { .. } => ErrorClass::FencedOrBusy,
            Self::Libvirt { .. } | Self::Unreachable { .. } => ErrorClass::DomainUnreachable,
            Self::Cancelled => ErrorClass::Cancelled,
            _ => ErrorClass::Failed,
        }
    }

    /// Returns true if the storage has no space left.
    pub fn is_storage_full(&self) -> bool {
        match self {
            Self::Context { source, .. } => source.is_storage_full(),
            Self::Io { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            _ => false,
        }
    }

    /// Returns the error with everything that led to it, in one line.
    pub fn cause(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        text
    }

    /// Returns true if the system has refused a call.
    pub fn is_io(&self) -> bool {
        match self {
            Self::Context { source, .. } => source.is_io(),
            _ => matches!(self, Self::Io { .. }),
        }
    }

    /// Returns true if this process or this host is the reason, and the object may be as it should be: something is not
    /// permitted, there are too many open files or too little memory, or nobody answered in time.
    pub fn is_local(&self) -> bool {
        use rustix::io::Errno;
        match self {
            Self::Context { source, .. } => source.is_local(),
            Self::Io { source, .. } => {
                let errno = source.raw_os_error().map(Errno::from_raw_os_error);
                let exhausted = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::AGAIN, Errno::STALE];
                errno.is_some_and(|errno| exhausted.contains(&errno))
                    || matches!(source.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::TimedOut)
            }
            _ => false,
        }
    }

    /// Returns true if what was written may not survive a power cut, although it is there.
    pub fn is_failed_sync(&self) -> bool {
        match self {
            Self::Context { source, .. } => source.is_failed_sync(),
            Self::Io { action, .. } => *action == "sync",
            _ => false,
        }
    }

    /// Returns true if an object of the repository is missing or not what it should be.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Context { source, .. } => source.is_damage(),
            Self::Malformed { .. } | Self::MissingChunk { .. } | Self::Damaged(_) => true,
            _ => false,
        }
    }

    /// Returns the command or change that helps, where one is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Context { source, .. } => source.hint(),
            Self::Refused { hint, .. } => hint.clone(),
            Self::NoRepository { .. } => {
                Some("create one with `vmkeep init`, or name it with -r or VMKEEP_REPOSITORY".into())
            }
            Self::Fenced { .. } => Some("run the backup again: what it stored is reused".into()),
            Self::MissingChunk { .. } => {
                Some("`vmkeep verify --structure` names every point it affects".into())
            }
            Self::Selector { candidates, .. } if candidates.is_empty() => {
                Some("`vmkeep points` lists what there is".into())
            }
            Self::Selector { .. } => {
                Some("name the point by more digits of its id; DOMAIN~0 is the newest of a domain".into())
            }
            _ => None,
        }
    }
}

/// Adds what was being done to an error on its way up.
pub trait Context<T> {
    /// Wraps the error with a description that is only built when there is one.
    ///
    /// # Errors
    /// Returns the error it was given, wrapped. [`Error::Cancelled`] passes unchanged: nobody needs to
    /// know where a cancellation was noticed.
    fn context<S: Into<String>>(self, context: impl FnOnce() -> S) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn context<S: Into<String>>(self, context: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|source| match source {
            Error::Cancelled => Error::Cancelled,
            source => Error::Context { context: context().into(), source: Box::new(source) },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_keeps_the_class_and_the_hint() {
        let inner: Result<()> = Err(Error::NoRepository { url: "/x".into() });
        let outer = inner.context(|| "while looking").unwrap_err();
        assert_eq!(outer.class(), ErrorClass::NoRepository);
        assert!(outer.hint().is_some());
        assert_eq!(outer.to_string(), "while looking");
    }

    #[test]
    fn an_ambiguous_selector_lists_its_candidates() {
        let error = Error::Selector { selector: "ab".into(), candidates: vec!["ab1".into(), "ab2".into()] };
        assert_eq!(error.to_string(), "\"ab\" fits 2 points: ab1, ab2");
    }
}

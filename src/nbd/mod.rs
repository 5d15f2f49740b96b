//! An NBD client: what a running domain's backup job, `qemu-nbd` or any other server exports.
//!
//! Newstyle fixed handshake with `NBD_OPT_GO`, structured replies, several metadata contexts at once,
//! extended headers where the server has them; no TLS. The protocol is `doc/proto.md` of the
//! [NetworkBlockDevice](https://github.com/NetworkBlockDevice/nbd) project, called "the specification" here.
//!
//! The server is not trusted. Whatever it sends, the client
//! * allocates at most [`MAX_OPTION_REPLY_BYTES`] per option reply, [`MAX_STATUS_EXTENTS`] descriptors per
//!   context and status reply, [`MAX_ERROR_PAYLOAD_BYTES`] per error, and for reads what it asked for;
//! * waits at most [`Options::timeout`] for the next byte, and for the handshake as a whole;
//! * accepts a reply only if it covers every byte that was asked for, exactly once.
//!
//! An error ends the connection: replies still on their way can no longer be told from later ones.

mod connection;
mod handshake;
mod reply;
mod uri;
mod wire;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

pub use crate::buffer::Payload;
pub use connection::Connection;
pub use uri::NbdUri;

/// The port of NBD over TCP.
pub const DEFAULT_PORT: u16 = 10809;
/// The window of a disk that no buffer of a read crosses, and the longest read request.
pub const WINDOW_BYTES: u64 = 1 << 20;
/// The number of requests that one connection has on their way: beyond 8 of 1 MiB nothing gets faster.
pub const IN_FLIGHT: usize = 8;
/// The longest string of the protocol: names, contexts, messages.
pub const MAX_STRING_BYTES: usize = 4096;
/// The longest option reply that is accepted: a string and some fixed fields.
pub const MAX_OPTION_REPLY_BYTES: u32 = 4096 + 64;
/// The longest payload of an error chunk that is accepted.
pub const MAX_ERROR_PAYLOAD_BYTES: u64 = 4096 + 64;
/// The most extents of one context in one reply; QEMU sends up to 128 Ki, nbdkit up to 1 Mi.
pub const MAX_STATUS_EXTENTS: u64 = 1 << 20;
/// The most chunks in one reply: for a read of 1 MiB one per 128 bytes, servers send one per 512 at most.
pub const MAX_REPLY_CHUNKS: u32 = 8192;
/// The largest disk: file offsets are signed everywhere below us.
pub const MAX_DISK_BYTES: u64 = i64::MAX as u64;

/// The name of the metadata context that tells holes and zeroes from data.
pub const ALLOCATION_CONTEXT: &str = "base:allocation";
/// What precedes a bitmap's name in the name of QEMU's metadata context.
pub const DIRTY_BITMAP_PREFIX: &str = "qemu:dirty-bitmap:";
/// In [`ALLOCATION_CONTEXT`]: not allocated. Says nothing about the content unless [`STATE_ZERO`] is set.
pub const STATE_HOLE: u64 = 1;
/// In [`ALLOCATION_CONTEXT`]: reads as zeroes.
pub const STATE_ZERO: u64 = 2;
/// In a dirty bitmap's context: written since the bitmap began.
pub const STATE_DIRTY: u64 = 1;

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// A host name or literal address (IPv6 without brackets) and a port.
    Tcp { host: String, port: u16 },
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// How to talk to a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The longest wait for the next byte, and for the whole handshake.
    pub timeout: Duration,
    /// Asks for extended headers; a server that does not know them is talked to without.
    pub extended_headers: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(120), extended_headers: true }
    }
}

/// What a server says about its export: the transmission flags of the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportFlags(pub u16);

impl ExportFlags {
    const HAS_FLAGS: u16 = 1 << 0;
    const READ_ONLY: u16 = 1 << 1;
    const FLUSH: u16 = 1 << 2;
    const WRITE_ZEROES: u16 = 1 << 6;
    const MULTI_CONN: u16 = 1 << 8;

    /// Returns true if the export cannot be written.
    pub fn is_read_only(self) -> bool {
        self.0 & Self::READ_ONLY != 0
    }

    /// Returns true if writes can be made durable.
    pub fn can_flush(self) -> bool {
        self.0 & Self::FLUSH != 0
    }

    /// Returns true if zeroes need not be sent.
    pub fn can_write_zeroes(self) -> bool {
        self.0 & Self::WRITE_ZEROES != 0
    }

    /// Returns true if several connections see one another's flushed writes.
    pub fn can_multi_conn(self) -> bool {
        self.0 & Self::MULTI_CONN != 0
    }
}

#[cfg(test)]
mod tests;

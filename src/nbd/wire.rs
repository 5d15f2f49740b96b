//! The socket: blocking reads and writes that end when time is up or the work is cancelled.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::{Address, Options, WINDOW_BYTES};
use crate::buffer::{Buffer, BufferPool};
use crate::error::{Error, Result};
use crate::monitor::Monitor;

/// Memory of shorter buffers is not used again, bytes: new memory need not be filled before it is read into.
const MIN_REUSED_LEN: usize = 512 << 10;

/// How often a wait looks whether it is to end.
const TICK: Duration = Duration::from_millis(100);

#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// A connected socket.
#[derive(Debug)]
pub(super) struct Wire {
    stream: Stream,
    peer: String,
    timeout: Duration,
    pool: Arc<BufferPool>,
    /// The instant at which the handshake has to be over.
    deadline: Option<Instant>,
}

impl Wire {
    /// Connects; the handshake's time begins here.
    pub(super) fn connect(address: &Address, options: &Options, monitor: &dyn Monitor) -> Result<Self> {
        let deadline = Instant::now().checked_add(options.timeout);
        let fail = |error| Error::io("connect to", format!("NBD server {address}"), error);
        let stream = match address {
            Address::Unix(path) => Stream::Unix(connect_unix(path, deadline, monitor)?.map_err(fail)?),
            Address::Tcp { host, port } => {
                let stream = connect_tcp(host, *port, deadline, monitor)?.map_err(fail)?;
                stream.set_nodelay(true).map_err(fail)?;
                Stream::Tcp(stream)
            }
        };
        let pool = BufferPool::new(usize::try_from(WINDOW_BYTES).unwrap_or(0));
        let wire = Self { stream, peer: address.to_string(), timeout: options.timeout, pool, deadline };
        wire.set_tick(TICK).map_err(fail)?;
        Ok(wire)
    }

    fn set_tick(&self, tick: Duration) -> io::Result<()> {
        match &self.stream {
            Stream::Unix(stream) => {
                stream.set_read_timeout(Some(tick))?;
                stream.set_write_timeout(Some(tick))
            }
            Stream::Tcp(stream) => {
                stream.set_read_timeout(Some(tick))?;
                stream.set_write_timeout(Some(tick))
            }
        }
    }

    /// Ends the time limit of the handshake; that of every single wait stays.
    pub(super) fn handshake_is_over(&mut self) {
        self.deadline = None;
    }

    /// Returns an error of this server.
    pub(super) fn error(&self, reason: impl Into<String>) -> Error {
        Error::nbd(&self.peer, reason.into())
    }

    /// Fills `buffer`.
    pub(super) fn read_exact(
        &mut self,
        buffer: &mut [u8],
        what: &'static str,
        monitor: &dyn Monitor,
    ) -> Result<()> {
        let (mut since, mut filled) = (Instant::now(), 0);
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            self.check(monitor)?;
            let outcome = match &mut self.stream {
                Stream::Unix(stream) => stream.read(rest),
                Stream::Tcp(stream) => stream.read(rest),
            };
            match outcome {
                Ok(0) => return Err(self.closed(what)),
                Ok(count) => {
                    filled += count;
                    since = Instant::now();
                }
                Err(error) => self.consider(error, since, what, monitor)?,
            }
        }
        Ok(())
    }

    /// Reads `len` bytes of a disk. Long buffers are used again once they are dropped.
    pub(super) fn read_buffer(
        &mut self,
        len: usize,
        what: &'static str,
        monitor: &dyn Monitor,
    ) -> Result<Buffer> {
        if !self.pool.keeps(len) || len < MIN_REUSED_LEN {
            return self.read_vec(len, what, monitor).map(Buffer::from);
        }
        let mut buffer = self.pool.take(len);
        self.read_exact(&mut buffer, what, monitor).map(|()| buffer)
    }

    /// Reads `len` bytes into a new buffer, without having to fill it with zeroes before.
    pub(super) fn read_vec(
        &mut self,
        len: usize,
        what: &'static str,
        monitor: &dyn Monitor,
    ) -> Result<Vec<u8>> {
        let mut buffer = Vec::with_capacity(len);
        if buffer.capacity() > len {
            // in more room than was asked for, a part of the next message could get in
            buffer.resize(len, 0);
            self.read_exact(&mut buffer, what, monitor)?;
            return Ok(buffer);
        }
        let mut since = Instant::now();
        while buffer.len() < len {
            self.check(monitor)?;
            let room = spare_capacity(&mut buffer);
            let outcome = match &self.stream {
                Stream::Unix(stream) => rustix::io::read(stream, room),
                Stream::Tcp(stream) => rustix::io::read(stream, room),
            };
            match outcome {
                Ok(0) => return Err(self.closed(what)),
                Ok(_) => since = Instant::now(),
                Err(errno) => self.consider(errno.into(), since, what, monitor)?,
            }
        }
        Ok(buffer)
    }

    /// Writes all of `bytes`.
    pub(super) fn write_all(&mut self, mut bytes: &[u8], monitor: &dyn Monitor) -> Result<()> {
        let what = "sending to it";
        let mut since = Instant::now();
        while !bytes.is_empty() {
            self.check(monitor)?;
            let outcome = match &mut self.stream {
                Stream::Unix(stream) => stream.write(bytes),
                Stream::Tcp(stream) => stream.write(bytes),
            };
            match outcome {
                Ok(0) => return Err(self.closed(what)),
                Ok(count) => {
                    bytes = bytes.get(count..).unwrap_or_default();
                    since = Instant::now();
                }
                Err(error) => self.consider(error, since, what, monitor)?,
            }
        }
        Ok(())
    }

    /// Sends a last message if that is possible at once; nobody waits for its effect.
    pub(super) fn farewell(&mut self, bytes: &[u8]) {
        // the connection is given up in any case, so a failure changes nothing
        let _ = match &mut self.stream {
            Stream::Unix(stream) => stream.write(bytes),
            Stream::Tcp(stream) => stream.write(bytes),
        };
    }

    fn closed(&self, what: &'static str) -> Error {
        self.error(format!("it closed the connection while {what}"))
    }

    /// Returns whether to go on after a read or write that brought nothing.
    fn consider(
        &self,
        error: io::Error,
        since: Instant,
        what: &'static str,
        monitor: &dyn Monitor,
    ) -> Result<()> {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted => {}
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => return Err(self.closed(what)),
            _ => return Err(self.error(format!("{what} failed: {error}"))),
        }
        if since.elapsed() >= self.timeout {
            return Err(self.error(format!("nothing moved for {:?} while {what}", self.timeout)));
        }
        self.check(monitor)
    }

    /// Fails when the work is cancelled, or the handshake dragged on byte by byte.
    fn check(&self, monitor: &dyn Monitor) -> Result<()> {
        monitor.check()?;
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Err(self.error(format!("the handshake took longer than {:?}", self.timeout)));
        }
        Ok(())
    }
}

/// Returns how long to wait for the next thing, and fails once the deadline is over.
fn remaining(deadline: Option<Instant>) -> io::Result<Duration> {
    match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
        Some(Duration::ZERO) => Err(io::ErrorKind::TimedOut.into()),
        Some(rest) => Ok(rest.min(TICK)),
        None => Ok(TICK),
    }
}

/// Connects by hand, because the standard library's connect waits without limit for a server that has
/// stopped accepting.
fn connect_unix(
    path: &Path,
    deadline: Option<Instant>,
    monitor: &dyn Monitor,
) -> Result<io::Result<UnixStream>> {
    let attempt = |wait: Duration| -> io::Result<UnixStream> {
        let address = SocketAddrUnix::new(path)?;
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(wait))?;
        rustix::net::connect(&socket, &address)?;
        Ok(socket.into())
    };
    loop {
        monitor.check()?;
        match remaining(deadline).and_then(attempt) {
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            outcome => return Ok(outcome),
        }
    }
}

/// Tries every address of the host, in the resolver's order; the whole time is theirs together.
fn connect_tcp(
    host: &str,
    port: u16,
    deadline: Option<Instant>,
    monitor: &dyn Monitor,
) -> Result<io::Result<TcpStream>> {
    let addresses = match (host, port).to_socket_addrs() {
        Ok(addresses) => addresses,
        Err(error) => return Ok(Err(error)),
    };
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in addresses {
        monitor.check()?;
        let rest = deadline.map_or(TICK, |deadline| deadline.saturating_duration_since(Instant::now()));
        if rest.is_zero() {
            return Ok(Err(io::ErrorKind::TimedOut.into()));
        }
        match TcpStream::connect_timeout(&address, rest) {
            Ok(stream) => return Ok(Ok(stream)),
            Err(error) => last = error,
        }
    }
    Ok(Err(last))
}

//! A connection in its transmission phase: status, reads, writes.

use std::collections::VecDeque;

use super::handshake::{Agreement, HeaderStyle, shake_hands};
use super::reply::{Body, Coverage, Descriptors, Header, Pending};
use super::uri::check_export;
use super::wire::Wire;
use super::{Address, ExportFlags, IN_FLIGHT, MAX_STRING_BYTES, Options, Payload, WINDOW_BYTES};
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::monitor::Monitor;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;

const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
const CMD_FLUSH: u16 = 3;
const CMD_WRITE_ZEROES: u16 = 6;
const CMD_BLOCK_STATUS: u16 = 7;

const FLAG_NO_HOLE: u16 = 1 << 1;
/// With extended headers: the length is that of the payload which follows.
const FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// What one status request asks about without extended headers: all that 32 bits hold, in whole largest blocks.
const MAX_STATUS_BYTES: u64 = (1 << 32) - (1 << 16);
/// What one status request asks about with extended headers: servers limit the extents, not the bytes.
const MAX_EXTENDED_STATUS_BYTES: u64 = 1 << 46;
/// The most contexts of one connection.
const MAX_CONTEXTS: usize = 16;

/// A connection to one export.
///
/// Reads and status requests wait for their replies; writes are acknowledged later, at the latest by
/// [`Connection::flush`]. After an error the connection answers nothing but that error.
#[derive(Debug)]
pub struct Connection {
    wire: Wire,
    agreement: Agreement,
    next_cookie: u64,
    pending: VecDeque<Pending>,
    /// Why nothing can be done any more.
    ended: Option<String>,
}

/// What a request says besides its cookie.
struct Request {
    command: u16,
    flags: u16,
    offset: u64,
    len: u64,
}

impl Connection {
    /// Connects to `export` (the empty name is the server's default) and has every one of `contexts`
    /// granted.
    ///
    /// # Errors
    /// [`Error::Io`] if nothing listens, [`Error::Nbd`] if the server has no such export or context or breaks
    /// the protocol, [`Error::Usage`] for names that cannot be sent, [`Error::Cancelled`].
    pub fn open(
        address: &Address,
        export: &str,
        contexts: &[String],
        options: &Options,
        monitor: &dyn Monitor,
    ) -> Result<Self> {
        check_export(export).map_err(Error::Usage)?;
        if contexts.len() > MAX_CONTEXTS || contexts.iter().any(|name| name.len() > MAX_STRING_BYTES) {
            return Err(Error::Usage(format!(
                "at most {MAX_CONTEXTS} metadata contexts with names of at most {MAX_STRING_BYTES} bytes can \
                 be asked for"
            )));
        }
        let mut wire = Wire::connect(address, options, monitor)?;
        let agreement = shake_hands(&mut wire, export, contexts, options, monitor)?;
        Ok(Self { wire, agreement, next_cookie: 1, pending: VecDeque::new(), ended: None })
    }

    /// Returns the size of the disk in bytes, at most [`MAX_DISK_BYTES`](super::MAX_DISK_BYTES).
    pub fn size(&self) -> u64 {
        self.agreement.size
    }

    /// Returns what the export allows.
    pub fn flags(&self) -> ExportFlags {
        self.agreement.flags
    }

    /// Returns the size in bytes, a power of two up to 64 KiB, of which writes must be multiples.
    pub fn min_block(&self) -> u64 {
        u64::from(self.agreement.min_block)
    }

    /// Returns true if requests and replies have 64-bit lengths.
    pub fn has_extended_headers(&self) -> bool {
        self.agreement.style == HeaderStyle::Extended
    }

    /// Returns the position of a context among those asked for: the number that
    /// [`Connection::block_status`] uses for it.
    pub fn context_index(&self, name: &str) -> Option<usize> {
        self.agreement.contexts.iter().position(|(known, _)| known == name)
    }

    /// Tells `sink` the extents of `range`: the context's number, where, and its flags. The extents of each
    /// context come in order and cover `range` without gap or overlap; contexts alternate as they like.
    /// Memory is limited by the extents of one reply.
    ///
    /// # Errors
    /// [`Error::Nbd`], [`Error::Cancelled`], and what `sink` returns.
    pub fn block_status(
        &mut self,
        range: ByteRange,
        monitor: &dyn Monitor,
        sink: &mut dyn FnMut(usize, ByteRange, u64) -> Result<()>,
    ) -> Result<()> {
        self.check_within(range)?;
        if self.agreement.contexts.is_empty() {
            return Err(self.wire.error("no metadata context was asked for"));
        }
        self.guarded(|connection| connection.all_status(range, monitor, sink))
    }

    fn all_status(
        &mut self,
        range: ByteRange,
        monitor: &dyn Monitor,
        sink: &mut dyn FnMut(usize, ByteRange, u64) -> Result<()>,
    ) -> Result<()> {
        self.settle(monitor)?;
        // each context has extents of its own: go on where the one that is behind ends
        let mut positions = vec![range.start(); self.agreement.contexts.len()];
        loop {
            let from = positions.iter().copied().min().unwrap_or(range.end());
            let Some(rest) = ByteRange::between(from, range.end()) else { return Ok(()) };
            let request = self.status_request(rest)?;
            let replies = self.one_status(request, monitor)?;
            for (context, (extents, position)) in replies.iter().zip(&mut positions).enumerate() {
                let mut start = request.start();
                for (len, flags) in extents {
                    let end = start.saturating_add(*len);
                    if let Some(news) = ByteRange::between((*position).max(start), end.min(range.end())) {
                        *position = news.end();
                        sink(context, news, *flags)?;
                    }
                    start = end;
                }
            }
            if positions.contains(&from) {
                return Err(self.wire.error(format!("its status of {request} ends where it began")));
            }
        }
    }

    fn status_request(&self, rest: ByteRange) -> Result<ByteRange> {
        let limit = match self.agreement.style {
            HeaderStyle::Extended => MAX_EXTENDED_STATUS_BYTES,
            HeaderStyle::Simple | HeaderStyle::Structured => MAX_STATUS_BYTES,
        };
        rest.aligned_out(self.min_block(), self.size())
            .and_then(|range| ByteRange::new(range.start(), range.len().min(limit)))
            .ok_or_else(|| self.wire.error(format!("range {rest} is beyond its export")))
    }

    fn one_status(&mut self, range: ByteRange, monitor: &dyn Monitor) -> Result<Vec<Descriptors>> {
        let contexts = self.agreement.contexts.iter().map(|(_, id)| (*id, None)).collect();
        let body = Body::Status { contexts, disk_size: self.size() };
        let request =
            Request { command: CMD_BLOCK_STATUS, flags: 0, offset: range.start(), len: range.len() };
        self.submit(request, &[], "asking about", Some(range), body, monitor)?;
        loop {
            self.receive_one(monitor)?;
            if let Some(done) = self.first_done() {
                return done.into_status(&self.wire);
            }
        }
    }

    /// Reads `ranges` into `sink`, in their order, with `in_flight` requests (at least 1) on their way. Every
    /// buffer lies within one window of [`WINDOW_BYTES`] and has the length of its range; memory is at most
    /// `in_flight` windows.
    ///
    /// # Errors
    /// [`Error::Nbd`], also for a range beyond the disk, [`Error::Cancelled`], and what `sink` returns.
    pub fn read_pipelined(
        &mut self,
        ranges: &mut dyn Iterator<Item = ByteRange>,
        in_flight: usize,
        monitor: &dyn Monitor,
        sink: &mut dyn FnMut(ByteRange, Payload) -> Result<()>,
    ) -> Result<()> {
        self.guarded(|connection| connection.all_reads(ranges, in_flight.max(1), monitor, sink))
    }

    fn all_reads(
        &mut self,
        ranges: &mut dyn Iterator<Item = ByteRange>,
        in_flight: usize,
        monitor: &dyn Monitor,
        sink: &mut dyn FnMut(ByteRange, Payload) -> Result<()>,
    ) -> Result<()> {
        self.settle(monitor)?;
        let step = self.step();
        let mut pieces = ranges.flat_map(|range| Pieces { rest: Some(range), step });
        // what each request on its way was made for: the request itself may begin and end on a block's edge
        let mut wanted = VecDeque::new();
        loop {
            while self.pending.len() < in_flight {
                let Some(piece) = pieces.next() else { break };
                self.check_within(piece)?;
                self.submit_read(piece, monitor)?;
                wanted.push_back(piece);
            }
            if self.pending.is_empty() {
                return Ok(());
            }
            self.receive_one(monitor)?;
            while let Some(done) = self.first_done() {
                let (requested, Some(piece)) = (done.range, wanted.pop_front()) else { return Ok(()) };
                let payload = done.into_payload(&self.wire)?;
                sink(piece, trimmed(payload, requested.unwrap_or(piece), piece))?;
            }
        }
    }

    fn submit_read(&mut self, piece: ByteRange, monitor: &dyn Monitor) -> Result<()> {
        let range = piece
            .aligned_out(self.min_block(), self.size())
            .ok_or_else(|| self.wire.error(format!("range {piece} is beyond its export")))?;
        let request = Request { command: CMD_READ, flags: 0, offset: range.start(), len: range.len() };
        let body = Body::Read { data: None, covered: Coverage::default() };
        self.submit(request, &[], "reading", Some(range), body, monitor)
    }

    /// Writes `data`, without waiting until that is acknowledged.
    ///
    /// # Errors
    /// [`Error::Nbd`] for a range beyond the disk, of broken blocks or of an export that is read-only, and
    /// for an earlier write that failed; [`Error::Cancelled`].
    pub fn write(&mut self, offset: u64, data: &[u8], monitor: &dyn Monitor) -> Result<()> {
        let len = u64::try_from(data.len()).unwrap_or(u64::MAX);
        let Some(range) = ByteRange::new(offset, len) else {
            return if data.is_empty() { Ok(()) } else { Err(self.beyond(offset, len)) };
        };
        self.check_writable(range)?;
        self.guarded(|connection| {
            let step = connection.step();
            for piece in (Pieces { rest: Some(range), step }) {
                let from = usize::try_from(piece.start() - offset).unwrap_or(usize::MAX);
                let len = usize::try_from(piece.len()).unwrap_or(0);
                let part = data.get(from..from.saturating_add(len)).unwrap_or_default();
                connection.make_room(monitor)?;
                let flags = if connection.has_extended_headers() { FLAG_PAYLOAD_LEN } else { 0 };
                let request = Request { command: CMD_WRITE, flags, offset: piece.start(), len: piece.len() };
                connection.submit(request, part, "writing", Some(piece), Body::Ack, monitor)?;
            }
            Ok(())
        })
    }

    /// Makes `range` read as zeroes, without waiting until that is acknowledged; where `may_trim` allows it,
    /// the server may free the space. Zeroes are sent if the server cannot do it otherwise.
    ///
    /// # Errors
    /// As for [`Connection::write`].
    pub fn write_zeroes(&mut self, range: ByteRange, may_trim: bool, monitor: &dyn Monitor) -> Result<()> {
        self.check_writable(range)?;
        if !self.flags().can_write_zeroes() {
            let zeroes = vec![0; usize::try_from(range.len().min(WINDOW_BYTES)).unwrap_or(0)];
            for piece in (Pieces { rest: Some(range), step: WINDOW_BYTES }) {
                let len = usize::try_from(piece.len()).unwrap_or(0);
                self.write(piece.start(), zeroes.get(..len).unwrap_or_default(), monitor)?;
            }
            return Ok(());
        }
        self.guarded(|connection| {
            // no payload, so that longer requests would be allowed; but no server refuses this length
            let step = u64::from(connection.agreement.max_payload);
            let flags = if may_trim { 0 } else { FLAG_NO_HOLE };
            for piece in (Pieces { rest: Some(range), step }) {
                connection.make_room(monitor)?;
                let request =
                    Request { command: CMD_WRITE_ZEROES, flags, offset: piece.start(), len: piece.len() };
                connection.submit(request, &[], "zeroing", Some(piece), Body::Ack, monitor)?;
            }
            Ok(())
        })
    }

    /// Waits until all that was written is acknowledged and durable.
    ///
    /// # Errors
    /// [`Error::Nbd`] if a write failed or the server offers no flush, [`Error::Cancelled`].
    pub fn flush(&mut self, monitor: &dyn Monitor) -> Result<()> {
        if !self.flags().can_flush() {
            return Err(self.wire.error("it offers no flush, so that nobody knows when writes are durable"));
        }
        self.guarded(|connection| {
            connection.settle(monitor)?;
            let request = Request { command: CMD_FLUSH, flags: 0, offset: 0, len: 0 };
            connection.submit(request, &[], "flushing", None, Body::Ack, monitor)?;
            connection.settle(monitor)
        })
    }

    /// Waits until all that was written is acknowledged (not: durable) and takes leave of the server.
    ///
    /// # Errors
    /// As for [`Connection::flush`]. Dropping a connection takes leave, too, but does not tell what failed.
    pub fn disconnect(mut self, monitor: &dyn Monitor) -> Result<()> {
        self.guarded(|connection| connection.settle(monitor))
    }

    /// Returns the longest request: a power of two, so that its multiples are those of blocks and no window
    /// is crossed.
    fn step(&self) -> u64 {
        let max_payload = self.agreement.max_payload;
        WINDOW_BYTES.min(max_payload.checked_ilog2().map_or(1, |log| 1 << log))
    }

    fn check_within(&self, range: ByteRange) -> Result<()> {
        if range.end() > self.size() { Err(self.beyond(range.start(), range.len())) } else { Ok(()) }
    }

    fn beyond(&self, offset: u64, len: u64) -> Error {
        self.wire.error(format!("{len} bytes at {offset} are beyond its {} bytes", self.size()))
    }

    fn check_writable(&self, range: ByteRange) -> Result<()> {
        self.check_within(range)?;
        if self.flags().is_read_only() {
            return Err(self.wire.error("its export is read-only"));
        }
        let block = self.min_block();
        if !range.start().is_multiple_of(block) || !range.len().is_multiple_of(block) {
            return Err(self
                .wire
                .error(format!("a write of {range} is not one of whole {block}-byte blocks")));
        }
        Ok(())
    }

    /// Runs what talks to the server; if that fails, the connection is over.
    fn guarded<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if let Some(reason) = &self.ended {
            return Err(self.wire.error(format!("the connection ended earlier: {reason}")));
        }
        let result = work(self);
        if let Err(error) = &result {
            self.ended = Some(error.to_string());
            self.pending.clear();
        }
        result
    }

    fn submit(
        &mut self,
        request: Request,
        payload: &[u8],
        verb: &'static str,
        range: Option<ByteRange>,
        body: Body,
        monitor: &dyn Monitor,
    ) -> Result<()> {
        let cookie = self.next_cookie;
        self.next_cookie = self.next_cookie.wrapping_add(1);
        let header = self.request_header(&request, cookie)?;
        self.wire.write_all(&header, monitor)?;
        self.wire.write_all(payload, monitor)?;
        self.pending.push_back(Pending::new(cookie, verb, range, body));
        Ok(())
    }

    fn request_header(&self, request: &Request, cookie: u64) -> Result<Vec<u8>> {
        let extended = self.has_extended_headers();
        let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        let mut header = Vec::with_capacity(32);
        header.extend_from_slice(&magic.to_be_bytes());
        header.extend_from_slice(&request.flags.to_be_bytes());
        header.extend_from_slice(&request.command.to_be_bytes());
        header.extend_from_slice(&cookie.to_be_bytes());
        header.extend_from_slice(&request.offset.to_be_bytes());
        if extended {
            header.extend_from_slice(&request.len.to_be_bytes());
        } else {
            let len = u32::try_from(request.len)
                .map_err(|_| self.wire.error(format!("a request of {} bytes is too long", request.len)))?;
            header.extend_from_slice(&len.to_be_bytes());
        }
        Ok(header)
    }

    /// Receives one message and hands it to the request that it answers.
    fn receive_one(&mut self, monitor: &dyn Monitor) -> Result<()> {
        let header = Header::read(&mut self.wire, self.agreement.style, monitor)?;
        let cookie = header.cookie();
        let open = self.pending.iter_mut().find(|pending| pending.cookie == cookie && !pending.is_done());
        match open {
            Some(pending) => pending.receive(&header, &mut self.wire, monitor),
            None => Err(self.wire.error(format!("it answered request {cookie}, which is not open"))),
        }
    }

    /// Takes the oldest request off the list if its reply is complete.
    fn first_done(&mut self) -> Option<Pending> {
        if self.pending.front().is_some_and(Pending::is_done) { self.pending.pop_front() } else { None }
    }

    /// Waits until a request may be added to those on their way.
    fn make_room(&mut self, monitor: &dyn Monitor) -> Result<()> {
        self.acknowledge(IN_FLIGHT - 1, monitor)
    }

    /// Waits until nothing is on its way.
    fn settle(&mut self, monitor: &dyn Monitor) -> Result<()> {
        self.acknowledge(0, monitor)
    }

    fn acknowledge(&mut self, most: usize, monitor: &dyn Monitor) -> Result<()> {
        while self.pending.len() > most {
            self.receive_one(monitor)?;
            while let Some(position) = self.pending.iter().position(Pending::is_done) {
                if let Some(done) = self.pending.remove(position) {
                    done.into_ack(&self.wire)?;
                }
            }
        }
        Ok(())
    }
}

impl Drop for Connection {
    /// Takes leave where the server still listens: it would log an error otherwise.
    fn drop(&mut self) {
        let request = Request { command: CMD_DISC, flags: 0, offset: 0, len: 0 };
        if let (None, Ok(header)) = (&self.ended, self.request_header(&request, 0)) {
            self.wire.farewell(&header);
        }
    }
}

/// Returns the part of what was read that was wanted.
fn trimmed(payload: Payload, requested: ByteRange, wanted: ByteRange) -> Payload {
    let Payload::Data(mut bytes) = payload else { return Payload::Zero };
    if requested != wanted {
        let skip = usize::try_from(wanted.start() - requested.start()).unwrap_or(usize::MAX);
        bytes = bytes.split_off(skip);
        bytes.truncate(usize::try_from(wanted.len()).unwrap_or(0));
    }
    Payload::Data(bytes)
}

/// Cuts a range at the multiples of `step` bytes.
struct Pieces {
    rest: Option<ByteRange>,
    step: u64,
}

impl Iterator for Pieces {
    type Item = ByteRange;

    fn next(&mut self) -> Option<ByteRange> {
        let rest = self.rest.take()?;
        let edge = (rest.start() - rest.start() % self.step).saturating_add(self.step);
        self.rest = ByteRange::between(edge, rest.end());
        ByteRange::between(rest.start(), edge.min(rest.end()))
    }
}

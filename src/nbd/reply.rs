//! Replies: their headers, and how the chunks of one reply are put together and checked.

use std::collections::BTreeMap;

use super::handshake::{HeaderStyle, clean};
use super::wire::Wire;
use super::{MAX_ERROR_PAYLOAD_BYTES, MAX_REPLY_CHUNKS, MAX_STATUS_EXTENTS, Payload};
use crate::buffer::Buffer;
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::monitor::Monitor;

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_MAGIC: u32 = 0x6e8a_278c;

const FLAG_DONE: u16 = 1;

const TYPE_NONE: u16 = 0;
const TYPE_OFFSET_DATA: u16 = 1;
const TYPE_OFFSET_HOLE: u16 = 2;
const TYPE_BLOCK_STATUS: u16 = 5;
const TYPE_BLOCK_STATUS_EXT: u16 = 6;
const TYPE_ERROR_BIT: u16 = 1 << 15;
const TYPE_ERROR_OFFSET: u16 = TYPE_ERROR_BIT | 2;

const WHAT: &str = "answering";

/// What precedes each message of the server.
#[derive(Debug)]
pub(super) enum Header {
    /// An acknowledgement, or with structured replies off also the data of a read.
    Simple {
        error: u32,
        cookie: u64,
        may_carry_data: bool,
    },
    Chunk {
        flags: u16,
        kind: u16,
        cookie: u64,
        len: u64,
    },
}

impl Header {
    pub(super) fn cookie(&self) -> u64 {
        match self {
            Self::Simple { cookie, .. } | Self::Chunk { cookie, .. } => *cookie,
        }
    }

    /// Reads the next header; one that was not agreed on is an error.
    pub(super) fn read(wire: &mut Wire, style: HeaderStyle, monitor: &dyn Monitor) -> Result<Self> {
        let mut magic = [0; 4];
        wire.read_exact(&mut magic, WHAT, monitor)?;
        match (u32::from_be_bytes(magic), style) {
            (SIMPLE_MAGIC, HeaderStyle::Simple | HeaderStyle::Structured) => {
                let error = u32::from_be_bytes(read_array(wire, monitor)?);
                let cookie = u64::from_be_bytes(read_array(wire, monitor)?);
                Ok(Self::Simple { error, cookie, may_carry_data: style == HeaderStyle::Simple })
            }
            (STRUCTURED_MAGIC, HeaderStyle::Structured) => {
                let rest: [u8; 16] = read_array(wire, monitor)?;
                let [f0, f1, k0, k1, c @ .., l0, l1, l2, l3] = rest;
                Ok(Self::Chunk {
                    flags: u16::from_be_bytes([f0, f1]),
                    kind: u16::from_be_bytes([k0, k1]),
                    cookie: u64::from_be_bytes(c),
                    len: u64::from(u32::from_be_bytes([l0, l1, l2, l3])),
                })
            }
            (EXTENDED_MAGIC, HeaderStyle::Extended) => {
                let [f0, f1, k0, k1]: [u8; 4] = read_array(wire, monitor)?;
                let cookie = u64::from_be_bytes(read_array(wire, monitor)?);
                // the request's offset, which the cookie implies
                let _: [u8; 8] = read_array(wire, monitor)?;
                let len = u64::from_be_bytes(read_array(wire, monitor)?);
                let (flags, kind) = (u16::from_be_bytes([f0, f1]), u16::from_be_bytes([k0, k1]));
                Ok(Self::Chunk { flags, kind, cookie, len })
            }
            (magic, style) => {
                Err(wire.error(format!("its reply has the magic {magic:#010x}, with {style:?} headers")))
            }
        }
    }
}

fn read_array<const N: usize>(wire: &mut Wire, monitor: &dyn Monitor) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    wire.read_exact(&mut bytes, WHAT, monitor)?;
    Ok(bytes)
}

/// The extents of one context from the request's start on: lengths and flags.
pub(super) type Descriptors = Vec<(u64, u64)>;

/// What a request asks for, and what has come of it.
#[derive(Debug)]
pub(super) enum Body {
    /// Nothing but success.
    Ack,
    Read {
        data: Option<Buffer>,
        covered: Coverage,
    },
    /// The ids of the contexts and, once they came, their extents.
    Status {
        contexts: Vec<(u32, Option<Descriptors>)>,
        disk_size: u64,
    },
}

/// A request on its way.
#[derive(Debug)]
pub(super) struct Pending {
    pub cookie: u64,
    /// For messages: reading, writing …
    pub verb: &'static str,
    /// `None` for a flush.
    pub range: Option<ByteRange>,
    body: Body,
    chunks: u32,
    done: bool,
    error: Option<String>,
}

impl Pending {
    pub(super) fn new(cookie: u64, verb: &'static str, range: Option<ByteRange>, body: Body) -> Self {
        Self { cookie, verb, range, body, chunks: 0, done: false, error: None }
    }

    pub(super) fn is_done(&self) -> bool {
        self.done
    }

    fn describe(&self) -> String {
        match self.range {
            Some(range) => format!("{} {range}", self.verb),
            None => self.verb.to_owned(),
        }
    }

    /// Takes one message of the reply from the wire.
    pub(super) fn receive(&mut self, header: &Header, wire: &mut Wire, monitor: &dyn Monitor) -> Result<()> {
        self.chunks += 1;
        if self.chunks > MAX_REPLY_CHUNKS {
            let reason = format!("its reply to {} has more than {MAX_REPLY_CHUNKS} chunks", self.describe());
            return Err(wire.error(reason));
        }
        match *header {
            Header::Simple { may_carry_data: false, .. } if matches!(self.body, Body::Read { .. }) => {
                Err(wire.error(format!("it sent a simple reply to {}", self.describe())))
            }
            Header::Simple { error, .. } => self.simple(error, wire, monitor),
            Header::Chunk { flags, kind, len, .. } => {
                self.done = flags & FLAG_DONE != 0;
                self.chunk(kind, len, wire, monitor)
            }
        }
    }

    fn simple(&mut self, error: u32, wire: &mut Wire, monitor: &dyn Monitor) -> Result<()> {
        if self.chunks > 1 {
            return Err(wire.error(format!("it mixed two kinds of reply to {}", self.describe())));
        }
        self.done = true;
        if error != 0 {
            self.error = Some(describe_error(error));
            return Ok(());
        }
        let Body::Read { data, covered } = &mut self.body else { return Ok(()) };
        let Some(range) = self.range else { return Ok(()) };
        covered.add(range);
        let len = usize::try_from(range.len()).unwrap_or(0);
        *data = Some(wire.read_buffer(len, WHAT, monitor)?);
        Ok(())
    }

    fn chunk(&mut self, kind: u16, len: u64, wire: &mut Wire, monitor: &dyn Monitor) -> Result<()> {
        match kind {
            TYPE_NONE if len == 0 && self.done => Ok(()),
            TYPE_OFFSET_DATA if len > 8 => self.data_chunk(len - 8, wire, monitor),
            TYPE_OFFSET_HOLE if len == 12 => self.hole_chunk(wire, monitor),
            TYPE_BLOCK_STATUS if len >= 12 && len % 8 == 4 => {
                self.status_chunk((len - 4) / 8, false, wire, monitor)
            }
            TYPE_BLOCK_STATUS_EXT if len >= 24 && len % 16 == 8 => {
                self.status_chunk((len - 8) / 16, true, wire, monitor)
            }
            kind if kind & TYPE_ERROR_BIT != 0 => self.error_chunk(kind, len, wire, monitor),
            kind => {
                let to = self.describe();
                Err(wire.error(format!("its reply to {to} has a chunk of type {kind} with {len} bytes")))
            }
        }
    }

    /// Notes that a content chunk covers `offset..offset + len`.
    fn cover(&mut self, offset: u64, len: u64, wire: &Wire) -> Result<ByteRange> {
        let to = self.describe();
        let Body::Read { covered, .. } = &mut self.body else {
            return Err(wire.error(format!("it sent data as a reply to {to}")));
        };
        let chunk = ByteRange::new(offset, len).filter(|chunk| {
            self.range.is_some_and(|range| chunk.start() >= range.start() && chunk.end() <= range.end())
        });
        let Some(chunk) = chunk else {
            return Err(wire.error(format!("its reply to {to} has a chunk of {len} bytes at {offset}")));
        };
        if !covered.add(chunk) {
            return Err(wire.error(format!("its reply to {to} covers {chunk} twice")));
        }
        Ok(chunk)
    }

    fn data_chunk(&mut self, len: u64, wire: &mut Wire, monitor: &dyn Monitor) -> Result<()> {
        let offset = u64::from_be_bytes(read_array(wire, monitor)?);
        let chunk = self.cover(offset, len, wire)?;
        let (Some(whole), Body::Read { data, .. }) = (self.range, &mut self.body) else { return Ok(()) };
        // both were checked to lie within a request of at most 1 MiB
        let whole_len = usize::try_from(whole.len()).unwrap_or(0);
        let from = usize::try_from(chunk.start() - whole.start()).unwrap_or(0);
        let len = usize::try_from(len).unwrap_or(0);
        if chunk == whole {
            *data = Some(wire.read_buffer(len, WHAT, monitor)?);
            return Ok(());
        }
        let buffer = data.get_or_insert_with(|| vec![0; whole_len].into());
        let Some(part) = buffer.get_mut(from..from + len) else {
            return Err(wire.error("its chunk does not fit its request"));
        };
        wire.read_exact(part, WHAT, monitor)
    }

    fn hole_chunk(&mut self, wire: &mut Wire, monitor: &dyn Monitor) -> Result<()> {
        let offset = u64::from_be_bytes(read_array(wire, monitor)?);
        let len = u32::from_be_bytes(read_array(wire, monitor)?);
        // buffers begin as zeroes, so there is nothing to do but to remember
        self.cover(offset, u64::from(len), wire).map(|_| ())
    }

    fn status_chunk(
        &mut self,
        count: u64,
        extended: bool,
        wire: &mut Wire,
        monitor: &dyn Monitor,
    ) -> Result<()> {
        let to = self.describe();
        if count > MAX_STATUS_EXTENTS {
            let reason = format!("its reply to {to} has {count} extents, at most {MAX_STATUS_EXTENTS}");
            return Err(wire.error(format!("{reason} are allowed")));
        }
        let id = u32::from_be_bytes(read_array(wire, monitor)?);
        if extended {
            let stated = u64::from(u32::from_be_bytes(read_array(wire, monitor)?));
            if stated != count {
                return Err(wire.error(format!("its reply to {to} states {stated} extents and has {count}")));
            }
        }
        let size = if extended { 16 } else { 8 };
        let bytes = usize::try_from(count).unwrap_or(0).saturating_mul(size);
        let payload = wire.read_vec(bytes, WHAT, monitor)?;

        let (Body::Status { contexts, disk_size }, Some(range)) = (&mut self.body, self.range) else {
            return Err(wire.error(format!("it sent extents as a reply to {to}")));
        };
        let Some((_, slot)) = contexts.iter_mut().find(|(known, _)| *known == id) else {
            return Err(
                wire.error(format!("its reply to {to} is about context {id}, which was not agreed on"))
            );
        };
        if slot.is_some() {
            return Err(wire.error(format!("its reply to {to} describes context {id} twice")));
        }
        let extents = parse_descriptors(&payload, extended);
        check_descriptors(&extents, range, *disk_size)
            .map_err(|reason| wire.error(format!("its reply to {to} {reason}")))?;
        *slot = Some(extents);
        Ok(())
    }

    fn error_chunk(&mut self, kind: u16, len: u64, wire: &mut Wire, monitor: &dyn Monitor) -> Result<()> {
        let to = self.describe();
        if !(6..=MAX_ERROR_PAYLOAD_BYTES).contains(&len) {
            return Err(wire.error(format!("its reply to {to} has an error of {len} bytes")));
        }
        let payload = wire.read_vec(usize::try_from(len).unwrap_or(0), WHAT, monitor)?;
        let parsed = payload.split_first_chunk::<4>().and_then(|(code, rest)| {
            let (text_len, rest) = rest.split_first_chunk::<2>()?;
            let (text, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes(*text_len)))?;
            Some((u32::from_be_bytes(*code), text, rest))
        });
        let Some((code, text, rest)) = parsed else {
            return Err(wire.error(format!("its reply to {to} has an error whose text exceeds it")));
        };
        let mut error = describe_error(code);
        if let (TYPE_ERROR_OFFSET, Some((offset, _))) = (kind, rest.split_first_chunk::<8>()) {
            error = format!("{error} at {}", u64::from_be_bytes(*offset));
        }
        let text = clean(text);
        if !text.is_empty() {
            error = format!("{error}: {text}");
        }
        // the first error is the cause
        self.error.get_or_insert(error);
        Ok(())
    }

    /// Fails if the server said so.
    fn succeeded(&self, wire: &Wire) -> Result<()> {
        match &self.error {
            Some(error) => Err(wire.error(format!("{} failed: {error}", self.describe()))),
            None => Ok(()),
        }
    }

    /// Ends a request that only wanted to be done.
    pub(super) fn into_ack(self, wire: &Wire) -> Result<()> {
        self.succeeded(wire)
    }

    /// Ends a read.
    pub(super) fn into_payload(self, wire: &Wire) -> Result<Payload> {
        self.succeeded(wire)?;
        let to = self.describe();
        let incomplete = |reason: &str| -> Error { wire.error(format!("its reply to {to} {reason}")) };
        let (Some(range), Body::Read { data, covered }) = (self.range, self.body) else {
            return Err(incomplete("is not that of a read"));
        };
        if !covered.is_exactly(range) {
            return Err(incomplete("ended before it covered all"));
        }
        Ok(data.map_or(Payload::Zero, Payload::Data))
    }

    /// Ends a block status request: the extents of each context, in the order asked for.
    pub(super) fn into_status(self, wire: &Wire) -> Result<Vec<Descriptors>> {
        self.succeeded(wire)?;
        let to = self.describe();
        let Body::Status { contexts, .. } = self.body else {
            return Err(wire.error(format!("its reply to {to} is not a status")));
        };
        let missing = |id| wire.error(format!("its reply to {to} says nothing about context {id}"));
        contexts.into_iter().map(|(id, extents)| extents.ok_or_else(|| missing(id))).collect()
    }
}

fn parse_descriptors(payload: &[u8], extended: bool) -> Descriptors {
    if extended {
        let (pairs, _) = payload.as_chunks::<8>();
        let (pairs, _) = pairs.as_chunks::<2>();
        return pairs
            .iter()
            .map(|[len, flags]| (u64::from_be_bytes(*len), u64::from_be_bytes(*flags)))
            .collect();
    }
    let (pairs, _) = payload.as_chunks::<4>();
    let (pairs, _) = pairs.as_chunks::<2>();
    let wide = |bytes: &[u8; 4]| u64::from(u32::from_be_bytes(*bytes));
    pairs.iter().map(|[len, flags]| (wide(len), wide(flags))).collect()
}

/// Checks that extents are not empty, that only the last one reaches beyond the request, and that none
/// reaches beyond the disk.
fn check_descriptors(extents: &[(u64, u64)], range: ByteRange, disk_size: u64) -> Result<(), String> {
    let mut position = range.start();
    for (len, _) in extents {
        if *len == 0 {
            return Err(format!("has an empty extent at {position}"));
        }
        if position >= range.end() {
            return Err(format!("has an extent at {position}, beyond the request"));
        }
        position = position
            .checked_add(*len)
            .filter(|end| *end <= disk_size)
            .ok_or_else(|| format!("has an extent of {len} bytes at {position}, beyond the disk"))?;
    }
    Ok(())
}

/// Which bytes of a request came, each at most once.
#[derive(Debug, Default)]
pub(super) struct Coverage {
    /// Start to end, without overlap, touching ranges joined.
    ranges: BTreeMap<u64, u64>,
}

impl Coverage {
    /// Adds a range and returns true, or returns false if some of it was there already.
    fn add(&mut self, range: ByteRange) -> bool {
        let (mut start, mut end) = (range.start(), range.end());
        let before = self.ranges.range(..=start).next_back().map(|(start, end)| (*start, *end));
        let after = self.ranges.range(start..).next().map(|(start, end)| (*start, *end));
        if before.is_some_and(|(_, end)| end > start) || after.is_some_and(|(start, _)| start < end) {
            return false;
        }
        if let Some((before_start, _)) = before.filter(|(_, before_end)| *before_end == start) {
            start = before_start;
        }
        if let Some((after_start, after_end)) = after.filter(|(after_start, _)| *after_start == end) {
            self.ranges.remove(&after_start);
            end = after_end;
        }
        self.ranges.insert(start, end);
        true
    }

    fn is_exactly(&self, range: ByteRange) -> bool {
        self.ranges.len() == 1 && self.ranges.get(&range.start()) == Some(&range.end())
    }
}

/// Returns the name of an error number of the specification.
fn describe_error(code: u32) -> String {
    let name = match code {
        0 => "error 0",
        1 => "operation not permitted",
        5 => "input/output error",
        12 => "out of memory",
        22 => "invalid argument",
        28 => "no space left",
        75 => "too large",
        95 => "not supported",
        108 => "the server is shutting down",
        _ => return format!("error {code}"),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn coverage_agrees_with_bits(ranges in proptest::collection::vec((0u64..40, 1u64..12), 0..30)) {
            let (mut coverage, mut bits) = (Coverage::default(), [false; 64]);
            for (start, len) in ranges {
                let part = &mut bits[start as usize..(start + len) as usize];
                let is_free = !part.contains(&true);
                prop_assert_eq!(coverage.add(ByteRange::new(start, len).unwrap()), is_free);
                if is_free {
                    part.fill(true);
                }
                let first = bits.iter().position(|bit| *bit).unwrap();
                let run = bits[first..].iter().take_while(|bit| **bit).count();
                let whole = ByteRange::new(first as u64, run as u64).unwrap();
                let is_one_run = bits.iter().filter(|bit| **bit).count() == run;
                prop_assert_eq!(coverage.is_exactly(whole), is_one_run);
            }
        }
    }
}

//! The handshake: from a connected socket to an agreed export, contexts and header style.

use super::wire::Wire;
use super::{ExportFlags, MAX_DISK_BYTES, MAX_OPTION_REPLY_BYTES, Options};
use crate::error::Result;
use crate::monitor::Monitor;

const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

const FIXED_NEWSTYLE: u16 = 1 << 0;
const NO_ZEROES: u16 = 1 << 1;

const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_SET_META_CONTEXT: u32 = 10;
const OPT_EXTENDED_HEADERS: u32 = 11;

const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;
const REP_ERROR: u32 = 1 << 31;
const REP_ERR_UNSUP: u32 = REP_ERROR | 1;
const REP_ERR_TLS_REQD: u32 = REP_ERROR | 5;
const REP_ERR_UNKNOWN: u32 = REP_ERROR | 6;
const REP_ERR_SHUTDOWN: u32 = REP_ERROR | 7;

const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

/// The most replies to one option: a server has four kinds of information and a context for each asked.
const MAX_OPTION_REPLIES: usize = 64;
/// What a server that says nothing about block sizes can be asked for (specification, "Block size
/// constraints").
const DEFAULT_MIN_BLOCK: u32 = 1;
const DEFAULT_MAX_PAYLOAD: u32 = 32 << 20;

/// How requests and replies are framed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HeaderStyle {
    Simple,
    Structured,
    Extended,
}

/// What client and server agreed on.
#[derive(Debug)]
pub(super) struct Agreement {
    pub size: u64,
    pub flags: ExportFlags,
    pub style: HeaderStyle,
    /// Names and the server's ids, in the order in which they were asked for.
    pub contexts: Vec<(String, u32)>,
    /// A power of two, at most 64 KiB, of which every request has to be a multiple.
    pub min_block: u32,
    /// The longest payload of a request or reply, a multiple of `min_block`.
    pub max_payload: u32,
}

struct OptionReply {
    kind: u32,
    payload: Vec<u8>,
}

/// Takes integers from the front of a reply.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_be_bytes)
    }
}

struct Handshake<'a> {
    wire: &'a mut Wire,
    monitor: &'a dyn Monitor,
}

/// Goes through the whole handshake; all of `contexts` are granted or it fails.
pub(super) fn shake_hands(
    wire: &mut Wire,
    export: &str,
    contexts: &[String],
    options: &Options,
    monitor: &dyn Monitor,
) -> Result<Agreement> {
    let mut shake = Handshake { wire, monitor };
    shake.greet()?;
    let style = if options.extended_headers && shake.switch_on(OPT_EXTENDED_HEADERS)? {
        HeaderStyle::Extended
    } else if shake.switch_on(OPT_STRUCTURED_REPLY)? {
        HeaderStyle::Structured
    } else {
        HeaderStyle::Simple
    };
    let contexts = if contexts.is_empty() {
        Vec::new()
    } else if style == HeaderStyle::Simple {
        return Err(shake.wire.error("it has no structured replies, so that it cannot tell what is dirty"));
    } else {
        shake.set_contexts(export, contexts)?
    };
    let agreement = shake.go(export, style, contexts)?;
    shake.wire.handshake_is_over();
    Ok(agreement)
}

impl Handshake<'_> {
    fn greet(&mut self) -> Result<()> {
        let mut greeting = [0; 18];
        self.wire.read_exact(&mut greeting, "greeting", self.monitor)?;
        let mut fields = Fields(&greeting);
        let (init, style, flags) = (fields.u64(), fields.u64(), fields.u16().unwrap_or(0));
        if init != Some(INIT_MAGIC) {
            return Err(self.wire.error("it does not speak NBD: its greeting has another magic"));
        }
        if style == Some(OLDSTYLE_MAGIC) {
            return Err(self.wire.error("it speaks the oldstyle handshake only"));
        }
        if style != Some(OPTION_MAGIC) {
            return Err(self.wire.error("its greeting is neither of the newstyle nor of the oldstyle"));
        }
        if flags & FIXED_NEWSTYLE == 0 {
            return Err(self.wire.error("it has no fixed newstyle handshake"));
        }
        let answer = u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES));
        self.wire.write_all(&answer.to_be_bytes(), self.monitor)
    }

    fn send(&mut self, option: u32, payload: &[u8]) -> Result<()> {
        let mut message = Vec::with_capacity(16 + payload.len());
        message.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        message.extend_from_slice(&option.to_be_bytes());
        message.extend_from_slice(&len_u32(payload).to_be_bytes());
        message.extend_from_slice(payload);
        self.wire.write_all(&message, self.monitor)
    }

    fn receive(&mut self, option: u32) -> Result<OptionReply> {
        let mut header = [0; 20];
        self.wire.read_exact(&mut header, "negotiating", self.monitor)?;
        let mut fields = Fields(&header);
        let (magic, of) = (fields.u64(), fields.u32().unwrap_or(0));
        let (kind, len) = (fields.u32().unwrap_or(0), fields.u32().unwrap_or(0));
        if magic != Some(OPTION_REPLY_MAGIC) {
            return Err(self.wire.error("its option reply has another magic"));
        }
        if of != option {
            return Err(self.wire.error(format!("it answered option {of} when asked for option {option}")));
        }
        if len > MAX_OPTION_REPLY_BYTES {
            let reason = format!("its reply to option {option} has {len} bytes, at most ");
            return Err(self.wire.error(format!("{reason}{MAX_OPTION_REPLY_BYTES} are allowed")));
        }
        let len = usize::try_from(len).unwrap_or(0);
        let payload = self.wire.read_vec(len, "negotiating", self.monitor)?;
        match kind {
            REP_ERR_TLS_REQD => Err(self.wire.error("it insists on TLS, which is not supported")),
            REP_ERR_SHUTDOWN => Err(self.wire.error("it is shutting down")),
            _ => Ok(OptionReply { kind, payload }),
        }
    }

    /// Asks for a feature; any refusal is a no.
    fn switch_on(&mut self, option: u32) -> Result<bool> {
        self.send(option, &[])?;
        let reply = self.receive(option)?;
        match reply.kind {
            REP_ACK if reply.payload.is_empty() => Ok(true),
            kind if kind & REP_ERROR != 0 => Ok(false),
            kind => Err(self.unexpected(option, kind)),
        }
    }

    fn set_contexts(&mut self, export: &str, wanted: &[String]) -> Result<Vec<(String, u32)>> {
        let mut payload = Vec::new();
        put_string(&mut payload, export);
        payload.extend_from_slice(&u32::try_from(wanted.len()).unwrap_or(u32::MAX).to_be_bytes());
        for context in wanted {
            put_string(&mut payload, context);
        }
        self.send(OPT_SET_META_CONTEXT, &payload)?;

        let mut granted: Vec<Option<u32>> = vec![None; wanted.len()];
        for _ in 0..MAX_OPTION_REPLIES {
            let reply = self.receive(OPT_SET_META_CONTEXT)?;
            match reply.kind {
                REP_ACK if reply.payload.is_empty() => return self.all_granted(export, wanted, &granted),
                REP_META_CONTEXT => self.grant(&reply.payload, wanted, &mut granted)?,
                _ => return Err(self.refused(OPT_SET_META_CONTEXT, export, &reply)),
            }
        }
        Err(self.wire.error("its list of metadata contexts does not end"))
    }

    fn grant(&self, payload: &[u8], wanted: &[String], granted: &mut [Option<u32>]) -> Result<()> {
        let mut fields = Fields(payload);
        let Some(id) = fields.u32() else {
            return Err(self.wire.error("it granted a metadata context without an id"));
        };
        let name = fields.0;
        let position = wanted.iter().position(|context| context.as_bytes() == name);
        let Some(slot) = position.and_then(|position| granted.get(position)) else {
            let name = clean(name);
            return Err(self.wire.error(format!("it granted the context {name:?} that nobody asked for")));
        };
        if slot.is_some() || granted.contains(&Some(id)) {
            return Err(self.wire.error(format!("it granted the context {:?} twice", clean(name))));
        }
        if let Some(slot) = position.and_then(|position| granted.get_mut(position)) {
            *slot = Some(id);
        }
        Ok(())
    }

    // a server drops contexts that it does not know without a word: a backup that went on without its
    // bitmap would miss what changed
    fn all_granted(
        &self,
        export: &str,
        wanted: &[String],
        granted: &[Option<u32>],
    ) -> Result<Vec<(String, u32)>> {
        let pair = |(name, id): (&String, &Option<u32>)| {
            let missing = || self.wire.error(format!("export {export:?} has no metadata context {name:?}"));
            id.map(|id| (name.clone(), id)).ok_or_else(missing)
        };
        wanted.iter().zip(granted).map(pair).collect()
    }

    fn go(&mut self, export: &str, style: HeaderStyle, contexts: Vec<(String, u32)>) -> Result<Agreement> {
        let mut payload = Vec::new();
        put_string(&mut payload, export);
        payload.extend_from_slice(&1u16.to_be_bytes());
        payload.extend_from_slice(&INFO_BLOCK_SIZE.to_be_bytes());
        self.send(OPT_GO, &payload)?;

        let (mut disk, mut blocks) = (None, (DEFAULT_MIN_BLOCK, DEFAULT_MAX_PAYLOAD));
        for _ in 0..MAX_OPTION_REPLIES {
            let reply = self.receive(OPT_GO)?;
            let mut fields = Fields(&reply.payload);
            match (reply.kind, fields.u16()) {
                (REP_ACK, None) => {
                    let (size, flags) =
                        disk.ok_or_else(|| self.wire.error("it did not say how large the export is"))?;
                    let (min_block, max_payload) = blocks;
                    return Ok(Agreement { size, flags, style, contexts, min_block, max_payload });
                }
                (REP_INFO, Some(INFO_EXPORT)) => disk = Some(self.export_info(fields)?),
                (REP_INFO, Some(INFO_BLOCK_SIZE)) => blocks = self.block_sizes(fields)?,
                // names, descriptions, and what the future brings
                (REP_INFO, Some(_)) => {}
                _ => return Err(self.refused(OPT_GO, export, &reply)),
            }
        }
        Err(self.wire.error("its description of the export does not end"))
    }

    fn export_info(&self, mut fields: Fields<'_>) -> Result<(u64, ExportFlags)> {
        let (Some(size), Some(flags), true) = (fields.u64(), fields.u16(), fields.0.is_empty()) else {
            return Err(self.wire.error("its description of the export has the wrong length"));
        };
        if size > MAX_DISK_BYTES {
            let reason = format!("its export has {size} bytes, at most {MAX_DISK_BYTES} are possible");
            return Err(self.wire.error(reason));
        }
        if flags & ExportFlags::HAS_FLAGS == 0 {
            return Err(self.wire.error(format!("its export's flags {flags:#x} are not flags")));
        }
        Ok((size, ExportFlags(flags)))
    }

    /// Returns the smallest block and the longest payload.
    fn block_sizes(&self, mut fields: Fields<'_>) -> Result<(u32, u32)> {
        let (Some(min), Some(preferred), Some(max), true) =
            (fields.u32(), fields.u32(), fields.u32(), fields.0.is_empty())
        else {
            return Err(self.wire.error("its block sizes have the wrong length"));
        };
        // the preferred size is a hint, and our requests are larger
        if !min.is_power_of_two() || min > 65536 || max < min {
            let reason = format!("its block sizes make no sense: {min}, {preferred} and {max}");
            return Err(self.wire.error(reason));
        }
        Ok((min, (max - max % min).min(DEFAULT_MAX_PAYLOAD)))
    }

    fn refused(&self, option: u32, export: &str, reply: &OptionReply) -> crate::error::Error {
        let text = clean(&reply.payload);
        let said = if text.is_empty() { String::new() } else { format!(" ({text})") };
        match reply.kind {
            REP_ERR_UNKNOWN => self.wire.error(format!("it has no export {export:?}{said}")),
            REP_ERR_UNSUP if option == OPT_GO => {
                self.wire.error("it does not know NBD_OPT_GO: it is older than 2017")
            }
            kind if kind & REP_ERROR != 0 => {
                let code = kind & !REP_ERROR;
                self.wire.error(format!("it refused export {export:?} with error {code}{said}"))
            }
            kind => self.unexpected(option, kind),
        }
    }

    fn unexpected(&self, option: u32, kind: u32) -> crate::error::Error {
        self.wire.error(format!("it answered option {option} by a reply of type {kind:#x}"))
    }
}

fn put_string(payload: &mut Vec<u8>, text: &str) {
    payload.extend_from_slice(&len_u32(text.as_bytes()).to_be_bytes());
    payload.extend_from_slice(text.as_bytes());
}

fn len_u32(bytes: &[u8]) -> u32 {
    // callers limit names to 4096 bytes and their number to a few
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}

/// Returns a server's text as it may be shown: one line, without control characters.
pub(super) fn clean(text: &[u8]) -> String {
    let text = text.get(..super::MAX_STRING_BYTES).unwrap_or(text);
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    String::from_utf8_lossy(text).trim().chars().map(printable).collect()
}

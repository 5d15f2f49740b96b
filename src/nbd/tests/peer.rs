//! The server's side of the protocol by hand, so that a test can lie at any point of it.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::error::Result;
use crate::monitor::Recorder;
use crate::nbd::{Address, Connection, Options};

pub const DONE: u16 = 1;
pub const SIZE: u64 = 1 << 20;
/// Has flags, flush, write zeroes.
pub const FLAGS: u16 = 0b100_0101;
pub const ACK: u32 = 1;
pub const UNSUP: u32 = (1 << 31) | 1;
pub const DIRTY: &str = "qemu:dirty-bitmap:cp1";

/// A connected client, seen from the server.
pub struct Peer {
    stream: UnixStream,
    sent: Vec<u8>,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub len: u64,
}

/// Puts big-endian fields together.
#[macro_export]
macro_rules! nbd_bytes {
    ($($field:expr),* $(,)?) => {{
        let mut bytes: Vec<u8> = Vec::new();
        $(bytes.extend_from_slice(&$field.to_be_bytes());)*
        bytes
    }};
}
pub use crate::nbd_bytes;

impl Peer {
    /// A client that went away is what a test of lies expects.
    pub fn send(&mut self, bytes: &[u8]) {
        self.sent.extend_from_slice(bytes);
        let _ = self.stream.write_all(bytes);
    }

    /// Returns all that was sent.
    pub fn sent(&self) -> Vec<u8> {
        self.sent.clone()
    }

    pub fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let _ = self.stream.read_exact(&mut bytes);
        bytes
    }

    pub fn take_vec(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let _ = self.stream.read_exact(&mut bytes);
        bytes
    }

    pub fn greet(&mut self) {
        self.send(b"NBDMAGICIHAVEOPT\0\x03");
        assert_eq!(u32::from_be_bytes(self.take()), 3);
    }

    /// Takes an option of the number and returns its payload.
    pub fn option(&mut self, number: u32) -> Vec<u8> {
        assert_eq!(&self.take(), b"IHAVEOPT");
        assert_eq!(u32::from_be_bytes(self.take()), number);
        let len = u32::from_be_bytes(self.take());
        self.take_vec(len as usize)
    }

    pub fn reply(&mut self, option: u32, kind: u32, payload: &[u8]) {
        self.send(&nbd_bytes![0x0003_e889_0455_65a9_u64, option, kind, payload.len() as u32]);
        self.send(payload);
    }

    /// Greets, takes structured replies, with or without extended headers.
    pub fn headers(&mut self, extended: bool) {
        self.greet();
        self.option(11);
        self.reply(11, if extended { ACK } else { UNSUP }, b"");
        if !extended {
            self.option(8);
            self.reply(8, ACK, b"");
        }
    }

    pub fn grant(&mut self, contexts: &[&str]) {
        self.option(10);
        for (id, context) in contexts.iter().enumerate() {
            let mut payload = nbd_bytes![id as u32 + 5];
            payload.extend_from_slice(context.as_bytes());
            self.reply(10, 4, &payload);
        }
        self.reply(10, ACK, b"");
    }

    pub fn go(&mut self, size: u64, flags: u16, blocks: (u32, u32, u32)) {
        self.option(7);
        self.reply(7, 3, &nbd_bytes![1u16, 0x6e61_6d65_u32]);
        self.reply(7, 3, &nbd_bytes![0u16, size, flags]);
        self.reply(7, 3, &nbd_bytes![3u16, blocks.0, blocks.1, blocks.2]);
        self.reply(7, ACK, b"");
    }

    /// An honest handshake of a disk of 1 MiB.
    pub fn handshake(&mut self, extended: bool, contexts: &[&str]) {
        self.headers(extended);
        if !contexts.is_empty() {
            self.grant(contexts);
        }
        self.go(SIZE, FLAGS, (1, 4096, 32 << 20));
    }

    pub fn request(&mut self, extended: bool) -> Request {
        let magic = u32::from_be_bytes(self.take());
        assert_eq!(magic, if extended { 0x21e4_1c71 } else { 0x2560_9513 });
        Request {
            flags: u16::from_be_bytes(self.take()),
            command: u16::from_be_bytes(self.take()),
            cookie: u64::from_be_bytes(self.take()),
            offset: u64::from_be_bytes(self.take()),
            len: if extended {
                u64::from_be_bytes(self.take())
            } else {
                u64::from(u32::from_be_bytes(self.take()))
            },
        }
    }

    pub fn chunk(&mut self, flags: u16, kind: u16, cookie: u64, payload: &[u8]) {
        self.send(&nbd_bytes![0x668e_33ef_u32, flags, kind, cookie, payload.len() as u32]);
        self.send(payload);
    }

    pub fn extended_chunk(&mut self, flags: u16, kind: u16, cookie: u64, payload: &[u8]) {
        self.send(&nbd_bytes![0x6e8a_278c_u32, flags, kind, cookie, 0u64, payload.len() as u64]);
        self.send(payload);
    }

    pub fn data(&mut self, flags: u16, cookie: u64, offset: u64, data: &[u8]) {
        let mut payload = nbd_bytes![offset];
        payload.extend_from_slice(data);
        self.chunk(flags, 1, cookie, &payload);
    }

    pub fn simple(&mut self, error: u32, cookie: u64) {
        self.send(&nbd_bytes![0x6744_6698_u32, error, cookie]);
    }

    /// Waits until the client has gone.
    pub fn wait(&mut self) {
        let _ = self.stream.read_to_end(&mut Vec::new());
    }
}

/// A scripted server for one connection; dropping it joins its thread.
pub struct Server {
    pub address: Address,
    thread: Option<JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

impl Server {
    pub fn start(script: impl FnOnce(&mut Peer) + Send + 'static) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            script(&mut Peer { stream, sent: Vec::new() });
        });
        Self { address: Address::Unix(path), thread: Some(thread), _directory: directory }
    }

    pub fn open(&self, contexts: &[&str]) -> Result<Connection> {
        let contexts: Vec<String> = contexts.iter().map(|context| (*context).to_owned()).collect();
        let options = Options { timeout: Duration::from_millis(400), ..Options::default() };
        Connection::open(&self.address, "vda", &contexts, &options, &Recorder::new())
    }

    /// Ends the script and passes its panic on.
    pub fn join(mut self) {
        self.thread.take().unwrap().join().unwrap();
    }
}

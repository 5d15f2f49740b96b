//! Lies in replies to requests.

use super::peer::*;
use crate::error::{Error, Result};
use crate::extent::ByteRange;
use crate::monitor::Recorder;
use crate::nbd::{ALLOCATION_CONTEXT, Connection, MAX_REPLY_CHUNKS};

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).unwrap()
}

/// Makes a request over an honest handshake and returns the error that its reply leads to.
fn lie<T: std::fmt::Debug>(
    extended: bool,
    contexts: &'static [&'static str],
    client: impl FnOnce(&mut Connection) -> Result<T>,
    script: impl FnOnce(&mut Peer, u64) + Send + 'static,
) -> String {
    let server = Server::start(move |peer| {
        peer.handshake(extended, contexts);
        let request = peer.request(extended);
        script(peer, request.cookie);
    });
    let mut connection = server.open(contexts).unwrap();
    let error = client(&mut connection).expect_err("the lie was believed");
    assert!(matches!(error, Error::Nbd { .. }), "{error:?}");
    let later = read(&mut connection).unwrap_err().to_string();
    assert!(later.contains("ended earlier"), "{later}");
    drop(connection);
    server.join();
    error.to_string()
}

fn read(connection: &mut Connection) -> Result<()> {
    let mut ranges = [range(4096, 8192)].into_iter();
    connection.read_pipelined(&mut ranges, 8, &Recorder::new(), &mut |_, _| Ok(()))
}

fn status(connection: &mut Connection) -> Result<()> {
    connection.block_status(range(0, SIZE), &Recorder::new(), &mut |_, _, _| Ok(()))
}

fn lie_to_read(script: impl FnOnce(&mut Peer, u64) + Send + 'static) -> String {
    lie(false, &[], read, script)
}

const CONTEXTS: &[&str] = &[ALLOCATION_CONTEXT, DIRTY];

fn lie_about_status(script: impl FnOnce(&mut Peer, u64) + Send + 'static) -> String {
    lie(false, CONTEXTS, status, script)
}

#[track_caller]
fn assert_says(error: &str, text: &str) {
    assert!(error.contains(text), "{error:?} does not say {text:?}");
}

#[test]
fn wrong_reply_magic() {
    assert_says(&lie_to_read(|peer, _| peer.send(&[7; 64])), "magic 0x07070707");
    // headers that were not agreed on
    assert_says(&lie_to_read(|peer, cookie| peer.extended_chunk(DONE, 0, cookie, b"")), "magic 0x6e8a278c");
    assert_says(&lie(true, &[], read, |peer, cookie| peer.chunk(DONE, 0, cookie, b"")), "magic 0x668e33ef");
    assert_says(&lie(true, &[], read, |peer, cookie| peer.simple(0, cookie)), "magic 0x67446698");
}

#[test]
fn wrong_cookie() {
    let error = lie_to_read(|peer, cookie| peer.data(DONE, cookie + 1, 4096, &[0; 8192]));
    assert_says(&error, "answered request 2, which is not open");
}

#[test]
fn simple_reply_to_a_structured_read() {
    assert_says(&lie_to_read(|peer, cookie| peer.simple(0, cookie)), "simple reply");
}

#[test]
fn chunks_outside_the_request() {
    for (offset, len) in [(4096, 8193), (4095, 10), (12288, 1), (u64::MAX, 10), (4096, 1 << 20)] {
        let error = lie_to_read(move |peer, cookie| peer.data(DONE, cookie, offset, &vec![0; len]));
        assert_says(&error, &format!("a chunk of {len} bytes at {offset}"));
    }
}

#[test]
fn payload_lengths_that_exceed_everything() {
    for len in [u32::MAX, 1 << 31] {
        let error = lie_to_read(move |peer, cookie| {
            peer.send(&nbd_bytes![0x668e_33ef_u32, DONE, 1u16, cookie, len, 4096u64]);
            peer.wait();
        });
        assert_says(&error, &format!("a chunk of {} bytes at 4096", len - 8));
    }
    let error = lie(true, &[], read, |peer, cookie| {
        peer.send(&nbd_bytes![0x6e8a_278c_u32, DONE, 1u16, cookie, 4096u64, u64::MAX, 4096u64]);
        peer.wait();
    });
    assert_says(&error, "at 4096");
    let error = lie(true, CONTEXTS, status, |peer, cookie| {
        peer.send(&nbd_bytes![0x6e8a_278c_u32, DONE, 6u16, cookie, 0u64, u64::MAX - 7, 5u32]);
        peer.wait();
    });
    assert_says(&error, "extents, at most 1048576 are allowed");
    let error = lie_about_status(|peer, cookie| {
        peer.send(&nbd_bytes![0x668e_33ef_u32, DONE, 5u16, cookie, u32::MAX - 3, 5u32]);
        peer.wait();
    });
    assert_says(&error, "extents, at most 1048576 are allowed");
}

#[test]
fn overlapping_chunks() {
    let error = lie_to_read(|peer, cookie| {
        peer.data(0, cookie, 4096, &[1; 4096]);
        peer.data(DONE, cookie, 8191, &[1; 4097]);
    });
    assert_says(&error, "covers 8191+4097 twice");
    let error = lie_to_read(|peer, cookie| {
        peer.data(0, cookie, 4096, &[1; 8192]);
        peer.chunk(DONE, 2, cookie, &nbd_bytes![4096u64, 512u32]);
    });
    assert_says(&error, "covers 4096+512 twice");
}

#[test]
fn a_reply_that_does_not_cover_all() {
    let error = lie_to_read(|peer, cookie| peer.data(DONE, cookie, 4096, &[1; 8191]));
    assert_says(&error, "ended before it covered all");
    assert_says(&lie_to_read(|peer, cookie| peer.chunk(DONE, 0, cookie, b"")), "ended before it covered all");
}

#[test]
fn chunks_of_wrong_types_and_lengths() {
    type Chunk = (u16, u16, Vec<u8>);
    let wrong: [Chunk; 9] = [
        (DONE, 0, vec![0]),                      // none with a payload
        (0, 0, vec![]),                          // none that is not the last
        (DONE, 1, nbd_bytes![4096u64]),          // data without data
        (DONE, 2, nbd_bytes![4096u64, 0u64]),    // a hole with a wide length
        (DONE, 3, vec![0; 16]),                  // unknown
        (DONE, 5, nbd_bytes![5u32]),             // a status without extents
        (DONE, 5, nbd_bytes![5u32, 0u64, 0u32]), // a status with half an extent
        (DONE, 6, nbd_bytes![5u32, 0u32]),       // an extended one without
        (DONE, 0x7fff, vec![]),                  // unknown
    ];
    for (flags, kind, payload) in wrong {
        let error = lie_to_read(move |peer, cookie| peer.chunk(flags, kind, cookie, &payload));
        assert_says(&error, &format!("a chunk of type {kind} "));
    }
    let error = lie_to_read(|peer, cookie| peer.chunk(DONE, 2, cookie, &nbd_bytes![4096u64, 0u32]));
    assert_says(&error, "a chunk of 0 bytes at 4096");
    let error = lie_to_read(|peer, cookie| peer.chunk(DONE, 5, cookie, &nbd_bytes![5u32, 1u32, 0u32]));
    assert_says(&error, "extents as a reply to reading");
    let error = lie_about_status(|peer, cookie| peer.data(DONE, cookie, 0, b"x"));
    assert_says(&error, "data as a reply to asking about");
}

#[test]
fn a_reply_without_an_end() {
    let error = lie_to_read(|peer, cookie| {
        peer.data(0, cookie, 4096, &[1; 8192]);
        peer.wait();
    });
    assert_says(&error, "nothing moved for 400ms");
    let error = lie_to_read(|peer, cookie| peer.data(0, cookie, 4096, &[1; 8192]));
    assert_says(&error, "closed the connection");
}

#[test]
fn a_chunk_that_stops_in_its_middle() {
    let error = lie_to_read(|peer, cookie| {
        peer.send(&nbd_bytes![0x668e_33ef_u32, DONE, 1u16, cookie, 8200u32, 4096u64, 1u64]);
        peer.wait();
    });
    assert_says(&error, "nothing moved for 400ms");
    let error = lie_to_read(|peer, cookie| {
        peer.send(&nbd_bytes![0x668e_33ef_u32, DONE, 1u16, cookie, 8200u32, 4096u64, 1u64]);
    });
    assert_says(&error, "closed the connection");
}

#[test]
fn chunks_without_end() {
    let error = lie_to_read(|peer, cookie| {
        for _ in 0..=MAX_REPLY_CHUNKS {
            peer.chunk(0, 0x8001, cookie, &nbd_bytes![5u32, 0u16]);
        }
    });
    assert_says(&error, &format!("more than {MAX_REPLY_CHUNKS} chunks"));
    let error = lie_to_read(|peer, cookie| {
        for offset in 0..8192 {
            peer.data(0, cookie, 4096 + offset, b"x");
        }
        peer.chunk(DONE, 0, cookie, b"");
    });
    assert_says(&error, &format!("more than {MAX_REPLY_CHUNKS} chunks"));
}

#[test]
fn error_chunks_with_text() {
    let text = b"bad \x07sector";
    let error = lie_to_read(|peer, cookie| {
        let mut payload = nbd_bytes![5u32, 11u16];
        payload.extend_from_slice(text);
        peer.chunk(0, 0x8001, cookie, &payload);
        peer.chunk(DONE, 0, cookie, b"");
    });
    assert_says(&error, "reading 4096+8192 failed: input/output error: bad  sector");
    let error = lie_to_read(|peer, cookie| {
        let mut payload = nbd_bytes![28u32, 11u16];
        payload.extend_from_slice(text);
        payload.extend_from_slice(&5000u64.to_be_bytes());
        peer.data(0, cookie, 4096, &[1; 8192]);
        peer.chunk(DONE, 0x8002, cookie, &payload);
    });
    assert_says(&error, "no space left at 5000: bad  sector");
    // an error that the specification does not know is one nevertheless
    let error = lie_to_read(|peer, cookie| peer.chunk(DONE, 0xffff, cookie, &nbd_bytes![77u32, 0u16, 1u8]));
    assert_says(&error, "failed: error 77");
    let error = lie_to_read(|peer, cookie| peer.chunk(DONE, 0x8001, cookie, &nbd_bytes![0u32, 0u16]));
    assert_says(&error, "failed: error 0");
}

#[test]
fn error_chunks_with_wrong_lengths() {
    let error = lie_to_read(|peer, cookie| peer.chunk(DONE, 0x8001, cookie, &nbd_bytes![5u32, 4096u16]));
    assert_says(&error, "whose text exceeds it");
    for len in [0u32, 5, 4161, u32::MAX] {
        let error = lie_to_read(move |peer, cookie| {
            peer.send(&nbd_bytes![0x668e_33ef_u32, DONE, 0x8001u16, cookie, len]);
            peer.wait();
        });
        assert_says(&error, &format!("an error of {len} bytes"));
    }
}

/// An honest chunk of the second context, for replies that lie about the first.
fn honest(peer: &mut Peer, cookie: u64) {
    peer.chunk(DONE, 5, cookie, &nbd_bytes![6u32, SIZE as u32, 0u32]);
}

#[test]
fn extents_that_are_empty_or_reach_too_far() {
    for (extents, says) in [
        (nbd_bytes![5u32, 0u32, 0u32], "empty extent at 0"),
        (nbd_bytes![5u32, 512u32, 0u32, 0u32, 1u32], "empty extent at 512"),
        (nbd_bytes![5u32, SIZE as u32 + 1, 0u32], "beyond the disk"),
        (nbd_bytes![5u32, u32::MAX, 0u32], "beyond the disk"),
        (nbd_bytes![5u32, SIZE as u32, 0u32, 1u32, 0u32], "beyond the request"),
    ] {
        let error = lie_about_status(move |peer, cookie| {
            peer.chunk(0, 5, cookie, &extents);
            honest(peer, cookie);
        });
        assert_says(&error, says);
    }
    let error = lie(true, CONTEXTS, status, |peer, cookie| {
        peer.extended_chunk(0, 6, cookie, &nbd_bytes![5u32, 1u32, u64::MAX, 0u64]);
    });
    assert_says(&error, "beyond the disk");
    let error = lie(true, CONTEXTS, status, |peer, cookie| {
        peer.extended_chunk(0, 6, cookie, &nbd_bytes![5u32, 2u32, 512u64, 0u64]);
    });
    assert_says(&error, "states 2 extents and has 1");
}

#[test]
fn contexts_missing_repeated_or_unknown_in_a_reply() {
    assert_says(&lie_about_status(honest), "says nothing about context 5");
    assert_says(&lie_about_status(|peer, cookie| peer.chunk(DONE, 0, cookie, b"")), "says nothing about");
    assert_says(&lie_about_status(|peer, cookie| peer.simple(0, cookie)), "says nothing about");
    let error = lie_about_status(|peer, cookie| {
        peer.chunk(0, 5, cookie, &nbd_bytes![6u32, 512u32, 0u32]);
        honest(peer, cookie);
    });
    assert_says(&error, "describes context 6 twice");
    let error = lie_about_status(|peer, cookie| {
        peer.chunk(0, 5, cookie, &nbd_bytes![7u32, 512u32, 0u32]);
    });
    assert_says(&error, "context 7, which was not agreed on");
}

#[test]
fn a_write_that_fails_is_reported_by_the_flush() {
    let write = |connection: &mut Connection| {
        let monitor = Recorder::new();
        connection.write(0, &[1; 512], &monitor)?;
        connection.flush(&monitor)
    };
    let error = lie(false, &[], write, |peer, cookie| {
        peer.take_vec(512);
        peer.simple(28, cookie);
    });
    assert_says(&error, "writing 0+512 failed: no space left");
    // a second reply to what was answered already
    let error = lie(false, &[], write, |peer, cookie| {
        peer.take_vec(512);
        peer.simple(0, cookie);
        peer.simple(0, cookie);
        // the client is to meet the lie, not a closed connection
        std::thread::sleep(std::time::Duration::from_millis(200));
    });
    assert_says(&error, "answered request 1, which is not open");
}

#[test]
fn a_server_that_stops_reading_ends_in_a_timeout() {
    let write = |connection: &mut Connection| connection.write(0, &vec![1; 1 << 20], &Recorder::new());
    let error = lie(false, &[], write, |_, _| std::thread::sleep(std::time::Duration::from_millis(900)));
    assert_says(&error, "nothing moved for 400ms while sending");
}

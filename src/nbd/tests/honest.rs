//! Against scripted servers that keep to the protocol, but use all the freedom that it gives.

use proptest::prelude::*;

use super::peer::*;
use crate::buffer::Payload;
use crate::error::Result;
use crate::extent::{ByteRange, RangeSet};
use crate::monitor::Recorder;
use crate::nbd::{ALLOCATION_CONTEXT, Connection, WINDOW_BYTES};

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).unwrap()
}

/// Reads all of `ranges` and returns what came, in the order in which it came.
fn read_all(
    connection: &mut Connection,
    ranges: Vec<ByteRange>,
    in_flight: usize,
) -> Result<Vec<(ByteRange, Payload)>> {
    let mut got = Vec::new();
    connection.read_pipelined(
        &mut ranges.into_iter(),
        in_flight,
        &Recorder::new(),
        &mut |range, payload| {
            got.push((range, payload));
            Ok(())
        },
    )?;
    Ok(got)
}

fn content(offset: u64) -> u8 {
    (offset / 512 + offset % 251) as u8
}

fn bytes_of(range: ByteRange) -> Vec<u8> {
    (range.start()..range.end()).map(content).collect()
}

#[test]
fn a_server_without_extended_headers_or_structured_replies() {
    let server = Server::start(|peer| {
        peer.greet();
        for option in [11, 8] {
            peer.option(option);
            peer.reply(option, UNSUP, b"unknown option");
        }
        peer.go(SIZE, FLAGS, (1, 4096, 32 << 20));
        let first = peer.request(false);
        let second = peer.request(false);
        for request in [second, first] {
            peer.simple(0, request.cookie);
            peer.send(&bytes_of(range(request.offset, request.len)));
        }
        assert_eq!(peer.request(false).command, 2);
    });
    let mut connection = server.open(&[]).unwrap();
    assert!(!connection.has_extended_headers());
    let ranges = vec![range(3, 1000), range(5000, 77)];
    let got = read_all(&mut connection, ranges.clone(), 8).unwrap();
    let expected: Vec<_> =
        ranges.iter().map(|range| (*range, Payload::Data(bytes_of(*range).into()))).collect();
    assert_eq!(got, expected);
    connection.disconnect(&Recorder::new()).unwrap();
    server.join();
}

#[test]
fn contexts_with_extents_of_their_own_fall_back_to_compact_headers() {
    const CONTEXTS: &[&str] = &[ALLOCATION_CONTEXT, DIRTY];
    let server = Server::start(|peer| {
        peer.handshake(false, CONTEXTS);
        let first = peer.request(false);
        assert_eq!((first.command, first.offset, first.len), (7, 1000, 600_000));
        // allocation is ahead, and reaches beyond the request; the bitmap stops early
        let ahead = nbd_bytes![5u32, 100_000u32, 0u32, 600_000u32, 3u32];
        peer.chunk(0, 5, first.cookie, &ahead);
        peer.chunk(DONE, 5, first.cookie, &nbd_bytes![6u32, 9_000u32, 1u32]);
        let second = peer.request(false);
        assert_eq!((second.offset, second.len), (10_000, 591_000));
        peer.chunk(0, 5, second.cookie, &nbd_bytes![6u32, 90_000u32, 0u32, 501_000u32, 1u32]);
        peer.chunk(0, 5, second.cookie, &nbd_bytes![5u32, 1u32, 0u32]);
        peer.chunk(DONE, 0, second.cookie, b"");
    });
    let mut connection = server.open(CONTEXTS).unwrap();
    let mut got = [Vec::new(), Vec::new()];
    let mut sink = |context: usize, range: ByteRange, flags: u64| {
        got[context].push((range, flags));
        Ok(())
    };
    connection.block_status(range(1000, 600_000), &Recorder::new(), &mut sink).unwrap();
    assert_eq!(connection.context_index(DIRTY), Some(1));
    assert_eq!(got[0], [(range(1000, 100_000), 0), (range(101_000, 500_000), 3)]);
    assert_eq!(got[1], [(range(1000, 9000), 1), (range(10_000, 90_000), 0), (range(100_000, 501_000), 1)]);
    drop(connection);
    server.join();
}

#[test]
fn extended_headers_ask_about_everything_at_once() {
    const SIZE: u64 = 1 << 43;
    let server = Server::start(|peer| {
        peer.headers(true);
        peer.grant(&[DIRTY]);
        peer.go(SIZE, FLAGS, (1, 4096, 32 << 20));
        let request = peer.request(true);
        assert_eq!((request.command, request.offset, request.len), (7, 0, SIZE));
        let payload = nbd_bytes![5u32, 2u32, SIZE - 512, 0u64, 512u64, 1u64];
        peer.extended_chunk(DONE, 6, request.cookie, &payload);
        let request = peer.request(true);
        // the payload flag
        assert_eq!((request.command, request.flags, request.len), (1, 1 << 5, 3));
        assert_eq!(&peer.take(), b"abc");
        peer.extended_chunk(DONE, 0, request.cookie, b"");
        assert_eq!(peer.request(true).command, 2);
    });
    let mut connection = server.open(&[DIRTY]).unwrap();
    let mut got = Vec::new();
    let mut sink = |_, range: ByteRange, flags| {
        got.push((range, flags));
        Ok(())
    };
    connection.block_status(range(0, SIZE), &Recorder::new(), &mut sink).unwrap();
    assert_eq!(got, [(range(0, SIZE - 512), 0), (range(SIZE - 512, 512), 1)]);
    connection.write(5, b"abc", &Recorder::new()).unwrap();
    connection.disconnect(&Recorder::new()).unwrap();
    server.join();
}

#[test]
fn compact_headers_ask_at_most_about_what_32_bits_hold() {
    const SIZE: u64 = 10 << 30;
    let server = Server::start(|peer| {
        peer.headers(false);
        peer.grant(&[DIRTY]);
        peer.go(SIZE, FLAGS, (1, 4096, 32 << 20));
        for _ in 0..3 {
            let request = peer.request(false);
            peer.chunk(DONE, 5, request.cookie, &nbd_bytes![5u32, request.len as u32, 1u32]);
        }
    });
    let mut connection = server.open(&[DIRTY]).unwrap();
    let mut dirty = RangeSet::new();
    let mut sink = |_, range: ByteRange, _| {
        dirty.push(range);
        Ok(())
    };
    connection.block_status(range(0, SIZE), &Recorder::new(), &mut sink).unwrap();
    assert_eq!(dirty, RangeSet::whole(SIZE));
    drop(connection);
    server.join();
}

#[test]
fn requests_are_whole_blocks_and_not_too_long() {
    let server = Server::start(|peer| {
        peer.headers(false);
        // no power of two: a multiple of the smallest block is all that is promised
        peer.go(SIZE, FLAGS, (512, 4096, 512 * 1025));
        let mut requests = Vec::new();
        for _ in 0..3 {
            let request = peer.request(false);
            peer.data(DONE, request.cookie, request.offset, &bytes_of(range(request.offset, request.len)));
            requests.push((request.offset, request.len));
        }
        assert_eq!(requests, [(512, (512 << 10) - 512), (512 << 10, 1024), (1024 << 9, 512)]);
    });
    let mut connection = server.open(&[]).unwrap();
    assert_eq!(connection.min_block(), 512);
    let half = 512 << 10;
    let ranges = vec![range(1000, half), range(half + 1, 3)];
    let got = read_all(&mut connection, ranges, 2).unwrap();
    let expected = [range(1000, half - 1000), range(half, 1000), range(half + 1, 3)];
    assert_eq!(got, expected.map(|range| (range, Payload::Data(bytes_of(range).into()))));
    let error = connection.write(100, &[0; 512], &Recorder::new()).unwrap_err();
    assert!(error.to_string().contains("whole 512-byte blocks"), "{error}");
    drop(connection);
    server.join();
}

#[test]
fn zeroes_are_written_where_they_cannot_be_asked_for() {
    let server = Server::start(|peer| {
        peer.headers(false);
        peer.go(SIZE, 0b101, (1, 4096, 32 << 20));
        let request = peer.request(false);
        assert_eq!((request.command, request.offset, request.len), (1, 10, 4000));
        assert_eq!(peer.take_vec(4000), [0; 4000]);
        peer.simple(0, request.cookie);
        let request = peer.request(false);
        assert_eq!(request.command, 3);
        peer.chunk(DONE, 0, request.cookie, b"");
    });
    let mut connection = server.open(&[]).unwrap();
    connection.write_zeroes(range(10, 4000), true, &Recorder::new()).unwrap();
    connection.flush(&Recorder::new()).unwrap();
    drop(connection);
    server.join();
}

#[test]
fn what_the_export_does_not_allow_is_not_sent() {
    let server = Server::start(|peer| {
        peer.headers(false);
        // read-only, no flush
        peer.go(SIZE, 0b11, (1, 4096, 32 << 20));
        assert_eq!(peer.request(false).command, 2);
    });
    let mut connection = server.open(&[]).unwrap();
    let monitor = Recorder::new();
    let mut nothing = |_, _, _| Ok(());
    for (error, says) in [
        (connection.write(0, b"x", &monitor), "read-only"),
        (connection.write_zeroes(range(0, 1), false, &monitor), "read-only"),
        (connection.flush(&monitor), "no flush"),
        (connection.block_status(range(0, 1), &monitor, &mut nothing), "no metadata context"),
        (connection.write(SIZE, b"x", &monitor), "beyond"),
        (connection.write(u64::MAX, b"xy", &monitor), "beyond"),
    ] {
        let error = error.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
    // none of that ended the connection
    drop(connection);
    server.join();
}

#[test]
fn reading_stops_at_what_the_sink_says() {
    let server = Server::start(|peer| {
        peer.handshake(false, &[]);
        let request = peer.request(false);
        peer.data(DONE, request.cookie, request.offset, &[1; 512]);
        peer.wait();
    });
    let mut connection = server.open(&[]).unwrap();
    let mut ranges = [range(0, 512), range(4096, 512)].into_iter();
    let mut sink = |_, _| Err(crate::error::Error::Damaged("full".into()));
    let error = connection.read_pipelined(&mut ranges, 1, &Recorder::new(), &mut sink).unwrap_err();
    assert_eq!(error.to_string(), "damage: full");
    drop(connection);
    server.join();
}

/// Answers `count` reads, `window` at a time, cut and shuffled by `seed`.
fn answer(peer: &mut Peer, mut count: usize, window: usize, mut seed: u64) {
    let mut random = move |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    while count > 0 {
        let batch = window.min(count);
        count -= batch;
        let mut parts = Vec::new();
        for _ in 0..batch {
            let request = peer.request(false);
            let (mut at, end) = (request.offset, request.offset + request.len);
            while at < end {
                let len = (1 + random(1 << 19)).min(end - at);
                parts.push((request.cookie, at, len));
                at += len;
            }
        }
        while !parts.is_empty() {
            let (cookie, at, len) = parts.swap_remove(random(parts.len() as u64) as usize);
            let is_last = parts.iter().all(|(other, ..)| *other != cookie);
            let flags = if is_last && random(2) == 0 { DONE } else { 0 };
            if is_zero(at / HOLE) && is_zero((at + len - 1) / HOLE) && len <= HOLE {
                peer.chunk(flags, 2, cookie, &nbd_bytes![at, len as u32]);
            } else {
                peer.data(flags, cookie, at, &holey(range(at, len)));
            }
            if is_last && flags == 0 {
                peer.chunk(DONE, 0, cookie, b"");
            }
        }
    }
}

const HOLE: u64 = 300_000;

fn is_zero(stripe: u64) -> bool {
    stripe % 3 == 1
}

fn holey(range: ByteRange) -> Vec<u8> {
    let byte = |at: u64| if is_zero(at / HOLE) { 0 } else { content(at) };
    (range.start()..range.end()).map(byte).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn fragments_in_any_order_are_put_together(
        seed in any::<u64>(),
        in_flight in 1usize..6,
        spans in proptest::collection::vec((1u64..900_000, 1u64..2_500_000), 1..5),
    ) {
        let (mut ranges, mut at) = (Vec::new(), 0);
        for (gap, len) in spans {
            ranges.push(range(at + gap, len));
            at += gap + len;
        }
        let size = at;
        let pieces: u64 = ranges
            .iter()
            .map(|range| (range.end() - 1) / WINDOW_BYTES - range.start() / WINDOW_BYTES + 1)
            .sum();
        let server = Server::start(move |peer| {
            peer.headers(false);
            peer.go(size, FLAGS, (1, 4096, 32 << 20));
            answer(peer, pieces as usize, in_flight, seed);
        });
        let mut connection = server.open(&[]).unwrap();
        let got = read_all(&mut connection, ranges.clone(), in_flight).unwrap();
        prop_assert_eq!(got.len() as u64, pieces);
        for (range, payload) in &got {
            prop_assert_eq!(range.start() / WINDOW_BYTES, (range.end() - 1) / WINDOW_BYTES);
            match payload {
                Payload::Data(bytes) => prop_assert!(**bytes == holey(*range)),
                Payload::Zero => prop_assert!(holey(*range).iter().all(|byte| *byte == 0)),
            }
        }
        prop_assert!(got.windows(2).all(|pair| pair[0].0.end() <= pair[1].0.start()));
        let read: RangeSet = got.into_iter().map(|(range, _)| range).collect();
        prop_assert_eq!(read, ranges.into_iter().collect::<RangeSet>());
        drop(connection);
        server.join();
    }
}

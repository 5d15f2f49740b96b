//! What a server says, changed at random: the client never hangs and never panics.

use super::peer::*;
use crate::buffer::Payload;
use crate::extent::ByteRange;
use crate::monitor::Recorder;
use crate::mutate::fuzz;
use crate::nbd::{ALLOCATION_CONTEXT, Connection};

const CONTEXTS: &[&str] = &[ALLOCATION_CONTEXT, DIRTY];

/// What a client asks that got through the handshake.
fn ask(connection: &mut Connection) {
    let whole = ByteRange::new(0, SIZE).unwrap();
    if connection.block_status(whole, &Recorder::new(), &mut |_, _, _| Ok(())).is_ok() {
        let mut ranges = [ByteRange::new(4096, 8192).unwrap()].into_iter();
        let _ = connection.read_pipelined(&mut ranges, 8, &Recorder::new(), &mut |range, data| {
            assert!(matches!(data, Payload::Data(bytes) if bytes.len() as u64 == range.len()));
            Ok(())
        });
    }
}

/// Returns all that an honest server sends in one connection.
fn honest(extended: bool) -> Vec<u8> {
    let (sender, receiver) = std::sync::mpsc::channel();
    let server = Server::start(move |peer| {
        peer.handshake(extended, CONTEXTS);
        for _ in 0..2 {
            let request = peer.request(extended);
            // one extent of the whole disk in either context
            for context in [5u32, 6] {
                let done = if context == 6 { DONE } else { 0 };
                if extended {
                    let payload = nbd_bytes![context, 1u32, SIZE, 0u64];
                    peer.extended_chunk(done, 6, request.cookie, &payload);
                } else {
                    let payload = nbd_bytes![context, SIZE as u32, 0u32];
                    peer.chunk(done, 5, request.cookie, &payload);
                }
            }
            if request.command == 7 {
                let read = peer.request(extended);
                if !extended {
                    peer.data(DONE, read.cookie, 4096, &[7; 8192]);
                }
                break;
            }
        }
        sender.send(peer.sent()).unwrap();
    });
    if let Ok(mut connection) = server.open(CONTEXTS) {
        ask(&mut connection);
    }
    receiver.recv().unwrap()
}

#[test]
fn a_server_that_says_anything() {
    let test = concat!(module_path!(), "::alone_server");
    crate::mutate::finish_alone(crate::mutate::start_alone(test, &[]));
}

#[test]
#[ignore = "measures its own process: run by a_server_that_says_anything"]
fn alone_server() {
    let samples = [honest(false), honest(true)];
    assert!(samples.iter().all(|sample| sample.len() > 200), "the honest server was not understood");
    fuzz("NBD server", &samples, false, 12.0, &mut |bytes| {
        let said = bytes.to_vec();
        // everything at once: a client that waits for more meets the end
        let server = Server::start(move |peer| peer.send(&said));
        if let Ok(mut connection) = server.open(CONTEXTS) {
            ask(&mut connection);
        }
        server.join();
    });
}

//! Lies and refusals before the first request.

use std::time::{Duration, Instant};

use super::peer::*;
use crate::error::{Error, ErrorClass};
use crate::monitor::Recorder;
use crate::nbd::{ALLOCATION_CONTEXT, Address, Connection, MAX_OPTION_REPLY_BYTES, Options};

/// Connects to the script and returns the error that comes of it.
fn refused(contexts: &[&str], script: impl FnOnce(&mut Peer) + Send + 'static) -> String {
    let server = Server::start(script);
    let error = server.open(contexts).expect_err("the lie was believed");
    server.join();
    assert!(matches!(error, Error::Nbd { .. }), "{error:?}");
    error.to_string()
}

#[track_caller]
fn assert_says(error: &str, text: &str) {
    assert!(error.contains(text), "{error:?} does not say {text:?}");
}

#[test]
fn wrong_magic() {
    let error = refused(&[], |peer| peer.send(b"HTTP/1.1 400 Bad Request\r\n"));
    assert_says(&error, "does not speak NBD");
}

#[test]
fn oldstyle_and_unknown_styles() {
    let error = refused(&[], |peer| peer.send(b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53\0\0"));
    assert_says(&error, "oldstyle");
    let error = refused(&[], |peer| peer.send(b"NBDMAGICIHAVENOT\0\x03"));
    assert_says(&error, "neither");
    let error = refused(&[], |peer| peer.send(b"NBDMAGICIHAVEOPT\0\x02"));
    assert_says(&error, "no fixed newstyle");
}

#[test]
fn early_close() {
    assert_says(&refused(&[], |_| {}), "closed the connection while greeting");
    let error = refused(&[], |peer| {
        peer.greet();
        peer.option(11);
    });
    assert_says(&error, "closed the connection while negotiating");
}

#[test]
fn huge_option_reply() {
    let error = refused(&[], |peer| {
        peer.greet();
        peer.option(11);
        peer.send(&nbd_bytes![0x0003_e889_0455_65a9_u64, 11u32, ACK, u32::MAX]);
        peer.wait();
    });
    assert_says(&error, &format!("has {} bytes, at most {MAX_OPTION_REPLY_BYTES}", u32::MAX));
}

#[test]
fn reply_to_another_option_and_of_another_kind() {
    let error = refused(&[], |peer| {
        peer.greet();
        peer.option(11);
        peer.reply(8, ACK, b"");
    });
    assert_says(&error, "answered option 8 when asked for option 11");
    let error = refused(&[], |peer| {
        peer.greet();
        peer.option(11);
        peer.reply(11, 77, b"");
    });
    assert_says(&error, "type 0x4d");
    let error = refused(&[], |peer| {
        peer.greet();
        peer.option(11);
        peer.send(&nbd_bytes![1u64, 11u32, ACK, 0u32]);
    });
    assert_says(&error, "option reply has another magic");
}

#[test]
fn tls_required() {
    let error = refused(&[], |peer| {
        peer.greet();
        peer.option(11);
        peer.reply(11, (1 << 31) | 5, b"");
    });
    assert_says(&error, "insists on TLS");
}

#[test]
fn export_unknown_with_a_text_that_is_cleaned() {
    let error = refused(&[], |peer| {
        peer.headers(true);
        assert_eq!(peer.option(7), b"\0\0\0\x03vda\0\x01\0\x03");
        peer.reply(7, (1 << 31) | 6, b"export 'vda'\x1b[2J not\npresent");
    });
    assert_says(&error, "it has no export \"vda\" (export 'vda' [2J not present)");
}

#[test]
fn context_dropped_in_silence() {
    let error = refused(&[ALLOCATION_CONTEXT, DIRTY], |peer| {
        peer.headers(false);
        peer.grant(&[ALLOCATION_CONTEXT]);
    });
    assert_says(&error, "has no metadata context \"qemu:dirty-bitmap:cp1\"");
}

#[test]
fn context_granted_twice_or_unasked() {
    let error = refused(&[DIRTY], |peer| {
        peer.headers(false);
        peer.grant(&[DIRTY, DIRTY]);
    });
    assert_says(&error, "twice");
    let error = refused(&[DIRTY], |peer| {
        peer.headers(false);
        peer.grant(&["qemu:dirty-bitmap:cp11"]);
    });
    assert_says(&error, "nobody asked for");
    let error = refused(&[ALLOCATION_CONTEXT, DIRTY], |peer| {
        peer.headers(false);
        peer.option(10);
        for context in [ALLOCATION_CONTEXT, DIRTY] {
            let mut payload = nbd_bytes![1u32];
            payload.extend_from_slice(context.as_bytes());
            peer.reply(10, 4, &payload);
        }
    });
    assert_says(&error, "twice");
    let error = refused(&[DIRTY], |peer| {
        peer.headers(false);
        peer.option(10);
        peer.reply(10, 4, b"\0\0");
    });
    assert_says(&error, "without an id");
}

#[test]
fn contexts_need_structured_replies() {
    let error = refused(&[DIRTY], |peer| {
        peer.greet();
        for option in [11, 8] {
            peer.option(option);
            peer.reply(option, UNSUP, b"");
        }
    });
    assert_says(&error, "no structured replies");
}

#[test]
fn impossible_sizes() {
    for size in [u64::MAX, 1 << 63] {
        let error = refused(&[], move |peer| {
            peer.headers(false);
            peer.go(size, FLAGS, (1, 4096, 32 << 20));
        });
        assert_says(&error, &format!("has {size} bytes"));
    }
}

#[test]
fn impossible_block_sizes() {
    for blocks in [(0, 4096, 32 << 20), (3, 4096, 4096), (4096, 4096, 512), (1 << 17, 1 << 17, 32 << 20)] {
        let error = refused(&[], move |peer| {
            peer.headers(false);
            peer.go(SIZE, FLAGS, blocks);
        });
        assert_says(&error, "block sizes make no sense");
    }
}

#[test]
fn export_described_wrongly_or_not_at_all() {
    let error = refused(&[], |peer| {
        peer.headers(false);
        peer.option(7);
        peer.reply(7, ACK, b"");
    });
    assert_says(&error, "did not say how large");
    let error = refused(&[], |peer| {
        peer.headers(false);
        peer.option(7);
        peer.reply(7, 3, &nbd_bytes![0u16, SIZE]);
    });
    assert_says(&error, "wrong length");
    let error = refused(&[], |peer| {
        peer.headers(false);
        peer.go(SIZE, 0, (1, 4096, 32 << 20));
    });
    assert_says(&error, "are not flags");
}

#[test]
fn endless_descriptions() {
    let error = refused(&[], |peer| {
        peer.headers(false);
        peer.option(7);
        for _ in 0..1000 {
            peer.reply(7, 3, &nbd_bytes![2u16, 0u64]);
        }
    });
    assert_says(&error, "does not end");
}

#[test]
fn silence_ends_in_a_timeout() {
    let begun = Instant::now();
    let error = refused(&[], |peer| {
        peer.greet();
        peer.wait();
    });
    assert_says(&error, "400ms");
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_handshake_byte_by_byte_ends_in_a_timeout() {
    let error = refused(&[], |peer| {
        for byte in b"NBDMAGICIHAVEOPT\0\x03" {
            peer.send(&[*byte]);
            std::thread::sleep(Duration::from_millis(60));
        }
    });
    assert_says(&error, "the handshake took longer");
}

#[test]
fn a_server_that_does_not_accept_ends_in_a_timeout() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let options = Options { timeout: Duration::from_millis(300), ..Options::default() };
    // fill the queue of connections, whatever its length is here
    let mut queued = Vec::new();
    let address = Address::Unix(path.clone());
    let error = loop {
        match Connection::open(
            &address,
            "",
            &[],
            &Options { timeout: Duration::ZERO, ..options.clone() },
            &Recorder::new(),
        ) {
            Err(Error::Nbd { .. }) | Err(Error::Io { .. }) if queued.len() < 5000 => {}
            other => panic!("{other:?}"),
        }
        let socket =
            rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None)
                .unwrap();
        rustix::net::sockopt::set_socket_timeout(
            &socket,
            rustix::net::sockopt::Timeout::Send,
            Some(Duration::from_millis(50)),
        )
        .unwrap();
        let is_full =
            rustix::net::connect(&socket, &rustix::net::SocketAddrUnix::new(&path).unwrap()).is_err();
        queued.push(socket);
        if is_full {
            break Connection::open(&address, "", &[], &options, &Recorder::new()).unwrap_err();
        }
    };
    assert!(matches!(error, Error::Io { .. }), "{error:?}");
}

#[test]
fn nothing_listens() {
    let address = Address::Unix("/nonexistent/socket".into());
    let error = Connection::open(&address, "", &[], &Options::default(), &Recorder::new()).unwrap_err();
    assert_eq!(error.to_string(), "cannot connect to NBD server /nonexistent/socket");
}

#[test]
fn cancelling_ends_the_wait() {
    let server = Server::start(|peer| peer.wait());
    let monitor = Recorder::new();
    monitor.cancel();
    let error = Connection::open(&server.address, "", &[], &Options::default(), &monitor).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Cancelled);
    // the script waits for a connection
    let _ = server.open(&[]);
    server.join();
}

#[test]
fn names_that_cannot_be_sent() {
    let address = Address::Unix("/nonexistent/socket".into());
    let open = |export: &str, contexts: &[String]| {
        Connection::open(&address, export, contexts, &Options::default(), &Recorder::new()).unwrap_err()
    };
    assert_eq!(open(&"x".repeat(4097), &[]).class(), ErrorClass::Usage);
    assert_eq!(open("", &["x".repeat(4097)]).class(), ErrorClass::Usage);
    assert_eq!(open("", &vec!["x".to_owned(); 17]).class(), ErrorClass::Usage);
}

//! Against the real `qemu-nbd`, with `qemu-io`, `qemu-img` and `nbdinfo` as the second opinion.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use crate::buffer::Payload;
use crate::extent::{ByteRange, RangeSet};
use crate::monitor::Recorder;
use crate::nbd::{ALLOCATION_CONTEXT, Address, Connection, Options, STATE_DIRTY, STATE_ZERO};

const SIZE: u64 = 64 << 20;

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("this test needs {program}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

fn qemu_io(image: &Path, commands: &[&str]) {
    let image = image.to_str().unwrap();
    let mut arguments = vec!["-f", "qcow2"];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    arguments.push(image);
    let text = run("qemu-io", &arguments);
    assert!(!text.contains("failed"), "{text}");
}

struct Lab {
    directory: tempfile::TempDir,
    server: Option<Child>,
}

impl Lab {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap(), server: None }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A qcow2 image with data, zero clusters, a hole, and what is dirty in the bitmap `cp`.
    fn image(&self) -> PathBuf {
        let image = self.path("disk.qcow2");
        run("qemu-img", &["create", "-q", "-f", "qcow2", image.to_str().unwrap(), "64M"]);
        qemu_io(&image, &["write -P 0x11 1M 3M", "write -P 0x22 20000000 100000", "write -z 8M 1M"]);
        run("qemu-img", &["bitmap", "--add", image.to_str().unwrap(), "cp"]);
        qemu_io(&image, &["write -P 0x33 2M 64k", "discard 3M 1M", "write -P 0x44 67108352 512"]);
        image
    }

    fn serve(&mut self, image: &Path, arguments: &[&str]) {
        self.stop();
        let socket = self.path("socket");
        let child = Command::new("qemu-nbd")
            .args(["-t", "-f", "qcow2", "-x", "vda", "-k"])
            .arg(&socket)
            .args(arguments)
            .arg(image)
            .spawn()
            .unwrap();
        self.server = Some(child);
        for _ in 0..500 {
            // it is there before anybody listens
            if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("qemu-nbd does not listen");
    }

    fn stop(&mut self) {
        if let Some(mut child) = self.server.take() {
            child.kill().unwrap();
            child.wait().unwrap();
            let _ = std::fs::remove_file(self.path("socket"));
        }
    }

    fn open(&self, contexts: &[&str], extended_headers: bool) -> crate::error::Result<Connection> {
        let contexts: Vec<String> = contexts.iter().map(|name| (*name).to_owned()).collect();
        let options = Options { timeout: Duration::from_secs(20), extended_headers };
        Connection::open(&Address::Unix(self.path("socket")), "vda", &contexts, &options, &Recorder::new())
    }

    /// What nbdinfo says has `flags` in a context.
    fn map(&self, context: &str, has: fn(u64) -> bool) -> RangeSet {
        let uri = format!("nbd+unix:///vda?socket={}", self.path("socket").display());
        let text = run("nbdinfo", &[&format!("--map={context}"), "--json", &uri]);
        let extents: serde_json::Value = serde_json::from_str(&text).unwrap();
        let number = |extent: &serde_json::Value, key: &str| extent[key].as_u64().unwrap();
        let extents = extents.as_array().unwrap();
        extents
            .iter()
            .filter(|extent| has(number(extent, "type")))
            .filter_map(|extent| ByteRange::new(number(extent, "offset"), number(extent, "length")))
            .collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.stop();
    }
}

fn is_dirty(flags: u64) -> bool {
    flags & STATE_DIRTY != 0
}

fn is_data(flags: u64) -> bool {
    flags & STATE_ZERO == 0
}

fn read_image(connection: &mut Connection, ranges: RangeSet) -> (Vec<u8>, u64) {
    let (mut image, mut read) = (vec![0; usize::try_from(connection.size()).unwrap()], 0);
    let mut sink = |range: ByteRange, payload| {
        if let Payload::Data(bytes) = payload {
            read += range.len();
            assert_eq!(bytes.len() as u64, range.len());
            image[range.start() as usize..range.end() as usize].copy_from_slice(&bytes);
        }
        Ok(())
    };
    connection.read_pipelined(&mut ranges.iter(), 8, &Recorder::new(), &mut sink).unwrap();
    (image, read)
}

#[test]
fn maps_and_content_of_a_qcow2_image() {
    let mut lab = Lab::new();
    let image = lab.image();
    let raw = lab.path("raw");
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", image.to_str().unwrap(), raw.to_str().unwrap()]);
    let expected = std::fs::read(raw).unwrap();
    lab.serve(&image, &["-r", "-B", "cp", "-e", "2"]);
    let dirty_context = "qemu:dirty-bitmap:cp";
    for extended_headers in [true, false] {
        let mut connection = lab.open(&[ALLOCATION_CONTEXT, dirty_context], extended_headers).unwrap();
        assert_eq!(connection.has_extended_headers(), extended_headers);
        assert_eq!(connection.size(), SIZE);
        assert!(connection.flags().is_read_only());
        let (mut data, mut dirty) = (RangeSet::new(), RangeSet::new());
        let mut sink = |context, range, flags| {
            match context {
                0 if is_data(flags) => data.push(range),
                1 if is_dirty(flags) => dirty.push(range),
                _ => {}
            }
            Ok(())
        };
        connection.block_status(ByteRange::new(0, SIZE).unwrap(), &Recorder::new(), &mut sink).unwrap();
        assert_eq!(data, lab.map(ALLOCATION_CONTEXT, is_data));
        assert_eq!(dirty, lab.map(dirty_context, is_dirty));
        assert_eq!(dirty.total_bytes(), (64 << 10) + (1 << 20) + (64 << 10));
        assert!(!data.is_empty() && data.total_bytes() < 4 << 20);

        let (content, read) = read_image(&mut connection, RangeSet::whole(SIZE));
        assert!(content == expected);
        assert!(read < 6 << 20, "{read} bytes were sent although most are holes");
        let (content, _) = read_image(&mut connection, data);
        assert!(content == expected);
    }
}

#[test]
fn a_bitmap_that_is_not_exported_is_an_error() {
    let mut lab = Lab::new();
    let image = lab.image();
    lab.serve(&image, &["-r"]);
    let error = lab.open(&[ALLOCATION_CONTEXT, "qemu:dirty-bitmap:cp"], true).unwrap_err();
    assert!(error.to_string().contains("has no metadata context \"qemu:dirty-bitmap:cp\""), "{error}");
    let options = Options::default();
    let address = Address::Unix(lab.path("socket"));
    let error = Connection::open(&address, "vdb", &[], &options, &Recorder::new()).unwrap_err();
    assert!(error.to_string().contains("it has no export \"vdb\""), "{error}");
}

#[test]
fn writes_arrive() {
    for extended_headers in [true, false] {
        let mut lab = Lab::new();
        let source = lab.image();
        let raw = lab.path("raw");
        let (source_name, raw_name) = (source.to_str().unwrap(), raw.to_str().unwrap());
        run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", source_name, raw_name]);
        let content = std::fs::read(raw).unwrap();

        let target = lab.path("target.qcow2");
        run("qemu-img", &["create", "-q", "-f", "qcow2", target.to_str().unwrap(), "64M"]);
        // what the target must not show afterwards
        qemu_io(&target, &["write -P 0x99 0 32M"]);
        lab.serve(&target, &["--discard=unmap"]);
        let monitor = Recorder::new();
        let mut connection = lab.open(&[], extended_headers).unwrap();
        let step = 3 << 19;
        for (index, piece) in content.chunks(step).enumerate() {
            let offset = (index * step) as u64;
            if piece.iter().all(|byte| *byte == 0) {
                let range = ByteRange::new(offset, piece.len() as u64).unwrap();
                connection.write_zeroes(range, index % 2 == 0, &monitor).unwrap();
            } else {
                connection.write(offset, piece, &monitor).unwrap();
            }
        }
        connection.flush(&monitor).unwrap();
        let (back, _) = read_image(&mut connection, RangeSet::whole(SIZE));
        assert!(back == content);
        connection.disconnect(&monitor).unwrap();
        lab.stop();
        run("qemu-img", &["compare", "-f", "qcow2", "-F", "qcow2", source_name, target.to_str().unwrap()]);
    }
}

#[test]
fn a_server_that_dies_is_an_error_soon() {
    let mut lab = Lab::new();
    let image = lab.image();
    lab.serve(&image, &["-r"]);
    let mut connection = lab.open(&[], true).unwrap();
    lab.stop();
    let mut ranges = RangeSet::whole(SIZE).iter().collect::<Vec<_>>().into_iter();
    let error = connection.read_pipelined(&mut ranges, 8, &Recorder::new(), &mut |_, _| Ok(())).unwrap_err();
    assert!(error.to_string().contains("closed the connection"), "{error}");
}

//! `vmkeep version`.

use serde::Serialize;
use vmkeep::error::Result;
use vmkeep::format::limits::FORMAT_VERSION;

use super::App;
use super::exit::Exit;

/// Version of this program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

#[derive(Debug, Serialize)]
struct VersionView {
    version: &'static str,
    /// Newest repository format that it reads, and the one that it writes.
    format_version: u16,
    /// Built with libvirt: it can back up domains.
    libvirt: bool,
    /// Built with RocksDB: it keeps its index on disk.
    rocksdb: bool,
}

/// Runs the command.
///
/// # Errors
/// [`vmkeep::error::Error::Io`] if stdout cannot be written.
pub fn run(app: &App) -> Result<Exit> {
    let view = VersionView {
        version: VERSION,
        format_version: FORMAT_VERSION,
        libvirt: cfg!(feature = "libvirt"),
        rocksdb: cfg!(feature = "rocksdb"),
    };
    if app.output.json {
        app.output.json_line(&view)?;
        return Ok(Exit::Done);
    }
    let with = |built: bool| if built { "with" } else { "without" };
    app.output.line(&format!(
        "vmkeep {VERSION}, repository format {FORMAT_VERSION}, {} libvirt, {} rocksdb",
        with(view.libvirt),
        with(view.rocksdb)
    ))?;
    Ok(Exit::Done)
}

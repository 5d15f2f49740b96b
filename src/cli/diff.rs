//! `vmkeep diff`.

use serde::Serialize;
use vmkeep::error::{Error, Result};
use vmkeep::ops::diff::{DiskDiff, diff_points};
use vmkeep::ops::select::select;

use super::exit::Exit;
use super::work::Work;
use super::{App, units};

#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  vmkeep diff web01~1 web01
  vmkeep diff 3fa9:vda 77c2:vda --json

The two maps are compared; no disk content is read.")]
pub struct Args {
    /// A point; `:DISK` behind it limits the comparison to that disk
    #[arg(value_name = "A")]
    a: String,
    /// The point to compare it with
    #[arg(value_name = "B")]
    b: String,
}

#[derive(Debug, Serialize)]
struct DiffView<'a> {
    a: String,
    b: String,
    disks: &'a [DiskDiff],
    bytes: u64,
}

/// Runs the command.
///
/// # Errors
/// Those of the selectors and of the repository.
pub fn run(args: &Args, app: &App) -> Result<Exit> {
    let work = Work::open(app)?;
    work.watch_signals()?;
    let entries = work.points()?;
    let (a, b) = (select(&entries, &args.a, &work.now)?, select(&entries, &args.b, &work.now)?);
    let disk = match (a.disk, b.disk) {
        (Some(a), Some(b)) if a != b => {
            return Err(Error::Usage(format!("disk {a} cannot be compared with disk {b}")));
        }
        (a, b) => a.or(b),
    };
    let disks = diff_points(&work.repository, &a.entry.record, &b.entry.record, disk, &work.progress)?;
    work.progress.clear();
    let bytes = disks.iter().map(|disk| disk.bytes).sum();
    if app.output.json {
        let view =
            DiffView { a: a.entry.record.id.to_hex(), b: b.entry.record.id.to_hex(), disks: &disks, bytes };
        app.output.json_line(&view)?;
        return Ok(Exit::Done);
    }
    for disk in &disks {
        for (offset, len) in &disk.ranges {
            app.output.line(&format!("{} {offset} {len}", disk.disk))?;
        }
    }
    app.output.remark(&format!("{} differ", units::size(bytes)));
    Ok(Exit::Done)
}

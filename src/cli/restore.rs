//! `vmkeep restore`.

use std::path::PathBuf;

use serde::Serialize;
use vmkeep::error::{Error, Result};
use vmkeep::ops::restore::{ImageFormat, OnDamage, RestoreOptions, RestoreOutput, RestoreReport, restore};
use vmkeep::ops::select::{select, short_id};

use super::exit::Exit;
use super::output::Table;
use super::work::Work;
use super::{App, units};

#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  vmkeep restore web01 -o /srv/restored
  vmkeep restore web01@2026-07-05 -o /srv/restored --format qcow2 --disk vda
  vmkeep restore 3fa9 --to vda=/dev/vg0/web01 --to vdb=/srv/web01-data.raw

No other point is needed. Every chunk is checked before it is written; a file gets its name once it is complete.")]
pub struct Args {
    /// The point; `:DISK` behind it selects one disk
    #[arg(value_name = "POINT")]
    point: String,
    /// Restore the disks, the domain's definition and its firmware variables into a directory
    #[arg(short, long, value_name = "DIR", conflicts_with = "to", required_unless_present = "to")]
    output: Option<PathBuf>,
    /// Restore one disk to a file or block device
    #[arg(long, value_name = "DISK=TARGET", value_parser = parse_target)]
    to: Vec<(String, PathBuf)>,
    /// Only these disks
    #[arg(long, value_name = "DISK", value_delimiter = ',')]
    disk: Vec<String>,
    /// Format of image files [default: raw]
    #[arg(long, value_parser = ["raw", "qcow2"])]
    format: Option<String>,
    /// Write over files that exist
    #[arg(short, long)]
    force: bool,
    /// What to do where content is lost: fail, or write zeroes and say where (exit code 4); a side file of which anything is
    /// lost is left out
    #[arg(long, value_name = "fail|zero", value_parser = ["fail", "zero"], default_value = "fail")]
    on_damage: String,
    /// Only say what would be restored
    #[arg(short = 'n', long)]
    dry_run: bool,
}

fn parse_target(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((disk, target)) if !disk.is_empty() && !target.is_empty() => {
            Ok((disk.to_owned(), PathBuf::from(target)))
        }
        _ => Err(format!("{text:?} is not of the form DISK=TARGET")),
    }
}

#[derive(Debug, Serialize)]
struct RestoreView<'a> {
    message_type: &'static str,
    point: String,
    domain: &'a str,
    #[serde(flatten)]
    report: &'a RestoreReport,
}

/// Runs the command.
///
/// # Errors
/// Those of the selector and of [`restore`].
pub fn run(args: &Args, app: &App) -> Result<Exit> {
    let options = options(args, app)?;
    let work = Work::open(app)?;
    work.watch_signals()?;
    let entries = work.points()?;
    let selected = select(&entries, &args.point, &work.now)?;
    let options = with_selected_disk(options, selected.disk, &args.point)?;
    let record = &selected.entry.record;
    let report = restore(&work.repository, record, &options, &work.progress)?;
    work.progress.clear();
    let exit = if report.is_whole() { Exit::Done } else { Exit::Damage };
    if app.output.json {
        let view = RestoreView {
            message_type: "summary",
            point: record.id.to_hex(),
            domain: &record.domain,
            report: &report,
        };
        app.output.json_line(&view)?;
        return Ok(exit);
    }
    for disk in report.disks.iter().filter(|disk| !disk.missing.is_empty()) {
        let bytes = disk.missing.iter().map(|(_, len)| len).sum();
        let count = units::count(disk.missing.len(), "range");
        app.output.line(&format!(
            "{}: {} lost in {count}, written as zeroes",
            disk.disk,
            units::size(bytes)
        ))?;
        for (start, len) in disk.missing.iter().take(16) {
            app.output.line(&format!("  {start}+{len}"))?;
        }
    }
    for lost in &report.lost_files {
        let size = units::size(lost.size);
        app.output.line(&format!(
            "{}: lost, {size}; {} was not written",
            lost.file,
            lost.target.display()
        ))?;
    }
    if app.output.quiet {
        return Ok(exit);
    }
    let verb = if report.dry_run { "would restore" } else { "restored" };
    app.output.line(&format!("{verb} {} of {}", short_id(&entries, record.id), record.domain))?;
    let mut table = Table::new(&["DISK", ">SIZE", ">DATA", "TARGET"]);
    for disk in &report.disks {
        let target = disk.target.display().to_string();
        table.row([disk.disk.as_str(), &units::size(disk.size), &units::size(disk.data_bytes), &target]);
    }
    for file in &report.files {
        table.row(["-", "-", "-", &file.display().to_string()]);
    }
    app.output.bytes(table.render().as_bytes())?;
    Ok(exit)
}

fn options(args: &Args, app: &App) -> Result<RestoreOptions> {
    let format = args.format.as_ref().or(app.settings.restore.format.as_ref());
    let format = match format.map(String::as_str) {
        None | Some("raw") => ImageFormat::Raw,
        Some("qcow2") => ImageFormat::Qcow2,
        Some(other) => return Err(Error::Usage(format!("format {other:?} is neither raw nor qcow2"))),
    };
    let output = match &args.output {
        Some(directory) => RestoreOutput::Directory(directory.clone()),
        None if args.disk.is_empty() => RestoreOutput::Targets(args.to.clone()),
        None => return Err(Error::Usage("--disk goes with -o; --to names its disk itself".into())),
    };
    if let RestoreOutput::Targets(targets) = &output {
        for (number, (disk, path)) in targets.iter().enumerate() {
            if targets.iter().skip(number + 1).any(|(other, same)| other == disk || same == path) {
                return Err(Error::Usage(format!("{disk}={} collides with another --to", path.display())));
            }
        }
    }
    let disks = args.disk.clone();
    let on_damage = if args.on_damage == "zero" { OnDamage::Zero } else { OnDamage::Fail };
    Ok(RestoreOptions { output, disks, format, force: args.force, on_damage, dry_run: args.dry_run })
}

fn with_selected_disk(mut options: RestoreOptions, disk: Option<&str>, text: &str) -> Result<RestoreOptions> {
    let Some(disk) = disk else { return Ok(options) };
    let differs = match &options.output {
        RestoreOutput::Targets(targets) => targets.iter().any(|(name, _)| name != disk),
        RestoreOutput::Directory(_) => options.disks.iter().any(|name| name != disk),
    };
    if differs {
        return Err(Error::Usage(format!("{text} selects disk {disk}, another option names another disk")));
    }
    options.disks = vec![disk.to_owned()];
    Ok(options)
}

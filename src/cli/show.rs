//! `vmkeep show`.

use serde::Serialize;
use vmkeep::error::{Error, Result};
use vmkeep::ops::PointEntry;
use vmkeep::ops::diff::data_extents;
use vmkeep::ops::explain::{Link, chain};
use vmkeep::ops::select::{select, short_id};

use super::exit::Exit;
use super::output::Table;
use super::views::{self, PointView};
use super::work::Work;
use super::{App, units};

#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  vmkeep show web01
  vmkeep show web01@saturday --explain
  vmkeep show web01:vda --extents
  vmkeep show 3fa9 --xml > web01.xml")]
pub struct Args {
    /// The point
    #[arg(value_name = "POINT")]
    point: String,
    /// Print the persistent definition of the domain
    #[arg(long, group = "what")]
    xml: bool,
    /// Print the classic chain of full, differential and incremental that the point would need elsewhere
    #[arg(long, group = "what")]
    explain: bool,
    /// Print the extents that hold data: disk, offset, length in bytes
    #[arg(long, group = "what")]
    extents: bool,
}

/// Runs the command.
///
/// # Errors
/// Those of the selector and of the repository.
pub fn run(args: &Args, app: &App) -> Result<Exit> {
    let work = Work::open(app)?;
    let entries = work.points()?;
    let selected = select(&entries, &args.point, &work.now)?;
    let entry = selected.entry;
    if args.xml {
        return xml(entry, app);
    }
    if args.explain {
        return explain(&entries, entry, app);
    }
    if args.extents {
        return extents(&work, entry, selected.disk, app);
    }
    if app.output.json {
        app.output.json_line(&PointView::from(entry))?;
        return Ok(Exit::Done);
    }
    details(&work, &entries, entry, app)
}

fn xml(entry: &PointEntry, app: &App) -> Result<Exit> {
    let xml = entry.record.xml_inactive.as_ref().or(entry.record.xml_live.as_ref());
    let xml = xml.ok_or_else(|| Error::NotFound {
        object: format!(
            "a definition of the domain in point {} (it was made without libvirt)",
            entry.record.id
        ),
    })?;
    app.output.bytes(xml.as_bytes())?;
    Ok(Exit::Done)
}

#[derive(Debug, Serialize)]
struct LinkView {
    point: String,
    forgotten: bool,
    level: Option<&'static str>,
    time: Option<String>,
}

#[derive(Debug, Serialize)]
struct ExplainView {
    point: String,
    chain: Vec<LinkView>,
    text: String,
}

fn explain(entries: &[PointEntry], entry: &PointEntry, app: &App) -> Result<Exit> {
    let links = chain(entries, entry.record.id).unwrap_or_default();
    let zone = jiff::tz::TimeZone::system();
    let link_text = |link: &Link<'_>| match link {
        Link::Point(entry) => {
            let time =
                jiff::Timestamp::from_millisecond(entry.record.time_ms).unwrap_or(jiff::Timestamp::MAX);
            let day = time.to_zoned_datetime(zone.clone()).strftime("%a %Y-%m-%d %H:%M").to_string();
            format!("{}({day})", capital(views::short_level(entry.record.level)))
        }
        Link::Forgotten(id) => format!("forgotten({})", short_id(entries, *id)),
    };
    let text = links.iter().map(link_text).collect::<Vec<_>>().join(" + ");
    if app.output.json {
        let view = |link: &Link<'_>| match link {
            Link::Point(entry) => LinkView {
                point: entry.record.id.to_hex(),
                forgotten: false,
                level: Some(views::level(entry.record.level)),
                time: Some(units::utc(entry.record.time_ms)),
            },
            Link::Forgotten(id) => LinkView { point: id.to_hex(), forgotten: true, level: None, time: None },
        };
        let chain = links.iter().map(view).collect();
        app.output.json_line(&ExplainView { point: entry.record.id.to_hex(), chain, text })?;
        return Ok(Exit::Done);
    }
    app.output.line(&text)?;
    app.output.remark("a restore needs none of them: the point is complete by itself");
    Ok(Exit::Done)
}

fn capital(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| format!("{}{}", first.to_uppercase(), letters.as_str()))
}

#[derive(Debug, Serialize)]
struct DiskExtents {
    disk: String,
    /// First byte and length, bytes.
    ranges: Vec<(u64, u64)>,
}

#[derive(Debug, Serialize)]
struct ExtentsView {
    point: String,
    disks: Vec<DiskExtents>,
}

fn extents(work: &Work, entry: &PointEntry, disk: Option<&str>, app: &App) -> Result<Exit> {
    work.watch_signals()?;
    let mut view = ExtentsView { point: entry.record.id.to_hex(), disks: Vec::new() };
    for record in entry.record.disks.iter().filter(|record| disk.is_none_or(|disk| record.target == disk)) {
        let mut ranges = Vec::new();
        data_extents(&work.repository, &record.manifest, &work.progress, &mut |range| {
            if app.output.json {
                ranges.push((range.start(), range.len()));
                return Ok(());
            }
            app.output.line(&format!("{} {} {}", record.target, range.start(), range.len()))
        })?;
        view.disks.push(DiskExtents { disk: record.target.clone(), ranges });
    }
    work.progress.clear();
    if app.output.json {
        app.output.json_line(&view)?;
    }
    Ok(Exit::Done)
}

fn details(work: &Work, entries: &[PointEntry], entry: &PointEntry, app: &App) -> Result<Exit> {
    let record = &entry.record;
    let output = &app.output;
    output.line(&format!("point       {}", record.id.to_hex()))?;
    output.line(&format!("domain      {}", record.domain))?;
    output.line(&format!("time        {}", units::local(record.time_ms, &work.now)))?;
    let base = record.base.map(|base| format!(", compared with {}", short_id(entries, base)));
    output.line(&format!("level       {}{}", views::level(record.level), base.unwrap_or_default()))?;
    output.line(&format!("state       {}", views::consistency(record.consistency)))?;
    if let Some(checkpoint) = &record.checkpoint {
        output.line(&format!("checkpoint  {checkpoint}"))?;
    }
    if !record.tags.is_empty() {
        output.line(&format!("tags        {}", record.tags.join(", ")))?;
    }
    output.line(&format!("made by     {} on {}", record.program, record.host))?;
    output.line("")?;
    let mut table = Table::new(&["DISK", ">SIZE", "FORMAT", "READ AS", "WHY"]);
    for disk in &record.disks {
        table.row([
            disk.target.as_str(),
            &units::size(disk.manifest.size),
            &disk.format,
            views::level(disk.level),
            disk.full_reason.as_deref().unwrap_or_default(),
        ]);
    }
    output.bytes(table.render().as_bytes())?;
    output.line("")?;
    let mut table = Table::new(&["NUMBER", ">SIZE", "MEANING"]);
    for (name, value, meaning) in views::numbers(&entry.stats) {
        table.row([name, value.as_str(), meaning]);
    }
    output.bytes(table.render().as_bytes())?;
    Ok(Exit::Done)
}

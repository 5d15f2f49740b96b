//! `vmkeep prune`.

use serde::Serialize;
use vmkeep::error::Result;
use vmkeep::format::name::ObjectName;
use vmkeep::ops::prune::{PackAction, PruneOptions, PruneReport, prune};

use super::exit::Exit;
use super::work::Work;
use super::{App, units};

#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  vmkeep prune -n -v
  vmkeep prune --max-unused 10%

Backups may run meanwhile: prune waits for those that began before it, and later ones rely on nothing that it is \
about to delete. -v lists every pack that goes.")]
pub struct Args {
    /// Unused bytes that may stay, of all that is stored
    #[arg(long, value_name = "PERCENT", default_value = "5%", value_parser = parse_permille)]
    max_unused: u64,
    /// Stored bytes to write anew at most
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size)]
    max_repack: Option<u64>,
    /// Only say what would be done
    #[arg(short = 'n', long)]
    dry_run: bool,
}

/// Reads a percentage as thousandths.
///
/// # Errors
/// A text for the user.
pub fn parse_permille(text: &str) -> Result<u64, String> {
    let number = text.strip_suffix('%').unwrap_or(text);
    match number.parse::<f64>() {
        // checked to be from 0 to 100
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        Ok(percent) if (0.0..=100.0).contains(&percent) => Ok((percent * 10.0) as u64),
        _ => Err(format!("{text:?} is no percentage from 0% to 100%")),
    }
}

#[derive(Debug, Serialize)]
struct PruneView<'a> {
    message_type: &'static str,
    #[serde(flatten)]
    report: &'a PruneReport,
}

/// Runs the command.
///
/// # Errors
/// Those of [`prune`].
pub fn run(args: &Args, app: &App) -> Result<Exit> {
    let work = Work::open(app)?;
    work.watch_signals()?;
    let options = PruneOptions {
        max_unused_permille: args.max_unused,
        max_repack_bytes: args.max_repack.unwrap_or(u64::MAX),
        dry_run: args.dry_run,
    };
    let report = prune(&work.repository, &options, &work.progress)?;
    work.progress.clear();
    print(app, &report)?;
    Ok(Exit::Done)
}

/// Prints what was done, or would be.
///
/// # Errors
/// [`vmkeep::error::Error::Io`] if stdout cannot be written.
pub fn print(app: &App, report: &PruneReport) -> Result<()> {
    if app.output.json {
        return app.output.json_line(&PruneView { message_type: "summary", report });
    }
    if app.output.quiet {
        return Ok(());
    }
    for planned in report.packs.iter().filter(|_| app.output.verbose) {
        let action = match planned.action {
            PackAction::Delete => "delete",
            PackAction::Rewrite => "rewrite",
        };
        let (stored, unused) = (units::size(planned.stored_bytes), units::size(planned.unused_bytes));
        app.output
            .line(&format!("{action} {}: {stored}, {unused} unused", ObjectName::Pack(planned.pack)))?;
    }
    let (before, after) = (report.stored_before_bytes, report.stored_after_bytes);
    let verb = if report.dry_run { "would drop" } else { "dropped" };
    app.output.line(&format!(
        "{verb} {} and {}; {} of them hold something that is needed and {} written anew",
        units::count(report.dropped_points.len(), "forgotten point"),
        units::count(usize::try_from(report.deleted_packs).unwrap_or(usize::MAX), "pack"),
        report.repacked_packs,
        if report.dry_run { "would be" } else { "were" },
    ))?;
    app.output.line(&format!(
        "stored: {} before, {} after, {} freed",
        units::size(before),
        units::size(after),
        units::size(before.saturating_sub(after))
    ))
}

//! `vmkeep forget`.

use serde::Serialize;
use vmkeep::error::{Error, Result};
use vmkeep::ops::forget::{ForgetReport, forget};
use vmkeep::ops::select::short_id;

use super::exit::Exit;
use super::output::confirm;
use super::work::Work;
use super::{App, units};

#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  vmkeep forget web01~3
  vmkeep forget 3fa9 77c2 -n

A forgotten point is no longer shown and restores no longer; all others restore as before, whatever they were \
compared with. The space is reclaimed by prune.")]
pub struct Args {
    /// The points to forget
    #[arg(value_name = "POINT", required = true)]
    points: Vec<String>,
    /// Only say what would be forgotten
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Do not ask
    #[arg(short, long)]
    yes: bool,
}

#[derive(Debug, Serialize)]
struct ForgetView<'a> {
    message_type: &'static str,
    #[serde(flatten)]
    report: &'a ForgetReport,
}

/// Runs the command.
///
/// # Errors
/// Those of the selectors and of the repository; [`Error::Cancelled`] if the user does not agree.
pub fn run(args: &Args, app: &App) -> Result<Exit> {
    let work = Work::open(app)?;
    let entries = work.points()?;
    let ids = work.select_all(&entries, &args.points)?;
    let names: Vec<String> = ids.iter().map(|id| short_id(&entries, *id)).collect();
    let what = format!("{} ({})", units::count(ids.len(), "point"), names.join(", "));
    if !args.dry_run && !args.yes {
        match confirm(&format!("forget {what}?")) {
            Some(true) => {}
            Some(false) => return Err(Error::Cancelled),
            None => return Err(Error::Usage("without a terminal to ask on, forget needs -y".into())),
        }
    }
    work.watch_signals()?;
    let report = forget(&work.repository, &ids, "asked for by name", args.dry_run, &work.progress)?;
    work.progress.clear();
    if app.output.json {
        app.output.json_line(&ForgetView { message_type: "summary", report: &report })?;
    } else if !app.output.quiet {
        let verb = if args.dry_run { "would forget" } else { "forgot" };
        app.output.line(&format!("{verb} {what}"))?;
    }
    Ok(Exit::Done)
}

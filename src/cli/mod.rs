//! The command line: one file per command, from arguments to the library's options and from its reports to text
//! or JSON. Nothing here knows how a backup works; nothing below here prints.

mod backup;
mod cat;
mod checkpoints;
mod completions;
mod config;
mod diff;
mod doctor;
mod exit;
mod forget;
mod hold;
mod init;
mod man;
mod output;
mod points;
mod progress;
mod prune;
mod repair;
mod restore;
mod show;
mod signals;
mod stats;
mod units;
mod verify;
mod version;
mod views;
mod work;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use vmkeep::error::Result;

use self::config::Settings;
use self::exit::Exit;
use self::output::Output;

/// Backs up libvirt/QEMU virtual machines into a deduplicating repository
#[derive(Debug, Parser)]
#[command(
    name = "vmkeep",
    version,
    arg_required_else_help = true,
    max_term_width = 100,
    long_about = "Backs up libvirt/QEMU virtual machines into a content-addressed, deduplicating repository.

Every point is complete: it restores without any other point, whatever level it was made with. A point is named by \
the first digits of its id, `latest`, `latest~2`, DOMAIN, DOMAIN~2, DOMAIN@2026-07-05T12:00, DOMAIN@saturday or \
DOMAIN@CHECKPOINT; `:vda` behind it selects a disk. A copy that `repair points` made of a damaged point is named by its \
id alone as long as the damaged one is there: of the two, that one may heal.",
    after_long_help = "Environment:
  VMKEEP_REPOSITORY, VMKEEP_REPOSITORY_FILE  the repository, or a file whose first line names it
  VMKEEP_CACHE_DIR                           where the local index lives
  VMKEEP_PROGRESS_FPS                        how often progress is reported
  LIBVIRT_DEFAULT_URI                        the libvirt to connect to
  NO_COLOR                                   no colours

Profiles: NAME.toml in /etc/vmkeep and ~/.config/vmkeep; -P NAME selects one, else default.toml is read.

Exit codes: 0 done, 1 failed, 2 usage, 3 finished but incomplete, 4 damage found, 10 no repository, 11 fenced or \
busy, 12 wrong key, 13 libvirt or domain unreachable, 130 cancelled."
)]
struct Arguments {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// The repository: a path or URL [env: VMKEEP_REPOSITORY, VMKEEP_REPOSITORY_FILE]
    #[arg(short, long, visible_alias = "repo", global = true, value_name = "REPO")]
    pub repository: Option<String>,
    /// Read the settings of NAME.toml
    #[arg(short = 'P', long, global = true, value_name = "NAME")]
    pub profile: Option<String>,
    /// The libvirt to connect to [env: LIBVIRT_DEFAULT_URI]
    #[arg(short = 'c', visible_short_alias = 'U', long, alias = "uri", global = true, value_name = "URI")]
    pub connect: Option<String>,
    /// Print JSON: lists as one document, long commands as lines
    #[arg(long, global = true)]
    pub json: bool,
    /// Print results, warnings and errors only
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Print what is done on the way
    #[arg(short, long, global = true)]
    pub verbose: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a repository
    Init(init::Args),
    /// Back up domains, or a single image
    Backup(Box<backup::Args>),
    /// List points
    #[command(visible_alias = "ls")]
    Points(points::Args),
    /// Show a point
    Show(show::Args),
    /// List the extents in which two points differ
    Diff(diff::Args),
    /// Count what points hold and what the repository takes
    Stats(stats::Args),
    /// Restore a point
    Restore(restore::Args),
    /// Forget points, by name or by a policy
    Forget(Box<forget::Args>),
    /// Keep points from being forgotten
    Hold(hold::HoldArgs),
    /// Release held points
    Unhold(hold::UnholdArgs),
    /// Bring forgotten points back
    Undelete(hold::UndeleteArgs),
    /// Reclaim what no point needs
    #[command(visible_alias = "gc")]
    Prune(prune::Args),
    /// Check the repository without changing it
    #[command(visible_alias = "check")]
    Verify(verify::Args),
    /// Look for what is lost and store it again
    #[command(subcommand)]
    Repair(repair::Command),
    /// List a domain's checkpoints and bitmaps beside the points that left them
    Checkpoints(checkpoints::Args),
    /// Find out what is wrong with host and domains, and mend it
    Doctor(doctor::Args),
    /// Print a decoded object or the content of a chunk
    Cat(cat::Args),
    /// Look at the settings
    #[command(subcommand)]
    Config(config::Command),
    /// Print completions for a shell
    Completions(completions::Args),
    /// Print the manual page, or write all of them into a directory
    Man(man::Args),
    /// Print the version
    #[command(after_long_help = "Examples:\n  vmkeep version --json")]
    Version,
}

/// What every command is given.
#[derive(Debug)]
pub struct App {
    pub output: Output,
    pub settings: Settings,
}

/// Runs the program.
pub fn run() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let json = std::env::args_os().any(|argument| argument == "--json");
            return exit::report_usage(&error, json).into();
        }
    };
    let Global { json, quiet, verbose, .. } = arguments.global;
    let output = Output { json, quiet, verbose };
    let settings = Settings::of_process(&arguments.global);
    let ended = settings.and_then(|settings| {
        let app = App { output: output.clone(), settings };
        dispatch(&arguments.command, &app)
    });
    ended.unwrap_or_else(|error| exit::report(&output, None, &error)).into()
}

fn dispatch(command: &Command, app: &App) -> Result<Exit> {
    match command {
        Command::Init(args) => init::run(args, app),
        Command::Backup(args) => backup::run(args, app),
        Command::Points(args) => points::run(args, app),
        Command::Show(args) => show::run(args, app),
        Command::Diff(args) => diff::run(args, app),
        Command::Stats(args) => stats::run(args, app),
        Command::Restore(args) => restore::run(args, app),
        Command::Forget(args) => forget::run(args, app),
        Command::Hold(args) => hold::run_hold(args, app),
        Command::Unhold(args) => hold::run_unhold(args, app),
        Command::Undelete(args) => hold::run_undelete(args, app),
        Command::Prune(args) => prune::run(args, app),
        Command::Verify(args) => verify::run(args, app),
        Command::Repair(command) => repair::run(command, app),
        Command::Checkpoints(args) => checkpoints::run(args, app),
        Command::Doctor(args) => doctor::run(args, app),
        Command::Cat(args) => cat::run(args, app),
        Command::Config(command) => config::run(command, app),
        Command::Completions(args) => completions::run(args, app),
        Command::Man(args) => man::run(args, app),
        Command::Version => version::run(app),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn every_command_tells_what_it_does_and_gives_examples() {
        fn check(command: &clap::Command, path: &str) {
            for sub in command.get_subcommands() {
                let path = format!("{path} {}", sub.get_name());
                assert!(sub.get_about().is_some_and(|about| !about.to_string().ends_with('.')), "{path}");
                let has_subs = sub.get_subcommands().next().is_some();
                let help = sub.get_after_long_help().map(ToString::to_string).unwrap_or_default();
                assert!(has_subs || help.matches("\n  vmkeep ").count() >= 1, "{path} has no example");
                check(sub, &path);
            }
        }
        check(&Arguments::command(), "vmkeep");
    }
}

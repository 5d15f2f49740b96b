//! `vmkeep man`.

use std::path::PathBuf;

use clap::CommandFactory;
use vmkeep::error::{Error, Result};

use super::exit::Exit;
use super::{App, Arguments};

#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  vmkeep man | man -l -
  vmkeep man /usr/local/share/man/man1")]
pub struct Args {
    /// Write vmkeep.1 and a page for each command here; without it vmkeep.1 is printed
    dir: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// [`Error::Io`] if the pages cannot be written.
pub fn run(args: &Args, app: &App) -> Result<Exit> {
    let command = Arguments::command();
    if let Some(dir) = &args.dir {
        std::fs::create_dir_all(dir).map_err(|error| Error::io("create", dir.display(), error))?;
        clap_mangen::generate_to(command, dir)
            .map_err(|error| Error::io("write manual pages into", dir.display(), error))?;
        return Ok(Exit::Done);
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(command)
        .render(&mut page)
        .map_err(|error| Error::io("write", "the manual page", error))?;
    app.output.bytes(&page)?;
    Ok(Exit::Done)
}

//! `vmkeep completions`.

use clap::CommandFactory;
use clap_complete::Shell;
use vmkeep::error::Result;

use super::exit::Exit;
use super::{App, Arguments};

#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  vmkeep completions bash > /etc/bash_completion.d/vmkeep
  vmkeep completions zsh > ~/.zfunc/_vmkeep
  vmkeep completions fish > ~/.config/fish/completions/vmkeep.fish")]
pub struct Args {
    /// The shell
    shell: Shell,
}

/// Runs the command.
///
/// # Errors
/// [`vmkeep::error::Error::Io`] if stdout cannot be written.
pub fn run(args: &Args, app: &App) -> Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Arguments::command(), "vmkeep", &mut script);
    app.output.bytes(&script)?;
    Ok(Exit::Done)
}

//! `vmkeep init`.

use serde::Serialize;
use vmkeep::chunk::DEFAULT_ZSTD_LEVEL;
use vmkeep::error::{Error, Result};
use vmkeep::format::config::CutterParams;
use vmkeep::repo::{CreateOptions, Repository};
use vmkeep::storage;

use super::App;
use super::exit::Exit;
use super::{units, work};

#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  vmkeep -r /srv/vmkeep init
  vmkeep -r /srv/vmkeep init --compression 9

The storage is probed first: that an object is never created twice, and is read and listed as it was written.")]
pub struct Args {
    /// Average length of a chunk, a power of two between 4K and 256K
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size)]
    chunk_size: Option<u64>,
    /// zstd level of disk content, from -7 (quick) to 22 (small)
    #[arg(long, value_name = "LEVEL", default_value_t = DEFAULT_ZSTD_LEVEL, allow_negative_numbers = true)]
    compression: i32,
}

#[derive(Debug, Serialize)]
struct InitView<'a> {
    message_type: &'static str,
    repository: &'a str,
    id: String,
}

/// Runs the command.
///
/// # Errors
/// There is a repository already; the storage is not fit to hold one.
pub fn run(args: &Args, app: &App) -> Result<Exit> {
    let url = app.settings.repository()?;
    let mut options = CreateOptions { zstd_level: args.compression, ..CreateOptions::default() };
    if let Some(average) = args.chunk_size {
        let average = u32::try_from(average)
            .ok()
            .filter(|average| average.is_power_of_two() && (4096..=256 << 10).contains(average))
            .ok_or_else(|| {
                Error::Usage(format!("--chunk-size {average} is no power of two from 4K to 256K"))
            })?;
        options.cutter = CutterParams {
            min_len: (average / 4).max(4096),
            average_len: average,
            max_len: average * 4,
            ..options.cutter
        };
    }
    let repository = Repository::create(storage::create_url(url)?, &options, &work::environment()?)?;
    let id = repository.id().to_hex();
    if app.output.json {
        app.output.json_line(&InitView { message_type: "summary", repository: url, id })?;
    } else if !app.output.quiet {
        app.output.line(&format!("created repository {} at {url}", id.get(..8).unwrap_or(&id)))?;
    }
    if !repository.config().storage.create_if_absent {
        app.output
            .remark("the storage cannot refuse to create an object twice: only one writer at a time is safe");
    }
    Ok(Exit::Done)
}

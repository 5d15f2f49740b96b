//! `vmkeep cat`.

use clap::ValueEnum;
use vmkeep::error::Result;
use vmkeep::ops::cat::{CatKind, Content, cat};

use super::App;
use super::exit::Exit;
use super::work::Work;

/// What can be printed.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kind {
    Config,
    Point,
    Outcome,
    Session,
    Segment,
    Pack,
    Node,
    Chunk,
    Mark,
    Tombstone,
    Damage,
}

#[derive(Debug, clap::Args)]
#[command(after_long_help = "Examples:
  vmkeep cat config
  vmkeep cat point 3fa9d2c6e8b14a7790aa0c51e2f0b7d1
  vmkeep cat chunk ID > chunk.bin

Ids are given whole, that of a damage record as its file is called: PACK.SESSION. A chunk is printed as it is, everything else as JSON.")]
pub struct Args {
    /// Kind of object
    #[arg(value_enum)]
    kind: Kind,
    /// Id of the object; config has none
    #[arg(default_value = "")]
    id: String,
}

/// Runs the command.
///
/// # Errors
/// Those of [`cat`].
pub fn run(args: &Args, app: &App) -> Result<Exit> {
    let work = Work::open(app)?;
    let kind = match args.kind {
        Kind::Config => CatKind::Config,
        Kind::Point => CatKind::Point,
        Kind::Outcome => CatKind::Outcome,
        Kind::Session => CatKind::Session,
        Kind::Segment => CatKind::Segment,
        Kind::Pack => CatKind::Pack,
        Kind::Node => CatKind::Node,
        Kind::Chunk => CatKind::Chunk,
        Kind::Mark => CatKind::Mark,
        Kind::Tombstone => CatKind::Tombstone,
        Kind::Damage => CatKind::Damage,
    };
    match cat(&work.repository, kind, &args.id, &work.progress)? {
        Content::Bytes(bytes) => app.output.bytes(&bytes)?,
        Content::Object(value) if app.output.json => app.output.json_line(&value)?,
        Content::Object(value) => app.output.line(&format!("{value:#}"))?,
    }
    Ok(Exit::Done)
}

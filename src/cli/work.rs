//! What most commands begin with: the repository opened, the progress shown, the points selected.

use std::sync::LazyLock;
use std::time::Duration;

use jiff::ZonedDateTime;
use vmkeep::error::{Error, Result};
use vmkeep::id::PointId;
use vmkeep::ops::{PointEntry, points, select};
use vmkeep::repo::{Environment, Repository, Timing};
use vmkeep::storage;

use super::progress::Progress;
use super::version::VERSION;
use super::{App, signals};

/// A repository and the monitor of the work on it.
pub struct Work {
    pub repository: Repository,
    pub progress: Progress,
    /// When it was asked for first, in the zone of the system: to find out which one that is takes a directory of 600 files.
    pub now: LazyLock<ZonedDateTime>,
}

/// Returns who and when we are.
///
/// # Errors
/// [`Error::Io`] if the system does not tell.
pub fn environment() -> Result<Environment> {
    const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
    const MACHINE_ID: &str = "/etc/machine-id";
    let boot_id = std::fs::read_to_string(BOOT_ID).map_err(|error| Error::io("read", BOOT_ID, error))?;
    let system = rustix::system::uname();
    let boot_id = match std::fs::read_to_string(MACHINE_ID) {
        // not to be given away as it is: machine-id(5)
        Ok(machine) if !machine.trim().is_empty() => {
            let hash = blake3::derive_key("vmkeep boot id of a session", machine.trim().as_bytes());
            let machine: String = blake3::Hash::from(hash).to_hex().chars().take(16).collect();
            format!("{machine}/{}", boot_id.trim())
        }
        _ => boot_id.trim().to_owned(),
    };
    Ok(Environment {
        host: system.nodename().to_string_lossy().into_owned(),
        boot_id,
        process_id: std::process::id(),
        program: format!("vmkeep {VERSION}"),
        now_ms: || jiff::Timestamp::now().as_millisecond(),
        timing: timing(),
    })
}

/// Returns how long what takes. Tests of processes that stand still cannot wait for half an hour: they set
/// `VMKEEP_TEST_TIMING` to the milliseconds between two heartbeats, until a session counts as dead, and between two looks.
fn timing() -> Timing {
    let text = std::env::var("VMKEEP_TEST_TIMING").unwrap_or_default();
    let numbers: Vec<u64> = text.split(',').filter_map(|number| number.parse().ok()).collect();
    match numbers.as_slice() {
        [heartbeat, dead_after, poll] => Timing {
            heartbeat: Duration::from_millis(*heartbeat),
            dead_after: Duration::from_millis(*dead_after),
            poll: Duration::from_millis(*poll),
        },
        _ => Timing::default(),
    }
}

impl Work {
    /// Opens the repository; from here on signals ask the work to stop.
    ///
    /// # Errors
    /// No repository is named, or the named one cannot be opened.
    pub fn open(app: &App) -> Result<Self> {
        let storage = storage::open_url(app.settings.repository()?)?;
        let progress = Progress::new(&app.output, app.settings.progress_fps.as_ref().map(|(fps, _)| *fps));
        let cache_dir = app.settings.cache_dir.as_ref().map(|(path, _)| path.as_path());
        let repository = Repository::open(storage, cache_dir, &environment()?, &progress)?;
        Ok(Self { repository, progress, now: LazyLock::new(ZonedDateTime::now) })
    }

    /// Makes signals ask the work to stop instead of ending the program. Called once all questions are answered.
    ///
    /// # Errors
    /// [`Error::Io`] if the system refuses.
    pub fn watch_signals(&self) -> Result<()> {
        signals::install(&self.progress.cancelled())
    }

    /// Returns all points, oldest first.
    ///
    /// # Errors
    /// A failed listing.
    pub fn points(&self) -> Result<Vec<PointEntry>> {
        points::list(&self.repository, &self.progress)
    }

    /// Returns the points that selectors name, each once, in the order of the selectors.
    ///
    /// # Errors
    /// A selector that names no point, several, or a disk.
    pub fn select_all(&self, entries: &[PointEntry], selectors: &[String]) -> Result<Vec<PointId>> {
        let mut ids = Vec::new();
        for text in selectors {
            let selected = select::select(entries, text, &self.now)?;
            if let Some(disk) = selected.disk {
                return Err(Error::Usage(format!(
                    "{text} names disk {disk}; only a whole point can be meant here"
                )));
            }
            if !ids.contains(&selected.entry.record.id) {
                ids.push(selected.entry.record.id);
            }
        }
        Ok(ids)
    }

    /// Returns the points that scopes name: a domain's, or single ones. No scope: all.
    ///
    /// # Errors
    /// A scope that fits nothing, or several things.
    pub fn scope<'a>(&self, entries: &'a [PointEntry], scopes: &[String]) -> Result<Vec<&'a PointEntry>> {
        if scopes.is_empty() {
            return Ok(entries.iter().collect());
        }
        let mut found: Vec<&PointEntry> = Vec::new();
        for scope in scopes {
            for entry in select::select_scope(entries, scope, &self.now)? {
                if found.iter().all(|known| known.record.id != entry.record.id) {
                    found.push(entry);
                }
            }
        }
        Ok(found)
    }
}

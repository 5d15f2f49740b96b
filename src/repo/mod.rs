//! The repository: what it holds, how it changes, how it is read.
//!
//! * `config`: the config and its copy
//! * [`catalog`]: outcomes and tombstones, from which the list of points follows
//! * [`fence`]: making sure that sessions have ended
//! * [`session`]: registered work and the one object that decides how it ended
//! * [`lock`]: one backup of a domain at a time on one host
//! * [`view`]: which packs a session may rely on
//! * [`reader`]: chunks, checked against their ids
//! * `frames`: frames that were read, and their memory
//! * [`segments`]: index segments for one who needs all of them several times
//! * `near`: tables of packs of which much was asked for
//! * [`writer`]: frames, packs and segments of a session
//! * `compare` and [`ingest`]: from a disk's extents to a manifest
//! * `share`: what sessions that write at the same time share
//! * [`heal`]: which ranges of a disk have to be read again because their content is lost

pub mod catalog;
mod compare;
mod config;
pub mod fence;
mod frames;
pub mod heal;
pub mod ingest;
pub mod lock;
mod lookup;
mod near;
pub mod pending;
pub mod reader;
mod reserve;
mod resort;
pub(crate) mod rules;
pub mod segments;
pub mod session;
mod share;
pub mod view;
pub mod writer;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Once, RwLock};
use std::time::Duration;

use crate::chunk::{Cutter, DEFAULT_ZSTD_LEVEL, IdHasher};
use crate::error::{Context, Error, FormatFault, Result};
use crate::format::config::{Config, CutterParams, StorageTraits};
use crate::format::limits::FORMAT_VERSION;
use crate::format::name::ObjectName;
use crate::id::{KeyDomainId, RepositoryId, SessionId};
use crate::index::Index;
use crate::manifest::Geometry;
use crate::monitor::Monitor;
use crate::storage::Storage;
use share::Share;

pub use catalog::{Catalog, PointEntry};
pub use compare::is_zero;

// what these were measured against is in docs/parameters.md

/// Bytes of a disk that one manifest leaf covers in a new repository. A changed block rewrites its leaf (about
/// 1 KiB) and a node of a quarter of that per level; larger leaves make that dearer, smaller ones cut more chunks short.
const LEAF_LEN: u64 = 1 << 20;
/// Children of an inner node in a new repository.
const FANOUT: u32 = 8;
/// Plaintext of a frame of data in a new repository, bytes: chunks compress together, and are read together.
const FRAME_TARGET_LEN: u32 = 1 << 20;
/// Length of a pack in a new repository, bytes.
const PACK_TARGET_LEN: u64 = 32 << 20;

/// What the library may not find out by itself.
#[derive(Debug, Clone)]
pub struct Environment {
    pub host: String,
    /// Changes at every boot of the host. What is before a slash names the machine, and stays.
    pub boot_id: String,
    pub process_id: u32,
    /// Program and version, for the records.
    pub program: String,
    /// Returns milliseconds since 1970.
    pub now_ms: fn() -> i64,
    pub timing: Timing,
}

#[cfg(test)]
impl Environment {
    /// Returns one whose clock stands still.
    fn of_a_test() -> Self {
        Self {
            host: "host".into(),
            boot_id: "boot".into(),
            process_id: 1,
            program: "test".into(),
            now_ms: || 1_000_000,
            timing: Timing::default(),
        }
    }
}

/// How long what takes. Only tests have a reason to change it.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// How often a session shows that it lives. A prune takes one for dead only after many times this.
    pub heartbeat: Duration,
    /// A heartbeat that stood still for so long, by the watcher's own clock, is that of a dead session.
    pub dead_after: Duration,
    /// How often a running session is looked at.
    pub poll: Duration,
    #[cfg(test)]
    pub(crate) broken: Option<rules::Rule>,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(60),
            dead_after: Duration::from_secs(30 * 60),
            poll: Duration::from_millis(250),
            #[cfg(test)]
            broken: None,
        }
    }
}

/// What `init` can choose.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    pub cutter: CutterParams,
    /// Bytes of a disk that one manifest leaf covers: a power of two.
    pub leaf_len: u64,
    /// Children of an inner node: a power of two.
    pub fanout: u32,
    /// zstd level of data frames.
    pub zstd_level: i32,
}

impl Default for CreateOptions {
    fn default() -> Self {
        let (cutter, zstd_level) = (CutterParams::default(), DEFAULT_ZSTD_LEVEL);
        Self { cutter, leaf_len: LEAF_LEN, fanout: FANOUT, zstd_level }
    }
}

/// An open repository.
#[derive(Debug)]
pub struct Repository {
    storage: Arc<dyn Storage>,
    config: Config,
    environment: Environment,
    hasher: IdHasher,
    cutter: Cutter,
    geometry: Geometry,
    cache_dir: Option<PathBuf>,
    index: RwLock<Arc<dyn Index>>,
    index_opened: Once,
    /// Held by whoever brings the index up to date.
    updating: Mutex<()>,
    /// Held for writing while the index is filled anew, and knows less than before.
    filling: RwLock<()>,
    share: Share,
    outcomes: catalog::KnownOutcomes,
    /// Sessions of this process whose abort could not be put: the storage was full, or could not be reached.
    unfinished: Arc<Mutex<Vec<SessionId>>>,
}

/// Fills an array with random bytes from the operating system.
///
/// # Errors
/// [`Error::Io`] if the system has none to give.
pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|error| Error::io("draw", "random bytes", std::io::Error::other(error.to_string())))?;
    Ok(bytes)
}

impl Repository {
    /// Makes a new repository in an empty storage and opens it, without a local index.
    ///
    /// # Errors
    /// [`Error::Exists`] if there is one already, [`Error::Refused`] if there was one; [`Error::Malformed`] for options out
    /// of bounds.
    pub fn create(
        storage: Box<dyn Storage>,
        options: &CreateOptions,
        environment: &Environment,
    ) -> Result<Self> {
        let storage: Arc<dyn Storage> = storage.into();
        config::refuse_repository(storage.as_ref())?;
        let create_if_absent = probe(storage.as_ref())?;
        let config = Config {
            format_version: FORMAT_VERSION,
            repository: RepositoryId::from_bytes(random()?),
            key_domain: KeyDomainId::from_bytes(random()?),
            required_features: 0,
            optional_features: 0,
            plain_id_key: Some(random()?),
            created_ms: (environment.now_ms)(),
            cutter: options.cutter,
            leaf_len: options.leaf_len,
            fanout: options.fanout,
            frame_target_len: FRAME_TARGET_LEN,
            pack_target_len: PACK_TARGET_LEN,
            zstd_level: options.zstd_level,
            storage: StorageTraits { create_if_absent },
        };
        let named = |fault: FormatFault| Error::malformed("the new config", fault);
        config.check().map_err(named)?;
        let bytes = config.to_object().map_err(named)?;
        // in order to be crash consistent, in this order: a repository exists from the moment that its config does, and is
        // complete then; only whoever has put the config may put the copy, which a prune puts where it is missing
        reserve::put_reserve(storage.as_ref(), reserve::MIN_LEN)?;
        storage.put_new(ObjectName::Config, &bytes)?;
        storage.put_new(ObjectName::ConfigCopy, &bytes)?;
        Self::with_config(storage, config, None, environment)
    }

    /// Opens a repository. `cache_dir` is where the local index lives, which is opened when it is needed; without one it is built
    /// in memory.
    ///
    /// # Errors
    /// [`Error::NoRepository`] where there is none, [`Error::Malformed`] for a config that this program cannot read, nor its
    /// copy.
    pub fn open(
        storage: Box<dyn Storage>,
        cache_dir: Option<&Path>,
        environment: &Environment,
        monitor: &dyn Monitor,
    ) -> Result<Self> {
        let storage: Arc<dyn Storage> = storage.into();
        let config = config::read(storage.as_ref(), monitor)?;
        Self::with_config(storage, config, cache_dir, environment)
    }

    fn with_config(
        storage: Arc<dyn Storage>,
        config: Config,
        cache_dir: Option<&Path>,
        environment: &Environment,
    ) -> Result<Self> {
        // `check` has refused configs without a plain key
        let key = config.plain_id_key.ok_or_else(|| Error::malformed("config", FormatFault::Seal(1)))?;
        Ok(Self {
            hasher: IdHasher::new(key),
            cutter: Cutter::new(config.cutter)?,
            geometry: Geometry::of(&config)?,
            environment: environment.clone(),
            cache_dir: cache_dir.map(Path::to_path_buf),
            outcomes: catalog::KnownOutcomes::default(),
            index: RwLock::new(Arc::new(crate::index::MemoryIndex::default())),
            index_opened: Once::new(),
            updating: Mutex::default(),
            filling: RwLock::default(),
            share: Share::default(),
            unfinished: Arc::default(),
            storage,
            config,
        })
    }

    /// Returns where it is kept.
    pub fn storage(&self) -> &dyn Storage {
        self.storage.as_ref()
    }

    /// Returns its config.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Returns its id.
    pub fn id(&self) -> RepositoryId {
        self.config.repository
    }

    /// Returns the shape of its manifests.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Returns what makes its chunk ids.
    pub fn hasher(&self) -> &IdHasher {
        &self.hasher
    }

    /// Returns what cuts its content.
    pub fn cutter(&self) -> &Cutter {
        &self.cutter
    }

    /// Returns who is working on it.
    pub fn environment(&self) -> &Environment {
        &self.environment
    }

    /// Keeps every outcome that is read from now on, for one who backs many domains up: else each of them reads all. Whoever
    /// wants to know what the storage gives now opens the repository anew.
    pub fn keep_outcomes(&self) {
        self.outcomes.keep();
    }

    /// Reads every outcome and tombstone.
    ///
    /// # Errors
    /// A failed listing; an object that cannot be read is reported to the monitor and left out.
    pub fn catalog(&self, monitor: &dyn Monitor) -> Result<Catalog> {
        Catalog::load(self.storage(), self.id(), &self.outcomes, monitor)
            .context(|| format!("while listing the points of {}", self.storage().url()))
    }
}

/// Finds out whether the storage does what the protocol needs, by a heartbeat object of a session that never was.
///
/// Returns whether a second create of one name fails.
fn probe(storage: &dyn Storage) -> Result<bool> {
    let session = crate::id::SessionId::from_bytes(random()?);
    let name = ObjectName::Heartbeat(session);
    let written = b"probe".as_slice();
    storage.put_new(name, written)?;
    let outcome = probe_written(storage, name, written);
    storage.delete(name)?;
    outcome
}

fn probe_written(storage: &dyn Storage, name: ObjectName, written: &[u8]) -> Result<bool> {
    let refused = |reason: &str| Error::Refused {
        object: storage.url(),
        reason: reason.into(),
        hint: Some("vmkeep cannot keep a repository there safely".into()),
    };
    if storage.get(name, 64)? != written {
        return Err(refused("an object that was just written reads differently"));
    }
    if storage.get_range(name, 1, 3)? != b"rob" {
        return Err(refused("reading a part of an object gives other bytes"));
    }
    let listed = storage.list(crate::format::name::Folder::Sessions)?;
    if !listed.iter().any(|object| object.name == name) {
        return Err(refused("an object that was just written is not listed"));
    }
    match storage.put_new(name, b"other") {
        Err(Error::Exists { .. }) => Ok(true),
        Ok(()) => Ok(false),
        Err(error) => Err(error),
    }
}

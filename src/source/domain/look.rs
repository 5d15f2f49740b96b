//! What a domain is like now, told without changing anything: checkpoints, bitmaps, jobs, agent.
//!
//! libvirt does not list QEMU's bitmaps. Of a domain that is off the images tell. Of one that runs libvirt says
//! which bitmaps of its checkpoints serve, and the images which bitmaps there were when QEMU opened them: that is
//! all but bitmaps that were made since and that no checkpoint names. Those only QEMU's monitor knows. It is asked
//! on request only, since libvirt calls a domain tainted whose monitor somebody else used.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::bitmaps::{self, Bitmap};
use super::ffi::{AGENT_UNRESPONSIVE, Config, Guest, Power};
use super::monitor_answer::{QemuBitmap, QemuBitmaps, read_bitmaps};
use super::xml::{self, DiskXml, DomainXml};
use super::{Hypervisor, plan, survey, workdir};
use crate::error::{Error, Result};

/// Whether a bitmap tells what was written since its checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum BitmapState {
    /// It does.
    Sound,
    Missing,
    /// QEMU ended without saving it.
    Inconsistent,
    /// It does not record.
    Disabled,
    /// QEMU is working on it.
    Busy,
    /// A part of it is in each of several images; only a running QEMU adds them up.
    Spread,
    /// Missing or inconsistent.
    Broken,
    /// It is there; whether it is sound cannot be told from outside of QEMU.
    Present,
    /// It should be there, but its image cannot be looked at.
    Unknown,
}

impl BitmapState {
    /// Returns true if it is known to be of no use, now and later.
    pub fn is_lost(self) -> bool {
        matches!(self, Self::Missing | Self::Inconsistent | Self::Disabled | Self::Broken)
    }
}

/// A bitmap of a disk, or one that should be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapFacts {
    pub name: String,
    pub state: BitmapState,
    /// Bytes dirty since, where libvirt or QEMU says so.
    pub dirty_bytes: Option<u64>,
    /// A checkpoint of libvirt says that the disk has it.
    pub has_checkpoint: bool,
}

/// A disk and its bitmaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskFacts {
    pub target: String,
    pub format: String,
    /// Bytes, where that can be told.
    pub size: Option<u64>,
    pub image: Option<PathBuf>,
    /// Why it is never backed up.
    pub left_out: Option<String>,
    /// Its image is of a version of qcow2 without bitmaps.
    pub is_old_qcow2: bool,
    /// Why its image could not be looked at.
    pub unreadable: Option<String>,
    /// Sorted by name.
    pub bitmaps: Vec<BitmapFacts>,
}

impl DiskFacts {
    /// Returns true if it is backed up, and its image can have bitmaps.
    pub fn can_track(&self) -> bool {
        self.left_out.is_none() && self.format == "qcow2" && !self.is_old_qcow2
    }
}

/// A checkpoint as libvirt knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointFacts {
    pub name: String,
    /// Seconds since the epoch.
    pub created: i64,
    /// Targets of the disks that it tracks.
    pub disks: Vec<String>,
}

/// A job that runs on a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobFacts {
    None,
    /// A backup of a vmkeep that is gone.
    Killed {
        socket: PathBuf,
    },
    /// A backup of a vmkeep that is at work.
    Alive {
        socket: PathBuf,
    },
    /// A backup of another program.
    Foreign {
        socket: Option<PathBuf>,
    },
    /// A migration, a save, a dump.
    Other,
}

/// What the guest agent says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentFacts {
    /// The domain is off, or its processor stands still.
    Unasked,
    /// The domain has no channel for one.
    NoChannel,
    /// Nothing in the guest listens.
    Silent(String),
    Answers,
    /// It answers that the file systems are frozen.
    Frozen,
}

/// A domain as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainFacts {
    pub name: String,
    pub uuid: String,
    pub running: bool,
    /// Off, since its QEMU was killed.
    pub crashed: bool,
    pub saved_memory: bool,
    pub disks: Vec<DiskFacts>,
    /// Sorted by name.
    pub checkpoints: Vec<CheckpointFacts>,
    pub job: JobFacts,
    pub agent: AgentFacts,
    /// QEMU itself was asked for its bitmaps.
    pub asked_qemu: bool,
}

/// What libvirt says of a bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// No checkpoint tracks the disk by that name.
    Unknown,
    /// One does; of a domain that is off libvirt says no more.
    Unasked,
    Sound(u64),
    Broken,
}

/// All that is known of one bitmap.
struct Evidence<'a> {
    running: bool,
    verdict: Verdict,
    /// What each image of the chain has of it, the active one first; `None` if they could not be looked at.
    chain: Option<Vec<Option<&'a Bitmap>>>,
    /// `None`: QEMU was not asked.
    qemu: Option<Option<QemuBitmap>>,
}

impl Evidence<'_> {
    /// Returns the state; `None` if there is no such bitmap, and there should be none.
    fn state(&self) -> Option<BitmapState> {
        let in_file = self.chain.as_ref().map(|chain| chain.iter().any(Option::is_some));
        if !self.running {
            return match (&self.chain, in_file) {
                (Some(chain), Some(true)) => Some(state_in_images(chain)),
                (_, Some(_)) => (self.verdict != Verdict::Unknown).then_some(BitmapState::Missing),
                _ => (self.verdict != Verdict::Unknown).then_some(BitmapState::Unknown),
            };
        }
        if let Some(Some(bitmap)) = self.qemu {
            return Some(match (bitmap, self.verdict) {
                (QemuBitmap { inconsistent: true, .. }, _) => BitmapState::Inconsistent,
                (QemuBitmap { busy: true, .. }, _) => BitmapState::Busy,
                (QemuBitmap { recording: false, .. }, _) => BitmapState::Disabled,
                // there, but not in all images of the chain
                (_, Verdict::Broken) => BitmapState::Missing,
                _ => BitmapState::Sound,
            });
        }
        match (self.verdict, in_file, self.qemu) {
            (Verdict::Sound(_), ..) => Some(BitmapState::Sound),
            (Verdict::Broken, _, Some(None)) | (Verdict::Broken, Some(false), _) => {
                Some(BitmapState::Missing)
            }
            // a bitmap that is in the image and that QEMU cannot use was not saved
            (Verdict::Broken, Some(true), _) => Some(BitmapState::Inconsistent),
            (Verdict::Broken, None, _) => Some(BitmapState::Broken),
            (Verdict::Unasked, ..) => Some(BitmapState::Unknown),
            (Verdict::Unknown, Some(true), None) => Some(BitmapState::Present),
            (Verdict::Unknown, ..) => None,
        }
    }

    fn dirty_bytes(&self) -> Option<u64> {
        match (self.verdict, self.qemu) {
            (Verdict::Sound(bytes), _) => Some(bytes),
            (_, Some(Some(bitmap))) if !bitmap.inconsistent => Some(bitmap.dirty_bytes),
            _ => None,
        }
    }
}

fn state_in_images(chain: &[Option<&Bitmap>]) -> BitmapState {
    let (active, below) = chain.split_first().map_or((None, &[][..]), |(active, below)| (*active, below));
    match active {
        _ if below.iter().any(Option::is_some) => BitmapState::Spread,
        None => BitmapState::Missing,
        Some(bitmap) if bitmap.serves => BitmapState::Sound,
        Some(bitmap) if bitmap.in_use => BitmapState::Inconsistent,
        Some(_) => BitmapState::Disabled,
    }
}

impl Hypervisor {
    /// Looks at a domain without changing anything; with `ask_qemu` its QEMU is asked for its bitmaps, which taints
    /// the domain.
    ///
    /// # Errors
    /// [`Error::NotFound`] without such a domain, and what libvirt says.
    pub fn look(&self, domain: &str, ask_qemu: bool) -> Result<DomainFacts> {
        let guest = self.guest(domain)?;
        let power = guest.power().map_err(|fault| fault.at("look at", guest.object()))?;
        let running = power != Power::Off;
        let config = if running { Config::Live } else { Config::Inactive };
        let text = guest.xml(config).map_err(|fault| fault.at("read the XML of", guest.object()))?;
        let described = xml::read_domain(domain, &text)?;
        let seen = Checkpoints::of(&guest, running)?;
        let qemu = if running && ask_qemu { Some(qemu_bitmaps(&guest)?) } else { None };
        let disks =
            described.disks.iter().map(|disk| disk_facts(&guest, disk, running, &seen, qemu.as_ref()));
        Ok(DomainFacts {
            name: domain.to_owned(),
            uuid: guest.uuid().map_err(|fault| fault.at("identify", guest.object()))?,
            running,
            crashed: guest.has_crashed().unwrap_or(false),
            saved_memory: guest.has_saved_memory().unwrap_or(false),
            disks: disks.collect(),
            job: if running { job_facts(&guest)? } else { JobFacts::None },
            agent: agent_facts(&guest, &described, power),
            checkpoints: seen.facts,
            asked_qemu: qemu.is_some(),
        })
    }
}

/// The checkpoints of a domain, and what libvirt says of their bitmaps.
struct Checkpoints {
    facts: Vec<CheckpointFacts>,
    /// By disk and name.
    verdicts: BTreeMap<(String, String), Verdict>,
}

impl Checkpoints {
    fn of(guest: &Guest, running: bool) -> Result<Self> {
        let listed = guest.checkpoints();
        let mut names = listed.map_err(|fault| fault.at("list the checkpoints of", guest.object()))?;
        names.sort_unstable();
        let mut found = Self { facts: Vec::new(), verdicts: BTreeMap::new() };
        for name in names {
            let read = |sizes| {
                guest.checkpoint_xml(&name, sizes).map_err(|fault| {
                    fault.at("read", format_args!("checkpoint {name} of {}", guest.object()))
                })
            };
            // where the sizes cannot be had, nothing is known of the bitmaps
            let (text, sizes) = match if running { read(true) } else { read(false) } {
                Ok(text) => (text, running),
                Err(_) => (read(false)?, false),
            };
            let disks = xml::read_checkpoint(&name, &text)?;
            let (created, _) = xml::read_origin(&name, &text)?;
            for disk in &disks {
                let verdict = match disk.dirty_bytes {
                    _ if !sizes => Verdict::Unasked,
                    Some(bytes) => Verdict::Sound(bytes),
                    None => Verdict::Broken,
                };
                found.verdicts.insert((disk.target.clone(), name.clone()), verdict);
            }
            let disks = disks.into_iter().map(|disk| disk.target).collect();
            found.facts.push(CheckpointFacts { name, created, disks });
        }
        Ok(found)
    }
}

fn disk_facts(
    guest: &Guest,
    disk: &DiskXml,
    running: bool,
    checkpoints: &Checkpoints,
    qemu: Option<&QemuBitmaps>,
) -> DiskFacts {
    let mut facts = DiskFacts {
        target: disk.target.clone(),
        format: disk.format.clone(),
        size: None,
        image: disk.path.clone(),
        left_out: plan::obstacle(disk),
        is_old_qcow2: false,
        unreadable: None,
        bitmaps: Vec::new(),
    };
    if facts.left_out.is_some() {
        return facts;
    }
    match guest.capacity(&disk.target) {
        Ok(size) => facts.size = Some(size),
        Err(fault) => facts.unreadable = Some(fault.message),
    }
    if !running && disk.encrypted {
        facts.unreadable = Some("it is encrypted".into());
    } else if !running && disk.path.is_none() {
        facts.unreadable = Some(format!("it is a disk of type {}", disk.kind));
    }
    if disk.format != "qcow2" {
        return facts;
    }
    facts.is_old_qcow2 = disk.path.as_deref().is_some_and(survey::is_old_qcow2);
    let chain = match disk.path.as_deref().filter(|_| facts.unreadable.is_none()) {
        Some(path) => match listed(path, running) {
            Ok(chain) => Some(chain),
            Err(reason) => {
                // a running domain's bitmaps do not need the image to be readable
                facts.unreadable = (!running).then_some(reason);
                None
            }
        },
        None => None,
    };
    facts.bitmaps = bitmap_facts(disk, running, checkpoints, chain.as_deref(), qemu);
    facts
}

fn listed(image: &Path, running: bool) -> std::result::Result<Vec<Vec<Bitmap>>, String> {
    let found = if running { bitmaps::list_in_use(image) } else { bitmaps::list(image) };
    found.map_err(|error| match std::error::Error::source(&error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    })
}

fn bitmap_facts(
    disk: &DiskXml,
    running: bool,
    checkpoints: &Checkpoints,
    chain: Option<&[Vec<Bitmap>]>,
    qemu: Option<&QemuBitmaps>,
) -> Vec<BitmapFacts> {
    let of_disk = checkpoints.verdicts.iter().filter(|((target, _), _)| *target == disk.target);
    let mut names: Vec<&str> = of_disk.map(|((_, name), _)| name.as_str()).collect();
    names.extend(chain.into_iter().flatten().flatten().map(|bitmap| bitmap.name.as_str()));
    let in_qemu = qemu.map(|all| {
        let path = disk.path.as_ref().map(|path| path.to_string_lossy().into_owned());
        path.and_then(|path| all.get(&path)).cloned().unwrap_or_default()
    });
    names.extend(in_qemu.iter().flatten().map(|(name, _)| name.as_str()));
    names.sort_unstable();
    names.dedup();
    let facts = names.into_iter().filter_map(|name| {
        let verdict = checkpoints.verdicts.get(&(disk.target.clone(), name.to_owned()));
        let evidence = Evidence {
            running,
            verdict: verdict.copied().unwrap_or(Verdict::Unknown),
            chain: chain.map(|chain| {
                chain.iter().map(|list| list.iter().find(|bitmap| bitmap.name == name)).collect()
            }),
            qemu: in_qemu.as_ref().map(|all| all.get(name).copied()),
        };
        Some(BitmapFacts {
            name: name.to_owned(),
            state: evidence.state()?,
            dirty_bytes: evidence.dirty_bytes(),
            has_checkpoint: verdict.is_some(),
        })
    });
    facts.collect()
}

fn qemu_bitmaps(guest: &Guest) -> Result<QemuBitmaps> {
    let answer = guest
        .ask_monitor(r#"{"execute":"query-named-block-nodes","arguments":{"flat":true}}"#)
        .map_err(|fault| fault.at("ask for its bitmaps the QEMU of", guest.object()))?;
    read_bitmaps(&guest.object(), &answer)
}

fn job_facts(guest: &Guest) -> Result<JobFacts> {
    let look = |fault: super::ffi::Fault| fault.at("look at the jobs of", guest.object());
    let Some(text) = guest.backup_xml().map_err(look)? else {
        // a job that ends between two looks is no job
        return Ok(if guest.has_job().unwrap_or(false) { JobFacts::Other } else { JobFacts::None });
    };
    let Some(socket) = xml::read_backup_socket(guest.name(), &text)? else {
        return Ok(JobFacts::Foreign { socket: None });
    };
    Ok(match workdir::owner_of(&socket) {
        workdir::Owner::Foreign => JobFacts::Foreign { socket: Some(socket) },
        workdir::Owner::Alive => JobFacts::Alive { socket },
        workdir::Owner::Dead => JobFacts::Killed { socket },
    })
}

fn agent_facts(guest: &Guest, described: &DomainXml, power: Power) -> AgentFacts {
    if !described.has_agent {
        return if power == Power::Off { AgentFacts::Unasked } else { AgentFacts::NoChannel };
    }
    if power != Power::Running {
        return AgentFacts::Unasked;
    }
    if described.agent_connected == Some(false) {
        return AgentFacts::Silent("nothing in the guest has its channel open".into());
    }
    match guest.agent_time() {
        Ok(()) => AgentFacts::Answers,
        Err(fault) if is_frozen(&fault.message) => AgentFacts::Frozen,
        Err(fault) if fault.code == AGENT_UNRESPONSIVE => AgentFacts::Silent(fault.message),
        // it answers, though not this
        Err(_) => AgentFacts::Answers,
    }
}

/// A frozen agent does next to nothing but thaw: "Command guest-get-time has been disabled: the agent is in frozen
/// state"; older ones leave out the reason, so that it cannot be told from an administrator's choice.
fn is_frozen(message: &str) -> bool {
    message.contains("frozen")
}

impl Hypervisor {
    pub(super) fn guest(&self, domain: &str) -> Result<Guest> {
        Guest::find(&self.connect, self.uri.as_deref(), domain)
    }

    /// Returns the versions of libvirt's daemon and of QEMU.
    ///
    /// # Errors
    /// [`Error::Unreachable`]
    pub fn versions(&self) -> Result<Versions> {
        let failed = |error: virt::error::Error| Error::Unreachable {
            object: "the version of libvirt".into(),
            reason: error.message().to_owned(),
        };
        let libvirt = self.connect.lib_version().map_err(failed)?;
        // without a QEMU that it could run, libvirt fails to say which
        Ok(Versions { libvirt: Version::of(libvirt), qemu: self.connect.hyp_version().ok().map(Version::of) })
    }
}

/// A version in three numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

impl Version {
    /// Reads libvirt's way of putting a version into one number.
    fn of(number: u32) -> Self {
        Self(number / 1_000_000, number / 1000 % 1000, number % 1000)
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// Who runs the domains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    pub libvirt: Version,
    /// `None` if libvirt finds no QEMU.
    pub qemu: Option<Version>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frozen_agent_says_so() {
        assert!(is_frozen(
            "internal error: unable to execute QEMU agent command 'guest-get-time': Command guest-get-time has been \
             disabled: the agent is in frozen state"
        ));
        assert!(!is_frozen("Guest agent is not responding: QEMU guest agent is not connected"));
    }

    #[test]
    fn versions_are_read_as_libvirt_writes_them() {
        assert_eq!(Version::of(9_000_000).to_string(), "9.0.0");
        assert_eq!(Version::of(10_000_002), Version(10, 0, 2));
        assert!(Version::of(7_005_000) < Version(7, 6, 0));
    }

    #[test]
    fn the_state_of_a_bitmap_follows_from_what_is_known() {
        let bitmap = |serves, in_use| Bitmap { name: "b".into(), serves, in_use };
        let (sound, in_use, disabled) = (bitmap(true, false), bitmap(false, true), bitmap(false, false));
        let known = QemuBitmap { recording: true, busy: false, inconsistent: false, dirty_bytes: 1 };
        let state = |running, verdict, chain: Option<Vec<Option<&Bitmap>>>, qemu| {
            Evidence { running, verdict, chain, qemu }.state()
        };
        use BitmapState::*;
        for (running, verdict, chain, qemu, expected) in [
            (false, Verdict::Unasked, Some(vec![Some(&sound)]), None, Some(Sound)),
            (false, Verdict::Unasked, Some(vec![Some(&in_use)]), None, Some(Inconsistent)),
            (false, Verdict::Unasked, Some(vec![Some(&disabled)]), None, Some(Disabled)),
            (false, Verdict::Unasked, Some(vec![None]), None, Some(Missing)),
            (false, Verdict::Unasked, Some(vec![None, Some(&sound)]), None, Some(Spread)),
            (false, Verdict::Unasked, None, None, Some(Unknown)),
            (true, Verdict::Unasked, Some(vec![Some(&in_use)]), None, Some(Unknown)),
            (false, Verdict::Unknown, Some(vec![Some(&sound)]), None, Some(Sound)),
            (false, Verdict::Unknown, Some(vec![None]), None, None),
            (true, Verdict::Sound(0), Some(vec![None]), None, Some(Sound)),
            (true, Verdict::Broken, Some(vec![None]), None, Some(Missing)),
            (true, Verdict::Broken, Some(vec![Some(&in_use)]), None, Some(Inconsistent)),
            (true, Verdict::Broken, None, None, Some(Broken)),
            (true, Verdict::Unknown, Some(vec![Some(&in_use)]), None, Some(Present)),
            (true, Verdict::Unknown, Some(vec![None]), Some(Some(known)), Some(Sound)),
            (true, Verdict::Unknown, Some(vec![Some(&in_use)]), Some(None), None),
            (true, Verdict::Broken, None, Some(None), Some(Missing)),
            (true, Verdict::Sound(0), None, Some(Some(QemuBitmap { busy: true, ..known })), Some(Busy)),
            (
                true,
                Verdict::Broken,
                None,
                Some(Some(QemuBitmap { inconsistent: true, recording: false, ..known })),
                Some(Inconsistent),
            ),
        ] {
            let shown = format!("{running} {verdict:?} {chain:?} {qemu:?}");
            assert_eq!(state(running, verdict, chain, qemu), expected, "{shown}");
        }
    }
}

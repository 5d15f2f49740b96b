//! The record of a point: all that a restore needs besides the chunks.

use std::sync::Arc;

use bincode::{Decode, Encode};
use serde::Serialize;

use crate::error::FormatFault;
use crate::format::limits::{MAX_DISK_LEN, MAX_DISKS, MAX_NAME_LEN, MAX_TREE_HEIGHT, MAX_XML_LEN};
use crate::id::{ChunkId, PointId};

/// How a point, or one disk of it, was made. It is never needed to restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Every allocated extent was read.
    Full,
    /// What changed since the newest point was read.
    Incremental,
    /// As incremental; compared with the last full.
    Differential,
    /// A full that leaves no checkpoint and serves as no base.
    Copy,
    /// Since the newest checkpoint, leaving no checkpoint (virtnbdbackup's old "diff").
    Latest,
}

/// Where the disks were read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SourceKind {
    /// A running domain, through libvirt's backup job.
    Running,
    /// A shut-off domain, through `qemu-nbd`.
    Offline,
    /// An image file.
    File,
    /// A block device.
    Block,
    /// An NBD server.
    Nbd,
}

/// What became of the file systems of the guest at the instant of the point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Consistency {
    /// As after a power cut.
    Crash,
    /// Frozen through the guest agent.
    Frozen,
    /// The domain was paused, and its caches not flushed.
    Paused,
    /// The domain was off.
    Off,
}

/// The map of one disk or side file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct Manifest {
    /// Bytes of the disk.
    pub size: u64,
    /// Levels of inner nodes above the leaves.
    pub height: u8,
    /// `None`: all zero.
    pub root: Option<ChunkId>,
}

/// One disk of a point.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct DiskRecord {
    /// Target name: `vda`.
    pub target: String,
    pub manifest: Manifest,
    /// Format of the image that the domain used: `qcow2`, `raw`; a hint for restores.
    pub format: String,
    /// How this disk was read; a raw disk is always `Full`.
    pub level: Level,
    /// Why the disk was read in full although the point is not a full.
    pub full_reason: Option<String>,
    /// The disk carries a dirty bitmap named like the point's checkpoint.
    pub has_bitmap: bool,
}

/// A file kept beside the disks, such as the firmware's variables.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct FileRecord {
    /// What it is: `nvram`.
    pub name: String,
    pub manifest: Manifest,
}

/// The record of a point. A copy of it stands as a chunk in the metadata packs.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct PointRecord {
    pub id: PointId,
    /// Name of the domain.
    pub domain: String,
    /// UUID of the domain as libvirt writes it; absent where there is no libvirt.
    pub domain_uuid: Option<String>,
    /// The instant of the point, milliseconds since 1970 by the host's clock.
    pub time_ms: i64,
    pub level: Level,
    /// The point that this one is compared with: the newest for an incremental, the last full for a differential.
    pub base: Option<PointId>,
    /// The point whose map this one was made from; it need not exist any more.
    pub predecessor: Option<PointId>,
    /// The libvirt checkpoint (and dirty bitmap) created at this instant.
    pub checkpoint: Option<String>,
    pub source: SourceKind,
    pub consistency: Consistency,
    /// In order of their targets.
    pub disks: Vec<DiskRecord>,
    pub files: Vec<FileRecord>,
    /// Persistent definition of the domain.
    pub xml_inactive: Option<Arc<str>>,
    /// Definition of the running domain.
    pub xml_live: Option<Arc<str>>,
    pub tags: Vec<String>,
    pub host: String,
    /// Program and version.
    pub program: String,
}

/// What the tag begins with of a point that is a copy of a damaged one, made by a repair; the damaged one's id follows.
pub const REPAIRED_TAG: &str = "repaired-from-";

/// The named numbers of a backup, bytes; docs in `docs/levels.md`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode, Serialize)]
pub struct PointStats {
    /// What the bitmaps said, or what is allocated where there was none.
    pub dirty_bytes: u64,
    /// Read from the source.
    pub read_bytes: u64,
    /// In 4 KiB blocks that differ from the predecessor, zeroed ones included.
    pub changed_bytes: u64,
    /// Disk content that the repository did not have.
    pub new_bytes: u64,
    /// Those, compressed, with the tables of the data packs.
    pub stored_bytes: u64,
    /// Metadata packs and segments.
    pub metadata_bytes: u64,
    /// Differential: what differs from the base.
    pub since_base_bytes: Option<u64>,
    /// From the instant to the commit.
    pub duration_ms: u64,
}

impl PointRecord {
    /// Checks every value against the bounds of the format.
    ///
    /// # Errors
    /// [`FormatFault::Invalid`] or [`FormatFault::TooLarge`] naming the field.
    pub fn check(&self) -> Result<(), FormatFault> {
        let too_large = |what, found: usize, max: usize| FormatFault::TooLarge {
            what,
            found: found as u64,
            max: max as u64,
        };
        for (what, count) in
            [("disks", self.disks.len()), ("files", self.files.len()), ("tags", self.tags.len())]
        {
            if count > MAX_DISKS {
                return Err(too_large(what, count, MAX_DISKS));
            }
        }
        for xml in [&self.xml_inactive, &self.xml_live].into_iter().flatten() {
            if xml.len() > MAX_XML_LEN {
                return Err(too_large("the domain's XML", xml.len(), MAX_XML_LEN));
            }
        }
        let names = [&self.domain, &self.host, &self.program]
            .into_iter()
            .chain(self.disks.iter().map(|disk| &disk.target))
            .chain(self.files.iter().map(|file| &file.name))
            .chain(&self.tags)
            .chain(&self.checkpoint);
        for name in names {
            if name.len() > MAX_NAME_LEN || name.chars().any(char::is_control) {
                let found = name.chars().take(80).collect::<String>().escape_debug().to_string();
                return Err(FormatFault::Invalid { what: "a name", found });
            }
        }
        // targets and names of files become file names at a restore
        let file_names =
            self.disks.iter().map(|disk| &disk.target).chain(self.files.iter().map(|file| &file.name));
        for name in file_names {
            if name.is_empty() || name.starts_with('.') || name.contains('/') {
                return Err(FormatFault::Invalid { what: "a disk's name", found: name.clone() });
            }
        }
        let ordered = self.disks.windows(2).all(|pair| match pair {
            [a, b] => a.target < b.target,
            _ => true,
        });
        if !ordered {
            return Err(FormatFault::Invalid { what: "the disks", found: "not in order".into() });
        }
        self.manifests().try_for_each(Manifest::check)
    }

    /// Returns the damaged point that this one was made of by a repair. A tag alone, which anybody may give, is not enough.
    pub fn repaired_from(&self) -> Option<PointId> {
        let named = |tag: &String| tag.strip_prefix(REPAIRED_TAG)?.parse().ok();
        self.tags.iter().filter_map(named).find(|id| self.predecessor == Some(*id))
    }

    /// Returns the manifests of disks and side files.
    pub fn manifests(&self) -> impl Iterator<Item = &Manifest> {
        self.disks.iter().map(|disk| &disk.manifest).chain(self.files.iter().map(|file| &file.manifest))
    }
}

impl Manifest {
    fn check(&self) -> Result<(), FormatFault> {
        if self.size > MAX_DISK_LEN {
            return Err(FormatFault::TooLarge { what: "a disk", found: self.size, max: MAX_DISK_LEN });
        }
        if self.height > MAX_TREE_HEIGHT {
            let max = u64::from(MAX_TREE_HEIGHT);
            return Err(FormatFault::TooLarge { what: "a tree", found: u64::from(self.height), max });
        }
        Ok(())
    }
}

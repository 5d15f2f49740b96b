//! The XML that goes to libvirt and comes from it.
//!
//! What comes is read without document types and entities, up to [`MAX_BYTES`] and [`MAX_NODES`]; neither the
//! parser nor the reading recurses, so that nesting needs no limit of its own. What goes is built by
//! [`Writer`], which escapes everything. Formats:
//! <https://libvirt.org/formatdomain.html>, [formatbackup](https://libvirt.org/formatbackup.html),
//! [formatcheckpoint](https://libvirt.org/formatcheckpoint.html).

use std::path::PathBuf;

use roxmltree::{Document, Node, ParsingOptions};

use crate::error::{Error, FormatFault, Result};

/// The longest description that is read.
pub(super) const MAX_BYTES: usize = 16 << 20;
/// The most elements, texts and comments of a description.
const MAX_NODES: u32 = 1 << 20;

/// What a disk is presented as to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Device {
    Disk,
    /// "cdrom", "floppy", "lun", or what else libvirt may come to know.
    Other(String),
}

/// A disk as a domain's XML describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DiskXml {
    pub target: String,
    pub device: Device,
    /// The driver's type: "qcow2", "raw", ...
    pub format: String,
    /// The disk's type: "file", "block", "network", "volume", ...
    pub kind: String,
    /// The image file or block device, where it is one.
    pub path: Option<PathBuf>,
    pub has_source: bool,
    pub read_only: bool,
    pub shareable: bool,
    pub encrypted: bool,
}

/// What of a domain's XML matters for its backup.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct DomainXml {
    pub disks: Vec<DiskXml>,
    pub nvram: Option<PathBuf>,
    /// The user and group that its QEMU runs as, where libvirt says so.
    pub owner: Option<(u32, u32)>,
    /// There is a channel for the guest agent.
    pub has_agent: bool,
    /// Something in the guest has that channel open, where libvirt says so: of a running domain.
    pub agent_connected: Option<bool>,
}

/// A disk of a checkpoint that has a bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct CheckpointDisk {
    pub target: String,
    /// Bytes dirty since, where that was asked for.
    pub dirty_bytes: Option<u64>,
}

/// Parses one description and hands its root, which is called `root`, to `read`.
fn read<T>(object: &str, text: &str, root: &str, read: impl FnOnce(Node<'_, '_>) -> T) -> Result<T> {
    let fail = |fault| Error::malformed(object, fault);
    if text.len() > MAX_BYTES {
        let (found, max) = (text.len() as u64, MAX_BYTES as u64);
        return Err(fail(FormatFault::TooLarge { what: "its length in bytes", found, max }));
    }
    let options = ParsingOptions { allow_dtd: false, nodes_limit: MAX_NODES, ..ParsingOptions::default() };
    let document = Document::parse_with_options(text, options)
        .map_err(|error| fail(FormatFault::Decode(error.to_string())))?;
    let element = document.root_element();
    if element.tag_name().name() != root {
        return Err(fail(FormatFault::Mismatch {
            what: "its root element",
            found: element.tag_name().name().into(),
            expected: root.into(),
        }));
    }
    Ok(read(element))
}

fn child<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|child| child.is_element() && child.tag_name().name() == name)
}

fn children<'a, 'i>(node: Node<'a, 'i>, name: &'static str) -> impl Iterator<Item = Node<'a, 'i>> {
    node.children().filter(move |child| child.is_element() && child.tag_name().name() == name)
}

/// Reads the XML of a domain called `name`.
///
/// # Errors
/// [`Error::Malformed`]
pub(super) fn read_domain(name: &str, text: &str) -> Result<DomainXml> {
    read(&format!("the XML of domain {name}"), text, "domain", |root| {
        let mut domain = DomainXml::default();
        if let Some(nvram) = child(root, "os").and_then(|os| child(os, "nvram")) {
            let source = child(nvram, "source").and_then(|source| source.attribute("file"));
            let path = source.or_else(|| nvram.text().map(str::trim)).filter(|path| path.starts_with('/'));
            domain.nvram = path.map(PathBuf::from);
        }
        domain.owner = children(root, "seclabel")
            .filter(|label| label.attribute("model") == Some("dac"))
            .find_map(|label| parse_owner(child(label, "label")?.text()?));
        if let Some(devices) = child(root, "devices") {
            domain.disks = children(devices, "disk").filter_map(read_disk).collect();
            let mut channels = children(devices, "channel").filter_map(|channel| child(channel, "target"));
            let agent = channels.find(|target| target.attribute("name") == Some("org.qemu.guest_agent.0"));
            domain.has_agent = agent.is_some();
            let state = agent.and_then(|target| target.attribute("state"));
            domain.agent_connected = state.map(|state| state == "connected");
        }
        domain
    })
}

/// Reads "+UID:+GID".
fn parse_owner(label: &str) -> Option<(u32, u32)> {
    let (user, group) = label.trim().split_once(':')?;
    Some((user.strip_prefix('+')?.parse().ok()?, group.strip_prefix('+')?.parse().ok()?))
}

fn read_disk(disk: Node<'_, '_>) -> Option<DiskXml> {
    let target = child(disk, "target")?.attribute("dev")?.to_owned();
    let device = match disk.attribute("device") {
        None | Some("disk") => Device::Disk,
        Some(other) => Device::Other(other.to_owned()),
    };
    let kind = disk.attribute("type").unwrap_or("file").to_owned();
    let source = child(disk, "source");
    let path = source.and_then(|source| match kind.as_str() {
        "file" => source.attribute("file"),
        "block" => source.attribute("dev"),
        _ => None,
    });
    let encrypted = child(disk, "encryption").is_some()
        || source.is_some_and(|source| child(source, "encryption").is_some());
    Some(DiskXml {
        target,
        device,
        format: child(disk, "driver").and_then(|driver| driver.attribute("type")).unwrap_or("raw").to_owned(),
        has_source: source.is_some_and(|source| source.attributes().len() > 0 || source.has_children()),
        path: path.map(PathBuf::from),
        kind,
        read_only: child(disk, "readonly").is_some(),
        shareable: child(disk, "shareable").is_some(),
        encrypted,
    })
}

/// Reads the socket of a backup job; `None` for a job without one.
///
/// # Errors
/// [`Error::Malformed`]
pub(super) fn read_backup_socket(name: &str, text: &str) -> Result<Option<PathBuf>> {
    read(&format!("the XML of the backup job of domain {name}"), text, "domainbackup", |root| {
        child(root, "server").and_then(|server| server.attribute("socket")).map(PathBuf::from)
    })
}

/// Reads when a checkpoint was made, in seconds since the epoch, and the name of its parent.
///
/// # Errors
/// [`Error::Malformed`]
pub(super) fn read_origin(name: &str, text: &str) -> Result<(i64, Option<String>)> {
    read(&format!("the XML of checkpoint {name}"), text, "domaincheckpoint", |root| {
        let text_in = |node, name| child(node, name).and_then(|found| found.text()).map(str::trim);
        let created = text_in(root, "creationTime").and_then(|text| text.parse().ok()).unwrap_or(0);
        let parent = child(root, "parent").and_then(|parent| text_in(parent, "name"));
        (created, parent.map(str::to_owned))
    })
}

/// Reads which disks have a bitmap of a checkpoint.
///
/// # Errors
/// [`Error::Malformed`]
pub(super) fn read_checkpoint(name: &str, text: &str) -> Result<Vec<CheckpointDisk>> {
    read(&format!("the XML of checkpoint {name}"), text, "domaincheckpoint", |root| {
        let disks = child(root, "disks").into_iter().flat_map(|disks| children(disks, "disk"));
        let tracked = disks.filter(|disk| disk.attribute("checkpoint") == Some("bitmap"));
        tracked
            .filter_map(|disk| {
                Some(CheckpointDisk {
                    target: disk.attribute("name")?.to_owned(),
                    dirty_bytes: disk.attribute("size").and_then(|size| size.parse().ok()),
                })
            })
            .collect()
    })
}

/// Builds XML, escaping every name's value and text.
#[derive(Debug, Default)]
pub(super) struct Writer {
    text: String,
    open: Vec<&'static str>,
}

impl Writer {
    /// Opens an element.
    pub fn open(&mut self, name: &'static str, attributes: &[(&str, &str)]) {
        self.start(name, attributes);
        self.text.push('>');
        self.open.push(name);
    }

    /// Writes an element without content.
    pub fn empty(&mut self, name: &'static str, attributes: &[(&str, &str)]) {
        self.start(name, attributes);
        self.text.push_str("/>");
    }

    /// Writes an element that contains a text.
    pub fn text(&mut self, name: &'static str, content: &str) {
        self.open(name, &[]);
        self.escape(content);
        self.close();
    }

    /// Closes the element that was opened last.
    pub fn close(&mut self) {
        if let Some(name) = self.open.pop() {
            self.text.push_str("</");
            self.text.push_str(name);
            self.text.push('>');
        }
    }

    /// Closes what is open and returns the text.
    pub fn finish(mut self) -> String {
        while !self.open.is_empty() {
            self.close();
        }
        self.text
    }

    fn start(&mut self, name: &str, attributes: &[(&str, &str)]) {
        self.text.push('<');
        self.text.push_str(name);
        for (key, value) in attributes {
            self.text.push(' ');
            self.text.push_str(key);
            self.text.push_str("='");
            self.escape(value);
            self.text.push('\'');
        }
    }

    fn escape(&mut self, text: &str) {
        for character in text.chars() {
            match character {
                '&' => self.text.push_str("&amp;"),
                '<' => self.text.push_str("&lt;"),
                '>' => self.text.push_str("&gt;"),
                '\'' => self.text.push_str("&apos;"),
                '"' => self.text.push_str("&quot;"),
                '\t' | '\n' | '\r' => self.text.push_str(&format!("&#{};", u32::from(character))),
                // XML 1.0 has no way to say these
                '\0'..'\x20' | '\u{fffe}' | '\u{ffff}' => self.text.push('\u{fffd}'),
                _ => self.text.push(character),
            }
        }
    }
}

/// One disk of a backup job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct JobDisk<'a> {
    pub target: &'a str,
    /// The checkpoint since which it is read; `None`: in full.
    pub since: Option<&'a str>,
    pub scratch: &'a str,
}

/// Returns the XML of a job over `disks`, leaving out `others`.
pub(super) fn write_backup(socket: &str, disks: &[JobDisk<'_>], others: &[&str]) -> String {
    let mut xml = Writer::default();
    xml.open("domainbackup", &[("mode", "pull")]);
    xml.empty("server", &[("transport", "unix"), ("socket", socket)]);
    xml.open("disks", &[]);
    for disk in disks {
        let mut attributes = vec![("name", disk.target), ("backup", "yes"), ("type", "file")];
        match disk.since {
            Some(name) => attributes.extend([("backupmode", "incremental"), ("incremental", name)]),
            None => attributes.push(("backupmode", "full")),
        }
        attributes.push(("exportname", disk.target));
        let bitmap = bitmap_name(disk.target);
        if disk.since.is_some() {
            attributes.push(("exportbitmap", &bitmap));
        }
        xml.open("disk", &attributes);
        xml.empty("scratch", &[("file", disk.scratch)]);
        xml.close();
    }
    for target in others {
        xml.empty("disk", &[("name", target), ("backup", "no")]);
    }
    xml.finish()
}

/// Returns the name under which a job exports the bitmap of a disk.
pub(super) fn bitmap_name(target: &str) -> String {
    format!("backup-{target}")
}

/// Returns the XML of a checkpoint to be made: it tracks `tracked` and not `others`.
pub(super) fn write_checkpoint(name: &str, tracked: &[&str], others: &[&str]) -> String {
    let mut xml = Writer::default();
    xml.open("domaincheckpoint", &[]);
    xml.text("name", name);
    xml.open("disks", &[]);
    for target in tracked {
        xml.empty("disk", &[("name", target), ("checkpoint", "bitmap")]);
    }
    for target in others {
        xml.empty("disk", &[("name", target), ("checkpoint", "no")]);
    }
    xml.finish()
}

/// Returns the XML of a checkpoint whose bitmaps somebody else makes, `created` seconds after the epoch.
pub(super) fn write_redefined(name: &str, tracked: &[&str], parent: Option<&str>, created: i64) -> String {
    let mut xml = Writer::default();
    xml.open("domaincheckpoint", &[]);
    xml.text("name", name);
    if let Some(parent) = parent {
        xml.open("parent", &[]);
        xml.text("name", parent);
        xml.close();
    }
    xml.text("creationTime", &created.to_string());
    xml.open("disks", &[]);
    for target in tracked {
        xml.empty("disk", &[("name", target), ("checkpoint", "bitmap"), ("bitmap", name)]);
    }
    xml.finish()
}

#[cfg(test)]
mod tests;

//! What is looked at before a backup begins, whether the domain runs or not.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::ffi::{Config, Guest};
use super::plan::{self, Selection};
use super::xml::{self, DiskXml, DomainXml};
use super::{BackupRequest, DomainInfo, MAX_NVRAM_BYTES};
use crate::error::{Error, Result};

/// Magic and version of a qcow2 image.
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";
/// The first version of qcow2 that can store bitmaps.
const QCOW2_WITH_BITMAPS: u32 = 3;

/// A domain and its disks.
pub(super) struct Survey {
    pub uuid: String,
    xml_inactive: String,
    xml_live: Option<String>,
    pub domain: DomainXml,
    /// The disks to back up.
    pub disks: Vec<SurveyedDisk>,
    pub excluded: Vec<(String, String)>,
}

/// A disk to back up.
pub(super) struct SurveyedDisk {
    pub xml: DiskXml,
    /// Bytes.
    pub size: u64,
}

impl Survey {
    /// Looks at a domain, and sorts its disks out.
    ///
    /// # Errors
    /// As [`plan::select`], and what libvirt says.
    pub fn take(guest: &Guest, request: &BackupRequest, running: bool) -> Result<Self> {
        let read = |config| guest.xml(config).map_err(|fault| fault.at("read the XML of", guest.object()));
        let xml_inactive = read(Config::Inactive)?;
        let xml_live = if running { Some(read(Config::Live)?) } else { None };
        let domain = xml::read_domain(guest.name(), xml_live.as_ref().unwrap_or(&xml_inactive))?;
        let Selection { disks, excluded } =
            plan::select(&guest.object(), &domain.disks, &request.include, &request.exclude)?;
        let disks = disks.into_iter().map(|xml| {
            let size = guest.capacity(&xml.target).map_err(|fault| {
                fault.at("find the size of", format_args!("disk {} of {}", xml.target, guest.object()))
            })?;
            Ok(SurveyedDisk { xml, size })
        });
        let disks = disks.collect::<Result<Vec<_>>>()?;
        let uuid = guest.uuid().map_err(|fault| fault.at("identify", guest.object()))?;
        Ok(Self { uuid, xml_inactive, xml_live, domain, disks, excluded })
    }

    /// Returns the target names of the domain's disks that are not backed up.
    pub fn others(&self) -> Vec<&str> {
        let all = self.domain.disks.iter().map(|disk| disk.target.as_str());
        all.filter(|target| self.disks.iter().all(|disk| disk.xml.target != *target)).collect()
    }

    /// Returns the target names of the disks that a new checkpoint can track, and tells of the others.
    pub fn trackable(&self, warnings: &mut Vec<String>) -> Vec<String> {
        let mut targets = Vec::new();
        for disk in &self.disks {
            if disk.xml.format != "qcow2" {
                continue;
            }
            if disk.xml.path.as_deref().is_some_and(is_old_qcow2) {
                warnings.push(format!(
                    "disk {} can have no dirty bitmap: its image is of qcow2 version 2 (qemu-img amend -o \
                     compat=1.1 changes that)",
                    disk.xml.target
                ));
                continue;
            }
            targets.push(disk.xml.target.clone());
        }
        targets
    }

    /// Returns the sum of the disks' sizes in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.disks.iter().map(|disk| disk.size).fold(0, u64::saturating_add)
    }

    /// Describes the domain, with its NVRAM as it is now.
    pub fn info(self, guest: &Guest, warnings: &mut Vec<String>) -> DomainInfo {
        let nvram = self.domain.nvram.as_deref().and_then(|path| match read_nvram(path) {
            Ok(bytes) => Some(bytes),
            Err(error) => {
                warnings.push(format!("the NVRAM is not kept: {error}: {}", reason_of(&error)));
                None
            }
        });
        DomainInfo {
            name: guest.name().to_owned(),
            uuid: self.uuid,
            running: self.xml_live.is_some(),
            xml_inactive: self.xml_inactive,
            xml_live: self.xml_live,
            nvram,
            frozen: false,
            paused: false,
        }
    }
}

fn reason_of(error: &Error) -> String {
    std::error::Error::source(error).map(ToString::to_string).unwrap_or_default()
}

fn read_nvram(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_NVRAM_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|error| Error::io("read", path.display(), error))?;
    if bytes.len() as u64 > MAX_NVRAM_BYTES {
        let limit = std::io::Error::other(format!("it has more than {MAX_NVRAM_BYTES} bytes"));
        return Err(Error::io("read", path.display(), limit));
    }
    Ok(bytes)
}

/// Returns true if an image is known to be of a version without bitmaps; one that cannot be read is not.
pub(super) fn is_old_qcow2(path: &Path) -> bool {
    let mut head = [0_u8; 8];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut head));
    let ([a, b, c, d, version @ ..], Ok(())) = (head, read) else { return false };
    [a, b, c, d] == QCOW2_MAGIC && u32::from_be_bytes(version) < QCOW2_WITH_BITMAPS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_of_an_image_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        for (bytes, old) in [
            (&b"QFI\xfb\0\0\0\x02"[..], true),
            (b"QFI\xfb\0\0\0\x03", false),
            (b"QFI\xfb", false),
            (b"", false),
        ] {
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(is_old_qcow2(&path), old, "{bytes:?}");
        }
        assert!(!is_old_qcow2(&directory.path().join("none")));
    }

    #[test]
    fn an_nvram_has_a_limit() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("nvram");
        std::fs::write(&path, b"vars").unwrap();
        assert_eq!(read_nvram(&path).unwrap(), b"vars");
        File::create(&path).unwrap().set_len(MAX_NVRAM_BYTES + 1).unwrap();
        assert!(read_nvram(&path).is_err());
    }
}

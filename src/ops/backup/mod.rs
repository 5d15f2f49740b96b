//! Backups: of domains through libvirt, and of single images without it.
//!
//! The order of a backup: register a session; read marks, points and segments; ask the source for its extents; take
//! the disks in; let go of the source; make everything durable; commit; only then drop superseded checkpoints.

#[cfg(feature = "libvirt")]
mod domain;
mod image;
mod several;

#[cfg(feature = "libvirt")]
pub(in crate::ops) use domain::compare_request;
#[cfg(feature = "libvirt")]
pub use domain::{DomainBackupOptions, backup_domain};
#[cfg(feature = "libvirt")]
pub(in crate::ops) use domain::{base_checkpoint, checkpoint_prefix};
pub(in crate::ops) use image::open as open_image_input;
pub use image::{ImageBackupOptions, ImageInput, backup_image, backup_source};
pub use several::{backup_domains, default_jobs};

pub use super::record::{BackupReport, DiskReport};
use crate::repo::PointEntry;
use crate::repo::catalog::Catalog;
use crate::repo::view::View;

/// Returns the points of a domain that may serve as base or predecessor, oldest first: committed, not forgotten,
/// and in no mark of a prune.
pub(in crate::ops) fn usable_points(catalog: &Catalog, view: &View, domain: &str) -> Vec<PointEntry> {
    let marked = &view.marks().points;
    let of_domain = catalog.points().iter().filter(|entry| entry.record.domain == domain);
    of_domain.filter(|entry| !marked.contains(&entry.record.id)).cloned().collect()
}

#[cfg(test)]
pub(in crate::ops) mod tests;

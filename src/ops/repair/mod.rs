//! Repairing: what is lost is looked for wherever it may still be, and stored again. No content is
//! ever deleted.
//!
//! * [`index`]: packs that no segment lists get one, from their own tables
//! * [`packs`]: chunks without a good copy are salvaged from damaged packs, from another repository, from an image
//! * [`points`]: points of which something stays lost get a copy that says so, and restores in full otherwise
//!
//! What is good is known from damage records: a verify that records goes before.

pub mod index;
mod lacking;
pub mod packs;
pub mod points;

pub use self::index::{IndexReport, repair_index};
pub use self::packs::{PacksOptions, PacksReport, repair_packs};
pub use self::points::{PointsReport, RepairedPoint, repair_points};

#[cfg(test)]
mod tests;

//! Levels and bases: which point a new one is compared with, and whose checkpoints may serve.
//!
//! | asked for | compared with (base) | dirty since, in order of preference | leaves a checkpoint |
//! |---|---|---|---|
//! | full | nothing | - | yes |
//! | copy | nothing | - | no |
//! | inc | newest point | newest point with a checkpoint | yes |
//! | diff | last full | newest point with a checkpoint, last full | yes |
//! | diff, reread | last full | last full | yes |
//! | latest | newest point with a checkpoint | the same | no |
//! | auto | as inc if a checkpoint serves, else full | | yes |

use crate::error::{Error, Result};
use crate::format::point::{Level, Manifest};
use crate::id::PointId;
use crate::ops::RequestedLevel;
use crate::repo::PointEntry;

/// A point or checkpoint named by `--from`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FromBase {
    Point(PointId),
    Checkpoint(String),
}

/// What was decided before the domain was asked which bitmaps it has.
#[derive(Debug, Clone)]
pub struct LevelPlan {
    pub level: Level,
    pub base: Option<PointEntry>,
    /// Points whose checkpoints may serve, best first.
    pub tracked: Vec<PointEntry>,
    pub leaves_checkpoint: bool,
    /// Why it is a full although another level was asked for.
    pub full_reason: Option<String>,
    automatic: bool,
}

/// Decides from the points of one domain, oldest first.
///
/// # Errors
/// [`Error::NotFound`] if `from` names nothing among them; [`Error::Usage`] for `from` with a full.
pub fn plan(
    points: &[PointEntry],
    requested: RequestedLevel,
    reread: bool,
    from: Option<&FromBase>,
) -> Result<LevelPlan> {
    let newest = points.last();
    let tracked = points.iter().rev().find(|entry| entry.record.checkpoint.is_some());
    let last_full = points.iter().rev().find(|entry| entry.record.level == Level::Full);
    let automatic = requested == RequestedLevel::Auto;
    let level = match requested {
        RequestedLevel::Auto => Level::Incremental,
        RequestedLevel::Is(level) => level,
    };
    if let Some(from) = from {
        return plan_from(points, level, automatic, from);
    }
    let made = |base: Option<&PointEntry>, tracked: Vec<&PointEntry>| LevelPlan {
        level,
        base: base.cloned(),
        tracked: tracked.into_iter().cloned().collect(),
        leaves_checkpoint: level != Level::Copy && level != Level::Latest,
        full_reason: None,
        automatic,
    };
    let full_instead = |reason: &str| LevelPlan {
        level: Level::Full,
        base: None,
        tracked: Vec::new(),
        leaves_checkpoint: level != Level::Latest,
        full_reason: (!automatic).then(|| reason.to_owned()),
        automatic,
    };
    Ok(match level {
        Level::Full | Level::Copy => made(None, Vec::new()),
        Level::Incremental => match newest {
            Some(newest) => made(Some(newest), tracked.into_iter().collect()),
            None => full_instead("there is no point of this domain yet"),
        },
        Level::Differential => match last_full {
            Some(full) => {
                let newest = tracked.filter(|_| !reread);
                let mut serve: Vec<&PointEntry> = newest.into_iter().collect();
                if full.record.checkpoint.is_some()
                    && serve.iter().all(|entry| entry.record.id != full.record.id)
                {
                    serve.push(full);
                }
                made(Some(full), serve)
            }
            None => full_instead("there is no full of this domain yet"),
        },
        Level::Latest => match tracked {
            Some(entry) => made(Some(entry), vec![entry]),
            None => full_instead("no point of this domain has a checkpoint"),
        },
    })
}

fn plan_from(points: &[PointEntry], level: Level, automatic: bool, from: &FromBase) -> Result<LevelPlan> {
    if matches!(level, Level::Full | Level::Copy) {
        return Err(Error::Usage(
            "a full or copy is compared with nothing: --from makes no sense with it".into(),
        ));
    }
    let found = points.iter().rev().find(|entry| match from {
        FromBase::Point(id) => entry.record.id == *id,
        FromBase::Checkpoint(name) => entry.record.checkpoint.as_ref() == Some(name),
    });
    let Some(base) = found else {
        let object = match from {
            FromBase::Point(id) => format!("point {} of this domain", id.short()),
            FromBase::Checkpoint(name) => format!("a point of this domain with checkpoint {name}"),
        };
        return Err(Error::NotFound { object });
    };
    let tracked = if base.record.checkpoint.is_some() { vec![base.clone()] } else { Vec::new() };
    Ok(LevelPlan {
        level,
        base: Some(base.clone()),
        tracked,
        leaves_checkpoint: level != Level::Latest,
        full_reason: None,
        automatic,
    })
}

impl LevelPlan {
    /// Returns true for a full that was asked for.
    pub fn is_full_by_wish(&self) -> bool {
        self.level == Level::Full && !self.automatic && self.full_reason.is_none()
    }

    /// Turns an automatic incremental into a full if no checkpoint served for any disk.
    pub fn settle(&mut self, any_incremental: bool) {
        if self.automatic && !any_incremental {
            self.level = Level::Full;
            self.base = None;
        }
    }

    /// Returns the point among [`LevelPlan::tracked`] that made a checkpoint.
    pub fn owner_of(&self, checkpoint: &str) -> Option<&PointEntry> {
        self.tracked.iter().find(|entry| entry.record.checkpoint.as_deref() == Some(checkpoint))
    }
}

/// Returns the map of a disk at the newest point that has one.
pub fn newest_manifest(points: &[PointEntry], target: &str) -> Option<Manifest> {
    points.iter().rev().find_map(|entry| disk_manifest(entry, target))
}

/// Returns the map of a disk at a point.
pub fn disk_manifest(entry: &PointEntry, target: &str) -> Option<Manifest> {
    entry.record.disks.iter().find(|disk| disk.target == target).map(|disk| disk.manifest)
}

/// Returns the checkpoints that stay once a point is committed: the last full's and the newest.
pub fn checkpoints_to_keep(
    points: &[PointEntry],
    new_level: Level,
    new_checkpoint: Option<&str>,
) -> Vec<String> {
    let name = |entry: &PointEntry| entry.record.checkpoint.clone();
    let newest = match new_checkpoint {
        Some(name) => Some(name.to_owned()),
        None => points.iter().rev().find_map(name),
    };
    let full = match new_checkpoint.filter(|_| new_level == Level::Full) {
        Some(name) => Some(name.to_owned()),
        None => points.iter().rev().find(|entry| entry.record.level == Level::Full).and_then(name),
    };
    let mut keep: Vec<String> = newest.into_iter().chain(full).collect();
    keep.dedup();
    keep
}

#[cfg(test)]
mod tests;

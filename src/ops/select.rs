//! Selectors: the one grammar by which a point is named everywhere. Pure.
//!
//! | text | the point |
//! |---|---|
//! | `3fa9`, any first digits of an id | that point; all 32 digits mean the id and nothing else |
//! | `latest`, `latest~2` | the newest of the repository; two before it |
//! | `web`, `web~2` | the newest of domain `web`; two before it |
//! | `web@2026-07-05`, `web@2026-07-05T12:00+02:00` | the newest of `web` at or before |
//! | `web@saturday` | the same, for the last Saturday (today, on a Saturday) |
//! | `web@CHECKPOINT` | the point of `web` that made this libvirt checkpoint |
//!
//! `:vda` behind any of them selects a disk. Names of domains may hold `@`, `~`, `:` and look like ids, so a
//! text can have several readings: all are tried, and unless they agree on one point and disk, the selector
//! is refused with a list of what it fits. There is no precedence and never a "first match".
//!
//! What is selected by domain or time is never a copy that a repair made of a damaged point while that one is still there
//! (see [`super::repaired`]): the two are of one instant, and only the id of the copy names it.

mod moment;
#[cfg(test)]
pub(in crate::ops) mod tests;

use jiff::ZonedDateTime;

pub use self::moment::{Moment, parse_moments};
use crate::error::{Error, Result};
use crate::id::PointId;
use crate::ops::PointEntry;
use crate::ops::repaired::copies;

/// What a selector names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Selected<'a> {
    pub entry: &'a PointEntry,
    /// Target name of the disk behind the last colon, where one was given.
    pub disk: Option<&'a str>,
}

/// Returns the one point that `text` names; `now` gives weekdays and times without an offset their meaning.
///
/// # Errors
/// [`Error::Selector`] if it fits no point or more than one; [`Error::Usage`] if it names a disk that the
/// point does not have.
pub fn select<'a>(entries: &'a [PointEntry], text: &str, now: &ZonedDateTime) -> Result<Selected<'a>> {
    let mut found: Vec<Selected<'a>> = Vec::new();
    for reading in readings(entries, text, now) {
        found.extend(reading.into_iter().map(|entry| Selected { entry, disk: None }));
    }
    let mut without_disk = None;
    for (position, _) in text.match_indices(':') {
        let (Some(prefix), Some(disk)) = (text.get(..position), text.get(position + 1..)) else { continue };
        for reading in readings(entries, prefix, now) {
            // points that lack the disk stay among the candidates: the disk must not decide between points
            if reading.iter().any(|entry| target(entry, disk).is_some()) {
                found.extend(reading.into_iter().map(|entry| Selected { entry, disk: target(entry, disk) }));
            } else {
                without_disk = without_disk.or(reading.first().map(|entry| (*entry, disk.to_owned())));
            }
        }
    }
    found.sort_by(|a, b| (a.entry.record.time_ms, a.key()).cmp(&(b.entry.record.time_ms, b.key())));
    found.dedup_by(|a, b| a.key() == b.key());
    match (found.as_slice(), without_disk) {
        ([one], _) => Ok(*one),
        ([], Some((entry, disk))) => Err(no_such_disk(entry, &disk)),
        (several, _) => Err(refuse(entries, text, several, now)),
    }
}

/// Returns the points that an argument `DOMAIN|POINT` names: all of a domain, by time, or the one point.
///
/// # Errors
/// As [`select`]; also [`Error::Selector`] if the text is both the name of a domain and a selector of
/// something else than the domain's points.
pub fn select_scope<'a>(
    entries: &'a [PointEntry],
    text: &str,
    now: &ZonedDateTime,
) -> Result<Vec<&'a PointEntry>> {
    let of_domain: Vec<_> = entries.iter().filter(|entry| entry.record.domain == text).collect();
    if of_domain.is_empty() {
        let selected = select(entries, text, now)?;
        return match selected.disk {
            None => Ok(vec![selected.entry]),
            Some(disk) => {
                Err(Error::Usage(format!("{text:?} names the disk {disk}, a whole point is needed")))
            }
        };
    }
    let other: Vec<_> = readings(entries, text, now)
        .into_iter()
        .flatten()
        .filter(|entry| entry.record.domain != text)
        .collect();
    if other.is_empty() {
        return Ok(of_domain);
    }
    let mut candidates = vec![format!("all points of domain {text}")];
    candidates.extend(other.iter().map(|entry| describe(entries, entry, None, now)));
    Err(Error::Selector { selector: text.to_owned(), candidates })
}

/// Returns the point that `--from` names: by a selector, or by the checkpoint that a point of `domain` made.
///
/// # Errors
/// [`Error::Selector`] if it fits no point or more than one.
pub fn select_base<'a>(
    entries: &'a [PointEntry],
    domain: &str,
    text: &str,
    now: &ZonedDateTime,
) -> Result<&'a PointEntry> {
    let mut found: Vec<_> = entries
        .iter()
        .filter(|entry| entry.record.domain == domain && entry.record.checkpoint.as_deref() == Some(text))
        .chain(readings(entries, text, now).into_iter().flatten())
        .collect();
    found.sort_by_key(|entry| (entry.record.time_ms, entry.record.id));
    found.dedup_by_key(|entry| entry.record.id);
    match found.as_slice() {
        [one] => Ok(one),
        several => {
            let several: Vec<_> = several.iter().map(|entry| Selected { entry, disk: None }).collect();
            Err(refuse(entries, text, &several, now))
        }
    }
}

/// Returns the shortest first digits of an id, eight at least, that no other point of `entries` has. Of many ids:
/// [`ShortIds`].
pub fn short_id(entries: &[PointEntry], id: PointId) -> String {
    ShortIds::of(entries).short(id)
}

/// The ids of points, in their order, to tell which first digits tell them apart.
#[derive(Debug, Clone)]
pub struct ShortIds(Vec<PointId>);

impl ShortIds {
    /// Takes the ids of `entries`.
    pub fn of(entries: &[PointEntry]) -> Self {
        let mut ids: Vec<PointId> = entries.iter().map(|entry| entry.record.id).collect();
        ids.sort_unstable();
        Self(ids)
    }

    /// Returns the shortest first digits of an id, eight at least, that no other point has.
    pub fn short(&self, id: PointId) -> String {
        // no other id has more digits in common with it than its neighbours
        let before = self.0.partition_point(|other| *other < id).checked_sub(1).and_then(|at| self.0.get(at));
        let after = self.0.get(self.0.partition_point(|other| *other <= id));
        let common = before.into_iter().chain(after).map(|other| common_digits(id, *other)).max();
        id.to_hex().chars().take((common.unwrap_or(0) + 1).max(8)).collect()
    }
}

/// Returns how many digits two ids begin with that are the same.
fn common_digits(one: PointId, other: PointId) -> usize {
    let mut pairs = one.as_bytes().iter().zip(other.as_bytes()).enumerate();
    // the first bytes that differ may begin with the same digit
    let differ = pairs.find(|(_, (a, b))| a != b);
    differ.map_or(2 * PointId::LEN, |(at, (a, b))| 2 * at + usize::from(a >> 4 == b >> 4))
}

impl Selected<'_> {
    fn key(&self) -> (PointId, Option<&str>) {
        (self.entry.record.id, self.disk)
    }
}

/// Returns the entry's own spelling of a disk's target.
fn target<'a>(entry: &'a PointEntry, disk: &str) -> Option<&'a str> {
    entry.record.disks.iter().map(|record| record.target.as_str()).find(|target| *target == disk)
}

/// Returns every reading of a text without a disk that fits at least one point.
fn readings<'a>(entries: &'a [PointEntry], text: &str, now: &ZonedDateTime) -> Vec<Vec<&'a PointEntry>> {
    if let Ok(id) = text.parse::<PointId>() {
        return entries.iter().filter(|entry| entry.record.id == id).map(|entry| vec![entry]).collect();
    }
    let mut sets = Vec::new();
    let is_hex = |c: char| matches!(c, '0'..='9' | 'a'..='f');
    if !text.is_empty() && text.chars().all(is_hex) {
        sets.push(entries.iter().filter(|entry| entry.record.id.to_hex().starts_with(text)).collect());
    }
    let copies = copies(entries);
    let own: Vec<&PointEntry> =
        entries.iter().filter(|entry| !copies.contains_key(&entry.record.id)).collect();
    sets.push(nth_newest(&own, text, 0));
    sets.push(nth_newest_of_all(&own, text, 0));
    if let Some((name, digits)) = text.rsplit_once('~')
        && digits.chars().all(|c| c.is_ascii_digit())
        && let Ok(steps) = digits.parse::<usize>()
    {
        sets.push(nth_newest(&own, name, steps));
        sets.push(nth_newest_of_all(&own, name, steps));
    }
    for (position, _) in text.match_indices('@') {
        let (Some(domain), Some(rest)) = (text.get(..position), text.get(position + 1..)) else { continue };
        let of_domain = || own.iter().copied().filter(|entry| entry.record.domain == domain);
        sets.push(of_domain().filter(|entry| entry.record.checkpoint.as_deref() == Some(rest)).collect());
        for moment in parse_moments(rest, now) {
            let before = of_domain().filter(|entry| entry.record.time_ms < moment.end_ms).collect();
            sets.push(nth_of(before, 0));
        }
    }
    sets.retain(|set| !set.is_empty());
    sets
}

fn nth_newest<'a>(entries: &[&'a PointEntry], domain: &str, steps: usize) -> Vec<&'a PointEntry> {
    nth_of(entries.iter().copied().filter(|entry| entry.record.domain == domain).collect(), steps)
}

fn nth_newest_of_all<'a>(entries: &[&'a PointEntry], name: &str, steps: usize) -> Vec<&'a PointEntry> {
    if name == "latest" { nth_of(entries.to_vec(), steps) } else { Vec::new() }
}

/// Returns the entry `steps` before the newest; with all others of the same instant, which could as well be it.
fn nth_of(mut entries: Vec<&PointEntry>, steps: usize) -> Vec<&PointEntry> {
    entries.sort_by_key(|entry| std::cmp::Reverse(entry.record.time_ms));
    let Some(time_ms) = entries.get(steps).map(|entry| entry.record.time_ms) else { return Vec::new() };
    entries.retain(|entry| entry.record.time_ms == time_ms);
    entries
}

fn no_such_disk(entry: &PointEntry, disk: &str) -> Error {
    let record = &entry.record;
    let targets: Vec<_> = record.disks.iter().map(|disk| disk.target.as_str()).collect();
    Error::Usage(format!(
        "point {} of {} has no disk {disk:?}, it has {}",
        record.id.short(),
        record.domain,
        if targets.is_empty() { "none".to_owned() } else { targets.join(", ") }
    ))
}

fn refuse(entries: &[PointEntry], text: &str, found: &[Selected<'_>], now: &ZonedDateTime) -> Error {
    let candidates =
        found.iter().map(|selected| describe(entries, selected.entry, selected.disk, now)).collect();
    Error::Selector { selector: text.to_owned(), candidates }
}

fn describe(entries: &[PointEntry], entry: &PointEntry, disk: Option<&str>, now: &ZonedDateTime) -> String {
    let record = &entry.record;
    let time = jiff::Timestamp::from_millisecond(record.time_ms).map_or_else(
        |_| record.time_ms.to_string(),
        |time| {
            let local = time.to_zoned_datetime(now.time_zone().clone());
            local.strftime("%Y-%m-%dT%H:%M:%S%:z").to_string()
        },
    );
    let disk = disk.map(|disk| format!(", disk {disk}")).unwrap_or_default();
    format!("{} ({} at {time}{disk})", short_id(entries, record.id), record.domain)
}

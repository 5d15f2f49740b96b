//! Dates, times and weekdays as people write them.

use jiff::civil::{Date, DateTime, Time, Weekday};
use jiff::tz::{Offset, TimeZone};
use jiff::{Timestamp, ToSpan, ZonedDateTime};

/// The stretch of time that a text names: what it does not say is left open, so `2026-07-05` is the whole day,
/// `2026-07-05T12:00` the whole minute. Milliseconds since 1970, the end not included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    pub start_ms: i64,
    pub end_ms: i64,
}

/// Returns what a date, a date and time (`T` or a blank between them, an offset where wanted), or a weekday means.
///
/// Nothing, if it is none of them. Two moments, where the clocks of `now`'s time zone show the time twice or,
/// being put forward, never.
pub fn parse_moments(text: &str, now: &ZonedDateTime) -> Vec<Moment> {
    if let Some(weekday) = parse_weekday(text) {
        return last_weekday(weekday, now)
            .and_then(|date| whole_day(date, now.time_zone()))
            .into_iter()
            .collect();
    }
    // on bytes: a cut inside a character would be no date anyway
    let (Some(date), Some(rest)) = (text.get(..10), text.get(10..)) else { return Vec::new() };
    let Some(date) = parse_date(date) else { return Vec::new() };
    if rest.is_empty() {
        return whole_day(date, now.time_zone()).into_iter().collect();
    }
    let Some(rest) = rest.strip_prefix(['T', 't', ' ']) else { return Vec::new() };
    let zone_at = rest.find(['Z', 'z', '+', '-', ' ']).unwrap_or(rest.len());
    let (Some(clock), Some(zone)) = (rest.get(..zone_at), rest.get(zone_at..)) else { return Vec::new() };
    let Some((time, unit_ms)) = parse_time(clock) else { return Vec::new() };
    let local = date.to_datetime(time);
    let starts = match zone.trim_start() {
        "" if zone.is_empty() => in_zone(local, now.time_zone()),
        zone => parse_offset(zone).and_then(|offset| offset.to_timestamp(local).ok()).into_iter().collect(),
    };
    starts
        .into_iter()
        .map(Timestamp::as_millisecond)
        .filter_map(|start_ms| Some(Moment { start_ms, end_ms: start_ms.checked_add(unit_ms)? }))
        .collect()
}

fn number<const LEN: usize>(text: &str) -> Option<i16> {
    let digits = text.len() == LEN && text.bytes().all(|byte| byte.is_ascii_digit());
    if digits { text.parse().ok() } else { None }
}

fn parse_date(text: &str) -> Option<Date> {
    let mut parts = text.split('-');
    let year = number::<4>(parts.next()?)?;
    let month = i8::try_from(number::<2>(parts.next()?)?).ok()?;
    let day = i8::try_from(number::<2>(parts.next()?)?).ok()?;
    if parts.next().is_some() { None } else { Date::new(year, month, day).ok() }
}

/// Returns the time and the length of the unit that the text ends with, milliseconds.
fn parse_time(text: &str) -> Option<(Time, i64)> {
    let mut parts = text.split(':');
    let hour = i8::try_from(number::<2>(parts.next()?)?).ok()?;
    let minute = i8::try_from(number::<2>(parts.next()?)?).ok()?;
    let (mut second, mut millisecond, mut unit_ms) = (0, 0, 60_000);
    if let Some(rest) = parts.next() {
        unit_ms = 1000;
        let whole = match rest.split_once('.') {
            None => rest,
            Some((whole, fraction)) => {
                unit_ms = 1;
                // as the programs' own output has it: one to three digits
                let digits = fraction.bytes().all(|byte| byte.is_ascii_digit()) && fraction.len() <= 3;
                millisecond = if digits && !fraction.is_empty() {
                    format!("{fraction:0<3}").parse::<i32>().ok()?
                } else {
                    return None;
                };
                whole
            }
        };
        second = i8::try_from(number::<2>(whole)?).ok()?;
    }
    if parts.next().is_some() {
        return None;
    }
    Some((Time::new(hour, minute, second, millisecond.checked_mul(1_000_000)?).ok()?, unit_ms))
}

fn parse_offset(text: &str) -> Option<Offset> {
    if matches!(text, "Z" | "z") {
        return Some(Offset::UTC);
    }
    let sign = match text.chars().next()? {
        '+' => 1,
        '-' => -1,
        _ => return None,
    };
    let text = text.get(1..)?;
    let (hours, minutes) = match text.split_once(':') {
        Some((hours, minutes)) => (number::<2>(hours)?, number::<2>(minutes)?),
        None if text.len() == 4 => (number::<2>(text.get(..2)?)?, number::<2>(text.get(2..)?)?),
        None => (number::<2>(text)?, 0),
    };
    if minutes > 59 {
        return None;
    }
    Offset::from_seconds(sign * (i32::from(hours) * 3600 + i32::from(minutes) * 60)).ok()
}

fn parse_weekday(text: &str) -> Option<Weekday> {
    const NAMES: [(&str, Weekday); 7] = [
        ("monday", Weekday::Monday),
        ("tuesday", Weekday::Tuesday),
        ("wednesday", Weekday::Wednesday),
        ("thursday", Weekday::Thursday),
        ("friday", Weekday::Friday),
        ("saturday", Weekday::Saturday),
        ("sunday", Weekday::Sunday),
    ];
    let text = text.to_ascii_lowercase();
    NAMES.iter().find(|(name, _)| *name == text || name.get(..3) == Some(&text)).map(|(_, weekday)| *weekday)
}

fn last_weekday(weekday: Weekday, now: &ZonedDateTime) -> Option<Date> {
    let mut date = now.date();
    for _ in 0..7 {
        if date.weekday() == weekday {
            return Some(date);
        }
        date = date.yesterday().ok()?;
    }
    None
}

fn whole_day(date: Date, zone: &TimeZone) -> Option<Moment> {
    let start = |date: Date| date.to_zoned_datetime(zone.clone()).ok()?.start_of_day().ok();
    let (from, to) = (start(date)?, start(date.checked_add(1.day()).ok()?)?);
    Some(Moment { start_ms: from.timestamp().as_millisecond(), end_ms: to.timestamp().as_millisecond() })
}

fn in_zone(local: DateTime, zone: &TimeZone) -> Vec<Timestamp> {
    let ambiguous = zone.to_ambiguous_timestamp(local);
    let mut found: Vec<_> = [ambiguous.earlier(), ambiguous.later()].into_iter().flatten().collect();
    found.dedup();
    found
}

//! Sizes, rates and times: as people write them, and as they read them.

use jiff::{Span, Timestamp, ZonedDateTime};

/// Reads `32K`, `1.5G`, `100MiB`, `4096`: K, M, G, T are powers of 1024.
///
/// # Errors
/// A text for the user, naming what was given.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size: a number, then K, M, G or T for powers of 1024");
    let number_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(number_end).ok_or_else(wrong)?;
    let shift = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong()),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let is_number = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !is_number(fraction) || fraction.len() > 6 || (number.contains('.') && shift == 0)
    {
        return Err(wrong());
    }
    let too_large = || format!("{text:?} is more than a 64-bit number of bytes holds");
    let whole: u64 = whole.parse().map_err(|_| too_large())?;
    let bytes = u128::from(whole) << shift;
    let thousandths = format!("{fraction:0<6}").parse::<u128>().map_err(|_| wrong())?;
    let bytes = bytes + ((thousandths << shift) / 1_000_000);
    u64::try_from(bytes).map_err(|_| too_large())
}

/// Reads bytes a second: a size, with `/s` behind it where one likes; 0 would never end and is refused.
///
/// # Errors
/// A text for the user.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    match parse_size(text.strip_suffix("/s").unwrap_or(text))? {
        0 => Err("a rate of 0 would never end".into()),
        rate => Ok(rate),
    }
}

/// Reads a span of time: numbers with `y`, `m` (months), `w`, `d`, `h`, `min`, `s`, largest first: `2y5m7d3h30min`.
///
/// # Errors
/// A text for the user.
pub fn parse_span(text: &str) -> Result<Span, String> {
    const UNITS: [&str; 7] = ["y", "m", "w", "d", "h", "min", "s"];
    let wrong =
        || format!("{text:?} is no span of time: numbers with y, m, w, d, h, min or s, as in 2y5m7d3h30min");
    let mut numbers = [0i64; UNITS.len()];
    let mut rest = text;
    let mut next = 0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let (number, behind) = rest.split_at_checked(digits).ok_or_else(wrong)?;
        let letters = behind.find(|c: char| c.is_ascii_digit()).unwrap_or(behind.len());
        let (unit, behind) = behind.split_at_checked(letters).ok_or_else(wrong)?;
        let at = UNITS.iter().position(|known| *known == unit).filter(|at| *at >= next).ok_or_else(wrong)?;
        let slot = numbers.get_mut(at).ok_or_else(wrong)?;
        *slot = number.parse().map_err(|_| wrong())?;
        (rest, next) = (behind, at + 1);
    }
    if next == 0 {
        return Err(wrong());
    }
    let [years, months, weeks, days, hours, minutes, seconds] = numbers;
    let span = Span::new().try_years(years).and_then(|span| span.try_months(months));
    let span = span.and_then(|span| span.try_weeks(weeks)).and_then(|span| span.try_days(days));
    let span = span.and_then(|span| span.try_hours(hours)).and_then(|span| span.try_minutes(minutes));
    span.and_then(|span| span.try_seconds(seconds))
        .map_err(|_| format!("{text:?} is longer than any calendar"))
}

/// Returns bytes in IEC units with three digits: `512 B`, `1.50 KiB`, `23.4 GiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    // precision is not needed here: three digits are shown
    let mut value = bytes as f64 / 1024.0;
    let mut unit = "KiB";
    for larger in UNITS.iter().skip(1) {
        if value < 1023.5 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    let digits = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.digits$} {unit}")
}

/// Returns a time as JSON has it: RFC 3339, UTC.
pub fn utc(ms: i64) -> String {
    timestamp(ms).to_string()
}

/// Returns a time as people read it, and as a selector takes it: local, with the offset.
pub fn local(ms: i64, now: &ZonedDateTime) -> String {
    let local = timestamp(ms).to_zoned_datetime(now.time_zone().clone());
    local.strftime("%Y-%m-%d %H:%M:%S%:z").to_string()
}

/// A forged record may hold a time that no calendar has; it is shown as the end of the calendar.
fn timestamp(ms: i64) -> Timestamp {
    let end = if ms < 0 { Timestamp::MIN } else { Timestamp::MAX };
    Timestamp::from_millisecond(ms).unwrap_or(end)
}

/// Returns a duration for people: `0.4 s`, `12 s`, `3 min 5 s`, `2 h 10 min`.
pub fn duration(ms: u64) -> String {
    let seconds = ms / 1000;
    match seconds {
        0..10 => format!("{}.{} s", seconds, ms % 1000 / 100),
        10..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// Returns `3 points`, `1 point`.
pub fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        let good = [
            ("0", 0),
            ("4096", 4096),
            ("32K", 32 << 10),
            ("1.5G", 3 << 29),
            ("100 MiB", 100 << 20),
            ("2t", 2 << 40),
            ("0.5k", 512),
        ];
        for (text, bytes) in good {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in
            ["", "K", "-1", "1.5", "1..5G", "1x", "1e3", "99999999999999999999", "99999999T", "é", ".5G"]
        {
            assert!(parse_size(text).is_err(), "{text}");
        }
        assert_eq!(parse_rate("50M/s"), Ok(50 << 20));
        assert!(parse_rate("0").is_err());
    }

    #[test]
    fn people_read_three_digits() {
        let shown = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536, "1.50 KiB"),
            (10 << 20, "10.0 MiB"),
            ((1 << 30) - 1, "1.00 GiB"),
            (123 << 30, "123 GiB"),
            (u64::MAX, "16.0 EiB"),
        ];
        for (bytes, text) in shown {
            assert_eq!(size(bytes), text);
        }
        assert_eq!(duration(450), "0.4 s");
        assert_eq!(duration(185_000), "3 min 5 s");
        assert_eq!(duration(7_800_000), "2 h 10 min");
    }

    #[test]
    fn times_are_local_for_people_and_utc_for_programs() {
        let zone = jiff::tz::TimeZone::get("Europe/Berlin").unwrap();
        let now = Timestamp::UNIX_EPOCH.to_zoned_datetime(zone);
        assert_eq!(local(1_783_000_000_000, &now), "2026-07-02 15:46:40+02:00");
        assert_eq!(utc(1_783_000_000_000), "2026-07-02T13:46:40Z");
        assert!(utc(i64::MAX).starts_with("9999-") && utc(i64::MIN).starts_with("-009999-"));
    }

    #[test]
    fn spans_are_read_from_years_to_seconds() {
        let whole = Span::new().years(2).months(5).days(7).hours(3).minutes(30);
        assert_eq!(parse_span("2y5m7d3h30min").unwrap().fieldwise(), whole.fieldwise());
        assert_eq!(parse_span("30d").unwrap().fieldwise(), Span::new().days(30).fieldwise());
        assert_eq!(parse_span("2w").unwrap().fieldwise(), Span::new().weeks(2).fieldwise());
        for text in [
            "",
            "7",
            "d",
            "1d2d",
            "1d2y",
            "1.5d",
            "-1d",
            "1x",
            "99999999999y",
            "99999999999999999999s",
            "1 d",
        ] {
            assert!(parse_span(text).is_err(), "{text}");
        }
    }

    #[test]
    fn any_size_rate_and_span_is_read_or_refused() {
        let test = concat!(module_path!(), "::alone_sizes");
        crate::mutate::finish_alone(crate::mutate::start_alone(test, &[]));
    }

    #[test]
    #[ignore = "measures its own process: run by any_size_rate_and_span_is_read_or_refused"]
    fn alone_sizes() {
        let samples = ["32K", "1.5G", "100MiB", "50M/s", "2y5m7d3h30min", "30d", "4096"];
        let samples: Vec<Vec<u8>> = samples.into_iter().map(|text| text.as_bytes().to_vec()).collect();
        crate::mutate::fuzz("sizes and spans", &samples, true, 6.0, &mut |bytes| {
            let text = String::from_utf8_lossy(bytes);
            let _ = (parse_size(&text), parse_rate(&text), parse_span(&text));
        });
    }

    proptest! {
        #[test]
        fn no_text_makes_parsing_panic(text in "\\PC{0,12}|[0-9.]{0,24}[KMGTkmgtiBb/s ]{0,4}") {
            let _ = parse_size(&text);
            let _ = parse_rate(&text);
            let _ = parse_span(&text);
        }

        #[test]
        fn whole_sizes_are_exact(number in 0u64..1 << 20, unit in 0usize..5) {
            let text = format!("{number}{}", ["", "K", "M", "G", "T"][unit]);
            prop_assert_eq!(parse_size(&text), Ok(number << (10 * unit)));
        }
    }
}

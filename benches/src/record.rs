//! What every record says: the machine and the day.

use std::time::{SystemTime, UNIX_EPOCH};

/// The machine's name: that of its processor, or `VESPER_BENCH_MACHINE`.
pub fn machine() -> String {
    let processor = || {
        let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
        let name = text.lines().find(|line| line.starts_with("model name"))?.split(':').nth(1)?;
        let cores = text.lines().filter(|line| line.starts_with("processor")).count();
        Some(format!("{} {cores} cores", name.trim()))
    };
    let name = std::env::var("VESPER_BENCH_MACHINE")
        .ok()
        .or_else(processor)
        .unwrap_or_else(|| format!("{} {}", std::env::consts::OS, std::env::consts::ARCH));
    let words: Vec<String> = name
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(str::to_ascii_lowercase)
        .collect();
    words.join("-")
}

/// The date in UTC as `year-month-day`.
pub fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    date(seconds / 86_400)
}

/// The date that is this many days after 1970-01-01.
fn date(mut days: u64) -> String {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    format!("{year}-{month:02}-{:02}", days + 1)
}

#[cfg(test)]
mod tests {
    #[test]
    fn days_become_dates() {
        let dates = [0, 58, 59, 11_016, 20_422].map(super::date);
        assert_eq!(dates, ["1970-01-01", "1970-02-28", "1970-03-01", "2000-02-29", "2025-11-30"]);
    }
}

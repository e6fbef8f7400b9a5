//! What every record says, the machine and the day, and where it is written.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use candle_core::Device;
use serde::Serialize;

/// The machine's name: `VESPER_BENCH_MACHINE`, or that of its processor.
pub fn machine() -> String {
    machine_of(&Device::Cpu)
}

/// The machine's name: `VESPER_BENCH_MACHINE`, or that of the GPU or the processor, whichever the device is.
pub fn machine_of(device: &Device) -> String {
    #[cfg(feature = "cuda")]
    let gpu = match device {
        Device::Cuda(device) => device.cuda_stream().context().name().ok(),
        _ => None,
    };
    #[cfg(not(feature = "cuda"))]
    let gpu = device.is_cuda().then(|| "cuda".to_owned());
    let processor = || {
        let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
        let name = text.lines().find(|line| line.starts_with("model name"))?.split(':').nth(1)?;
        let cores = text.lines().filter(|line| line.starts_with("processor")).count();
        Some(format!("{} {cores} cores", name.trim()))
    };
    let name = std::env::var("VESPER_BENCH_MACHINE")
        .ok()
        .or(gpu)
        .or_else(processor)
        .unwrap_or_else(|| format!("{} {}", std::env::consts::OS, std::env::consts::ARCH));
    let words: Vec<String> = name
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(str::to_ascii_lowercase)
        .collect();
    words.join("-")
}

/// The file of a bench's record: `record/<machine>/<date>-<bench>.json`, or the one that `VESPER_BENCH_RECORD` names.
pub fn path(bench: &str, date: &str, machine: &str) -> PathBuf {
    std::env::var_os("VESPER_BENCH_RECORD").map_or_else(
        || {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("record").join(machine);
            folder.join(format!("{date}-{bench}.json"))
        },
        PathBuf::from,
    )
}

/// Writes a record, with its folder, and says where.
///
/// # Errors
/// A folder or a file that cannot be written.
pub fn write(path: &Path, record: &impl Serialize) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, serde_json::to_string_pretty(record)? + "\n")?;
    println!("{}", path.display());
    Ok(())
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

//! Large files: memory stays where it is.
#![cfg(target_os = "linux")]

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use vesper_data::Sources;

/// The most memory that this process had since `forget_peak`, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

fn forget_peak() {
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
}

/// Text number `number`: about 900 bytes, and no two alike.
fn text(number: u64) -> String {
    format!("Document {number}. {}", format!("L'été de {number} fut long, et l'hiver aussi. ").repeat(16))
}

fn lines(path: &Path, count: u64, before: &str, between: &str, after: &str, record: impl Fn(&str) -> String) {
    let file = BufWriter::new(File::create(path).unwrap());
    let compressed = path.extension().is_some_and(|extension| extension == "gz");
    let mut file: Box<dyn Write> = if compressed {
        Box::new(flate2::write::GzEncoder::new(file, flate2::Compression::fast()))
    } else {
        Box::new(file)
    };
    file.write_all(before.as_bytes()).unwrap();
    for number in 0..count {
        let between = if number > 0 { between } else { "" };
        write!(file, "{between}{}", record(&text(number))).unwrap();
    }
    file.write_all(after.as_bytes()).unwrap();
    file.flush().unwrap();
}

fn table(path: &Path, count: u64) {
    let schema = Arc::new(parse_message_type("message t { required binary text (UTF8); }").unwrap());
    let properties = WriterProperties::builder()
        .set_compression(Compression::SNAPPY)
        .set_dictionary_enabled(false)
        .build();
    let file = File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, Arc::new(properties)).unwrap();
    let rows: Vec<u64> = (0..count).collect();
    for rows in rows.chunks(50_000) {
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        let values: Vec<ByteArray> =
            rows.iter().map(|row| ByteArray::from(text(*row).into_bytes())).collect();
        column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
}

/// Writes files of 2 GB (VESPER_LARGE: another number of bytes) and reads them; each needs less than 48 MB more than
/// was in use before, or 128 MB where it is one text. It runs alone, since the peak is the process's:
/// `cargo test --release --test sources -- --ignored --nocapture large`.
#[test]
#[ignore = "writes and reads 2 GB for each format"]
fn a_large_file_is_read_in_little_memory() {
    let bytes = std::env::var("VESPER_LARGE").map_or(2_000_000_000, |bytes| bytes.parse().unwrap());
    let count = bytes / text(0).len() as u64;
    let folder = tempfile::tempdir().unwrap();
    let record = |text: &str| format!("{{\"text\": \"{text}\"}}");
    let article = |text: &str| {
        let question = "{\"id\": \"a\", \"question\": \"Quand ?\", \"answers\": [{\"text\": \"Document\"}]}";
        format!("{{\"paragraphs\": [{{\"context\": \"{text}\", \"qas\": [{question}]}}]}}")
    };
    for name in ["a.txt", "a.jsonl", "a.json", "squad.json", "a.jsonl.gz", "a.parquet"] {
        let path = folder.path().join(name);
        match name {
            "a.txt" => lines(&path, count, "", "\n<|endoftext|>\n", "\n", str::to_owned),
            "a.json" => lines(&path, count, "[", ", ", "]", record),
            "squad.json" => lines(&path, count, "{\"data\": [", ", ", "]}", article),
            "a.parquet" => table(&path, count),
            _ => lines(&path, count, "", "\n", "\n", record),
        }
        forget_peak();
        let (before, start) = (peak(), Instant::now());
        let documents = Sources::new([&path]).documents().unwrap();
        let report = documents.report();
        assert_eq!(documents.map(Result::unwrap).count() as u64, count, "{name}");
        let (used, seconds) = (peak() - before, start.elapsed().as_secs_f64());
        let size = std::fs::metadata(&path).unwrap().len() as f64 / 1e6;
        let text = report.bytes() as f64 / 1e6;
        println!(
            "{name}: {size:.0} MB, {text:.0} MB of text, {:.0} MB/s of text, {:.1} MB more memory (peak {:.1} MB)",
            text / seconds,
            used as f64 / 1e6,
            peak() as f64 / 1e6
        );
        assert!(used < 48_000_000, "{name}: {used} bytes");
        std::fs::remove_file(&path).unwrap();
    }
    // A single text, of lines and in one line: read in pieces of 64 MiB.
    for (name, between) in [("whole.txt", "\n"), ("line.txt", " ")] {
        let path = folder.path().join(name);
        lines(&path, count, "", between, "", str::to_owned);
        forget_peak();
        let (before, size) = (peak(), std::fs::metadata(&path).unwrap().len());
        let documents = Sources::new([&path]).documents().unwrap();
        let report = documents.report();
        assert_eq!(documents.map(Result::unwrap).count() as u64, size.div_ceil(64 << 20), "{name}");
        assert_eq!((report.bytes(), report.notes().len()), (size, usize::from(size > 64 << 20)));
        let used = peak() - before;
        println!("{name}: {:.0} MB, {:.1} MB more memory", size as f64 / 1e6, used as f64 / 1e6);
        assert!(used < 128_000_000, "{name}: {used} bytes");
        std::fs::remove_file(&path).unwrap();
    }
}

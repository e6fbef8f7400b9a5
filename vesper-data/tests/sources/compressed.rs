//! gzip and zstd.

use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use vesper_data::{DataError, Result, Sources};

use crate::{folder, message, read, read_file, texts};

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    compress_to_vec(bytes, CompressionLevel::Fastest)
}

const LINES: &str = "{\"text\": \"Un.\"}\n{\"text\": \"Deux.\"}\n";

#[test]
fn compressed_files_are_read_as_what_is_in_them() {
    let expected = [("Un.".to_owned(), 1), ("Deux.".to_owned(), 2)];
    let list = b"[{\"text\": \"Un.\"},\n{\"text\": \"Deux.\"}]";
    for compress in [gzip, zstd] {
        // Which compression it is, the content says; which format, the name and the content.
        for name in ["a.jsonl.gz", "a.jsonl.zst", "a.JSONL.GZ", "a.ndjson.zstd", "a.json.gz", "a.jsonl", "a"]
        {
            assert_eq!(read_file(name, &compress(LINES.as_bytes())).unwrap(), expected, "{name}");
        }
        assert_eq!(read_file("a.json.gz", &compress(list)).unwrap(), expected);
        let dialogue = read_file("a.txt.gz", &compress(b"[a:] un\n\n[a:] deux")).unwrap();
        assert_eq!(dialogue.len(), 2);
        assert_eq!(read_file("a.txt.gz", &compress(b"Un.<|endoftext|>Deux.")).unwrap().len(), 2);
    }
    assert_eq!(read_file("a.jsonl.gz", LINES.as_bytes()).unwrap(), expected);
}

#[test]
fn all_members_and_frames_of_a_file_are_read() {
    let (first, second) = LINES.split_at(20);
    let skippable = [&[0x5A, 0x2A, 0x4D, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
    let members = [gzip(first.as_bytes()), gzip(b""), gzip(second.as_bytes())].concat();
    let frames = [&skippable[..], &zstd(first.as_bytes()), &skippable, &zstd(second.as_bytes())].concat();
    for bytes in [members, frames] {
        assert_eq!(read_file("a.jsonl.gz", &bytes).unwrap().len(), 2);
    }
    // Zeros fill a file up; anything else behind a member is damage.
    let padded = [gzip(first.as_bytes()), vec![0; 700], gzip(second.as_bytes()), vec![0; 70_000]].concat();
    assert_eq!(read_file("a.jsonl.gz", &padded).unwrap().len(), 2);
    let text = message("a.jsonl.gz", &[gzip(LINES.as_bytes()), b"\0more".to_vec()].concat());
    assert!(text.contains("cannot be read as gzip: it is cut short or damaged"), "{text}");
}

#[test]
fn compressed_files_of_a_folder_are_found() {
    let folder = folder(&[
        ("a.jsonl.gz", &gzip(b"{\"text\": \"a\"}")),
        ("b.txt.zst", &zstd(b"b")),
        ("c.gz", &gzip(b"unknown")),
        ("d.tar.gz", b"unknown"),
    ]);
    assert_eq!(texts(&read(folder.path()).unwrap()), ["a", "b"]);
}

/// Text that does not become shorter by much, and more than a buffer of it.
fn long() -> String {
    let mut state = 1_u64;
    let lines = (0..40_000).map(|number| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        format!("{{\"text\": \"{number} {state}\"}}\n")
    });
    lines.collect::<Vec<_>>().concat()
}

#[test]
fn a_file_that_is_cut_short_or_changed_is_an_error_that_names_it() {
    let text = long();
    for (kind, whole) in [("gzip", gzip(text.as_bytes())), ("zstd", zstd(text.as_bytes()))] {
        for name in ["a.jsonl.gz", "a.txt.gz"] {
            for end in [5, 12, 100, whole.len() / 2, whole.len() - 5, whole.len() - 1] {
                let message = message(name, &whole[..end]);
                assert!(
                    message.starts_with(&format!(" cannot be read as {kind}: it is cut short or damaged (")),
                    "{kind}, {end}: {message}"
                );
            }
        }
        let mut changed = whole.clone();
        let middle = changed.len() / 2;
        changed[middle] ^= 0x10;
        let folder = folder(&[("a.jsonl", &changed)]);
        let documents = Sources::new([folder.path().join("a.jsonl")]).documents().unwrap();
        let error = documents.collect::<Result<Vec<_>>>().unwrap_err();
        assert!(matches!(error, DataError::Unreadable { .. } | DataError::Record { .. }), "{kind}: {error}");
    }
}

#[test]
fn what_was_read_before_the_end_of_a_cut_file_is_given() {
    let whole = gzip(long().as_bytes());
    let folder = folder(&[("a.jsonl.gz", &whole[..whole.len() - 10])]);
    let documents = Sources::new([folder.path()]).documents().unwrap();
    let report = documents.report();
    assert!(documents.last().unwrap().is_err());
    assert!(report.documents() > 30_000, "{}", report.documents());
}

#[test]
fn a_compressed_table_is_refused() {
    assert_eq!(
        message("a.parquet.gz", &gzip(b"PAR1")),
        " cannot be read as parquet: the file as a whole is compressed (gzip): decompress it first"
    );
}

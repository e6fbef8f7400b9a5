//! Broken records: counted, reported, and too many of them.

use vesper_data::source::{BrokenRecords, FormatKind};
use vesper_data::{DataError, Document, Documents, ReadSettings, Result, Sources};

use crate::{folder, message_with, read_with, texts};

const LINES: &[u8] =
    b"{\"text\": \"a\"}\n{\"text\": \"\xE9\"}\n{\"text\": null}\nnonsense\n{\"text\": \"b\"}\n[]\n";

fn with(broken: BrokenRecords) -> ReadSettings {
    ReadSettings::default().with_broken(broken)
}

#[test]
fn broken_records_within_the_limit_are_counted_and_named() {
    let folder =
        folder(&[("a.jsonl", LINES), ("b.json", b"[{\"text\": \"c\"}, {\"text\": {}}, {\"text\": \"d\"}]")]);
    for broken in [BrokenRecords::Any, BrokenRecords::AtMost(5)] {
        let documents = Sources::new([folder.path()]).with_settings(with(broken)).documents().unwrap();
        let report = documents.report();
        let documents: Vec<Document> = documents.map(Result::unwrap).collect();
        assert_eq!(texts(&documents), ["a", "b", "c", "d"]);
        assert_eq!((report.documents(), report.skipped()), (4, 5));
        let path = |name: &str| folder.path().join(name).display().to_string();
        assert_eq!(
            report.messages(),
            [
                format!("{}, line 2: invalid UTF-8 at byte 24 of the file", path("a.jsonl")),
                format!("{}, line 3: \"text\" is null, expected a string", path("a.jsonl")),
                format!("{}, line 4: invalid JSON at column 2: expected ident", path("a.jsonl")),
                format!(
                    "{}, line 6: expected an object like {{\"text\": \"...\"}}, got a list",
                    path("a.jsonl")
                ),
                format!("{}, record 2 (line 1): \"text\" is an object, expected a string", path("b.json")),
            ]
        );
    }
}

#[test]
fn one_broken_record_too_many_is_the_end() {
    let folder = folder(&[("a.jsonl", LINES)]);
    let sources = |limit| Sources::new([folder.path()]).with_settings(with(BrokenRecords::AtMost(limit)));
    let mut documents = sources(3).documents().unwrap();
    let report = documents.report();
    assert_eq!(documents.next().unwrap().unwrap().text, "a");
    assert_eq!(documents.next().unwrap().unwrap().text, "b");
    let error = documents.next().unwrap().unwrap_err();
    assert!(matches!(error, DataError::TooManyBroken { limit: 3, .. }));
    let error = error.to_string();
    assert!(error.starts_with("more than 3 broken records, the last of them: "), "{error}");
    assert!(error.contains("a.jsonl, line 6: "), "{error}");
    assert!(documents.next().is_none());
    assert_eq!(report.skipped(), 3);
    // Without a limit of its own the first one is the error.
    let mut documents = sources(0).documents().unwrap();
    documents.next();
    assert!(matches!(documents.next(), Some(Err(DataError::InvalidUtf8 { line: 2, .. }))));
}

#[test]
fn only_the_first_messages_are_kept() {
    let lines = "nonsense\n".repeat(1000) + "{\"text\": \"a\"}";
    let folder = folder(&[("a.jsonl", lines.as_bytes())]);
    let documents =
        Sources::new([folder.path()]).with_settings(with(BrokenRecords::Any)).documents().unwrap();
    let report = documents.report();
    assert_eq!(documents.count(), 1);
    assert_eq!((report.skipped(), report.messages().len()), (1000, 20));
    assert!(report.messages()[19].contains("line 20: "));
}

#[test]
fn a_report_is_shared_with_its_clones() {
    let folder = folder(&[("a.jsonl", LINES)]);
    let documents =
        Sources::new([folder.path()]).with_settings(with(BrokenRecords::Any)).documents().unwrap();
    let report = documents.report();
    let other = report.clone();
    std::thread::spawn(move || documents.count()).join().unwrap();
    assert_eq!((report.skipped(), other.skipped(), other.bytes()), (4, 4, 2));
}

#[test]
fn a_broken_document_of_a_text_reaches_to_the_next_separator() {
    let text = b"un<|endoftext|>d\xFFeux\n\nencore\n\xFF\n<|endoftext|>\ntrois<|endoftext|>quatre";
    let documents = read_with("a.txt", text, with(BrokenRecords::AtMost(1))).unwrap();
    // What shares a line with bad bytes cannot be told apart from them.
    let found: Vec<(&str, u64)> = documents.iter().map(|d| (d.text.as_str(), d.line)).collect();
    assert_eq!(found, [("trois", 6), ("quatre", 6)]);
}

#[test]
fn data_of_broken_records_alone_holds_no_text() {
    let result = read_with("a.jsonl", b"nonsense\n", with(BrokenRecords::Any));
    assert!(matches!(result, Err(DataError::NoText { .. })));
    let message = |bytes: &[u8], settings| message_with("a.jsonl", bytes, settings);
    let text = message(b"{\"a\": 1}\n", with(BrokenRecords::Any));
    assert!(text.starts_with(" holds no text: its one record is broken: "), "{text}");
    assert!(
        text.ends_with("a.jsonl, line 1: the field \"text\" is missing (the fields are: \"a\")"),
        "{text}"
    );
    let text = message(b"x\ny\n", with(BrokenRecords::AtMost(2)).with_text("b"));
    assert!(text.starts_with(" holds no text: its 2 records are broken, the first: "), "{text}");
    assert_eq!(message(b"\n", with(BrokenRecords::Any)), " holds no text");
}

#[test]
fn a_record_that_is_too_long_is_broken_and_those_behind_it_are_read() {
    let long = "x".repeat(300_000);
    let settings = with(BrokenRecords::Any).with_max_record_bytes(40);
    let too_long = |name: &str, bytes: &str, format| {
        let settings = settings.clone().with_format(format);
        let documents = read_with(name, bytes.as_bytes(), settings.clone()).unwrap();
        assert_eq!(texts(&documents).last(), Some(&"b"), "{name}");
        message_with(name, bytes.as_bytes(), settings.with_broken(BrokenRecords::AtMost(0)))
    };
    assert_eq!(
        too_long("a.jsonl", &format!("{{\"text\": \"{long}\"}}\n{{\"text\": \"b\"}}"), FormatKind::Jsonl),
        ", line 1: the line has more than 40 bytes (max-record-bytes)"
    );
    assert_eq!(
        too_long("a.json", &format!("[{{\"text\": \"{long}\"}}, {{\"text\": \"b\"}}]"), FormatKind::Json),
        ", record 1 (line 1): the record has more than 40 bytes (max-record-bytes)"
    );
    assert_eq!(
        too_long("a.txt", &format!("{long}\n<|endoftext|>b"), FormatKind::Text),
        ", line 1: the line has more than 40 bytes (max-record-bytes)"
    );
    assert_eq!(
        too_long("a.txt", &format!("a\n{}<|endoftext|>\nb", "line\n".repeat(9)), FormatKind::Text),
        ", line 1: the document has more than 40 bytes (max-record-bytes)"
    );
    let squad = format!("{{\"data\": [{{\"paragraphs\": [{{\"context\": \"{long}\", \"qas\": []}}]}}]}}");
    assert_eq!(
        message_with("a.json", squad.as_bytes(), ReadSettings::default().with_max_record_bytes(40)),
        ", record 1 (line 1): the paragraph has more than 40 bytes (max-record-bytes)"
    );
}

#[test]
fn a_line_of_the_length_that_is_allowed_is_read() {
    let line = "{\"text\": \"abc\"}\n";
    let settings = |bytes| ReadSettings::default().with_max_record_bytes(bytes);
    assert_eq!(read_with("a.jsonl", line.as_bytes(), settings(16)).unwrap().len(), 1);
    assert!(read_with("a.jsonl", line.as_bytes(), settings(15)).is_err());
}

#[test]
fn the_limit_holds_for_all_files_together() {
    let folder = folder(&[("a.jsonl", b"x\n{\"text\": \"a\"}"), ("b.jsonl", b"x\n{\"text\": \"b\"}")]);
    let read = |limit| {
        let sources = Sources::new([folder.path()]).with_settings(with(BrokenRecords::AtMost(limit)));
        sources.documents().unwrap().collect::<Result<Vec<Document>>>()
    };
    assert_eq!(read(2).unwrap().len(), 2);
    assert!(matches!(read(1), Err(DataError::TooManyBroken { limit: 1, .. })));
    assert!(matches!(
        Documents::open(&[folder.path().to_path_buf()]).unwrap().next(),
        Some(Err(DataError::Record { .. }))
    ));
}

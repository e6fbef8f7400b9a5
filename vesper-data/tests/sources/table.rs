//! Parquet files, written by pyarrow (golden/tables.py).

use std::path::PathBuf;

use vesper_data::source::BrokenRecords;
use vesper_data::{Document, ReadSettings, Result, Sources};

use crate::{folder, learned, message, texts};

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/tables/{name}.parquet"))
}

fn read(name: &str, settings: ReadSettings) -> Result<Vec<Document>> {
    Sources::new([path(name)]).with_settings(settings).documents()?.collect()
}

fn text(name: &str, field: &str) -> Result<Vec<String>> {
    let documents = read(name, ReadSettings::default().with_text(field))?;
    Ok(documents.into_iter().map(|document| document.text).collect())
}

fn fails(name: &str, field: &str) -> String {
    let error = text(name, field).unwrap_err().to_string();
    error.split_once(".parquet").unwrap().1.to_owned()
}

fn expected() -> Vec<String> {
    (0..25).map(|i| format!("Texte n°{i} : l'été. ").repeat(i % 3 + 1)).collect()
}

#[test]
fn each_row_is_a_document_whatever_the_compression_and_the_pages() {
    for name in ["text-none", "text-snappy", "text-gzip", "text-lz4", "text-brotli", "pages-v2", "large"] {
        let documents = read(name, ReadSettings::default()).unwrap();
        assert_eq!(texts(&documents), expected(), "{name}");
        assert!(
            documents.iter().zip(1..).all(|(document, row)| document.line == row && document.loss.is_none())
        );
    }
    assert_eq!(text("large", "text2").unwrap(), expected());
}

#[test]
fn zstd_is_read_with_its_feature_and_named_without_it() {
    let result = read("text-zstd", ReadSettings::default());
    if cfg!(feature = "parquet-zstd") {
        assert_eq!(texts(&result.unwrap()), expected());
    } else {
        let error = result.unwrap_err().to_string();
        assert!(
            error.ends_with(
                "text-zstd.parquet: a Parquet file with zstd compression needs a program built with vesper-data's \
                 feature \"parquet-zstd\""
            ),
            "{error}"
        );
    }
}

#[test]
fn columns_within_columns_and_lists_are_read_by_their_paths() {
    // Null where a text is expected is a broken record, an empty list has no text.
    let settings = |path: &str| ReadSettings::default().with_broken(BrokenRecords::Any).with_text(path);
    for (path, expected) in [
        ("page.title", &["A", "B"][..]),
        ("/page/body", &["Un.", "Deux."]),
        ("page.body", &["whole 1", "whole 2", "whole 3"]),
        ("parts", &["a\nb"]),
        ("parts.0", &["a"]),
        ("items.t", &["x\ny", "z"]),
        ("items.0.t", &["x", "z"]),
    ] {
        assert_eq!(texts(&read("nested", settings(path)).unwrap()), expected, "{path}");
    }
    assert_eq!(fails("nested", "page.title"), ", row 3: \"page\" is null, expected an object with \"title\"");
}

#[test]
fn a_column_that_is_not_there_is_named_with_what_is() {
    assert_eq!(
        fails("chats", "text"),
        " cannot be read as parquet: the column \"text\" is missing (the columns are: \"messages\", \"prompt\")"
    );
    assert_eq!(
        fails("nested", "page.x"),
        " cannot be read as parquet: the field \"page.x\" is missing (the fields of \"page\" are: \"body\", \"n\", \"title\")"
    );
    assert_eq!(fails("nested", "n"), ", row 1: \"n\" is a number, expected a string");
    assert_eq!(
        fails("nested", "items.x"),
        ", row 1: the field \"items.0.x\" is missing (the fields of \"items.0\" are: \"k\", \"t\")"
    );
    let chat = ReadSettings::default().with_chat("prompt");
    let error = read("chats", chat).unwrap_err().to_string();
    assert!(
        error.ends_with("chats.parquet, row 1: \"prompt\" is a string, expected a list of messages"),
        "{error}"
    );
}

#[test]
fn conversations_instructions_and_questions_are_read_as_from_json() {
    let documents = read("chats", ReadSettings::default()).unwrap();
    assert_eq!(
        texts(&documents),
        ["User: Bonjour !\n\nAssistant: Salut.", "System: Bref.\n\nUser: Oui ?\n\nAssistant: Non."]
    );
    assert_eq!(documents.iter().map(learned).collect::<Vec<_>>(), [[" Salut."], [" Non."]]);
    let documents = read("instructions", ReadSettings::default()).unwrap();
    assert_eq!(texts(&documents), ["User: Dis oui.\n\nAssistant: Oui."]);
    let documents = read("questions", ReadSettings::default()).unwrap();
    assert_eq!(
        texts(&documents),
        ["Un été.\n\nQuestion: Quand ?\n\nAnswer: été", "Un été.\n\nQuestion: Qui ?\n\nAnswer: No answer."]
    );
    assert_eq!(learned(&documents[0]), [" été"]);
}

#[test]
fn rows_without_text_are_broken_records() {
    for (name, expected) in [
        ("nulls", ", row 2: \"text\" is null, expected a string"),
        ("bytes", ", row 2: \"text\" has invalid UTF-8 at its byte 1"),
    ] {
        assert_eq!(fails(name, "text"), expected);
        let documents = read(name, ReadSettings::default().with_broken(BrokenRecords::AtMost(1))).unwrap();
        let found: Vec<(&str, u64)> = documents.iter().map(|d| (d.text.as_str(), d.line)).collect();
        assert_eq!(found, [("un", 1), ("trois", 3)], "{name}");
    }
    let short = ReadSettings::default().with_max_record_bytes(30).with_broken(BrokenRecords::Any);
    assert_eq!(read("text-snappy", short).unwrap().len(), 9);
}

#[test]
fn a_table_without_rows_holds_no_text() {
    let error = read("empty", ReadSettings::default()).unwrap_err().to_string();
    assert!(error.ends_with("empty.parquet holds no text"), "{error}");
}

#[test]
fn a_table_is_known_by_its_content() {
    let bytes = std::fs::read(path("nulls")).unwrap();
    let folder = folder(&[("table", &bytes)]);
    let error = Sources::new([folder.path().join("table")]).documents().unwrap().nth(1).unwrap().unwrap_err();
    assert!(error.to_string().ends_with("table, row 2: \"text\" is null, expected a string"), "{error}");
    assert!(message("a.parquet", b"text").starts_with(" cannot be read as parquet: "));
}

#[test]
fn a_table_that_is_cut_short_or_changed_is_an_error_or_read_and_never_a_panic() {
    let whole = std::fs::read(path("text-snappy")).unwrap();
    let read = |bytes: &[u8]| {
        let folder = folder(&[("a.parquet", bytes)]);
        Sources::new([folder.path()]).documents().unwrap().collect::<Result<Vec<Document>>>()
    };
    for end in (1..whole.len()).step_by(29).chain([whole.len() - 1]) {
        let error = read(&whole[..end]).unwrap_err().to_string();
        assert!(error.contains("a.parquet cannot be read as parquet: "), "{end}: {error}");
    }
    let mut read_all = 0;
    for at in (0..whole.len()).step_by(11) {
        let mut changed = whole.clone();
        changed[at] ^= 1 << (at % 8);
        read_all += usize::from(read(&changed).is_ok());
    }
    // Columns and fields that are not needed may hold anything.
    assert!(read_all > 0 && read_all < whole.len() / 11);
}

//! JSON documents, and fields by name and path.

use vesper_data::source::{Fields, FormatKind};
use vesper_data::{DataError, ReadSettings};

use crate::{folder, message, message_with, read_file, read_with, texts};

fn settings() -> ReadSettings {
    ReadSettings::default()
}

#[test]
fn a_list_of_records_gives_a_document_each() {
    let json = "\u{FEFF}[\n  {\"text\": \"Un.\"},\n  {\"id\": [1, {}],\n   \"text\": \"Deux \\\"]} \"},\n {\"text\": \" \"}, {\"text\": \"\"}]\n";
    let expected = [("Un.".to_owned(), 2), ("Deux \"]} ".to_owned(), 3)];
    assert_eq!(read_file("a.json", json.as_bytes()).unwrap(), expected);
}

#[test]
fn json_lines_and_single_records_are_known_whatever_their_name() {
    let lines = "{\"text\": \"Un.\"}\n{\"text\": \"Deux.\"}\n";
    let expected = [("Un.".to_owned(), 1), ("Deux.".to_owned(), 2)];
    for name in ["a.json", "a.jsonl", "a.ndjson", "a"] {
        assert_eq!(read_file(name, lines.as_bytes()).unwrap(), expected, "{name}");
    }
    for name in ["a.json", "a"] {
        let record = "{\n\"text\":\n\"Un.\"}";
        assert_eq!(read_file(name, record.as_bytes()).unwrap(), [("Un.".to_owned(), 1)], "{name}");
    }
}

#[test]
fn a_list_within_a_document_is_found_at_its_path() {
    let json = br#"{"version": {"data": []}, "data": {"n": 2, "items": [{"page": {"body": "Un."}}, {"page": {"body": "Deux."}}], "rest": [1]}, "end": null}"#;
    for (records, text) in [("data.items", "page.body"), ("/data/items", "/page/body")] {
        let settings = settings().with_records(records).with_text(text);
        let documents = read_with("a.json", json, settings).unwrap();
        assert_eq!(texts(&documents), ["Un.", "Deux."]);
    }
    let fails =
        |records: &str| message_with("a.json", json, settings().with_records(records).with_text("page.body"));
    assert_eq!(
        fails("items"),
        " cannot be read as JSON: line 1: the field \"items\" is missing (the fields are: \"data\", \"end\", \"version\")"
    );
    assert_eq!(
        fails("data.x"),
        " cannot be read as JSON: line 1: the field \"x\" is missing (the fields of \"data\" are: \"items\", \"n\", \"rest\")"
    );
    assert_eq!(fails("data"), " cannot be read as JSON: line 1: \"data\" is no list of records");
    assert_eq!(fails("end.x"), " cannot be read as JSON: line 1: \"end\" is no object with \"x\"");
}

#[test]
fn a_path_that_is_not_there_is_named_with_what_is() {
    let line = br#"{"page": {"body": null, "title": "t"}, "n": 1}"#;
    let fails = |path: &str| message_with("a.jsonl", line, settings().with_text(path));
    assert_eq!(
        fails("page.text"),
        ", line 1: the field \"page.text\" is missing (the fields of \"page\" are: \"body\", \"title\")"
    );
    assert_eq!(fails("page.body"), ", line 1: \"page.body\" is null, expected a string");
    assert_eq!(fails("page"), ", line 1: \"page\" is an object, expected a string");
    assert_eq!(fails("n.x"), ", line 1: \"n\" is a number, expected an object with \"x\"");
}

#[test]
fn faults_of_records_are_named_with_their_number_and_line() {
    assert_eq!(
        message("a.json", b"[{\"text\": \"a\"},\n\n{\"text\": 5}]"),
        ", record 2 (line 3): \"text\" is a number, expected a string"
    );
    assert_eq!(
        message("a.json", b"[\n\n\n{\"text\":\n nonsense}]"),
        ", record 1 (line 4): invalid JSON at line 5, column 3: expected ident"
    );
    assert_eq!(
        message("a.json", b"[{\"text\": \"\xE9\"}]"),
        ", record 1 (line 1): invalid JSON at column 11: invalid unicode code point"
    );
    assert_eq!(
        message("a.json", b"[[]]"),
        ", record 1 (line 1): expected an object like {\"text\": \"...\"}, got a list"
    );
    assert_eq!(
        message("a.json", b"{\"data\": [{\"body\": \"a\"}]}"),
        ", record 1 (line 1): the field \"text\" is missing (the fields are: \"data\"); the setting \"records\" names a list within the document"
    );
}

#[test]
fn a_document_that_is_cut_short_or_no_json_is_an_error_of_the_file() {
    for (json, expected) in [
        ("[{\"text\": \"a\"},\n{\"text\": \"b", "line 2: the file ends within a value that starts on line 2"),
        ("[{\"text\": \"a\"}", "line 1: expected ',' or ']', got the end of the file"),
        ("[{\"text\": \"a\"}]\n[]", "line 2: expected the end of the file, got '['"),
        ("{\"text\": \"a\"", "line 1: the file ends within a value that starts on line 1"),
    ] {
        assert_eq!(
            message("a.json", json.as_bytes()),
            format!(" cannot be read as JSON: {expected}"),
            "{json}"
        );
    }
    assert_eq!(message("a.json", b"[]"), " holds no text");
    assert_eq!(message("a.json", b" \n"), " holds no text");
    assert_eq!(
        message("a.json", b"nonsense"),
        ", record 1 (line 1): invalid JSON at column 2: expected ident"
    );
}

#[test]
fn a_list_as_large_as_can_be_is_read_one_record_at_a_time() {
    let mut json = b"[".to_vec();
    for number in 0..20_000 {
        json.extend(format!("{{\"skip\": [[[{number}]]], \"text\": \"{number}\"}},").bytes());
    }
    json.pop();
    json.push(b']');
    // No record has more than 64 bytes, and no more than that may be kept.
    let documents = read_with("a.json", &json, settings().with_max_record_bytes(64)).unwrap();
    assert_eq!(documents.len(), 20_000);
    assert_eq!(documents[19_999].text, "19999");
}

#[test]
fn a_format_that_is_set_is_used_whatever_the_file_is() {
    let json = b"{\"text\": \"Un.\"}";
    let document = |kind| read_with("a.md", json, settings().with_format(kind)).unwrap().remove(0).text;
    assert_eq!(document(FormatKind::Text), "{\"text\": \"Un.\"}");
    assert_eq!(document(FormatKind::Jsonl), "Un.");
    assert_eq!(document(FormatKind::Json), "Un.");
    assert_eq!(
        message_with("a.md", json, settings().with_format(FormatKind::Squad)),
        " cannot be read as JSON: line 1: the field \"data\" is missing (the fields are: \"text\")"
    );
}

#[test]
fn of_a_folder_only_the_files_of_a_set_format_are_read() {
    let folder = folder(&[
        ("a.txt", b"text"),
        ("b.jsonl", b"{\"text\": \"line\"}"),
        ("c.json", b"[{\"text\": \"list\"}]"),
    ]);
    let read = |settings| {
        let sources = vesper_data::Sources::new([folder.path()]).with_settings(settings);
        sources.documents().unwrap().map(|document| document.unwrap().text).collect::<Vec<_>>()
    };
    assert_eq!(read(settings()), ["text", "line", "list"]);
    assert_eq!(read(settings().with_format(FormatKind::Json)), ["list"]);
    assert_eq!(read(settings().with_format(FormatKind::Text)), ["text"]);
    let parquet = settings().with_format(FormatKind::Parquet);
    let error = vesper_data::Sources::new([folder.path()]).with_settings(parquet).documents().unwrap_err();
    assert!(error.to_string().ends_with("holds no readable file: expected at least one .parquet"), "{error}");
}

#[test]
fn settings_that_cannot_be_are_refused_before_anything_is_read() {
    let error = read_with("a.jsonl", b"{}", settings().with_text("a..b")).unwrap_err();
    assert!(matches!(error, DataError::Config { name: "fields", .. }), "{error}");
    let fields = Fields::Instruction { instruction: "q".into(), input: None, output: "".into() };
    assert!(read_with("a.jsonl", b"{}", settings().with_fields(fields)).is_err());
}

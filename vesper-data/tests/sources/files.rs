//! Text, JSONL, folders and patterns.

use std::path::PathBuf;

use proptest::prelude::{prop_assert, prop_assert_eq, proptest};
use vesper_data::source::{BrokenRecords, FormatKind, TextDocuments, content_digest};
use vesper_data::{DataError, Document, Documents, Place, ReadSettings, Result, Sources};

use crate::{folder, message, read, read_file, read_with, texts};

#[test]
fn a_text_file_is_one_document_as_it_is() {
    let text = "\n  One.\n\nTwo. \n\n";
    assert_eq!(read_file("a.txt", text.as_bytes()).unwrap(), [(text.to_owned(), 1)]);
}

#[test]
fn a_separator_splits_a_text_and_takes_the_line_breaks_around_it() {
    let text = b"<|endoftext|>\nOne.\n\nStill one.\n<|endoftext|>\n\n Two.<|endoftext|>Three.<|endoftext|> \n<|endoftext|>";
    let expected = [("One.\n\nStill one.", 2), (" Two.", 7), ("Three.", 7)];
    assert_eq!(read_file("a.txt", text).unwrap(), expected.map(|(text, line)| (text.to_owned(), line)));
}

#[test]
fn many_documents_on_one_line_are_all_found() {
    let text = "word<|endoftext|>".repeat(20_000);
    assert_eq!(read_file("a.txt", text.as_bytes()).unwrap().len(), 20_000);
}

#[test]
fn windows_line_breaks_and_a_byte_order_mark_make_no_difference_in_text() {
    let windows = b"\xEF\xBB\xBFOne.\r\nTwo.\r\n<|endoftext|>\r\nThree\rfour.";
    let expected = [("One.\nTwo.".to_owned(), 1), ("Three\rfour.".to_owned(), 4)];
    assert_eq!(read_file("a.txt", windows).unwrap(), expected);
}

#[test]
fn jsonl_takes_the_field_text_as_it_is_and_ignores_the_rest() {
    let lines = "\u{FEFF}{\"text\": \"One\\r\\n \u{1F98A}\", \"text2\": 5}\n\n  \r\n{\"id\": 1, \"text\": \"Two\"}\r\n{\"text\": \" \"}\n{\"text\":\"Three\"}";
    let expected = [("One\r\n \u{1F98A}", 1), ("Two", 4), ("Three", 6)];
    assert_eq!(
        read_file("a.jsonl", lines.as_bytes()).unwrap(),
        expected.map(|(text, line)| (text.to_owned(), line))
    );
}

#[test]
fn jsonl_errors_name_the_line_and_what_is_wrong() {
    let good = "{\"text\": \"a\"}\n\n";
    for (line, expected) in [
        ("{\"text\": \"a\"", ", line 3: invalid JSON at column 12: EOF while parsing an object"),
        (
            "{\"content\": \"a\", \"b\": 1}",
            ", line 3: the field \"text\" is missing (the fields are: \"b\", \"content\")",
        ),
        ("{}", ", line 3: the field \"text\" is missing (it has no fields)"),
        ("{\"text\": 5}", ", line 3: \"text\" is a number, expected a string"),
        ("{\"text\": null}", ", line 3: \"text\" is null, expected a string"),
        ("[1]", ", line 3: expected an object like {\"text\": \"...\"}, got a list"),
        ("\"text\"", ", line 3: expected an object like {\"text\": \"...\"}, got a string"),
    ] {
        assert_eq!(message("a.jsonl", format!("{good}{line}").as_bytes()), expected);
    }
}

#[test]
fn invalid_utf8_is_named_by_line_and_byte() {
    assert_eq!(message("a.txt", b"ab\ncd\xFFe\n"), ", line 2: invalid UTF-8 at byte 5 of the file");
    assert_eq!(message("a.txt", b"\xEF\xBB\xBFab\xC3"), ", line 1: invalid UTF-8 at byte 5 of the file");
    assert_eq!(message("a.jsonl", b"{\"text\": \"\xE9\"}"), ", line 1: invalid UTF-8 at byte 10 of the file");
    assert!(
        message("a.txt", b"\xFF\xFEa\0b\0")
            .ends_with("byte 0 of the file (it looks like UTF-16: save it as UTF-8)")
    );
    assert!(message("a.bin", b"ab\0\x80").ends_with("byte 3 of the file (it looks like a binary file)"));
}

#[test]
fn documents_before_an_error_are_given_and_none_after_it() {
    let folder = folder(&[("a.jsonl", b"{\"text\": \"a\"}\nnonsense\n{\"text\": \"b\"}")]);
    let mut documents = Documents::open(&[folder.path().to_path_buf()]).unwrap();
    assert_eq!(documents.next().unwrap().unwrap().text, "a");
    assert!(matches!(documents.next(), Some(Err(DataError::Record { place: Place::Line(2), .. }))));
    assert!(documents.next().is_none());
}

#[test]
fn a_folder_is_read_in_the_order_of_names_and_only_what_is_text() {
    let folder = folder(&[
        ("b.txt", b"2"),
        ("a/z.md", b"1"),
        ("c/x/deep.jsonl", b"{\"text\": \"4\"}"),
        ("c/w.TEXT", b"3"),
        ("d.txt", b""),
        ("photo.jpg", b"\xFF"),
        ("notes", b"no extension"),
        (".hidden/a.txt", b"hidden"),
        (".a.txt", b"hidden"),
    ]);
    let documents = read(folder.path()).unwrap();
    assert_eq!(texts(&documents), ["1", "2", "3", "4"]);
    assert_eq!(&*documents[0].path, folder.path().join("a").join("z.md"));
}

#[test]
fn several_sources_are_read_in_the_order_in_which_they_are_named() {
    let folder = folder(&[("a.txt", b"a"), ("b/c.txt", b"c")]);
    let paths = [folder.path().join("b"), folder.path().join("a.txt"), folder.path().join("b/c.txt")];
    let documents: Vec<Document> = Documents::open(&paths).unwrap().collect::<Result<_>>().unwrap();
    assert_eq!(texts(&documents), ["c", "a", "c"]);
}

#[test]
fn a_named_file_of_unknown_kind_is_read_as_text() {
    assert_eq!(read_file("corpus.data", b"hello").unwrap(), [("hello".to_owned(), 1)]);
    assert_eq!(read_file("corpus", b"hello").unwrap(), [("hello".to_owned(), 1)]);
}

#[test]
fn what_holds_no_text_is_an_error_that_says_so() {
    assert!(matches!(Documents::open(&[]), Err(DataError::NoSources)));
    assert!(matches!(read("no/such/file.txt"), Err(DataError::Missing { .. })));
    assert_eq!(read("no/such/file.txt").unwrap_err().to_string(), "no/such/file.txt does not exist");
    assert_eq!(message("a.txt", b""), " holds no text");
    assert_eq!(message("a.txt", b" \n<|endoftext|>\n"), " holds no text");
    assert_eq!(message("a.txt", b"\xEF\xBB\xBF"), " holds no text");
    assert_eq!(message("a.jsonl", b"\n{\"text\": \"\"}\n"), " holds no text");

    let pictures = folder(&[("a.jpg", b"x")]);
    let error = read(pictures.path()).unwrap_err().to_string();
    assert!(
        error.ends_with("holds no readable file: expected at least one .txt, .text, .md, .jsonl, .ndjson, .json or .parquet"),
        "{error}"
    );
    let blank = folder(&[("a.txt", b" "), ("b.txt", b"")]);
    assert!(matches!(read(blank.path()), Err(DataError::NoText { .. })));
}

#[test]
fn a_blank_file_after_a_good_one_is_still_reported_if_it_was_named() {
    let folder = folder(&[("a.txt", b"a"), ("b.txt", b"\n")]);
    let paths = [folder.path().join("a.txt"), folder.path().join("b.txt")];
    let result: Result<Vec<Document>> = Documents::open(&paths).unwrap().collect();
    assert!(matches!(result, Err(DataError::NoText { path, .. }) if path.ends_with("b.txt")));
    assert_eq!(texts(&read(folder.path()).unwrap()), ["a"]);
}

#[test]
fn a_text_that_is_too_long_comes_in_pieces_and_says_so() {
    let line = "L'été fut long, et l'hiver aussi.\n";
    let text = format!("{}<|endoftext|>\nfin", line.repeat(5));
    let folder = folder(&[("a.txt", text.as_bytes())]);
    let settings = ReadSettings::default().with_max_text_bytes(80);
    let documents = Sources::new([folder.path()]).with_settings(settings).documents().unwrap();
    let report = documents.report();
    let documents: Vec<Document> = documents.map(Result::unwrap).collect();
    let two = line.repeat(2);
    assert_eq!(texts(&documents), [two.as_str(), &two, line.trim_end(), "fin"]);
    assert_eq!(documents.iter().map(|document| document.line).collect::<Vec<_>>(), [1, 3, 5, 7]);
    let note = "line 1: the document has more than 80 bytes (max-text-bytes): it is read as several";
    assert_eq!(report.notes().len(), 1);
    assert!(report.notes()[0].ends_with(note), "{:?}", report.notes());
    // A line without a break is cut before spaces.
    let words = "le chat dort ".repeat(20);
    let documents =
        read_with("a.txt", words.as_bytes(), ReadSettings::default().with_max_text_bytes(50)).unwrap();
    assert!(documents.len() > 5 && documents.iter().all(|document| document.text.len() <= 50));
    assert!(documents[1..].iter().all(|document| document.text.starts_with(' ')));
    assert_eq!(texts(&documents).concat(), words);
}

proptest! {
    #[test]
    fn pieces_of_a_text_have_all_of_it(
        text in "(é|a|\u{1F98A}|<|[|]>| |\n|\r\n|<[|]endoftext[|]>|<[|]endof)*",
        most in 1..60_u64,
    ) {
        let folder = folder(&[("a.txt", format!("a{text}").as_bytes())]);
        let read = |settings| {
            Sources::new([folder.path()]).with_settings(settings).documents().unwrap().map(Result::unwrap).collect()
        };
        let whole: Vec<Document> = read(ReadSettings::default());
        let pieces: Vec<Document> = read(ReadSettings::default().with_max_text_bytes(most));
        // Pieces of white space alone are passed over, as such documents are.
        let dark = |documents: &[Document]| {
            texts(documents).concat().split_whitespace().collect::<String>()
        };
        prop_assert_eq!(dark(&pieces), dark(&whole));
        // A character, and what could be a mark between documents, is not cut.
        prop_assert!(pieces.iter().all(|piece| piece.text.len() as u64 <= most.max(26)));
        prop_assert!(pieces.iter().all(|piece| !piece.text.contains("<|endoftext|>")));
        if (text.len() as u64) < most {
            prop_assert_eq!(texts(&pieces), texts(&whole));
        }
    }
}

#[test]
fn a_text_can_have_a_document_on_each_line() {
    let settings = ReadSettings::default().with_text_documents(TextDocuments::Lines);
    let text = b"\xEF\xBB\xBFUn.\r\n\n \nDeux.<|endoftext|>\nTrois.";
    let documents = read_with("a.txt", text, settings).unwrap();
    let found: Vec<(&str, u64)> = documents.iter().map(|d| (d.text.as_str(), d.line)).collect();
    assert_eq!(found, [("Un.", 1), ("Deux.<|endoftext|>", 4), ("Trois.", 5)]);
}

#[test]
fn a_pattern_stands_for_the_files_that_fit_it_in_order() {
    let folder = folder(&[
        ("b.txt", b"b"),
        ("a.txt", b"a"),
        ("a.log", b"log"),
        (".c.txt", b"hidden"),
        ("d/e.txt", b"e"),
        ("d/f/g.txt", b"g"),
        ("d/empty.txt", b""),
    ]);
    let find = |pattern: &str| {
        let documents = read(folder.path().join(pattern))?;
        Ok::<_, DataError>(documents.into_iter().map(|document| document.text).collect::<Vec<_>>())
    };
    assert_eq!(find("*.txt").unwrap(), ["a", "b"]);
    assert_eq!(find("[bc].txt").unwrap(), ["b"]);
    assert_eq!(find("*.l?g").unwrap(), ["log"]);
    assert_eq!(find("**/*.txt").unwrap(), ["a", "b", "e", "g"]);
    assert_eq!(find("d*").unwrap(), ["e", "g"]);
    assert_eq!(find("d/**/g.*").unwrap(), ["g"]);
    let error = find("*.csv").unwrap_err();
    assert!(matches!(error, DataError::NoMatch { .. }));
    assert!(
        error.to_string().starts_with("no file fits the pattern ") && error.to_string().ends_with("*.csv")
    );
    assert!(find("a**b").unwrap_err().to_string().starts_with("a pattern of files is "));
}

#[test]
fn a_file_with_a_star_in_its_name_is_found_by_that_name() {
    let folder = folder(&[("[a].txt", b"brackets"), ("a.txt", b"a")]);
    assert_eq!(texts(&read(folder.path().join("[a].txt")).unwrap()), ["brackets"]);
}

#[test]
fn a_file_that_is_named_and_found_is_read_as_often_as_it_is_named() {
    let folder = folder(&[("a.txt", b"a"), ("b.txt", b"b")]);
    let paths = [folder.path().join("a.txt"), folder.path().to_path_buf(), folder.path().join("a.*")];
    let sources = Sources::new(paths.clone());
    assert_eq!(sources.paths(), paths);
    assert_eq!(sources.files().unwrap().len(), 4);
    let documents: Vec<Document> = sources.documents().unwrap().map(Result::unwrap).collect();
    assert_eq!(texts(&documents), ["a", "a", "b", "a"]);
}

#[test]
fn the_digest_of_settings_follows_what_decides_the_documents_and_nothing_else() {
    let digest = |files: &[(&str, &[u8])], settings: ReadSettings| {
        let folder = folder(files);
        Sources::new([folder.path()]).with_settings(settings).settings_digest().unwrap()
    };
    let settings = ReadSettings::default;
    let files: &[(&str, &[u8])] = &[("a.txt", b"a"), ("b.jsonl", b"b")];
    let first = digest(files, settings());
    assert_eq!(first, digest(&[("x.md", b"other"), ("y.ndjson", b"words")], settings()));
    assert_eq!(first, digest(files, settings().with_broken(BrokenRecords::Any)));
    assert_ne!(first, digest(files, settings().with_text("body")));
    assert_ne!(first, digest(files, settings().with_text_documents(TextDocuments::Lines)));
    assert_ne!(first, digest(files, settings().with_max_record_bytes(10)));
    assert_ne!(first, digest(&[("a.txt", b"[a:] b"), ("b.jsonl", b"b")], settings()));
    assert_ne!(first, digest(&[("b.jsonl", b"b"), ("c.txt", b"a")], settings()));
    assert_ne!(first, digest(&files[..1], settings()));
    let text = digest(&files[..1], settings());
    assert_eq!(text, digest(&files[..1], settings().with_format(FormatKind::Text)));
    assert!(Sources::new(["none.txt"]).settings_digest().is_err());
}

#[test]
fn a_data_set_of_the_hub_is_not_taken_for_a_folder() {
    if cfg!(feature = "hub") {
        return;
    }
    let error = read("hf://datasets/etalab-ia/piaf").unwrap_err();
    assert_eq!(
        error.to_string(),
        "hf://datasets/etalab-ia/piaf needs a program built with vesper-data's feature \"hub\""
    );
}

#[cfg(unix)]
#[test]
fn a_pattern_does_not_go_round_in_links() {
    let folder = folder(&[("a/b.txt", b"b")]);
    std::os::unix::fs::symlink(folder.path(), folder.path().join("a/up")).unwrap();
    std::os::unix::fs::symlink(folder.path().join("gone"), folder.path().join("a/gone.txt")).unwrap();
    assert_eq!(texts(&read(folder.path().join("**/*.txt")).unwrap()), ["b"]);
}

#[cfg(unix)]
#[test]
fn a_link_that_goes_in_a_circle_is_followed_once() {
    let folder = folder(&[("a/b.txt", b"b")]);
    std::os::unix::fs::symlink(folder.path(), folder.path().join("a/up")).unwrap();
    std::os::unix::fs::symlink(folder.path().join("gone"), folder.path().join("a/gone.txt")).unwrap();
    assert_eq!(texts(&read(folder.path()).unwrap()), ["b"]);
}

#[test]
fn the_digest_follows_the_bytes_and_their_order_and_not_the_names() {
    let digest = |files: &[(&str, &[u8])]| {
        let folder = folder(files);
        content_digest(&[PathBuf::from(folder.path())]).unwrap()
    };
    let first = digest(&[("a.txt", b"one"), ("b.txt", b"two")]);
    assert_eq!(first, digest(&[("x.md", b"one"), ("y.txt", b"two"), ("z.jpg", b"no text")]));
    assert_ne!(first, digest(&[("a.txt", b"two"), ("b.txt", b"one")]));
    assert_ne!(first, digest(&[("a.txt", b"onet"), ("b.txt", b"wo")]));
    assert_ne!(first, digest(&[("a.txt", b"one"), ("b.txt", b"twO")]));
    assert_ne!(first, digest(&[("a.txt", b"one"), ("b.jsonl", b"two")]));
    assert_ne!(first, digest(&[("a.txt", b"one")]));
}

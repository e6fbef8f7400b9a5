//! Transcripts of conversations.

use proptest::prelude::*;
use vesper_data::ReadSettings;
use vesper_data::source::{BrokenRecords, FormatKind};

use crate::{message_with, read_file, read_with, texts};

#[test]
fn each_conversation_is_a_document() {
    let text =
        "\u{FEFF}\n\n[speaker001:] Bonjour.\r\n[speaker002:] Oui ?\n et alors\n \n\n[speaker001:] Fin.\n";
    let expected = [
        ("[speaker001:] Bonjour.\n[speaker002:] Oui ?\n et alors".to_owned(), 3),
        ("[speaker001:] Fin.".to_owned(), 8),
    ];
    let settings = ReadSettings::default().with_format(FormatKind::Dialogue);
    let documents = read_with("a.txt", text.as_bytes(), settings).unwrap();
    let found: Vec<(String, u64)> = documents.into_iter().map(|d| (d.text, d.line)).collect();
    assert_eq!(found, expected);
}

#[test]
fn transcripts_are_known_by_their_turns_and_other_texts_stay_whole() {
    let dialogue = "[speaker001:] un\n\n[speaker001:] deux\n";
    assert_eq!(read_file("a.txt", dialogue.as_bytes()).unwrap().len(), 2);
    let play = "ACTE I\n\n[Le roi:] un\n\n[La reine:] deux\n";
    assert_eq!(read_file("a.txt", play.as_bytes()).unwrap().len(), 1);
    let settings = ReadSettings::default().with_format(FormatKind::Text);
    assert_eq!(read_with("a.txt", dialogue.as_bytes(), settings).unwrap().len(), 1);
}

#[test]
fn a_broken_conversation_is_passed_over_as_a_whole() {
    let text = b"[a:] un\n\n[a:] d\xFF\n[b:] deux\n\xFF\n[a:] e\n\n[a:] trois\n[b:] \xFF\n\n[a:] quatre";
    let settings = ReadSettings::default().with_format(FormatKind::Dialogue);
    let documents = read_with("a.txt", text, settings.clone().with_broken(BrokenRecords::AtMost(2))).unwrap();
    assert_eq!(texts(&documents), ["[a:] un", "[a:] quatre"]);
    let error =
        read_with("a.txt", text, settings.with_broken(BrokenRecords::AtMost(1))).unwrap_err().to_string();
    assert!(error.starts_with("more than 1 broken records, the last of them: "), "{error}");
    assert_eq!(
        message_with(
            "a.txt",
            b"[a:] un\n[b:] deux et trois\n",
            ReadSettings::default().with_max_record_bytes(20)
        ),
        ", line 1: the conversation has more than 20 bytes (max-record-bytes)"
    );
}

proptest! {
    #[test]
    fn conversations_are_what_blank_lines_separate(
        conversations in proptest::collection::vec(proptest::collection::vec("[a-zé ]{0,6}", 1..4), 1..6),
        blanks in proptest::collection::vec("[ \n]{0,2}", 6),
    ) {
        let documents: Vec<String> = conversations
            .iter()
            .map(|turns| turns.iter().map(|turn| format!("[a:] {turn}x")).collect::<Vec<_>>().join("\n"))
            .collect();
        let text = documents.iter().zip(&blanks).map(|(document, blank)| format!("{document}\n{blank}\n"));
        let text = text.collect::<Vec<_>>().concat();
        let read: Vec<String> = read_file("a.txt", text.as_bytes()).unwrap().into_iter().map(|(text, _)| text).collect();
        prop_assert_eq!(read, documents);
    }
}

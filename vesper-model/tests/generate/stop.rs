//! Stop strings and graphemes, against plain definitions of both.

use proptest::prelude::*;
use unicode_segmentation::UnicodeSegmentation;
use vesper_model::ModelError;
use vesper_model::generate::StopStrings;

/// Everything that comes out: the pieces and the stop string.
fn run(stops: &[&str], parts: &[&str]) -> (Vec<String>, Option<String>) {
    let mut filter = StopStrings::new(stops.iter().copied()).unwrap();
    let mut pieces = Vec::new();
    for part in parts {
        let piece = filter.push(part);
        pieces.push(piece.text);
        if piece.stop.is_some() {
            return (pieces, piece.stop);
        }
    }
    pieces.push(filter.flush().text);
    (pieces, None)
}

#[test]
fn text_waits_while_it_may_become_a_stop_string() {
    let (pieces, stop) = run(&["END"], &["an E", "N", "T and EN", "D of it"]);
    assert_eq!(pieces, ["an ", "", "ENT and ", ""]);
    assert_eq!(stop.as_deref(), Some("END"));
    assert_eq!(run(&["END"], &["the EN"]).0, ["the ", "EN"], "what did not become one comes at the end");
}

#[test]
fn the_stop_string_that_is_complete_first_counts_and_the_longest_of_those() {
    assert_eq!(run(&["abcd", "bc"], &["xabcd"]), (vec!["xa".into()], Some("bc".into())));
    assert_eq!(run(&["c", "abc", "bc"], &["xabc"]), (vec!["x".into()], Some("abc".into())));
    // One that begins again within itself.
    assert_eq!(run(&["aab"], &["a", "a", "a", "b"]).0.concat(), "a");
}

#[test]
fn a_grapheme_comes_whole() {
    let (pieces, _) = run(&[], &["e", "\u{301}t", "e", "\u{301}"]);
    assert_eq!(pieces, ["", "e\u{301}", "t", "", "e\u{301}"]);
    let (pieces, _) = run(&[], &["👩", "\u{200d}", "👧", "🇫", "🇷", "🇩", "🇪", "!"]);
    assert_eq!(pieces, ["", "", "", "👩\u{200d}👧", "", "🇫🇷", "", "🇩🇪", "!"]);
}

#[test]
fn a_line_comes_with_its_end() {
    assert_eq!(run(&[], &["a\n", "b\r", "\n", "c"]).0, ["a\n", "b", "\r\n", "", "c"]);
}

#[test]
fn what_is_before_a_possible_stop_string_does_not_wait_for_it() {
    assert_eq!(run(&["\nUser:"], &["Yes.", "\nUs", "ually"]).0, ["Yes", ".", "\nUsuall", "y"]);
}

#[test]
fn a_stop_string_may_be_part_of_a_grapheme() {
    assert_eq!(run(&["e"], &["the\u{301}"]), (vec!["th".into()], Some("e".into())));
    assert_eq!(run(&["\n"], &["a\r\nb"]), (vec!["a\r".into()], Some("\n".into())));
    assert_eq!(run(&["\u{301}"], &["e", "\u{301}"]).0, ["", "e"]);
}

#[test]
fn an_empty_stop_string_is_refused() {
    let error = StopStrings::new(["a", ""]).unwrap_err();
    assert!(matches!(error, ModelError::InvalidGeneration { field: "stop_strings", .. }), "{error}");
}

/// What the text comes to, character by character, whatever its parts.
fn expected(stops: &[String], text: &str) -> (String, Option<String>) {
    for (at, character) in text.char_indices() {
        let read = &text[..at + character.len_utf8()];
        let ended = stops.iter().filter(|stop| read.ends_with(stop.as_str()));
        if let Some(stop) = ended.max_by_key(|stop| stop.len()) {
            return (read[..read.len() - stop.len()].to_owned(), Some(stop.clone()));
        }
    }
    (text.to_owned(), None)
}

proptest! {
    #[test]
    fn any_division_gives_the_same_text_in_whole_graphemes(
        parts in prop::collection::vec("[abe\u{301}\u{200d}👩🇫🇷\r\n각]{0,5}", 0..12),
        stops in prop::collection::vec("[abe\u{301}👩\n]{1,4}", 0..3),
    ) {
        let text = parts.concat();
        let (whole, stop) = expected(&stops, &text);
        let refs = |texts: &[String]| texts.to_vec();
        let (stops, parts) = (refs(&stops), refs(&parts));
        let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let (pieces, got) = run(&stops, &parts);
        prop_assert_eq!(got, stop);
        prop_assert_eq!(pieces.concat(), whole.clone());
        let ends: Vec<usize> = whole.grapheme_indices(true).map(|(at, _)| at).chain([whole.len()]).collect();
        let mut at = 0;
        for piece in &pieces {
            at += piece.len();
            prop_assert!(ends.contains(&at), "{pieces:?}");
        }
    }
}

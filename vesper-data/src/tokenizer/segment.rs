//! Cutting a long text where the ids stay the same, so that one book is encoded by all threads and in little
//! memory. Two kinds of tokenizer are known well enough for that.
//!
//! **Byte-level BPE.** GPT-2's rule cuts a text into words, which the model encodes one by one:
//!
//! ```text
//! 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//! ```
//!
//! Where a line break stands between two characters that are not white space, only the last two alternatives
//! match it, alone: one word ends before and one begins after it. The text up to and with the line break,
//! taken for itself, ends in the same word; the text behind it begins with the same word; and no alternative
//! looks further than one character past white space. So the two halves have together the words of the whole.
//!
//! **Unigram with SentencePiece's normalisation** (CamemBERT and its kind). A line break becomes a space, each
//! grapheme is normalised for itself, and each space begins a new word, "▁word". Where a line break stands
//! between two ASCII letters or digits, the text behind it therefore begins a word; taken for itself, it gets
//! the same "▁" put before it. The line break itself is left out: it is that "▁".
//!
//! Special tokens are found before all this. The conditions below exclude those that could reach across a cut.

use serde_json::{Value, json};
use tokenizers::{NormalizedString, Normalizer, Tokenizer};

/// Texts up to about this many bytes are encoded in one piece.
pub(super) const SEGMENT_BYTES: usize = 64 << 10;

/// Where a tokenizer's texts may be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Segments {
    /// After line breaks between two characters that are not white space.
    ByteLevel,
    /// In the place of line breaks between two ASCII letters or digits.
    SentencePiece,
    /// Nowhere: what the tokenizer does is not known well enough.
    Whole,
}

impl Segments {
    pub(super) fn of(tokenizer: &Tokenizer, description: &Value) -> Self {
        let model = &description["model"]["type"];
        let words = &description["pre_tokenizer"];
        let tokens = description["added_tokens"].as_array().map_or(&[][..], Vec::as_slice);
        let byte_level = description["normalizer"].is_null()
            && model == "BPE"
            && words["type"] == "ByteLevel"
            && words["add_prefix_space"] == false
            && words["use_regex"] == true;
        if byte_level && tokens.iter().all(stays_in_its_line) {
            return Self::ByteLevel;
        }
        let sentence_piece = model == "Unigram"
            && words["type"] == "Metaspace"
            && words["replacement"] == "▁"
            && words["split"] == true
            && (words["prepend_scheme"] == "always" || words["prepend_scheme"] == "first")
            && normalizes_graphemes(&description["normalizer"])
            && breaks_become_spaces(tokenizer);
        if sentence_piece && tokens.iter().all(stays_off_letters) {
            return Self::SentencePiece;
        }
        Self::Whole
    }

    /// Cuts `text` into pieces of at least `bytes` bytes (but for the last).
    pub(super) fn split(self, text: &str, bytes: usize) -> Vec<&str> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some((piece, tail)) = self.cut(rest, bytes) {
            pieces.push(piece);
            rest = tail;
        }
        pieces.push(rest);
        pieces
    }

    /// The pieces before and behind the first place to cut that is at least `bytes` bytes into `text`.
    fn cut(self, text: &str, bytes: usize) -> Option<(&str, &str)> {
        let fits: fn(char) -> bool = match self {
            Self::ByteLevel => |char| !char.is_whitespace(),
            Self::SentencePiece => |char| char.is_ascii_alphanumeric(),
            Self::Whole => return None,
        };
        let mut from = bytes.max(1);
        while from < text.len() && !text.is_char_boundary(from) {
            from += 1;
        }
        for (at, _) in text.get(from..)?.match_indices('\n') {
            let (before, _) = text.split_at_checked(from + at)?;
            let (with_break, after) = text.split_at_checked(from + at + 1)?;
            if before.chars().next_back().is_some_and(fits) && starts(after, fits) {
                let keeps_break = self == Self::ByteLevel;
                return Some((if keeps_break { with_break } else { before }, after));
            }
        }
        None
    }
}

/// Whether a text starts with a character that `fits` and that no combining mark behind it changes.
fn starts(text: &str, fits: fn(char) -> bool) -> bool {
    let mut chars = text.chars();
    chars.next().is_some_and(fits) && chars.next().is_none_or(|char| char.is_whitespace() || fits(char))
}

/// Whether a special token takes no notice of what is around it.
fn stays_in_its_line(token: &Value) -> bool {
    ["single_word", "lstrip", "rstrip"].iter().all(|&key| token[key] == false)
        && token["content"].as_str().is_some_and(|content| !content.contains('\n'))
}

/// Whether a special token cannot hold, or swallow, white space between two letters or digits.
fn stays_off_letters(token: &Value) -> bool {
    let letter = |char: char| char.is_ascii_alphanumeric();
    token["single_word"] == false
        && token["rstrip"] == false
        && token["content"].as_str().is_some_and(|content| {
            !content.contains(char::is_whitespace)
                && (token["lstrip"] == false || !content.starts_with(letter))
        })
}

/// Whether a normalizer works on each grapheme for itself, but for joining spaces.
fn normalizes_graphemes(normalizer: &Value) -> bool {
    match normalizer["type"].as_str() {
        Some("Precompiled") => true,
        Some("Replace") => normalizer["pattern"] == json!({"Regex": " {2,}"}) && normalizer["content"] == " ",
        Some("Sequence") => {
            normalizer["normalizers"].as_array().is_some_and(|parts| parts.iter().all(normalizes_graphemes))
        }
        _ => false,
    }
}

/// Whether a line break becomes a space, and ASCII letters and digits stay as they are.
fn breaks_become_spaces(tokenizer: &Tokenizer) -> bool {
    let Some(normalizer) = tokenizer.get_normalizer() else { return false };
    (b'0'..=b'z').map(char::from).filter(char::is_ascii_alphanumeric).all(|char| {
        let mut text = NormalizedString::from(format!("{char}\n{char}"));
        normalizer.normalize(&mut text).is_ok() && text.get() == format!("{char} {char}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_are_after_line_breaks_between_words_only() {
        let split = |text, bytes| Segments::ByteLevel.split(text, bytes);
        assert_eq!(split("ab\ncd\n\nef \ngh\n ij\nk", 1), ["ab\n", "cd\n\nef \ngh\n ij\n", "k"]);
        assert_eq!(split("ab\ncd\nef", 4), ["ab\ncd\n", "ef"]);
        assert_eq!(split("éé\néé\n", 1), ["éé\n", "éé\n"]);
        assert_eq!(split("", 1), [""]);
        assert_eq!(Segments::Whole.split("ab\ncd", 1), ["ab\ncd"]);
    }

    #[test]
    fn a_line_break_that_is_a_space_goes_with_the_cut() {
        let text = "ab\ncd.\nef\nég\n\ngh\ni\u{301}j\nk";
        assert_eq!(Segments::SentencePiece.split(text, 1), ["ab", "cd.\nef\nég\n\ngh\ni\u{301}j", "k"]);
    }
}

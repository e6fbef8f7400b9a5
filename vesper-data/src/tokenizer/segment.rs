//! Cutting a long text where the ids stay the same, so that one book is encoded by all threads and in little
//! memory. Four kinds of tokenizer are known well enough for that.
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
//! A space between two such characters only ever begins a word, so the text may be cut before it: what comes before it
//! ends a word whatever follows, and the rules look at nothing behind them.
//!
//! **Byte-level BPE with later rules** (Llama 3, Qwen 2, Mistral's Tekken and GPT-4o's kind). In their rules a space
//! between two ASCII letters, too, is only ever the first character of a word, `[^\r\n\p{L}\p{N}]?\p{L}+`: the text may
//! be cut before it.
//!
//! **Unigram with SentencePiece's normalisation** (CamemBERT and its kind). A line break becomes a space, each
//! grapheme is normalised for itself, and each space begins a new word, "▁word". Where a line break stands
//! between two ASCII letters or digits, the text behind it therefore begins a word; taken for itself, it gets
//! the same "▁" put before it. The line break itself is left out: it is that "▁". A space between two letters or
//! digits does as well.
//!
//! **BPE with SentencePiece's spaces** (Llama, Mistral). Spaces become "▁", one more is put before the text, and the
//! whole of it is one word. Where no token has a "▁" behind another character, no merge reaches from a character to
//! the "▁" of the space that follows it, and since merges on both sides of such a place do not touch each other,
//! their order does not matter. The space is left out, as above.
//!
//! Special tokens are found before all this. The conditions below exclude those that could reach across a cut.

use serde_json::{Value, json};
use tokenizers::{NormalizedString, Normalizer, Tokenizer};

/// Texts up to about this many bytes are encoded in one piece.
pub(super) const SEGMENT_BYTES: usize = 64 << 10;

/// A piece of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece<'a> {
    pub(super) text: &'a str,
    /// Where it starts in the whole text, in bytes.
    pub(super) start: usize,
    /// Where the piece before it ends: what is between them belongs to the first token of this one.
    pub(super) from: usize,
}

/// Where a tokenizer's texts may be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Segments {
    /// After line breaks, and before spaces, between two characters that are not white space.
    ByteLevel,
    /// After such line breaks only.
    ByteLevelLines,
    /// Before spaces between two ASCII letters.
    LetterSpaces,
    /// In the place of line breaks or spaces between two ASCII letters or digits.
    SentencePiece,
    /// In the place of spaces between two ASCII letters or digits.
    Spaces,
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
            return if tokens.iter().all(has_no_space) { Self::ByteLevel } else { Self::ByteLevelLines };
        }
        let later_rules = model == "BPE"
            && (description["normalizer"].is_null() || description["normalizer"]["type"] == "NFC")
            && has_later_rules(words);
        if later_rules && tokens.iter().all(|token| stays_in_its_line(token) && has_no_space(token)) {
            return Self::LetterSpaces;
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
        if begins_words_at_spaces(description) && tokens.iter().all(stays_off_letters) {
            return Self::Spaces;
        }
        Self::Whole
    }

    /// Cuts `text` into pieces of at least `bytes` bytes (but for the last).
    pub(super) fn split(self, text: &str, bytes: usize) -> Vec<Piece<'_>> {
        let mut pieces = Vec::new();
        let (mut rest, mut start, mut from) = (text, 0, 0);
        while let Some((piece, tail)) = self.cut(rest, bytes) {
            pieces.push(Piece { text: piece, start, from });
            from = start + piece.len();
            start += rest.len() - tail.len();
            rest = tail;
        }
        pieces.push(Piece { text: rest, start, from });
        pieces
    }

    /// The pieces before and behind the first place to cut that is at least `bytes` bytes into `text`.
    fn cut(self, text: &str, bytes: usize) -> Option<(&str, &str)> {
        let letter: fn(char) -> bool = |char| char.is_ascii_alphanumeric();
        let dark: fn(char) -> bool = |char| !char.is_whitespace();
        let (breaks, fits): (fn(char) -> bool, _) = match self {
            Self::ByteLevel => (|char| matches!(char, '\n' | ' '), dark),
            Self::ByteLevelLines => (|char| char == '\n', dark),
            Self::LetterSpaces => {
                (|char| char == ' ', (|char| char.is_ascii_alphabetic()) as fn(char) -> bool)
            }
            Self::SentencePiece => (|char| matches!(char, '\n' | ' '), letter),
            Self::Spaces => (|char| char == ' ', letter),
            Self::Whole => return None,
        };
        let mut from = bytes.max(1);
        while from < text.len() && !text.is_char_boundary(from) {
            from += 1;
        }
        for (at, _) in text.get(from..)?.match_indices(breaks) {
            let (before, from_break) = text.split_at_checked(from + at)?;
            let (with_break, after) = text.split_at_checked(from + at + 1)?;
            if before.chars().next_back().is_some_and(fits) && starts(after, fits) {
                return Some(match self {
                    Self::ByteLevel | Self::ByteLevelLines if with_break.ends_with('\n') => {
                        (with_break, after)
                    }
                    Self::ByteLevel | Self::ByteLevelLines | Self::LetterSpaces => (before, from_break),
                    Self::SentencePiece | Self::Spaces | Self::Whole => (before, after),
                });
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

fn has_no_space(token: &Value) -> bool {
    token["content"].as_str().is_some_and(|content| !content.contains(' '))
}

/// Whether words are cut by rules in which a space between ASCII letters only begins a word, and then taken as bytes.
fn has_later_rules(words: &Value) -> bool {
    let Some([split, bytes]) = words["pretokenizers"].as_array().map(Vec::as_slice) else { return false };
    split["type"] == "Split"
        && split["behavior"] == "Isolated"
        && split["invert"] == false
        && split["pattern"]["Regex"].as_str().is_some_and(|rule| LATER_RULES.contains(&rule))
        && bytes["type"] == "ByteLevel"
        && bytes["add_prefix_space"] == false
        && bytes["use_regex"] == false
}

/// The rules of Llama 3, of Qwen 2, of GPT-4o, and of Mistral's Tekken.
pub(super) const LATER_RULES: [&str; 4] = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
];

/// Whether a special token cannot hold, swallow, or stand right behind white space that is followed by a letter or a
/// digit.
fn stays_off_letters(token: &Value) -> bool {
    token["single_word"] == false
        && token["rstrip"] == false
        && token["content"].as_str().is_some_and(|content| {
            !content.contains(char::is_whitespace)
                && !content.starts_with(|char: char| char.is_ascii_alphanumeric())
        })
}

/// Whether a BPE takes the text as one word in which each space is a "▁" that only begins tokens.
fn begins_words_at_spaces(description: &Value) -> bool {
    let (model, normalizer) = (&description["model"], &description["normalizer"]);
    let words = &description["pre_tokenizer"];
    let unset = |key: &str| model[key].is_null() || model[key] == "";
    let prepended = words.is_null()
        && *normalizer
            == json!({"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ]});
    let metaspace = normalizer.is_null()
        && words["type"] == "Metaspace"
        && words["replacement"] == "▁"
        && (words["prepend_scheme"] == "always" || words["prepend_scheme"] == "first");
    (prepended || metaspace)
        && model["type"] == "BPE"
        && model["ignore_merges"] != true
        && unset("continuing_subword_prefix")
        && unset("end_of_word_suffix")
        && model["vocab"].as_object().is_some_and(|vocab| {
            vocab.contains_key("▁") && vocab.keys().all(|token| !token.trim_start_matches('▁').contains('▁'))
        })
}

/// Whether a normalizer works on each grapheme, or each character and the marks on it, for itself, but for joining
/// spaces.
fn normalizes_graphemes(normalizer: &Value) -> bool {
    match normalizer["type"].as_str() {
        Some("Precompiled" | "Nmt" | "NFC" | "NFKC") => true,
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

    fn texts(segments: Segments, text: &str, bytes: usize) -> Vec<&str> {
        let pieces = segments.split(text, bytes);
        let mut end = 0;
        for piece in &pieces {
            assert_eq!(piece.from, end);
            assert_eq!(text.get(piece.start..piece.start + piece.text.len()), Some(piece.text));
            end = piece.start + piece.text.len();
        }
        assert_eq!(end, text.len());
        pieces.into_iter().map(|piece| piece.text).collect()
    }

    #[test]
    fn cuts_are_between_words_only() {
        let split = |text, bytes| texts(Segments::ByteLevel, text, bytes);
        let lines = texts(Segments::ByteLevelLines, "ab\ncd\n\nef \ngh\n ij\nk l", 1);
        assert_eq!(lines, ["ab\n", "cd\n\nef \ngh\n ij\n", "k l"]);
        assert_eq!(
            split("ab\ncd\n\nef \ngh\n ij, k. l\tm", 1),
            ["ab\n", "cd\n\nef \ngh\n ij,", " k.", " l\tm"]
        );
        assert_eq!(
            texts(Segments::LetterSpaces, "ab cd. d é f\ng  h i", 1),
            ["ab", " cd. d é f\ng  h", " i"]
        );
        assert_eq!(split("ab\ncd\nef", 4), ["ab\ncd\n", "ef"]);
        assert_eq!(split("éé\néé\n", 1), ["éé\n", "éé\n"]);
        assert_eq!(split("", 1), [""]);
        assert_eq!(texts(Segments::Whole, "ab\ncd", 1), ["ab\ncd"]);
    }

    #[test]
    fn a_break_that_is_a_space_goes_with_the_cut() {
        let text = "ab\ncd.\nef\nég\n\ngh\ni\u{301}j\nk l";
        let expected = ["ab", "cd.\nef\nég\n\ngh\ni\u{301}j", "k", "l"];
        assert_eq!(texts(Segments::SentencePiece, text, 1), expected);
        assert_eq!(texts(Segments::Spaces, "ab cd\nef  g hi. j", 1), ["ab", "cd\nef  g", "hi. j"]);
    }

    #[test]
    fn an_added_token_that_reaches_over_a_cut_forbids_cutting() {
        let token = |content: &str, rstrip: bool| json!({"content": content, "single_word": false, "lstrip": false, "rstrip": rstrip});
        assert!(stays_off_letters(&token("<s>NOTUSED", false)));
        // The space before it would become a token of its own, which a piece that begins with it does not have.
        assert!(!stays_off_letters(&token("STOP", false)));
        assert!(!stays_off_letters(&token("<end> of", false)));
        assert!(!stays_off_letters(&token("<s>", true)));
    }
}

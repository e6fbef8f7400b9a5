//! From bytes of the text to tokens: which ids the loss is taken over.

use std::ops::Range;

use tokenizers::{Encoding, Model, OffsetType, PreTokenizer, Tokenizer};

use super::segment::Piece;

/// The ids of a text, each with the bytes of the text as it was before normalisation that it stands for.
///
/// `Tokenizer::encode` would do, but that some post-processors take the white space off again.
pub(super) fn encode(tokenizer: &Tokenizer, text: &str) -> tokenizers::Result<Encoding> {
    let mut words = tokenizer.get_added_vocabulary().extract_and_normalize(tokenizer.get_normalizer(), text);
    if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut words)?;
    }
    words.tokenize(|word| tokenizer.get_model().tokenize(word.get()))?;
    words.into_encoding(None, 0, OffsetType::Byte)
}

/// The ids of a piece whose tokens touch `ranges`, which are bytes of the whole text.
pub(super) fn touched(encoding: &Encoding, piece: Piece<'_>, ranges: &[Range<usize>]) -> Vec<Range<usize>> {
    let offsets = encoding.get_offsets();
    // The white space that was left out between two pieces belongs to the first token, and is all of it where the second one
    // begins at the same place: a "▁" by itself.
    let alone = piece.from < piece.start && matches!(offsets, [(0, _), (0, _), ..]);
    let mut touched = Vec::new();
    for (index, &(start, end)) in offsets.iter().enumerate() {
        let start = if index == 0 && start == 0 { piece.from } else { piece.start + start };
        let end = if index == 0 && alone { piece.start } else { piece.start + end };
        if touches(start..end, ranges) {
            append(&mut touched, index..index + 1);
        }
    }
    touched
}

/// Whether a token's bytes are in one of the ranges, which are in order; no bytes at all count as the next one.
fn touches(token: Range<usize>, ranges: &[Range<usize>]) -> bool {
    let end = token.end.max(token.start + 1);
    let first = ranges.partition_point(|range| range.end <= token.start);
    ranges.get(first).is_some_and(|range| range.start < end)
}

/// Adds a range behind the others, joined to the last one where they meet.
pub(super) fn append(ranges: &mut Vec<Range<usize>>, range: Range<usize>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_counts_when_one_of_its_bytes_does() {
        let ranges = [3..5, 8..9];
        let touched: Vec<usize> = (0..10).filter(|&at| touches(at..at + 1, &ranges)).collect();
        assert_eq!(touched, [3, 4, 8]);
        assert!(touches(0..4, &ranges) && touches(4..7, &ranges) && touches(6..20, &ranges));
        assert!(!touches(5..8, &ranges) && !touches(9..12, &ranges) && !touches(0..3, &ranges));
        // Without bytes of its own.
        assert!(touches(3..3, &ranges) && !touches(2..2, &ranges) && !touches(5..5, &ranges));
        assert!(!touches(0..9, &[]));
    }

    #[test]
    fn ranges_that_meet_become_one() {
        let mut ranges = Vec::new();
        for range in [0..1, 1..2, 4..5, 5..9] {
            append(&mut ranges, range);
        }
        assert_eq!(ranges, [0..2, 4..9]);
    }
}

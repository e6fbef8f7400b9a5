//! Training a Unigram vocabulary with `tokenizers`' trainer, made deterministic.
//!
//! That trainer is given its words sorted and one thread, since it adds numbers up in an order that depends on the
//! threads. What is left is the order of a hash map, which decides over the scores of characters that only occur
//! inside of longer pieces, and over the order of equal scores: both are put right afterwards.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use tokenizers::models::unigram::{Unigram, UnigramTrainer};

use super::layout::{Pieces, TokenLayout};
use crate::error::{DataError, Result, one_line};

/// Longer words, such as data in the text, are cut: they would take long and teach nothing.
const MAX_WORD: usize = 64;

/// The longest piece, in characters, as SentencePiece has it.
const MAX_PIECE: usize = 16;

/// The step between the scores that the trainer gives to characters of which it has no count.
const SCORE_STEP: f64 = 0.0001;

/// The trainer adds counts up in 32 bits.
const MAX_CHARACTERS: u64 = 1 << 31;

/// A piece and its logarithmic probability.
type Scored = (String, f64);

/// The best `room` pieces, or fewer, and their scores, in descending order.
pub(super) fn train(words: Vec<(String, u64)>, room: usize, coverage: f64) -> Result<Vec<Scored>> {
    let failed = |problem: String| DataError::Tokenizer { action: "train", problem };
    let characters = characters(&words);
    let kept = most_frequent(&characters, coverage);
    if kept.len() >= room {
        return Err(failed(format!(
            "the text has {} different characters, expected fewer than {room}, which is what the vocabulary has room \
             for: ask for more tokens or less character coverage",
            kept.len()
        )));
    }
    let words = in_32_bits(known_parts(words, &kept), characters.values().sum());
    if words.iter().all(|(word, _)| word.chars().count() < 2) {
        return Err(failed("no word of the text has two characters".to_owned()));
    }
    let trainer = UnigramTrainer::builder()
        .show_progress(false)
        .vocab_size(room as u32)
        .max_piece_length(MAX_PIECE)
        .build()
        .map_err(|error| failed(one_line(error)))?;
    let mut model = Unigram::default();
    let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build();
    let alone = alone.map_err(|error| failed(one_line(error)))?;
    alone.install(|| trainer.do_train(words, &mut model)).map_err(|error| failed(one_line(error)))?;
    let mut pieces: Vec<Scored> = model.iter().cloned().collect();
    settle(&mut pieces);
    Ok(pieces)
}

/// How often each character occurs.
fn characters(words: &[(String, u64)]) -> BTreeMap<char, u64> {
    let mut counts = BTreeMap::new();
    for (word, count) in words {
        for char in word.chars() {
            *counts.entry(char).or_default() += count;
        }
    }
    counts
}

/// The most frequent characters, which make up a share of `coverage` of the text.
fn most_frequent(characters: &BTreeMap<char, u64>, coverage: f64) -> BTreeSet<char> {
    let mut by_count: Vec<(u64, char)> = characters.iter().map(|(&char, &count)| (count, char)).collect();
    by_count.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
    let wanted = characters.values().sum::<u64>() as f64 * coverage;
    let mut covered = 0;
    by_count
        .into_iter()
        .take_while(|(count, _)| {
            let more = (covered as f64) < wanted;
            covered += count;
            more
        })
        .map(|(_, char)| char)
        .collect()
}

/// The parts of words between characters that are left out (a NUL is the trainer's own mark), not too long.
fn known_parts(words: Vec<(String, u64)>, kept: &BTreeSet<char>) -> Vec<(String, u64)> {
    let mut parts: BTreeMap<String, u64> = BTreeMap::new();
    for (word, count) in words {
        for part in word.split(|char| char == '\0' || !kept.contains(&char)) {
            let chars: Vec<char> = part.chars().collect();
            for chunk in chars.chunks(MAX_WORD) {
                *parts.entry(chunk.iter().collect()).or_default() += count;
            }
        }
    }
    parts.into_iter().collect()
}

/// Divides counts whose sum would not fit the trainer's 32 bits.
fn in_32_bits(words: Vec<(String, u64)>, characters: u64) -> Vec<(String, u32)> {
    let divisor = characters.div_ceil(MAX_CHARACTERS).max(1);
    words
        .into_iter()
        .map(|(word, count)| (word, u32::try_from(count.div_ceil(divisor)).unwrap_or(u32::MAX)))
        .collect()
}

/// Gives the scores of characters without a count in the characters' order, and equal scores in the pieces' order.
fn settle(pieces: &mut [Scored]) {
    let lowest = pieces.iter().map(|(_, score)| *score).fold(f64::INFINITY, f64::min);
    let is_character = |piece: &str| piece.chars().nth(1).is_none();
    let mut waiting: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    for (index, (piece, score)) in pieces.iter().enumerate() {
        if is_character(piece) {
            waiting.entry(score.to_bits()).or_default().push(index);
        }
    }
    // The scores are lowest, lowest + step, ..., added up as the trainer does it.
    let (mut penalty, mut places, mut scores) = (0.0, Vec::new(), Vec::new());
    while let Some(found) = waiting.remove(&(lowest + penalty).to_bits()) {
        scores.extend(found.iter().map(|_| lowest + penalty));
        places.extend(found);
        penalty += SCORE_STEP;
    }
    let mut names: Vec<String> =
        places.iter().filter_map(|&place| pieces.get(place)).map(|(piece, _)| piece.clone()).collect();
    names.sort_unstable();
    for ((place, name), score) in places.into_iter().zip(names).zip(scores) {
        if let Some(piece) = pieces.get_mut(place) {
            *piece = (name, score);
        }
    }
    pieces.sort_by(|a, b| b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
}

/// The number of tokens, and the model as a `tokenizer.json` has it.
pub(super) fn to_json(pieces: Vec<Scored>, layout: TokenLayout) -> (usize, Value) {
    // Special tokens have the score 0, as in CamemBERT's file; none is ever reached by its score.
    let special = |token: &&str| ((*token).to_owned(), if *token == "<unk>NOTUSED" { -100.0 } else { 0.0 });
    let first = layout.first(Pieces::Characters);
    let is_special = |piece: &str| first.contains(&piece) || layout.last().contains(&piece);
    let vocab: Vec<Scored> = first
        .iter()
        .map(special)
        .chain(pieces.into_iter().filter(|(piece, _)| !is_special(piece)))
        .chain(layout.last().iter().map(special))
        .collect();
    let unknown = first.iter().position(|token| *token == "<unk>");
    (vocab.len(), json!({"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": false}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(words: &[(&str, u64)]) -> Vec<(String, u64)> {
        words.iter().map(|&(word, count)| (word.to_owned(), count)).collect()
    }

    #[test]
    fn rare_characters_are_left_out_by_their_share_of_the_text() {
        let counts = characters(&words(&[("aab", 10), ("c", 2)]));
        let kept = |coverage| most_frequent(&counts, coverage).into_iter().collect::<String>();
        assert_eq!((kept(1.0), kept(0.93), kept(0.6)), ("abc".into(), "ab".into(), "a".into()));
    }

    #[test]
    fn words_are_cut_at_unknown_characters_and_at_their_longest() {
        let kept = BTreeSet::from(['a', 'b']);
        let long = "a".repeat(MAX_WORD + 1);
        let parts = known_parts(words(&[("acb\0a", 3), ("a", 1), (&long, 2)]), &kept);
        assert_eq!(parts, words(&[("a", 9), (&"a".repeat(MAX_WORD), 2), ("b", 3)]));
    }

    #[test]
    fn counts_beyond_32_bits_are_divided_and_stay_positive() {
        let counts = in_32_bits(words(&[("a", 1), ("b", 5 << 31)]), 5 << 31);
        assert_eq!(counts, [("a".to_owned(), 1), ("b".to_owned(), 1 << 31)]);
    }

    #[test]
    fn the_order_of_a_hash_map_does_not_show() {
        let low = -9.0;
        let second = low + (0.0 + SCORE_STEP);
        let scored = |pieces: &[(&str, f64)]| -> Vec<Scored> {
            pieces.iter().map(|&(piece, score)| (piece.to_owned(), score)).collect()
        };
        let mut one = scored(&[("ab", -1.0), ("y", low), ("x", second), ("q", -2.0), ("p", -2.0)]);
        let mut other = scored(&[("p", -2.0), ("x", low), ("ab", -1.0), ("y", second), ("q", -2.0)]);
        settle(&mut one);
        settle(&mut other);
        assert_eq!(one, other);
        assert_eq!(one, scored(&[("ab", -1.0), ("p", -2.0), ("q", -2.0), ("y", second), ("x", low)]));
    }
}

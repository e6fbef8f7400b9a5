//! Training a byte-level BPE.
//!
//! `tokenizers` has a trainer too, but on equal counts its choice can depend on the order of a hash map with a
//! random seed. Here the most frequent pair wins, and of equally frequent ones the one with the lower ids: the
//! result depends on the text alone.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap};

use serde_json::{Map, Value, json};

use super::layout::{Pieces, TokenLayout};
use super::train::TrainProgress;

/// The fewest tokens a byte-level BPE can have: the 256 bytes and the end of a document.
pub const MIN_VOCAB_SIZE: usize = 257;

/// Pairs that are rarer than this are not merged.
const MIN_COUNT: u64 = 2;

/// After how many merges the progress is told.
const REPORT: usize = 256;

/// Longer words, such as data in the text, are cut: they would take long and teach nothing.
const MAX_WORD: usize = 256;

type Pair = (u32, u32);

/// The characters that stand for the bytes 0 to 255 in a byte-level tokenizer's vocabulary: printable bytes
/// stand for themselves, the others for the characters from U+0100 on.
pub(super) fn byte_chars() -> [char; 256] {
    let mut next = 0x100_u32;
    let mut chars = ['\0'; 256];
    for (char, byte) in chars.iter_mut().zip(0_u8..=255) {
        *char = match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => byte as char,
            _ => {
                let stand_in = char::from_u32(next).unwrap_or(char::REPLACEMENT_CHARACTER);
                next += 1;
                stand_in
            }
        };
    }
    chars
}

/// A trained vocabulary.
pub(super) struct Bpe {
    /// The tokens by their ids.
    tokens: Vec<String>,
    /// What is merged, in order.
    merges: Vec<Pair>,
}

/// A word as the tokens it is made of at the moment.
struct Word {
    tokens: Vec<u32>,
    count: u64,
}

impl Word {
    fn pairs(&self) -> impl Iterator<Item = Pair> + '_ {
        self.tokens.iter().copied().zip(self.tokens.iter().copied().skip(1))
    }

    fn merge(&mut self, pair: Pair, id: u32) {
        let mut merged = Vec::with_capacity(self.tokens.len());
        let mut rest = self.tokens.as_slice();
        while let Some((&first, tail)) = rest.split_first() {
            if first == pair.0 && tail.first() == Some(&pair.1) {
                merged.push(id);
                rest = tail.get(1..).unwrap_or_default();
            } else {
                merged.push(first);
                rest = tail;
            }
        }
        self.tokens = merged;
    }
}

/// Where each pair occurs, and how often.
#[derive(Default)]
struct Pairs {
    counts: HashMap<Pair, u64>,
    /// Words that held the pair at some time, in the order in which they came to.
    words: HashMap<Pair, Vec<usize>>,
    /// Counts as they were when the pair was put in; too high ones are put right when they come up.
    queue: BinaryHeap<(u64, Reverse<Pair>)>,
}

impl Pairs {
    fn add(&mut self, pair: Pair, count: u64) {
        *self.counts.entry(pair).or_default() += count;
    }

    fn locate(&mut self, pair: Pair, word: usize) {
        let words = self.words.entry(pair).or_default();
        if words.last() != Some(&word) {
            words.push(word);
        }
    }

    fn remove(&mut self, pair: Pair, count: u64) {
        if let Some(total) = self.counts.get_mut(&pair) {
            *total = total.saturating_sub(count);
        }
    }

    fn enqueue(&mut self, pair: Pair) {
        if let Some(&count) = self.counts.get(&pair).filter(|&&count| count >= MIN_COUNT) {
            self.queue.push((count, Reverse(pair)));
        }
    }

    /// The most frequent pair.
    fn pop(&mut self) -> Option<Pair> {
        while let Some((count, Reverse(pair))) = self.queue.pop() {
            if self.counts.get(&pair) == Some(&count) {
                return Some(pair);
            }
            self.enqueue(pair);
        }
        None
    }
}

/// Merges the most frequent pair until there are `vocab_size` tokens, or no pair occurs twice.
pub(super) fn train(
    words: &[(String, u64)],
    vocab_size: usize,
    layout: TokenLayout,
    progress: &mut dyn FnMut(TrainProgress),
) -> Bpe {
    let mut alphabet = byte_chars();
    alphabet.sort_unstable();
    let mut tokens: Vec<String> = layout.first(Pieces::Bytes).iter().map(|&token| token.to_owned()).collect();
    let id_of_char: HashMap<char, u32> = alphabet.into_iter().zip(tokens.len() as u32..).collect();
    tokens.extend(alphabet.iter().map(char::to_string));
    let mut id_of: HashMap<String, u32> = tokens.iter().cloned().zip(0..).collect();

    let mut split: Vec<Word> = Vec::with_capacity(words.len());
    for (word, count) in words {
        let ids: Vec<u32> = word.chars().filter_map(|char| id_of_char.get(&char).copied()).collect();
        split.extend(ids.chunks(MAX_WORD).map(|ids| Word { tokens: ids.to_vec(), count: *count }));
    }
    let mut words = split;
    let mut pairs = Pairs::default();
    for (index, word) in words.iter().enumerate() {
        for pair in word.pairs() {
            pairs.add(pair, word.count);
            pairs.locate(pair, index);
        }
    }
    let all: Vec<Pair> = pairs.counts.keys().copied().collect();
    for pair in all {
        pairs.enqueue(pair);
    }

    let mut merges: Vec<Pair> = Vec::new();
    let mut merged: HashMap<Pair, u32> = HashMap::new();
    let last = layout.last();
    let specials = [layout.first(Pieces::Bytes), last].concat();
    while tokens.len() + last.len() < vocab_size {
        if merges.len().is_multiple_of(REPORT) {
            progress(TrainProgress::Merging { tokens: tokens.len(), vocab_size });
        }
        let Some(pair) = pairs.pop() else { break };
        let name = |id: u32| tokens.get(id as usize).map_or("", String::as_str);
        let joined = [name(pair.0), name(pair.1)].concat();
        // Text that spells a special token becomes that token before it is cut into words.
        if specials.contains(&joined.as_str()) {
            continue;
        }
        // The same string can come from two pairs: (ab, c) and (a, bc).
        let id = *id_of.entry(joined.clone()).or_insert(tokens.len() as u32);
        if id as usize == tokens.len() {
            tokens.push(joined);
        }
        if merged.insert(pair, id).is_none() {
            merges.push(pair);
        }
        let mut changed = BTreeSet::new();
        for index in pairs.words.remove(&pair).unwrap_or_default() {
            let Some(word) = words.get_mut(index) else { continue };
            word.pairs().for_each(|old| pairs.remove(old, word.count));
            word.merge(pair, id);
            for new in word.pairs() {
                pairs.add(new, word.count);
                // Where the other pairs are is known from before.
                if new.0 == id || new.1 == id {
                    pairs.locate(new, index);
                    changed.insert(new);
                }
            }
        }
        for pair in changed {
            pairs.enqueue(pair);
        }
    }
    tokens.extend(last.iter().map(|&token| token.to_owned()));
    Bpe { tokens, merges }
}

impl Bpe {
    /// The number of tokens.
    pub(super) fn vocab_size(&self) -> usize {
        self.tokens.len()
    }

    /// The model as a `tokenizer.json` has it.
    pub(super) fn to_json(&self) -> Value {
        let vocab: Map<String, Value> =
            self.tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
        let name = |id: u32| self.tokens.get(id as usize).map_or("", String::as_str);
        let merges: Vec<[&str; 2]> = self.merges.iter().map(|&(a, b)| [name(a), name(b)]).collect();
        json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocab,
            "merges": merges,
        })
    }
}

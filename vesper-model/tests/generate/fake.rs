//! Models and tokenizers that do as they are told.

use tokenizers::Tokenizer;
use vesper_model::Result;
use vesper_model::generate::{BatchLogits, NextLogits};

/// After token n comes n + 1, up to the vocabulary, and it remembers `capacity` tokens.
pub(crate) struct Counter {
    pub(crate) seen: Vec<u32>,
    pub(crate) calls: Vec<usize>,
    capacity: usize,
    vocab: usize,
}

impl Counter {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { seen: Vec::new(), calls: Vec::new(), capacity, vocab: 64 }
    }
}

impl NextLogits for Counter {
    fn append(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        assert!(!ids.is_empty() && ids.len() <= self.remaining());
        self.calls.push(ids.len());
        self.seen.extend(ids);
        let mut logits = vec![0.0; self.vocab];
        let next = (self.seen[self.seen.len() - 1] as usize + 1) % self.vocab;
        logits[next] = 1.0;
        Ok(logits)
    }

    fn remaining(&self) -> usize {
        self.capacity - self.seen.len()
    }

    fn vocab_size(&self) -> usize {
        self.vocab
    }
}

/// Says these tokens one after the other, whatever it is given, then the end of text, 0.
pub(crate) struct Script {
    said: Vec<u32>,
    at: usize,
    vocab: usize,
}

impl Script {
    pub(crate) fn new(said: &[u32], vocab: usize) -> Self {
        Self { said: said.to_vec(), at: 0, vocab }
    }
}

impl NextLogits for Script {
    fn append(&mut self, _: &[u32]) -> Result<Vec<f32>> {
        let next = self.said.get(self.at).copied().unwrap_or(0);
        self.at += 1;
        let mut logits = vec![0.0; self.vocab];
        logits[next as usize] = 1.0;
        Ok(logits)
    }

    fn remaining(&self) -> usize {
        usize::MAX
    }

    fn vocab_size(&self) -> usize {
        self.vocab
    }
}

/// A byte-level tokenizer: 0 is `</s>`, then the 256 bytes in the order of their characters, then `words`.
pub(crate) fn bytes_and(words: &[&str]) -> Tokenizer {
    let mut alphabet: Vec<char> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let tokens = std::iter::once("</s>".to_owned())
        .chain(alphabet.iter().map(char::to_string))
        .chain(words.iter().map(|word| word.replace(' ', "Ġ").replace('\n', "Ċ")));
    let vocab: serde_json::Map<String, serde_json::Value> =
        tokens.zip(0u32..).map(|(token, id)| (token, id.into())).collect();
    let json = serde_json::json!({
        "added_tokens": [{"id": 0, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    json.to_string().parse().unwrap()
}

/// The ids of these tokens, which must be there.
pub(crate) fn ids(tokenizer: &Tokenizer, words: &[&str]) -> Vec<u32> {
    let id = |word: &&str| tokenizer.token_to_id(&word.replace(' ', "Ġ").replace('\n', "Ċ")).unwrap();
    words.iter().map(id).collect()
}

/// The ids of a text, byte by byte.
pub(crate) fn spell(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text, false).unwrap().get_ids().to_vec()
}

/// Scores that look random and depend on everything that was read.
#[derive(Clone)]
pub(crate) struct Hashed {
    read: Vec<u32>,
    capacity: usize,
    pub(crate) calls: usize,
}

impl Hashed {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { read: Vec::new(), capacity, calls: 0 }
    }
}

impl NextLogits for Hashed {
    fn append(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        assert!(!ids.is_empty() && ids.len() <= self.remaining());
        self.calls += 1;
        self.read.extend(ids);
        let mut state = self.read.iter().fold(7u64, |hash, &id| mix(hash ^ u64::from(id)));
        let next = || {
            state = mix(state);
            (state >> 40) as f32 / (1u64 << 24) as f32 * 6.0
        };
        Ok(std::iter::repeat_with(next).take(self.vocab_size()).collect())
    }

    fn remaining(&self) -> usize {
        self.capacity - self.read.len()
    }

    fn vocab_size(&self) -> usize {
        260
    }
}

fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 31)).wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 29)
}

/// A batch of models of one sequence each.
pub(crate) struct Rows<M> {
    models: Vec<M>,
    vocab: usize,
    /// The rows that each call gave tokens to.
    pub(crate) calls: Vec<Vec<usize>>,
}

impl<M: NextLogits> Rows<M> {
    pub(crate) fn new(rows: usize, model: impl Fn() -> M) -> Self {
        Self { models: (0..rows).map(|_| model()).collect(), vocab: model().vocab_size(), calls: Vec::new() }
    }
}

impl<M: NextLogits + Clone> BatchLogits for Rows<M> {
    fn rows(&self) -> usize {
        self.models.len()
    }

    fn append(&mut self, ids: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
        assert_eq!(ids.len(), self.models.len());
        self.calls.push((0..ids.len()).filter(|&row| !ids[row].is_empty()).collect());
        let row = |(model, ids): (&mut M, &&[u32])| {
            if ids.is_empty() { Ok(Vec::new()) } else { model.append(ids) }
        };
        self.models.iter_mut().zip(ids).map(row).collect()
    }

    fn reorder(&mut self, from: &[usize]) -> Result<()> {
        assert_eq!(from.len(), self.models.len());
        self.models = from.iter().map(|&row| self.models[row].clone()).collect();
        Ok(())
    }

    fn remaining(&self, row: usize) -> usize {
        self.models[row].remaining()
    }

    fn vocab_size(&self) -> usize {
        self.vocab
    }
}

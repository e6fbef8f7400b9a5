//! Training a vocabulary on one's own text.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokenizers::Tokenizer;

use super::layout::{Pieces, TokenLayout};
use super::segment::Segments;
use super::words::Counter;
use super::{TextTokenizer, bpe, unigram};
use crate::error::{DataError, Result, one_line};

/// How many different words are counted, which bounds the memory.
const BPE_WORDS: usize = 2 << 20;

/// Fewer for Unigram, which makes a suffix array of them, and many passes over them on one thread.
const UNIGRAM_WORDS: usize = 1 << 19;

/// How a vocabulary is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// Byte-level BPE, as GPT-2 has it: starts from the 256 bytes and merges the most frequent pair, again and again.
    /// No text is unknown to it, and every text comes back from its ids as it was.
    #[default]
    Bpe,
    /// Unigram, as CamemBERT has it: starts from all frequent strings and drops those whose loss costs the least
    /// likelihood. Text is normalised (NFKC, and white space to single spaces), and characters that the training text
    /// does not have become `<unk>`.
    Unigram,
}

/// What to train.
///
/// # Examples
///
/// ```
/// use vesper_data::tokenizer::{Algorithm, TokenLayout, TrainConfig};
/// use vesper_data::TextTokenizer;
///
/// let text = "le chat et le chien et l'oiseau et le renard. ".repeat(20);
/// let config = TrainConfig::default()
///     .with_algorithm(Algorithm::Unigram)
///     .with_layout(TokenLayout::Camembert)
///     .with_vocab_size(40);
/// let tokenizer = TextTokenizer::train([Ok(&text)], &config, |_progress| {})?;
/// assert_eq!(tokenizer.token_to_id("</s>"), Some(6));
/// assert_eq!(tokenizer.decode(&tokenizer.encode("le renard et le chat")?)?, "le renard et le chat");
/// # Ok::<(), vesper_data::DataError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// How the vocabulary is found. Default: BPE.
    pub algorithm: Algorithm,
    /// The number of tokens at most, special ones included. Default 32 000.
    pub vocab_size: usize,
    /// The special tokens. Default: `<|endoftext|>` alone.
    pub layout: TokenLayout,
    /// Unigram only: the share of the text's characters, from the most frequent one on, that get a token; the others
    /// are unknown. In `0.9..=1.0`, default 1: all. Text in many scripts needs less, such as the 0.9995 of
    /// SentencePiece.
    pub character_coverage: f64,
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            algorithm: Algorithm::default(),
            vocab_size: 32_000,
            layout: TokenLayout::default(),
            character_coverage: 1.0,
        }
    }
}

impl TrainConfig {
    /// Sets [`TrainConfig::algorithm`].
    pub fn with_algorithm(mut self, algorithm: Algorithm) -> Self {
        self.algorithm = algorithm;
        self
    }

    /// Sets [`TrainConfig::vocab_size`].
    pub fn with_vocab_size(mut self, vocab_size: usize) -> Self {
        self.vocab_size = vocab_size;
        self
    }

    /// Sets [`TrainConfig::layout`].
    pub fn with_layout(mut self, layout: TokenLayout) -> Self {
        self.layout = layout;
        self
    }

    /// Sets [`TrainConfig::character_coverage`].
    pub fn with_character_coverage(mut self, share: f64) -> Self {
        self.character_coverage = share;
        self
    }

    /// Checks every field.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] names the field that is out of its range.
    pub fn validate(&self) -> Result<()> {
        let refused = |name, got: String, expected| Err(DataError::Config { name, got, expected });
        let size = self.vocab_size;
        if size >= super::MAX_VOCAB_SIZE as usize {
            return refused("vocab_size", size.to_string(), "less than 2^24");
        }
        let least = self.layout.count(self.pieces());
        match (self.algorithm, self.layout) {
            (Algorithm::Bpe, TokenLayout::EndOfText) if size < least + 256 => refused(
                "vocab_size",
                size.to_string(),
                "at least 257 (the 256 bytes and the end of a document)",
            ),
            (Algorithm::Bpe, TokenLayout::Camembert) if size < least + 256 => {
                refused("vocab_size", size.to_string(), "at least 264 (the 256 bytes and 8 special tokens)")
            }
            (Algorithm::Unigram, _) if size < least + 2 => {
                refused("vocab_size", size.to_string(), "room for the special tokens and some characters")
            }
            _ if !(0.9..=1.0).contains(&self.character_coverage) => {
                refused("character_coverage", self.character_coverage.to_string(), "a number from 0.9 to 1")
            }
            _ => Ok(()),
        }
    }

    fn pieces(&self) -> Pieces {
        match self.algorithm {
            Algorithm::Bpe => Pieces::Bytes,
            Algorithm::Unigram => Pieces::Characters,
        }
    }

    /// A `tokenizer.json` with this model.
    fn json(&self, vocab_size: usize, added: bool, model: &Value) -> Value {
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let metaspace =
            json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
        let (normalizer, words, mut around) = match self.algorithm {
            Algorithm::Bpe => (Value::Null, byte_level.clone(), byte_level),
            // SentencePiece's nmt_nfkc, and single spaces.
            Algorithm::Unigram => (
                json!({"type": "Sequence", "normalizers": [
                    {"type": "Nmt"},
                    {"type": "NFKC"},
                    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
                ]}),
                metaspace.clone(),
                Value::Null,
            ),
        };
        let decoder = if around.is_null() { metaspace } else { around.clone() };
        if self.layout != TokenLayout::EndOfText {
            around = self.layout.post_processor();
        }
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": if added { self.layout.added_tokens(self.pieces(), vocab_size) } else { json!([]) },
            "normalizer": normalizer,
            "pre_tokenizer": words,
            "post_processor": around,
            "decoder": decoder,
            "model": model,
        })
    }

    /// A tokenizer without a vocabulary, which makes words of a text.
    pub(super) fn skeleton(&self) -> Result<Tokenizer> {
        let model = json!({"type": "WordLevel", "vocab": {"<unk>": 0}, "unk_token": "<unk>"});
        let mut json = self.json(1, false, &model);
        if let Some(post_processor) = json.get_mut("post_processor") {
            *post_processor = Value::Null;
        }
        serde_json::from_value(json)
            .map_err(|error| DataError::Tokenizer { action: "train", problem: one_line(error) })
    }
}

/// How far a training is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TrainProgress {
    /// Words are being counted.
    Counting {
        /// Documents so far.
        documents: u64,
        /// Bytes of text so far.
        bytes: u64,
    },
    /// Pairs are being merged (BPE).
    Merging {
        /// Tokens so far.
        tokens: usize,
        /// Tokens at the end, unless the text has no more pairs.
        vocab_size: usize,
    },
    /// Strings are being weighed (Unigram): the long part, which cannot be looked into.
    Weighing {
        /// The number of different words.
        words: usize,
    },
}

impl TextTokenizer {
    /// Trains a tokenizer on `documents`, and tells `progress` from time to time how far it is.
    ///
    /// The same text gives the same tokenizer, whatever the number of threads. The documents are read once and not
    /// kept. What is kept is their different words with counts: of more than 2 million (half a million with Unigram) the
    /// rarest are forgotten, so that the memory has a bound however much text there is.
    ///
    /// # Errors
    ///
    /// The first error of the iterator, those of [`TrainConfig::validate`], or [`DataError::Tokenizer`] where there
    /// is no text, or where a Unigram vocabulary has no room for the text's characters.
    ///
    /// # Examples
    ///
    /// ```
    /// use vesper_data::TextTokenizer;
    /// use vesper_data::tokenizer::TrainConfig;
    ///
    /// let text = "the cat and the dog and the bird. ".repeat(20);
    /// let config = TrainConfig::default().with_vocab_size(270);
    /// let tokenizer = TextTokenizer::train([Ok(&text)], &config, |_progress| {})?;
    /// assert_eq!(tokenizer.decode(&tokenizer.encode(&text)?)?, text); // byte-level BPE loses nothing
    /// # Ok::<(), vesper_data::DataError>(())
    /// ```
    ///
    /// # References
    ///
    /// BPE: Sennrich, Haddow, Birch 2016, <https://arxiv.org/abs/1508.07909>; byte-level: Radford et al. 2019 (GPT-2).
    /// Unigram: Kudo 2018, <https://arxiv.org/abs/1804.10959>. CamemBERT: Martin et al. 2020,
    /// <https://arxiv.org/abs/1911.03894>.
    pub fn train<I, T>(
        documents: I,
        config: &TrainConfig,
        mut progress: impl FnMut(TrainProgress),
    ) -> Result<Self>
    where
        I: IntoIterator<Item = Result<T>>,
        T: AsRef<str>,
    {
        config.validate()?;
        let failed = |problem| DataError::Tokenizer { action: "train", problem };
        let skeleton = config.skeleton()?;
        let pieces = config.pieces();
        let (vocab_size, model) = match config.algorithm {
            Algorithm::Bpe => {
                let counter = Counter::new(&skeleton, Segments::ByteLevel, BPE_WORDS);
                let words = counter.count(documents, &mut progress)?;
                let bpe = bpe::train(&words, config.vocab_size, config.layout, &mut progress);
                (bpe.vocab_size(), bpe.to_json())
            }
            Algorithm::Unigram => {
                let counter = Counter::new(&skeleton, Segments::SentencePiece, UNIGRAM_WORDS);
                let words = counter.count(documents, &mut progress)?;
                progress(TrainProgress::Weighing { words: words.len() });
                let room = config.vocab_size - config.layout.count(pieces);
                let scored = unigram::train(words, room, config.character_coverage)?;
                unigram::to_json(scored, config.layout)
            }
        };
        let json = config.json(vocab_size, true, &model);
        let inner = serde_json::from_value(json).map_err(|error| failed(one_line(error)))?;
        Self::new(inner, Map::new()).map_err(failed)
    }
}

//! The settings of generation, as `generation_config.json` stores them.

mod early_stopping;
mod stored;

use serde::Serialize;
use serde_json::{Map, Value};

pub use early_stopping::EarlyStopping;
pub(crate) use stored::OneOrMany;
use stored::Stored;

use crate::{ModelError, Result};

/// How to choose tokens and when to stop. Serialises as Hugging Face's `generation_config.json`.
///
/// A file may come from anywhere: fields that this crate does not use are kept as they are, and a field that is
/// absent (or null) has the meaning that Hugging Face gives it: `do_sample` false, `temperature` 1, `top_k` 50,
/// `top_p` 1, `repetition_penalty` 1, everything else off. [`Default`] is what suits small models instead; see the fields.
///
/// # Examples
/// ```
/// use vesper_model::generate::GenerationConfig;
///
/// let config: GenerationConfig = serde_json::from_str(r#"{"do_sample": true, "top_k": 5, "eos_token_id": 2}"#)?;
/// assert_eq!((config.top_k, config.eos_token_id.as_slice()), (5, &[2][..]));
/// assert!(config.with_temperature(0.0).is_greedy());
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(into = "Stored")]
pub struct GenerationConfig {
    /// Whether tokens are drawn at random; if not, the most probable one is taken. Default true.
    ///
    /// A temperature of 0 means the same as `false`, and is stored as `false`.
    pub do_sample: bool,
    /// Divides the logits: under 1 is safer, over 1 is wilder, 0 is greedy. Default 0.8.
    pub temperature: f64,
    /// Keeps this many of the most probable tokens; 0 keeps all. Default 50.
    pub top_k: usize,
    /// Keeps the smallest set of tokens that holds this much probability, in [0, 1]; 0 keeps the likeliest. Default 0.95.
    pub top_p: f64,
    /// Over 1 makes tokens that are already there less probable; 1 does nothing. Default 1.
    pub repetition_penalty: f64,
    /// Keeps the tokens that are at least this many times as probable as the likeliest, in [0, 1]; 0 keeps all. Default 0.
    pub min_p: f64,
    /// Keeps the tokens nearest to the typical surprise, until they hold this much probability, in (0, 1]; 1 keeps all.
    /// Default 1.
    pub typical_p: f64,
    /// Lowers the logit of a generated token by this for each time it was generated. Default 0. Not a Hugging Face field.
    pub frequency_penalty: f64,
    /// Lowers the logit of every generated token by this. Default 0. Not a Hugging Face field.
    pub presence_penalty: f64,
    /// Runs of this many tokens appear no second time; 0 allows them. Default 0.
    pub no_repeat_ngram_size: usize,
    /// Sequences of tokens that are not generated. Default none.
    pub bad_words_ids: Vec<Vec<u32>>,
    /// The tokens that every answer begins with. Default none. Not a Hugging Face field.
    pub forced_prefix: Vec<u32>,
    /// The fewest tokens to generate before the text may end. Default 0.
    pub min_new_tokens: usize,
    /// The most tokens to generate, the prompt not counted. Default 256.
    pub max_new_tokens: usize,
    /// The most tokens with the prompt; the smaller limit holds. Default none: as many as the model can remember.
    ///
    /// Hugging Face uses it only where there is no `max_new_tokens`. A file that has it alone is read as it is meant.
    pub max_length: Option<usize>,
    /// Texts that end the answer, and are no part of it; see [`StopStrings`](super::StopStrings). One that is a special token,
    /// which has no text in the answer, ends it at that token. Stored as one text or as a list. Default none. They need a
    /// tokenizer.
    pub stop_strings: Vec<String>,
    /// How many continuations [`beam_search`](super::beam_search) follows side by side; nothing else reads it. Default 1.
    pub num_beams: usize,
    /// Over 0 beam search favours long continuations, under 0 short ones: their log-probability is divided by
    /// `length^length_penalty`. Default 1.
    pub length_penalty: f64,
    /// When beam search has found enough. Default [`EarlyStopping::WhenUnlikely`].
    pub early_stopping: EarlyStopping,
    /// How many continuations [`beam_search`](super::beam_search) gives, at most `num_beams`. Default 1.
    pub num_return_sequences: usize,
    /// Seeds the draws: the same seed and logits give the same tokens. Default 0. Not a Hugging Face field.
    pub seed: u64,
    /// The token that begins a document; begins an empty prompt. Default none.
    pub bos_token_id: Option<u32>,
    /// The tokens that end the text, each of them. Stored as one number or as a list. Default none.
    pub eos_token_id: Vec<u32>,
    /// The fields of a file that this crate does not use, such as `pad_token_id`: nothing reads them, and they are written
    /// again as they were. Default none.
    pub other: Map<String, Value>,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self {
            do_sample: true,
            temperature: 0.8,
            top_k: 50,
            top_p: 0.95,
            repetition_penalty: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            no_repeat_ngram_size: 0,
            bad_words_ids: Vec::new(),
            forced_prefix: Vec::new(),
            min_new_tokens: 0,
            max_new_tokens: MAX_NEW_TOKENS,
            max_length: None,
            stop_strings: Vec::new(),
            num_beams: 1,
            length_penalty: 1.0,
            early_stopping: EarlyStopping::default(),
            num_return_sequences: 1,
            seed: 0,
            bos_token_id: None,
            eos_token_id: Vec::new(),
            other: Map::new(),
        }
    }
}

const MAX_NEW_TOKENS: usize = 256;

impl GenerationConfig {
    /// The defaults, but greedy.
    pub fn greedy() -> Self {
        Self { do_sample: false, ..Self::default() }
    }

    /// Sets the temperature; 0 is greedy, anything else samples.
    pub fn with_temperature(mut self, temperature: f64) -> Self {
        self.do_sample = temperature != 0.0;
        self.temperature = temperature;
        self
    }

    /// Sets how many of the most probable tokens are kept; 0 keeps all.
    pub fn with_top_k(mut self, k: usize) -> Self {
        self.top_k = k;
        self
    }

    /// Sets the probability that the kept tokens must hold.
    pub fn with_top_p(mut self, p: f64) -> Self {
        self.top_p = p;
        self
    }

    /// Sets the penalty of tokens that are already there.
    pub fn with_repetition_penalty(mut self, penalty: f64) -> Self {
        self.repetition_penalty = penalty;
        self
    }

    /// Sets the share of the likeliest token's probability that a token must have; 0 keeps all.
    pub fn with_min_p(mut self, p: f64) -> Self {
        self.min_p = p;
        self
    }

    /// Sets the probability that typical tokens must hold; 1 keeps all.
    pub fn with_typical_p(mut self, p: f64) -> Self {
        self.typical_p = p;
        self
    }

    /// Sets what each time a token was generated takes from its logit.
    pub fn with_frequency_penalty(mut self, penalty: f64) -> Self {
        self.frequency_penalty = penalty;
        self
    }

    /// Sets what a token's being generated already takes from its logit.
    pub fn with_presence_penalty(mut self, penalty: f64) -> Self {
        self.presence_penalty = penalty;
        self
    }

    /// Sets the length of the runs that appear no second time; 0 allows them.
    pub fn with_no_repeat_ngram_size(mut self, n: usize) -> Self {
        self.no_repeat_ngram_size = n;
        self
    }

    /// Sets the sequences of tokens that are not generated.
    pub fn with_bad_words(mut self, words: impl IntoIterator<Item = Vec<u32>>) -> Self {
        self.bad_words_ids = words.into_iter().collect();
        self
    }

    /// Sets the tokens that every answer begins with.
    pub fn with_forced_prefix(mut self, ids: impl IntoIterator<Item = u32>) -> Self {
        self.forced_prefix = ids.into_iter().collect();
        self
    }

    /// Sets the fewest tokens to generate before the text may end.
    pub fn with_min_new_tokens(mut self, tokens: usize) -> Self {
        self.min_new_tokens = tokens;
        self
    }

    /// Sets the most tokens to generate.
    pub fn with_max_new_tokens(mut self, tokens: usize) -> Self {
        self.max_new_tokens = tokens;
        self
    }

    /// Sets the most tokens with the prompt.
    pub fn with_max_length(mut self, tokens: Option<usize>) -> Self {
        self.max_length = tokens;
        self
    }

    /// Sets the texts that end the answer.
    pub fn with_stop_strings<S: Into<String>>(mut self, stops: impl IntoIterator<Item = S>) -> Self {
        self.stop_strings = stops.into_iter().map(Into::into).collect();
        self
    }

    /// Sets how many continuations beam search follows.
    pub fn with_beams(mut self, beams: usize) -> Self {
        self.num_beams = beams;
        self
    }

    /// Sets what beam search divides log-probabilities by: the length to this power.
    pub fn with_length_penalty(mut self, penalty: f64) -> Self {
        self.length_penalty = penalty;
        self
    }

    /// Sets when beam search has found enough.
    pub fn with_early_stopping(mut self, early_stopping: EarlyStopping) -> Self {
        self.early_stopping = early_stopping;
        self
    }

    /// Sets how many continuations beam search gives.
    pub fn with_return_sequences(mut self, sequences: usize) -> Self {
        self.num_return_sequences = sequences;
        self
    }

    /// Sets the seed of the draws.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets the token that begins a document.
    pub fn with_bos(mut self, id: Option<u32>) -> Self {
        self.bos_token_id = id;
        self
    }

    /// Sets the tokens that end the text.
    pub fn with_eos(mut self, ids: impl IntoIterator<Item = u32>) -> Self {
        self.eos_token_id = ids.into_iter().collect();
        self
    }

    /// Whether the most probable token is always taken.
    pub fn is_greedy(&self) -> bool {
        !self.do_sample || self.temperature == 0.0
    }

    /// The most tokens of a sequence whose prompt has this many, prompt included.
    pub(crate) fn limit(&self, prompt: usize) -> usize {
        prompt.saturating_add(self.max_new_tokens).min(self.max_length.unwrap_or(usize::MAX))
    }

    /// Checks every setting against its range.
    ///
    /// # Errors
    /// [`ModelError::InvalidGeneration`] names the setting, its value and the range.
    pub fn validate(&self) -> Result<()> {
        let bad = |field, got: f64, expected| {
            Err(ModelError::InvalidGeneration { field, got: got.to_string(), expected })
        };
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return bad("temperature", self.temperature, "0 (greedy) or a positive number");
        }
        if !(0.0..=1.0).contains(&self.top_p) {
            return bad("top_p", self.top_p, "a number from 0 to 1");
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            return bad("repetition_penalty", self.repetition_penalty, "a positive number");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return bad("min_p", self.min_p, "a number from 0 to 1");
        }
        if !(self.typical_p > 0.0 && self.typical_p <= 1.0) {
            return bad("typical_p", self.typical_p, "a number over 0 and up to 1");
        }
        for (field, penalty) in [
            ("frequency_penalty", self.frequency_penalty),
            ("presence_penalty", self.presence_penalty),
            ("length_penalty", self.length_penalty),
        ] {
            if !penalty.is_finite() {
                return bad(field, penalty, "a finite number");
            }
        }
        for (field, count) in
            [("num_beams", self.num_beams), ("num_return_sequences", self.num_return_sequences)]
        {
            if count == 0 {
                return bad(field, 0.0, "at least 1");
            }
        }
        if self.bad_words_ids.iter().any(Vec::is_empty) {
            return Err(ModelError::InvalidGeneration {
                field: "bad_words_ids",
                got: "an empty list".into(),
                expected: "lists of at least one token",
            });
        }
        if self.stop_strings.iter().any(String::is_empty) {
            return Err(super::stop::empty_stop());
        }
        if self.min_new_tokens > self.max_new_tokens {
            return Err(ModelError::InvalidGeneration {
                field: "min_new_tokens",
                got: self.min_new_tokens.to_string(),
                expected: "at most max_new_tokens",
            });
        }
        Ok(())
    }
}

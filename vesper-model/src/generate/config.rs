//! The settings of generation, as `generation_config.json` stores them.

use serde::{Deserialize, Serialize};

use crate::{ModelError, Result};

/// How to choose tokens and when to stop. Serialises as Hugging Face's `generation_config.json`.
///
/// A file may come from anywhere: fields that this crate does not use are ignored, and a field that is
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "Stored", into = "Stored")]
pub struct GenerationConfig {
    /// Whether tokens are drawn at random; if not, the most probable one is taken. Default true.
    ///
    /// A temperature of 0 means the same as `false`, and is stored as `false`.
    pub do_sample: bool,
    /// Divides the logits: under 1 is safer, over 1 is wilder, 0 is greedy. Default 0.8.
    pub temperature: f64,
    /// Keeps this many of the most probable tokens; 0 keeps all. Default 50.
    pub top_k: usize,
    /// Keeps the smallest set of tokens that holds this much probability, in (0, 1]. Default 0.95.
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
    /// Seeds the draws: the same seed and logits give the same tokens. Default 0. Not a Hugging Face field.
    pub seed: u64,
    /// The token that begins a document; begins an empty prompt. Default none.
    pub bos_token_id: Option<u32>,
    /// The tokens that end the text, each of them. Stored as one number or as a list. Default none.
    pub eos_token_id: Vec<u32>,
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
            seed: 0,
            bos_token_id: None,
            eos_token_id: Vec::new(),
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
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return bad("top_p", self.top_p, "a number over 0 and up to 1");
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
        for (field, penalty) in
            [("frequency_penalty", self.frequency_penalty), ("presence_penalty", self.presence_penalty)]
        {
            if !penalty.is_finite() {
                return bad(field, penalty, "a finite number");
            }
        }
        if self.bad_words_ids.iter().any(Vec::is_empty) {
            return Err(ModelError::InvalidGeneration {
                field: "bad_words_ids",
                got: "an empty list".into(),
                expected: "lists of at least one token",
            });
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

/// The fields as the file has them.
#[derive(Serialize, Deserialize)]
struct Stored {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bad_words_ids: Option<Vec<Vec<u32>>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bos_token_id: Option<u32>,
    #[serde(default)]
    do_sample: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    eos_token_id: Option<OneOrMany>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    forced_prefix: Option<Vec<u32>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    frequency_penalty: Option<f64>,
    #[serde(default)]
    max_new_tokens: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    min_new_tokens: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    min_p: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    no_repeat_ngram_size: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    presence_penalty: Option<f64>,
    #[serde(default)]
    repetition_penalty: Option<f64>,
    #[serde(default)]
    seed: Option<u64>,
    #[serde(default)]
    temperature: Option<f64>,
    #[serde(default)]
    top_k: Option<usize>,
    #[serde(default)]
    top_p: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    typical_p: Option<f64>,
}

/// A token id or a list of them, as Hugging Face writes `eos_token_id`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a token id must be a whole number from 0 to 4294967295, or a list of such")]
pub(crate) enum OneOrMany {
    One(u32),
    Many(Vec<u32>),
}

impl From<OneOrMany> for Vec<u32> {
    fn from(ids: OneOrMany) -> Self {
        match ids {
            OneOrMany::One(id) => vec![id],
            OneOrMany::Many(ids) => ids,
        }
    }
}

impl From<Stored> for GenerationConfig {
    fn from(stored: Stored) -> Self {
        Self {
            do_sample: stored.do_sample.unwrap_or(false),
            temperature: stored.temperature.unwrap_or(1.0),
            top_k: stored.top_k.unwrap_or(50),
            top_p: stored.top_p.unwrap_or(1.0),
            repetition_penalty: stored.repetition_penalty.unwrap_or(1.0),
            min_p: stored.min_p.unwrap_or(0.0),
            typical_p: stored.typical_p.unwrap_or(1.0),
            frequency_penalty: stored.frequency_penalty.unwrap_or(0.0),
            presence_penalty: stored.presence_penalty.unwrap_or(0.0),
            no_repeat_ngram_size: stored.no_repeat_ngram_size.unwrap_or(0),
            bad_words_ids: stored.bad_words_ids.unwrap_or_default(),
            forced_prefix: stored.forced_prefix.unwrap_or_default(),
            min_new_tokens: stored.min_new_tokens.unwrap_or(0),
            max_new_tokens: stored.max_new_tokens.unwrap_or(MAX_NEW_TOKENS),
            seed: stored.seed.unwrap_or(0),
            bos_token_id: stored.bos_token_id,
            eos_token_id: stored.eos_token_id.map(Vec::from).unwrap_or_default(),
        }
    }
}

impl From<GenerationConfig> for Stored {
    fn from(config: GenerationConfig) -> Self {
        let sample = !config.is_greedy();
        // What is off is left out.
        let unless = |off: f64, value: f64| (value != off).then_some(value);
        let positive = |value: usize| (value > 0).then_some(value);
        Self {
            bad_words_ids: (!config.bad_words_ids.is_empty()).then_some(config.bad_words_ids),
            forced_prefix: (!config.forced_prefix.is_empty()).then_some(config.forced_prefix),
            frequency_penalty: unless(0.0, config.frequency_penalty),
            presence_penalty: unless(0.0, config.presence_penalty),
            min_p: unless(0.0, config.min_p),
            typical_p: unless(1.0, config.typical_p),
            min_new_tokens: positive(config.min_new_tokens),
            no_repeat_ngram_size: positive(config.no_repeat_ngram_size),
            bos_token_id: config.bos_token_id,
            do_sample: Some(sample),
            eos_token_id: match config.eos_token_id.as_slice() {
                [] => None,
                &[id] => Some(OneOrMany::One(id)),
                ids => Some(OneOrMany::Many(ids.to_vec())),
            },
            max_new_tokens: Some(config.max_new_tokens),
            repetition_penalty: Some(config.repetition_penalty),
            seed: Some(config.seed),
            temperature: Some(config.temperature),
            top_k: Some(config.top_k),
            top_p: Some(config.top_p),
        }
    }
}

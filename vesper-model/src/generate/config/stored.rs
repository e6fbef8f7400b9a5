//! The fields as `generation_config.json` has them.

use serde::de::{Deserializer, Error as _};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{EarlyStopping, GenerationConfig, MAX_NEW_TOKENS};

/// The fields as the file has them.
#[derive(Serialize, Deserialize)]
pub(super) struct Stored {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bad_words_ids: Option<Vec<Vec<u32>>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    bos_token_id: Option<u32>,
    #[serde(default)]
    do_sample: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    early_stopping: Option<EarlyStopping>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    eos_token_id: Option<OneOrMany>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    forced_prefix: Option<Vec<u32>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    frequency_penalty: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    length_penalty: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_length: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_new_tokens: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    min_new_tokens: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    min_p: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    no_repeat_ngram_size: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    num_beams: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    num_return_sequences: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    presence_penalty: Option<f64>,
    #[serde(default)]
    repetition_penalty: Option<f64>,
    #[serde(default)]
    seed: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    stop_strings: Option<Texts>,
    #[serde(default)]
    temperature: Option<f64>,
    #[serde(default)]
    top_k: Option<usize>,
    #[serde(default)]
    top_p: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    typical_p: Option<f64>,
    #[serde(flatten)]
    other: Map<String, Value>,
}

impl<'de> Deserialize<'de> for GenerationConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let fields: Map<String, Value> = Map::deserialize(deserializer)?;
        Stored::deserialize(Value::Object(fields.clone()))
            .map(Self::from)
            .map_err(|error| D::Error::custom(wrong_field(&fields).unwrap_or_else(|| error.to_string())))
    }
}

/// Which field is wrong, and how: none of them needs another.
fn wrong_field(fields: &Map<String, Value>) -> Option<String> {
    fields.iter().find_map(|(key, value)| {
        let alone = Map::from_iter([(key.clone(), value.clone())]);
        let error = Stored::deserialize(Value::Object(alone)).err()?;
        Some(format!("{key} is {value}: {error}"))
    })
}

/// A text or a list of them, as Hugging Face writes `stop_strings`.
#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "stop_strings must be a text or a list of texts")]
enum Texts {
    One(String),
    Many(Vec<String>),
}

impl From<Texts> for Vec<String> {
    fn from(texts: Texts) -> Self {
        match texts {
            Texts::One(text) => vec![text],
            Texts::Many(texts) => texts,
        }
    }
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
            // No answer is longer than the whole. Where neither is said, one of the length that is asked for has room.
            max_new_tokens: stored
                .max_new_tokens
                .or(stored.max_length)
                .unwrap_or(MAX_NEW_TOKENS.max(stored.min_new_tokens.unwrap_or(0))),
            max_length: stored.max_length,
            stop_strings: stored.stop_strings.map(Vec::from).unwrap_or_default(),
            num_beams: stored.num_beams.unwrap_or(1),
            length_penalty: stored.length_penalty.unwrap_or(1.0),
            early_stopping: stored.early_stopping.unwrap_or_default(),
            num_return_sequences: stored.num_return_sequences.unwrap_or(1),
            seed: stored.seed.unwrap_or(0),
            bos_token_id: stored.bos_token_id,
            eos_token_id: stored.eos_token_id.map(Vec::from).unwrap_or_default(),
            other: stored.other,
        }
    }
}

impl From<GenerationConfig> for Stored {
    fn from(config: GenerationConfig) -> Self {
        let sample = !config.is_greedy();
        // What is off is left out.
        let unless = |off: f64, value: f64| (value != off).then_some(value);
        let unless_one = |value: usize| (value != 1).then_some(value);
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
            num_beams: unless_one(config.num_beams),
            length_penalty: unless(1.0, config.length_penalty),
            early_stopping: (config.early_stopping != EarlyStopping::default())
                .then_some(config.early_stopping),
            num_return_sequences: unless_one(config.num_return_sequences),
            bos_token_id: config.bos_token_id,
            do_sample: Some(sample),
            eos_token_id: match config.eos_token_id.as_slice() {
                [] => None,
                &[id] => Some(OneOrMany::One(id)),
                ids => Some(OneOrMany::Many(ids.to_vec())),
            },
            max_length: config.max_length,
            // Hugging Face lets it override the length of the whole, from which it follows here.
            max_new_tokens: (config.max_length != Some(config.max_new_tokens))
                .then_some(config.max_new_tokens),
            repetition_penalty: Some(config.repetition_penalty),
            seed: Some(config.seed),
            stop_strings: (!config.stop_strings.is_empty()).then_some(Texts::Many(config.stop_strings)),
            temperature: Some(config.temperature),
            top_k: Some(config.top_k),
            top_p: Some(config.top_p),
            other: config.other,
        }
    }
}

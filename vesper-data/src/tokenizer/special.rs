//! Which tokens begin and end a text.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::Tokenizer;

use crate::error::{DataError, Result, one_line};

/// Names of the token that ends a text, the more telling ones first.
const EOS_NAMES: [&str; 10] = [
    "<|endoftext|>",
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "[EOS]",
    "<EOS>",
    "[SEP]",
];

/// Names of the token that begins a text, the more telling ones first.
const BOS_NAMES: [&str; 9] = [
    "<s>",
    "<bos>",
    "<|begin_of_text|>",
    "<|startoftext|>",
    "<|im_start|>",
    "[BOS]",
    "<BOS>",
    "[CLS]",
    "<|endoftext|>",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SpecialTokens {
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
}

impl SpecialTokens {
    /// What the configuration names, or else the first well-known name in the vocabulary.
    pub(super) fn find(tokenizer: &Tokenizer, config: &Map<String, Value>) -> Self {
        let find = |key: &str, names: &[&str]| {
            let configured =
                config.get(key).and_then(token_name).and_then(|name| tokenizer.token_to_id(name));
            configured.or_else(|| names.iter().find_map(|name| tokenizer.token_to_id(name)))
        };
        Self { bos: find("bos_token", &BOS_NAMES), eos: find("eos_token", &EOS_NAMES) }
    }
}

/// A token is written as its name or as an object with the name in "content".
fn token_name(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}

/// The `tokenizer_config.json` beside a tokenizer; empty where there is none.
pub(super) fn read_config(tokenizer: &Path) -> Result<Map<String, Value>> {
    let path = tokenizer.with_file_name("tokenizer_config.json");
    let bytes = match std::fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Map::new()),
        Err(error) => return Err(DataError::io("read", &path, error)),
    };
    serde_json::from_slice(&bytes).map_err(|error| DataError::TokenizerFile {
        path,
        problem: format!("expected a JSON object, got: {}", one_line(error)),
    })
}

/// Checks that each added token has the id that the file gives it: `tokenizers` numbers them itself, and a
/// model trained with the file's ids would silently see other tokens.
pub(super) fn check_added_ids(file: &[u8], tokenizer: &Tokenizer) -> Result<(), String> {
    #[derive(Deserialize)]
    struct File {
        #[serde(default)]
        added_tokens: Vec<Added>,
    }
    #[derive(Deserialize)]
    struct Added {
        id: u32,
        content: String,
    }
    let file: File = serde_json::from_slice(file).map_err(one_line)?;
    for Added { id, content } in file.added_tokens {
        let now = tokenizer.token_to_id(&content);
        if now != Some(id) && !content.is_empty() {
            let now = now.map_or("none".to_owned(), |now| now.to_string());
            return Err(format!(
                "the added token {content:?} has id {id}, expected {now} (ids without a gap)"
            ));
        }
    }
    Ok(())
}

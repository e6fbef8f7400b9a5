//! `generation_config.json`.

use std::path::Path;

use serde::Deserialize;

use super::{CONFIG, GENERATION_CONFIG, invalid, read_json};
use crate::generate::{GenerationConfig, OneOrMany};
use crate::{ModelError, Result};

/// Reads how the model in `dir` is meant to generate.
///
/// Without a `generation_config.json`: [`GenerationConfig::default`]. The tokens that begin and end a text are those
/// of `config.json` where the file names none.
///
/// # Errors
/// [`ModelError::Io`] when a file cannot be read; [`ModelError::InvalidFile`] names the setting, its value and
/// what was expected.
///
/// # Examples
/// ```
/// let dir = tempfile::tempdir()?;
/// std::fs::write(dir.path().join("config.json"), r#"{"eos_token_id": 2}"#)?;
/// std::fs::write(dir.path().join("generation_config.json"), r#"{"do_sample": true, "top_k": 20}"#)?;
/// let generation = vesper_model::hf::read_generation_config(dir.path())?;
/// assert_eq!((generation.top_k, generation.eos_token_id), (20, vec![2]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn read_generation_config(dir: impl AsRef<Path>) -> Result<GenerationConfig> {
    /// The fields of `config.json` that matter here; the file may be anyone's.
    #[derive(Deserialize)]
    struct Tokens {
        bos_token_id: Option<u32>,
        eos_token_id: Option<OneOrMany>,
    }
    let path = dir.as_ref().join(GENERATION_CONFIG);
    let mut generation = match read_json(&path) {
        Err(ModelError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            GenerationConfig::default()
        }
        read => read?,
    };
    let tokens: Tokens = read_json(&dir.as_ref().join(CONFIG))?;
    generation.bos_token_id = generation.bos_token_id.or(tokens.bos_token_id);
    if generation.eos_token_id.is_empty() {
        generation.eos_token_id = tokens.eos_token_id.map(Vec::from).unwrap_or_default();
    }
    generation.validate().map_err(|error| match error {
        ModelError::InvalidGeneration { field, got, expected } => {
            invalid(&path, format!("{field} is {got}, expected {expected}"))
        }
        other => other,
    })?;
    Ok(generation)
}

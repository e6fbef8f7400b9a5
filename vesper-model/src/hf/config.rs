//! `config.json`: ours strictly, Llama's by translation.

use std::path::Path;

use era_act::Activation;
use serde_json::{Map, Value};

use super::{CONFIG, invalid, llama, read_json};
use crate::{ModelError, Result, VesperConfig};

/// Reads the configuration of the model in `dir`.
///
/// A `config.json` of `model_type` `vesper` must have the fields of [`VesperConfig`] and no others. One of
/// `llama` or `mistral` is translated: absent fields get the defaults that `transformers` gives them, fields that
/// only inform are ignored, and whatever would change the mathematics (scaled rotary angles, biases, a sliding
/// window, quantised weights) is refused by name.
///
/// # Errors
/// [`ModelError::Io`] when the file cannot be read; [`ModelError::InvalidFile`] names the field, what it is and what
/// was expected.
///
/// # Examples
/// ```
/// let dir = tempfile::tempdir()?;
/// std::fs::write(
///     dir.path().join("config.json"),
///     r#"{"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 172,
///         "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4}"#,
/// )?;
/// let config = vesper_model::hf::read_config(dir.path())?;
/// assert_eq!((config.head_dim, config.rope_theta), (8, 10_000.0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn read_config(dir: impl AsRef<Path>) -> Result<VesperConfig> {
    let path = dir.as_ref().join(CONFIG);
    let fields: Map<String, Value> = read_json(&path)?;
    let config = match fields.get("model_type") {
        Some(Value::String(kind)) if kind == "vesper" => read_json::<VesperConfig>(&path)?,
        Some(Value::String(kind)) if kind == "llama" || kind == "mistral" => {
            llama::translate(&path, kind, &fields)?
        }
        Some(other) => {
            return Err(invalid(&path, format!("model_type is {other}, expected vesper, llama or mistral")));
        }
        None => return Err(invalid(&path, "no model_type, expected vesper, llama or mistral")),
    };
    // The file is to blame, not the caller's settings.
    config.validate().map_err(|error| match error {
        ModelError::InvalidConfig { field, got, expected } => {
            invalid(&path, format!("{field} is {got}, expected {expected}"))
        }
        other => other,
    })?;
    Ok(config)
}

/// The text of `config.json`. A model that `transformers` can run is described as its Llama.
///
/// `dtype` is that of the weights, as `transformers` names it: `float32`.
pub(super) fn render(config: &VesperConfig, dtype: &str) -> Result<String, serde_json::Error> {
    let value = if is_llama(config) { llama::describe(config, dtype) } else { serde_json::to_value(config)? };
    Ok(serde_json::to_string_pretty(&value)? + "\n")
}

fn is_llama(config: &VesperConfig) -> bool {
    config.hidden_act == Activation::Silu && config.adapter.is_none()
}

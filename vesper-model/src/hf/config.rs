//! `config.json`: ours strictly, Llama's by translation.

use std::path::Path;

use era_act::Activation;
use serde_json::{Map, Value};

use super::llama::Family;
use super::python::{AUTO_MAP, auto_map};
use super::{CONFIG, invalid, llama, read_json};
use crate::{ModelError, Result, VesperConfig};

/// The `model_type` of a VesperLM.
pub(super) const MODEL_TYPE: &str = "vesper";

/// Reads the configuration of the model in `dir`.
///
/// A `config.json` of `model_type` `vesper` must have the fields of [`VesperConfig`] and no others, unless `transformers`
/// wrote it. One that it wrote, and one of `llama` or `mistral`, is translated: absent fields get the defaults that `transformers` gives them, fields that
/// only inform are ignored, and whatever would change the mathematics (rotary angles that are not scaled as
/// [`RopeScaling`](crate::ops::RopeScaling) says, biases, a sliding window, quantised weights) is refused by name.
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
        Some(Value::String(kind)) => match kind.as_str() {
            MODEL_TYPE if !fields.contains_key("transformers_version") => ours(&path, fields)?,
            MODEL_TYPE => llama::translate(&path, Family::Vesper, &fields)?,
            "llama" => llama::translate(&path, Family::Llama, &fields)?,
            "mistral" => llama::translate(&path, Family::Mistral, &fields)?,
            other => {
                let reason = format!("model_type is {other:?}, expected vesper, llama or mistral");
                return Err(invalid(&path, reason));
            }
        },
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

/// The configuration that [`render`] wrote.
fn ours(path: &Path, mut fields: Map<String, Value>) -> Result<VesperConfig> {
    fields.remove(AUTO_MAP);
    let read = serde_json::from_value(fields.clone().into());
    read.map_err(|error| invalid(path, wrong_field(&fields).unwrap_or_else(|| error.to_string())))
}

/// Which field is wrong, and how: the one that spoils a good configuration. None where one is missing.
fn wrong_field(fields: &Map<String, Value>) -> Option<String> {
    let good = serde_json::to_value(VesperConfig::preset("nano").ok()?).ok()?;
    fields.iter().find_map(|(key, value)| {
        let mut config = good.clone();
        config[key] = value.clone();
        let error = serde_json::from_value::<VesperConfig>(config).err()?;
        Some(format!("{key} is {value}: {error}"))
    })
}

/// The text of `config.json`. A model that `transformers` can run is described as its Llama.
///
/// `dtype` is that of the weights, as `transformers` names it: `float32`. `python`: whether its classes lie beside it.
pub(super) fn render(config: &VesperConfig, dtype: &str, python: bool) -> Result<String, serde_json::Error> {
    let mut value =
        if is_llama(config) { llama::describe(config, dtype) } else { serde_json::to_value(config)? };
    if python {
        value[AUTO_MAP] = auto_map();
    }
    Ok(serde_json::to_string_pretty(&value)? + "\n")
}

/// Whether `transformers` knows the model without our classes.
pub(super) fn is_llama(config: &VesperConfig) -> bool {
    config.hidden_act == Activation::Silu && config.adapter.is_none()
}

//! Hugging Face directories: reading and writing `config.json`, `model.safetensors` and what belongs to them.
//!
//! On disk the weights have Llama's names and shapes, one tensor a projection. In memory the projections that
//! read the same input are packed into one, so that they are one matrix product:
//!
//! | in memory | shape | on disk |
//! |---|---|---|
//! | `model.layers.{i}.self_attn.qkv_proj.weight` | `((heads + 2 kv_heads) head_dim, hidden)` | rows of `q_proj`, `k_proj`, `v_proj` |
//! | `model.layers.{i}.mlp.gate_up_proj.weight` | `(2 ffn, hidden)` | rows of `gate_proj`, `up_proj` |
//!
//! All other names are the same in both. A checkpoint of `transformers` with `model_type` `llama` or `mistral`
//! loads as it is, and a model with SiLU and without adapters is saved as one that `transformers` loads. For all others
//! [`write_python`] puts the classes beside the weights that `transformers` needs.

mod config;
mod fields;
mod generation;
pub(crate) mod header;
pub(crate) mod layout;
mod llama;
mod load;
mod python;
mod rope;
mod save;
mod staging;
mod tokenizer;
pub(crate) mod write;

pub use config::read_config;
pub use generation::read_generation_config;
pub use load::read_weights;
pub use python::write_python;
pub use save::{Extras, save};
pub(crate) use tokenizer::whole;
pub use tokenizer::{check_tokenizer, read_tokenizer, vocab_limit};

use std::path::Path;

use crate::{ModelError, Result};

/// The model's configuration.
pub(crate) const CONFIG: &str = "config.json";
/// The settings of generation.
pub(crate) const GENERATION_CONFIG: &str = "generation_config.json";
/// The weights, where they are in one file.
pub(crate) const WEIGHTS: &str = "model.safetensors";
/// Which file each weight is in, where they are in several.
pub(crate) const WEIGHTS_INDEX: &str = "model.safetensors.index.json";
/// The tokenizer.
pub(crate) const TOKENIZER: &str = "tokenizer.json";
/// What `transformers` wants to know about the tokenizer.
pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> ModelError {
    let path = path.to_path_buf();
    move |source| ModelError::Io { path, source }
}

pub(crate) fn invalid(path: &Path, reason: impl Into<String>) -> ModelError {
    ModelError::InvalidFile { path: path.to_path_buf(), reason: reason.into() }
}

pub(crate) fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(io(path))?;
    String::from_utf8(bytes).map_err(|error| {
        invalid(path, format!("not UTF-8 text: invalid byte at offset {}", error.utf8_error().valid_up_to()))
    })
}

pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = read_text(path)?;
    serde_json::from_str(&text).map_err(|error| invalid(path, error.to_string()))
}

//! What `transformers` needs to load a VesperLM: two files of Python beside the weights, and a word in `config.json`.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::staging::Staging;
use super::{CONFIG, config, invalid, read_config, read_json, write};
use crate::{Result, VesperConfig};

/// The sources, by their names in a model's folder.
pub(super) const SOURCES: [(&str, &str); 2] = [
    ("configuration_vesper.py", include_str!("python/configuration_vesper.py")),
    ("modeling_vesper.py", include_str!("python/modeling_vesper.py")),
];

/// The field of `config.json` that names the classes in the sources.
pub(super) const AUTO_MAP: &str = "auto_map";

pub(super) fn auto_map() -> Value {
    json!({
        "AutoConfig": "configuration_vesper.VesperConfig",
        "AutoModelForCausalLM": "modeling_vesper.VesperForCausalLM",
    })
}

/// Puts Python beside the weights of a model, so that `transformers` loads it:
///
/// ```python
/// AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
/// ```
///
/// `configuration_vesper.py` and `modeling_vesper.py` are written, and `config.json` names their classes; each file is
/// renamed into place. The model in Python is `transformers`' own Llama with VesperLM's activation, so that `generate`,
/// the cache, the choice of attention and training work as they do there. [`Extras::python`](super::Extras) does the
/// same while a model is saved.
///
/// `false`, and nothing is written, where `transformers` knows the model already: a Llama or a Mistral.
///
/// # Errors
/// Those of [`read_config`], and [`ModelError::InvalidFile`](crate::ModelError::InvalidFile) for a model with adapters in
/// its own files, which are to be merged first; [`ModelError::Io`](crate::ModelError::Io) names the file that cannot be
/// written.
///
/// # Examples
/// ```
/// # use std::collections::HashMap;
/// # use vesper_model::candle_core::{DType, Device, Tensor};
/// # use vesper_model::{VesperConfig, VesperLM, candle_nn::VarMap};
/// use vesper_model::hf;
///
/// # let folder = tempfile::tempdir()?;
/// # let folder = folder.path();
/// # let config = VesperConfig::preset("nano")?.with_vocab(64);
/// # let model = VesperLM::initialize(&config, &VarMap::new(), 0, DType::F32, &Device::Cpu)?;
/// hf::save(folder, &config, &model.weights(), &hf::Extras::default())?;
/// assert!(hf::write_python(folder)?);
/// assert!(folder.join("modeling_vesper.py").is_file());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn write_python(dir: impl AsRef<Path>) -> Result<bool> {
    let dir = dir.as_ref();
    let path = dir.join(CONFIG);
    let model = read_config(dir)?;
    let mut fields: Map<String, Value> = read_json(&path)?;
    if !fields.get("model_type").is_some_and(|kind| kind == config::MODEL_TYPE) {
        return Ok(false);
    }
    refuse_adapters(&path, &model)?;
    fields.insert(AUTO_MAP.into(), auto_map());
    let text = serde_json::to_string_pretty(&fields).map_err(|error| invalid(&path, error.to_string()))?;
    let staging = Staging::beside(dir)?;
    let files = SOURCES.map(|(name, source)| (name, source.to_owned()));
    let files: Vec<(&str, String)> = files.into_iter().chain([(CONFIG, text + "\n")]).collect();
    for (name, text) in &files {
        staging.file(name, |path| write::text(path, text))?;
    }
    files.iter().try_for_each(|(name, _)| staging.rename(name))?;
    Ok(true)
}

/// `transformers` has no adapters inside a model.
pub(super) fn refuse_adapters(path: &Path, config: &VesperConfig) -> Result<()> {
    match &config.adapter {
        Some(_) => Err(invalid(path, "adapter: the model in Python has none, merge the adapters first")),
        None => Ok(()),
    }
}

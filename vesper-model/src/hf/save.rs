//! Writing a directory, so that a reader or a crash never meets half of it.

use std::collections::{BTreeSet, HashMap};
use std::hash::BuildHasher;
use std::path::Path;

use candle_core::{DType, Tensor};
use serde_json::json;

use super::layout::entries;
use super::staging::Staging;
use super::{
    CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, WEIGHTS, check_tokenizer, config, invalid,
    python, tokenizer, write,
};
use crate::generate::GenerationConfig;
use crate::{Result, VesperConfig};

/// What belongs to a model beside its configuration and weights.
#[derive(Debug, Clone, Default)]
pub struct Extras<'a> {
    /// The text of `tokenizer.json`. Absent: none is written, and one that is there stays.
    pub tokenizer_json: Option<&'a str>,
    /// How the model is meant to generate; tokens it does not name are taken from the configuration.
    pub generation: GenerationConfig,
    /// Whether to write Python beside the weights, as [`write_python`](super::write_python) does, where `transformers`
    /// needs it.
    pub python: bool,
}

/// Writes a model as a Hugging Face directory.
///
/// `weights` has the names and packed shapes of memory (see the [module](super)); what is written has Llama's.
/// A model with SiLU and without adapters is written as `LlamaForCausalLM`, which `transformers` loads; any
/// other as `model_type` `vesper`, which [`read_config`](super::read_config) reads. The same model gives the same
/// bytes.
///
/// Everything is first written to a temporary folder on the same disk and flushed, so a full disk leaves
/// an older model as it was. Then a new directory is renamed into place at once. In a directory that is there, each
/// file is renamed over the old one; where the configuration changes, the old `config.json` is taken away first and
/// the new one comes last. So at no time does a configuration stand beside weights that it does not describe, and
/// after a crash in between the directory has no `config.json` rather than a wrong one. Other files stay.
///
/// # Errors
/// [`ModelError::InvalidFile`](crate::ModelError::InvalidFile) for weights that do not fit `config` or a tokenizer
/// that cannot be read, and Python asked for beside adapters,
/// [`ModelError::TokenizerTooLarge`](crate::ModelError::TokenizerTooLarge) for one that does not
/// fit it, [`ModelError::InvalidConfig`](crate::ModelError::InvalidConfig) and
/// [`ModelError::InvalidGeneration`](crate::ModelError::InvalidGeneration) for settings out of range: all before
/// anything is written. [`ModelError::Io`](crate::ModelError::Io) names the file that cannot be written.
///
/// # Examples
/// ```
/// use std::collections::HashMap;
/// use vesper_model::candle_core::{DType, Device, Tensor};
/// use vesper_model::candle_nn::VarMap;
/// use vesper_model::{VesperConfig, VesperLM, hf};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let (config, varmap) = (VesperConfig::preset("nano")?.with_vocab(64), VarMap::new());
/// let model = VesperLM::initialize(&config, &varmap, 0, DType::F32, &Device::Cpu)?;
/// let weights: HashMap<String, Tensor> =
///     varmap.data().lock().unwrap().iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
/// let dir = tempfile::tempdir()?;
/// hf::save(dir.path(), &config, &weights, &hf::Extras::default())?;
/// assert_eq!(hf::read_config(dir.path())?, config);
/// let again = VesperLM::load(dir.path(), DType::F32, &Device::Cpu)?;
/// assert_eq!(again.config(), model.config());
/// # Ok(())
/// # }
/// ```
pub fn save<S: BuildHasher>(
    dir: impl AsRef<Path>,
    config: &VesperConfig,
    weights: &HashMap<String, Tensor, S>,
    extras: &Extras<'_>,
) -> Result<()> {
    let dir = dir.as_ref();
    let (unpacked, dtype) = unpack(dir, config, weights)?;
    let texts = texts(dir, config, dtype, extras)?;

    let staging = Staging::beside(dir)?;
    for (name, text) in &texts {
        staging.file(name, |path| write::text(path, text))?;
    }
    staging.file(WEIGHTS, |path| write::weights(path, unpacked))?;
    staging.install(&texts)
}

/// The tensors as they are on disk, and the dtype of the embedding.
fn unpack<S: BuildHasher>(
    dir: &Path,
    config: &VesperConfig,
    weights: &HashMap<String, Tensor, S>,
) -> Result<(Vec<(String, Tensor)>, DType)> {
    config.validate()?;
    let path = dir.join(WEIGHTS);
    let (mut unpacked, mut known, mut dtype) = (Vec::new(), BTreeSet::new(), None);
    for entry in entries(config) {
        let Some(tensor) = weights.get(&entry.name) else {
            return Err(invalid(&path, format!("the weights have no {}", entry.name)));
        };
        if tensor.dims() != entry.shape {
            let reason = format!("{} has shape {:?}, expected {:?}", entry.name, tensor.dims(), entry.shape);
            return Err(invalid(&path, reason));
        }
        dtype = dtype.or(Some(tensor.dtype()));
        let parts = entry.unpack(tensor)?;
        unpacked.extend(entry.parts.into_iter().map(|part| part.name).zip(parts));
        known.insert(entry.name);
    }
    if let Some(name) = weights.keys().filter(|name| !known.contains(*name)).min() {
        return Err(invalid(&path, format!("the model has no {name}")));
    }
    Ok((unpacked, dtype.unwrap_or(DType::F32)))
}

/// The text files by name, `config.json` last.
fn texts(
    dir: &Path,
    config: &VesperConfig,
    dtype: DType,
    extras: &Extras<'_>,
) -> Result<Vec<(&'static str, String)>> {
    let mut texts = Vec::new();
    if let Some(json) = extras.tokenizer_json {
        let tokenizer = tokenizer::parse(&dir.join(TOKENIZER), json)?;
        check_tokenizer(&tokenizer, config)?;
        let token = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id));
        let mut about = json!({
            "clean_up_tokenization_spaces": false,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": config.max_position_embeddings,
            "tokenizer_class": "PreTrainedTokenizerFast",
        });
        for (field, token) in
            [("bos_token", token(config.bos_token_id)), ("eos_token", token(config.eos_token_id))]
        {
            if let (Some(token), Some(about)) = (token, about.as_object_mut()) {
                about.insert(field.into(), token.into());
            }
        }
        texts.push((TOKENIZER, json.to_owned()));
        texts.push((TOKENIZER_CONFIG, format!("{about:#}\n")));
    }

    let mut generation = extras.generation.clone();
    generation.validate()?;
    generation.bos_token_id = generation.bos_token_id.or(config.bos_token_id);
    if generation.eos_token_id.is_empty() {
        generation.eos_token_id.extend(config.eos_token_id);
    }
    let path = dir.join(GENERATION_CONFIG);
    let json =
        serde_json::to_string_pretty(&generation).map_err(|error| invalid(&path, error.to_string()))?;
    texts.push((GENERATION_CONFIG, json + "\n"));

    let dtype = match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        DType::F64 => "float64",
        _ => "float32",
    };
    let path = dir.join(CONFIG);
    let python = extras.python && !config::is_llama(config);
    if python {
        python::refuse_adapters(&path, config)?;
        texts.extend(python::SOURCES.map(|(name, source)| (name, source.to_owned())));
    }
    let json = config::render(config, dtype, python).map_err(|error| invalid(&path, error.to_string()))?;
    texts.push((CONFIG, json));
    Ok(texts)
}

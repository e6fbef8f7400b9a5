//! What a run leaves for others: the model as a Hugging Face directory, and a first text of it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::PoisonError;

use anyhow::{Result, anyhow};
use candle_core::{Device, Tensor};
use candle_nn::VarMap;
use vesper_data::TextTokenizer;
use vesper_model::generate::{GenerationConfig, Generator};
use vesper_model::{VesperConfig, VesperLM, hf};

/// How a small language model writes best: less random than it was trained.
fn generation(config: &VesperConfig) -> GenerationConfig {
    GenerationConfig::default()
        .with_temperature(0.7)
        .with_bos(config.bos_token_id)
        .with_eos(config.eos_token_id)
        .with_max_new_tokens(256)
}

/// Writes `config.json`, `model.safetensors`, `tokenizer.json` and `generation_config.json`.
///
/// # Errors
/// A full disk, a folder that cannot be written: names the file, and a model that was there stays.
pub fn save_model(
    dir: &Path,
    config: &VesperConfig,
    varmap: &VarMap,
    tokenizer: &TextTokenizer,
) -> Result<()> {
    let vars = varmap.data().lock().unwrap_or_else(PoisonError::into_inner);
    let weights: HashMap<String, Tensor> = vars
        .iter()
        .map(|(name, var)| Ok((name.clone(), var.as_tensor().to_device(&Device::Cpu)?)))
        .collect::<Result<_>>()?;
    let tokenizer = tokenizer
        .inner()
        .to_string(true)
        .map_err(|error| anyhow!("the tokenizer cannot be written: {error}"))?;
    let extras = hf::Extras {
        tokenizer_json: Some(&tokenizer),
        generation: generation(config),
        ..hf::Extras::default()
    };
    Ok(hf::save(dir, config, &weights, &extras)?)
}

/// A text that the model writes from nothing; none where no token begins a text.
///
/// # Errors
/// A device that is out of memory, scores that are not numbers.
pub fn sample(model: &VesperLM, tokenizer: &TextTokenizer) -> Result<Option<String>> {
    let settings = generation(model.config()).with_max_new_tokens(120);
    if settings.bos_token_id.is_none() {
        return Ok(None);
    }
    let mut session = model.session(1 + settings.max_new_tokens)?;
    let mut generator = Generator::new(&mut session, &[], &settings)?
        .with_vocab_limit(tokenizer.vocab_size())
        .with_tokenizer(tokenizer.inner())?;
    let text = generator.pieces().collect::<vesper_model::Result<String>>()?;
    Ok(Some(text.trim().into()))
}

//! A model from wherever it is: a run, a Hugging Face folder, a GGUF file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use candle_core::{DType, Device};
use serde_json::{Map, Value};
use tokenizers::Tokenizer;
use vesper_data::TextTokenizer;
use vesper_model::chat::ChatTemplate;
use vesper_model::generate::GenerationConfig;
use vesper_model::quantized::Gguf;
use vesper_model::{VesperLM, hf};

use crate::{files, runs};

/// A model, ready to write.
#[derive(Debug)]
pub struct Opened {
    /// The folder or the file that it is from.
    pub source: PathBuf,
    /// The model.
    pub model: VesperLM,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// How it is meant to generate; begins with a token where the model has one.
    pub generation: GenerationConfig,
    /// Its chat template, where it has one.
    pub chat_template: Option<String>,
    /// The special tokens that the template writes, by its names for them.
    pub special_tokens: BTreeMap<String, String>,
}

impl Opened {
    /// The text of `tokenizer.json`.
    ///
    /// # Errors
    /// A tokenizer that cannot be written.
    pub fn tokenizer_json(&self) -> Result<String> {
        self.tokenizer.to_string(true).map_err(|error| anyhow!("the tokenizer cannot be written: {error}"))
    }

    /// The tokenizer for training text. That of a GGUF file is first written to `folder`.
    ///
    /// # Errors
    /// A file that cannot be read or written: names it.
    pub fn text_tokenizer(&self, folder: &Path) -> Result<TextTokenizer> {
        let own = self.source.join("tokenizer.json");
        if own.is_file() {
            return Ok(TextTokenizer::from_file(own)?);
        }
        let file = folder.join("tokenizer.json");
        files::write(&file, self.tokenizer_json()?.as_bytes())?;
        Ok(TextTokenizer::from_file(file)?)
    }
}

/// Opens the model that is named, or that of the last run: a run, a folder with a `config.json`, or a GGUF file.
///
/// # Errors
/// What is wrong with which file, and what to do where there is no model.
pub fn open(named: Option<&Path>, device: &Device) -> Result<Opened> {
    if let Some(file) = named.filter(|path| is_gguf(path)) {
        return open_gguf(file, device);
    }
    let folder = runs::model_folder(named)?;
    if !folder.is_dir() {
        bail!("{}: expected the folder of a run or of a model, or a GGUF file", folder.display());
    }
    let config = hf::read_config(&folder)?;
    let tokenizer = hf::read_tokenizer(&folder, &config)?;
    let model = VesperLM::load(&folder, DType::F32, device)?;
    let generation = begins(hf::read_generation_config(&folder)?, &model);
    let template = ChatTemplate::read(&folder)?;
    let special_tokens = template.as_ref().map(ChatTemplate::special_tokens).unwrap_or_default();
    let chat_template = template.map(|template| template.text().into());
    Ok(Opened { source: folder, model, tokenizer, generation, chat_template, special_tokens })
}

/// The weights of a folder or a GGUF file once more, for one who changes them.
///
/// # Errors
/// As [`open`].
pub fn weights(source: &Path, device: &Device) -> Result<VesperLM> {
    if is_gguf(source) {
        return Ok(Gguf::open(source)?.model(DType::F32, device)?);
    }
    Ok(VesperLM::load(source, DType::F32, device)?)
}

/// Puts what belongs to a model beside its weights where a copy of the model is: how it reads a conversation, and what its
/// tokenizer's special tokens are.
///
/// # Errors
/// A file that cannot be read or written: names it.
pub fn copy_companions(from: &Path, to: &Path) -> Result<()> {
    const SETTINGS: &str = "tokenizer_config.json";
    const TEMPLATE: &str = "chat_template.jinja";
    if !from.is_file() {
        for name in [SETTINGS, "special_tokens_map.json", TEMPLATE] {
            let file = from.join(name);
            if file.is_file() {
                let bytes =
                    std::fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
                files::write(&to.join(name), &bytes)?;
            }
        }
        return Ok(());
    }
    let gguf = Gguf::open(from)?;
    if let Some(text) = gguf.chat_template()? {
        files::write(&to.join(TEMPLATE), text.as_bytes())?;
    }
    let tokens = gguf.special_tokens()?;
    let settings = to.join(SETTINGS);
    if !tokens.is_empty() && settings.is_file() {
        let mut about: Map<String, Value> = files::read_json(&settings)?;
        about.extend(tokens.into_iter().map(|(name, token)| (name, token.into())));
        files::write_json(&settings, &about)?;
    }
    Ok(())
}

/// Whether a path is that of a file, or would be: folders have no such ending.
pub fn is_gguf(path: &Path) -> bool {
    path.is_file() || path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

fn open_gguf(file: &Path, device: &Device) -> Result<Opened> {
    let gguf = Gguf::open(file)?;
    let tokenizer = if gguf.tokenizer_json()?.is_some() {
        gguf.tokenizer()?
    } else {
        // Other programs keep theirs in another form.
        let folder = file.parent().unwrap_or(Path::new("."));
        hf::read_tokenizer(folder, gguf.config()).with_context(|| {
            format!("{} has no tokenizer.json in it, and none stands beside it", file.display())
        })?
    };
    let model = gguf.model(DType::F32, device)?;
    let generation = begins(gguf.generation_config()?, &model);
    let chat_template = gguf.chat_template()?.map(Into::into);
    let special_tokens = gguf.special_tokens()?;
    Ok(Opened { source: file.into(), model, tokenizer, generation, chat_template, special_tokens })
}

/// The settings with the tokens that begin and end a text, as far as the model has them.
fn begins(mut generation: GenerationConfig, model: &VesperLM) -> GenerationConfig {
    let config = model.config();
    if generation.bos_token_id.is_none() {
        // A text begins after the token that ends the one before it.
        generation.bos_token_id = config.bos_token_id.or(config.eos_token_id);
    }
    if generation.eos_token_id.is_empty() {
        generation.eos_token_id.extend(config.eos_token_id);
    }
    generation
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_told_from_folders() {
        assert!(is_gguf(Path::new("missing/model.GGUF")));
        assert!(!is_gguf(Path::new("missing/model")));
        assert!(is_gguf(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml").as_path()));
        let error = open(Some(Path::new("missing/model.gguf")), &Device::Cpu).unwrap_err();
        assert!(error.to_string().contains("missing/model.gguf"), "{error}");
    }
}

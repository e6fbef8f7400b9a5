//! The model that is talked to.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use tokenizers::Tokenizer;
use vesper_model::VesperLM;
use vesper_model::chat::{ChatTemplate, Message, Role};
use vesper_model::generate::GenerationConfig;

use crate::{device, model};

/// Which model, as flags.
#[derive(Debug, Clone, Args)]
pub struct Source {
    /// Folder of a run or of a model, or a GGUF file [default: the last trained run]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Adapters for the model: a folder that `finetune` or Hugging Face PEFT wrote
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// A chat template (Jinja) in place of the model's own
    #[arg(long, value_name = "FILE")]
    pub template: Option<PathBuf>,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    pub device: String,
}

/// A model with everything that belongs to it.
#[derive(Debug)]
pub struct Loaded {
    /// Its folder or file.
    pub name: String,
    /// The model, its adapters with it.
    pub model: VesperLM,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// How it reads a conversation; without one it continues text.
    pub template: Option<ChatTemplate>,
    /// How it is meant to generate.
    pub settings: GenerationConfig,
}

/// Loads a model.
///
/// # Errors
/// Whatever is missing or wrong: names the file. A template that cannot render a single message, or
/// reads none, is refused here.
pub fn load(source: &Source) -> Result<Loaded> {
    let device = device::open(&source.device)?;
    let opened = model::open(source.model.as_deref(), &device)?;
    let (tokenizer, mut settings, mut model) = (opened.tokenizer, opened.generation, opened.model);
    let folder = opened.source.is_dir().then_some(opened.source.as_path());
    let template = match (&source.template, folder) {
        (Some(file), _) => Some(ChatTemplate::from_file(file)?),
        (None, Some(folder)) => ChatTemplate::read(folder)?,
        (None, None) => opened.chat_template.as_deref().map(ChatTemplate::new).transpose()?,
    };
    let template = match (template, folder) {
        (Some(template), Some(folder)) => Some(template.with_tokens_of(folder)?),
        (Some(mut template), None) => {
            // A file of another program names its special tokens by their ids.
            let config = model.config();
            let ids = [("bos_token", config.bos_token_id), ("eos_token", config.eos_token_id)];
            for (name, id) in ids {
                if let Some(token) = id.and_then(|id| tokenizer.id_to_token(id)) {
                    template = template.with_variable(name, token);
                }
            }
            for (name, token) in opened.special_tokens {
                template = template.with_variable(name, token);
            }
            Some(template)
        }
        (None, _) => None,
    };
    if let Some(template) = &template {
        template.render(&[Message::new(Role::User, "?")], true)?;
        template.check()?;
        // The token that ends a turn is often the tokenizer's own idea of an end.
        let end = template.variable("eos_token").and_then(|token| tokenizer.token_to_id(token));
        settings.eos_token_id.extend(end.filter(|id| !settings.eos_token_id.contains(id)));
    }
    if let Some(adapter) = &source.adapter {
        model.attach_from(adapter)?;
    }
    Ok(Loaded { name: opened.source.display().to_string(), model, tokenizer, template, settings })
}

//! Makes a trained model ready for Python: merges adapters, changes the dtype, writes the classes for `transformers`.
//!
//!     cargo run --release --example export -- --python
//!     cargo run --release --example export -- --adapter adapters/lora --dtype bf16 --to exported --python

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device};
use clap::{Parser, ValueEnum};
use vesper_examples::{model, runs, say};
use vesper_model::generate::GenerationConfig;
use vesper_model::hf;
use vesper_model::quantized::Gguf;

/// Write a model for others: in Python, in another dtype, with its adapters merged.
#[derive(Debug, Parser)]
#[command(name = "export", version, long_about = None)]
struct Flags {
    /// Folder of a run or of a model, or a GGUF file, whose blocks become numbers again [default: the last trained run]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Write a copy there; without it, --python writes beside the model's weights
    #[arg(long, value_name = "DIR")]
    to: Option<PathBuf>,
    /// Adapters to merge into the copy: a folder that `finetune` or Hugging Face PEFT wrote
    #[arg(long, value_name = "DIR", requires = "to")]
    adapter: Option<PathBuf>,
    /// What the copy's weights are stored in
    #[arg(long, value_name = "DTYPE", requires = "to", default_value = "f32")]
    dtype: Stored,
    /// Write the classes with which `transformers` loads the model
    #[arg(long)]
    python: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Stored {
    F32,
    Bf16,
    F16,
}

fn main() -> ExitCode {
    vesper_examples::run(|| export(&vesper_examples::flags()?))
}

fn export(flags: &Flags) -> Result<ExitCode> {
    if flags.to.is_none() && !flags.python {
        bail!("what is to be written? expected --to DIR for a copy, --python for the classes, or both");
    }
    let model = runs::model_folder(flags.model.as_deref())?;
    if model.is_file() && flags.to.is_none() {
        bail!("{}: Python reads folders: name one with --to", model.display());
    }
    let folder = if let Some(to) = &flags.to {
        copy(flags, &model, to)?;
        to
    } else {
        // Python is to find a model that loads.
        model::weights(&model, &Device::Cpu)?;
        &model
    };
    if flags.python {
        let ours = hf::write_python(folder)?;
        let trusted = if ours { ", trust_remote_code=True" } else { "" };
        say!("in Python: AutoModelForCausalLM.from_pretrained({:?}{trusted})", folder.display().to_string());
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes the model with its adapters merged.
fn copy(flags: &Flags, from: &Path, to: &Path) -> Result<()> {
    if to.join("config.json").exists() {
        bail!("--to {}: there is a model already, choose another folder", to.display());
    }
    let mut model = model::weights(from, &Device::Cpu)?;
    if let Some(adapter) = &flags.adapter {
        model.attach_from(adapter)?;
    }
    let Some(model) = model.merged()? else {
        let adapters = flags.adapter.as_deref().unwrap_or(from).display();
        bail!(
            "{adapters}: adapters that choose by their input, or have a bias, cannot be merged: there are no weights of the model that \
             do the same; `chat` takes them as they are, with --adapter"
        );
    };
    let dtype = match flags.dtype {
        Stored::F32 => DType::F32,
        Stored::Bf16 => DType::BF16,
        Stored::F16 => DType::F16,
    };
    // Blocks become numbers again.
    let model = model.dequantized()?;
    let mut weights = model.weights();
    for weight in weights.values_mut() {
        *weight = weight.to_dtype(dtype)?;
    }
    let (tokenizer, generation) = beside(from)?;
    let extras = hf::Extras { tokenizer_json: tokenizer.as_deref(), generation, ..hf::Extras::default() };
    hf::save(to, model.config(), &weights, &extras)?;
    model::copy_companions(from, to)?;
    say!("{}: {} parameters in {dtype:?}", to.display(), model.config().num_parameters());
    Ok(())
}

/// The text of `tokenizer.json`, and the settings of generation.
fn beside(model: &Path) -> Result<(Option<String>, GenerationConfig)> {
    if model.is_file() {
        let gguf = Gguf::open(model)?;
        return Ok((gguf.tokenizer_json()?.map(Into::into), gguf.generation_config()?));
    }
    let path = model.join("tokenizer.json");
    let read = || std::fs::read_to_string(&path).with_context(|| path.display().to_string());
    Ok((path.exists().then(read).transpose()?, hf::read_generation_config(model)?))
}

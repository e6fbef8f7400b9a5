//! What all studies are told on the command line.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use candle_core::{DType, Device};
use clap::Args;
use vesper_data::TokenCache;
use vesper_model::VesperConfig;

use super::task::Setting;

/// The flags that all runs of a study share.
#[derive(Debug, Args)]
pub struct Shared {
    /// The file of tokens
    #[arg(long)]
    pub tokens: PathBuf,
    /// What the text is called in the record
    #[arg(long, default_value = "")]
    pub data: String,
    /// Entries of the vocabulary
    #[arg(long, default_value_t = 8192)]
    pub vocab: usize,
    /// The record
    #[arg(long)]
    pub out: PathBuf,
    /// Model size
    #[arg(long, default_value = "small")]
    pub size: String,
    /// cpu or cuda
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// What the machine is called in the record
    #[arg(long, default_value = "")]
    pub machine: String,
    /// Seconds after which no run is started
    #[arg(long, default_value_t = 1e9)]
    pub seconds: f64,
    /// Rows of a step
    #[arg(long, default_value_t = 32)]
    pub batch: usize,
    /// Tokens of a row
    #[arg(long, default_value_t = 512)]
    pub seq: usize,
    /// Rows that a model is evaluated on
    #[arg(long, default_value_t = 256)]
    pub eval_windows: usize,
    /// Runs with another seed each
    #[arg(long, default_value_t = 3)]
    pub seeds: u64,
}

impl Shared {
    /// The setting of all runs.
    ///
    /// # Errors
    /// A device, size or vocabulary that does not fit, or a file of tokens that cannot be read.
    pub fn setting(&self) -> Result<Setting> {
        let device = match self.device.as_str() {
            "cpu" => Device::Cpu,
            "cuda" => vesper_model::ops::cuda_device(0)?,
            other => bail!("--device {other}: expected cpu or cuda"),
        };
        let tokens = TokenCache::open(&self.tokens)?.tokens();
        if tokens.max_id()?.is_some_and(|id| id as usize >= self.vocab) {
            bail!("--vocab {}: the text has larger tokens", self.vocab);
        }
        let (train, held_out) = tokens.split(0.05)?;
        let mut model = VesperConfig::preset(&self.size)?.with_vocab(self.vocab);
        model.max_position_embeddings = model.max_position_embeddings.max(self.seq);
        Ok(Setting {
            model,
            compute: if device.is_cuda() { DType::BF16 } else { DType::F32 },
            train,
            held_out,
            batch: self.batch,
            seq: self.seq,
            eval_windows: self.eval_windows,
            device,
        })
    }

    /// What the model is called in the record.
    pub fn model(&self, setting: &Setting) -> String {
        format!("{}, compute in {}", self.size, setting.compute.as_str())
    }

    /// How long runs may be started.
    pub fn limit(&self) -> Duration {
        Duration::from_secs_f64(self.seconds.clamp(0.0, 1e9))
    }
}

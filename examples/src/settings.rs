//! The settings of a training run: what was asked for, completed by defaults, kept with the run.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Parser, ValueEnum};
use serde::{Deserialize, Serialize};

/// Which optimizer trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Optimizer {
    /// Velvet with its adaptive parts for language models.
    Velvet,
    /// AdamW: Velvet's fused update with everything adaptive off, which equals torch.optim.AdamW and can be resumed
    /// (candle's own AdamW keeps its state to itself; `benchmark` compares with that one).
    Adamw,
}

/// The number type of the activations; the parameters and their moments are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// Single precision.
    F32,
    /// bfloat16.
    Bf16,
}

impl fmt::Display for Optimizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Velvet => "Velvet",
            Self::Adamw => "AdamW",
        })
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.candle().as_str())
    }
}

impl Dtype {
    /// candle's name for it.
    pub fn candle(self) -> candle_core::DType {
        match self {
            Self::F32 => candle_core::DType::F32,
            Self::Bf16 => candle_core::DType::BF16,
        }
    }
}

/// Train a VesperLM: with no flags a nano model on the embedded corpus, on the CPU, in a few minutes.
#[derive(Debug, Clone, Default, Parser)]
#[command(name = "train", version, long_about = None)]
pub struct Flags {
    /// Model size: nano, tiny, small, medium or large [default: nano]
    #[arg(long)]
    pub size: Option<String>,
    /// Files, folders and patterns of text, JSON, JSONL, SQuAD or Parquet, compressed or not [default: the embedded stories]
    #[arg(long, num_args = 1.., value_name = "PATH")]
    pub data: Option<Vec<PathBuf>>,
    /// A tokenizer.json [default: a byte-level BPE trained on the data]
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Entries of the model's vocabulary [default: those of --tokenizer, or what suits the size and the data]
    #[arg(long, value_name = "N")]
    pub vocab_size: Option<usize>,
    /// Optimizer steps [default: by the size]
    #[arg(long)]
    pub steps: Option<u64>,
    /// Sequences a step [default: by the size]
    #[arg(long)]
    pub batch: Option<usize>,
    /// Tokens a sequence; more than the size's context make the model's context as long [default: by the size]
    #[arg(long)]
    pub seq: Option<usize>,
    /// Peak learning rate [default: by the size]
    #[arg(long, allow_negative_numbers = true)]
    pub lr: Option<f64>,
    /// Optimizer [default: velvet]
    #[arg(long)]
    pub optimizer: Option<Optimizer>,
    /// Seed of the first weights, the order of the data and the embedded stories [default: 0]
    #[arg(long)]
    pub seed: Option<u64>,
    /// cpu, cuda or cuda:N [default: cpu]
    #[arg(long)]
    pub device: Option<String>,
    /// Number type of the activations [default: f32]
    #[arg(long)]
    pub dtype: Option<Dtype>,
    /// Folder of the run [default: the first free runs/SIZE-N; with --resume the last run]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Go on where the run in --out was stopped, with its settings
    #[arg(long)]
    pub resume: bool,
    /// Steps between evaluations on held-out text, each followed by a checkpoint [default: a tenth of the steps]
    #[arg(long, value_name = "STEPS")]
    pub eval_every: Option<u64>,
}

/// The settings of a run, complete.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Name of the preset.
    pub size: String,
    /// Sources; empty for the embedded corpus.
    pub data: Vec<PathBuf>,
    /// Tokenizer file; none: one is trained.
    pub tokenizer: Option<PathBuf>,
    /// Entries of the vocabulary, if set.
    pub vocab_size: Option<usize>,
    /// Optimizer steps.
    pub steps: u64,
    /// Sequences a step.
    pub batch: usize,
    /// Tokens a sequence.
    pub seq: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Optimizer.
    pub optimizer: Optimizer,
    /// Seed.
    pub seed: u64,
    /// Device.
    pub device: String,
    /// Number type of the activations.
    pub dtype: Dtype,
    /// Steps between evaluations.
    pub eval_every: u64,
}

/// steps, batch, seq, lr of a size
fn defaults(size: &str) -> (u64, usize, usize, f64) {
    match size {
        "nano" => (900, 8, 256, 6e-3),
        "tiny" => (2000, 16, 256, 2e-3),
        "small" => (4000, 32, 512, 1e-3),
        "medium" => (10_000, 32, 1024, 6e-4),
        _ => (20_000, 32, 1024, 4e-4),
    }
}

impl Flags {
    /// The settings of a new run.
    ///
    /// # Errors
    /// A number out of its range.
    pub fn settings(&self) -> Result<Settings> {
        let size = self.size.clone().unwrap_or_else(|| "nano".into());
        let (steps, batch, seq, lr) = defaults(&size);
        let steps = self.steps.unwrap_or(steps);
        let settings = Settings {
            size,
            data: self.sources().unwrap_or_default(),
            tokenizer: self.tokenizer.clone(),
            vocab_size: self.vocab_size,
            steps,
            batch: self.batch.unwrap_or(batch),
            seq: self.seq.unwrap_or(seq),
            lr: self.lr.unwrap_or(lr),
            optimizer: self.optimizer.unwrap_or(Optimizer::Velvet),
            seed: self.seed.unwrap_or(0),
            device: self.device.clone().unwrap_or_else(|| "cpu".into()),
            dtype: self.dtype.unwrap_or(Dtype::F32),
            eval_every: self.eval_every.unwrap_or((steps / 10).max(1)),
        };
        settings.validate()?;
        Ok(settings)
    }

    /// The sources, as paths that still mean the same when the run goes on from another folder.
    fn sources(&self) -> Option<Vec<PathBuf>> {
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        self.data.as_ref().map(|paths| paths.iter().map(absolute).collect())
    }

    /// The settings of a run that goes on after step `done`: the stored ones, with the steps, the device and the evaluation interval
    /// changed where they are given. Everything else must be as it was, or the run would not be the same.
    ///
    /// # Errors
    /// A flag that contradicts the run.
    pub fn resumed(&self, stored: Settings, done: u64) -> Result<Settings> {
        fn same<T: PartialEq + fmt::Debug>(flag: &str, given: Option<&T>, stored: &T) -> Result<()> {
            match given {
                Some(given) if given != stored => {
                    bail!("--resume: the run has {flag} {stored:?}, so it cannot go on with {given:?}")
                }
                _ => Ok(()),
            }
        }
        same("--size", self.size.as_ref(), &stored.size)?;
        same("--data", self.sources().as_ref(), &stored.data)?;
        same("--tokenizer", self.tokenizer.as_ref().map(|t| Some(t.clone())).as_ref(), &stored.tokenizer)?;
        same("--vocab-size", self.vocab_size.map(Some).as_ref(), &stored.vocab_size)?;
        same("--batch", self.batch.as_ref(), &stored.batch)?;
        same("--seq", self.seq.as_ref(), &stored.seq)?;
        same("--lr", self.lr.as_ref(), &stored.lr)?;
        same("--optimizer", self.optimizer.as_ref(), &stored.optimizer)?;
        same("--seed", self.seed.as_ref(), &stored.seed)?;
        same("--dtype", self.dtype.as_ref(), &stored.dtype)?;
        if stored.data.is_empty() {
            // As many stories are drawn as the steps read.
            same("--steps", self.steps.as_ref(), &stored.steps)?;
        }
        let settings = Settings {
            steps: self.steps.unwrap_or(stored.steps),
            device: self.device.clone().unwrap_or_else(|| stored.device.clone()),
            eval_every: self.eval_every.unwrap_or(stored.eval_every),
            ..stored
        };
        settings.validate()?;
        if settings.steps < done {
            bail!("--resume: the run has made {done} steps, so it cannot end at --steps {}", settings.steps);
        }
        Ok(settings)
    }
}

impl Settings {
    /// Tokens that a step trains on.
    pub fn tokens_per_step(&self) -> u64 {
        self.batch.saturating_mul(self.seq) as u64
    }

    /// Held-out tokens to evaluate on: `most`, but fewer in a short run, which is not to be measured for longer than
    /// it trains.
    pub fn eval_tokens(&self, most: usize) -> usize {
        let trained = self.steps.saturating_mul(self.tokens_per_step());
        most.min(usize::try_from(trained / 4).unwrap_or(most).max(4096))
    }

    fn validate(&self) -> Result<()> {
        for (flag, value) in [
            ("--steps", self.steps),
            ("--batch", self.batch as u64),
            ("--seq", self.seq as u64),
            ("--eval-every", self.eval_every),
        ] {
            if value == 0 {
                bail!("{flag} 0: expected at least 1");
            }
        }
        if self.tokens_per_step() > u64::from(u32::MAX) {
            bail!("--batch {} x --seq {}: expected less than 2^32 tokens a step", self.batch, self.seq);
        }
        if !(self.lr.is_finite() && self.lr > 0.0) {
            bail!("--lr {}: expected a positive number", self.lr);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(words: &[&str]) -> Flags {
        Flags::try_parse_from(std::iter::once(&"train").chain(words)).unwrap()
    }

    #[test]
    fn flags_complete_to_settings() {
        let settings = flags(&["--data", "a", "b", "--steps", "7", "--dtype", "bf16"]).settings().unwrap();
        let here = std::env::current_dir().unwrap();
        assert_eq!(settings.data, [here.join("a"), here.join("b")]);
        assert_eq!((settings.steps, settings.eval_every, settings.dtype), (7, 1, Dtype::Bf16));
        assert_eq!(settings.size, "nano");
        for wrong in [["--steps", "0"], ["--lr", "nan"], ["--lr", "-1"], ["--seq", "0"]] {
            assert!(flags(&wrong).settings().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_resumed_run_keeps_its_settings() {
        let stored = flags(&["--lr", "0.001", "--seed", "4", "--data", "a"]).settings().unwrap();
        assert_eq!(flags(&["--resume"]).resumed(stored.clone(), 5).unwrap(), stored);
        assert_eq!(flags(&["--lr", "0.001", "--steps", "9"]).resumed(stored.clone(), 5).unwrap().steps, 9);
        let message = flags(&["--lr", "0.002"]).resumed(stored.clone(), 5).unwrap_err().to_string();
        assert!(message.contains("--lr 0.001"), "{message}");
        assert!(flags(&["--steps", "4"]).resumed(stored.clone(), 5).is_err());
        assert!(flags(&["--tokenizer", "x"]).resumed(stored.clone(), 5).is_err());
        assert_eq!(flags(&["--data", "./a"]).resumed(stored.clone(), 5).unwrap(), stored);

        let stories = Settings { data: Vec::new(), ..stored };
        let message = flags(&["--steps", "9"]).resumed(stories, 5).unwrap_err().to_string();
        assert!(message.contains("--steps"), "{message}");
    }
}

//! The study of the activations, on the tokens that `optimizer-study tokens` makes.
//!
//!     cargo run --release -p vesper-benches --bin activation-study -- run --tokens novels.tokens --out activations.json
//!     cargo run --release -p vesper-benches --bin activation-study -- report activations.json

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device};
use clap::{Args, Parser};
use era_act::Activation;
use vesper_benches::study::activation::{Plan, Record, Study, report};
use vesper_benches::study::arm::Arm;
use vesper_benches::study::task::Setting;
use vesper_data::TokenCache;
use vesper_model::VesperConfig;

#[derive(Debug, Parser)]
#[command(about)]
enum Command {
    /// Make the runs; a record that is there already is gone on with
    Run(Box<Run>),
    /// Print a record's tables
    Report {
        /// The record
        record: PathBuf,
    },
}

#[derive(Debug, Args)]
struct Run {
    /// The file of tokens
    #[arg(long)]
    tokens: PathBuf,
    /// What the text is called in the record
    #[arg(long, default_value = "")]
    data: String,
    /// Entries of the vocabulary
    #[arg(long, default_value_t = 8192)]
    vocab: usize,
    /// The record
    #[arg(long)]
    out: PathBuf,
    /// Model size
    #[arg(long, default_value = "small")]
    size: String,
    /// cpu or cuda
    #[arg(long, default_value = "cpu")]
    device: String,
    /// What the machine is called in the record
    #[arg(long, default_value = "")]
    machine: String,
    /// Seconds after which no run is started
    #[arg(long, default_value_t = 1e9)]
    seconds: f64,
    #[arg(long, default_value_t = 500)]
    steps: u64,
    #[arg(long, default_value_t = 32)]
    batch: usize,
    #[arg(long, default_value_t = 512)]
    seq: usize,
    #[arg(long, default_value_t = 256)]
    eval_windows: usize,
    #[arg(long, value_delimiter = ',', default_values_t = [1e-3, 2e-3, 4e-3, 8e-3])]
    lrs: Vec<f64>,
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// How all models are updated
    #[arg(long, default_value = "adamw")]
    optimizer: Arm,
    /// The activations by name; the others are compared with the first
    #[arg(long, value_delimiter = ',', default_values = ["silu", "era", "gelu_tanh", "era_gelu_softplus", "gelu", "relu", "relu_squared"])]
    activations: Vec<Activation>,
}

fn main() -> ExitCode {
    let result = match Command::parse() {
        Command::Run(run) => run.run(),
        Command::Report { record } => print_report(&record),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn print_report(file: &Path) -> Result<()> {
    let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let record: Record = serde_json::from_str(&text).with_context(|| file.display().to_string())?;
    print!("{}", report(&record));
    Ok(())
}

impl Run {
    fn run(&self) -> Result<()> {
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
        let compute = if device.is_cuda() { DType::BF16 } else { DType::F32 };
        let plan = Plan {
            activations: self.activations.clone(),
            optimizer: self.optimizer,
            lrs: self.lrs.clone(),
            seeds: self.seeds,
            steps: self.steps,
        };
        let record = Record {
            machine: self.machine.clone(),
            model: format!("{}, compute in {}", self.size, compute.as_str()),
            parameters: model.num_parameters(),
            vocab: self.vocab,
            data: self.data.clone(),
            batch: self.batch,
            seq: self.seq,
            eval_tokens: self.eval_windows * self.seq,
            unit_tokens: self.batch * self.seq,
            plan,
            runs: Vec::new(),
        };
        let setting = Setting {
            model,
            compute,
            train,
            held_out,
            batch: self.batch,
            seq: self.seq,
            eval_windows: self.eval_windows,
            device,
        };
        let limit = Duration::from_secs_f64(self.seconds.clamp(0.0, 1e9));
        let record = Study::new(&setting, record, &self.out, limit)?.run()?;
        print!("\n{}", report(&record));
        Ok(())
    }
}

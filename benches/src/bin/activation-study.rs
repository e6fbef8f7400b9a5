//! The study of the activations, on the tokens that `optimizer-study tokens` makes.
//!
//!     cargo run --release -p vesper-benches --bin activation-study -- run --tokens novels.tokens --out activations.json
//!     cargo run --release -p vesper-benches --bin activation-study -- report activations.json

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser};
use era_act::Activation;
use vesper_benches::study::activation::{Plan, Record, Study, report};
use vesper_benches::study::arm::Arm;
use vesper_benches::study::shared::Shared;

#[derive(Debug, Parser)]
#[command(about)]
enum Command {
    /// Make the runs; a record that is there already is gone on with, and single activations and rates join it
    Run(Box<Run>),
    /// Print a record's tables
    Report {
        /// The record
        record: PathBuf,
    },
}

#[derive(Debug, Args)]
struct Run {
    #[command(flatten)]
    shared: Shared,
    #[arg(long, default_value_t = 500)]
    steps: u64,
    #[arg(long, value_delimiter = ',', default_values_t = [1e-3, 2e-3, 4e-3, 8e-3])]
    lrs: Vec<f64>,
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
        let shared = &self.shared;
        let setting = shared.setting()?;
        let plan = Plan {
            activations: self.activations.clone(),
            optimizer: self.optimizer,
            lrs: self.lrs.clone(),
            seeds: shared.seeds,
            steps: self.steps,
        };
        let record = Record {
            machine: shared.machine.clone(),
            model: shared.model(&setting),
            parameters: setting.model.num_parameters(),
            vocab: shared.vocab,
            data: shared.data.clone(),
            batch: shared.batch,
            seq: shared.seq,
            eval_tokens: shared.eval_windows * shared.seq,
            unit_tokens: shared.batch * shared.seq,
            plan,
            runs: Vec::new(),
        };
        let record = Study::new(&setting, record, &shared.out, shared.limit())?.run()?;
        print!("\n{}", report(&record));
        Ok(())
    }
}

//! The study of the optimizer.
//!
//!     cargo run --release -p vesper-benches --bin optimizer-study -- tokens --data novels.txt --out novels.tokens
//!     cargo run --release -p vesper-benches --bin optimizer-study -- run --tokens novels.tokens --out study.json
//!     cargo run --release -p vesper-benches --bin optimizer-study -- parts --tokens novels.tokens --out parts.json
//!     cargo run --release -p vesper-benches --bin optimizer-study -- report study.json

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Parser};
use vesper_benches::study::arm::Arm;
use vesper_benches::study::parts::Parts;
use vesper_benches::study::plan::{Plan, Record, Study};
use vesper_benches::study::report::{report, report_parts};
use vesper_benches::study::shared::Shared;
use vesper_benches::study::task::Setting;
use vesper_data::{Documents, Sources, TextTokenizer, TokenCache};

#[derive(Debug, Parser)]
#[command(about)]
enum Command {
    /// Train a byte-level BPE on a text and tokenise it
    Tokens {
        /// The text
        #[arg(long, num_args = 1..)]
        data: Vec<PathBuf>,
        /// Entries of the vocabulary
        #[arg(long, default_value_t = 8192)]
        vocab: usize,
        /// The file of tokens
        #[arg(long)]
        out: PathBuf,
    },
    /// Make the runs; a record that is there already is gone on with
    Run(Box<Run>),
    /// Add each part that is off by default to AdamW and Velvet, at the tuned learning rates and where something is wrong; a
    /// record that is there already is gone on with
    Parts(Box<PartsRun>),
    /// Print a record's tables
    Report {
        /// The record
        record: PathBuf,
    },
}

#[derive(Debug, Args)]
struct PartsRun {
    #[command(flatten)]
    shared: Shared,
    #[arg(long, default_value_t = 240)]
    steps: u64,
    /// The best learning rate of AdamW
    #[arg(long, default_value_t = 1e-3)]
    adamw_lr: f64,
    /// The best learning rate of Velvet
    #[arg(long, default_value_t = 4e-3)]
    velvet_lr: f64,
}

#[derive(Debug, Args)]
struct Run {
    #[command(flatten)]
    shared: Shared,
    #[arg(long, default_value_t = 300)]
    steps: u64,
    #[arg(long, value_delimiter = ',', default_values_t = [5e-4, 1e-3, 2e-3, 4e-3, 8e-3])]
    lrs: Vec<f64>,
    /// Arms that are tuned and run with all seeds
    #[arg(long, value_delimiter = ',', default_values = ["adamw", "velvet"])]
    tuned: Vec<Arm>,
    /// Arms that are tuned with one seed
    #[arg(long, value_delimiter = ',')]
    swept: Vec<Arm>,
    /// Arms that are run at wrong learning rates and on corrupted data
    #[arg(long, value_delimiter = ',')]
    stressed: Vec<Arm>,
    /// The arm that is run over shorter schedules
    #[arg(long)]
    shortened: Option<Arm>,
    #[arg(long, value_delimiter = ',', default_values_t = [0.5, 0.62, 0.75])]
    shares: Vec<f64>,
}

fn main() -> ExitCode {
    match command(Command::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn command(command: Command) -> Result<()> {
    match command {
        Command::Tokens { data, vocab, out } => tokens(&data, vocab, &out),
        Command::Run(run) => run.run(),
        Command::Parts(run) => run.run(),
        Command::Report { record } => {
            let text = std::fs::read_to_string(&record).with_context(|| record.display().to_string())?;
            let tables = match serde_json::from_str::<Record<Parts>>(&text) {
                Ok(record) => report_parts(&record),
                Err(_) => report(&serde_json::from_str(&text).with_context(|| record.display().to_string())?),
            };
            print!("{tables}");
            Ok(())
        }
    }
}

fn tokens(data: &[PathBuf], vocab: usize, out: &Path) -> Result<()> {
    let texts = Documents::open(data)?.map(|document| document.map(|document| document.text));
    let tokenizer = TextTokenizer::train_bpe(texts, vocab)?;
    let folder = out.parent().unwrap_or(Path::new("."));
    let (cache, _) = TokenCache::open_or_build(folder, &Sources::from(data), &tokenizer)?;
    std::fs::rename(cache.path(), out).with_context(|| out.display().to_string())?;
    println!("{}: {} tokens of {} entries", out.display(), cache.len(), tokenizer.vocab_size());
    Ok(())
}

/// The setting of all runs, and a record without any.
fn start<P>(shared: &Shared, plan: P) -> Result<(Setting, Record<P>)> {
    let setting = shared.setting()?;
    let record = Record {
        machine: shared.machine.clone(),
        model: shared.model(&setting),
        parameters: setting.model.num_parameters(),
        vocab: shared.vocab,
        data: shared.data.clone(),
        batch: shared.batch,
        seq: shared.seq,
        eval_tokens: shared.eval_windows * shared.seq,
        plan,
        runs: Vec::new(),
    };
    Ok((setting, record))
}

impl Run {
    fn run(&self) -> Result<()> {
        let plan = Plan {
            tuned: self.tuned.clone(),
            swept: self.swept.clone(),
            stressed: self.stressed.clone(),
            shortened: self.shortened,
            lrs: self.lrs.clone(),
            seeds: self.shared.seeds,
            steps: self.steps,
            shares: self.shares.clone(),
        };
        let (setting, record) = start(&self.shared, plan)?;
        let study = Study::new(&setting, record, &self.shared.out, self.shared.limit())?;
        print!("\n{}", report(&study.run()?));
        Ok(())
    }
}

impl PartsRun {
    fn run(&self) -> Result<()> {
        let plan = Parts {
            adamw_lr: self.adamw_lr,
            velvet_lr: self.velvet_lr,
            seeds: self.shared.seeds,
            steps: self.steps,
        };
        let (setting, record) = start(&self.shared, plan)?;
        let study = Study::new(&setting, record, &self.shared.out, self.shared.limit())?;
        print!("\n{}", report_parts(&study.run()?));
        Ok(())
    }
}

//! Makes a trained model small: its weights as blocks of small integers, in one GGUF file, and what that costs.
//!
//!     cargo run --release --example quantize
//!     cargo run --release --example quantize -- --model runs/tiny-1 --type q8_0 q4_k
//!     cargo run --release --example chat -- --model runs/tiny-1/model-q8_0.gguf

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use vesper_benches::record::{machine, today};
use vesper_examples::quantize::held_out::held_out;
use vesper_examples::quantize::measure::{Measure, Measured};
use vesper_examples::quantize::record::{Record, Row, tensors};
use vesper_examples::{device, files, model, note, say, settings};
use vesper_model::VesperLM;
use vesper_model::quantized::{BlockType, Gguf, GgufExtras, Policy, Report, save};

/// Write a trained model as a GGUF file of small integers, and measure what that costs.
#[derive(Debug, Parser)]
#[command(name = "quantize", version, long_about = None)]
struct Flags {
    /// Folder of a run or of a model [default: the last trained run]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Types of the weights, one file each: q8_0, q6_k, q5_k, q5_1, q5_0, q4_k, q4_1, q4_0, q3_k, q2_k, f16, bf16, f32
    #[arg(long = "type", num_args = 1.., value_name = "TYPE", default_value = "q8_0")]
    types: Vec<BlockType>,
    /// Type of the embedding [default: as the rest]
    #[arg(long, value_name = "TYPE")]
    embedding: Option<BlockType>,
    /// Type of the output layer, which may be the embedding, too [default: as the rest, and q6_k at the least]
    #[arg(long, value_name = "TYPE")]
    head: Option<BlockType>,
    /// Another type for the weights with this in their names, as v_proj=q6_k; `*` stands for anything
    #[arg(long, num_args = 1.., value_name = "PATTERN=TYPE", value_parser = pattern)]
    tensor: Vec<(String, BlockType)>,
    /// Text to measure the perplexity on [default: what the run held out]
    #[arg(long, num_args = 1.., value_name = "PATH")]
    data: Vec<PathBuf>,
    /// Tokens of it at most
    #[arg(long, default_value_t = 65_536)]
    tokens: usize,
    /// Tokens a window
    #[arg(long, default_value_t = 256)]
    seq: usize,
    /// The GGUF file, where there is one type [default: model-TYPE.gguf beside the model]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// A folder of records: what was measured is written to DIR/MACHINE/DATE-quantize.json
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
}

fn pattern(text: &str) -> Result<(String, BlockType)> {
    let (pattern, block) = text.rsplit_once('=').context("expected PATTERN=TYPE, as v_proj=q6_k")?;
    Ok((pattern.into(), block.parse()?))
}

fn main() -> ExitCode {
    vesper_examples::leave_the_threads_to_the_fused_operations();
    vesper_examples::run(|| quantize(&vesper_examples::flags()?))
}

fn quantize(flags: &Flags) -> Result<ExitCode> {
    if let Some(file) = flags.model.as_deref().filter(|path| model::is_gguf(path)) {
        let what = if Gguf::open(file)?.is_quantized() { "quantised already" } else { "a GGUF file already" };
        bail!("{}: {what}; quantise the folder that it was made from", file.display());
    }
    if flags.out.is_some() && flags.types.len() > 1 {
        bail!("--out names one file, but --type names {} types", flags.types.len());
    }
    // Not after all the measuring.
    let folder = flags.out.as_deref().and_then(Path::parent).filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder.filter(|folder| !folder.is_dir()) {
        bail!("--out: there is no folder {}", folder.display());
    }
    if let Some(out) = flags.out.as_deref().filter(|out| out.is_dir()) {
        bail!("--out {}: a folder; name a file in it", out.display());
    }
    if let Some(record) = flags.record.as_deref().filter(|record| record.exists() && !record.is_dir()) {
        bail!("--record {}: a file; name a folder", record.display());
    }
    for (flag, value) in [("--tokens", flags.tokens), ("--seq", flags.seq)] {
        if value == 0 {
            bail!("{flag} 0: expected at least 1");
        }
    }
    let device = device::open(&flags.device)?;
    let opened = model::open(flags.model.as_deref(), &device)?;
    let (folder, plain) = (&opened.source, &opened.model);
    let config = plain.config();
    if flags.seq > config.max_position_embeddings {
        bail!("--seq {}: the model reads at most {} tokens", flags.seq, config.max_position_embeddings);
    }
    let (name, text) = held_out(folder, config, &flags.data)?;
    if text.len() <= flags.seq {
        bail!("--seq {} is longer than the text, which has {} tokens", flags.seq, text.len());
    }

    // The model in each of the types.
    let mut forms: Vec<(BlockType, VesperLM, Report)> = Vec::new();
    for &block in &flags.types {
        let (small, report) = plain.quantized(&flags.policy(block))?;
        forms.push((block, small, report));
    }

    // What it costs.
    let settings = settings::Flags {
        batch: Some(8),
        seq: Some(flags.seq),
        device: Some(flags.device.clone()),
        ..settings::Flags::default()
    };
    let settings = settings.settings()?;
    let measure = Measure { tokens: &text, limit: flags.tokens, settings: &settings, device: &device };
    let mut measured = vec![measure.quality(plain)?];
    for (_, small, _) in &forms {
        measured.push(measure.quality(small)?);
    }
    let models = std::iter::once(plain).chain(forms.iter().map(|(_, small, _)| small));
    measure.speeds(&mut models.zip(&mut measured).collect::<Vec<_>>())?;

    // The files.
    let tokenizer = opened.tokenizer_json()?;
    let extras = GgufExtras {
        name: beside(folder).file_name().and_then(|name| name.to_str()),
        tokenizer_json: Some(&tokenizer),
        generation: opened.generation.clone(),
        chat_template: opened.chat_template.as_deref(),
        special_tokens: opened.special_tokens.clone(),
    };
    let mut last = None;
    for (block, small, report) in &forms {
        let path = flags.out.clone().unwrap_or_else(|| beside(folder).join(format!("model-{block}.gguf")));
        save(&path, small, &extras)?;
        say!("{}: {} bytes; what each tensor became, and its error:", path.display(), files::size(&path)?);
        say!("{}", tensors(report));
        last = Some(path);
    }
    let record = record(flags, &opened, (name, text.len()), forms, &measured);
    say!(
        "Perplexity on {} tokens of {}, in windows of {}; change against the model as it was.",
        record.tokens,
        record.text,
        record.window
    );
    say!("{}", record.table());
    if let Some(folder) = &flags.record {
        let folder = folder.join(&record.machine);
        files::create_dir(&folder)?;
        let path = folder.join(format!("{}-quantize.json", record.date));
        files::write_json(&path, &record)?;
        note!("Written to {}.", path.display());
    }
    if let Some(path) = last {
        say!("Chat with it: cargo run --release --example chat -- --model {}", path.display());
    }
    Ok(ExitCode::SUCCESS)
}

impl Flags {
    fn policy(&self, block: BlockType) -> Policy {
        let mut policy = Policy::new(block);
        if let Some(block) = self.embedding {
            policy = policy.with_embedding(block);
        }
        if let Some(block) = self.head {
            policy = policy.with_head(block);
        }
        self.tensor.iter().fold(policy, |policy, (pattern, block)| policy.with_pattern(pattern, *block))
    }
}

/// The folder of the run whose model it is, or the model's own.
fn beside(model: &Path) -> &Path {
    match model.parent() {
        Some(run) if run.join("checkpoint").is_dir() => run,
        _ => model,
    }
}

fn record(
    flags: &Flags,
    opened: &model::Opened,
    (text, tokens): (String, usize),
    forms: Vec<(BlockType, VesperLM, Report)>,
    measured: &[Measured],
) -> Record {
    let before = forms.first().map_or(0, |(_, _, report)| report.bytes_before());
    let mut measured = measured.iter().copied();
    let mut row = |name: String, bytes, tensors| Row {
        name,
        bytes,
        measured: measured.next().unwrap_or_default(),
        tensors,
    };
    Record {
        machine: machine(),
        date: today(),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        model: opened.source.display().to_string(),
        parameters: opened.model.config().num_parameters(),
        text,
        tokens: tokens.min(flags.tokens.max(flags.seq)) / flags.seq * flags.seq,
        window: flags.seq,
        before: row("f32".into(), before, Vec::new()),
        types: forms
            .into_iter()
            .map(|(block, _, report)| row(block.to_string(), report.bytes(), report.tensors))
            .collect(),
    }
}

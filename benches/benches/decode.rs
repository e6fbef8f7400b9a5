//! Tokens a second of decoding with a cache, against the rate at which memory could give the weights.
//!
//! ```text
//! cargo bench -p vesper-benches [--features cuda] --bench decode -- [nano small medium] [f32 bf16 q8_0 q4_k ...] [composed] [prompts]
//! ```
//!
//! A prompt of 64 tokens is read, then 128 tokens are chosen greedily, of one sequence and of eight, and of one also
//! given one by one, as a sampler does that looks at the logits of each; prefill is a prompt of 512 tokens, beside the
//! model's forward over the same tokens in training, by turns. On the CPU the presets nano and small in f32, bf16 and blocks of 8
//! and 4 bits, on CUDA also medium, in bf16, by the step that is replayed as a graph (`fused`) and by its launches
//! (`launched`). `composed` also measures decoding by the operations, without the fused step; `prompts` measures nothing
//! but the reading of prompts. The floor is what reading
//! the weights and the filled cache once takes at the rate of a copy on this machine; a model that fits into the caches
//! can be below it.
//!
//! A run writes `benches/record/<machine>/<date>-decode.json`, or the file that `VESPER_BENCH_RECORD` names. Lines that
//! `benches/peers/torch_decode.py` printed in the same session are taken into the record from the file that
//! `VESPER_BENCH_PEERS` names. Without `--bench`, which cargo bench passes, everything runs once on a tiny model and
//! nothing is written.

use std::error::Error;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarMap;
use serde::Serialize;
use vesper_benches::record::{machine_of, path, today, write};
use vesper_model::generate::{BatchLogits, NextLogits};
use vesper_model::ops::cuda_device;
use vesper_model::quantized::{BlockType, Policy};
use vesper_model::{DecodeStep, Result, VesperConfig, VesperLM};

/// Tokens of the prompt and after it, and of the long prompt.
#[derive(Clone, Copy)]
struct Sizes {
    prompt: usize,
    tokens: usize,
    prefill: usize,
    runs: usize,
    /// Of prompts and the forward in training.
    turns: usize,
}

/// The median and the extremes of several runs.
#[derive(Serialize)]
struct Rate {
    tokens_per_s: f64,
    least: f64,
    most: f64,
}

impl Rate {
    fn of(mut samples: Vec<f64>) -> Self {
        let tokens_per_s = median(&mut samples);
        let end = |sample: Option<&f64>| sample.copied().unwrap_or(f64::NAN);
        Self { tokens_per_s, least: end(samples.first()), most: end(samples.last()) }
    }
}

/// The median of samples, which are sorted.
fn median(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN)
}

#[derive(Serialize)]
struct Decoding {
    preset: String,
    /// The dtype of weights and computation, or the type of the weights' blocks beside f32.
    compute: String,
    batch: usize,
    step: String,
    decode: Rate,
    /// Tokens given one by one, with the logits of each; of one sequence.
    one_by_one: Option<Rate>,
    /// What a step reads at least: the weights, and the cache at the mean length.
    bytes_per_step: f64,
    /// The share of the rate of a copy at which they are read.
    share_of_copy: f64,
}

#[derive(Serialize)]
struct Prefill {
    preset: String,
    compute: String,
    tokens: usize,
    session: Rate,
    /// The forward of training over the same tokens, without the output layer.
    training_forward: Rate,
    /// The median of the ratios of each run of the session to the forward right after it.
    of_training: f64,
}

#[derive(Serialize)]
struct Record {
    bench: &'static str,
    date: String,
    machine: String,
    threads: usize,
    copy_gb_per_s: f64,
    decoding: Vec<Decoding>,
    prefill: Vec<Prefill>,
    /// What other programs printed about themselves in the same session.
    peers: Vec<String>,
}

/// `tokens` over the seconds of `f`, after a first run.
fn rate(device: &Device, runs: usize, tokens: usize, mut f: impl FnMut() -> Result<()>) -> Result<Rate> {
    f()?;
    let mut samples = Vec::with_capacity(runs);
    for _ in 0..runs {
        samples.push(tokens as f64 / seconds(device, &mut f)?);
    }
    Ok(Rate::of(samples))
}

fn seconds(device: &Device, f: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
    device.synchronize()?;
    let start = Instant::now();
    f()?;
    device.synchronize()?;
    Ok(start.elapsed().as_secs_f64())
}

fn ids(n: usize, vocab: usize, seed: usize) -> Vec<u32> {
    (0..n).map(|i| ((i + seed) * 7919 % vocab) as u32).collect()
}

/// Bytes a second of a copy that fits into no cache.
fn copy(device: &Device, runs: usize, bytes: usize) -> Result<f64> {
    let from = Tensor::ones(bytes / 4, DType::F32, device)?;
    if device.is_cpu() {
        use rayon::prelude::*;
        let from: Vec<f32> = from.to_vec1()?;
        let mut to = vec![0f32; from.len()];
        let rate = rate(device, runs, 2 * bytes, || {
            to.par_chunks_mut(1 << 18)
                .zip(from.par_chunks(1 << 18))
                .for_each(|(to, from)| to.copy_from_slice(from));
            Ok(())
        })?;
        return Ok(rate.tokens_per_s);
    }
    Ok(rate(device, runs, 2 * bytes, || Ok(from.copy().map(drop)?))?.tokens_per_s)
}

/// The rate, that of tokens one by one, and whether single tokens took a fused step.
fn decode(
    model: &VesperLM,
    batch: usize,
    step: DecodeStep,
    sizes: Sizes,
) -> Result<(Rate, Option<Rate>, bool)> {
    let capacity = (sizes.prompt + sizes.tokens).next_multiple_of(256);
    let vocab = model.config().vocab_size;
    let device = model.device();
    if batch == 1 {
        let mut session = model.session(capacity)?.with_step(step)?;
        session.append(&ids(sizes.prompt, vocab, 0))?;
        let chosen = rate(device, sizes.runs, sizes.tokens, || {
            session.truncate(sizes.prompt);
            session.greedy(&[1], sizes.tokens).map(drop)
        })?;
        let given = ids(sizes.tokens, vocab, 1);
        let one_by_one = rate(device, sizes.runs, sizes.tokens, || {
            session.truncate(sizes.prompt);
            given.iter().try_for_each(|id| session.append(&[*id]).map(drop))
        })?;
        return Ok((chosen, Some(one_by_one), session.is_fused()));
    }
    let mut session = model.batch_session(batch, capacity)?.with_step(step)?;
    let prompts: Vec<Vec<u32>> = (0..batch).map(|row| ids(sizes.prompt, vocab, row)).collect();
    session.append(&prompts.iter().map(Vec::as_slice).collect::<Vec<_>>())?;
    let rate = rate(device, sizes.runs, batch * sizes.tokens, || {
        (0..batch).for_each(|row| session.truncate(row, sizes.prompt));
        session.greedy(&vec![&[1][..]; batch], sizes.tokens).map(drop)
    })?;
    Ok((rate, None, session.is_fused()))
}

fn prefill(name: &str, form: Form, model: &VesperLM, sizes: Sizes) -> Result<Prefill> {
    let prompt = ids(sizes.prefill, model.config().vocab_size, 0);
    let tensor = Tensor::new(&prompt[..], model.device())?.unsqueeze(0)?;
    let mut session = model.session(sizes.prefill)?;
    let mut read = || {
        session.truncate(0);
        session.append(&prompt).map(drop)
    };
    let mut forward = || model.hidden_states(&tensor).map(drop);
    read()?;
    forward()?;
    let (mut session, mut training, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..sizes.turns {
        let (own, other) = (seconds(model.device(), &mut read)?, seconds(model.device(), &mut forward)?);
        session.push(sizes.prefill as f64 / own);
        training.push(sizes.prefill as f64 / other);
        ratios.push(other / own);
    }
    let row = Prefill {
        preset: name.into(),
        compute: form.to_string(),
        tokens: sizes.prefill,
        session: Rate::of(session),
        training_forward: Rate::of(training),
        of_training: median(&mut ratios),
    };
    println!(
        "prefill {name} {} {} tokens: {:.0} tok/s (from {:.0} to {:.0}); forward in training {:.0}, by turns {:.2} of it",
        row.compute,
        row.tokens,
        row.session.tokens_per_s,
        row.session.least,
        row.session.most,
        row.training_forward.tokens_per_s,
        row.of_training
    );
    Ok(row)
}

/// How a model's weights are held.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    Plain(DType),
    /// Beside f32.
    Blocks(BlockType),
}

impl Form {
    fn dtype(self) -> DType {
        match self {
            Self::Plain(dtype) => dtype,
            Self::Blocks(_) => DType::F32,
        }
    }

    /// The model in this form, and the bytes of its weights.
    fn model(self, config: &VesperConfig, device: &Device) -> Result<(VesperLM, usize)> {
        let dtype = self.dtype();
        let model = VesperLM::initialize(config, &VarMap::new(), 42, dtype, device)?;
        match self {
            Self::Plain(_) => Ok((model, config.num_parameters() * dtype.size_in_bytes())),
            Self::Blocks(block) => {
                let (model, report) = model.quantized(&Policy::new(block))?;
                Ok((model, report.bytes()))
            }
        }
    }
}

impl std::fmt::Display for Form {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Plain(dtype) => write!(f, "{dtype:?}"),
            Self::Blocks(block) => write!(f, "{block}"),
        }
    }
}

/// What one step reads at least, beside weights of so many bytes.
fn bytes(config: &VesperConfig, weights: usize, dtype: DType, batch: usize, sizes: Sizes) -> f64 {
    let length = sizes.prompt + sizes.tokens / 2;
    let position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim;
    (weights + batch * length * position * dtype.size_in_bytes()) as f64
}

fn measure(
    (name, config): (&str, &VesperConfig),
    form: Form,
    device: &Device,
    (sizes, composed, prompts): (Sizes, bool, bool),
    record: &mut Record,
) -> Result<()> {
    let (model, weights) = form.model(config, device)?;
    let mut steps = vec![DecodeStep::Captured];
    if device.is_cuda() {
        steps.push(DecodeStep::Fused); // elsewhere the same
    }
    if composed {
        steps.push(DecodeStep::Composed);
    }
    if prompts {
        steps.clear();
    }
    for step in steps {
        for batch in [1, 8] {
            let (decode, one_by_one, fused) = decode(&model, batch, step, sizes)?;
            let step = match step {
                _ if !fused => "composed",
                DecodeStep::Fused => "launched",
                _ => "fused",
            };
            let bytes_per_step = bytes(config, weights, form.dtype(), batch, sizes);
            let share = bytes_per_step * decode.tokens_per_s / batch as f64 / (record.copy_gb_per_s * 1e9);
            println!(
                "decode {name} {form} batch {batch} {step}: {:.1} tok/s (from {:.1} to {:.1}), {:.2} of a copy's rate",
                decode.tokens_per_s, decode.least, decode.most, share
            );
            if let Some(rate) = &one_by_one {
                println!(
                    "    one by one: {:.1} tok/s (from {:.1} to {:.1})",
                    rate.tokens_per_s, rate.least, rate.most
                );
            }
            record.decoding.push(Decoding {
                preset: name.into(),
                compute: form.to_string(),
                batch,
                step: step.into(),
                decode,
                one_by_one,
                bytes_per_step,
                share_of_copy: share,
            });
        }
    }
    record.prefill.push(prefill(name, form, &model, sizes)?);
    Ok(())
}

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let has = |word: &str| words.iter().any(|w| w == word);
    let device = cuda_device(0).unwrap_or(Device::Cpu);
    let mut record = Record {
        bench: "decode",
        date: today(),
        machine: machine_of(&device),
        threads: rayon::current_num_threads(),
        copy_gb_per_s: f64::NAN,
        decoding: Vec::new(),
        prefill: Vec::new(),
        peers: Vec::new(),
    };
    if !has("--bench") {
        let config = VesperConfig::preset("nano")?.with_vocab(64);
        let sizes = Sizes { prompt: 3, tokens: 4, prefill: 8, runs: 1, turns: 1 };
        record.copy_gb_per_s = copy(&device, 1, 1 << 12)? / 1e9;
        for form in [Form::Plain(DType::F32), Form::Blocks(BlockType::Q8_0)] {
            measure(("nano", &config), form, &device, (sizes, true, false), &mut record)?;
        }
        return Ok(());
    }
    let sizes = Sizes { prompt: 64, tokens: 128, prefill: 512, runs: 7, turns: 25 };
    record.copy_gb_per_s = copy(&device, 11, if device.is_cpu() { 1 << 28 } else { 1 << 31 })? / 1e9;
    println!("{}: copy {:.1} GB/s", record.machine, record.copy_gb_per_s);
    let chosen = |all: &[&'static str]| -> Vec<&'static str> {
        let named: Vec<_> = VesperConfig::PRESETS.into_iter().filter(|name| has(name)).collect();
        if named.is_empty() { all.to_vec() } else { named }
    };
    let presets = chosen(if device.is_cpu() { &["nano", "small"] } else { &["nano", "small", "medium"] });
    let plain = [DType::F32, DType::BF16].into_iter().filter(|d| has(d.as_str())).map(Form::Plain);
    let blocks = BlockType::ALL.into_iter().filter(|t| !t.is_plain() && has(t.name())).map(Form::Blocks);
    let named: Vec<Form> = plain.chain(blocks).collect();
    let forms = match (named.is_empty(), device.is_cpu()) {
        (false, _) => named,
        (true, true) => vec![
            Form::Plain(DType::F32),
            Form::Plain(DType::BF16),
            Form::Blocks(BlockType::Q8_0),
            Form::Blocks(BlockType::Q4K),
        ],
        (true, false) => vec![Form::Plain(DType::BF16)],
    };
    for name in presets {
        for &form in &forms {
            let config = VesperConfig::preset(name)?;
            measure((name, &config), form, &device, (sizes, has("composed"), has("prompts")), &mut record)?;
        }
    }
    if let Ok(path) = std::env::var("VESPER_BENCH_PEERS") {
        record.peers = std::fs::read_to_string(path)?.lines().map(str::to_owned).collect();
    }
    write(&path("decode", &record.date, &record.machine), &record)?;
    Ok(())
}

//! AdamW (candle's own) against Velvet: the same model, data, seeds and number of steps, each with its own sweep of
//! learning rates, compared on held-out text at the end of the schedule.
//!
//!     cargo run --release --example benchmark -- --steps 300 --seeds 3

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Var};
use candle_nn::{AdamW, Optimizer as _, ParamsAdamW, VarMap};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use velvet_optim::{Schedule, Span, Velvet, VelvetConfig};
use vesper_data::{BatchSampler, SamplerConfig};
use vesper_examples::chart::{self, Line};
use vesper_examples::data::Data;
use vesper_examples::evaluate::held_out_loss;
use vesper_examples::interrupt::Interrupt;
use vesper_examples::settings::{Flags as TrainFlags, Settings};
use vesper_examples::{device, files, runs, say};
use vesper_model::{VesperConfig, VesperLM, trainable};

/// Compare candle's AdamW with Velvet on the same budget.
#[derive(Debug, Parser)]
#[command(name = "benchmark", version, long_about = None)]
struct Flags {
    /// Model size
    #[arg(long, default_value = "nano")]
    size: String,
    /// Text to train on [default: the embedded stories]
    #[arg(long, num_args = 1.., value_name = "PATH")]
    data: Option<Vec<PathBuf>>,
    /// A tokenizer.json [default: a byte-level BPE trained on the data]
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Optimizer steps a run
    #[arg(long, default_value_t = 200)]
    steps: u64,
    /// Sequences a step
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens a sequence
    #[arg(long, default_value_t = 128)]
    seq: usize,
    /// Learning rates that both sides try
    #[arg(long, value_delimiter = ',', default_values_t = [1e-3, 2e-3, 4e-3, 8e-3])]
    lrs: Vec<f64>,
    /// Seeds: of the first weights and of the order of the data, the same on both sides
    #[arg(long, default_value_t = 2)]
    seeds: u64,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Folder of the results [default: the first free runs/benchmark-N]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Both sides: betas .9 and .95, weight decay .1, clipping at norm 1, linear decay over the last 90 %. AdamW warms up
/// over 5 % of the steps, Velvet has its trust region in place of that; AdamW decays every tensor, as candle's does.
const BETAS: (f64, f64) = (0.9, 0.95);
const WEIGHT_DECAY: f64 = 0.1;
const CLIP: f64 = 1.0;

/// Held-out tokens that each run ends on.
const EVAL_TOKENS: usize = 32_768;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Arm {
    AdamW,
    Velvet,
}

impl Arm {
    const ALL: [Self; 2] = [Self::AdamW, Self::Velvet];

    fn name(self) -> &'static str {
        match self {
            Self::AdamW => "AdamW (candle)",
            Self::Velvet => "Velvet",
        }
    }
}

/// One run. Losses in nats a token.
#[derive(Debug, Clone, Serialize)]
struct Outcome {
    optimizer: Arm,
    lr: f64,
    seed: u64,
    /// Held-out, at the end.
    eval_loss: f64,
    /// Seconds in the optimizer's step, clipping included.
    optimizer_seconds: f64,
    /// Seconds in training steps.
    seconds: f64,
    /// Training loss of each step.
    #[serde(skip)]
    curve: Vec<f64>,
}

#[derive(Debug, Serialize)]
struct Report {
    size: String,
    parameters: usize,
    data: String,
    floor: Option<f64>,
    unigram_entropy: f64,
    steps: u64,
    tokens_per_step: usize,
    device: String,
    outcomes: Vec<Outcome>,
}

fn main() -> ExitCode {
    vesper_examples::leave_the_threads_to_the_fused_operations();
    vesper_examples::run(|| benchmark(&vesper_examples::flags()?))
}

fn benchmark(flags: &Flags) -> Result<ExitCode> {
    if flags.lrs.is_empty() || flags.seeds == 0 {
        bail!("--lrs and --seeds: at least one each");
    }
    let device = device::open(&flags.device)?;
    let settings = TrainFlags {
        size: Some(flags.size.clone()),
        data: flags.data.clone(),
        tokenizer: flags.tokenizer.clone(),
        steps: Some(flags.steps),
        batch: Some(flags.batch),
        seq: Some(flags.seq),
        ..TrainFlags::default()
    }
    .settings()?;
    for &lr in &flags.lrs {
        if !(lr.is_finite() && lr > 0.0) {
            bail!("--lrs {lr}: expected positive numbers");
        }
    }
    let out = runs::results_folder(flags.out.as_deref(), "benchmark")?;
    let preset = VesperConfig::preset(&flags.size)?;
    let stopped = "Stopped before the comparison had ended: nothing is kept";
    let (mut folder, _) = Interrupt::catch_in_new_folder(&out, stopped)?;
    let data = Data::prepare(&settings, &preset, None, &out.join("cache"))?;
    let mut config = preset.with_vocab(data.tokenizer.vocab_size());
    config.max_position_embeddings = config.max_position_embeddings.max(flags.seq);
    say!(
        "{} with {} parameters on {}: {} steps of {} tokens; {} learning rates x {} seeds for each optimizer",
        flags.size,
        config.num_parameters(),
        data.name,
        flags.steps,
        flags.batch * flags.seq,
        flags.lrs.len(),
        flags.seeds
    );

    let runs_in_all = 2 * flags.lrs.len() as u64 * flags.seeds;
    let bar = ProgressBar::new(runs_in_all * flags.steps);
    if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg}, {eta} left") {
        bar.set_style(style);
    }
    let mut outcomes = Vec::new();
    for seed in 0..flags.seeds {
        for &lr in &flags.lrs {
            for arm in Arm::ALL {
                bar.set_message(format!("{} lr {lr} seed {seed}", arm.name()));
                outcomes.push(run(arm, lr, seed, &config, &settings, &data, &device, &bar)?);
            }
        }
    }
    bar.finish_and_clear();

    let report = Report {
        size: flags.size.clone(),
        parameters: config.num_parameters(),
        data: data.name.clone(),
        floor: data.floor,
        unigram_entropy: data.unigram_entropy,
        steps: flags.steps,
        tokens_per_step: flags.batch * flags.seq,
        device: flags.device.clone(),
        outcomes,
    };
    table(&report, &flags.lrs);
    folder.keep();
    write(&report, &flags.lrs, &out)?;
    Ok(ExitCode::SUCCESS)
}

#[allow(clippy::too_many_arguments)]
fn run(
    arm: Arm,
    lr: f64,
    seed: u64,
    config: &VesperConfig,
    settings: &Settings,
    data: &Data,
    device: &Device,
    bar: &ProgressBar,
) -> Result<Outcome> {
    let varmap = VarMap::new();
    let model = VesperLM::initialize(config, &varmap, seed, DType::F32, device)?;
    let named = trainable(config, &varmap)?;
    let vars: Vec<Var> = named.iter().map(|(_, var)| var.clone()).collect();
    let sampler = SamplerConfig::default().with_batch(settings.batch).with_seq(settings.seq).with_seed(seed);
    let mut batches = BatchSampler::new(data.train.clone(), sampler)?;

    let mut adamw = None;
    let mut velvet = None;
    match arm {
        Arm::AdamW => {
            let params = ParamsAdamW {
                lr,
                beta1: BETAS.0,
                beta2: BETAS.1,
                weight_decay: WEIGHT_DECAY,
                ..ParamsAdamW::default()
            };
            adamw = Some(AdamW::new(vars.clone(), params)?);
        }
        Arm::Velvet => {
            velvet = Some(Velvet::named(named, VelvetConfig::language_model(config.vocab_size).with_lr(lr))?);
        }
    }
    let warm_up = Span::Fraction(if arm == Arm::AdamW { 0.05 } else { 0.0 });
    let schedule = Schedule::Linear { warm_up, decay: Span::Fraction(0.9), end: 0.0 };
    let (mut optimizer_seconds, mut seconds) = (0.0, 0.0);
    let mut curve = Vec::new();
    for step in 1..=settings.steps {
        let started = Instant::now();
        let batch = batches.next_batch(device)?;
        let loss = model.loss(&batch.inputs, &batch.targets)?.loss;
        curve.push(f64::from(loss.to_scalar::<f32>()?));
        let mut grads = loss.backward()?;
        device.synchronize()?;
        let updating = Instant::now();
        if let Some(adamw) = &mut adamw {
            clip(&mut grads, &vars)?;
            adamw.set_learning_rate(schedule.lr(lr, step - 1, settings.steps));
            adamw.step(&grads)?;
        }
        if let Some(velvet) = &mut velvet {
            velvet.set_learning_rate(schedule.lr(lr, step - 1, settings.steps));
            velvet.observe(&loss)?;
            // A diverged run counts as lost, not as an error.
            if velvet.try_step(&grads).is_err() {
                curve.push(f64::NAN);
            }
        }
        device.synchronize()?;
        optimizer_seconds += updating.elapsed().as_secs_f64();
        seconds += started.elapsed().as_secs_f64();
        bar.inc(1);
        if !curve.last().is_some_and(|loss| loss.is_finite()) {
            bar.inc(settings.steps - step);
            break;
        }
    }
    let eval_loss =
        held_out_loss(&model.detach(), &data.eval, settings, device, settings.eval_tokens(EVAL_TOKENS))?;
    Ok(Outcome { optimizer: arm, lr, seed, eval_loss, optimizer_seconds, seconds, curve })
}

/// Global-norm clipping in candle ops, since candle's AdamW has none.
fn clip(grads: &mut GradStore, vars: &[Var]) -> Result<()> {
    let mut squares = 0.0;
    for var in vars {
        if let Some(g) = grads.get(var) {
            squares += f64::from(g.sqr()?.sum_all()?.to_scalar::<f32>()?);
        }
    }
    let scale = (CLIP / (squares.sqrt() + 1e-6)).min(1.0);
    if scale < 1.0 {
        for var in vars {
            if let Some(g) = grads.remove(var) {
                grads.insert(var, (g * scale)?);
            }
        }
    }
    Ok(())
}

/// Mean and sample standard deviation.
fn spread(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, variance.sqrt())
}

fn losses(report: &Report, arm: Arm, lr: f64) -> Vec<f64> {
    report.outcomes.iter().filter(|o| o.optimizer == arm && o.lr == lr).map(|o| o.eval_loss).collect()
}

/// The learning rate with the lowest mean loss; runs that diverged lose.
fn best(report: &Report, lrs: &[f64], arm: Arm) -> Option<f64> {
    let mean = |lr: f64| {
        let (mean, _) = spread(&losses(report, arm, lr));
        if mean.is_nan() { f64::INFINITY } else { mean }
    };
    lrs.iter().copied().min_by(|&a, &b| mean(a).total_cmp(&mean(b)))
}

fn table(report: &Report, lrs: &[f64]) {
    say!("\nHeld-out loss, nats a token: mean over the seeds and standard deviation");
    let heads: Vec<String> = lrs.iter().map(|lr| format!("{:>16}", format!("lr {lr}"))).collect();
    say!("{:<16}{}", "", heads.concat());
    for arm in Arm::ALL {
        let cells: Vec<String> = lrs
            .iter()
            .map(|&lr| {
                let (mean, deviation) = spread(&losses(report, arm, lr));
                format!("{:>16}", format!("{mean:.3} ± {deviation:.3}"))
            })
            .collect();
        say!("{:<16}{}", arm.name(), cells.concat());
    }
    let mut at_best = Vec::new();
    for arm in Arm::ALL {
        if let Some(lr) = best(report, lrs, arm) {
            let mine = report.outcomes.iter().filter(|o| o.optimizer == arm && o.lr == lr);
            let (loss, deviation) = spread(&mine.clone().map(|o| o.eval_loss).collect::<Vec<_>>());
            let (step, _) =
                spread(&mine.map(|o| 1e3 * o.optimizer_seconds / report.steps as f64).collect::<Vec<_>>());
            say!("{}: best at lr {lr}: {loss:.4} ± {deviation:.4}, optimizer step {step:.2} ms", arm.name());
            at_best.push((loss, deviation, step));
        }
    }
    if let [(a, da, sa), (v, dv, sv)] = at_best[..] {
        say!(
            "Velvet - AdamW at their best: {:+.4} nats (standard deviations {da:.4} and {dv:.4}, {} seeds); optimizer step {:.1} times as fast \
             (Velvet's orthogonalises the hidden matrices, which takes matrix products that AdamW's rule has not)",
            v - a,
            report.outcomes.len() / (2 * lrs.len()),
            sa / sv
        );
    }
    if let Some(floor) = report.floor {
        say!("Floor of the held-out text: {floor:.4}");
    }
}

fn write(report: &Report, lrs: &[f64], out: &Path) -> Result<()> {
    files::write_json(&out.join("benchmark.json"), report)?;
    let mut lines = Vec::new();
    for arm in Arm::ALL {
        let Some(lr) = best(report, lrs, arm) else { continue };
        let run = report.outcomes.iter().find(|o| o.optimizer == arm && o.lr == lr).context("no run")?;
        let mut average = None;
        let points = run
            .curve
            .iter()
            .enumerate()
            .map(|(i, &loss)| {
                let value = average.map_or(loss, |a: f64| 0.9 * a + 0.1 * loss);
                average = Some(value);
                ((i + 1) as f64, value)
            })
            .collect();
        lines.push(Line { name: format!("{}, lr {lr}", arm.name()), points, faint: false });
    }
    let path = out.join("benchmark.svg");
    chart::write(&path, "Training loss at the best learning rate", ("step", "nats a token"), &lines)?;
    say!("Written: {} and {}", out.join("benchmark.json").display(), path.display());
    Ok(())
}

//! Fine-tunes a trained model on other text with each kind of adapter, and compares them.
//!
//!     cargo run --release --example finetune -- --data my.txt
//!     cargo run --release --example finetune -- --model runs/nano-1 --data my.txt --method lora flylora --lr 1e-3 3e-3
//!
//! Every adapter is saved as Hugging Face PEFT saves it, and merged into a model of its own where that is exact:
//!
//!     cargo run --release --example chat -- --model runs/nano-1 --adapter runs/finetune-1/lora/adapter
//!     cargo run --release --example chat -- --model runs/finetune-1/lora/model

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Var};
use candle_nn::{Optimizer as _, VarMap};
use clap::{Parser, ValueEnum};
use flylora::{
    AdaLoraAdapter, AdaLoraConfig, Adapter, AdapterKind, FlyLoraConfig, LoraConfig, LoraInit,
    MaskedLoraConfig, RankBudget, RankBudgetConfig, Scaling, Step, Targets, penalty,
};
use velvet_optim::{PerplexityMomentum, Schedule, Span, TrustRegion, Velvet, VelvetConfig};
use vesper_data::{BatchSampler, SamplerConfig, Sources, TextTokenizer, TokenCache, Tokens};
use vesper_examples::evaluate::held_out_loss;
use vesper_examples::finetune::comparison::{Comparison, Row};
use vesper_examples::finetune::memory::{Counting, Memory};
use vesper_examples::interrupt::Interrupt;
use vesper_examples::settings::Settings;
use vesper_examples::{INTERRUPTED, device, export, files, model, printable, runs, say, settings};
use vesper_model::ops::backward;
use vesper_model::{VesperConfig, VesperLM, hf, trainable};

/// Held-out tokens that a method is judged by.
const EVAL_TOKENS: usize = 32_768;
/// The share of the text that is held out.
const EVAL_SHARE: f64 = 0.1;

/// Fine-tune a trained model on other text with each kind of adapter, and compare them.
#[derive(Debug, Parser)]
#[command(name = "finetune", version, long_about = None)]
struct Flags {
    /// Folder of a run or of a model, or a GGUF file, which stays quantised [default: the last trained run]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Files, folders and patterns of text, JSON, JSONL, SQuAD or Parquet, compressed or not
    #[arg(long, num_args = 1.., required = true, value_name = "PATH")]
    data: Vec<PathBuf>,
    /// Methods to compare [default: all]
    #[arg(long, num_args = 1..)]
    method: Vec<Method>,
    /// Learning rates to try; the one with the lowest held-out loss counts [default: 1e-3 3e-3 1e-2]
    #[arg(long, num_args = 1.., value_name = "LR", allow_negative_numbers = true)]
    lr: Vec<f64>,
    /// Rank; FlyLoRA has four times as many, of which a token uses this many
    #[arg(long, default_value_t = 8)]
    rank: usize,
    /// Share of the adapters' input that is dropped in training; FlyLoRA has no dropout
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    dropout: f64,
    /// Projections with an adapter, by their Hugging Face names [default: all]
    #[arg(long, num_args = 1.., value_name = "NAME")]
    targets: Vec<String>,
    /// Optimizer steps
    #[arg(long, default_value_t = 200)]
    steps: u64,
    /// Sequences a step
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens a sequence
    #[arg(long, default_value_t = 128)]
    seq: usize,
    /// Seed of the adapters and of the order of the data
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Folder of what comes of it [default: the first free runs/finetune-N]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// A way of fine-tuning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Method {
    Lora,
    Rslora,
    Pissa,
    Dora,
    Adalora,
    Flylora,
    Masked,
    /// All weights of the model
    Full,
}

impl Method {
    fn name(self) -> &'static str {
        match self {
            Self::Lora => "lora",
            Self::Rslora => "rslora",
            Self::Pissa => "pissa",
            Self::Dora => "dora",
            Self::Adalora => "adalora",
            Self::Flylora => "flylora",
            Self::Masked => "masked",
            Self::Full => "full",
        }
    }

    /// The adapter, with a scale of 2 for all but the rank-stabilised one.
    fn kind(self, r: usize, seed: u64, dropout: f64) -> Option<AdapterKind> {
        let lora = LoraConfig::default().with_r(r).with_alpha(2.0 * r as f64).with_seed(seed);
        let lora = lora.with_dropout(dropout);
        Some(match self {
            Self::Lora => AdapterKind::Lora(lora),
            Self::Rslora => AdapterKind::Lora(lora.with_scaling(Scaling::AlphaOverSqrtR)),
            Self::Pissa => AdapterKind::Lora(lora.with_init(LoraInit::Pissa { iterations: Some(4) })),
            Self::Dora => AdapterKind::Dora(lora),
            Self::Adalora => {
                let init_r = r + r.div_ceil(2);
                AdapterKind::AdaLora(
                    AdaLoraConfig::default()
                        .with_init_r(init_r)
                        .with_alpha(2.0 * init_r as f64)
                        .with_seed(seed)
                        .with_dropout(dropout),
                )
            }
            Self::Flylora => AdapterKind::FlyLora(
                FlyLoraConfig::default().with_ranks(4 * r, r).with_alpha(8.0 * r as f64).with_seed(seed),
            ),
            Self::Masked => AdapterKind::MaskedLora(MaskedLoraConfig::default().with_lora(lora)),
            Self::Full => return None,
        })
    }
}

struct Run<'a> {
    flags: &'a Flags,
    /// The model as it was, and where it is from.
    base: model::Opened,
    config: VesperConfig,
    tokenizer: TextTokenizer,
    settings: Settings,
    device: Device,
    train: Tokens,
    eval: Tokens,
    interrupt: Interrupt,
}

/// A model that has been trained, and what that took.
struct Trained {
    model: VesperLM,
    loss: f64,
    trainable: usize,
    active: usize,
    seconds: f64,
    peak_bytes: usize,
}

fn main() -> ExitCode {
    vesper_examples::leave_the_threads_to_the_fused_operations();
    vesper_examples::run(|| finetune(&vesper_examples::flags()?))
}

fn finetune(flags: &Flags) -> Result<ExitCode> {
    let device = device::open(&flags.device)?;
    let base = model::open(flags.model.as_deref(), &device)?;
    let config = base.model.config().clone();
    let rates = if flags.lr.is_empty() { vec![1e-3, 3e-3, 1e-2] } else { flags.lr.clone() };
    if let Some(lr) = rates.iter().find(|lr| !(lr.is_finite() && **lr > 0.0)) {
        bail!("--lr {lr}: expected a positive number");
    }
    if !(0.0..1.0).contains(&flags.dropout) {
        bail!("--dropout {}: expected a share from 0 up to 1, without it", flags.dropout);
    }
    if flags.seq > config.max_position_embeddings {
        bail!("--seq {}: the model reads at most {} tokens", flags.seq, config.max_position_embeddings);
    }
    if base.source.is_file() && flags.method.contains(&Method::Full) {
        bail!("--method full: the weights of {} do not train, adapters over them do", base.source.display());
    }
    let mut methods =
        if flags.method.is_empty() { Method::value_variants().to_vec() } else { flags.method.clone() };
    if base.source.is_file() {
        methods.retain(|method| *method != Method::Full);
    }
    flags.check_adapters(&methods, &base.model)?;
    let settings = settings::Flags {
        steps: Some(flags.steps),
        batch: Some(flags.batch),
        seq: Some(flags.seq),
        seed: Some(flags.seed),
        device: Some(flags.device.clone()),
        ..settings::Flags::default()
    };
    let settings = settings.settings()?;
    let out = runs::results_folder(flags.out.as_deref(), "finetune")?;
    let stopped = "Stopped before a training had ended: nothing is kept";
    let (mut folder, interrupt) = Interrupt::catch_in_new_folder(&out, stopped)?;
    let tokenizer = base.text_tokenizer(&out)?;
    let cache = out.join("cache");
    files::create_dir(&cache)?;
    let (cache, _) = TokenCache::open_or_build(&cache, &Sources::new(&flags.data), &tokenizer)?;
    let (train, eval) = cache.tokens().split(EVAL_SHARE)?;
    if train.len() <= flags.seq || eval.len() <= flags.seq {
        let (train, eval) = (train.len(), eval.len());
        bail!("--seq {} is longer than the data: {train} tokens to train on, {eval} held out", flags.seq);
    }
    let run = Run { flags, base, config, tokenizer, settings, device, train, eval, interrupt };
    let source = &run.base.source;
    let base_loss = run.held_out(&run.base.model)?;
    say!(
        "{}: {} parameters, held-out loss {base_loss:.4} on the new text ({} tokens to train on)",
        source.display(),
        run.config.num_parameters(),
        run.train.len()
    );
    let runs = methods.len() * rates.len();
    if runs > 1 {
        say!("{runs} trainings of {} steps follow; --method and --lr name fewer", flags.steps);
    }
    let mut comparison = Comparison {
        model: source.display().to_string(),
        data: flags.data.clone(),
        rank: flags.rank,
        dropout: flags.dropout,
        steps: flags.steps,
        batch: flags.batch,
        seq: flags.seq,
        seed: flags.seed,
        train_tokens: run.train.len(),
        held_out_tokens: run.eval.len(),
        base_loss,
        methods: Vec::new(),
    };
    let mut done = 0;
    let mut best: Option<(f64, Method, VesperLM)> = None;
    for method in methods {
        let mut tried = Vec::new();
        let mut winner: Option<(f64, Trained)> = None;
        for &lr in &rates {
            let trained = run.train(method, lr).with_context(|| format!("{} with lr {lr}", method.name()))?;
            let Some(trained) = trained else { break };
            done += 1;
            let (name, loss, seconds) = (method.name(), trained.loss, trained.seconds);
            say!("  {name:8} lr {lr:<8} held-out loss {loss:.4}, {seconds:.0} s");
            tried.push((lr, trained.loss));
            // A rate at which training diverges loses; it does not end the comparison.
            if trained.loss.is_finite() && winner.as_ref().is_none_or(|(_, w)| trained.loss < w.loss) {
                winner = Some((lr, trained));
                folder.keep();
            }
        }
        let Some((lr, trained)) = winner else {
            if tried.len() < rates.len() {
                break; // stopped
            }
            say!(
                "  {}: the held-out loss is no number at any of the learning rates {rates:?}",
                method.name()
            );
            continue;
        };
        let merge = run.save(&out.join(method.name()), method, &trained.model)?;
        comparison.methods.push(Row {
            method: method.name(),
            lr,
            held_out_loss: trained.loss,
            tried,
            trainable: trained.trainable,
            active_per_token: trained.active,
            percent: 100.0 * trained.trainable as f64 / run.config.num_parameters() as f64,
            seconds: trained.seconds,
            peak_bytes: run.device.is_cpu().then_some(trained.peak_bytes),
            merge,
        });
        // After each, so that nothing is lost where a later one fails.
        files::write_json(&out.join("finetune.json"), &comparison)?;
        if method != Method::Full && best.as_ref().is_none_or(|(loss, ..)| trained.loss < *loss) {
            best = Some((trained.loss, method, trained.model));
        }
    }
    if comparison.methods.is_empty() {
        bail!("no method has a learning rate that gives a held-out loss: nothing is kept");
    }
    comparison.print(&out);
    if done < runs {
        say!("Stopped after {done} of {runs} trainings");
        return Ok(ExitCode::from(INTERRUPTED));
    }

    if let Some((_, method, model)) = best {
        if let Some(text) = export::sample(&model, &run.tokenizer)? {
            say!("\nWith the adapter of {} it writes:\n{}", method.name(), printable(&text));
        }
        if let Some(merged) = model.merged()?
            && let Some(text) = export::sample(&merged, &run.tokenizer)?
        {
            say!("\nMerged it writes:\n{}", printable(&text));
        }
        let adapter = out.join(method.name()).join("adapter");
        say!(
            "\nChat with it: cargo run --release --example chat -- --model {} --adapter {}",
            source.display(),
            adapter.display()
        );
    }
    Ok(ExitCode::SUCCESS)
}

impl Flags {
    fn targets(&self) -> Targets {
        if self.targets.is_empty() {
            return Targets::all_linear();
        }
        Targets::names(self.targets.iter().cloned())
    }

    /// Whether the adapters of these methods fit the model, before any work: targets that it has, a rank that the largest of
    /// them can have, and the smallest, too, where an adapter begins with singular directions.
    fn check_adapters(&self, methods: &[Method], model: &VesperLM) -> Result<()> {
        let rank = self.rank;
        if methods.iter().all(|method| *method == Method::Full) {
            return Ok(());
        }
        if rank == 0 {
            bail!("--rank 0: expected at least 1");
        }
        // The sizes of the matrices, by the smallest of adapters on them.
        let least = AdapterKind::Lora(LoraConfig::default().with_r(1));
        let with = |targets: &Targets| {
            let mut small = model.clone();
            small.attach(&least, targets).map(|()| small)
        };
        for target in &self.targets {
            with(&Targets::names([target.clone()])).with_context(|| format!("--targets {target}"))?;
        }
        let small = with(&self.targets())?;
        let mut sides = Vec::new();
        for (path, adapter) in small.adapters() {
            let sizes = adapter.parameters().iter().map(|(_, var)| var.elem_count()).min();
            sides.extend(sizes.map(|side| (side, path)));
        }
        let (Some((side, path)), Some((smallest, narrow))) = (sides.iter().max(), sides.iter().min()) else {
            return Ok(());
        };
        if rank > *side {
            bail!(
                "--rank {rank}: {path}, the largest of the targeted matrices, has a rank of {side} at most"
            );
        }
        if methods.contains(&Method::Pissa) && rank > *smallest {
            bail!(
                "--rank {rank}: PiSSA begins with so many singular directions, and {narrow} has {smallest}"
            );
        }
        Ok(())
    }
}

impl Run<'_> {
    fn held_out(&self, model: &VesperLM) -> Result<f64> {
        held_out_loss(&model.detach(), &self.eval, &self.settings, &self.device, EVAL_TOKENS)
    }

    /// Trains from the base with one method and one learning rate; nothing where Ctrl-C stops it.
    fn train(&self, method: Method, lr: f64) -> Result<Option<Trained>> {
        let flags = self.flags;
        // The model: all of it as variables, or frozen with adapters.
        let varmap = VarMap::new();
        let (model, named): (VesperLM, Vec<(String, Var)>) =
            match method.kind(flags.rank, flags.seed, flags.dropout) {
                None => {
                    let model = VesperLM::load_into(
                        &self.base.source,
                        None,
                        &varmap,
                        flags.seed,
                        DType::F32,
                        &self.device,
                    )?;
                    (model, trainable(&self.config, &varmap)?)
                }
                Some(kind) => {
                    let mut model = model::weights(&self.base.source, &self.device)?;
                    model.attach(&kind, &flags.targets())?;
                    let named = model
                        .adapters()
                        .iter()
                        .flat_map(|(path, adapter)| {
                            let named = |(name, var)| (format!("{path}.{name}"), var);
                            adapter.parameters().into_iter().map(named).collect::<Vec<_>>()
                        })
                        .collect();
                    (model, named)
                }
            };
        let adapters = model.adapters();
        let ada: Vec<(&str, &AdaLoraAdapter)> =
            adapters.iter().filter_map(|(path, a)| Some((path.as_str(), a.as_ada_lora()?))).collect();
        let phase = flags.steps / 5;
        let budget = RankBudgetConfig::default().with_target_r(flags.rank).with_phases(phase, phase);
        let mut budget = RankBudget::new(budget.with_every((flags.steps / 50).max(1)))?;

        // The optimizer: AdamW, warmed up and then down to 0.
        let config = VelvetConfig {
            hidden_matrices: None,
            perplexity_momentum: PerplexityMomentum::Off,
            trust_region: TrustRegion::Off,
            weight_decay: 0.0,
            ..VelvetConfig::language_model(self.config.vocab_size).with_lr(lr)
        };
        let count = |named: &[(String, Var)]| named.iter().map(|(_, var)| var.elem_count()).sum::<usize>();
        let trained_values = count(&named);
        let mut optimizer = Velvet::named(named.clone(), config)?;
        let schedule =
            Schedule::Linear { warm_up: Span::Fraction(0.05), decay: Span::Fraction(0.95), end: 0.0 };
        let sampler =
            SamplerConfig::default().with_batch(flags.batch).with_seq(flags.seq).with_seed(flags.seed);
        let mut batches = BatchSampler::new(self.train.clone(), sampler)?;

        let memory = Memory::start();
        let started = Instant::now();
        let mut diverged = false;
        for index in 1..=flags.steps {
            if self.interrupt.is_set() {
                return Ok(None);
            }
            for (_, adapter) in &adapters {
                adapter.set_training(Some(index));
            }
            let batch = batches.next_batch(&self.device)?; // inputs, targets: (batch, seq)
            let mut loss = model.loss(&batch.inputs, &batch.targets)?.loss;
            if let Some(penalty) = penalty(adapters.iter().map(|(_, adapter)| adapter))? {
                loss = (loss + penalty)?;
            }
            optimizer.set_learning_rate(schedule.lr(lr, index - 1, flags.steps));
            let grads = backward(&loss)?;
            if index == 1 {
                flylora::audit(named.iter().map(|(name, var)| (name, var.clone())), &grads)?;
            }
            match optimizer.try_step(&grads) {
                Err(velvet_optim::Error::NonFiniteGradients { .. }) => {
                    diverged = true;
                    break;
                }
                other => other?,
            }
            let step = Step { index, total: flags.steps };
            for (_, adapter) in &adapters {
                adapter.after_step(step, &grads)?;
            }
            if !ada.is_empty() {
                budget.update(step, &grads, &ada)?;
            }
        }
        for (_, adapter) in &adapters {
            adapter.set_training(None);
        }
        let (seconds, peak_bytes) = (started.elapsed().as_secs_f64(), memory.peak());
        let loss = if diverged { f64::NAN } else { self.held_out(&model)? };
        let active = match method {
            Method::Full => trained_values,
            _ => adapters.iter().map(|(_, adapter)| adapter.active_parameters()).sum(),
        };
        Ok(Some(Trained { loss, trainable: trained_values, active, seconds, peak_bytes, model }))
    }

    /// Leaves the adapters, and the model with them in its weights, in a folder; says whether merging is exact.
    fn save(&self, dir: &Path, method: Method, model: &VesperLM) -> Result<&'static str> {
        files::create_dir(dir)?;
        if method != Method::Full {
            model.save_adapters(dir.join("adapter"))?;
        }
        let Some(merged) = model.merged()? else { return Ok("unsupported") };
        let tokenizer = self.base.tokenizer_json()?;
        let generation = self.base.generation.clone();
        let extras = hf::Extras { tokenizer_json: Some(&tokenizer), generation, ..hf::Extras::default() };
        // Over blocks the merged model is one of numbers again.
        let merged = merged.dequantized()?;
        let folder = dir.join("model");
        hf::save(&folder, merged.config(), &merged.weights(), &extras)?;
        model::copy_companions(&self.base.source, &folder)?;
        Ok("exact")
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

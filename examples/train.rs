//! Trains a VesperLM from text to a model that `chat` talks with.
//!
//!     cargo run --release --example train
//!     cargo run --release --example train -- --data my.txt more/ --size tiny --steps 5000
//!     cargo run --release --example train -- --resume

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use candle_nn::{Optimizer as _, VarMap};
use clap::Parser;
use serde::Serialize;
use velvet_optim::{EntropyLr, PerplexityMomentum, Velvet, VelvetConfig};
use vesper_data::{BatchSampler, EvalBatches, SamplerConfig, Tokens};
use vesper_examples::checkpoint::{self, Checkpoint, State};
use vesper_examples::data::Data;
use vesper_examples::interrupt::Interrupt;
use vesper_examples::log::{Log, Record};
use vesper_examples::progress::Progress;
use vesper_examples::schedule::Schedule;
use vesper_examples::settings::{Flags, Optimizer, Settings};
use vesper_examples::{INTERRUPTED, chart, device, files, runs, say};
use vesper_model::generate::{GenerationConfig, Generator};
use vesper_model::{VesperConfig, VesperLM, hf, trainable};

/// Held-out tokens read at each evaluation, and at the last one.
const EVAL_TOKENS: usize = 16_384;
const FINAL_EVAL_TOKENS: usize = 65_536;

fn main() -> ExitCode {
    vesper_examples::run(|| train(&Flags::parse()))
}

fn train(flags: &Flags) -> Result<ExitCode> {
    let (out, stored) = open_run(flags)?;
    let checkpoint = Checkpoint::of(&out);
    let settings = match &stored {
        Some(state) => flags.resumed(state.settings.clone())?,
        None => flags.settings()?,
    };
    let device = device::open(&settings.device)?;
    let preset = VesperConfig::preset(&settings.size)?;

    // Text to tokens.
    let tokenizer = stored.is_some().then(|| checkpoint.tokenizer());
    let data = Data::prepare(&settings, preset.vocab_size, tokenizer.as_deref(), &out.join("cache"))?;
    let sampler = SamplerConfig::default()
        .with_batch(settings.batch)
        .with_seq(settings.seq)
        .with_seed(settings.seed);
    let mut batches = BatchSampler::new(data.train.clone(), sampler)?;

    // The model: parameters in f32, activations in --dtype.
    let config = model_config(preset, &settings, &data)?;
    let varmap = VarMap::new();
    let model = VesperLM::initialize(&config, &varmap, settings.seed, DType::F32, &device)?
        .with_compute_dtype(settings.dtype.candle());
    let evaluator = model.detach();

    // The optimizer.
    let mut optimizer = Velvet::named(trainable(&config, &varmap)?, optimizer_config(&settings, &config))?;
    let schedule = Schedule {
        steps: settings.steps,
        // Velvet's own warm-up follows the loss.
        warmup: if settings.optimizer == Optimizer::Velvet { 0.0 } else { 0.05 },
        decay: 0.5,
    };

    // Where an earlier part of the run stopped.
    let (mut done, mut seconds) = (0, 0.0);
    if let Some(state) = &stored {
        checkpoint.load_model(state.step, &varmap, &device)?;
        checkpoint.load_optimizer(state.step, &mut optimizer)?;
        batches.restore(&state.sampler)?;
        (done, seconds) = (state.step, state.seconds);
    }
    files::create_dir(&out)?;
    let mut log = Log::open(&out.join("log.jsonl"), done)?;
    runs::remember(&out)?;
    describe(&settings, &config, &data, &out, done);

    let interrupt = Interrupt::catch()?;
    let progress = Progress::new(settings.steps, done);
    let tokens_per_step = (settings.batch * settings.seq) as u64;
    let state = |step: u64, position, seconds| State {
        version: checkpoint::VERSION,
        step,
        settings: settings.clone(),
        sampler: position,
        tokens: step * tokens_per_step,
        seconds,
    };
    let mut saved = done;
    for step in done + 1..=settings.steps {
        let started = Instant::now();
        let position = batches.state();
        let batch = batches.next_batch(&device)?;
        let loss = model.loss(&batch.inputs, &batch.targets)?.loss;
        let value = f64::from(loss.to_scalar::<f32>()?);
        if !value.is_finite() {
            progress.finish();
            bail!("step {step}: the loss is {value}, so the run stops; {}", advice(&checkpoint, &out));
        }
        // A checkpoint is written only once its model has given a finite loss.
        let due = (step - 1) % settings.eval_every == 0 && step - 1 > saved;
        if due || interrupt.is_set() {
            checkpoint.save(&state(step - 1, position, seconds), &varmap, &optimizer, &data.tokenizer)?;
            saved = step - 1;
        }
        if interrupt.is_set() {
            progress.finish();
            say!("Stopped after step {saved} of {}; go on with --resume --out {}", settings.steps, out.display());
            return Ok(ExitCode::from(INTERRUPTED));
        }

        optimizer.set_learning_rate(settings.lr * schedule.scale(step));
        optimizer
            .backward_step(&loss)
            .with_context(|| format!("step {step}; {}", advice(&checkpoint, &out)))?;

        let elapsed = started.elapsed().as_secs_f64();
        seconds += elapsed;
        let eval_loss = if step % settings.eval_every == 0 && step < settings.steps {
            Some(evaluate(&evaluator, &data.eval, &settings, &device, EVAL_TOKENS)?)
        } else if step == settings.steps {
            Some(evaluate(&evaluator, &data.eval, &settings, &device, FINAL_EVAL_TOKENS)?)
        } else {
            None
        };
        let stats = optimizer.stats();
        let record = Record {
            step,
            loss: value,
            perplexity: value.exp(),
            lr: stats.lr,
            beta1: stats.beta1,
            grad_norm: stats.grad_norm,
            tokens_per_second: tokens_per_step as f64 / elapsed,
            eval_loss,
        };
        progress.step(&record, ((step - done) * tokens_per_step) as f64 / (seconds - stored_seconds(stored.as_ref())));
        if let Some(eval_loss) = eval_loss {
            progress.line(&format!("step {step}: loss {value:.4}, held-out loss {eval_loss:.4}"));
        }
        log.push(record)?;
        if eval_loss.is_some_and(|loss| !loss.is_finite()) {
            progress.finish();
            bail!("step {step}: the held-out loss is not finite, so the run stops; {}", advice(&checkpoint, &out));
        }
    }
    progress.finish();

    // The end: everything that belongs to the run, then the model for others.
    if saved < settings.steps {
        checkpoint.save(&state(settings.steps, batches.state(), seconds), &varmap, &optimizer, &data.tokenizer)?;
    }
    let summary = Summary::new(&settings, &config, &data, log.records(), seconds);
    files::write_json(&out.join("summary.json"), &summary)?;
    let lines = chart::loss_lines(log.records(), data.unigram_entropy, data.floor);
    chart::write(&out.join("loss.svg"), "Training loss", ("step", "nats a token"), &lines)?;
    save_model(&out.join("model"), &config, &varmap, &data)?;
    report(&summary, &out);
    sample(&evaluator, &data)?;
    Ok(ExitCode::SUCCESS)
}

/// The folder of the run, and where it stands if it goes on.
fn open_run(flags: &Flags) -> Result<(PathBuf, Option<State>)> {
    if flags.resume {
        let out = match flags.out.clone().or_else(runs::last) {
            Some(out) => out,
            None => bail!("--resume: there is no run yet; name its folder with --out"),
        };
        let checkpoint = Checkpoint::of(&out);
        if !checkpoint.exists() {
            bail!("--resume: there is no checkpoint in {}", checkpoint.dir().display());
        }
        return Ok((out, Some(checkpoint.state()?)));
    }
    let out = match &flags.out {
        Some(out) => out.clone(),
        None => runs::new_folder(flags.size.as_deref().unwrap_or("nano")),
    };
    if Checkpoint::of(&out).exists() {
        bail!("{} holds a run already: go on with --resume, or choose another --out", out.display());
    }
    Ok((out, None))
}

fn model_config(preset: VesperConfig, settings: &Settings, data: &Data) -> Result<VesperConfig> {
    let mut config = preset.with_vocab(settings.vocab_size.unwrap_or_else(|| data.tokenizer.vocab_size()));
    config.max_position_embeddings = config.max_position_embeddings.max(settings.seq);
    // Documents are separated by the end token, so it also begins a text.
    config.eos_token_id = data.tokenizer.eos_id();
    config.bos_token_id = data.tokenizer.eos_id().or(data.tokenizer.bos_id());
    config.validate()?;
    hf::check_tokenizer(data.tokenizer.inner(), &config)?;
    Ok(config)
}

/// Both with betas .9 and .95, weight decay .1 on matrices and clipping at norm 1.
fn optimizer_config(settings: &Settings, config: &VesperConfig) -> VelvetConfig {
    let velvet = VelvetConfig::language_model(config.vocab_size).with_lr(settings.lr);
    match settings.optimizer {
        Optimizer::Velvet => velvet,
        Optimizer::Adamw => {
            velvet.with_entropy_lr(EntropyLr::Off).with_perplexity_momentum(PerplexityMomentum::Off)
        }
    }
}

/// Mean held-out loss over the first windows of about `limit` tokens.
fn evaluate(model: &VesperLM, tokens: &Tokens, settings: &Settings, device: &Device, limit: usize) -> Result<f64> {
    let windows = (limit / settings.seq).max(1);
    let batches = EvalBatches::new(tokens.clone(), settings.batch, settings.seq, device)?.limit(windows);
    let (mut sum, mut count) = (0.0, 0);
    for batch in batches {
        let batch = batch?;
        let n = batch.inputs.elem_count();
        let loss = model.loss(&batch.inputs, &batch.targets)?.loss;
        sum += f64::from(loss.to_scalar::<f32>()?) * n as f64;
        count += n;
    }
    Ok(sum / f64::from(u32::try_from(count)?))
}

fn advice(checkpoint: &Checkpoint, out: &Path) -> String {
    match checkpoint.state() {
        Ok(state) => format!(
            "the checkpoint of step {} in {} is good; try a lower --lr in a new run",
            state.step,
            out.display()
        ),
        Err(_) => "there is no checkpoint yet; try a lower --lr".into(),
    }
}

fn stored_seconds(stored: Option<&State>) -> f64 {
    stored.map_or(0.0, |state| state.seconds)
}

fn save_model(dir: &Path, config: &VesperConfig, varmap: &VarMap, data: &Data) -> Result<()> {
    let weights: HashMap<String, Tensor> = {
        let data = varmap.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        data.iter().map(|(name, var)| Ok((name.clone(), var.as_tensor().to_device(&Device::Cpu)?))).collect::<Result<_>>()?
    };
    let tokenizer = data
        .tokenizer
        .inner()
        .to_string(true)
        .map_err(|error| anyhow::anyhow!("the tokenizer cannot be written: {error}"))?;
    let generation = GenerationConfig::default()
        .with_temperature(0.7)
        .with_bos(config.bos_token_id)
        .with_eos(config.eos_token_id)
        .with_max_new_tokens(256);
    Ok(hf::save(dir, config, &weights, &hf::Extras { tokenizer_json: Some(&tokenizer), generation })?)
}

/// `summary.json`; losses and entropies in nats a token.
#[derive(Debug, Serialize)]
struct Summary {
    size: String,
    parameters: usize,
    tokens: u64,
    seconds: f64,
    tokens_per_second: f64,
    /// Of the last step.
    final_loss: f64,
    /// On held-out text, at the end.
    eval_loss: f64,
    unigram_entropy: f64,
    floor: Option<f64>,
}

impl Summary {
    fn new(settings: &Settings, config: &VesperConfig, data: &Data, records: &[Record], seconds: f64) -> Self {
        let tokens = settings.steps * (settings.batch * settings.seq) as u64;
        let last = records.last();
        Self {
            size: settings.size.clone(),
            parameters: config.num_parameters(),
            tokens,
            seconds,
            tokens_per_second: tokens as f64 / seconds,
            final_loss: last.map_or(f64::NAN, |r| r.loss),
            eval_loss: last.and_then(|r| r.eval_loss).unwrap_or(f64::NAN),
            unigram_entropy: data.unigram_entropy,
            floor: data.floor,
        }
    }
}

fn describe(settings: &Settings, config: &VesperConfig, data: &Data, out: &Path, done: u64) {
    say!(
        "VesperLM {}: {} parameters ({} layers, {} heads, width {}, vocabulary {}), {} on {}",
        settings.size,
        config.num_parameters(),
        config.num_hidden_layers,
        config.num_attention_heads,
        config.hidden_size,
        config.vocab_size,
        format!("{:?}", settings.dtype).to_lowercase(),
        settings.device,
    );
    say!(
        "Data: {}, {} tokens to train on, {} held out; unigram entropy {:.3} nats a token{}",
        data.name,
        data.train.len(),
        data.eval.len(),
        data.unigram_entropy,
        data.floor.map_or(String::new(), |floor| format!(", floor {floor:.3}")),
    );
    say!(
        "Run: {} steps of {} x {} tokens, {:?} at {}, in {}{}",
        settings.steps,
        settings.batch,
        settings.seq,
        settings.optimizer,
        settings.lr,
        out.display(),
        if done > 0 { format!(", after step {done}") } else { String::new() },
    );
}

fn report(summary: &Summary, out: &Path) {
    let compared = match summary.floor {
        Some(floor) => {
            format!("{:.1} % above the floor of {floor:.3}", 100.0 * (summary.eval_loss / floor - 1.0))
        }
        None => format!("unigram entropy {:.3}", summary.unigram_entropy),
    };
    say!(
        "Trained on {} tokens in {:.0} s ({:.0} tokens a second). Held-out loss {:.3} nats a token, {compared}.",
        summary.tokens,
        summary.seconds,
        summary.tokens_per_second,
        summary.eval_loss
    );
    say!("Chat with it: cargo run --release --example chat -- --model {}", out.display());
}

/// Prints a text that the model writes from nothing.
fn sample(model: &VesperLM, data: &Data) -> Result<()> {
    let config = GenerationConfig::default()
        .with_temperature(0.7)
        .with_bos(model.config().bos_token_id)
        .with_eos(model.config().eos_token_id)
        .with_max_new_tokens(120);
    if config.bos_token_id.is_none() {
        return Ok(()); // a tokenizer without special tokens has nothing to begin with
    }
    let mut session = model.session(121)?;
    let mut generator =
        Generator::new(&mut session, &[], &config)?.with_vocab_limit(data.tokenizer.vocab_size());
    let text = generator.pieces(data.tokenizer.inner())?.collect::<vesper_model::Result<String>>()?;
    say!("\nIt writes:\n{}", text.trim());
    Ok(())
}

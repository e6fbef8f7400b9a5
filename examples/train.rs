//! Trains a VesperLM from text to a model that `chat` talks with.
//!
//!     cargo run --release --example train
//!     cargo run --release --example train -- --data my.txt more/ --size tiny --steps 5000
//!     cargo run --release --example train -- --resume

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Tensor};
use candle_nn::{Optimizer as _, VarMap};
use velvet_optim::{PerplexityMomentum, Schedule, Span, TrustRegion, Velvet, VelvetConfig};
use vesper_data::{BatchSampler, SamplerConfig};
use vesper_examples::checkpoint::{self, Checkpoint, State};
use vesper_examples::data::Data;
use vesper_examples::evaluate::held_out_loss;
use vesper_examples::interrupt::Interrupt;
use vesper_examples::log::{Log, Record};
use vesper_examples::progress::Progress;
use vesper_examples::settings::{Flags, Optimizer, Settings};
use vesper_examples::summary::{Summary, describe};
use vesper_examples::{INTERRUPTED, chart, device, export, files, printable, runs, say};
use vesper_model::ops::{CapturedStep, backward};
use vesper_model::{VesperConfig, VesperLM, hf, trainable};

/// Held-out tokens read at each evaluation, and at the last one.
const EVAL_TOKENS: usize = 16_384;
const FINAL_EVAL_TOKENS: usize = 65_536;

fn main() -> ExitCode {
    vesper_examples::leave_the_threads_to_the_fused_operations();
    vesper_examples::run(|| train(&vesper_examples::flags()?))
}

fn train(flags: &Flags) -> Result<ExitCode> {
    let (out, stored) = runs::open(flags)?;
    let checkpoint = Checkpoint::of(&out);
    let settings = match &stored {
        Some(state) => flags.resumed(state.settings.clone(), state.step)?,
        None => flags.settings()?,
    };
    let device = device::open(&settings.device)?;
    let preset = VesperConfig::preset(&settings.size)?;

    // What is made here goes again where the settings and the text do not fit.
    let (mut folder, interrupt) = Interrupt::catch_in_new_folder(&out, "Stopped before a step was made")?;

    // Text to tokens to batches.
    let tokenizer = stored.is_some().then(|| checkpoint.tokenizer());
    let data = Data::prepare(&settings, &preset, tokenizer.as_deref(), &out.join("cache"))?;
    let sampler =
        SamplerConfig::default().with_batch(settings.batch).with_seq(settings.seq).with_seed(settings.seed);
    let mut batches = BatchSampler::new(data.train.clone(), sampler)?;

    // The model: parameters in f32, activations in --dtype.
    let config = model_config(preset, &settings, &data)?;
    let varmap = VarMap::new();
    let model = VesperLM::initialize(&config, &varmap, settings.seed, DType::F32, &device)?
        .with_compute_dtype(settings.dtype.candle());
    let evaluator = model.detach();

    // The optimizer.
    let mut optimizer = Velvet::named(trainable(&config, &varmap)?, optimizer_config(&settings, &config))?;
    let schedule = Schedule::Linear {
        // Velvet has its trust region in place of a warm-up.
        warm_up: Span::Fraction(if settings.optimizer == Optimizer::Velvet { 0.0 } else { 0.05 }),
        decay: Span::Fraction(0.9),
        end: 0.0,
    };

    // Where an earlier part of the run stopped.
    let (mut done, mut seconds) = (0, 0.0);
    if let Some(state) = &stored {
        state.check_data(&data)?;
        checkpoint.load_model(state.step, &varmap, &device)?;
        checkpoint.load_optimizer(state.step, &mut optimizer)?;
        batches.restore(&state.sampler)?;
        (done, seconds) = (state.step, state.seconds);
    }
    folder.keep();
    let mut log = Log::open(&out.join("log.jsonl"), done)?;
    if stored.is_some() {
        runs::remember(&out);
    }
    describe(&settings, &config, &data, &out, done);

    // One step: the loss of a batch, the gradients, the update. On a GPU it is replayed as a CUDA graph.
    let mut training = CapturedStep::new(optimizer, |optimizer: &mut Velvet, batch: &[Tensor]| {
        let loss = model.loss(&batch[0], &batch[1])?.loss;
        optimizer.backward_step_with(&loss, backward)?;
        Ok(loss)
    });

    let mut progress = Progress::new(settings.steps, done);
    let stop = |step: u64| format!("the run stops at step {step} ({})", checkpoint.advice());
    for step in done + 1..=settings.steps {
        let started = Instant::now();
        let batch = batches.next_batch(&device)?; // inputs, targets: (batch, seq)
        training.state_mut().set_learning_rate(schedule.lr(settings.lr, step - 1, settings.steps));
        let loss = training.run(&[&batch.inputs, &batch.targets]).with_context(|| stop(step))?;
        let value = f64::from(loss.to_scalar::<f32>()?);
        if !value.is_finite() {
            bail!("{}: the loss is {value}", stop(step));
        }
        let elapsed = started.elapsed().as_secs_f64();
        seconds += elapsed;

        let last = step == settings.steps;
        let evaluate = |tokens| held_out_loss(&evaluator, &data.eval, &settings, &device, tokens);
        let eval_loss = if last {
            Some(evaluate(settings.eval_tokens(FINAL_EVAL_TOKENS))?)
        } else if step % settings.eval_every == 0 {
            Some(evaluate(settings.eval_tokens(EVAL_TOKENS))?)
        } else {
            None
        };
        let stats = training.state().stats()?;
        let record = Record {
            step,
            loss: value,
            perplexity: value.exp(),
            lr: stats.lr,
            beta1: stats.beta1,
            grad_norm: stats.grad_norm,
            tokens_per_second: settings.tokens_per_step() as f64 / elapsed,
            eval_loss,
        };
        progress.step(&record);
        log.push(record)?;

        let interrupted = interrupt.is_set() && !last;
        if eval_loss.is_some() || interrupted {
            // A checkpoint holds only a model that gives a finite loss.
            let proof = match eval_loss {
                Some(loss) => loss,
                None => evaluate(settings.seq)?,
            };
            if !proof.is_finite() {
                bail!("{}: the held-out loss is {proof}", stop(step));
            }
            log.sync()?;
            let state = State {
                version: checkpoint::VERSION,
                step,
                settings: settings.clone(),
                sampler: batches.state(),
                data: data.digest.clone(),
                tokens: step * settings.tokens_per_step(),
                seconds,
            };
            checkpoint.save(&state, &varmap, training.state(), &data.tokenizer)?;
            runs::remember(&out);
        }
        if interrupted {
            drop(progress);
            say!(
                "Stopped after step {step} of {}; go on with --resume --out {}",
                settings.steps,
                out.display()
            );
            return Ok(ExitCode::from(INTERRUPTED));
        }
    }
    drop(progress);

    // What the run leaves.
    let summary = Summary::new(&settings, &config, &data, log.records(), seconds);
    files::write_json(&out.join("summary.json"), &summary)?;
    let lines = chart::loss_lines(log.records(), data.unigram_entropy, data.floor);
    chart::write(&out.join("loss.svg"), "Training loss", ("step", "nats a token"), &lines)?;
    export::save_model(&out.join("model"), &config, &varmap, &data.tokenizer)?;
    summary.print(&out);
    if let Some(text) = export::sample(&evaluator, &data.tokenizer)? {
        say!("\nIt writes:\n{}", printable(&text));
    }
    Ok(ExitCode::SUCCESS)
}

/// A preset with the vocabulary of the tokenizer.
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
        Optimizer::Adamw => VelvetConfig {
            hidden_matrices: None,
            perplexity_momentum: PerplexityMomentum::Off,
            trust_region: TrustRegion::Off,
            ..velvet
        },
    }
}

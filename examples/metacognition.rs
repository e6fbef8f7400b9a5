//! Trains a head that foresees the errors of a trained model, and measures what it is worth: against the probability and the
//! entropy of the model's own distribution, and for regulating what the model answers.
//!
//!     cargo run --release --example metacognition -- --model runs/nano-1
//!     cargo run --release --example metacognition -- --model runs/tiny-1 --data held-out/ --seeds 5
//!     cargo run --release --example metacognition -- --head runs/metacognition-1/head --prompt "Once upon a"

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use candle_core::DType;
use clap::Parser;
use vesper_benches::record::{machine, today};
use vesper_data::TextTokenizer;
use vesper_examples::interrupt::Interrupt;
use vesper_examples::metacognition::answers::{Answerer, Source, at_random};
use vesper_examples::metacognition::ask;
use vesper_examples::metacognition::documents::{Documents, questions, stream};
use vesper_examples::metacognition::record::{Record, Seed};
use vesper_examples::metacognition::remembered::Remembered;
use vesper_examples::metacognition::tokens::{self, HEAD, Training, heads, predictions, quality};
use vesper_examples::{INTERRUPTED, device, files, runs, say};
use vesper_model::metacognition::{
    BaseModel, Calibrated, Choice, ErrorHead, ErrorScore, HeadConfig, HeadTraining, Measure, Method,
    Predictions, RegulatorConfig,
};
use vesper_model::{VesperLM, hf};

/// Train a head that foresees a model's errors, and measure what it is worth.
#[derive(Debug, Parser)]
#[command(name = "metacognition", version, long_about = None)]
struct Flags {
    /// Folder of a run or of a model [default: the last trained run]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Text that the model was not trained on, in many documents [default: held-out embedded stories, for a model of
    /// the embedded stories]
    #[arg(long, num_args = 1.., value_name = "PATH")]
    data: Vec<PathBuf>,
    /// Held-out stories, where there is no --data
    #[arg(long, default_value_t = 4000)]
    stories: usize,
    /// Tokens of each part of the text at most
    #[arg(long, default_value_t = 200_000)]
    tokens: usize,
    /// Tokens a window
    #[arg(long, default_value_t = 256)]
    seq: usize,
    /// Hidden units of the heads
    #[arg(long, default_value_t = 64)]
    units: usize,
    /// How often a head sees each prediction
    #[arg(long, default_value_t = 4)]
    epochs: usize,
    /// Learning rate of the heads
    #[arg(long, default_value_t = 3e-3, allow_negative_numbers = true)]
    lr: f64,
    /// Questions of the calibration and of the test part
    #[arg(long, default_value_t = 1000)]
    questions: usize,
    /// Tokens of a question's text
    #[arg(long, default_value_t = 48)]
    context: usize,
    /// Tokens of an answer
    #[arg(long, default_value_t = 2)]
    answer: usize,
    /// Temperature of drafts that are drawn
    #[arg(long, default_value_t = 0.8, allow_negative_numbers = true)]
    temperature: f64,
    /// How often all of it is repeated, with the documents divided anew
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Folder of the head and of the record [default: the first free runs/metacognition-N]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Answer this text under a regulator, with the head of --head, and do nothing else
    #[arg(long, value_name = "TEXT", requires = "head")]
    prompt: Option<String>,
    /// Folder of a head that this program has trained
    #[arg(long, value_name = "DIR", requires = "prompt")]
    head: Option<PathBuf>,
    /// With --prompt: a draft that is wrong with at most this probability is the answer
    #[arg(long, value_name = "P", default_value_t = 0.3, requires = "prompt", allow_negative_numbers = true)]
    satisfied_at: f64,
    /// With --prompt: there is no answer where the best draft is wrong with more than this probability
    #[arg(long, value_name = "P", default_value_t = 0.9, requires = "prompt", allow_negative_numbers = true)]
    abstain_above: f64,
    /// With --prompt: the most drafts
    #[arg(long, default_value_t = 2, requires = "prompt")]
    drafts: usize,
    /// Print the tables of a record that is there, and do nothing else
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

fn main() -> ExitCode {
    vesper_examples::leave_the_threads_to_the_fused_operations();
    vesper_examples::run(|| metacognition(&vesper_examples::flags()?))
}

fn metacognition(flags: &Flags) -> Result<ExitCode> {
    if let Some(file) = &flags.report {
        say!("{}", Record::read(file)?.tables());
        return Ok(ExitCode::SUCCESS);
    }
    flags.validate()?;
    let started = Instant::now();
    let device = device::open(&flags.device)?;

    // The model stays as it is.
    if let Some(file) = flags.model.as_deref().filter(|path| path.is_file()) {
        bail!("{}: a file; name the folder of a run or of a model", file.display());
    }
    let folder = runs::model_folder(flags.model.as_deref())?;
    let model = VesperLM::load(&folder, DType::F32, &device)?;
    let config = model.config().clone();
    if flags.context.max(flags.seq).saturating_add(flags.answer) > config.max_position_embeddings {
        bail!(
            "--seq {}, --context {} and --answer {}: the model takes {} tokens",
            flags.seq,
            flags.context,
            flags.answer,
            config.max_position_embeddings
        );
    }
    let tokenizer = TextTokenizer::from_file(folder.join("tokenizer.json"))?;
    hf::check_tokenizer(tokenizer.inner(), &config)?;
    if let (Some(head), Some(prompt)) = (&flags.head, &flags.prompt) {
        let mut generation = hf::read_generation_config(&folder)?.with_max_new_tokens(flags.answer);
        generation.bos_token_id = generation.bos_token_id.or(config.bos_token_id).or(config.eos_token_id);
        let settings = RegulatorConfig {
            max_drafts: flags.drafts,
            temperature: flags.temperature,
            satisfied_at: flags.satisfied_at,
            abstain_above: flags.abstain_above,
            ..RegulatorConfig::default()
        };
        let answer = ask::answer(&model, &tokenizer, head, prompt, &settings, &generation)?;
        say!("{}", ask::report(&answer, &tokenizer)?);
        return Ok(ExitCode::SUCCESS);
    }

    // Text that it has not seen.
    let documents = Documents::read(&flags.data, flags.stories, &tokenizer, &folder)?;
    let base = BaseModel::of(&model)?;
    let out = runs::results_folder(flags.out.as_deref(), "metacognition")?;
    let stopped = "Stopped before a head was trained: nothing is kept";
    let (mut created, interrupt) = Interrupt::catch_in_new_folder(&out, stopped)?;
    say!(
        "{}: {} documents, {} left out; results in {}",
        documents.name,
        documents.len(),
        documents.left_out,
        out.display()
    );

    let mut seeds = Vec::new();
    let (mut losses, mut sizes) = (0.0, [0; 3]);
    for seed in 0..flags.seeds {
        // Three parts that have no document in common, and what the model's likeliest tokens come to on them.
        let parts = documents.parts(seed);
        let collect = |documents: &[Vec<u32>], choice| {
            let config = HeadConfig::default().with_choice(choice);
            predictions(&model, stream(documents, flags.tokens)?, flags.seq, &config, &device)
        };
        let all = |choice| -> Result<[Predictions; 3]> {
            Ok([
                collect(&parts.training, choice)?,
                collect(&parts.calibration, choice)?,
                collect(&parts.test, choice)?,
            ])
        };
        let [training, calibration, test] = all(Choice::Greedy)?;
        sizes = [training.len(), calibration.len(), test.len()];
        losses += tokens::loss(&model, stream(&parts.test, flags.tokens)?, flags.seq, &device)?;

        // The plain scores need no training; heads are trained on the first part. All are calibrated on the second.
        let mut rows = Vec::new();
        for measure in Measure::ALL {
            rows.push((tokens::name(measure).to_owned(), quality(&measure, &calibration, &test)?));
        }
        let settings = Training {
            units: flags.units,
            head: HeadTraining { epochs: flags.epochs, seed, ..HeadTraining::default() },
            lr: flags.lr,
        };
        let mut best = None;
        for (name, config) in heads(flags.units) {
            let head = tokens::train(&base, &config, &settings, &training, &calibration)?;
            rows.push((name, quality(&head, &calibration, &test)?));
            best = Some(head);
        }
        let Some(head) = best else { bail!("no head") };
        for (name, quality) in &rows {
            say!("seed {seed}: {name}: AUROC {:.4}, ECE {:.4}", quality.auroc, quality.ece);
        }
        let (kinds, kind_auroc) = tokens::kinds(&head, &test)?;
        let wrong = test.wrong();
        let error_rate = wrong.iter().filter(|wrong| **wrong).count() as f64 / wrong.len().max(1) as f64;

        // Whole answers, greedy.
        let ask = |documents, salt| {
            questions(documents, flags.questions, flags.context, flags.answer, 2 * seed + salt)
        };
        let (calibrating, testing) = (ask(&parts.calibration, 0)?, ask(&parts.test, 1)?);
        let answerer = Answerer {
            model: Remembered::new(&model),
            vocab_limit: tokenizer.vocab_size(),
            temperature: flags.temperature,
            seed,
        };
        let greedy = sources(&head, &calibration)?;
        let (answers, answer_error_rate) = answerer.foresight(&greedy, &calibrating, &testing)?;

        // Regulation draws tokens, so everything is trained and calibrated on tokens that are drawn in the same way.
        let choice = Choice::Drawn { temperature: flags.temperature, seed };
        let [training, calibration, test] = all(choice)?;
        let drawn_config = head.config().with_choice(choice);
        let drawn_head = tokens::train(&base, &drawn_config, &settings, &training, &calibration)?;
        let sources = sources(&drawn_head, &calibration)?;
        let mut drawn = Vec::new();
        for source in &sources {
            drawn.push((source.name.clone(), quality(source.confidence.score, &calibration, &test)?));
        }
        let mut policies = answerer.policies(&sources, &calibrating, &testing)?;
        let random: Vec<_> = sources.iter().filter_map(|source| at_random(&policies, &source.name)).collect();
        policies.extend(random);

        if seed == 0 {
            // What is kept judges answers as they are drawn.
            let answer = answerer.calibrate(&calibrating, &drawn_head.confidence())?;
            created.keep();
            drawn_head.with_answer(answer).save(out.join("head"))?;
            if interrupt.is_set() {
                return Ok(ExitCode::from(INTERRUPTED));
            }
            interrupt.end_at_next();
        }
        seeds.push(Seed {
            seed,
            error_rate,
            kinds,
            kind_auroc,
            tokens: rows,
            drawn,
            answers,
            answer_error_rate,
            policies,
        });
    }

    let record = Record {
        date: today(),
        machine: machine(),
        model: run_name(&folder),
        parameters: config.num_parameters(),
        vocab: config.vocab_size,
        loss: losses / flags.seeds as f64,
        data: documents.name.clone(),
        documents: documents.len(),
        left_out: documents.left_out,
        tokens: sizes,
        units: flags.units,
        epochs: flags.epochs,
        lr: flags.lr,
        questions: flags.questions,
        question_tokens: [flags.context, flags.answer],
        temperature: flags.temperature,
        seeds,
        seconds: started.elapsed().as_secs_f64(),
    };
    files::write_json(&out.join("metacognition.json"), &record)?;
    say!("{}", record.tables());
    say!(
        "Answer under a regulator: cargo run --release --example metacognition -- --model {} --head {} --prompt \"...\"",
        folder.display(),
        out.join("head").display()
    );
    Ok(ExitCode::SUCCESS)
}

/// The confidences that are compared, each calibrated on the same predictions.
fn sources<'a>(head: &'a ErrorHead, calibration: &Predictions) -> Result<Vec<Source<'a>>> {
    let scores: [(&str, &'a dyn ErrorScore); 3] = [
        (tokens::name(Measure::Probability), &Measure::Probability),
        (tokens::name(Measure::Entropy), &Measure::Entropy),
        (HEAD, head),
    ];
    let source = |(name, score): (&str, &'a dyn ErrorScore)| {
        Ok(Source { name: name.into(), confidence: Calibrated::fit(score, Method::Platt, calibration)? })
    };
    scores.into_iter().map(source).collect()
}

impl Flags {
    fn validate(&self) -> Result<()> {
        for (flag, value) in [
            ("--stories", self.stories),
            ("--tokens", self.tokens),
            ("--seq", self.seq),
            ("--epochs", self.epochs),
            ("--questions", self.questions),
            ("--context", self.context),
            ("--answer", self.answer),
            ("--seeds", usize::try_from(self.seeds)?),
        ] {
            if value == 0 {
                bail!("{flag} 0: expected at least 1");
            }
        }
        for (flag, value) in [("--lr", self.lr), ("--temperature", self.temperature)] {
            if !(value.is_finite() && value > 0.0) {
                bail!("{flag} {value}: expected a positive number");
            }
        }
        Ok(())
    }
}

/// The name of a run or of a model: its folder's, without those above it.
fn run_name(model: &Path) -> String {
    let of_run = if model.ends_with("model") { model.parent() } else { None };
    let folder = std::path::absolute(of_run.unwrap_or(model)).unwrap_or_else(|_| model.into());
    folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

//! Lets a trained VesperLM (or a Llama in a Hugging Face directory) continue what you write.
//!
//!     cargo run --release --example chat
//!     cargo run --release --example chat -- --prompt "Once upon a time" --temperature 0.8

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use tokenizers::Tokenizer;
use vesper_examples::interrupt::Interrupt;
use vesper_examples::{device, model, note, printable, runs, say};
use vesper_model::VesperLM;
use vesper_model::generate::{GenerationConfig, Generator, StopReason};

/// Chat with a trained model: it continues what you write.
#[derive(Debug, Parser)]
#[command(name = "chat", version, about, long_about = None)]
struct Flags {
    /// Folder of a run or of a model, or a GGUF file [default: the last trained run]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Adapters for the model: a folder that `finetune` or Hugging Face PEFT wrote
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Continue this text and exit; without it, a line editor
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// 0 always takes the likeliest token; 1 draws from the model's distribution [default: the model's]
    #[arg(long, allow_negative_numbers = true)]
    temperature: Option<f64>,
    /// Draw from the K likeliest tokens only; 0: from all
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Draw from the likeliest tokens that reach probability P together; 1: from all
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f64>,
    /// Over 1: tokens that were already used become less likely
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    repetition_penalty: Option<f64>,
    /// The most tokens of an answer
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// The same seed and prompt give the same answer [default: 0]
    #[arg(long)]
    seed: Option<u64>,
    /// cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
}

const HELP: &str = "\
Write the beginning of a text and press Enter; the model goes on from there. An empty line lets it begin.
  /temperature X   /top-k K   /top-p P   /repetition-penalty X   /max-tokens N   /seed N
  /help   /quit (or Ctrl-D).   Ctrl-C stops an answer.";

fn main() -> ExitCode {
    vesper_examples::run(|| chat(&vesper_examples::flags()?))
}

fn chat(flags: &Flags) -> Result<ExitCode> {
    let device = device::open(&flags.device)?;
    let model::Opened { mut model, tokenizer, generation: mut settings, .. } =
        model::open(flags.model.as_deref(), &device)?;
    if let Some(adapter) = &flags.adapter {
        model.attach_from(adapter)?;
    }
    flags.apply(&mut settings);
    settings.validate()?;

    if let Some(prompt) = &flags.prompt {
        Chat { model, tokenizer, interrupt: Interrupt::catch()? }.answer(prompt, &settings)?;
    } else {
        let editor = DefaultEditor::new().context("cannot open the line editor")?;
        // After the editor, which takes the signal for itself when it opens.
        let interrupt = Interrupt::catch()?;
        Chat { model, tokenizer, interrupt }.converse(editor, settings)?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Flags {
    fn apply(&self, settings: &mut GenerationConfig) {
        fn set<T: Copy>(to: &mut T, from: Option<T>) {
            if let Some(value) = from {
                *to = value;
            }
        }
        set(&mut settings.temperature, self.temperature);
        set(&mut settings.top_k, self.top_k);
        set(&mut settings.top_p, self.top_p);
        set(&mut settings.repetition_penalty, self.repetition_penalty);
        set(&mut settings.max_new_tokens, self.max_tokens);
        set(&mut settings.seed, self.seed);
        if self.temperature.is_some() || self.top_k.is_some() || self.top_p.is_some() {
            settings.do_sample = true; // a temperature of 0 is greedy all the same
        }
    }
}

struct Chat {
    model: VesperLM,
    tokenizer: Tokenizer,
    interrupt: Interrupt,
}

impl Chat {
    /// Prints the prompt and streams what follows it.
    fn answer(&self, prompt: &str, settings: &GenerationConfig) -> Result<()> {
        let encoded = self
            .tokenizer
            .encode(prompt, false)
            .map_err(|error| anyhow::anyhow!("the prompt cannot be tokenised: {error}"))?;
        // A text begins after the token that ends the one before it.
        let mut ids: Vec<u32> = settings.bos_token_id.into_iter().collect();
        ids.extend(encoded.get_ids());
        let limit = self.model.config().max_position_embeddings;
        if ids.len() >= limit {
            bail!("the prompt has {} tokens, but the model reads at most {}", ids.len(), limit - 1);
        }
        let mut session = self.model.session(ids.len().saturating_add(settings.max_new_tokens))?;
        let mut generator = Generator::new(&mut session, &ids, settings)?
            .with_vocab_limit(self.tokenizer.get_vocab_size(true))
            .with_cancellation(self.interrupt.cancellation())
            .with_tokenizer(&self.tokenizer)?;
        let mut out = std::io::stdout();
        let mut shown = write!(out, "{prompt}").and_then(|()| out.flush());
        let mut first = prompt.is_empty();
        for piece in generator.pieces() {
            let piece = printable(&piece?);
            let piece = if first { piece.trim_start() } else { &piece };
            first = first && piece.is_empty();
            shown = shown.and_then(|()| write!(out, "{piece}")).and_then(|()| out.flush());
            if shown.is_err() {
                return Ok(()); // nobody reads any more
            }
        }
        let _ = writeln!(out);
        match generator.stop_reason() {
            Some(StopReason::ContextFull) => note!("(stopped: the model reads at most {limit} tokens)"),
            Some(StopReason::Cancelled) => note!("(stopped)"),
            _ => {}
        }
        Ok(())
    }

    /// Answers line by line until the input ends.
    fn converse(&self, mut editor: DefaultEditor, mut settings: GenerationConfig) -> Result<()> {
        let history = Path::new(runs::FOLDER).join("chat_history.txt");
        let _ = editor.load_history(&history); // there is none the first time
        say!("{HELP}");
        loop {
            match editor.readline("> ") {
                Ok(line) => {
                    let line = line.trim();
                    if !line.is_empty() {
                        let _ = editor.add_history_entry(line);
                    }
                    match line.strip_prefix('/') {
                        Some("quit" | "exit" | "q") => break,
                        Some(command) => match set(command, &mut settings) {
                            Ok(answer) => say!("{answer}"),
                            Err(error) => say!("{error:#}"),
                        },
                        None => {
                            self.interrupt.clear();
                            if let Err(error) = self.answer(line, &settings) {
                                say!("{error:#}");
                            }
                            self.interrupt.clear();
                            settings.seed = settings.seed.wrapping_add(1); // another answer next time
                        }
                    }
                }
                Err(ReadlineError::Interrupted) => say!("(Ctrl-D or /quit ends the program)"),
                Err(ReadlineError::Eof) => break,
                Err(error) => return Err(error).context("the line editor failed"),
            }
        }
        // A folder that is missing or read-only costs the history alone.
        let _ = editor.save_history(&history);
        Ok(())
    }
}

/// Changes one setting by a command such as `temperature 0.5`; a setting out of range changes nothing.
fn set(command: &str, settings: &mut GenerationConfig) -> Result<String> {
    let (name, value) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
    let value = value.trim();
    let mut new = settings.clone();
    let wrong = || format!("/{name} {value}: not a number that it can take");
    match name {
        "temperature" => new.temperature = value.parse().with_context(wrong)?,
        "top-k" => new.top_k = value.parse().with_context(wrong)?,
        "top-p" => new.top_p = value.parse().with_context(wrong)?,
        "repetition-penalty" => new.repetition_penalty = value.parse().with_context(wrong)?,
        "max-tokens" => new.max_new_tokens = value.parse().with_context(wrong)?,
        "seed" => new.seed = value.parse().with_context(wrong)?,
        _ => return Ok(HELP.into()),
    }
    new.do_sample |= matches!(name, "temperature" | "top-k" | "top-p");
    new.validate()?;
    *settings = new;
    Ok(format!("{name} is {value}"))
}

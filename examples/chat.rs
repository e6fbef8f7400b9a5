//! Talks with a trained model, a VesperLM or a Llama in a Hugging Face directory: it answers where it has a chat
//! template, and continues what you write where it has none.
//!
//!     cargo run --release --example chat
//!     cargo run --release --example chat -- --prompt "Once upon a time" --temperature 0.8
//!     printf 'Once\n' | cargo run --release --example chat -- --max-tokens 40

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use vesper_examples::chat::app::App;
use vesper_examples::chat::load::{Source, load};
use vesper_examples::chat::plain::Plain;
use vesper_examples::chat::transcript::Transcript;
use vesper_examples::chat::writer::Writer;
use vesper_examples::chat::{command, settings, ui};
use vesper_examples::interrupt::Interrupt;
use vesper_examples::note;

/// Chat with a trained model: it answers, or continues what you write.
#[derive(Debug, Parser)]
#[command(name = "chat", version, long_about = None)]
struct Flags {
    #[command(flatten)]
    source: Source,
    /// Answer or continue this text and exit
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// How to answer, for a model with a chat template
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Lines in, text out; without it, where input and output are a terminal, an interface that fills it
    #[arg(long)]
    plain: bool,
    #[command(flatten)]
    settings: settings::Sampling,
}

fn main() -> ExitCode {
    vesper_examples::run(|| chat(&vesper_examples::flags()?))
}

fn chat(flags: &Flags) -> Result<ExitCode> {
    let loaded = load(&flags.source)?;
    let mut settings = loaded.settings.clone();
    flags.settings.apply(&mut settings);
    settings.validate()?;

    if flags.system.is_some() && loaded.template.is_none() {
        note!("warning: --system: {}", command::NO_SYSTEM);
    }
    let name = loaded.name.clone();
    let writer = Writer::new(loaded);
    let transcript = Transcript::new(flags.system.clone());
    let at_terminal = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    if at_terminal && !flags.plain && flags.prompt.is_none() {
        let (answers, context) = (writer.answers(), writer.context());
        ui::run(writer, App::new(name, answers, context, settings, transcript))?;
    } else {
        let mut plain = Plain { writer, settings, transcript, interrupt: Interrupt::catch()? };
        match &flags.prompt {
            Some(prompt) => plain.answer(prompt)?,
            None => plain.converse()?,
        }
    }
    Ok(ExitCode::SUCCESS)
}

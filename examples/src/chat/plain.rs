//! Without an interface: for pipes, and for terminals that are better off with lines.

use std::io::{BufRead, IsTerminal, Write};
use std::ops::ControlFlow;

use anyhow::{Context, Result, anyhow, bail};
use vesper_model::generate::{GenerationConfig, StopReason};

use super::command::{self, Command, Line};
use super::transcript::{Transcript, Turn};
use super::writer::{Ask, Progress, Writer};
use crate::interrupt::Interrupt;
use crate::{note, one_line, output};

/// A conversation by lines. Texts and answers go to the standard output, all that the program says itself to the standard error.
#[derive(Debug)]
pub struct Plain {
    /// The model.
    pub writer: Writer,
    /// How it writes.
    pub settings: GenerationConfig,
    /// What was said.
    pub transcript: Transcript,
    /// Stops an answer.
    pub interrupt: Interrupt,
}

impl Plain {
    /// Answers one message.
    ///
    /// # Errors
    /// When there is no answer: why.
    pub fn answer(&mut self, message: &str) -> Result<()> {
        self.transcript.turns.push(Turn { question: message.to_owned(), answer: String::new() });
        self.write(message)
    }

    /// Answers each line of the standard input, until it ends. At a terminal, what goes wrong is said and forgotten; in a
    /// pipe it ends the program.
    ///
    /// # Errors
    /// In a pipe, the first thing that goes wrong; input that cannot be read.
    pub fn converse(&mut self) -> Result<()> {
        let mut stdin = std::io::stdin().lock();
        let at_terminal = stdin.is_terminal();
        if at_terminal {
            note!("{}", self.greeting());
        }
        for number in 1.. {
            if at_terminal {
                let _ = write!(std::io::stderr(), "> ");
            }
            let mut bytes = Vec::new();
            if stdin.read_until(b'\n', &mut bytes).context("cannot read the standard input")? == 0 {
                break;
            }
            let line = String::from_utf8(bytes).map_err(|error| {
                let at = error.utf8_error().valid_up_to() + 1;
                anyhow!("standard input, line {number}: invalid UTF-8 at byte {at}")
            });
            self.interrupt.clear();
            match line.and_then(|line| self.line(line.trim())) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) => break,
                Err(error) if at_terminal => note!("{}", one_line(&error)),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn greeting(&self) -> &'static str {
        if self.writer.answers() {
            "Write a message and press Enter. /help lists the commands; Ctrl-C stops an answer, Ctrl-D ends."
        } else {
            "Write the beginning of a text and press Enter; the model goes on from there. /help lists the commands; \
             Ctrl-C stops it, Ctrl-D ends."
        }
    }

    fn line(&mut self, line: &str) -> Result<ControlFlow<()>> {
        match command::parse(line)? {
            Line::Text(text) => self.answer(&text)?,
            Line::Command(Command::Quit) => return Ok(ControlFlow::Break(())),
            Line::Command(command) => self.command(command)?,
        }
        Ok(ControlFlow::Continue(()))
    }

    fn command(&mut self, command: Command) -> Result<()> {
        match command {
            Command::Set(setting, value) => {
                setting.set(&mut self.settings, &value)?;
                note!("{} is {}", setting.name(), setting.show(&self.settings));
            }
            Command::Regenerate => {
                let Some(turn) = self.transcript.turns.last_mut() else {
                    bail!("there is nothing to answer yet")
                };
                turn.answer.clear();
                let question = turn.question.clone();
                self.write(&question)?;
            }
            Command::Continue => {
                let text = self.transcript.text_to_continue(self.writer.answers())?;
                self.write(&text)?;
            }
            Command::Clear => self.transcript.clear(),
            Command::Save(path) => note!("saved to {}", self.transcript.save(path)?.display()),
            Command::Load(path) => self.transcript = Transcript::load(&path)?,
            Command::System(prompt) => {
                if prompt.is_some() && !self.writer.answers() {
                    note!("{}", command::NO_SYSTEM);
                }
                self.transcript.system = prompt;
            }
            Command::Help => note!("{}", command::HELP),
            Command::Quit => {}
        }
        Ok(())
    }

    /// Writes the answer of the last turn: `text` is what a model without a template goes on with.
    fn write(&mut self, text: &str) -> Result<()> {
        let answers = self.writer.answers();
        let ask =
            if answers { Ask::Answer(self.transcript.conversation()) } else { Ask::Continue(text.into()) };
        let mut out = std::io::stdout();
        let mut shown = if answers { Ok(()) } else { write!(out, "{text}").and_then(|()| out.flush()) };
        let mut answer = String::new();
        let ended = self.writer.write(&ask, &self.settings, self.interrupt.cancellation(), |progress| {
            match progress {
                Progress::Reading { dropped: 1.., .. } => {
                    note!("(the oldest messages have no place in the context any more)");
                }
                Progress::Reading { .. } => {}
                Progress::Wrote { text, .. } => {
                    answer += &text;
                    shown = write!(out, "{text}").and_then(|()| out.flush());
                }
            }
            // Where nobody reads any more, nothing is to be written.
            if shown.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        match (&ended, self.transcript.turns.last_mut()) {
            (Ok(_), Some(turn)) => turn.answer += &answer,
            // What was not answered was not said.
            (Err(_), _) if answer.is_empty() => drop(self.transcript.turns.pop()),
            _ => {}
        }
        if shown.is_ok() {
            shown = writeln!(out);
        }
        output::keep(shown);
        self.settings.seed = self.settings.seed.wrapping_add(1); // another answer next time
        let ended = ended?;
        output::check()?;
        match ended.reason {
            StopReason::ContextFull => {
                note!("(stopped: the model reads at most {} tokens)", self.writer.context());
            }
            StopReason::Cancelled => note!("(stopped)"),
            _ => {}
        }
        Ok(())
    }
}

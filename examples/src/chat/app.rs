//! The state of the interface and what changes it. It draws nothing and knows no terminal.

use vesper_model::generate::{GenerationConfig, StopReason};

use super::command::{self, Command, Line};
use super::engine::Event;
use super::input::Input;
use super::transcript::{Transcript, Turn};
use super::writer::{Ask, Progress};
use crate::one_line;

/// What the keys go to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Focus {
    /// The line that is being written.
    #[default]
    Input,
    /// The panel of settings.
    Settings {
        /// Which one is chosen.
        at: usize,
        /// Its new value, while one is being written.
        edit: Option<String>,
    },
    /// The help, which any key closes.
    Help,
}

/// What the state asks of the program.
#[derive(Debug, Clone, PartialEq)]
pub enum Do {
    /// Have this answered.
    Ask(Ask),
    /// Stop the answer.
    Stop,
    /// End.
    Quit,
}

/// One line that the program says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    /// What.
    pub text: String,
    /// Whether something went wrong.
    pub wrong: bool,
}

/// Speed, and the tokens that the model has read and written.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Meter {
    /// The prompt and the answer.
    pub used: usize,
    /// Tokens of the prompt alone.
    pub prompt: usize,
    /// Tokens a second of the answer, once there are two.
    pub rate: Option<f64>,
}

/// Everything that is shown.
#[derive(Debug)]
pub struct App {
    /// The model's folder.
    pub model: String,
    /// Whether the model answers, or continues text.
    pub answers: bool,
    /// The most tokens that the model reads.
    pub context: usize,
    /// How the next answer is written.
    pub settings: GenerationConfig,
    /// What was said.
    pub transcript: Transcript,
    /// What is being written.
    pub input: Input,
    /// What the keys go to.
    pub focus: Focus,
    /// Rows between the end of the history and what is shown; 0 follows the end.
    pub scroll: usize,
    /// Rows of the history that are shown, as last drawn.
    pub page: usize,
    /// What the program says.
    pub notice: Option<Notice>,
    /// Speed and context.
    pub meter: Meter,
    /// Whether an answer is being written.
    pub writing: bool,
}

impl App {
    /// Before anything was said.
    pub fn new(
        model: String,
        answers: bool,
        context: usize,
        settings: GenerationConfig,
        transcript: Transcript,
    ) -> Self {
        Self {
            model,
            answers,
            context,
            settings,
            transcript,
            input: Input::default(),
            focus: Focus::default(),
            scroll: 0,
            page: 0,
            notice: None,
            meter: Meter::default(),
            writing: false,
        }
    }

    /// Says something.
    pub fn say(&mut self, text: impl Into<String>) {
        self.notice = Some(Notice { text: text.into(), wrong: false });
    }

    /// Says what went wrong.
    pub fn complain(&mut self, error: &anyhow::Error) {
        self.notice = Some(Notice { text: one_line(error), wrong: true });
    }

    /// Sends what is written. While an answer is being written, only commands that leave it alone are taken.
    pub fn submit(&mut self) -> Option<Do> {
        self.notice = None;
        let line = match command::parse(self.input.text()) {
            Ok(line) => line,
            Err(error) => {
                self.complain(&error);
                return None;
            }
        };
        let waits = match &line {
            Line::Text(_) => true,
            Line::Command(command) => {
                matches!(command, Command::Regenerate | Command::Continue | Command::Clear | Command::Load(_))
            }
        };
        if self.writing && waits {
            self.say("an answer is being written; Esc stops it");
            return None;
        }
        self.input.take();
        match line {
            Line::Text(text) => {
                self.transcript.turns.push(Turn { question: text, answer: String::new() });
                self.ask()
            }
            Line::Command(command) => self.command(command).unwrap_or_else(|error| {
                self.complain(&error);
                None
            }),
        }
    }

    /// Answers the last message again.
    pub fn regenerate(&mut self) -> Option<Do> {
        if self.writing {
            self.say("an answer is being written; Esc stops it");
            return None;
        }
        let Some(turn) = self.transcript.turns.last_mut() else {
            self.say("there is nothing to answer yet");
            return None;
        };
        turn.answer.clear();
        self.ask()
    }

    /// Saves the conversation where it was saved before, or to a new file.
    pub fn save(&mut self, path: Option<std::path::PathBuf>) {
        match self.transcript.save(path) {
            Ok(path) => self.say(format!("saved to {}", path.display())),
            Err(error) => self.complain(&error),
        }
    }

    fn command(&mut self, command: Command) -> anyhow::Result<Option<Do>> {
        match command {
            Command::Set(setting, value) => {
                setting.set(&mut self.settings, &value)?;
                self.say(format!("{} is {}", setting.name(), setting.show(&self.settings)));
            }
            Command::Regenerate => return Ok(self.regenerate()),
            Command::Continue => {
                let text = self.transcript.text_to_continue(self.answers)?;
                return Ok(Some(self.begin(Ask::Continue(text))));
            }
            Command::Clear => {
                self.transcript.clear();
                self.meter = Meter::default();
                self.scroll = 0;
            }
            Command::Save(path) => self.save(path),
            Command::Load(path) => {
                self.transcript = Transcript::load(&path)?;
                self.meter = Meter::default();
                self.scroll = 0;
                self.say(format!("loaded {}", path.display()));
            }
            Command::System(prompt) => {
                let what = if prompt.is_some() { "the system prompt is set" } else { "no system prompt" };
                self.say(if self.answers { what } else { command::NO_SYSTEM });
                self.transcript.system = prompt;
            }
            Command::Help => self.focus = Focus::Help,
            Command::Quit => return Ok(Some(Do::Quit)),
        }
        Ok(None)
    }

    fn ask(&mut self) -> Option<Do> {
        let ask = if self.answers {
            Ask::Answer(self.transcript.conversation())
        } else {
            Ask::Continue(self.transcript.turns.last()?.question.clone())
        };
        Some(self.begin(ask))
    }

    fn begin(&mut self, ask: Ask) -> Do {
        self.notice = None;
        self.writing = true;
        self.scroll = 0;
        self.meter.rate = None;
        Do::Ask(ask)
    }

    /// Takes what the engine says.
    pub fn hear(&mut self, event: Event) {
        match event {
            Event::Progress(Progress::Reading { prompt, dropped, .. }) => {
                self.meter = Meter { used: prompt, prompt, rate: None };
                if dropped > 0 {
                    self.say(format!("the oldest {dropped} messages have no place in the context any more"));
                }
            }
            Event::Progress(Progress::Wrote { text, written, time }) => {
                if let Some(turn) = self.transcript.turns.last_mut() {
                    turn.answer += &text;
                }
                self.meter.used = self.meter.prompt + written;
                if written > 1 && !time.is_zero() {
                    self.meter.rate = Some((written - 1) as f64 / time.as_secs_f64());
                }
            }
            Event::Ended(ended) => {
                self.finish();
                match ended.reason {
                    StopReason::ContextFull => {
                        self.say(format!("stopped: the model reads at most {} tokens", self.context));
                    }
                    StopReason::Cancelled => self.say("stopped"),
                    StopReason::MaxTokens => self.say("stopped after max-tokens"),
                    _ => {}
                }
            }
            Event::Failed(reason) => {
                self.finish();
                self.notice = Some(Notice { text: reason, wrong: true });
                // What was not answered is given back.
                if let Some(turn) = self.transcript.turns.pop_if(|turn| turn.answer.is_empty())
                    && self.input.is_empty()
                {
                    self.input.insert(&turn.question);
                }
            }
        }
    }

    fn finish(&mut self) {
        self.writing = false;
        self.settings.seed = self.settings.seed.wrapping_add(1); // another answer next time
    }
}

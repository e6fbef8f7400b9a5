//! One answer: from what is asked to text, token by token.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::{Error, Result, anyhow, bail};
use tokenizers::Tokenizer;
use vesper_model::chat::{ChatTemplate, Conversation};
use vesper_model::generate::{Cancellation, Event, GenerationConfig, Generator, StopReason};
use vesper_model::{ModelError, VesperLM, hf};

use super::load::Loaded;
use super::memory::Memory;
use crate::printable;

/// What the model is to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Ask {
    /// Go on with this text.
    Continue(String),
    /// Answer the last message.
    Answer(Conversation),
}

/// How far it is. Counts are of tokens.
#[derive(Debug, Clone, PartialEq)]
pub enum Progress {
    /// The prompt is known, and about to be read.
    Reading {
        /// The prompt.
        prompt: usize,
        /// What of it was read before.
        known: usize,
        /// Messages that had no place in it.
        dropped: usize,
    },
    /// There is a token more, or the text that tokens came to.
    Wrote {
        /// The text, in whole graphemes; may be empty.
        text: String,
        /// How many so far.
        written: usize,
        /// From the first of them to the last.
        time: Duration,
    },
}

/// How an answer ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    /// Why.
    pub reason: StopReason,
    /// Tokens written.
    pub written: usize,
    /// Time from the first token to the last.
    pub time: Duration,
}

/// The model, and what it remembers of the last answer.
#[derive(Debug)]
pub struct Writer {
    model: VesperLM,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    /// Ids from this on are rows that only pad the embedding.
    limit: usize,
    memory: Option<Memory>,
    /// The folder or file that the model is from.
    name: String,
}

impl Writer {
    /// With nothing read yet.
    pub fn new(loaded: Loaded) -> Self {
        let Loaded { model, tokenizer, template, name, .. } = loaded;
        Self { limit: hf::vocab_limit(&tokenizer), model, tokenizer, template, memory: None, name }
    }

    /// Whether the model has a template, and so answers instead of continuing.
    pub fn answers(&self) -> bool {
        self.template.is_some()
    }

    /// The most tokens that the model reads.
    pub fn context(&self) -> usize {
        self.model.config().max_position_embeddings
    }

    /// Writes an answer until it ends, `stop` is set, or `on` breaks.
    ///
    /// # Errors
    /// A prompt that is too long, what the template refuses, a computation that fails.
    pub fn write(
        &mut self,
        ask: &Ask,
        settings: &GenerationConfig,
        stop: &Cancellation,
        mut on: impl FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Ended> {
        let (ids, dropped) = self.prompt(ask, settings)?;
        let last = self.memory.take();
        let mut memory = Memory::for_prompt(last, &self.model, &ids, settings.max_new_tokens)?;
        let mut flow = on(Progress::Reading { prompt: ids.len(), known: memory.known(), dropped });

        // A text goes on where it ended, space included; an answer begins.
        let mut bare = !matches!(ask, Ask::Continue(text) if !text.is_empty());
        let mut clean = |piece: &str| {
            let piece = printable(piece);
            let piece = if bare { piece.trim_start() } else { &piece };
            bare = bare && piece.is_empty();
            piece.to_owned()
        };
        let mut generator = Generator::new(&mut memory, &ids, settings)?
            .with_vocab_limit(self.limit)
            .with_cancellation(stop)
            .with_tokenizer(&self.tokenizer)?;
        let (mut written, mut first, mut time) = (0, None, Duration::ZERO);
        let mut reason = StopReason::Cancelled;
        while flow.is_continue() {
            let Some(event) = generator.next() else { break };
            let text = match event.map_err(|error| self.named(error))? {
                Event::Token(_) => {
                    written += 1;
                    time = first.get_or_insert_with(Instant::now).elapsed();
                    String::new()
                }
                Event::Text(piece) => clean(&piece),
                Event::Finish(finish) => {
                    reason = finish;
                    break;
                }
            };
            flow = on(Progress::Wrote { text, written, time });
        }
        self.memory = Some(memory);
        Ok(Ended { reason, written, time })
    }

    /// What went wrong, with the model's name where its weights are at fault.
    fn named(&self, error: ModelError) -> Error {
        match error {
            ModelError::InvalidLogits { .. } => anyhow!("{}: {error}", self.name),
            _ => error.into(),
        }
    }

    /// The ids of what is asked, and how many messages had no place in them.
    fn prompt(&self, ask: &Ask, settings: &GenerationConfig) -> Result<(Vec<u32>, usize)> {
        let context = self.context();
        match (ask, &self.template) {
            (Ask::Answer(conversation), Some(template)) => {
                // Half of the context is the conversation's, however long an answer may be.
                let answer = settings.max_new_tokens.min(context / 2);
                let prompt = conversation.prompt(template, &self.tokenizer, context, answer)?;
                Ok((prompt.ids, prompt.dropped))
            }
            (Ask::Answer(_), None) => bail!("this model has no chat template: it continues text"),
            (Ask::Continue(text), _) => {
                let encoded = self
                    .tokenizer
                    .encode(text.as_str(), false)
                    .map_err(|error| anyhow!("the prompt cannot be tokenised: {error}"))?;
                // A text begins after the token that ends the one before it.
                let mut ids: Vec<u32> = settings.bos_token_id.into_iter().collect();
                ids.extend(encoded.get_ids());
                if ids.len() >= context {
                    bail!(
                        "the prompt has {} tokens, but the model reads at most {context}, of which an answer needs one",
                        ids.len()
                    );
                }
                Ok((ids, 0))
            }
        }
    }
}

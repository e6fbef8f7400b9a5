//! The loop: a model's scores in, tokens out, until something stops it.

use std::fmt;

use tokenizers::Tokenizer;

use super::{GenerationConfig, Sampler, TokenStream};
use crate::{ModelError, Result};

/// A model that remembers the tokens it was given, as a [`Generator`] drives it.
pub trait NextLogits {
    /// Adds `ids` to what the model remembers and scores every token of the vocabulary as the next one.
    ///
    /// Returns the logits after the last id, `(vocab,)`. `ids` is never empty and never longer than
    /// [`NextLogits::remaining`].
    ///
    /// # Errors
    /// Whatever the model's computation fails with.
    fn append(&mut self, ids: &[u32]) -> Result<Vec<f32>>;

    /// How many more tokens the model can remember.
    fn remaining(&self) -> usize;

    /// Rows of the embedding: every id given to [`NextLogits::append`] is less than this.
    fn vocab_size(&self) -> usize;
}

/// Why a [`Generator`] gives no more tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum StopReason {
    /// The model chose a token that ends the text.
    Eos,
    /// `max_new_tokens` are generated.
    MaxTokens,
    /// The model cannot remember more tokens.
    ContextFull,
    /// The caller asked for it: [`Generator::with_interrupt`].
    Interrupted,
    /// An error, which was the last item.
    Failed,
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eos => "end of text",
            Self::MaxTokens => "the most new tokens asked for",
            Self::ContextFull => "the model's context is full",
            Self::Interrupted => "interrupted",
            Self::Failed => "an error",
        })
    }
}

/// An iterator over the tokens that a model generates after a prompt.
///
/// It ends at a token of `eos_token_id` (which is not part of the text and not given), after `max_new_tokens`,
/// when the model's context is full, or when the caller's check says so; [`Generator::stop_reason`] tells which.
///
/// # Examples
/// ```
/// use vesper_model::Result;
/// use vesper_model::generate::{GenerationConfig, Generator, NextLogits, StopReason};
///
/// /// Counts: after token n comes n + 1.
/// struct Counter(usize);
///
/// impl NextLogits for Counter {
///     fn append(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
///         self.0 += ids.len();
///         let next = ids[ids.len() - 1] + 1;
///         Ok((0..10).map(|id| if id == next { 1.0 } else { 0.0 }).collect())
///     }
///     fn remaining(&self) -> usize {
///         100 - self.0
///     }
///     fn vocab_size(&self) -> usize {
///         10
///     }
/// }
///
/// let config = GenerationConfig::greedy().with_eos([7]);
/// let mut model = Counter(0);
/// let mut generator = Generator::new(&mut model, &[1, 2], &config)?;
/// assert_eq!(generator.by_ref().collect::<Result<Vec<u32>>>()?, [3, 4, 5, 6]);
/// assert_eq!(generator.stop_reason(), Some(StopReason::Eos));
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
pub struct Generator<'a, M: NextLogits + ?Sized> {
    model: &'a mut M,
    sampler: Sampler,
    /// The prompt and what came after it.
    tokens: Vec<u32>,
    /// Length of the prompt.
    prompt: usize,
    /// How many of the tokens the model was given.
    fed: usize,
    max_new_tokens: usize,
    eos: Vec<u32>,
    interrupt: Option<Box<dyn FnMut() -> bool + 'a>>,
    stop: Option<StopReason>,
}

impl<M: NextLogits + ?Sized> fmt::Debug for Generator<'_, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generator")
            .field("tokens", &self.tokens)
            .field("prompt", &self.prompt)
            .field("stop", &self.stop)
            .finish_non_exhaustive()
    }
}

impl<'a, M: NextLogits + ?Sized> Generator<'a, M> {
    /// Prepares to continue `prompt`; an empty one begins with `bos_token_id`. The model runs at the first token.
    ///
    /// # Errors
    /// [`ModelError::EmptyPrompt`] for an empty prompt without a `bos_token_id`;
    /// [`ModelError::TokenOutOfRange`] for an id that the model does not have;
    /// [`ModelError::SequenceTooLong`] for a prompt that the model cannot take;
    /// [`ModelError::InvalidGeneration`] for a setting out of range.
    pub fn new(model: &'a mut M, prompt: &[u32], config: &GenerationConfig) -> Result<Self> {
        let sampler = Sampler::new(config)?;
        let tokens = match config.bos_token_id {
            _ if !prompt.is_empty() => prompt.to_vec(),
            Some(bos) => vec![bos],
            None => return Err(ModelError::EmptyPrompt),
        };
        let (vocab, limit) = (model.vocab_size(), model.remaining());
        if let Some(&id) = tokens.iter().find(|&&id| id as usize >= vocab) {
            return Err(ModelError::TokenOutOfRange { id, vocab });
        }
        if tokens.len() > limit {
            return Err(ModelError::SequenceTooLong { got: tokens.len(), limit });
        }
        let sampler = sampler.with_prompt(tokens.len());
        Ok(Self {
            model,
            sampler,
            prompt: tokens.len(),
            tokens,
            fed: 0,
            max_new_tokens: config.max_new_tokens,
            eos: config.eos_token_id.clone(),
            interrupt: None,
            stop: None,
        })
    }

    /// Never generates an id of `limit` or more; see [`Sampler::with_vocab_limit`].
    pub fn with_vocab_limit(mut self, limit: usize) -> Self {
        self.sampler = self.sampler.with_vocab_limit(limit);
        self
    }

    /// Asks `interrupt` before every token; `true` stops.
    pub fn with_interrupt(mut self, interrupt: impl FnMut() -> bool + 'a) -> Self {
        self.interrupt = Some(Box::new(interrupt));
        self
    }

    /// The tokens generated so far.
    pub fn generated(&self) -> &[u32] {
        self.tokens.get(self.prompt..).unwrap_or_default()
    }

    /// The tokens that the model was not given yet: all of the prompt before the first token, then the last
    /// token. A conversation that goes on begins the next prompt with them.
    pub fn unfed(&self) -> &[u32] {
        self.tokens.get(self.fed..).unwrap_or_default()
    }

    /// Why there are no more tokens; `None` while there may be.
    pub fn stop_reason(&self) -> Option<StopReason> {
        self.stop
    }

    /// The generated text in pieces, each of complete characters, as the continuation of the prompt's text.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the tokenizer cannot decode the prompt.
    pub fn pieces<'g>(&'g mut self, tokenizer: &'g Tokenizer) -> Result<Pieces<'g, 'a, M>> {
        let stream = TokenStream::new(tokenizer).with_context(&self.tokens)?;
        Ok(Pieces { generator: self, stream: Some(stream) })
    }

    fn step(&mut self) -> Result<Result<u32, StopReason>> {
        if self.interrupt.as_mut().is_some_and(|interrupt| interrupt()) {
            return Ok(Err(StopReason::Interrupted));
        }
        if self.generated().len() >= self.max_new_tokens {
            return Ok(Err(StopReason::MaxTokens));
        }
        let unfed = self.tokens.get(self.fed..).unwrap_or_default();
        if self.model.remaining() < unfed.len() {
            return Ok(Err(StopReason::ContextFull));
        }
        let mut logits = self.model.append(unfed)?;
        self.fed = self.tokens.len();
        let id = self.sampler.sample(&mut logits, &self.tokens)?;
        if self.eos.contains(&id) {
            return Ok(Err(StopReason::Eos));
        }
        self.tokens.push(id);
        Ok(Ok(id))
    }
}

impl<M: NextLogits + ?Sized> Iterator for Generator<'_, M> {
    type Item = Result<u32>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.stop.is_some() {
            return None;
        }
        match self.step() {
            Ok(Ok(id)) => Some(Ok(id)),
            Ok(Err(reason)) => {
                self.stop = Some(reason);
                None
            }
            Err(error) => {
                self.stop = Some(StopReason::Failed);
                Some(Err(error))
            }
        }
    }
}

impl<M: NextLogits + ?Sized> std::iter::FusedIterator for Generator<'_, M> {}

/// The text of a [`Generator`], piece by piece: [`Generator::pieces`].
#[derive(Debug)]
pub struct Pieces<'g, 'a, M: NextLogits + ?Sized> {
    generator: &'g mut Generator<'a, M>,
    /// `None` after the last piece.
    stream: Option<TokenStream<'g>>,
}

impl<M: NextLogits + ?Sized> Iterator for Pieces<'_, '_, M> {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        let stream = self.stream.as_mut()?;
        for id in self.generator.by_ref() {
            match id.and_then(|id| stream.push(id)) {
                Ok(None) => {}
                Ok(Some(piece)) => return Some(Ok(piece)),
                Err(error) => return Some(Err(error)),
            }
        }
        self.stream.take()?.flush().transpose()
    }
}

//! The loop: a model's scores in, events out, until something stops it.

use std::fmt;

use tokenizers::Tokenizer;

use super::sequence::Sequence;
use super::{Cancellation, Event, GenerationConfig, Request, StopReason};
use crate::Result;

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

/// An iterator over the [`Event`]s of one generation: each token, the text that it completes, and the reason of the end.
///
/// It ends at a token of `eos_token_id` or a stop string (neither is part of the text), after `max_new_tokens`, when the
/// model's context is full, or when it is cancelled. An error is the last item, in place of [`Event::Finish`].
///
/// # Examples
/// ```
/// use vesper_model::Result;
/// use vesper_model::generate::{Event, GenerationConfig, Generator, NextLogits, StopReason};
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
/// let config = GenerationConfig::greedy().with_eos([5]);
/// let mut model = Counter(0);
/// for event in Generator::new(&mut model, &[1, 2], &config)? {
///     match event? {
///         Event::Token(token) => println!("{}: {:.3}", token.id, token.log_probability), // 3 and 4
///         Event::Text(piece) => print!("{piece}"),                                       // with a tokenizer
///         Event::Finish(reason) => assert_eq!(reason, StopReason::Eos(5)),
///     }
/// }
/// let mut model = Counter(0);
/// let mut generator = Generator::new(&mut model, &[1, 2], &config.with_eos([7]))?;
/// assert_eq!(generator.ids().collect::<Result<Vec<u32>>>()?, [3, 4, 5, 6]);
/// assert_eq!(generator.stop_reason(), Some(&StopReason::Eos(7)));
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
pub struct Generator<'a, M: NextLogits + ?Sized> {
    model: &'a mut M,
    sequence: Sequence<'a>,
}

impl<M: NextLogits + ?Sized> fmt::Debug for Generator<'_, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generator").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

impl<'a, M: NextLogits + ?Sized> Generator<'a, M> {
    /// Prepares to continue `prompt`; an empty one begins with `bos_token_id`. The model runs at the first token.
    ///
    /// # Errors
    /// [`ModelError::EmptyPrompt`](crate::ModelError::EmptyPrompt) for an empty prompt without a `bos_token_id`;
    /// [`ModelError::TokenOutOfRange`](crate::ModelError::TokenOutOfRange) for an id that the model does not have;
    /// [`ModelError::SequenceTooLong`](crate::ModelError::SequenceTooLong) for a prompt that the model cannot take;
    /// [`ModelError::InvalidGeneration`](crate::ModelError::InvalidGeneration) for a setting out of range.
    pub fn new(model: &'a mut M, prompt: &[u32], config: &GenerationConfig) -> Result<Self> {
        Self::from_request(model, Request::new(prompt, config.clone()))
    }

    /// The same with all that a [`Request`] may hold.
    ///
    /// # Errors
    /// Those of [`Generator::new`].
    pub fn from_request(model: &'a mut M, request: Request) -> Result<Self> {
        let sequence = Sequence::new(request, model.vocab_size(), model.remaining())?;
        Ok(Self { model, sequence })
    }

    /// Gives text too, as the continuation of the prompt's, and ends at stop strings. Special tokens are left out of it.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`](crate::ModelError::Tokenizer) when the tokenizer cannot decode the prompt.
    pub fn with_tokenizer(mut self, tokenizer: &'a Tokenizer) -> Result<Self> {
        self.sequence.set_tokenizer(tokenizer)?;
        Ok(self)
    }

    /// Never generates an id of `limit` or more; see [`Sampler::with_vocab_limit`](super::Sampler::with_vocab_limit).
    pub fn with_vocab_limit(mut self, limit: usize) -> Self {
        self.sequence.set_vocab_limit(limit);
        self
    }

    /// Stops before the next token once `cancellation` is set.
    pub fn with_cancellation(mut self, cancellation: &Cancellation) -> Self {
        self.sequence.set_cancellation(cancellation);
        self
    }

    /// The tokens generated so far.
    pub fn generated(&self) -> &[u32] {
        self.sequence.generated()
    }

    /// The tokens that the model was not given yet: all of the prompt before the first token, then the last
    /// token. A conversation that goes on begins the next prompt with them.
    pub fn unfed(&self) -> &[u32] {
        self.sequence.unfed()
    }

    /// Why there are no more tokens; `None` while there may be.
    pub fn stop_reason(&self) -> Option<&StopReason> {
        self.sequence.stop_reason()
    }

    /// The ids of the tokens alone.
    ///
    /// # Errors
    /// An error of the model or of the sampling is the last item.
    pub fn ids(&mut self) -> impl Iterator<Item = Result<u32>> {
        self.filter_map(|event| event.map(|event| event.id()).transpose())
    }

    /// The pieces of the text alone; none without a tokenizer.
    ///
    /// # Errors
    /// As [`Generator::ids`].
    pub fn pieces(&mut self) -> impl Iterator<Item = Result<String>> {
        self.filter_map(|event| match event {
            Ok(Event::Text(piece)) => Some(Ok(piece)),
            Ok(_) => None,
            Err(error) => Some(Err(error)),
        })
    }
}

impl<M: NextLogits + ?Sized> Iterator for Generator<'_, M> {
    type Item = Result<Event>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(event) = self.sequence.next_event() {
                return Some(event);
            }
            if self.sequence.stop_reason().is_some() {
                return None;
            }
            if self.sequence.is_ready(self.model.remaining()) {
                match self.model.append(self.sequence.unfed()) {
                    Ok(mut logits) => self.sequence.advance(&mut logits),
                    Err(error) => self.sequence.fail(error),
                }
            }
        }
    }
}

impl<M: NextLogits + ?Sized> std::iter::FusedIterator for Generator<'_, M> {}

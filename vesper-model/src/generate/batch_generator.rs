//! Several generations in one loop.

use std::fmt;

use tokenizers::Tokenizer;

use super::sequence::Sequence;
use super::{BatchLogits, Event, Request, StopReason};
use crate::{ModelError, Result};

/// An iterator over the [`Event`]s of several generations that share a model, each with the row that it belongs to.
///
/// Each row has its own prompt, settings, seed and end, and gives what [`Generator`](super::Generator) gives for it alone, as
/// far as the model scores rows of a batch as it scores them alone. The rows go on together, a token each, in turn; one that
/// has ended is given to the model no more.
///
/// # Examples
/// ```
/// use vesper_model::Result;
/// use vesper_model::generate::{BatchGenerator, BatchLogits, Event, GenerationConfig, Request};
///
/// /// Counts, in each row: after token n comes n + 1.
/// struct Counters(Vec<usize>);
///
/// impl BatchLogits for Counters {
///     fn rows(&self) -> usize {
///         self.0.len()
///     }
///     fn append(&mut self, ids: &[&[u32]]) -> Result<Vec<Vec<f32>>> {
///         let row = |(ids, read): (&&[u32], &mut usize)| {
///             *read += ids.len();
///             let next = ids.last().map(|id| id + 1);
///             next.map_or(Vec::new(), |next| (0..10).map(|id| if id == next { 1.0 } else { 0.0 }).collect())
///         };
///         Ok(ids.iter().zip(&mut self.0).map(row).collect())
///     }
///     fn reorder(&mut self, from: &[usize]) -> Result<()> {
///         self.0 = from.iter().map(|&row| self.0[row]).collect();
///         Ok(())
///     }
///     fn remaining(&self, row: usize) -> usize {
///         100 - self.0[row]
///     }
///     fn vocab_size(&self) -> usize {
///         10
///     }
/// }
///
/// let mut model = Counters(vec![0, 0]);
/// let config = GenerationConfig::greedy().with_eos([7]);
/// let requests = [Request::new([1, 2, 3], config.clone()), Request::new([5], config)];
/// let mut ids = vec![Vec::new(); 2];
/// for (row, event) in BatchGenerator::new(&mut model, requests)? {
///     if let Event::Token(token) = event? {
///         ids[row].push(token.id);
///     }
/// }
/// assert_eq!(ids, [vec![4, 5, 6], vec![6]]);
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
pub struct BatchGenerator<'a, M: BatchLogits + ?Sized> {
    model: &'a mut M,
    sequences: Vec<Sequence<'a>>,
}

impl<M: BatchLogits + ?Sized> fmt::Debug for BatchGenerator<'_, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BatchGenerator").field("sequences", &self.sequences).finish_non_exhaustive()
    }
}

impl<'a, M: BatchLogits + ?Sized> BatchGenerator<'a, M> {
    /// Prepares to answer one request a row. The model runs at the first event, and reads all prompts at once.
    ///
    /// # Errors
    /// [`ModelError::InvalidGeneration`] for more or fewer requests than the model has rows; those of
    /// [`Generator::new`](super::Generator::new) for the first request that has one.
    pub fn new(model: &'a mut M, requests: impl IntoIterator<Item = Request>) -> Result<Self> {
        let sequences = requests
            .into_iter()
            .enumerate()
            .map(|(row, request)| {
                // A row too many is an error below.
                let room = if row < model.rows() { model.remaining(row) } else { usize::MAX };
                Sequence::new(request, model.vocab_size(), room)
            })
            .collect::<Result<Vec<_>>>()?;
        if sequences.len() != model.rows() {
            return Err(ModelError::InvalidGeneration {
                field: "the number of requests",
                got: format!("{} for a model of {} rows", sequences.len(), model.rows()),
                expected: "one a row",
            });
        }
        Ok(Self { model, sequences })
    }

    /// Gives text too, and ends at stop strings; see [`Generator::with_tokenizer`](super::Generator::with_tokenizer).
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the tokenizer cannot decode a prompt.
    pub fn with_tokenizer(mut self, tokenizer: &'a Tokenizer) -> Result<Self> {
        self.sequences.iter_mut().try_for_each(|sequence| sequence.set_tokenizer(tokenizer))?;
        Ok(self)
    }

    /// The tokens that a row has generated so far.
    pub fn generated(&self, row: usize) -> &[u32] {
        self.sequences.get(row).map_or(&[], Sequence::generated)
    }

    /// Why a row gives no more tokens; `None` while it may, and for a row that is not there.
    pub fn stop_reason(&self, row: usize) -> Option<&StopReason> {
        self.sequences.get(row)?.stop_reason()
    }

    /// One token for every row that goes on.
    fn step(&mut self) {
        let model = &mut *self.model;
        let mut ready = Vec::new();
        for (row, sequence) in self.sequences.iter_mut().enumerate() {
            ready.push(sequence.is_ready(model.remaining(row)));
        }
        if !ready.contains(&true) {
            return;
        }
        let unfed = |(sequence, &ready): (&'_ Sequence<'a>, &bool)| {
            if ready { sequence.unfed().to_vec() } else { Vec::new() }
        };
        let ids: Vec<Vec<u32>> = self.sequences.iter().zip(&ready).map(unfed).collect();
        let ids: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
        let mut going =
            self.sequences.iter_mut().zip(&ready).filter(|(_, ready)| **ready).map(|(row, _)| row);
        match model.append(&ids) {
            Ok(logits) => {
                let mut logits =
                    logits.into_iter().zip(&ready).filter(|(_, ready)| **ready).map(|(row, _)| row);
                going.for_each(|sequence| sequence.advance(&mut logits.next().unwrap_or_default()));
            }
            // An error that all share is given once.
            Err(error) => {
                if let Some(first) = going.next() {
                    first.fail(error);
                }
                going.for_each(Sequence::fail_with_others);
            }
        }
    }
}

impl<M: BatchLogits + ?Sized> Iterator for BatchGenerator<'_, M> {
    type Item = (usize, Result<Event>);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let mut waiting = self.sequences.iter_mut().enumerate();
            if let Some(event) = waiting.find_map(|(row, sequence)| Some((row, sequence.next_event()?))) {
                return Some(event);
            }
            if self.sequences.iter().all(|sequence| sequence.stop_reason().is_some()) {
                return None;
            }
            self.step();
        }
    }
}

impl<M: BatchLogits + ?Sized> std::iter::FusedIterator for BatchGenerator<'_, M> {}

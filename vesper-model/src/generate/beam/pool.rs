//! The continuations that are complete.

use std::cmp::Ordering;

use super::{Candidate, Hypothesis};
use crate::generate::{EarlyStopping, GenerationConfig, StopReason};

/// The best complete continuations, best first, and whether better ones may come.
#[derive(Debug)]
pub(super) struct Pool {
    size: usize,
    length_penalty: f64,
    early_stopping: EarlyStopping,
    /// The most new tokens.
    limit: usize,
    complete: Vec<Hypothesis>,
}

impl Pool {
    pub(super) fn new(config: &GenerationConfig, limit: usize) -> Self {
        // One beam is the greedy choice, which ends at the first end of the text.
        let early_stopping =
            if config.num_beams == 1 { EarlyStopping::WhenFull } else { config.early_stopping };
        Self {
            size: config.num_beams,
            length_penalty: config.length_penalty,
            early_stopping,
            limit,
            complete: Vec::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.complete.is_empty()
    }

    /// `length`: of the ids and the token that ended them.
    pub(super) fn add(&mut self, ids: Vec<u32>, length: usize, log_probability: f64, stop: StopReason) {
        let score = self.score(log_probability, length);
        let at = self.complete.partition_point(|other| other.score >= score);
        self.complete.insert(at, Hypothesis { ids, score, log_probability, stop });
        self.complete.truncate(self.size);
    }

    /// Whether to go on, where `best` is the likeliest beam's log-probability and length, if there is a beam.
    pub(super) fn is_open(&self, best: Option<(f64, usize)>) -> bool {
        let Some((log_probability, length)) = best else { return false };
        let worst = match self.complete.last() {
            Some(worst) if self.complete.len() == self.size => worst.score,
            _ => return true,
        };
        let length = match self.early_stopping {
            EarlyStopping::WhenFull => return false,
            EarlyStopping::WhenImpossible if self.length_penalty > 0.0 => self.limit,
            EarlyStopping::WhenUnlikely | EarlyStopping::WhenImpossible => length,
        };
        self.score(log_probability, length) > worst
    }

    pub(super) fn into_best(mut self, count: usize) -> Vec<Hypothesis> {
        self.complete.truncate(count);
        self.complete
    }

    fn score(&self, log_probability: f64, length: usize) -> f64 {
        log_probability / (length.max(1) as f64).powf(self.length_penalty)
    }
}

/// The likelier first; among equals that of the earlier beam and the lower id.
pub(super) fn better(a: &Candidate, b: &Candidate) -> Ordering {
    b.log_probability.total_cmp(&a.log_probability).then(a.beam.cmp(&b.beam)).then(a.id.cmp(&b.id))
}

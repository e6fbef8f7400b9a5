use super::{Candidate, History, LogitsProcessor, candidates, keep_only, likelier_first};

/// Keeps the `k` likeliest tokens, and those that are as likely as the last of them.
///
/// # Examples
/// ```
/// use vesper_model::generate::{History, LogitsProcessor, TopK};
/// let mut scores = [1f32, 3., 2., 2.];
/// TopK::new(2).process(&mut scores, History::new(&[], 0));
/// assert_eq!(scores, [f32::NEG_INFINITY, 3., 2., 2.]); // the last two are alike
/// ```
#[derive(Debug, Clone)]
pub struct TopK {
    k: usize,
    /// Kept between calls for its memory.
    scratch: Vec<Candidate>,
}

impl TopK {
    /// `k`: at least 1; 0 keeps all.
    pub fn new(k: usize) -> Self {
        Self { k, scratch: Vec::new() }
    }
}

impl LogitsProcessor for TopK {
    fn process(&mut self, scores: &mut [f32], _history: History<'_>) {
        candidates(scores, &mut self.scratch);
        if self.k > 0 && self.k < self.scratch.len() {
            let (_, last, _) = self.scratch.select_nth_unstable_by(self.k - 1, likelier_first);
            let least = last.score;
            self.scratch.retain(|candidate| candidate.score >= least);
            keep_only(scores, &self.scratch);
        }
    }
}

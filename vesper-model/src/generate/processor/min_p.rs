use super::{Candidate, History, LogitsProcessor, candidates, keep_only};

/// Keeps the tokens that are at least `p` times as probable as the likeliest.
///
/// # Examples
/// ```
/// use vesper_model::generate::{History, LogitsProcessor, MinP};
/// let mut scores = [0f32, -1., -3.]; // as probable as the likeliest times 1, .37 and .05
/// MinP::new(0.1).process(&mut scores, History::new(&[], 0));
/// assert_eq!(scores, [0., -1., f32::NEG_INFINITY]);
/// ```
///
/// # References
/// Nguyen et al. 2024, [arXiv:2407.01082](https://arxiv.org/abs/2407.01082).
#[derive(Debug, Clone)]
pub struct MinP {
    p: f64,
    /// Kept between calls for its memory.
    scratch: Vec<Candidate>,
}

impl MinP {
    /// `p`: from 0, which keeps all, to 1, which keeps the likeliest.
    pub fn new(p: f64) -> Self {
        Self { p, scratch: Vec::new() }
    }
}

impl LogitsProcessor for MinP {
    fn process(&mut self, scores: &mut [f32], _history: History<'_>) {
        candidates(scores, &mut self.scratch);
        // The likeliest has weight 1.
        self.scratch.retain(|candidate| candidate.weight >= self.p);
        keep_only(scores, &self.scratch);
    }
}

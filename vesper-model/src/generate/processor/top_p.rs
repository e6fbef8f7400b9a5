use super::{Candidate, History, LogitsProcessor, candidates, keep_only, likelier_first};

/// Keeps the smallest set of likeliest tokens that holds the probability `p`.
///
/// # Examples
/// ```
/// use vesper_model::generate::{History, LogitsProcessor, TopP};
/// let mut scores = [0.6f32.ln(), 0.3f32.ln(), 0.1f32.ln()];
/// TopP::new(0.8).process(&mut scores, History::new(&[], 0));
/// assert_eq!(scores, [0.6f32.ln(), 0.3f32.ln(), f32::NEG_INFINITY]);
/// ```
///
/// # References
/// Holtzman et al. 2019, [arXiv:1904.09751](https://arxiv.org/abs/1904.09751).
#[derive(Debug, Clone)]
pub struct TopP {
    p: f64,
    /// Kept between calls for its memory.
    scratch: Vec<Candidate>,
}

impl TopP {
    /// `p`: from 0, which keeps the likeliest alone, to 1, which keeps all.
    pub fn new(p: f64) -> Self {
        Self { p, scratch: Vec::new() }
    }
}

impl LogitsProcessor for TopP {
    fn process(&mut self, scores: &mut [f32], _history: History<'_>) {
        let total = candidates(scores, &mut self.scratch);
        let kept = &mut self.scratch;
        // All tokens under this weight together hold less than 1 - p: they need not be sorted.
        let floor = (1.0 - self.p) * total / kept.len().max(1) as f64;
        kept.retain(|candidate| candidate.weight >= floor);
        kept.sort_unstable_by(likelier_first);
        let mut cumulative = 0.0;
        let reached = kept.iter().position(|candidate| {
            cumulative += candidate.weight;
            cumulative >= self.p * total
        });
        if let Some(last) = reached {
            kept.truncate(last + 1);
        }
        keep_only(scores, kept);
    }
}

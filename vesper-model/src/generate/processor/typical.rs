use super::{Candidate, History, LogitsProcessor, candidates, keep_only};

/// Keeps the tokens whose surprise is nearest to the entropy of the distribution, until they hold the probability `p`.
///
/// ```text
/// d_i = |-ln P(i) - H|,  H = -sum P ln P      the smallest d first, and all that are no larger than the last one kept
/// ```
///
/// # Examples
/// ```
/// use vesper_model::generate::{History, LogitsProcessor, Typical};
/// // The entropy is 1.42 nats, the surprise of the tokens .92, 1.20 and 2.3: the second is the nearest to it.
/// let mut scores = [0.4f32.ln(), 0.3f32.ln(), 0.1f32.ln(), 0.1f32.ln(), 0.1f32.ln()];
/// Typical::new(0.2).process(&mut scores, History::new(&[], 0));
/// assert_eq!(scores.iter().filter(|score| score.is_finite()).count(), 1);
/// assert_eq!(scores[1], 0.3f32.ln());
/// ```
///
/// # References
/// Meister et al. 2022, [arXiv:2202.00666](https://arxiv.org/abs/2202.00666).
#[derive(Debug, Clone)]
pub struct Typical {
    p: f64,
    /// Kept between calls for its memory: with the distance from the entropy.
    scratch: Vec<(f64, Candidate)>,
    candidates: Vec<Candidate>,
}

impl Typical {
    /// `p`: over 0; 1 keeps all.
    pub fn new(p: f64) -> Self {
        Self { p, scratch: Vec::new(), candidates: Vec::new() }
    }
}

impl LogitsProcessor for Typical {
    fn process(&mut self, scores: &mut [f32], _history: History<'_>) {
        let total = candidates(scores, &mut self.candidates);
        let surprise = |candidate: &Candidate| -(candidate.weight / total).ln();
        // A weight that is 0 in f64 has no part in the entropy, and an infinite distance from it.
        let entropy: f64 = self
            .candidates
            .iter()
            .filter(|candidate| candidate.weight > 0.0)
            .map(|candidate| candidate.weight / total * surprise(candidate))
            .sum();
        self.scratch.clear();
        self.scratch.extend(
            self.candidates.iter().map(|candidate| ((surprise(candidate) - entropy).abs(), *candidate)),
        );
        self.scratch.sort_unstable_by(|(a, x), (b, y)| a.total_cmp(b).then(x.id.cmp(&y.id)));
        let mut cumulative = 0.0;
        let reached = self.scratch.iter().find(|(_, candidate)| {
            cumulative += candidate.weight;
            cumulative >= self.p * total
        });
        let Some(&(furthest, _)) = reached.or(self.scratch.last()) else { return };
        self.candidates.clear();
        self.candidates.extend(
            self.scratch.iter().take_while(|(distance, _)| *distance <= furthest).map(|(_, kept)| *kept),
        );
        keep_only(scores, &self.candidates);
    }
}

use super::{History, LogitsProcessor};

/// Makes tokens that are already there, the prompt's too, less probable.
///
/// ```text
/// l_i <- l_i / r  if l_i > 0, else l_i * r     for every distinct i of the history
/// ```
///
/// # Examples
/// ```
/// use vesper_model::generate::{History, LogitsProcessor, RepetitionPenalty};
/// let mut scores = [2f32, -2., 2.];
/// RepetitionPenalty::new(2.0).process(&mut scores, History::new(&[0, 1, 1], 1)); // the first is the prompt
/// assert_eq!(scores, [1., -4., 2.]);
/// ```
///
/// # References
/// Keskar et al. 2019, [arXiv:1909.05858](https://arxiv.org/abs/1909.05858).
#[derive(Debug, Clone)]
pub struct RepetitionPenalty {
    penalty: f64,
    /// Kept between calls for its memory, all false: the tokens of the history.
    seen: Vec<bool>,
}

impl RepetitionPenalty {
    /// A penalty of 1 changes nothing, one over 1 lowers scores.
    pub fn new(penalty: f64) -> Self {
        Self { penalty, seen: Vec::new() }
    }
}

impl LogitsProcessor for RepetitionPenalty {
    fn process(&mut self, scores: &mut [f32], history: History<'_>) {
        self.seen.resize(scores.len(), false);
        for &id in history.tokens() {
            let (Some(score), Some(seen)) = (scores.get_mut(id as usize), self.seen.get_mut(id as usize))
            else {
                continue;
            };
            if !std::mem::replace(seen, true) {
                *score = penalized(*score, self.penalty);
            }
        }
        for &id in history.tokens() {
            if let Some(seen) = self.seen.get_mut(id as usize) {
                *seen = false;
            }
        }
    }
}

/// Divides positive and multiplies other scores, so that a penalty over 1 always lowers them. Stays finite.
fn penalized(score: f32, penalty: f64) -> f32 {
    if !score.is_finite() {
        return score;
    }
    let score = f64::from(score);
    let changed = if score > 0.0 { score / penalty } else { score * penalty };
    changed.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32
}

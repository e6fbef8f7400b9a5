use super::{History, LogitsProcessor};

/// Forces the first generated tokens: at the n-th new token only the n-th of the prefix is left.
///
/// It keeps its score, which beam search adds up; one that was excluded before is forced all the same, with a score of 0.
///
/// # Examples
/// ```
/// use vesper_model::generate::{History, LogitsProcessor, ForcedPrefix};
/// let mut scores = [5f32, 1., 0.];
/// ForcedPrefix::new(vec![1]).process(&mut scores, History::new(&[0], 1));
/// assert_eq!(scores, [f32::NEG_INFINITY, 1., f32::NEG_INFINITY]);
/// ```
#[derive(Debug, Clone)]
pub struct ForcedPrefix {
    prefix: Vec<u32>,
}

impl ForcedPrefix {
    /// `prefix`: the tokens that every answer begins with.
    pub fn new(prefix: Vec<u32>) -> Self {
        Self { prefix }
    }
}

impl LogitsProcessor for ForcedPrefix {
    fn process(&mut self, scores: &mut [f32], history: History<'_>) {
        let Some(&forced) = self.prefix.get(history.generated().len()) else { return };
        let own = scores.get(forced as usize).copied().unwrap_or_default();
        // Where the model does not have the token, none is left.
        scores.fill(f32::NEG_INFINITY);
        if let Some(score) = scores.get_mut(forced as usize) {
            *score = if own.is_finite() { own } else { 0.0 };
        }
    }
}

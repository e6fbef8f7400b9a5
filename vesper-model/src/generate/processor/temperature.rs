use super::{History, LogitsProcessor};

/// Divides the scores, after taking the largest from each so that no temperature, however small, overflows.
///
/// ```text
/// l_i <- (l_i - max l) / T
/// ```
///
/// # Examples
/// ```
/// use vesper_model::generate::{History, LogitsProcessor, Temperature};
/// let mut scores = [2f32, 1., 0.];
/// Temperature::new(0.5).process(&mut scores, History::new(&[], 0));
/// assert_eq!(scores, [0., -2., -4.]);
/// ```
#[derive(Debug, Clone)]
pub struct Temperature {
    temperature: f64,
}

impl Temperature {
    /// `temperature`: over 0; 1 changes no probability, less makes the likely tokens likelier.
    pub fn new(temperature: f64) -> Self {
        Self { temperature }
    }
}

impl LogitsProcessor for Temperature {
    fn process(&mut self, scores: &mut [f32], _history: History<'_>) {
        let max = f64::from(scores.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        for score in scores.iter_mut().filter(|score| score.is_finite()) {
            *score = ((f64::from(*score) - max) / self.temperature) as f32;
        }
    }
}

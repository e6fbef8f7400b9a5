use super::{History, LogitsProcessor};

/// Lowers the scores of tokens that were generated already, by how often; the prompt does not count.
///
/// ```text
/// l_i <- l_i - f * (times that i was generated) - p     for every i that was generated
/// ```
///
/// # Examples
/// ```
/// use vesper_model::generate::{History, LogitsProcessor, FrequencyPenalty};
/// let mut scores = [2f32, 2., 2.];
/// FrequencyPenalty::new(0.5, 1.0).process(&mut scores, History::new(&[0, 1, 1], 1)); // the first is the prompt
/// assert_eq!(scores, [2., 0., 2.]); // token 1: 2 - 0.5 * 2 - 1
/// ```
///
/// # References
/// The `frequency_penalty` and `presence_penalty` of OpenAI's interface.
#[derive(Debug, Clone)]
pub struct FrequencyPenalty {
    frequency: f64,
    presence: f64,
}

impl FrequencyPenalty {
    /// Both 0 change nothing; negative ones encourage repetition.
    pub fn new(frequency: f64, presence: f64) -> Self {
        Self { frequency, presence }
    }
}

impl LogitsProcessor for FrequencyPenalty {
    fn process(&mut self, scores: &mut [f32], history: History<'_>) {
        let mut counts = std::collections::BTreeMap::new();
        for &id in history.generated() {
            *counts.entry(id).or_insert(0_u32) += 1;
        }
        for (id, count) in counts {
            if let Some(score) = scores.get_mut(id as usize)
                && score.is_finite()
            {
                let changed = f64::from(*score) - self.frequency * f64::from(count) - self.presence;
                *score = changed.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32;
            }
        }
    }
}

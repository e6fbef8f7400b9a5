//! What the distribution of the next token says about one choice.

use crate::generate::scores::argmax;
use crate::{ModelError, Result};

/// A chosen token and the distribution that it was chosen from, after the softmax at temperature 1.
///
/// # Examples
/// ```
/// use vesper_model::metacognition::TokenStatistics;
///
/// let logits = [2f32.ln(), 6f32.ln(), 0.0, f32::NEG_INFINITY]; // probabilities 2/9, 6/9, 1/9, 0
/// let greedy = TokenStatistics::greedy(&logits)?;
/// assert_eq!(greedy.chosen, 1);
/// assert!((greedy.probability - 6.0 / 9.0).abs() < 1e-6 && (greedy.margin - 4.0 / 9.0).abs() < 1e-6);
/// let drawn = TokenStatistics::of(&logits, 0)?;
/// assert!((drawn.margin + 4.0 / 9.0).abs() < 1e-6 && drawn.largest == greedy.probability);
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenStatistics {
    /// The token.
    pub chosen: u32,
    /// Its probability.
    pub probability: f64,
    /// The largest probability of all tokens: that of the chosen one, if the choice was greedy.
    pub largest: f64,
    /// The entropy of the distribution, in nats.
    pub entropy: f64,
    /// The probability of the chosen token less the largest of the others: negative where another is likelier.
    pub margin: f64,
}

impl TokenStatistics {
    /// Of the likeliest token, the lowest id among equals.
    ///
    /// # Errors
    /// [`ModelError::InvalidLogits`] for NaN, plus infinity, or no token that is possible.
    pub fn greedy(logits: &[f32]) -> Result<Self> {
        let best = argmax(logits)?;
        Self::of(logits, best)
    }

    /// Of a token that was chosen in any way. `logits`: `(vocab,)`; minus infinity excludes a token.
    ///
    /// # Errors
    /// As [`TokenStatistics::greedy`]; [`ModelError::TokenOutOfRange`] for a token that has no score.
    pub fn of(logits: &[f32], chosen: u32) -> Result<Self> {
        let best = argmax(logits)?;
        let Some(&score) = logits.get(chosen as usize) else {
            return Err(ModelError::TokenOutOfRange { id: chosen, vocab: logits.len() });
        };
        let max = logits.get(best as usize).map_or(0.0, |&logit| f64::from(logit));
        // entropy = ln Z - sum(w (l - max)) / Z, with the weights w = exp(l - max) and their sum Z
        let (mut z, mut weighted, mut other) = (0.0, 0.0, 0.0_f64);
        for (&logit, id) in logits.iter().zip(0..) {
            let shifted = f64::from(logit) - max;
            let weight = shifted.exp();
            if weight > 0.0 {
                z += weight;
                weighted += weight * shifted;
            }
            if id != chosen {
                other = other.max(weight);
            }
        }
        let probability = (f64::from(score) - max).exp() / z;
        Ok(Self {
            chosen,
            probability,
            largest: 1.0 / z,
            entropy: (z.ln() - weighted / z).max(0.0),
            margin: probability - other / z,
        })
    }
}

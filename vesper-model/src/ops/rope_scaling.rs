//! Rotary angles for sequences longer than those that a model was trained on first.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use super::rope::frequencies;
use crate::{ModelError, Result};

/// How the frequencies of the rotary embedding are lowered; the field `rope_scaling` of a `config.json`.
///
/// ```text
/// linear:  f / factor
/// llama3:  f             where original * f / (2 pi) > high_freq_factor
///          f / factor    where original * f / (2 pi) < low_freq_factor
///          (1 - s) f / factor + s f   between,   s = (original * f / (2 pi) - low) / (high - low)
/// ```
///
/// `original * f / (2 pi)` is how often a pair turns within `original_max_position_embeddings` tokens.
///
/// # Examples
/// ```
/// use vesper_model::ops::RopeScaling;
///
/// let scaling: RopeScaling = serde_json::from_str(r#"{"rope_type": "linear", "factor": 4.0}"#)?;
/// assert_eq!(scaling, RopeScaling::Linear { factor: 4.0 });
/// # Ok::<(), serde_json::Error>(())
/// ```
///
/// # References
/// Chen et al., Extending Context Window of Large Language Models via Positional Interpolation, arXiv 2306.15595;
/// Grattafiori et al., The Llama 3 Herd of Models, arXiv 2407.21783.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rope_type", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Every frequency by the same factor.
    Linear {
        /// How many times longer sequences become, 1 or more.
        factor: f64,
    },
    /// Slow frequencies by a factor, fast ones not at all, as in Llama 3.1.
    Llama3 {
        /// How much the slow frequencies are lowered, 1 or more.
        factor: f64,
        /// Pairs that turn less often than this within the original context are slow.
        low_freq_factor: f64,
        /// Pairs that turn more often than this within the original context are fast.
        high_freq_factor: f64,
        /// The context that the model was trained on first, in tokens.
        original_max_position_embeddings: usize,
    },
}

impl RopeScaling {
    /// Checks that every parameter is in its range.
    ///
    /// # Errors
    /// [`ModelError::InvalidConfig`] names the parameter, its value and what it must be.
    pub fn validate(&self) -> Result<()> {
        let bad = |field, got: String, expected: &str| {
            Err(ModelError::InvalidConfig { field, got, expected: expected.into() })
        };
        let (Self::Linear { factor } | Self::Llama3 { factor, .. }) = *self;
        if !(factor.is_finite() && factor >= 1.0) {
            return bad("rope_scaling.factor", factor.to_string(), "a number from 1");
        }
        if let Self::Llama3 { low_freq_factor: low, high_freq_factor: high, .. } = *self {
            if !(low.is_finite() && low > 0.0) {
                return bad("rope_scaling.low_freq_factor", low.to_string(), "a positive number");
            }
            if !(high.is_finite() && high > low) {
                return bad(
                    "rope_scaling.high_freq_factor",
                    high.to_string(),
                    "a number over low_freq_factor",
                );
            }
        }
        if let Self::Llama3 { original_max_position_embeddings: 0, .. } = self {
            return bad("rope_scaling.original_max_position_embeddings", "0".into(), "1 or more");
        }
        Ok(())
    }

    /// What each frequency of a head is divided by, from fast to slow: (head_dim / 2).
    pub(crate) fn factors(&self, head_dim: usize, theta: f64) -> Vec<f32> {
        frequencies(head_dim, theta).map(|frequency| frequency / self.apply(frequency)).collect()
    }

    /// A frequency, in radians a token, lowered. Each step is rounded to f32, as `transformers` does.
    pub(super) fn apply(&self, frequency: f32) -> f32 {
        match *self {
            Self::Linear { factor } => frequency / factor as f32,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let (low, high) = (low_freq_factor as f32, high_freq_factor as f32);
                let turns = original_max_position_embeddings as f32 / ((2.0 * PI) as f32 / frequency);
                let lowered = frequency / factor as f32;
                if turns > high {
                    return frequency;
                }
                if turns < low {
                    return lowered;
                }
                let smooth = (turns - low) / (high_freq_factor - low_freq_factor) as f32;
                (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
            }
        }
    }
}

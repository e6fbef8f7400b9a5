//! The perplexity-guided momentum: a shorter memory while the loss falls fast.

use super::ema::Ema;
use crate::config::{positive, unit};
use crate::error::Result;
use serde::{Deserialize, Serialize};

/// Whether the momentum follows the progress of the logarithm of the perplexity.
///
/// ln(perplexity) is the loss in nats. While it falls fast, old gradients point to where the model was; later,
/// a longer average takes noise out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum PerplexityMomentum {
    /// beta1 is the configured one.
    #[default]
    Off,
    /// AdamW's beta1 moves from `start` to `end` with progress, and the momentum of
    /// [`Orthogonal`](crate::Orthogonal) from its `early_momentum` to its `momentum`:
    ///
    /// ```text
    /// progress = clamp((initial_loss - EMA(loss)) / nats, 0, 1)
    /// beta1    = start + (end - start) * progress
    /// ```
    ///
    /// Before the first observed loss beta1 is the configured one. Bias correction uses the product of the betas
    /// that were applied, so a beta1 that moves is corrected exactly.
    Progress {
        /// The loss of a model that knows nothing, > 0: ln V for cross-entropy in nats.
        initial_loss: f64,
        /// The progress in nats at which `end` is reached, > 0 (4.4: from ln 8192 to a loss of 4.6).
        nats: f64,
        /// beta1 without progress, in [0, 1) (0.8).
        start: f64,
        /// beta1 at full progress, in [0, 1) (0.9).
        end: f64,
        /// The weight of the past in the average of the loss, in [0, 1) (0.95).
        decay: f64,
    },
}

impl PerplexityMomentum {
    /// The measured setting for a vocabulary: 0.8 to 0.9 over 4.4 nats below ln V, decay 0.95.
    ///
    /// ```
    /// use velvet_optim::PerplexityMomentum;
    /// let PerplexityMomentum::Progress { start, end, .. } = PerplexityMomentum::progress(8192) else {
    ///     unreachable!()
    /// };
    /// assert_eq!((start, end), (0.8, 0.9));
    /// ```
    pub fn progress(vocab_size: usize) -> Self {
        Self::Progress {
            initial_loss: (vocab_size as f64).ln(),
            nats: 4.4,
            start: 0.8,
            end: 0.9,
            decay: 0.95,
        }
    }

    pub(crate) fn validate(&self) -> Result<()> {
        match *self {
            Self::Off => Ok(()),
            Self::Progress { initial_loss, nats, start, end, decay } => {
                positive("perplexity_momentum.initial_loss", initial_loss)?;
                positive("perplexity_momentum.nats", nats)?;
                unit("perplexity_momentum.start", start)?;
                unit("perplexity_momentum.end", end)?;
                unit("perplexity_momentum.decay", decay)
            }
        }
    }
}

/// The state of [`PerplexityMomentum`]: one average.
///
/// ```
/// use velvet_optim::adaptive::ProgressState;
/// use velvet_optim::PerplexityMomentum;
/// let mut state = ProgressState::new(PerplexityMomentum::progress(8192));
/// assert_eq!(state.value(), None); // no loss yet: the configured beta1 applies
/// assert_eq!(state.observe(9.1), Some(0.8));
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProgressState {
    config: PerplexityMomentum,
    loss: Ema,
}

impl ProgressState {
    /// A state that has seen no loss.
    pub fn new(config: PerplexityMomentum) -> Self {
        Self::with_average(config, None)
    }

    /// A state that goes on from a saved average of the loss.
    pub fn with_average(config: PerplexityMomentum, average: Option<f64>) -> Self {
        let decay = match config {
            PerplexityMomentum::Off => 0.0,
            PerplexityMomentum::Progress { decay, .. } => decay,
        };
        Self { config, loss: Ema::with_value(decay, average) }
    }

    /// Takes a loss in (NaN and infinity are not) and returns beta1, `None` for the configured one.
    pub fn observe(&mut self, loss: f64) -> Option<f64> {
        if self.config != PerplexityMomentum::Off {
            self.loss.observe(loss);
        }
        self.value()
    }

    /// beta1 now, `None` for the configured one.
    pub fn value(&self) -> Option<f64> {
        let PerplexityMomentum::Progress { start, end, .. } = self.config else { return None };
        Some(start + (end - start) * self.progress()?)
    }

    /// The progress in [0, 1], `None` before the first loss.
    pub fn progress(&self) -> Option<f64> {
        match (self.config, self.loss.value()) {
            (PerplexityMomentum::Progress { initial_loss, nats, .. }, Some(loss)) => {
                Some(((initial_loss - loss) / nats).clamp(0.0, 1.0))
            }
            _ => None,
        }
    }

    /// The average of the loss, for a checkpoint.
    pub fn average(&self) -> Option<f64> {
        self.loss.value()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part() -> PerplexityMomentum {
        PerplexityMomentum::Progress { initial_loss: 9.0, nats: 4.0, start: 0.8, end: 0.9, decay: 0.5 }
    }

    #[test]
    fn off_leaves_the_configured_beta1() {
        let mut state = ProgressState::new(PerplexityMomentum::Off);
        assert_eq!(state.observe(5.0), None);
        assert_eq!(state.average(), None);
    }

    #[test]
    fn beta1_moves_with_progress_and_stays_in_its_range() {
        let mut state = ProgressState::new(part());
        assert_eq!(state.observe(12.0), Some(0.8));
        let mut state = ProgressState::new(part());
        assert!((state.observe(7.0).unwrap() - 0.85).abs() < 1e-12);
        assert!((state.observe(5.0).unwrap() - 0.875).abs() < 1e-12); // average 6.0
        for _ in 0..100 {
            state.observe(1.0);
        }
        assert!((state.value().unwrap() - 0.9).abs() < 1e-12);
    }

    #[test]
    fn a_nan_loss_is_not_taken_in() {
        let mut state = ProgressState::new(part());
        assert_eq!(state.observe(f64::NAN), None);
        let before = state.observe(7.0);
        assert_eq!(state.observe(f64::NAN), before);
    }
}

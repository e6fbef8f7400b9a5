//! The entropy-adaptive learning rate: a warm-up driven by what the model has learned.

use super::ema::Ema;
use crate::config::{at_least_zero, fraction, positive, unit};
use crate::error::Result;
use serde::{Deserialize, Serialize};

/// Whether the learning rate depends on how far the loss is below that of a model that knows nothing.
///
/// A fresh language model's predictions have an entropy of ln V nats, and so its loss is ln V. Until the loss has
/// come down by some nats, gradients change direction fast and a full step does damage; counting warm-up steps
/// guesses how long that lasts, this looks.
///
/// Off by default, in the preset too: in the book's study it gives AdamW what a tuned warm-up gives, without a number
/// of steps; beside orthogonalised momentum the [`TrustRegion`](crate::TrustRegion) does better than it, by .01 nats
/// at the best learning rate and by .1 where the rate is far too low.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum EntropyLr {
    /// The learning rate is the one that was set.
    #[default]
    Off,
    /// A warm-up that takes as long as the model needs:
    ///
    /// ```text
    /// scale = clamp((initial_loss + margin - EMA(signal)) / nats, floor, 1)
    /// lr of the step = base learning rate * scale
    /// ```
    ///
    /// Before the first observation the scale is 1.
    WarmUp {
        /// The loss of a model that knows nothing, > 0: ln V for cross-entropy in nats.
        initial_loss: f64,
        /// Added to it, >= 0 (0.05 in [`EntropyLr::warm_up`]): a fresh model's loss is a little above ln V.
        margin: f64,
        /// The progress in nats over which the scale reaches 1, > 0 (3).
        nats: f64,
        /// The smallest scale, in [0, 1] (0.02); with 0 a run that starts above `initial_loss` never moves.
        floor: f64,
        /// The weight of the past in the average, in [0, 1) (0.8).
        decay: f64,
        /// What is averaged (the loss).
        signal: ProgressSignal,
    },
}

/// What tells how far a model has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ProgressSignal {
    /// The loss: the cross-entropy between data and predictions.
    #[default]
    Loss,
    /// The mean entropy of the predictions, where it was observed
    /// ([`Velvet::observe_with_entropy`](crate::Velvet::observe_with_entropy)), otherwise the loss.
    Entropy,
}

impl EntropyLr {
    /// The measured setting for a vocabulary: over 3 nats below ln V + 0.05, floor 0.02, decay 0.8.
    ///
    /// The scale reaches 1 only at a loss of ln V - 2.95: it is for vocabularies of thousands, whose text falls by
    /// far more.
    ///
    /// ```
    /// use velvet_optim::EntropyLr;
    /// let EntropyLr::WarmUp { initial_loss, nats, .. } = EntropyLr::warm_up(8192) else { unreachable!() };
    /// assert_eq!((initial_loss, nats), (8192f64.ln(), 3.0));
    /// ```
    pub fn warm_up(vocab_size: usize) -> Self {
        Self::WarmUp {
            initial_loss: (vocab_size as f64).ln(),
            margin: 0.05,
            nats: 3.0,
            floor: 0.02,
            decay: 0.8,
            signal: ProgressSignal::Loss,
        }
    }

    pub(crate) fn validate(&self) -> Result<()> {
        match *self {
            Self::Off => Ok(()),
            Self::WarmUp { initial_loss, margin, nats, floor, decay, .. } => {
                positive("entropy_lr.initial_loss", initial_loss)?;
                at_least_zero("entropy_lr.margin", margin)?;
                positive("entropy_lr.nats", nats)?;
                fraction("entropy_lr.floor", floor)?;
                unit("entropy_lr.decay", decay)
            }
        }
    }
}

/// The state of [`EntropyLr`]: one average.
///
/// ```
/// use velvet_optim::adaptive::WarmUpState;
/// use velvet_optim::EntropyLr;
/// let mut state = WarmUpState::new(EntropyLr::warm_up(8192));
/// assert_eq!(state.observe(9.05, None), 0.02); // a fresh model: the floor
/// for _ in 0..100 {
///     state.observe(5.0, None);
/// }
/// assert_eq!(state.value(), 1.0); // 4 nats below ln 8192: the whole learning rate
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WarmUpState {
    config: EntropyLr,
    loss: Ema,
}

impl WarmUpState {
    /// A state that has seen no loss.
    pub fn new(config: EntropyLr) -> Self {
        Self::with_average(config, None)
    }

    /// A state that goes on from a saved average of the loss.
    pub fn with_average(config: EntropyLr, average: Option<f64>) -> Self {
        let decay = match config {
            EntropyLr::Off => 0.0,
            EntropyLr::WarmUp { decay, .. } => decay,
        };
        Self { config, loss: Ema::with_value(decay, average) }
    }

    /// Takes a loss, and an entropy where there is one, in (NaN and infinity are not), and returns the scale of the
    /// learning rate.
    pub fn observe(&mut self, loss: f64, entropy: Option<f64>) -> f64 {
        if let EntropyLr::WarmUp { signal, .. } = self.config {
            self.loss.observe(match (signal, entropy) {
                (ProgressSignal::Entropy, Some(entropy)) => entropy,
                _ => loss,
            });
        }
        self.value()
    }

    /// The scale of the learning rate now.
    pub fn value(&self) -> f64 {
        match (self.config, self.loss.value()) {
            (EntropyLr::WarmUp { initial_loss, margin, nats, floor, .. }, Some(loss)) => {
                ((initial_loss + margin - loss) / nats).max(floor).min(1.0)
            }
            _ => 1.0,
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

    const LN_V: f64 = 9.0;
    fn part() -> EntropyLr {
        EntropyLr::WarmUp {
            initial_loss: LN_V,
            margin: 0.05,
            nats: 3.0,
            floor: 0.02,
            decay: 0.8,
            signal: ProgressSignal::Loss,
        }
    }

    #[test]
    fn off_is_always_one() {
        let mut state = WarmUpState::new(EntropyLr::Off);
        for loss in [20.0, 9.0, 1.0, f64::NAN] {
            assert_eq!(state.observe(loss, None), 1.0);
        }
        assert_eq!(state.average(), None);
    }

    #[test]
    fn no_loss_yet_means_no_scaling() {
        assert_eq!(WarmUpState::new(part()).value(), 1.0);
    }

    #[test]
    fn the_scale_is_the_progress_over_the_nats() {
        let mut state = WarmUpState::new(part());
        assert!((state.observe(LN_V - 1.45, None) - 0.5).abs() < 1e-12);
        let average: f64 = 0.8 * (LN_V - 1.45) + 0.2 * (LN_V - 2.0);
        assert!((state.observe(LN_V - 2.0, None) - (LN_V + 0.05 - average) / 3.0).abs() < 1e-12);
    }

    #[test]
    fn the_scale_stays_between_floor_and_one() {
        let mut state = WarmUpState::new(part());
        assert_eq!(state.observe(LN_V + 50.0, None), 0.02);
        for _ in 0..200 {
            state.observe(0.1, None);
        }
        assert_eq!(state.value(), 1.0);
    }

    #[test]
    fn a_nan_loss_is_not_taken_in() {
        let mut state = WarmUpState::new(part());
        let before = state.observe(LN_V - 1.0, None);
        assert_eq!(state.observe(f64::NAN, None), before);
        assert_eq!(state.observe(f64::INFINITY, None), before);
    }

    #[test]
    fn the_entropy_counts_where_it_is_the_signal_and_is_known() {
        let EntropyLr::WarmUp { initial_loss, margin, nats, floor, decay, .. } = part() else {
            unreachable!()
        };
        let signal = ProgressSignal::Entropy;
        let part = EntropyLr::WarmUp { initial_loss, margin, nats, floor, decay, signal };
        let by_entropy = WarmUpState::new(part).observe(LN_V, Some(LN_V - 1.45));
        assert!((by_entropy - 0.5).abs() < 1e-12);
        assert_eq!(
            WarmUpState::new(part).observe(LN_V - 1.0, None),
            WarmUpState::new(self::part()).observe(LN_V - 1.0, Some(1.0))
        );
    }

    #[test]
    fn a_saved_average_goes_on_with_the_same_bits() {
        let mut a = WarmUpState::new(part());
        a.observe(8.123_456_789, None);
        let mut b = WarmUpState::with_average(part(), a.average());
        assert_eq!(a.observe(7.7, None).to_bits(), b.observe(7.7, None).to_bits());
    }
}

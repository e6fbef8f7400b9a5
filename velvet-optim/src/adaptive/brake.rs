//! The overconfidence brake: a smaller learning rate while the model is surer than it has reason to be.

use super::ema::Ema;
use crate::config::{at_least_zero, fraction, positive, unit};
use crate::error::Result;
use serde::{Deserialize, Serialize};

/// Whether the learning rate falls when the loss is above the entropy of the predictions.
///
/// A calibrated model's loss is its predictions' mean entropy. Where the loss is above it, the model puts more trust
/// in its predictions than they deserve, as it does after steps that were too long or batches that were corrupt.
///
/// Off by default: in the book's study it softened learning rates that were 4 and 8 times too high, and elsewhere
/// gained nothing or cost a little (a tuned AdamW .016 ± .008 nats).
///
/// # Examples
/// ```
/// use velvet_optim::{Brake, VelvetConfig};
/// let config = VelvetConfig::default().with_brake(Brake::gap());
/// assert!(config.validate().is_ok());
/// let wrong = Brake::Gap { margin: 0.1, nats: 0.0, floor: 0.1, decay: 0.8 };
/// assert!(config.with_brake(wrong).validate().is_err());
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Brake {
    /// The gap is not looked at.
    #[default]
    Off,
    /// The learning rate falls linearly with the gap:
    ///
    /// ```text
    /// gap   = EMA(loss - entropy)
    /// scale = clamp(1 - (gap - margin) / nats, floor, 1)
    /// ```
    ///
    /// Needs the entropy ([`Velvet::observe_with_entropy`](crate::Velvet::observe_with_entropy)); without it the
    /// scale is 1.
    Gap {
        /// The gap in nats that is not braked, >= 0 (0.1).
        margin: f64,
        /// The gap above the margin in nats at which the scale would be 0, > 0 (1).
        nats: f64,
        /// The smallest scale, in [0, 1] (0.1).
        floor: f64,
        /// The weight of the past in the average, in [0, 1) (0.8).
        decay: f64,
    },
}

impl Brake {
    /// A brake from 0.1 nats on, over 1 nat, down to a tenth.
    pub fn gap() -> Self {
        Self::Gap { margin: 0.1, nats: 1.0, floor: 0.1, decay: 0.8 }
    }

    pub(crate) fn validate(&self) -> Result<()> {
        match *self {
            Self::Off => Ok(()),
            Self::Gap { margin, nats, floor, decay } => {
                at_least_zero("brake.margin", margin)?;
                positive("brake.nats", nats)?;
                fraction("brake.floor", floor)?;
                unit("brake.decay", decay)
            }
        }
    }
}

/// The state of [`Brake`]: one average.
///
/// ```
/// use velvet_optim::Brake;
/// use velvet_optim::adaptive::BrakeState;
/// let mut state = BrakeState::new(Brake::gap());
/// assert_eq!(state.observe(4.0, 4.05), 1.0);
/// assert!(BrakeState::new(Brake::gap()).observe(5.0, 4.0) < 0.2);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BrakeState {
    config: Brake,
    gap: Ema,
}

impl BrakeState {
    /// A state that has seen nothing.
    pub fn new(config: Brake) -> Self {
        Self::with_average(config, None)
    }

    /// A state that goes on from a saved average of the gap.
    pub fn with_average(config: Brake, average: Option<f64>) -> Self {
        let decay = match config {
            Brake::Off => 0.0,
            Brake::Gap { decay, .. } => decay,
        };
        Self { config, gap: Ema::with_value(decay, average) }
    }

    /// Takes a loss and an entropy in, both in nats (NaN and infinity are not), and returns the scale.
    pub fn observe(&mut self, loss: f64, entropy: f64) -> f64 {
        if self.config != Brake::Off {
            self.gap.observe(loss - entropy);
        }
        self.value()
    }

    /// The scale of the learning rate now.
    pub fn value(&self) -> f64 {
        match (self.config, self.gap.value()) {
            (Brake::Gap { margin, nats, floor, .. }, Some(gap)) => {
                (1.0 - (gap - margin) / nats).max(floor).min(1.0)
            }
            _ => 1.0,
        }
    }

    /// The average gap, for a checkpoint.
    pub fn average(&self) -> Option<f64> {
        self.gap.value()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_loss_above_the_entropy_brakes() {
        let mut state = BrakeState::new(Brake::gap());
        for entropy in [3.0, 5.0, 9.0] {
            assert_eq!(state.observe(3.0, entropy), 1.0);
        }
        let mut state = BrakeState::new(Brake::gap());
        assert!((state.observe(4.6, 4.0) - 0.5).abs() < 1e-12);
        assert_eq!(state.observe(50.0, 4.0), 0.1);
        assert_eq!(state.observe(f64::NAN, 4.0), 0.1);
    }

    #[test]
    fn off_never_brakes() {
        let mut state = BrakeState::new(Brake::Off);
        assert_eq!(state.observe(50.0, 1.0), 1.0);
        assert_eq!(state.average(), None);
    }
}

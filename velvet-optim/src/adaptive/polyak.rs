//! The Polyak cap: no step longer than the one that would reach the lowest loss there can be.

use super::ema::Ema;
use crate::config::{at_least_zero, positive, unit};
use crate::error::Result;
use serde::{Deserialize, Serialize};

/// Whether the learning rate is capped by Polyak's step.
///
/// To first order a step at learning rate lr lowers the loss by `lr * rate`, `rate = <g, p_old - p_new> / lr`. A step
/// that promises more than the loss can fall is too long.
///
/// Off by default: in the book's study it never bound at a tuned learning rate, and softened rates that were 4 and 8
/// times too high for AdamW.
///
/// # References
/// Loizou, Vaswani, Laradji, Lacoste-Julien 2021, [arXiv:2002.10542](https://arxiv.org/abs/2002.10542): the step size
/// that this caps at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum PolyakCap {
    /// No cap.
    #[default]
    Off,
    /// ```text
    /// lr = min(lr, factor * max(EMA(loss) - lower_bound, 0) / EMA(rate))
    /// ```
    ///
    /// with the rates of the steps before, so the first step is not capped. Makes every step measure its update.
    Cap {
        /// A loss that cannot be undercut, >= 0 (0).
        lower_bound: f64,
        /// The factor, > 0 (1).
        factor: f64,
        /// The weight of the past in both averages, in [0, 1) (0.9).
        decay: f64,
    },
}

impl PolyakCap {
    /// The cap with factor 1 over a lowest loss of 0.
    pub fn cap() -> Self {
        Self::Cap { lower_bound: 0.0, factor: 1.0, decay: 0.9 }
    }

    pub(crate) fn validate(&self) -> Result<()> {
        match *self {
            Self::Off => Ok(()),
            Self::Cap { lower_bound, factor, decay } => {
                at_least_zero("polyak.lower_bound", lower_bound)?;
                positive("polyak.factor", factor)?;
                unit("polyak.decay", decay)
            }
        }
    }
}

/// The state of [`PolyakCap`]: two averages.
///
/// ```
/// use velvet_optim::PolyakCap;
/// use velvet_optim::adaptive::PolyakState;
/// let mut state = PolyakState::new(PolyakCap::cap());
/// state.observe(2.0);
/// assert_eq!(state.cap(0.5), 0.5); // no step was measured yet
/// state.measured(8.0);
/// assert_eq!(state.cap(0.5), 0.25); // 0.25 * 8 is all of the loss
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PolyakState {
    config: PolyakCap,
    loss: Ema,
    rate: Ema,
}

impl PolyakState {
    /// A state that has seen nothing.
    pub fn new(config: PolyakCap) -> Self {
        Self::with_averages(config, [None; 2])
    }

    /// A state that goes on from saved averages of the loss and the rate.
    pub fn with_averages(config: PolyakCap, [loss, rate]: [Option<f64>; 2]) -> Self {
        let decay = match config {
            PolyakCap::Off => 0.0,
            PolyakCap::Cap { decay, .. } => decay,
        };
        Self { config, loss: Ema::with_value(decay, loss), rate: Ema::with_value(decay, rate) }
    }

    /// Takes a loss in (NaN and infinity are not).
    pub fn observe(&mut self, loss: f64) {
        if self.config != PolyakCap::Off {
            self.loss.observe(loss);
        }
    }

    /// Takes in by how much a step lowers the loss for each unit of learning rate, to first order.
    pub fn measured(&mut self, rate: f64) {
        if self.config != PolyakCap::Off {
            self.rate.observe(rate);
        }
    }

    /// The learning rate, capped.
    pub fn cap(&self, lr: f64) -> f64 {
        match (self.config, self.loss.value(), self.rate.value()) {
            (PolyakCap::Cap { lower_bound, factor, .. }, Some(loss), Some(rate)) if rate > 0.0 => {
                lr.min(factor * (loss - lower_bound).max(0.0) / rate)
            }
            _ => lr,
        }
    }

    /// The averages of the loss and the rate, for a checkpoint.
    pub fn averages(&self) -> [Option<f64>; 2] {
        [self.loss.value(), self.rate.value()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cap_only_lowers() {
        let mut state = PolyakState::new(PolyakCap::Cap { lower_bound: 1.0, factor: 0.5, decay: 0.0 });
        state.observe(3.0);
        state.measured(10.0);
        assert!((state.cap(1.0) - 0.1).abs() < 1e-12);
        assert_eq!(state.cap(0.01), 0.01);
        state.measured(-3.0); // a step that went up says nothing about its length
        assert_eq!(state.cap(1.0), 1.0);
        state.measured(10.0);
        state.observe(0.5); // below the bound
        assert_eq!(state.cap(1.0), 0.0);
    }

    #[test]
    fn off_caps_nothing() {
        let mut state = PolyakState::new(PolyakCap::Off);
        state.observe(3.0);
        state.measured(1e9);
        assert_eq!(state.cap(1.0), 1.0);
    }
}

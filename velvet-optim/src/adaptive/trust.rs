//! The trust region: a parameter's learning rate is held where its update would be more than a share of it.

use crate::config::positive;
use crate::error::Result;
use serde::{Deserialize, Serialize};

/// Whether updates are limited relative to the weights that they change.
///
/// On in [`VelvetConfig::language_model`](crate::VelvetConfig::language_model), otherwise off. In the book's studies
/// it took most of the harm out of learning rates that were 4 and 8 times too high and out of a missing warm-up, for
/// AdamW and beside orthogonalised momentum. Where the rate was tuned it cost AdamW .012 ± .008 nats over a warm-up,
/// or nothing in place of one (+.007, seeds ± .018), and gained .018 ± .005 beside orthogonalised momentum, where it
/// replaces the warm-up.
///
/// # Examples
/// ```
/// use velvet_optim::{TrustRegion, VelvetConfig};
/// let own = TrustRegion::Relative { max_ratio: 0.02, weight_floor: 1e-3 };
/// let config = VelvetConfig::language_model(8192).with_trust_region(own);
/// assert!(config.validate().is_ok());
/// ```
///
/// # References
/// You et al. 2019 (LAMB), [arXiv:1904.00962](https://arxiv.org/abs/1904.00962) makes the size of every update follow
/// that of the weights; here it is only held below a share of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum TrustRegion {
    /// No limit.
    #[default]
    Off,
    /// The learning rate of a parameter is scaled down where its update would be larger than a share of it:
    ///
    /// ```text
    /// ratio(lr) = lr * rms(update before / its lr) / max(rms(weights), weight_floor)
    /// scale     = min(1, max_ratio / ratio(lr))
    /// ```
    ///
    /// The update is judged by that of the last step in which the parameter had a gradient other than zeros, so one
    /// that is larger than that for its learning rate can pass the limit. The first takes the root mean square of an
    /// update at lr 1 as 1, which is AdamW's; SGD's may be anything. Makes every step measure its update.
    Relative {
        /// The largest ratio, > 0 (0.05).
        max_ratio: f64,
        /// Weights count as at least this large, > 0 (1e-3), so that a parameter that starts at zero can leave it.
        weight_floor: f64,
    },
}

impl TrustRegion {
    /// Updates of about 5 % of a parameter at most.
    pub fn relative() -> Self {
        Self::Relative { max_ratio: 0.05, weight_floor: 1e-3 }
    }

    pub(crate) fn validate(&self) -> Result<()> {
        match *self {
            Self::Off => Ok(()),
            Self::Relative { max_ratio, weight_floor } => {
                positive("trust_region.max_ratio", max_ratio)?;
                positive("trust_region.weight_floor", weight_floor)
            }
        }
    }

    /// The scale for a parameter whose weights have the root mean square `weight`, with updates of root mean square
    /// `update` for each unit of learning rate.
    ///
    /// ```
    /// use velvet_optim::TrustRegion;
    /// let trust = TrustRegion::relative();
    /// assert_eq!(trust.scale(1e-3, 1.0, 0.02), 1.0); // 5 % of 0.02
    /// assert_eq!(trust.scale(8e-3, 1.0, 0.02), 0.125);
    /// ```
    pub fn scale(&self, lr: f64, update: f64, weight: f64) -> f64 {
        match *self {
            Self::Relative { max_ratio, weight_floor } if lr * update > 0.0 => {
                // One product and one division each side, so that the border itself is not scaled.
                (max_ratio * weight.max(weight_floor) / (lr * update)).min(1.0)
            }
            _ => 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_weights_can_move_and_nothing_is_scaled_up() {
        let trust = TrustRegion::relative();
        assert!((trust.scale(1e-3, 1.0, 0.0) - 0.05).abs() < 1e-12);
        assert_eq!(trust.scale(1e-9, 1.0, 1.0), 1.0);
        for (lr, update) in [(0.0, 1.0), (1.0, 0.0), (1.0, f64::NAN)] {
            assert_eq!(trust.scale(lr, update, 1.0), 1.0);
        }
        assert_eq!(TrustRegion::Off.scale(1e9, 1.0, 1e-9), 1.0);
    }
}

//! What the last step did.

use serde::{Deserialize, Serialize};

/// Figures of the last [`step`](candle_nn::Optimizer::step), and counters since the start of training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Stats {
    /// Updates made since the start of training; steps that were skipped or failed do not count.
    pub step: u64,
    /// The global norm of the gradients before clipping, also of a skipped or failed step; `None` before the
    /// first, and where nothing needs it ([`NonFinite::Unchecked`](crate::NonFinite::Unchecked) without clipping).
    pub grad_norm: Option<f64>,
    /// The factor the gradients were scaled by, in (0, 1]; 1 without clipping.
    pub clip_scale: f64,
    /// The learning rate that was applied: the base rate after all adaptive parts; a group's factor and the trust
    /// region act on top of it.
    pub lr: f64,
    /// The beta1 that was applied.
    pub beta1: f64,
    /// How far perplexity-guided momentum has come, in [0, 1]; `None` where it is off or saw no loss.
    pub progress: Option<f64>,
    /// The norm of the last change of all parameters over the norm of the parameters before it; `None` where
    /// updates are not measured ([`UpdateNorms`](crate::UpdateNorms)) or nothing was updated, infinite where all
    /// weights were zero.
    pub update_ratio: Option<f64>,
    /// Steps left out because of NaN or infinity in a gradient
    /// ([`NonFinite::Skip`](crate::NonFinite::Skip)).
    pub skipped: u64,
    /// Observed losses that were NaN or infinite and therefore not taken into the averages.
    pub ignored_losses: u64,
}

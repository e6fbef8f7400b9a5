//! The choices of a [`VelvetConfig`](crate::VelvetConfig) that are not adaptive.

use serde::{Deserialize, Serialize};

/// Whether gradients are scaled down before the update.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum GradClip {
    /// Gradients are used as they are.
    #[default]
    Off,
    /// All gradients are scaled by one factor when their global norm is above the given maximum (> 0):
    ///
    /// ```text
    /// norm  = sqrt(sum over all parameters of sum(g^2))
    /// scale = min(1, max / (norm + 1e-6))
    /// ```
    ///
    /// as `torch.nn.utils.clip_grad_norm_` does. The norm is accumulated in f64 in a fixed order, so it has the
    /// same bits for any number of threads. The scale is applied inside the update: the gradients in the
    /// `GradStore` are not written.
    GlobalNorm(f64),
}

/// Which parameters decay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum WeightDecayOn {
    /// Every parameter, as in PyTorch and candle.
    #[default]
    All,
    /// Parameters of two or more dimensions; norms and biases keep their scale.
    Matrices,
}

/// What a step does about parameters that received no gradient.
///
/// Either way such a parameter, its moments and its own bias correction stay as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum MissingGradients {
    /// Each is reported once by name through the warning hook
    /// ([`Velvet::on_warning`](crate::Velvet::on_warning), standard error unless set), and always listed by
    /// [`Velvet::missing_gradients`](crate::Velvet::missing_gradients).
    #[default]
    Report,
    /// The step is an error that names them all, and nothing is updated.
    Error,
}

/// What a step does about a gradient that holds NaN or infinity.
///
/// With `Error` and `Skip` all gradients are read once before the first parameter is written (4 bytes a
/// parameter beside the update's 28 in f32; the same pass gives the norm), so such a step never touches
/// parameters or moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum NonFinite {
    /// The step is an error that names the parameters. The default: a run that diverged should stop while its
    /// last checkpoint is good.
    #[default]
    Error,
    /// The step is left out and counted in [`Stats::skipped`](crate::Stats::skipped): right for loss scaling,
    /// and for data with rare bad batches.
    Skip,
    /// Gradients are not looked at, as in PyTorch. With clipping off this saves the reading pass and
    /// [`Stats::grad_norm`](crate::Stats::grad_norm) stays `None`.
    Unchecked,
}

/// Which implementation updates parameters on the CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum BackendChoice {
    /// The fastest there is for each parameter's device: the fused pass on the CPU, candle operations elsewhere.
    #[default]
    Auto,
    /// Plain candle operations on every device: the specification that the fused pass is tested against. Slow.
    Plain,
}

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
    /// last checkpoint is good. On a GPU the error comes from a later call: see [`Velvet`](crate::Velvet).
    #[default]
    Error,
    /// The step is left out and counted in [`Stats::skipped`](crate::Stats::skipped): right for loss scaling,
    /// and for data with rare bad batches.
    Skip,
    /// Gradients are not looked at, as in PyTorch. With clipping off this saves the reading pass and
    /// [`Stats::grad_norm`](crate::Stats::grad_norm) stays `None`.
    Unchecked,
}

/// The form of a momentum.
///
/// Averaged by default in AdamW, for which Nesterov's gained .036 ± .022 nats over 180 steps in the book's study,
/// less than two deviations; Nesterov's by default in [`Orthogonal`](crate::Orthogonal), as it is published.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Momentum {
    /// The average of the gradients.
    #[default]
    Averaged,
    /// The average as it will be when this gradient is counted once more: Nesterov's look-ahead.
    Nesterov,
}

/// Whether elements of an AdamW update that point against their gradient are left out.
///
/// Off by default: in the book's study it gained AdamW .036 ± .016 nats over 180 steps and cost .022 ± .012 beside
/// orthogonalised momentum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum CautiousUpdate {
    /// The update is used whole.
    #[default]
    Off,
    /// Elements whose update and gradient differ in sign do not move; the others are scaled up by the share that is
    /// left, at most 1000 times. Rows that [`SparseRows::Skip`] leaves out do not count. Costs one more reading of
    /// gradients and first moments.
    Aligned,
}

/// Where a parameter that decays does so.
///
/// Everywhere by default: in the book's study the cautious form did nothing (AdamW -.005 ± .004 nats, beside
/// orthogonalised momentum .000 ± .007).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DecayMode {
    /// Everywhere.
    #[default]
    Always,
    /// Only where the update and the weight have one sign, so that decay never works against the gradient.
    Cautious,
}

/// How bf16 and f16 parameters take updates that are smaller than their spacing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum HalfParameters {
    /// Rounded to nearest: updates under half a unit in the last place are lost.
    #[default]
    Nearest,
    /// Rounded up or down with the probabilities that make the result right on average; no memory.
    /// Counter-based: the same seed gives the same bits.
    Stochastic {
        /// The seed of the rounding.
        seed: u64,
    },
    /// An f32 copy of each such parameter is kept in the state and updated; the parameter is its rounding.
    ///
    /// The copy is made with the optimizer. Where weights are loaded or changed by hand after that, call
    /// [`Velvet::refresh_masters`](crate::Velvet::refresh_masters), or the next step writes the old ones back.
    Master,
}

/// How state arrays are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum StateFormat {
    /// f32 (f64 for f64 parameters).
    #[default]
    Full,
    /// Blocks of 256 elements of 8 bits with one f32 scale: 1.016 bytes an element in place of 4; the same codes on
    /// the CPU and in CUDA kernels. Parameters with fewer than 4096 elements, f64 parameters, those with
    /// [`SparseRows::Skip`] and those under [`Rule::Orthogonal`](crate::Rule::Orthogonal) keep full precision, and so
    /// do all whose update runs in candle operations ([`BackendChoice`]).
    Blockwise8,
}

/// What happens to rows of a matrix whose gradient is all zero, as those of an embedding whose token was not in the
/// batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SparseRows {
    /// They are updated as others: moments decay, the weight moves by what is left of them and decays.
    #[default]
    Off,
    /// They keep weights and moments, as with `torch.optim.SparseAdam`; bias correction counts every step. Not for
    /// an embedding that is also the head: it has a gradient in every row.
    Skip,
}

/// Whether the size of updates is measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum UpdateNorms {
    /// Only where an adaptive part needs it.
    #[default]
    Off,
    /// Each step, for [`Stats::update_ratio`](crate::Stats::update_ratio) and
    /// [`Velvet::update_ratios`](crate::Velvet::update_ratios).
    On,
}

/// Which implementation updates parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum BackendChoice {
    /// The fastest there is for each parameter's device: the fused pass on the CPU; kernels on CUDA, with that
    /// feature and where all trained parameters are on one device in f32, bf16 or f16; candle operations elsewhere.
    #[default]
    Auto,
    /// Plain candle operations on every device: the specification that the fused pass is tested against. Slow.
    Plain,
}

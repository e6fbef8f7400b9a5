//! One file an activation: its value, its slope, and the composition of candle ops that specifies both.

use candle_core::{Result, Tensor};

use crate::real::Real;

pub(crate) mod gate_entropy;
pub(crate) mod gelu_erf;
pub(crate) mod gelu_softplus;
pub(crate) mod gelu_tanh;
pub(crate) mod relu;
pub(crate) mod silu;

/// A function of one number, with parameters fixed in `self`.
pub(crate) trait Pointwise: Copy + Send + Sync + 'static {
    /// The value at `x`; NaN at NaN.
    fn value<R: Real>(self, x: R) -> R;

    /// The value, bit-equal to [`value`](Self::value), and the derivative at `x`.
    fn value_and_slope<R: Real>(self, x: R) -> (R, R);

    /// The same function as the CUDA kernels name it.
    #[cfg(feature = "cuda")]
    fn kernel(self) -> crate::cuda::Kernel;

    /// The same function of every element in differentiable candle ops, for f32 and f64.
    fn reference(self, x: &Tensor) -> Result<Tensor>;
}

/// A function whose parameters can be trained.
pub(crate) trait Learned: Pointwise {
    /// The derivatives in the parameters at `x`; 0 for the second where there is one alone.
    fn parameter_slopes<R: Real>(self, x: R) -> [R; 2];
}

/// What to do with the function that an enum turned out to name.
pub(crate) trait Visitor {
    type Output;

    fn visit<P: Pointwise>(self, function: P) -> Self::Output;
}

//! SiLU: `x sigmoid(x)`.

use candle_core::{Result, Tensor};

use super::Pointwise;
use crate::real::{Real, gate, hold, sigmoid};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Silu;

impl Pointwise for Silu {
    #[inline(always)]
    fn value<R: Real>(self, x: R) -> R {
        gate(x, sigmoid(x).value)
    }

    #[inline(always)]
    fn value_and_slope<R: Real>(self, x: R) -> (R, R) {
        let s = sigmoid(x);
        (gate(x, s.value), s.value + hold(x) * s.slope)
    }

    #[cfg(feature = "cuda")]
    fn kernel(self) -> crate::cuda::Kernel {
        crate::cuda::Kernel::plain("silu")
    }

    fn reference(self, x: &Tensor) -> Result<Tensor> {
        x * candle_nn::ops::sigmoid(x)?
    }
}

//! ReLU and its square, with slope 0 at 0.

use candle_core::{Result, Tensor};

use super::Pointwise;
use crate::real::Real;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Relu;

impl Pointwise for Relu {
    #[inline(always)]
    fn value<R: Real>(self, x: R) -> R {
        x.at_least(R::ZERO)
    }

    #[inline(always)]
    fn value_and_slope<R: Real>(self, x: R) -> (R, R) {
        (x.at_least(R::ZERO), if x <= R::ZERO { R::ZERO } else { R::ONE })
    }

    #[cfg(feature = "cuda")]
    fn kernel(self) -> crate::cuda::Kernel {
        crate::cuda::Kernel::plain("relu")
    }

    fn reference(self, x: &Tensor) -> Result<Tensor> {
        // (|-x| - (-x)) / 2: candle's `relu` turns NaN into 0 and has the slope 1 at 0.
        let negative = x.neg()?;
        (negative.abs()? * 0.5)? - (negative * 0.5)?
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct ReluSquared;

impl Pointwise for ReluSquared {
    #[inline(always)]
    fn value<R: Real>(self, x: R) -> R {
        let positive = x.at_least(R::ZERO);
        positive * positive
    }

    #[inline(always)]
    fn value_and_slope<R: Real>(self, x: R) -> (R, R) {
        let positive = x.at_least(R::ZERO);
        (positive * positive, R::TWO * positive)
    }

    #[cfg(feature = "cuda")]
    fn kernel(self) -> crate::cuda::Kernel {
        crate::cuda::Kernel::plain("relu_squared")
    }

    fn reference(self, x: &Tensor) -> Result<Tensor> {
        Relu.reference(x)?.sqr()
    }
}

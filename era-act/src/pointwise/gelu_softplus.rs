//! ERA by an additive softplus: `GELU_tanh(x) + gamma softplus(x)`.
//!
//! `softplus(x) = max(x, 0) + ln(1 + exp(-|x|))`: the direct `ln(1 + exp(x))` overflows from 89 on in f32.

use candle_core::{Result, Tensor};

use super::gelu_tanh::GeluTanh;
use super::{Learned, Pointwise};
use crate::real::{Real, sigmoid};

#[derive(Clone, Copy, Debug)]
pub(crate) struct GeluSoftplus {
    pub(crate) gamma: f64,
}

impl Pointwise for GeluSoftplus {
    #[inline(always)]
    fn value<R: Real>(self, x: R) -> R {
        let softplus = x.at_least(R::ZERO) + R::ln_1p_unit(sigmoid(x).exp);
        GeluTanh.value(x) + R::from_f64(self.gamma) * softplus
    }

    #[inline(always)]
    fn value_and_slope<R: Real>(self, x: R) -> (R, R) {
        let gamma = R::from_f64(self.gamma);
        let s = sigmoid(x);
        let softplus = x.at_least(R::ZERO) + R::ln_1p_unit(s.exp);
        let (value, slope) = GeluTanh.value_and_slope(x);
        (value + gamma * softplus, slope + gamma * s.value)
    }

    #[cfg(feature = "cuda")]
    fn kernel(self) -> crate::cuda::Kernel {
        crate::cuda::Kernel::gelu_softplus(self.gamma)
    }

    fn reference(self, x: &Tensor) -> Result<Tensor> {
        GeluTanh.reference(x)? + (softplus(x)? * self.gamma)?
    }
}

/// `ln(1 + exp(x))` in candle ops.
pub(crate) fn softplus(x: &Tensor) -> Result<Tensor> {
    // (x + |x|) / 2 and not relu: the slopes that candle gives |x| at 0 then add up to 1/2.
    let magnitude = x.abs()?;
    let log = (magnitude.neg()?.exp()? + 1.0)?.log()?;
    ((x * 0.5)? + (magnitude * 0.5)?)? + log
}

impl Learned for GeluSoftplus {
    #[inline(always)]
    fn parameter_slopes<R: Real>(self, x: R) -> [R; 2] {
        [x.at_least(R::ZERO) + R::ln_1p_unit(sigmoid(x).exp), R::ZERO]
    }
}

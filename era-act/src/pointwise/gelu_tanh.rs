//! GELU by its tanh approximation: `x (1 + tanh u) / 2 = x sigmoid(2 u)`, `u = sqrt(2 / pi) (x + 0.044715 x^3)`.

use candle_core::{Result, Tensor};

use super::Pointwise;
use crate::real::{Real, gate, hold, sigmoid};

/// `2 sqrt(2 / pi)`
const SCALE: f64 = 1.595_769_121_605_730_7;
const CUBIC: f64 = 0.044_715;

#[derive(Clone, Copy, Debug)]
pub(crate) struct GeluTanh;

impl Pointwise for GeluTanh {
    #[inline(always)]
    fn value<R: Real>(self, x: R) -> R {
        let u = R::from_f64(SCALE) * x * (R::ONE + R::from_f64(CUBIC) * (x * x));
        gate(x, sigmoid(u).value)
    }

    #[inline(always)]
    fn value_and_slope<R: Real>(self, x: R) -> (R, R) {
        let u = R::from_f64(SCALE) * x * (R::ONE + R::from_f64(CUBIC) * (x * x));
        let s = sigmoid(u);
        let held = hold(x);
        let du = R::from_f64(SCALE) * (R::ONE + R::from_f64(3.0 * CUBIC) * (held * held));
        (gate(x, s.value), s.value + held * (s.slope * du))
    }

    #[cfg(feature = "cuda")]
    fn kernel(self) -> crate::cuda::Kernel {
        crate::cuda::Kernel::plain("gelu_tanh")
    }

    fn reference(self, x: &Tensor) -> Result<Tensor> {
        // candle's own `gelu` differentiates with constants of six digits.
        let u = ((x * SCALE)? * ((x.sqr()? * CUBIC)? + 1.0)?)?;
        x * candle_nn::ops::sigmoid(&u)?
    }
}

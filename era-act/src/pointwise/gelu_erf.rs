//! GELU, exact: `x Phi(x)`, `Phi(x) = erfc(-x / sqrt 2) / 2`, with `dy/dx = Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi)`.

use candle_core::{Result, Tensor};

use super::Pointwise;
use crate::real::{Real, gate, hold};

/// `1 / sqrt(2 pi)`
const DENSITY: f64 = 0.398_942_280_401_432_7;

#[derive(Clone, Copy, Debug)]
pub(crate) struct GeluErf;

/// `Phi(x)` and `exp(-x^2 / 2)`.
#[inline(always)]
fn normal<R: Real>(x: R) -> (R, R) {
    let z = x.abs().at_most(R::EXP_CUTOFF) * R::from_f64(std::f64::consts::FRAC_1_SQRT_2);
    let exp = R::exp_neg((z * z).at_most(R::EXP_CUTOFF));
    let centre = R::from_f64(3.75);
    let series = R::scaled_erfc_series((z - centre) / (z + centre));
    let tail = R::HALF * exp * series / (R::ONE + R::TWO * z);
    (if x < R::ZERO { tail } else { R::ONE - tail }, exp)
}

impl Pointwise for GeluErf {
    #[inline(always)]
    fn value<R: Real>(self, x: R) -> R {
        gate(x, normal(x).0)
    }

    #[inline(always)]
    fn value_and_slope<R: Real>(self, x: R) -> (R, R) {
        let (phi, exp) = normal(x);
        (gate(x, phi), phi + hold(x) * exp * R::from_f64(DENSITY))
    }

    #[cfg(feature = "cuda")]
    fn kernel(self) -> crate::cuda::Kernel {
        crate::cuda::Kernel::plain("gelu")
    }

    fn reference(self, x: &Tensor) -> Result<Tensor> {
        // candle's own `gelu_erf` differentiates with a constant of six digits.
        (x * 0.5)? * ((x * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)?
    }
}

//! ERA by the entropy of the gate: `x g (1 + s H(g))`, `g = sigmoid(x / T)`, `H` the binary entropy in nats.
//!
//! `H(sigmoid(z)) = softplus(z) - z sigmoid(z)` subtracts two numbers of the size of `z`. `H` is even, and with
//! `e = exp(-|z|)` it is the sum `ln(1 + e) + |z| e / (1 + e)` of two positive terms, which loses nothing. Since
//! `dH/dz = -z g'(z)`,
//!
//! ```text
//! dy/dx = g (1 + s H) + z g'(z) (1 + s H - s z g)
//! ```

use candle_core::{Result, Tensor};

use super::{Learned, Pointwise};
use crate::real::{Real, gate, hold, sigmoid};

#[derive(Clone, Copy, Debug)]
pub(crate) struct GateEntropy {
    pub(crate) temperature: f64,
    pub(crate) strength: f64,
}

impl Pointwise for GateEntropy {
    #[inline(always)]
    fn value<R: Real>(self, x: R) -> R {
        let s = sigmoid(x / R::from_f64(self.temperature));
        let entropy = R::ln_1p_unit(s.exp) + s.magnitude * s.tail;
        gate(x, s.value) * (R::ONE + R::from_f64(self.strength) * entropy)
    }

    #[inline(always)]
    fn value_and_slope<R: Real>(self, x: R) -> (R, R) {
        let strength = R::from_f64(self.strength);
        let z = x / R::from_f64(self.temperature);
        let s = sigmoid(z);
        let z = hold(z);
        let entropy = R::ln_1p_unit(s.exp) + s.magnitude * s.tail;
        let factor = R::ONE + strength * entropy;
        let slope = s.value * factor + z * s.slope * (factor - strength * (z * s.value));
        (gate(x, s.value) * factor, slope)
    }

    #[cfg(feature = "cuda")]
    fn kernel(self) -> crate::cuda::Kernel {
        crate::cuda::Kernel::gate_entropy(self.temperature, self.strength)
    }

    fn reference(self, x: &Tensor) -> Result<Tensor> {
        let z = (x / self.temperature)?;
        let gate = candle_nn::ops::sigmoid(&z)?;
        let magnitude = z.abs()?;
        let exp = magnitude.neg()?.exp()?;
        let one_plus = (&exp + 1.0)?;
        let entropy = (one_plus.log()? + (magnitude * exp.div(&one_plus)?)?)?;
        (x * gate)? * ((entropy * self.strength)? + 1.0)?
    }
}

/// In the temperature and in the strength. `T` stands in `z = x / T` alone, so `dy/dT = -z^2 d/dz(g (1 + s H))`.
impl Learned for GateEntropy {
    #[inline(always)]
    fn parameter_slopes<R: Real>(self, x: R) -> [R; 2] {
        let strength = R::from_f64(self.strength);
        let z = x / R::from_f64(self.temperature);
        let s = sigmoid(z);
        let z = hold(z);
        let entropy = R::ln_1p_unit(s.exp) + s.magnitude * s.tail;
        let factor = R::ONE + strength * entropy;
        let temperature = -(z * (z * s.slope)) * (factor - strength * (z * s.value));
        [temperature, gate(x, s.value) * entropy]
    }
}

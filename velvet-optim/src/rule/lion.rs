//! Lion: the sign of an interpolated momentum.

use super::elements::{Element, Loop, Run};
use super::real::Real;
use super::{Decay, Elementwise, SlotKind, SlotSpec, StepScalars, decayed_plain};
use crate::config::unit;
use crate::error::Result;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

pub(super) const NAME: &str = "lion";

/// Lion with decoupled weight decay.
///
/// ```text
/// u = sign(beta1 * m + (1 - beta1) * g)        sign(0) = 0
/// p = (1 - lr * weight_decay) * p - lr * u
/// m = beta2 * m + (1 - beta2) * g
/// ```
///
/// Every element moves by lr, so it wants a learning rate some 3 to 10 times below AdamW's, and a weight decay as much
/// above.
///
/// # References
/// Chen et al., Symbolic Discovery of Optimization Algorithms, arXiv 2302.06675.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Lion {
    /// The weight of the momentum in the update, in [0, 1) (default 0.9).
    pub beta1: f64,
    /// The decay of the momentum, in [0, 1) (default 0.99).
    pub beta2: f64,
}

impl Default for Lion {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.99 }
    }
}

impl Lion {
    pub(super) fn validate(&self) -> Result<()> {
        unit("Lion.beta1", self.beta1)?;
        unit("Lion.beta2", self.beta2)
    }
}

pub(super) fn slots(shape: &[usize]) -> Vec<SlotSpec> {
    vec![SlotSpec::new("exp_avg", shape, SlotKind::Signed)]
}

/// The coefficients of one parameter's step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LionStep {
    clip_scale: f64,
    beta1: f64,
    beta2: f64,
    lr: f64,
    keep: f64,
    cautious_decay: bool,
}

impl LionStep {
    pub(super) fn new(options: Lion, s: &StepScalars, decay: Decay) -> Self {
        Self {
            clip_scale: s.clip_scale,
            beta1: options.beta1,
            beta2: options.beta2,
            lr: s.lr,
            keep: 1.0 - s.lr * decay.rate,
            cautious_decay: decay.cautious && decay.rate > 0.0,
        }
    }
}

impl Loop for LionStep {
    #[inline(always)]
    fn run<F: Real, P: Element<F>, G: Element<F>>(&self, p: &mut [P], g: &[G], slots: &mut [&mut [F]]) {
        let [m] = slots else { return }; // see Parameter::check_state
        let c = F::coefficient;
        let (clip_scale, lr, keep) = (c(self.clip_scale), c(self.lr), c(self.keep));
        let (of_m, of_g) = (c(self.beta1), c(1.0 - self.beta1));
        let (decay, weight) = (c(self.beta2), c(1.0 - self.beta2));
        let cautious_keep = if self.cautious_decay { F::ONE } else { keep };
        for ((stored, &g), m) in p.iter_mut().zip(g).zip(m.iter_mut()) {
            let (p, g) = (stored.widen(), g.widen() * clip_scale);
            let u = (*m * of_m + g * of_g).sign();
            let keep = if p * u > F::ZERO { keep } else { cautious_keep };
            *stored = P::round(p * keep - u * lr);
            *m = *m * decay + g * weight;
        }
    }
}

impl Elementwise for LionStep {
    fn update(&self, run: Run<'_, '_>) {
        run.vectorised(self);
    }

    fn update_plain(&self, p: &Tensor, g: &Tensor, slots: &mut [Tensor]) -> candle_core::Result<Tensor> {
        let [m] = slots else { candle_core::bail!("lion needs one slot, got {}", slots.len()) };
        let g = (g * self.clip_scale)?;
        let mixed = ((&*m * self.beta1)? + (&g * (1.0 - self.beta1))?)?;
        // candle's sign is 0 at 0 as well; written out so that it does not depend on a device's kernel.
        let positive = mixed.gt(0.0)?.to_dtype(mixed.dtype())?;
        let u = (positive - mixed.lt(0.0)?.to_dtype(mixed.dtype())?)?;
        // A NaN is neither: it stays one, as in the loop.
        let u = mixed.eq(&mixed)?.where_cond(&u, &mixed)?;
        *m = ((&*m * self.beta2)? + (g * (1.0 - self.beta2))?)?;
        decayed_plain(p, &u, self.keep, self.cautious_decay)? - (u * self.lr)?
    }
}

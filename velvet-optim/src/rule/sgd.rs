//! Stochastic gradient descent with momentum.

use super::elements::{Element, Loop, Run};
use super::real::Real;
use super::{Decay, Elementwise, SlotKind, SlotSpec, StepScalars, decayed_plain};
use crate::config::unit;
use crate::error::Result;
use crate::options::Momentum;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};

pub(super) const NAME: &str = "sgd";

/// Stochastic gradient descent with momentum and decoupled weight decay.
///
/// ```text
/// b = g                          at the first step, then
/// b = momentum * b + g
/// u = b                          Momentum::Averaged
/// u = g + momentum * b           Momentum::Nesterov
/// p = (1 - lr * weight_decay) * p - lr * u
/// ```
///
/// as `torch.optim.SGD` with dampening 0, but for the decay, which PyTorch adds to the gradient.
///
/// ```
/// use velvet_optim::{Rule, Sgd, VelvetConfig};
/// let config = VelvetConfig::default().with_rule(Rule::Sgd(Sgd { momentum: 0.9, ..Default::default() }));
/// config.validate()?;
/// # Ok::<(), velvet_optim::Error>(())
/// ```
///
/// # References
/// Sutskever et al., On the importance of initialization and momentum in deep learning (2013).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sgd {
    /// The weight of the past, in [0, 1) (default 0.9).
    pub momentum: f64,
    /// Which form of it (default: the plain one).
    pub form: Momentum,
}

impl Default for Sgd {
    fn default() -> Self {
        Self { momentum: 0.9, form: Momentum::Averaged }
    }
}

impl Sgd {
    pub(super) fn validate(&self) -> Result<()> {
        unit("Sgd.momentum", self.momentum)
    }
}

pub(super) fn slots(shape: &[usize]) -> Vec<SlotSpec> {
    vec![SlotSpec::new("momentum_buffer", shape, SlotKind::Signed)]
}

/// The coefficients of one parameter's step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SgdStep {
    clip_scale: f64,
    momentum: f64,
    /// Weights of the buffer and of the gradient in the update.
    weights: [f64; 2],
    lr: f64,
    keep: f64,
    cautious_decay: bool,
}

impl SgdStep {
    pub(super) fn new(options: Sgd, s: &StepScalars, decay: Decay, _products: [f64; 2]) -> Self {
        Self {
            clip_scale: s.clip_scale,
            momentum: options.momentum,
            weights: match options.form {
                Momentum::Averaged => [1.0, 0.0],
                Momentum::Nesterov => [options.momentum, 1.0],
            },
            lr: s.lr,
            keep: 1.0 - s.lr * decay.rate,
            cautious_decay: decay.cautious && decay.rate > 0.0,
        }
    }
}

impl Loop for SgdStep {
    #[inline(always)]
    fn run<F: Real, P: Element<F>, G: Element<F>>(&self, p: &mut [P], g: &[G], slots: &mut [&mut [F]]) {
        let [b] = slots else { return }; // see Parameter::check_state
        let c = F::coefficient;
        let (clip_scale, momentum, lr, keep) =
            (c(self.clip_scale), c(self.momentum), c(self.lr), c(self.keep));
        let [of_b, of_g] = self.weights.map(c);
        let cautious_keep = if self.cautious_decay { F::ONE } else { keep };
        for ((stored, &g), b) in p.iter_mut().zip(g).zip(b.iter_mut()) {
            let (p, g) = (stored.widen(), g.widen() * clip_scale);
            *b = *b * momentum + g;
            let u = *b * of_b + g * of_g;
            let keep = if p * u > F::ZERO { keep } else { cautious_keep };
            *stored = P::round(p * keep - u * lr);
        }
    }
}

impl Elementwise for SgdStep {
    fn update(&self, run: Run<'_, '_>) {
        run.vectorised(self);
    }

    fn update_plain(&self, p: &Tensor, g: &Tensor, slots: &mut [Tensor]) -> candle_core::Result<Tensor> {
        let [b] = slots else { candle_core::bail!("sgd needs one slot, got {}", slots.len()) };
        let g = (g * self.clip_scale)?;
        *b = ((&*b * self.momentum)? + &g)?;
        let [of_b, of_g] = self.weights;
        let u = ((&*b * of_b)? + (g * of_g)?)?;
        decayed_plain(p, &u, self.keep, self.cautious_decay)? - (u * self.lr)?
    }
}

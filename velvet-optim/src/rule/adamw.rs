//! Adam with decoupled weight decay.
//!
//! ```text
//! g = clip_scale * g
//! m = m + (1 - beta1) * (g - m)
//! v = beta2 * v + (1 - beta2) * g^2
//! p = (1 - lr * weight_decay) * p - lr / (1 - prod beta1) * m / (sqrt(v) / sqrt(1 - prod beta2) + eps)
//! ```
//!
//! The products run over the betas that were applied to this parameter, which is the exact correction when beta1
//! changes from step to step: the weights in m then sum to 1 - prod beta1.
//!
//! References: Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv 1711.05101.

use super::{Real, Rule};
use candle_core::{Result, Tensor};

/// The coefficients of one parameter's step, in f64.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamW {
    clip_scale: f64,
    first_weight: f64,
    beta2: f64,
    second_weight: f64,
    decay: f64,
    step_size: f64,
    second_correction: f64,
    eps: f64,
}

/// The scalars of a step that are the same for all parameters.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepScalars {
    pub(crate) clip_scale: f64,
    pub(crate) lr: f64,
    pub(crate) beta1: f64,
    pub(crate) beta2: f64,
    pub(crate) eps: f64,
}

impl AdamW {
    /// The rule's name in a state file.
    pub(crate) const NAME: &'static str = "adamw";

    /// The names of its slots, as PyTorch calls them.
    pub(crate) const SLOTS: &'static [&'static str] = &["exp_avg", "exp_avg_sq"];

    /// `beta_products` include this step's betas.
    pub(crate) fn new(s: StepScalars, weight_decay: f64, beta_products: [f64; 2]) -> Self {
        Self {
            clip_scale: s.clip_scale,
            first_weight: 1.0 - s.beta1,
            beta2: s.beta2,
            second_weight: 1.0 - s.beta2,
            decay: 1.0 - s.lr * weight_decay,
            step_size: s.lr / (1.0 - beta_products[0]),
            second_correction: 1.0 / (1.0 - beta_products[1]).sqrt(),
            eps: s.eps,
        }
    }

    /// Only additions, multiplications, divisions and roots, none contracted: IEEE fixes every bit of the result,
    /// whatever the width of the vectors the compiler makes of this loop.
    #[inline(always)]
    fn update<F: Real>(&self, p: &mut [F], g: &[F], slots: &mut [&mut [F]]) {
        let [m, v] = slots else { return };
        let c = F::coefficient;
        let (clip_scale, first_weight) = (c(self.clip_scale), c(self.first_weight));
        let (beta2, second_weight) = (c(self.beta2), c(self.second_weight));
        let (decay, step_size) = (c(self.decay), c(self.step_size));
        let (correction, eps) = (c(self.second_correction), c(self.eps));
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m.iter_mut()).zip(v.iter_mut()) {
            let g = g * clip_scale;
            *m = *m + (g - *m) * first_weight;
            *v = *v * beta2 + g * second_weight * g;
            let denominator = (*v).sqrt() * correction + eps;
            *p = *p * decay - *m / denominator * step_size;
        }
    }
}

/// A run of elements, to be updated with whatever vectors the processor has.
struct Run<'a, 'b, F> {
    rule: &'a AdamW,
    p: &'a mut [F],
    g: &'a [F],
    slots: &'a mut [&'b mut [F]],
}

// Not a closure: the compiler may leave a closure's call out of line, and with it out of the vector code.
impl<F: Real> pulp::WithSimd for Run<'_, '_, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, _: S) {
        self.rule.update(self.p, self.g, self.slots);
    }
}

impl Rule for AdamW {
    fn update_f32(&self, p: &mut [f32], g: &[f32], slots: &mut [&mut [f32]]) {
        pulp::Arch::new().dispatch(Run { rule: self, p, g, slots });
    }

    fn update_f64(&self, p: &mut [f64], g: &[f64], slots: &mut [&mut [f64]]) {
        pulp::Arch::new().dispatch(Run { rule: self, p, g, slots });
    }

    fn update_plain(&self, p: &Tensor, g: &Tensor, slots: &mut [Tensor]) -> Result<Tensor> {
        let [m, v] = slots else { candle_core::bail!("adamw needs two slots, got {}", slots.len()) };
        let g = (g * self.clip_scale)?;
        *m = (&*m + ((&g - &*m)? * self.first_weight)?)?;
        *v = ((&*v * self.beta2)? + ((&g * self.second_weight)? * &g)?)?;
        let denominator = v.sqrt()?.affine(self.second_correction, self.eps)?;
        (p * self.decay)? - ((&*m / denominator)? * self.step_size)?
    }
}

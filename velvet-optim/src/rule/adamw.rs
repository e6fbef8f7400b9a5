//! Adam with decoupled weight decay.
//!
//! ```text
//! g = clip_scale * g
//! m = m + (1 - beta1) * (g - m)
//! v = beta2 * v + (1 - beta2) * g^2
//! n = m / (1 - prod beta1)                                                          Momentum::Averaged
//! n = beta1 * m / (1 - beta1 * prod beta1) + (1 - beta1) * g / (1 - prod beta1)     Momentum::Nesterov
//! u = n / (sqrt(v) / sqrt(1 - prod beta2) + eps)
//! u = u * [n g > 0] / max(mean [n g > 0], .001)                                     CautiousUpdate::Aligned
//! p = (1 - lr * weight_decay) * p - lr * u
//! ```
//!
//! The products run over the betas that were applied to this parameter, this step's included, which is the exact
//! correction when beta1 changes from step to step: the weights in m then sum to 1 - prod beta1.
//!
//! References: Kingma and Ba, arXiv 1412.6980; Loshchilov and Hutter, arXiv 1711.05101; Dozat, Incorporating Nesterov
//! Momentum into Adam (2016); Liang et al., Cautious Optimizers, arXiv 2411.16085.

use super::elements::{Element, Loop, Run};
use super::real::Real;
use super::{Decay, Elementwise, SlotKind, SlotSpec, StepScalars, decayed_plain};
use candle_core::{Result, Tensor};

pub(super) const NAME: &str = "adamw";

/// The names are PyTorch's.
pub(super) fn slots(shape: &[usize]) -> Vec<SlotSpec> {
    vec![
        SlotSpec::new("exp_avg", shape, SlotKind::Signed),
        SlotSpec::new("exp_avg_sq", shape, SlotKind::Unsigned),
    ]
}

/// The coefficients of one parameter's step, in f64.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Adam {
    clip_scale: f64,
    first_weight: f64,
    beta2: f64,
    second_weight: f64,
    keep: f64,
    step_size: f64,
    second_correction: f64,
    eps: f64,
    /// Weights of m and g in the numerator, relative to the step size; `None` without Nesterov.
    nesterov: Option<[f64; 2]>,
    pub(super) cautious: bool,
    cautious_decay: bool,
    /// What the aligned elements of a cautious update are scaled by.
    aligned_scale: f64,
}

impl Adam {
    pub(super) fn new(s: &StepScalars, decay: Decay, products: [f64; 2]) -> Self {
        let first_correction = 1.0 - products[0];
        let nesterov = [
            s.beta1 * first_correction / (1.0 - products[0] * s.beta1),
            1.0 - s.beta1, // both times step_size, which has the correction
        ];
        Self {
            clip_scale: s.clip_scale,
            first_weight: 1.0 - s.beta1,
            beta2: s.beta2,
            second_weight: 1.0 - s.beta2,
            keep: 1.0 - s.lr * decay.rate,
            step_size: s.lr / first_correction,
            second_correction: 1.0 / (1.0 - products[1]).sqrt(),
            eps: s.eps,
            nesterov: s.options.nesterov.then_some(nesterov),
            cautious: s.options.cautious,
            cautious_decay: decay.cautious && decay.rate > 0.0,
            aligned_scale: 1.0,
        }
    }

    /// Of the elements that move; where there are none, the scale is of nothing.
    pub(super) fn set_alignment(&mut self, aligned: f64, moving: f64) {
        self.aligned_scale = if moving > 0.0 { moving / aligned.max(1e-3 * moving) } else { 1.0 };
    }

    /// The numerator's weights of the momentum after this step and of the scaled gradient.
    fn weights(&self) -> [f64; 2] {
        self.nesterov.unwrap_or([1.0, 0.0])
    }

    fn aligned<F: Real>(&self, g: &[F], slots: &[&[F]]) -> u64 {
        let [m, _] = slots else { return 0 };
        let (clip_scale, first_weight) = (F::coefficient(self.clip_scale), F::coefficient(self.first_weight));
        let [of_m, of_g] = self.weights().map(F::coefficient);
        g.iter()
            .zip(*m)
            .map(|(&g, &m)| {
                let g = g * clip_scale;
                let n = (m + (g - m) * first_weight) * of_m + g * of_g;
                u64::from(n * g > F::ZERO)
            })
            .sum()
    }

    /// One loop for each set of choices, so that a choice costs nothing where it is off.
    #[inline(always)]
    fn update<F: Real, P: Element<F>, G: Element<F>, const NESTEROV: bool, const CAUTIOUS: bool>(
        &self,
        p: &mut [P],
        g: &[G],
        slots: &mut [&mut [F]],
    ) {
        let [m, v] = slots else { return }; // see Parameter::check_state
        let c = F::coefficient;
        let (clip_scale, first_weight) = (c(self.clip_scale), c(self.first_weight));
        let (beta2, second_weight) = (c(self.beta2), c(self.second_weight));
        let (keep, step_size) = (c(self.keep), c(self.step_size));
        let (correction, eps) = (c(self.second_correction), c(self.eps));
        let [of_m, of_g] = self.weights().map(c);
        let aligned = if self.cautious { c(self.aligned_scale) } else { F::ONE };
        let misaligned = if self.cautious { F::ZERO } else { F::ONE };
        let cautious_keep = if self.cautious_decay { F::ONE } else { keep };
        for (((stored, &g), m), v) in p.iter_mut().zip(g).zip(m.iter_mut()).zip(v.iter_mut()) {
            let (p, g) = (stored.widen(), g.widen() * clip_scale);
            *m = *m + (g - *m) * first_weight;
            *v = *v * beta2 + g * second_weight * g;
            let denominator = (*v).sqrt() * correction + eps;
            let n = if NESTEROV { *m * of_m + g * of_g } else { *m };
            let u = n / denominator;
            if CAUTIOUS {
                let u = u * if n * g > F::ZERO { aligned } else { misaligned };
                let keep = if p * u > F::ZERO { keep } else { cautious_keep };
                *stored = P::round(p * keep - u * step_size);
            } else {
                *stored = P::round(p * keep - u * step_size);
            }
        }
    }
}

impl Loop for Adam {
    #[inline(always)]
    fn run<F: Real, P: Element<F>, G: Element<F>>(&self, p: &mut [P], g: &[G], slots: &mut [&mut [F]]) {
        match (self.nesterov.is_some(), self.cautious || self.cautious_decay) {
            (false, false) => self.update::<F, P, G, false, false>(p, g, slots),
            (true, false) => self.update::<F, P, G, true, false>(p, g, slots),
            (false, true) => self.update::<F, P, G, false, true>(p, g, slots),
            (true, true) => self.update::<F, P, G, true, true>(p, g, slots),
        }
    }
}

impl Elementwise for Adam {
    fn update(&self, run: Run<'_, '_>) {
        run.vectorised(self);
    }

    fn update_plain(&self, p: &Tensor, g: &Tensor, slots: &mut [Tensor]) -> Result<Tensor> {
        let [m, v] = slots else { candle_core::bail!("adamw needs two slots, got {}", slots.len()) };
        let g = (g * self.clip_scale)?;
        *m = (&*m + ((&g - &*m)? * self.first_weight)?)?;
        *v = ((&*v * self.beta2)? + ((&g * self.second_weight)? * &g)?)?;
        let denominator = v.sqrt()?.affine(self.second_correction, self.eps)?;
        let n = match self.nesterov {
            Some([of_m, of_g]) => ((&*m * of_m)? + (&g * of_g)?)?,
            None => m.clone(),
        };
        let mut u = (&n / denominator)?;
        if self.cautious {
            let aligned = (&n * &g)?.gt(0.0)?.to_dtype(u.dtype())?;
            u = (u * (aligned * self.aligned_scale)?)?;
        }
        decayed_plain(p, &u, self.keep, self.cautious_decay)? - (u * self.step_size)?
    }

    fn aligned_f32(&self, g: &[f32], slots: &[&[f32]]) -> u64 {
        self.aligned(g, slots)
    }

    fn aligned_f64(&self, g: &[f64], slots: &[&[f64]]) -> u64 {
        self.aligned(g, slots)
    }

    fn aligned_plain(&self, g: &Tensor, slots: &[Tensor]) -> Result<u64> {
        let [m, _] = slots else { candle_core::bail!("adamw needs two slots, got {}", slots.len()) };
        let g = (g * self.clip_scale)?;
        let m = (m + ((&g - m)? * self.first_weight)?)?;
        let [of_m, of_g] = self.weights();
        let n = ((m * of_m)? + (&g * of_g)?)?;
        let aligned = (n * g)?.gt(0.0)?.to_dtype(candle_core::DType::U32)?;
        Ok(u64::from(aligned.flatten_all()?.sum_all()?.to_scalar::<u32>()?))
    }
}

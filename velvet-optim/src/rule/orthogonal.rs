//! Orthogonalised momentum for matrices.

use super::{Decay, SlotKind, SlotSpec, StepScalars, decayed_plain, newton_schulz};
use crate::config::{positive, unit};
use crate::error::{Error, Result};
use crate::options::Momentum;
use candle_core::{D, DType, Tensor};
use serde::{Deserialize, Serialize};

pub(super) const NAME: &str = "orthogonal";

/// Added to the root of a row's second moment.
const ROW_EPS: f64 = 1e-8;

/// Orthogonalised momentum (Muon) for matrices, with AdamW's learning rate and decay.
///
/// ```text
/// p: (rows, cols); more dimensions are taken as (first, all others)
/// g = clip_scale * g
/// m = momentum * m + (1 - momentum) * g
/// u = (1 - momentum) * g + momentum * m                        Momentum::Nesterov
/// u = m                                                        Momentum::Averaged
/// o = newton_schulz(u, coefficients, steps)                    singular values near 1
/// o = scale * sqrt(max(rows, cols)) * o                        RowMoment::Off
/// p = (1 - lr * weight_decay) * p - lr * o
/// ```
///
/// The factor gives the update the root mean square of AdamW's updates (about 0.2), so that a learning rate and a decay
/// tuned for AdamW carry over. Under [`PerplexityMomentum`](crate::PerplexityMomentum) the momentum moves from
/// `early_momentum` to `momentum` with the model's progress.
///
/// On the CPU the products are candle's: the same bits for any number of threads, but not on any processor.
///
/// Not for embeddings, heads, norms and biases: see
/// [`VelvetConfig::hidden_matrices`](crate::VelvetConfig::hidden_matrices).
///
/// ```
/// use velvet_optim::{Orthogonal, Rule, VelvetConfig};
/// let config = VelvetConfig::default().with_hidden_matrices(Rule::Orthogonal(Orthogonal::default()));
/// config.validate()?;
/// # Ok::<(), velvet_optim::Error>(())
/// ```
///
/// # References
/// Jordan et al., Muon (2024); Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982 (the factor); Li et al.,
/// NorMuon, arXiv 2510.05491 (the second moment of rows).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Orthogonal {
    /// The weight of the past, in [0, 1) (default 0.95).
    pub momentum: f64,
    /// The momentum before the model has made progress, in [0, 1) (default 0.85); counts only where
    /// [`PerplexityMomentum`](crate::PerplexityMomentum) is on.
    pub early_momentum: f64,
    /// The form of the momentum (default: Nesterov's).
    pub form: Momentum,
    /// Coefficients of the iteration (default 3.4445, -4.7750, 2.0315).
    pub coefficients: [f64; 3],
    /// Iterations, 1 to 32 (default 5).
    pub steps: usize,
    /// The update's size, > 0 (default 0.2).
    pub scale: f64,
    /// Whether rows are brought to one size (default: yes).
    pub row_moment: RowMoment,
}

/// Whether the rows of an orthogonalised update are brought to one size by a running average.
///
/// ```text
/// r = decay * r + (1 - decay) * mean over columns of o^2       r: (rows, 1)
/// o = o / (sqrt(r / (1 - decay^t)) + 1e-8)
/// o = scale * sqrt(rows * cols) * o / |o|_F
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum RowMoment {
    /// Rows stay as the orthogonalisation leaves them.
    Off,
    /// Each row is divided by the root of an average of its squares (NorMuon).
    Average {
        /// The weight of the past, in [0, 1) (0.95).
        decay: f64,
    },
}

impl Default for Orthogonal {
    fn default() -> Self {
        Self {
            momentum: 0.95,
            early_momentum: 0.85,
            form: Momentum::Nesterov,
            coefficients: [3.4445, -4.7750, 2.0315],
            steps: 5,
            scale: 0.2,
            row_moment: RowMoment::Average { decay: 0.95 },
        }
    }
}

impl Orthogonal {
    pub(super) fn validate(&self) -> Result<()> {
        unit("Orthogonal.momentum", self.momentum)?;
        unit("Orthogonal.early_momentum", self.early_momentum)?;
        positive("Orthogonal.scale", self.scale)?;
        if let Some(&got) = self.coefficients.iter().find(|c| !c.is_finite()) {
            return Err(Error::Config {
                field: "Orthogonal.coefficients".into(),
                expected: "finite numbers",
                got,
            });
        }
        if !(1..=32).contains(&self.steps) {
            let got = self.steps as f64;
            return Err(Error::Config { field: "Orthogonal.steps".into(), expected: "1 to 32", got });
        }
        unit("Orthogonal.row_moment.decay", self.row_decay())
    }

    pub(super) fn slots(&self, shape: &[usize]) -> Vec<SlotSpec> {
        let mut slots = vec![SlotSpec::new("momentum_buffer", shape, SlotKind::Signed)];
        if self.row_moment != RowMoment::Off {
            let rows = [shape.first().copied().unwrap_or(1), 1];
            slots.push(SlotSpec::new("row_sq", &rows, SlotKind::Other));
        }
        slots
    }

    pub(super) fn momentum(&self, s: &StepScalars) -> f64 {
        match s.progress {
            Some(progress) => self.early_momentum + (self.momentum - self.early_momentum) * progress,
            None => self.momentum,
        }
    }

    pub(super) fn row_decay(&self) -> f64 {
        match self.row_moment {
            RowMoment::Off => 0.0,
            RowMoment::Average { decay } => decay,
        }
    }
}

/// The coefficients of one matrix's step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OrthogonalStep {
    pub(crate) options: Orthogonal,
    pub(crate) clip_scale: f64,
    pub(crate) momentum: f64,
    pub(crate) lr: f64,
    pub(crate) keep: f64,
    pub(crate) cautious_decay: bool,
    /// `1 / (1 - decay^t)` of the rows' second moment.
    pub(crate) row_correction: f64,
}

impl OrthogonalStep {
    pub(super) fn new(options: Orthogonal, s: &StepScalars, decay: Decay, products: [f64; 2]) -> Self {
        Self {
            options,
            clip_scale: s.clip_scale,
            momentum: options.momentum(s),
            lr: s.lr,
            keep: 1.0 - s.lr * decay.rate,
            cautious_decay: decay.cautious && decay.rate > 0.0,
            row_correction: 1.0 / (1.0 - products[1]),
        }
    }

    /// Takes the gradient (rows, cols) into the momentum and returns what is to be orthogonalised.
    pub(crate) fn direction(&self, g: &Tensor, momentum: &mut Tensor) -> candle_core::Result<Tensor> {
        let g = (g * self.clip_scale)?;
        *momentum = (&*momentum + ((&g - &*momentum)? * (1.0 - self.momentum))?)?;
        match self.options.form {
            Momentum::Nesterov => &g + ((&*momentum - &g)? * self.momentum)?,
            Momentum::Averaged => Ok(momentum.clone()),
        }
    }

    /// Orthogonalises a matrix or a batch of them, with the products in `compute`.
    pub(crate) fn orthogonalise(&self, u: &Tensor, compute: DType) -> candle_core::Result<Tensor> {
        newton_schulz(&u.to_dtype(compute)?, self.options.coefficients, self.options.steps)?
            .to_dtype(u.dtype())
    }

    /// The parameter (rows, cols) after the update by the orthogonalised matrix `o`.
    pub(crate) fn apply(&self, p: &Tensor, o: &Tensor, slots: &mut [Tensor]) -> candle_core::Result<Tensor> {
        let (rows, cols) = p.dims2()?;
        let o = match (self.options.row_moment, slots) {
            (RowMoment::Average { decay }, [row_sq]) => {
                let mean = (o.sqr()?.sum_keepdim(D::Minus1)? / cols as f64)?; // (rows, 1)
                *row_sq = ((&*row_sq * decay)? + (mean * (1.0 - decay))?)?;
                let root = (&*row_sq * self.row_correction)?.sqrt()?;
                let o = o.broadcast_div(&(root + ROW_EPS)?)?;
                let norm = o.sqr()?.sum_all()?.sqrt()?;
                let size = self.options.scale * ((rows * cols) as f64).sqrt();
                o.broadcast_div(&(norm + ROW_EPS)?)?.affine(size, 0.0)?
            }
            _ => (o * (self.options.scale * (rows.max(cols) as f64).sqrt()))?,
        };
        decayed_plain(p, &o, self.keep, self.cautious_decay)? - (o * self.lr)?
    }
}

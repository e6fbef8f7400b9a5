//! The output layer and the cross-entropy in one operation that never holds all the logits.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::matrix::{Into, Matrix, Threads, product};
use super::real::{self, Real};
use super::{Backend, Path};

/// At most this many logits are in memory at once (16 MiB in f32), but at least 64 rows.
const LOGITS: usize = 4 << 20;

/// Settings of [`linear_cross_entropy`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CrossEntropy {
    /// Rows with this target count neither in the loss nor in the gradient. Default `u32::MAX`.
    pub ignore_index: u32,
}

impl Default for CrossEntropy {
    fn default() -> Self {
        Self { ignore_index: u32::MAX }
    }
}

/// What [`linear_cross_entropy`] returns.
#[derive(Debug, Clone)]
pub struct LossAndEntropy {
    /// Mean of `-ln p(target)` over the rows that count, a scalar in nats, f32 (f64 for f64). 0 where no row counts.
    pub loss: Tensor,
    /// Mean entropy of the predicted distributions over the same rows, a scalar in nats, without a gradient.
    pub entropy: Tensor,
}

/// Mean cross-entropy of a linear output layer.
///
/// ```text
/// hidden: (n, d)    weight: (vocab, d)    targets: (n), u32
/// z = hidden weight^T    p = softmax(z)
/// loss = mean of -ln p[target]    entropy = mean of -sum p ln p
/// dz = (p - onehot(target)) / rows    dhidden = dz weight    dweight = dz^T hidden
/// ```
///
/// The fused path works through the rows in blocks and keeps at most about 4 million logits (268 million on CUDA) at
/// once; it computes both gradients in the forward pass, while the logits are at hand, and saves only them:
/// `n d + vocab d` numbers instead of three times `n vocab`. Gradients are not computed for inputs that are not
/// tracked. Accumulates in f32 for f32, bf16 and f16, in f64 for f64; on CUDA the logits are in the dtype.
///
/// # Errors
/// Shapes that do not fit, two dtypes, or a target outside the vocabulary that is not `ignore_index`. On CUDA such a
/// target makes the loss NaN instead, because the host would have to wait for the answer.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use vesper_model::ops::{CrossEntropy, Path, linear_cross_entropy};
/// let hidden = Tensor::zeros((2, 4), DType::F32, &Device::Cpu)?;
/// let weight = Tensor::ones((10, 4), DType::F32, &Device::Cpu)?;
/// let targets = Tensor::new(&[3u32, 7], &Device::Cpu)?;
/// let out = linear_cross_entropy(&hidden, &weight, &targets, CrossEntropy::default(), Path::Fused)?;
/// assert!((out.loss.to_scalar::<f32>()? - 10f32.ln()).abs() < 1e-6);
/// assert!((out.entropy.to_scalar::<f32>()? - 10f32.ln()).abs() < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn linear_cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    settings: CrossEntropy,
    path: Path,
) -> Result<LossAndEntropy> {
    let ((n, d), (_, width), rows) = (hidden.dims2()?, weight.dims2()?, targets.dims1()?);
    if d != width || n != rows {
        bail!(
            "linear_cross_entropy: hidden {:?}, weight {:?} and targets {:?} do not fit together",
            hidden.shape(),
            weight.shape(),
            targets.shape()
        );
    }
    if hidden.dtype() != weight.dtype() {
        bail!("linear_cross_entropy: hidden is {:?} and the weight {:?}", hidden.dtype(), weight.dtype());
    }
    match path.backend(hidden) {
        Backend::Cpu => {}
        #[cfg(feature = "cuda")]
        Backend::Cuda => {
            return super::cuda::cross_entropy::linear_cross_entropy(hidden, weight, targets, settings);
        }
        Backend::Reference => return reference(hidden, weight, targets, settings),
    }
    let shared = Arc::new(Mutex::new(Saved::default()));
    let op = LinearCrossEntropy {
        settings,
        hidden_tracked: hidden.track_op(),
        weight_tracked: weight.track_op(),
        saved: Arc::clone(&shared),
    };
    let loss = hidden.contiguous()?.apply_op3(&weight.contiguous()?, &targets.contiguous()?, op)?;
    let entropy = shared.lock().unwrap_or_else(PoisonError::into_inner).entropy;
    let entropy = Tensor::new(entropy, hidden.device())?.to_dtype(loss.dtype())?;
    Ok(LossAndEntropy { loss, entropy })
}

fn reference(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    settings: CrossEntropy,
) -> Result<LossAndEntropy> {
    let dtype = if hidden.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let device = hidden.device();
    let (vocab, _) = weight.dims2()?;
    // Rows to ignore read class 0 and are multiplied by 0.
    let ignored = targets.to_dtype(DType::U32)?.eq(settings.ignore_index)?;
    let keep = (1.0 - ignored.to_dtype(dtype)?)?;
    let zeros = Tensor::zeros(targets.dims(), DType::U32, device)?;
    let targets = ignored.where_cond(&zeros, &targets.to_dtype(DType::U32)?)?;
    let count = keep.sum_all()?.maximum(&Tensor::ones((), dtype, device)?)?;
    if vocab == 0 || keep.elem_count() == 0 {
        let zero = (hidden.sum_all()?.to_dtype(dtype)? * 0.0)?;
        return Ok(LossAndEntropy { entropy: zero.detach(), loss: zero });
    }
    let logits = hidden.matmul(&weight.t()?)?.to_dtype(dtype)?;
    let top = logits.max_keepdim(D::Minus1)?.detach();
    let shifted = logits.broadcast_sub(&top)?;
    let log_p = shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)?;
    let picked = log_p.gather(&targets.unsqueeze(1)?, 1)?.squeeze(1)?;
    let loss = ((picked * &keep)?.sum_all()?.neg()? / &count)?;
    let log_p = log_p.detach();
    let entropy = (log_p.exp()? * log_p)?.sum(D::Minus1)?.neg()?;
    let entropy = ((entropy * keep)?.sum_all()? / count)?;
    Ok(LossAndEntropy { loss, entropy })
}

/// What the forward pass leaves for the caller and for the backward pass.
#[derive(Default)]
struct Saved {
    entropy: f64,
    dhidden: Option<Tensor>,
    dweight: Option<Tensor>,
}

struct LinearCrossEntropy {
    settings: CrossEntropy,
    hidden_tracked: bool,
    weight_tracked: bool,
    saved: Arc<Mutex<Saved>>,
}

struct Gradients<T> {
    loss: f64,
    entropy: f64,
    dhidden: Vec<T>,
    dweight: Vec<T>,
}

impl LinearCrossEntropy {
    fn run<T: Real>(
        &self,
        hidden: &[T],
        weight: &[T],
        targets: &[usize],
        (vocab, d): (usize, usize),
    ) -> Result<Gradients<T>> {
        let ignore = self.settings.ignore_index as usize;
        if let Some((row, target)) = targets.iter().enumerate().find(|&(_, &v)| v >= vocab && v != ignore) {
            bail!("target {target} of row {row} is outside a vocabulary of {vocab}");
        }
        let counted = targets.iter().filter(|&&v| v != ignore).count();
        let scale = T::of(1.0 / counted.max(1) as f64);
        let mut out = Gradients {
            loss: 0.0,
            entropy: 0.0,
            dhidden: vec![T::ZERO; if self.hidden_tracked { hidden.len() } else { 0 }],
            dweight: vec![T::ZERO; if self.weight_tracked { weight.len() } else { 0 }],
        };
        if counted == 0 || d == 0 {
            return Ok(out);
        }
        let weight = Matrix::new(weight, vocab, d, d)?;
        let block = (LOGITS / vocab).max(64).min(targets.len());
        let mut logits = vec![T::ZERO; block * vocab];
        for (b, targets) in targets.chunks(block).enumerate() {
            let rows = targets.len();
            let z = &mut logits[..rows * vocab];
            let h = Matrix::new(&hidden[b * block * d..], rows, d, d)?;
            product(z, vocab, Into::Overwrite, h, weight.t(), Threads::All)?;
            let sums: Vec<(f64, f64)> = z
                .par_chunks_exact_mut(vocab)
                .zip(targets)
                .map(|(z, &target)| {
                    if target == ignore {
                        z.fill(T::ZERO);
                        return (0.0, 0.0);
                    }
                    real::simd(
                        #[inline(always)]
                        || softmax_row(z, target, scale),
                    )
                })
                .collect();
            for (loss, entropy) in sums {
                out.loss += loss;
                out.entropy += entropy;
            }
            let dz = Matrix::new(z, rows, vocab, vocab)?;
            if self.hidden_tracked {
                let dh = &mut out.dhidden[b * block * d..][..rows * d];
                product(dh, d, Into::Overwrite, dz, weight, Threads::All)?;
            }
            if self.weight_tracked {
                product(&mut out.dweight, d, Into::Add, dz.t(), h, Threads::All)?;
            }
        }
        out.loss /= counted as f64;
        out.entropy /= counted as f64;
        Ok(out)
    }

    fn forward<T: Real>(
        &self,
        (hidden, lh): (&CpuStorage, &Layout),
        (weight, lw): (&CpuStorage, &Layout),
        targets: &[usize],
        dtype: DType,
    ) -> Result<(CpuStorage, Shape)> {
        let (vocab, d) = lw.shape().dims2()?;
        let out = self.run::<T>(&T::read(hidden, lh)?, &T::read(weight, lw)?, targets, (vocab, d))?;
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        *saved = Saved {
            entropy: out.entropy,
            dhidden: self.hidden_tracked.then(|| real::tensor(out.dhidden, lh.shape(), dtype)).transpose()?,
            dweight: self.weight_tracked.then(|| real::tensor(out.dweight, lw.shape(), dtype)).transpose()?,
        };
        let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        Ok((T::store(vec![T::of(out.loss)], wide)?, Shape::from(())))
    }
}

/// Replaces a row of logits by its gradient; returns the row's loss and the entropy of its softmax.
#[inline(always)]
fn softmax_row<T: Real>(z: &mut [T], target: usize, scale: T) -> (f64, f64) {
    let top = real::max(z);
    let at_target = z[target] - top;
    let mut weighted = [T::ZERO; 16];
    let chunks = z.len() / 16 * 16;
    let (body, rest) = z.split_at_mut(chunks);
    let mut sums = [T::ZERO; 16];
    for chunk in body.chunks_exact_mut(16) {
        for j in 0..16 {
            let shifted = chunk[j] - top;
            let e = shifted.exp();
            sums[j] += e;
            // exp(-inf) * -inf is 0 * inf
            weighted[j] += if shifted == T::NEG_INFINITY { T::ZERO } else { e * shifted };
            chunk[j] = e;
        }
    }
    for (j, x) in rest.iter_mut().enumerate() {
        let shifted = *x - top;
        let e = shifted.exp();
        sums[j] += e;
        weighted[j] += if shifted == T::NEG_INFINITY { T::ZERO } else { e * shifted };
        *x = e;
    }
    let (total, weighted) = (real::sum(&sums), real::sum(&weighted));
    let log_total = total.to_f64().ln();
    let factor = scale / total;
    for x in z.iter_mut() {
        *x *= factor;
    }
    z[target] = z[target] - scale;
    (log_total - at_target.to_f64(), log_total - weighted.to_f64() / total.to_f64())
}

impl CustomOp3 for LinearCrossEntropy {
    fn name(&self) -> &'static str {
        "vesper-linear-cross-entropy"
    }

    fn cpu_fwd(
        &self,
        hidden: &CpuStorage,
        lh: &Layout,
        weight: &CpuStorage,
        lw: &Layout,
        targets: &CpuStorage,
        lt: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let targets = real::ids(targets, lt)?;
        match hidden.dtype() {
            DType::F64 => self.forward::<f64>((hidden, lh), (weight, lw), &targets, DType::F64),
            dtype => self.forward::<f32>((hidden, lh), (weight, lw), &targets, dtype),
        }
    }

    fn bwd(
        &self,
        _hidden: &Tensor,
        _weight: &Tensor,
        _targets: &Tensor,
        _loss: &Tensor,
        dloss: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let factor = dloss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        let scaled = |gradient: &Option<Tensor>| -> Result<Option<Tensor>> {
            match gradient {
                Some(gradient) if factor == 1.0 => Ok(Some(gradient.clone())),
                Some(gradient) => Ok(Some((gradient * factor)?)),
                None => Ok(None),
            }
        };
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        Ok((scaled(&saved.dhidden)?, scaled(&saved.dweight)?, None))
    }
}

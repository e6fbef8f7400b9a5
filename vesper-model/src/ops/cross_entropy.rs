//! The output layer and the cross-entropy in one operation that never holds all the logits.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::backward::deliver;
use super::gemm::Precision;
use super::linear::plain;
use super::matrix::{Matrix, Target, Threads, Values, new, product, replace};
use super::real::{self, Operand, Real};
use super::{Backend, Path, as_ids, check_dtypes, check_sizes, checkpoint, sizes, width};

/// At most this many logits are in memory at once (32 MiB in f32), but at least 64 rows. Fewer would save memory, but
/// each block of rows reads the weight twice and its gradient once.
const LOGITS: usize = 8 << 20;

/// Settings of [`linear_cross_entropy`].
///
/// # Examples
/// ```
/// use vesper_model::candle_core::{DType, Device, Tensor};
/// use vesper_model::ops::{CrossEntropy, Path, linear_cross_entropy};
///
/// let hidden = Tensor::zeros((3, 4), DType::F32, &Device::Cpu)?;
/// let weight = Tensor::zeros((8, 4), DType::F32, &Device::Cpu)?;
/// let targets = Tensor::new(&[1u32, 5, 7], &Device::Cpu)?;
/// let settings = CrossEntropy::default().with_ignore_index(7).with_label_smoothing(0.1);
/// let loss = linear_cross_entropy(&hidden, &weight, &targets, settings, Path::Fused)?.loss.to_scalar::<f32>()?;
/// assert!((loss - 8f32.ln()).abs() < 1e-6); // of the first two rows: all 8 tokens are alike
/// # Ok::<(), vesper_model::candle_core::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CrossEntropy {
    /// Rows with this target count neither in the loss nor in the gradient. Default `u32::MAX`.
    pub ignore_index: u32,
    /// Weight of the mean square of the logits' log-sum-exp, which keeps the logits from drifting: 0 or more, 1e-4 in
    /// PaLM. Default 0, without.
    pub z_loss: f64,
    /// How much of the target's probability is spread evenly over the whole vocabulary, 0 to 1. Default 0.
    pub label_smoothing: f64,
}

impl Default for CrossEntropy {
    fn default() -> Self {
        Self { ignore_index: u32::MAX, z_loss: 0.0, label_smoothing: 0.0 }
    }
}

impl CrossEntropy {
    /// Sets the target whose rows do not count.
    pub fn with_ignore_index(mut self, ignore_index: u32) -> Self {
        self.ignore_index = ignore_index;
        self
    }

    /// Sets the weight of the mean square of the logits' log-sum-exp.
    pub fn with_z_loss(mut self, z_loss: f64) -> Self {
        self.z_loss = z_loss;
        self
    }

    /// Sets how much of the target's probability is spread over the vocabulary.
    pub fn with_label_smoothing(mut self, label_smoothing: f64) -> Self {
        self.label_smoothing = label_smoothing;
        self
    }

    fn validate(self) -> Result<()> {
        if !(self.z_loss.is_finite() && self.z_loss >= 0.0) {
            bail!("linear_cross_entropy: a z_loss of {}, expected 0 or more", self.z_loss);
        }
        if !(0.0..=1.0).contains(&self.label_smoothing) {
            bail!("linear_cross_entropy: a label_smoothing of {}, expected 0 to 1", self.label_smoothing);
        }
        Ok(())
    }

    /// Whether the loss is -ln p(target) and nothing more.
    #[cfg(feature = "cuda")]
    pub(super) fn is_plain(self) -> bool {
        self.z_loss == 0.0 && self.label_smoothing == 0.0
    }
}

/// What [`linear_cross_entropy`] returns.
#[derive(Debug, Clone)]
pub struct LossAndEntropy {
    /// Mean of `-ln p(target)` over the rows that count, with what [`CrossEntropy`] adds; a scalar in nats, f32 (f64
    /// for f64). 0 where no row counts.
    pub loss: Tensor,
    /// Mean entropy of the predicted distributions over the same rows, a scalar in nats, without a gradient.
    pub entropy: Tensor,
}

/// Mean cross-entropy of a linear output layer.
///
/// ```text
/// hidden: (.., d)    weight: (vocab, d)    targets: (..), u32, u8 or i64
/// z = hidden weight^T    p = softmax(z)    lse = ln sum exp z
/// q = (1 - label_smoothing) onehot(target) + label_smoothing / vocab
/// loss = mean of (-sum q ln p + z_loss lse^2)    entropy = mean of -sum p ln p
/// dz = (p - q + 2 z_loss lse p) / rows    dhidden = dz weight    dweight = dz^T hidden
/// ```
///
/// By default q is the target alone and the loss the mean of `-ln p[target]`. The fused path works through the rows in
/// blocks and keeps at most about 8 million logits (32 MiB; 268 million on CUDA, 1 GiB in f32 and half of it in bf16 and
/// f16) at once; it computes both gradients in the forward pass, while the logits are at hand, and saves only them:
/// for n targets `n d + vocab d` numbers instead of three times `n vocab`. Gradients are not computed for inputs that are not
/// tracked. Accumulates in f32 for f32, bf16 and f16, in f64 for f64; on CUDA the logits are in the dtype. The reference
/// works in blocks of about 8 million logits too and computes each of them again in the backward.
///
/// A target in i64 that is negative or over `u32::MAX` counts as `u32::MAX`: the default `ignore_index`.
///
/// # Errors
/// Shapes that do not fit, no columns, dtypes that do not go together, settings outside their range, or a target outside the
/// vocabulary that is not `ignore_index`. On CUDA such a target makes the loss NaN instead, because the host would have to wait for the answer.
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
///
/// # References
/// Szegedy et al. (label smoothing), arXiv 1512.00567; Chowdhery et al. (z-loss), arXiv 2204.02311.
pub fn linear_cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    settings: CrossEntropy,
    path: Path,
) -> Result<LossAndEntropy> {
    let d = width("linear_cross_entropy", "hidden", hidden)?;
    let [_, columns] = sizes("linear_cross_entropy", "weight", weight)?;
    if d != columns || targets.dims() != &hidden.dims()[..hidden.rank() - 1] {
        bail!(
            "linear_cross_entropy: hidden {:?}, weight {:?} and targets {:?} do not fit together",
            hidden.shape(),
            weight.shape(),
            targets.shape()
        );
    }
    check_dtypes("linear_cross_entropy", hidden, &[("weight", weight)])?;
    settings.validate()?;
    check_sizes("linear_cross_entropy", &[hidden.dims(), weight.dims()])?;
    if d == 0 {
        bail!("linear_cross_entropy: hidden {:?} has no columns", hidden.shape());
    }
    let targets = &as_ids("linear_cross_entropy", targets)?;
    match path.backend(hidden) {
        Backend::Cpu => {}
        #[cfg(feature = "cuda")]
        Backend::Cuda => {
            return super::cuda::cross_entropy::linear_cross_entropy(hidden, weight, targets, settings);
        }
        Backend::Reference => {
            let weight = plain(&weight.to_dtype(hidden.dtype())?)?;
            let hidden = plain(hidden)?.reshape((targets.elem_count(), d))?;
            return reference(&hidden, &weight, &targets.flatten_all()?, settings);
        }
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

/// Refuses a target outside the vocabulary that is not to be ignored.
fn check_targets(targets: &[usize], vocab: usize, ignore: usize) -> Result<()> {
    match targets.iter().enumerate().find(|&(_, &v)| v >= vocab && v != ignore) {
        Some((row, target)) => bail!("target {target} of row {row} is outside a vocabulary of {vocab}"),
        None => Ok(()),
    }
}

fn reference(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    settings: CrossEntropy,
) -> Result<LossAndEntropy> {
    let dtype = if hidden.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let ((n, _), (vocab, _)) = (hidden.dims2()?, weight.dims2()?);
    if targets.device().is_cpu() {
        // candle's gather takes the largest u32 for a padding that it leaves at 0.
        check_targets(&real::ids_of(targets)?, vocab, settings.ignore_index as usize)?;
    }
    if n == 0 || vocab == 0 {
        let zero = (hidden.sum_all()?.to_dtype(dtype)? * 0.0)?;
        return Ok(LossAndEntropy { entropy: zero.detach(), loss: zero });
    }
    let counted = (1.0 - targets.eq(settings.ignore_index)?.to_dtype(dtype)?)?.sum_all()?;
    let counted = counted.maximum(&Tensor::ones((), dtype, hidden.device())?)?;
    let block = (LOGITS / vocab).max(64);
    let sums = if n <= block {
        reference_sums(hidden, weight, targets, settings)?
    } else {
        let mut sums = Tensor::zeros(2, dtype, hidden.device())?;
        for start in (0..n).step_by(block) {
            let rows = block.min(n - start);
            let (hidden, targets) = (hidden.narrow(0, start, rows)?, targets.narrow(0, start, rows)?);
            let block = checkpoint(
                move |x| reference_sums(&x[0], &x[1], &x[2], settings),
                &[&hidden, weight, &targets],
            )?;
            sums = (sums + block)?;
        }
        sums
    };
    Ok(LossAndEntropy { loss: (sums.get(0)? / &counted)?, entropy: (sums.get(1)?.detach() / &counted)? })
}

/// The sums of the loss and of the entropy over the rows that count, (2).
fn reference_sums(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    settings: CrossEntropy,
) -> Result<Tensor> {
    let dtype = if hidden.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    // Rows to ignore are zeros (0 times what is no number would be none), read class 0 and are multiplied by 0.
    let ignored = targets.eq(settings.ignore_index)?;
    let mask = ignored.unsqueeze(1)?.broadcast_as(hidden.shape())?;
    let hidden = mask.where_cond(&hidden.zeros_like()?, hidden)?;
    let keep = (1.0 - ignored.to_dtype(dtype)?)?;
    let targets = ignored.where_cond(&targets.zeros_like()?, targets)?;
    let logits = hidden.matmul(&weight.t()?)?.to_dtype(dtype)?; // (n, vocab)
    let top = logits.max_keepdim(D::Minus1)?.detach();
    let shifted = logits.broadcast_sub(&top)?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let log_p = shifted.broadcast_sub(&log_sum)?;
    let mut loss = log_p.gather(&targets.unsqueeze(1)?, 1)?.squeeze(1)?.neg()?; // (n)
    if settings.label_smoothing > 0.0 {
        let even = log_p.mean(D::Minus1)?.neg()?;
        loss = ((loss * (1.0 - settings.label_smoothing))? + (even * settings.label_smoothing)?)?;
    }
    if settings.z_loss > 0.0 {
        loss = (loss + ((log_sum + top)?.squeeze(1)?.sqr()? * settings.z_loss)?)?;
    }
    let log_p = log_p.detach();
    // exp(-inf) * -inf is 0 * inf
    let entropy = (log_p.exp()? * log_p.clamp(f32::MIN, 0f32)?)?.sum(D::Minus1)?.neg()?;
    Tensor::stack(&[(loss * &keep)?.sum_all()?, (entropy * keep)?.sum_all()?], 0)
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
        hidden: Values<'_, T>,
        weight: Values<'_, T>,
        targets: &[usize],
        (vocab, d): (usize, usize),
        precision: Precision,
    ) -> Result<Gradients<T>> {
        let ignore = self.settings.ignore_index as usize;
        check_targets(targets, vocab, ignore)?;
        let counted = targets.iter().filter(|&&v| v != ignore).count();
        let scale = T::of(1.0 / counted.max(1) as f64);
        let mut out = Gradients {
            loss: 0.0,
            entropy: 0.0,
            dhidden: vec![T::ZERO; if self.hidden_tracked { hidden.len() } else { 0 }],
            dweight: Vec::new(),
        };
        if counted == 0 {
            out.dweight = vec![T::ZERO; if self.weight_tracked { weight.len() } else { 0 }];
            return Ok(out);
        }
        let weight = Matrix::new(weight, vocab, d, d)?;
        let block = (LOGITS / vocab).max(64).min(targets.len());
        let mut logits = Vec::new();
        for (b, targets) in targets.chunks(block).enumerate() {
            let rows = targets.len();
            let h = Matrix::new(hidden.from(b * block * d), rows, d, d)?;
            replace(&mut logits, h, weight.t(), precision)?;
            let z = &mut logits[..];
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
                        || softmax_row(z, target, scale, self.settings),
                    )
                })
                .collect();
            for (loss, entropy) in sums {
                out.loss += loss;
                out.entropy += entropy;
            }
            let dz = Matrix::new(&*z, rows, vocab, vocab)?;
            if self.hidden_tracked {
                let dh = &mut out.dhidden[b * block * d..][..rows * d];
                product(Target::overwrite(dh, d), dz, weight, precision, Threads::All)?;
            }
            if self.weight_tracked && b == 0 {
                out.dweight = new(dz.t(), h, precision)?;
            } else if self.weight_tracked {
                product(Target::add(&mut out.dweight, d), dz.t(), h, precision, Threads::All)?;
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
        use candle_core::backend::BackendStorage;
        let of_weight = weight.dtype();
        let (vocab, d) = lw.shape().dims2()?;
        let (hidden, weight) = (Operand::new(hidden, lh)?, Operand::new(weight, lw)?);
        let precision = Precision::of(dtype);
        let out = self.run::<T>(hidden.values(), weight.values(), targets, (vocab, d), precision)?;
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        // Divided by the number of rows, the gradients are too small for f16 until the loss's factor is in them.
        let kept = |dtype| if dtype == DType::F16 { DType::F32 } else { dtype };
        let keep = |gradient, shape: &Shape, dtype| real::tensor(gradient, shape, kept(dtype));
        *saved = Saved {
            entropy: out.entropy,
            dhidden: self.hidden_tracked.then(|| keep(out.dhidden, lh.shape(), dtype)).transpose()?,
            dweight: self.weight_tracked.then(|| keep(out.dweight, lw.shape(), of_weight)).transpose()?,
        };
        let wide = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        Ok((T::store(vec![T::of(out.loss)], wide)?, Shape::from(())))
    }
}

/// Replaces a row of logits by its gradient; returns the row's loss and the entropy of its softmax.
#[inline(always)]
fn softmax_row<T: Real>(z: &mut [T], target: usize, scale: T, settings: CrossEntropy) -> (f64, f64) {
    let CrossEntropy { z_loss, label_smoothing: smoothing, .. } = settings;
    let top = real::max(z);
    let at_target = (z[target] - top).to_f64();
    // What the logits count for in sum q z, less the largest: only the target, or some of all.
    let expected = if smoothing > 0.0 {
        let even = real::fold(z.len(), |i| z[i] - top).to_f64() / z.len() as f64;
        (1.0 - smoothing) * at_target + smoothing * even
    } else {
        at_target
    };
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
    let log_sum_exp = log_total + top.to_f64();
    let factor = scale * T::of(1.0 + 2.0 * z_loss * log_sum_exp) / total;
    if smoothing > 0.0 {
        let even = scale * T::of(smoothing / z.len() as f64);
        for x in z.iter_mut() {
            *x = *x * factor - even;
        }
    } else {
        for x in z.iter_mut() {
            *x *= factor;
        }
    }
    z[target] = z[target] - scale * T::of(1.0 - smoothing);
    let entropy = log_total - weighted.to_f64() / total.to_f64();
    let mut loss = log_total - expected;
    if z_loss > 0.0 {
        loss += z_loss * log_sum_exp * log_sum_exp;
    }
    (loss, entropy)
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
        hidden: &Tensor,
        weight: &Tensor,
        _targets: &Tensor,
        _loss: &Tensor,
        dloss: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let factor = dloss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        let scaled = |gradient: &Option<Tensor>, of: &Tensor| -> Result<Option<Tensor>> {
            match gradient {
                Some(gradient) if factor == 1.0 => Ok(Some(gradient.to_dtype(of.dtype())?)),
                Some(gradient) => Ok(Some((gradient * factor)?.to_dtype(of.dtype())?)),
                None => Ok(None),
            }
        };
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        Ok((scaled(&saved.dhidden, hidden)?, deliver(weight, scaled(&saved.dweight, weight)?)?, None))
    }
}

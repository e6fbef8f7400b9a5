//! Dropout whose mask is computed again in the backward instead of stored.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::attention_composed::compute;
use super::philox::GROUP;
use super::real::{self, Real};
use super::{Backend, Path, Philox, cast, check_float, check_sizes};

/// Elements handled by one task, a multiple of [`GROUP`].
const TASK: usize = 256 * GROUP;

/// Dropout.
///
/// ```text
/// x: any shape    u = word i of the generator / 2^32
/// y[i] = x[i] / (1 - p) where u >= p, 0 elsewhere        dx[i] = dy[i] / (1 - p) in the same places
/// ```
///
/// Saves nothing: the mask follows from `random`, so the backward draws it again, and so does a
/// [`checkpoint`](super::checkpoint()) whose closure holds this call. `p` is taken to the nearest 2^-32; 0 returns `x`
/// itself, 1 gives zeros. f32, f64, bf16 and f16; the mask does not depend on the dtype, the path, the device or the
/// number of threads.
///
/// # Errors
/// A `p` outside 0 to 1, another dtype, or too many elements.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use vesper_model::ops::{Path, Philox, dropout};
/// let x = Tensor::ones(1000, DType::F32, &Device::Cpu)?;
/// let y = dropout(&x, 0.5, Philox { seed: 42, offset: 0 }, Path::Fused)?.to_vec1::<f32>()?;
/// assert!(y.iter().all(|&y| y == 0.0 || y == 2.0));
/// let dropped = y.iter().filter(|&&y| y == 0.0).count();
/// assert!((450..550).contains(&dropped));
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # References
/// Srivastava et al., Dropout: A Simple Way to Prevent Neural Networks from Overfitting, JMLR 15, 2014.
pub fn dropout(x: &Tensor, p: f64, random: Philox, path: Path) -> Result<Tensor> {
    if !(0.0..=1.0).contains(&p) {
        bail!("dropout: a probability of {p}, expected 0 to 1");
    }
    check_float("dropout", "x", x.dtype())?;
    check_sizes("dropout", &[x.dims()])?;
    let op = Dropout::new(p, random);
    if op.threshold == 0 {
        return Ok(x.clone());
    }
    match path.backend(x) {
        Backend::Cpu => return x.contiguous()?.apply_op1(op),
        #[cfg(feature = "cuda")]
        Backend::Cuda => {
            return super::cuda::dropout::dropout(x, op.threshold, op.scale, random);
        }
        Backend::Reference => {}
    }
    let kept: Vec<u8> = random.words(x.elem_count()).into_iter().map(|word| op.keeps(word).into()).collect();
    let kept = Tensor::from_vec(kept, x.shape(), x.device())?;
    // The factor may be more than f16 holds.
    let scaled = (cast(x, compute(x.dtype()))? * op.scale)?;
    cast(&kept.where_cond(&scaled, &scaled.zeros_like()?)?, x.dtype())
}

#[derive(Clone, Copy)]
struct Dropout {
    /// Words below it are dropped; 2^32 where all are.
    threshold: u64,
    scale: f64,
    random: Philox,
}

impl Dropout {
    fn new(p: f64, random: Philox) -> Self {
        let threshold = (p * 4_294_967_296.0).round() as u64;
        Self { threshold, scale: if p < 1.0 { 1.0 / (1.0 - p) } else { 1.0 }, random }
    }

    #[inline(always)]
    fn keeps(self, word: u32) -> bool {
        u64::from(word) >= self.threshold
    }

    fn run<T: Real>(self, x: &[T]) -> Vec<T> {
        let scale = T::of(self.scale);
        let mut y = vec![T::ZERO; x.len()];
        y.par_chunks_mut(TASK).zip(x.par_chunks(TASK)).enumerate().for_each(|(task, (y, x))| {
            real::simd(
                #[inline(always)]
                || {
                    let mut words = [0; GROUP];
                    for (group, (y, x)) in y.chunks_mut(GROUP).zip(x.chunks(GROUP)).enumerate() {
                        let block = (task * TASK + group * GROUP) / 4;
                        self.random.fill(block as u64, &mut words);
                        for ((y, &x), &word) in y.iter_mut().zip(x).zip(&words) {
                            *y = if self.keeps(word) { x * scale } else { T::ZERO };
                        }
                    }
                },
            );
        });
        y
    }
}

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        "vesper-dropout"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let y = match x.dtype() {
            DType::F64 => f64::store(self.run(&f64::read(x, layout)?), DType::F64)?,
            dtype => f32::store(self.run(&f32::read(x, layout)?), dtype)?,
        };
        Ok((y, layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        dy.contiguous()?.apply_op1_no_bwd(self).map(Some)
    }
}

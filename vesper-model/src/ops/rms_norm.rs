//! Root-mean-square normalisation.

use candle_core::{CpuStorage, CustomOp2, D, DType, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::backward::deliver;
use super::real::{self, Real};
use super::residual::Normed;
use super::{Backend, Path, check_dtypes, check_sizes};

/// Rows handled by one task; the gradient of the weight is summed a task at a time, in order.
const ROWS: usize = 64;

/// RMSNorm with a gradient.
///
/// ```text
/// x: (.., d)    w: (d)    r = 1 / sqrt(mean(x^2) + eps)    y = x r w
/// dx = r (w dy - x r^2 mean(x w dy))    dw = sum over rows of x r dy
/// ```
///
/// Computed in f32 for f32, bf16 and f16, in f64 for f64. Saves its inputs; r is computed again in the backward.
/// (`candle_nn::ops::rms_norm` and `RmsNorm::forward` have no gradient.)
///
/// # Errors
/// A weight whose length is not the last dimension of `x`, or dtypes that do not go together.
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor};
/// use vesper_model::ops::{Path, rms_norm};
/// let x = Tensor::new(&[[3f32, 4.]], &Device::Cpu)?;
/// let w = Tensor::new(&[1f32, 2.], &Device::Cpu)?;
/// let y = rms_norm(&x, &w, 0.0, Path::Fused)?.to_vec2::<f32>()?;
/// let r = 1.0 / 12.5f32.sqrt();
/// assert!((y[0][0] - 3.0 * r).abs() < 1e-6 && (y[0][1] - 8.0 * r).abs() < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # References
/// Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467.
pub fn rms_norm(x: &Tensor, w: &Tensor, eps: f64, path: Path) -> Result<Tensor> {
    check("rms_norm", x, w)?;
    match path.backend(x) {
        Backend::Cpu => return fused(x, w, eps, Normed::default()),
        #[cfg(feature = "cuda")]
        Backend::Cuda => return super::cuda::rms_norm::rms_norm(x, &w.to_dtype(x.dtype())?, eps),
        Backend::Reference => {}
    }
    let dtype = x.dtype();
    let compute = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let (x, w) = (x.to_dtype(compute)?, w.to_dtype(compute)?);
    let mean = (x.sqr()?.sum_keepdim(D::Minus1)? / x.dim(D::Minus1)?.max(1) as f64)?;
    x.broadcast_div(&(mean + eps)?.sqrt()?)?.broadcast_mul(&w)?.to_dtype(dtype)
}

pub(super) fn check(name: &str, x: &Tensor, w: &Tensor) -> Result<()> {
    if x.rank() == 0 || w.dims() != &x.dims()[x.rank() - 1..] {
        bail!("{name}: a weight of shape {:?} for x of shape {:?}", w.shape(), x.shape());
    }
    check_dtypes(name, x, &[("weight", w)])?;
    check_sizes(name, &[x.dims(), w.dims()])
}

/// On the CPU; `normed` may hold the result already.
pub(super) fn fused(x: &Tensor, w: &Tensor, eps: f64, normed: Normed<CpuStorage>) -> Result<Tensor> {
    x.contiguous()?.apply_op2(&w.contiguous()?, RmsNorm { eps, normed })
}

/// One row.
#[inline(always)]
pub(super) fn row<T: Real>(x: &[T], w: &[T], y: &mut [T], eps: T) {
    let r = T::ONE / (real::fold(x.len(), |i| x[i] * x[i]) / T::of(x.len() as f64) + eps).sqrt();
    for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
        *y = x * r * w;
    }
}

struct RmsNorm {
    eps: f64,
    normed: Normed<CpuStorage>,
}

impl RmsNorm {
    fn forward<T: Real>(&self, x: &[T], w: &[T]) -> Vec<T> {
        let d = w.len();
        let mut y = vec![T::ZERO; x.len()];
        if d == 0 {
            return y;
        }
        let eps = T::of(self.eps);
        y.par_chunks_mut(ROWS * d).zip(x.par_chunks(ROWS * d)).for_each(|(y, x)| {
            real::simd(
                #[inline(always)]
                || {
                    for (y, x) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                        row(x, w, y, eps);
                    }
                },
            );
        });
        y
    }

    fn forward_storage<T: Real>(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        dtype: DType,
    ) -> Result<(CpuStorage, Shape)> {
        let y = self.forward::<T>(&T::read(x, lx)?, &T::read(w, lw)?);
        Ok((T::store(y, dtype)?, lx.shape().clone()))
    }
}

/// On the CPU, of contiguous tensors: the gradients of x and w, as far as they are wanted; `onto` is added to that of x.
pub(super) fn gradients(
    x: &Tensor,
    w: &Tensor,
    dy: &Tensor,
    onto: Option<&Tensor>,
    eps: f64,
    wanted: [bool; 2],
) -> Result<[Option<Tensor>; 2]> {
    match x.dtype() {
        DType::F64 => Sums::<f64>::of(x, w, dy, onto, eps)?.tensors(x, w, wanted),
        _ => Sums::<f32>::of(x, w, dy, onto, eps)?.tensors(x, w, wanted),
    }
}

/// The gradients of x and w.
struct Sums<T> {
    dx: Vec<T>,
    dw: Vec<T>,
}

impl<T: Real> Sums<T> {
    fn of(x: &Tensor, w: &Tensor, dy: &Tensor, onto: Option<&Tensor>, eps: f64) -> Result<Self> {
        let eps = T::of(eps);
        real::with_values(x, |x| {
            real::with_values(w, |w| {
                real::with_values(dy, |dy| match onto {
                    Some(onto) => real::with_values(onto, |onto| Ok(Self::sum(x, w, dy, Some(onto), eps))),
                    None => Ok(Self::sum(x, w, dy, None, eps)),
                })
            })
        })
    }

    fn sum(x: &[T], w: &[T], dy: &[T], onto: Option<&[T]>, eps: T) -> Self {
        let d = w.len();
        let mut dx = vec![T::ZERO; x.len()];
        let mut dw = vec![T::ZERO; d];
        if d == 0 {
            return Self { dx, dw };
        }
        let n = T::of(d as f64);
        let partial: Vec<Vec<T>> = dx
            .par_chunks_mut(ROWS * d)
            .zip(x.par_chunks(ROWS * d))
            .zip(dy.par_chunks(ROWS * d))
            .enumerate()
            .map(|(task, ((dx, x), dy))| {
                let onto = onto.map(|onto| &onto[task * ROWS * d..][..x.len()]);
                let mut dw = vec![T::ZERO; d];
                real::simd(
                    #[inline(always)]
                    || {
                        let rows = dx.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(dy.chunks_exact(d));
                        for ((dx, x), dy) in rows {
                            let r = T::ONE / (real::fold(d, |i| x[i] * x[i]) / n + eps).sqrt();
                            let dot = real::fold(d, |i| x[i] * w[i] * dy[i]) / n * r * r;
                            for i in 0..d {
                                dx[i] = r * (w[i] * dy[i] - x[i] * dot);
                                dw[i] += x[i] * r * dy[i];
                            }
                        }
                        if let Some(onto) = onto {
                            for (dx, &onto) in dx.iter_mut().zip(onto) {
                                *dx += onto;
                            }
                        }
                    },
                );
                dw
            })
            .collect();
        for part in partial {
            for (sum, value) in dw.iter_mut().zip(part) {
                *sum += value;
            }
        }
        Self { dx, dw }
    }

    fn tensors(self, x: &Tensor, w: &Tensor, [of_x, of_w]: [bool; 2]) -> Result<[Option<Tensor>; 2]> {
        let dx = of_x.then(|| real::tensor(self.dx, x.shape(), x.dtype())).transpose()?;
        let dw = of_w.then(|| real::tensor(self.dw, w.shape(), w.dtype())).transpose()?;
        Ok([dx, dw])
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "vesper-rms-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        if let Some(y) = self.normed.take() {
            return Ok((y, lx.shape().clone()));
        }
        match x.dtype() {
            DType::F64 => self.forward_storage::<f64>(x, lx, w, lw, DType::F64),
            dtype => self.forward_storage::<f32>(x, lx, w, lw, dtype),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let [dx, dw] = gradients(x, w, &dy, None, self.eps, [x.track_op(), w.track_op()])?;
        Ok((dx, deliver(w, dw)?))
    }
}

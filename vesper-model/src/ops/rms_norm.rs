//! Root-mean-square normalisation.

use candle_core::{CpuStorage, CustomOp2, D, DType, Layout, Result, Shape, Tensor, bail};
use half::{bf16, f16};

use super::backward::deliver;
use super::filled::filled;
use super::real::{self, Real};
use super::residual::Normed;
use super::stored::{Rows, Stored, with_rows, with_stored};
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
    fn forward<E: Stored>(&self, x: &[E], w: &[E::Real]) -> Vec<E> {
        let d = w.len();
        let eps = E::Real::of(self.eps);
        let ([y], _) = filled(x.len(), ROWS * d, |range, [y]| {
            let [mut of_x, mut of_y] = [(); 2].map(|()| vec![E::Real::ZERO; d]);
            real::simd(
                #[inline(always)]
                || {
                    for (y, x) in y.chunks_exact_mut(d).zip(x[range].chunks_exact(d)) {
                        let x = E::read(x, &mut of_x);
                        E::write(
                            y,
                            &mut of_y,
                            #[inline(always)]
                            |y| row(x, w, y, eps),
                        );
                    }
                },
            );
        });
        y
    }

    fn forward_storage<E: Stored>(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let y = self.forward::<E>(E::of(x, lx)?, &E::Real::read(w, lw)?);
        Ok((E::to_cpu_storage_owned(y), lx.shape().clone()))
    }
}

/// On the CPU, of contiguous tensors: the gradients of x and w, as far as they are wanted; `onto` is added to that of x.
/// dy may be in the type of the computation.
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
        DType::BF16 => Sums::<bf16>::of(x, w, dy, onto, eps)?.tensors(x, w, wanted),
        DType::F16 => Sums::<f16>::of(x, w, dy, onto, eps)?.tensors(x, w, wanted),
        _ => Sums::<f32>::of(x, w, dy, onto, eps)?.tensors(x, w, wanted),
    }
}

/// The gradients of x and w.
struct Sums<E: Stored> {
    dx: Vec<E>,
    dw: Vec<E::Real>,
}

impl<E: Stored> Sums<E> {
    fn of(x: &Tensor, w: &Tensor, dy: &Tensor, onto: Option<&Tensor>, eps: f64) -> Result<Self> {
        let eps = E::Real::of(eps);
        with_stored(x, |x| {
            real::with_values(w, |w| {
                with_rows(dy, |dy| match onto {
                    Some(onto) => with_stored(onto, |onto| Ok(Self::sum(x, w, dy, Some(onto), eps))),
                    None => Ok(Self::sum(x, w, dy, None, eps)),
                })
            })
        })
    }

    fn sum(x: &[E], w: &[E::Real], dy: Rows<'_, E>, onto: Option<&[E]>, eps: E::Real) -> Self {
        let d = w.len();
        let n = E::Real::of(d as f64);
        let ([dx], partial) = filled(x.len(), ROWS * d, |range, [dx]| {
            let mut dw = vec![E::Real::ZERO; d];
            let mut rooms = [(); 4].map(|()| vec![E::Real::ZERO; d]);
            real::simd(
                #[inline(always)]
                || {
                    let [of_x, of_dy, of_onto, of_dx] = &mut rooms;
                    for (start, dx) in range.step_by(d).zip(dx.chunks_exact_mut(d)) {
                        let row = start..start + d;
                        let (x, dy) = (E::read(&x[row.clone()], of_x), dy.read(row.clone(), of_dy));
                        let r = E::Real::ONE / (real::fold(d, |i| x[i] * x[i]) / n + eps).sqrt();
                        let dot = real::fold(d, |i| x[i] * w[i] * dy[i]) / n * r * r;
                        E::write(
                            dx,
                            of_dx,
                            #[inline(always)]
                            |dx| {
                                for i in 0..d {
                                    dx[i] = r * (w[i] * dy[i] - x[i] * dot);
                                    dw[i] += x[i] * r * dy[i];
                                }
                                if let Some(onto) = onto {
                                    for (dx, &onto) in dx.iter_mut().zip(E::read(&onto[row], of_onto)) {
                                        *dx += onto;
                                    }
                                }
                            },
                        );
                    }
                },
            );
            dw
        });
        let mut dw = vec![E::Real::ZERO; d];
        for part in partial {
            for (sum, value) in dw.iter_mut().zip(part) {
                *sum += value;
            }
        }
        Self { dx, dw }
    }

    fn tensors(self, x: &Tensor, w: &Tensor, [of_x, of_w]: [bool; 2]) -> Result<[Option<Tensor>; 2]> {
        let dx = of_x.then(|| Tensor::from_vec(self.dx, x.shape(), x.device())).transpose()?;
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
        if let Some(y) = self.normed.take() {
            return Ok((y, lx.shape().clone()));
        }
        match x {
            CpuStorage::F64(_) => self.forward_storage::<f64>(x, lx, w, lw),
            CpuStorage::BF16(_) => self.forward_storage::<bf16>(x, lx, w, lw),
            CpuStorage::F16(_) => self.forward_storage::<f16>(x, lx, w, lw),
            _ => self.forward_storage::<f32>(x, lx, w, lw),
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

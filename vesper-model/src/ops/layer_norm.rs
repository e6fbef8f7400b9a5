//! Layer normalisation.

use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor, bail};
use half::{bf16, f16};

use super::backward::deliver;
use super::filled::filled;
use super::real::{self, Real};
use super::residual::Normed;
use super::stored::{Stored, with_stored};
use super::{Backend, Path, check_dtypes, check_sizes};

/// Rows handled by one task; the gradients of weight and bias are summed a task at a time, in order.
const ROWS: usize = 64;

/// LayerNorm with a gradient, over the last dimension.
///
/// ```text
/// x: (.., d)    w, b: (d)
/// n = (x - mean(x)) r    r = 1 / sqrt(mean((x - mean(x))^2) + eps)    y = n w + b
/// g = w dy    dx = r (g - mean(g) - n mean(g n))    dw = sum over rows of n dy    db = sum over rows of dy
/// ```
///
/// Without a bias, `b` is 0. Computed in f32 for f32, bf16 and f16, in f64 for f64. Saves its inputs; mean and r are
/// computed again in the backward, so it keeps no memory of its own. (`candle_nn::ops::layer_norm` and, with a bias,
/// `LayerNorm::forward` have no gradient.)
///
/// # Errors
/// A weight or bias whose length is not the last dimension of `x`, or dtypes that do not go together.
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor};
/// use vesper_model::ops::{Path, layer_norm};
/// let x = Tensor::new(&[[1f32, 3.]], &Device::Cpu)?;
/// let w = Tensor::new(&[1f32, 2.], &Device::Cpu)?;
/// let b = Tensor::new(&[10f32, 20.], &Device::Cpu)?;
/// let y = layer_norm(&x, &w, Some(&b), 0.0, Path::Fused)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[9., 22.]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// # References
/// Ba, Kiros and Hinton, Layer Normalization, arXiv 1607.06450.
pub fn layer_norm(x: &Tensor, w: &Tensor, b: Option<&Tensor>, eps: f64, path: Path) -> Result<Tensor> {
    check("layer_norm", x, w, b)?;
    match path.backend(x) {
        Backend::Cpu => return fused(x, w, b, eps, Normed::default()),
        #[cfg(feature = "cuda")]
        Backend::Cuda => {
            let (w, b) = (w.to_dtype(x.dtype())?, b.map(|b| b.to_dtype(x.dtype())).transpose()?);
            return super::cuda::layer_norm::layer_norm(x, &w, b.as_ref(), eps, Normed::default());
        }
        Backend::Reference => {}
    }
    reference(x, w, b, eps)
}

pub(super) fn check(name: &str, x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<()> {
    for (what, tensor) in std::iter::once(("weight", w)).chain(b.map(|b| ("bias", b))) {
        if x.rank() == 0 || tensor.dims() != &x.dims()[x.rank() - 1..] {
            bail!("{name}: a {what} of shape {:?} for x of shape {:?}", tensor.shape(), x.shape());
        }
        check_dtypes(name, x, &[(what, tensor)])?;
    }
    check_sizes(name, &[x.dims(), w.dims()])
}

/// On the CPU; `normed` may hold the result already.
pub(super) fn fused(
    x: &Tensor,
    w: &Tensor,
    b: Option<&Tensor>,
    eps: f64,
    normed: Normed<CpuStorage>,
) -> Result<Tensor> {
    let b = match b {
        Some(b) => b.contiguous()?,
        None => w.detach().zeros_like()?.contiguous()?,
    };
    x.contiguous()?.apply_op3(&w.contiguous()?, &b, LayerNorm { eps, normed })
}

pub(super) fn reference(x: &Tensor, w: &Tensor, b: Option<&Tensor>, eps: f64) -> Result<Tensor> {
    let dtype = x.dtype();
    let compute = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
    let (x, w) = (x.to_dtype(compute)?, w.to_dtype(compute)?);
    let d = x.dim(D::Minus1)?.max(1) as f64;
    let centred = x.broadcast_sub(&(x.sum_keepdim(D::Minus1)? / d)?)?;
    // The mean is rounded to the size of the values: what is left of it, see `statistics`.
    let centred = centred.broadcast_sub(&(centred.sum_keepdim(D::Minus1)? / d)?)?;
    let variance = (centred.sqr()?.sum_keepdim(D::Minus1)? / d)?;
    let y = centred.broadcast_div(&(variance + eps)?.sqrt()?)?.broadcast_mul(&w)?;
    let y = match b {
        Some(b) => y.broadcast_add(&b.to_dtype(compute)?)?,
        None => y,
    };
    y.to_dtype(dtype)
}

/// Mean and 1 / sqrt(variance + eps) of a row. The mean is a sum of two numbers, to be subtracted one after the other: one
/// alone is rounded to the size of the values, which may be much more than the distances between them.
#[inline(always)]
fn statistics<T: Real>(x: &[T], eps: T) -> ([T; 2], T) {
    let n = T::of(x.len() as f64);
    let mean = real::sum(x) / n;
    let rest = real::fold(x.len(), |i| x[i] - mean) / n;
    let variance = real::fold(x.len(), |i| (x[i] - mean - rest) * (x[i] - mean - rest)) / n;
    ([mean, rest], T::ONE / (variance + eps).sqrt())
}

/// One row.
#[inline(always)]
pub(super) fn row<T: Real>(x: &[T], w: &[T], b: &[T], y: &mut [T], eps: T) {
    let ([mean, rest], r) = statistics(x, eps);
    for (((y, &x), &w), &b) in y.iter_mut().zip(x).zip(w).zip(b) {
        *y = (x - mean - rest) * r * w + b;
    }
}

struct LayerNorm {
    eps: f64,
    normed: Normed<CpuStorage>,
}

impl LayerNorm {
    fn forward<E: Stored>(&self, x: &[E], w: &[E::Real], b: &[E::Real]) -> Vec<E> {
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
                            |y| row(x, w, b, y, eps),
                        );
                    }
                },
            );
        });
        y
    }

    fn forward_storage<E: Stored>(
        &self,
        (x, lx): (&CpuStorage, &Layout),
        (w, lw): (&CpuStorage, &Layout),
        (b, lb): (&CpuStorage, &Layout),
    ) -> Result<(CpuStorage, Shape)> {
        let y = self.forward::<E>(E::of(x, lx)?, &E::Real::read(w, lw)?, &E::Real::read(b, lb)?);
        Ok((E::to_cpu_storage_owned(y), lx.shape().clone()))
    }

    /// Gradients of x, and of w and b.
    fn backward<E: Stored>(&self, x: &[E], w: &[E::Real], dy: &[E]) -> (Vec<E>, [Vec<E::Real>; 2]) {
        let d = w.len();
        let (eps, n) = (E::Real::of(self.eps), E::Real::of(d as f64));
        let ([dx], partial) = filled(x.len(), ROWS * d, |range, [dx]| {
            let [mut dw, mut db] = [(); 2].map(|()| vec![E::Real::ZERO; d]);
            let [mut of_x, mut of_dy, mut of_dx] = [(); 3].map(|()| vec![E::Real::ZERO; d]);
            real::simd(
                #[inline(always)]
                || {
                    let inputs = x[range.clone()].chunks_exact(d).zip(dy[range].chunks_exact(d));
                    for (dx, (x, dy)) in dx.chunks_exact_mut(d).zip(inputs) {
                        let (x, dy) = (E::read(x, &mut of_x), E::read(dy, &mut of_dy));
                        let ([mean, rest], r) = statistics(x, eps);
                        let g = real::fold(d, |i| w[i] * dy[i]) / n;
                        let gn = real::fold(d, |i| w[i] * dy[i] * (x[i] - mean - rest)) * r / n;
                        E::write(
                            dx,
                            &mut of_dx,
                            #[inline(always)]
                            |dx| {
                                for i in 0..d {
                                    let normed = (x[i] - mean - rest) * r;
                                    dx[i] = r * (w[i] * dy[i] - g - normed * gn);
                                    dw[i] += normed * dy[i];
                                    db[i] += dy[i];
                                }
                            },
                        );
                    }
                },
            );
            [dw, db]
        });
        let mut sums = [(); 2].map(|()| vec![E::Real::ZERO; d]);
        for part in partial {
            for (sums, part) in sums.iter_mut().zip(part) {
                for (sum, value) in sums.iter_mut().zip(part) {
                    *sum += value;
                }
            }
        }
        (dx, sums)
    }

    fn backward_tensors<E: Stored>(
        &self,
        [x, w, b]: [&Tensor; 3],
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (dx, [dw, db]) = with_stored::<E, _>(x, |x| {
            real::with_values(w, |w| with_stored(dy, |dy| Ok(self.backward(x, w, dy))))
        })?;
        let dx = x.track_op().then(|| Tensor::from_vec(dx, x.shape(), x.device())).transpose()?;
        let of = |input: &Tensor, gradient| {
            let gradient = || real::tensor(gradient, input.shape(), input.dtype());
            deliver(input, input.track_op().then(gradient).transpose()?)
        };
        Ok((dx, of(w, dw)?, of(b, db)?))
    }
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "vesper-layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        w: &CpuStorage,
        lw: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        if let Some(y) = self.normed.take() {
            return Ok((y, lx.shape().clone()));
        }
        let (x, w, b) = ((x, lx), (w, lw), (b, lb));
        match x.0 {
            CpuStorage::F64(_) => self.forward_storage::<f64>(x, w, b),
            CpuStorage::BF16(_) => self.forward_storage::<bf16>(x, w, b),
            CpuStorage::F16(_) => self.forward_storage::<f16>(x, w, b),
            _ => self.forward_storage::<f32>(x, w, b),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        match x.dtype() {
            DType::F64 => self.backward_tensors::<f64>([x, w, b], &dy),
            DType::BF16 => self.backward_tensors::<bf16>([x, w, b], &dy),
            DType::F16 => self.backward_tensors::<f16>([x, w, b], &dy),
            _ => self.backward_tensors::<f32>([x, w, b], &dy),
        }
    }
}

//! A residual sum and the norm that follows it, in one pass.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, D, DType, Layout, Result, Shape, Tensor, bail};
use half::{bf16, f16};

use super::filled::filled;
use super::real::{self, Real};
use super::stored::{Rows, Stored, with_rows, with_stored};
use super::{Backend, Path, layer_norm, rms_norm};

/// Rows handled by one task.
const ROWS: usize = 64;

/// A residual sum and its RMSNorm: `(s, y)`.
///
/// ```text
/// x, residual: (.., d)    w: (d)
/// s = x + residual    y = rms_norm(s, w)
/// dx = dresidual = ds + what y gives to s
/// ```
///
/// The same values as `x + residual` and [`rms_norm`](super::rms_norm()), without reading the sum again. Saves the
/// sum, once for both, and `w`: not `x` and not `residual`. Both inputs get the same gradient, in the same memory.
/// Computed in f32 for f32, bf16 and f16 (the sum rounded to the dtype before it is normalised), in f64 for f64.
///
/// # Errors
/// Two different shapes or dtypes, or what [`rms_norm`](super::rms_norm()) refuses.
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor};
/// use vesper_model::ops::{Path, residual_rms_norm};
/// let x = Tensor::new(&[[1f32, 3.]], &Device::Cpu)?;
/// let residual = Tensor::new(&[[2f32, 1.]], &Device::Cpu)?;
/// let w = Tensor::new(&[1f32, 1.], &Device::Cpu)?;
/// let (sum, y) = residual_rms_norm(&x, &residual, &w, 0.0, Path::Fused)?;
/// assert_eq!(sum.to_vec2::<f32>()?, [[3., 4.]]);
/// assert!((y.to_vec2::<f32>()?[0][0] - 3.0 / 12.5f32.sqrt()).abs() < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn residual_rms_norm(
    x: &Tensor,
    residual: &Tensor,
    w: &Tensor,
    eps: f64,
    path: Path,
) -> Result<(Tensor, Tensor)> {
    check_pair("residual_rms_norm", x, residual)?;
    rms_norm::check("residual_rms_norm", x, w)?;
    match path.backend(x) {
        Backend::Cpu => {}
        #[cfg(feature = "cuda")]
        Backend::Cuda => {
            let w = w.to_dtype(x.dtype())?;
            let norm = Norm::Rms { w: w.detach() };
            return super::cuda::residual::residual_norm(x, residual, &w, None, norm, eps);
        }
        Backend::Reference => {
            let sum = (x + residual)?;
            let y = rms_norm(&sum, w, eps, path)?;
            return Ok((sum, y));
        }
    }
    fused_rms_norm(x, residual, w, eps)
}

/// As [`residual_rms_norm`] on the CPU; the residual may be in the type of the computation, and is rounded as it is read.
pub(super) fn fused_rms_norm(
    x: &Tensor,
    residual: &Tensor,
    w: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    let (normed, norm) = (Normed::default(), Norm::Rms { w: w.detach().contiguous()? });
    let sum = x
        .contiguous()?
        .apply_op2(&residual.contiguous()?, ResidualSum { norm, eps, normed: normed.clone() })?;
    let y = rms_norm::fused(&sum, w, eps, normed)?;
    Ok((sum, y))
}

/// A residual sum and its LayerNorm: `(s, y)`.
///
/// ```text
/// x, residual: (.., d)    w, b: (d)
/// s = x + residual    y = layer_norm(s, w, b)
/// dx = dresidual = ds + what y gives to s
/// ```
///
/// As [`residual_rms_norm`], with the norm of [`layer_norm`](super::layer_norm()).
///
/// # Errors
/// Two different shapes or dtypes, or what [`layer_norm`](super::layer_norm()) refuses.
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor};
/// use vesper_model::ops::{Path, residual_layer_norm};
/// let x = Tensor::new(&[[1f32, 3.]], &Device::Cpu)?;
/// let residual = Tensor::new(&[[2f32, 2.]], &Device::Cpu)?;
/// let w = Tensor::new(&[1f32, 2.], &Device::Cpu)?;
/// let (sum, y) = residual_layer_norm(&x, &residual, &w, None, 0.0, Path::Fused)?;
/// assert_eq!(sum.to_vec2::<f32>()?, [[3., 5.]]);
/// assert_eq!(y.to_vec2::<f32>()?, [[-1., 2.]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn residual_layer_norm(
    x: &Tensor,
    residual: &Tensor,
    w: &Tensor,
    b: Option<&Tensor>,
    eps: f64,
    path: Path,
) -> Result<(Tensor, Tensor)> {
    check_pair("residual_layer_norm", x, residual)?;
    layer_norm::check("residual_layer_norm", x, w, b)?;
    let backend = path.backend(x);
    if backend == Backend::Reference {
        let sum = (x + residual)?;
        let y = layer_norm(&sum, w, b, eps, path)?;
        return Ok((sum, y));
    }
    let b = match b {
        Some(b) => b.contiguous()?,
        None => w.detach().zeros_like()?.contiguous()?,
    };
    #[cfg(feature = "cuda")]
    if backend == Backend::Cuda {
        let (w, b) = (w.to_dtype(x.dtype())?, b.to_dtype(x.dtype())?);
        let norm = Norm::Layer { w: w.detach(), b: b.detach() };
        return super::cuda::residual::residual_norm(x, residual, &w, Some(&b), norm, eps);
    }
    let normed = Normed::default();
    let norm = Norm::Layer { w: w.detach().contiguous()?, b: b.detach() };
    let sum = x
        .contiguous()?
        .apply_op2(&residual.contiguous()?, ResidualSum { norm, eps, normed: normed.clone() })?;
    let y = layer_norm::fused(&sum, w, Some(&b), eps, normed)?;
    Ok((sum, y))
}

/// `x + y` of contiguous tensors of one shape on the CPU, without a graph; y is in x's dtype or as in [`fused_rms_norm`].
pub(super) fn sum(x: &Tensor, y: &Tensor) -> Result<CpuStorage> {
    fn of<E: Stored>(x: &Tensor, y: &Tensor) -> Result<CpuStorage> {
        let d = x.dim(D::Minus1)?;
        let sum = |x: &[E], y: Rows<'_, E>| {
            filled(x.len(), ROWS * d, |range, [sums]| {
                let mut rooms = [(); 3].map(|()| vec![E::Real::ZERO; d]);
                real::simd(
                    #[inline(always)]
                    || {
                        for (start, sum) in range.step_by(d).zip(sums.chunks_exact_mut(d)) {
                            add(x, y, start..start + d, sum, &mut rooms);
                        }
                    },
                );
            })
        };
        let ([sum], _) = with_stored(x, |x| with_rows(y, |y| Ok(sum(x, y))))?;
        Ok(E::to_cpu_storage_owned(sum))
    }
    match x.dtype() {
        DType::F64 => of::<f64>(x, y),
        DType::BF16 => of::<bf16>(x, y),
        DType::F16 => of::<f16>(x, y),
        _ => of::<f32>(x, y),
    }
}

/// The sum of a row.
#[inline(always)]
fn add<E: Stored>(
    x: &[E],
    y: Rows<'_, E>,
    row: Range<usize>,
    sum: &mut [E],
    [of_x, of_y, of_sum]: &mut [Vec<E::Real>; 3],
) {
    let (x, y) = (E::read(&x[row.clone()], of_x), y.read(row, of_y));
    E::write(
        sum,
        of_sum,
        #[inline(always)]
        |sum| {
            for ((sum, &x), &y) in sum.iter_mut().zip(x).zip(y) {
                *sum = x + y;
            }
        },
    );
}

fn check_pair(name: &str, x: &Tensor, residual: &Tensor) -> Result<()> {
    if x.shape() != residual.shape() {
        bail!("{name}: x of shape {:?} and a residual of shape {:?}", x.shape(), residual.shape());
    }
    if x.dtype() != residual.dtype() {
        bail!("{name}: x is {:?} and the residual {:?}", x.dtype(), residual.dtype());
    }
    Ok(())
}

/// The norm that the pass over the sum has computed, for the norm's own node of the graph to take.
pub(super) struct Normed<S>(Arc<Mutex<Option<S>>>);

impl<S> Clone for Normed<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<S> Default for Normed<S> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<S> Normed<S> {
    pub(super) fn put(&self, y: S) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(y);
    }

    pub(super) fn take(&self) -> Option<S> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A norm and its parameters, without gradients.
pub(super) enum Norm {
    Rms { w: Tensor },
    Layer { w: Tensor, b: Tensor },
}

/// The sum, with the norm on the way.
struct ResidualSum {
    norm: Norm,
    eps: f64,
    normed: Normed<CpuStorage>,
}

impl ResidualSum {
    fn run<E: Stored>(
        &self,
        (x, lx): (&CpuStorage, &Layout),
        (residual, lr): (&CpuStorage, &Layout),
    ) -> Result<(CpuStorage, Shape)> {
        let (x, residual) = (E::of(x, lx)?, Rows::of(residual, lr)?);
        let d = lx.shape().dims().last().copied().unwrap_or(0);
        let eps = E::Real::of(self.eps);
        let [sum, y] = match &self.norm {
            Norm::Rms { w } => real::with_values(w, |w| {
                Ok(rows(
                    x,
                    residual,
                    d,
                    #[inline(always)]
                    |s, y| rms_norm::row(s, w, y, eps),
                ))
            })?,
            Norm::Layer { w, b } => real::with_values(w, |w| {
                real::with_values(b, |b| {
                    Ok(rows(
                        x,
                        residual,
                        d,
                        #[inline(always)]
                        |s, y| layer_norm::row(s, w, b, y, eps),
                    ))
                })
            })?,
        };
        self.normed.put(E::to_cpu_storage_owned(y));
        Ok((E::to_cpu_storage_owned(sum), lx.shape().clone()))
    }
}

/// The sums of rows of `d`, and `norm(sum, y)` of each one as it is stored.
fn rows<E: Stored>(
    x: &[E],
    residual: Rows<'_, E>,
    d: usize,
    norm: impl Fn(&[E::Real], &mut [E::Real]) + Sync,
) -> [Vec<E>; 2] {
    let (sums, _) = filled(x.len(), ROWS * d, |range, [sums, ys]| {
        let mut rooms = [(); 3].map(|()| vec![E::Real::ZERO; d]);
        real::simd(
            #[inline(always)]
            || {
                let outputs = sums.chunks_exact_mut(d).zip(ys.chunks_exact_mut(d));
                for (start, (sum, y)) in range.step_by(d).zip(outputs) {
                    add(x, residual, start..start + d, sum, &mut rooms);
                    let [of_sum, of_y, _] = &mut rooms;
                    let sum = E::read(sum, of_sum);
                    E::write(
                        y,
                        of_y,
                        #[inline(always)]
                        |y| norm(sum, y),
                    );
                }
            },
        );
    });
    sums
}

impl CustomOp2 for ResidualSum {
    fn name(&self) -> &'static str {
        "vesper-residual-sum"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        residual: &CpuStorage,
        lr: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        match x {
            CpuStorage::F64(_) => self.run::<f64>((x, lx), (residual, lr)),
            CpuStorage::BF16(_) => self.run::<bf16>((x, lx), (residual, lr)),
            CpuStorage::F16(_) => self.run::<f16>((x, lx), (residual, lr)),
            _ => self.run::<f32>((x, lx), (residual, lr)),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        residual: &Tensor,
        _sum: &Tensor,
        dsum: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let gradient = |input: &Tensor| input.track_op().then(|| dsum.clone());
        Ok((gradient(x), gradient(residual)))
    }
}

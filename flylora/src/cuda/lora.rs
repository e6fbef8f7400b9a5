//! LoRA on CUDA: what of it is done by the kernels for few ranks.
//!
//! With `h = x A^T` and `g = dy B`, both (rows, r), the gradients are `dA = scale g^T x` and `dB = scale dy^T h`: x and dy
//! are read twice each, or once by a kernel that has both at hand, and nothing of the size of the weight is made.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::op::Add;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp3, DType, Layout, Result, Shape, Tensor};

use super::launch::{Held, aligned, not_here, tensor};
use super::onto::{Way, add_product, takes};
use super::skinny;
use super::skinny::{
    Base, Factor, MOST_RANKS, Side, back, dot, expand, expand_times, expanded, outer, project,
};
use super::sweep::sweep;
use crate::FrozenLinear;
use crate::frozen::{Frozen, rows, with_last};

/// Whether there are kernels for x, and for a rank.
pub(crate) fn has_kernels(x: &Tensor, r: usize) -> bool {
    x.device().is_cuda()
        && matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16)
        && (1..=MOST_RANKS).contains(&r)
        && x.elem_count() > 0
}

/// `W + scale B A` for a weight (out, in), a (r, in) and b (out, r), all f32 and outside of any graph.
pub(crate) fn effective(weight: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let (weight, a, b) = (aligned(weight)?, aligned(a)?, aligned(b)?);
    let (from, held) = (Held::new(&weight), Held::new(&a));
    let (storage, layout) = from.parts()?;
    let factor = Factor { parts: held.parts()?, side: Side::Ranks };
    let sum = expanded(storage, &Base::Other(storage, layout), &b, factor, scale)?;
    Ok(tensor(sum, weight.shape()))
}

/// `dA` (r, in) and `dB` (out, r) for x (m, in) and dy (m, out); a, b and both results f32.
pub(crate) fn gradients(
    (x, dy): (&Tensor, &Tensor),
    (a, b): (&Tensor, &Tensor),
    scale: f64,
) -> Result<(Tensor, Tensor)> {
    let (x, dy, a, b) = (aligned(x)?, aligned(dy)?, aligned(a)?, aligned(b)?);
    if x.dtype() == DType::F32
        && let Some(both) = sweep(&x, &dy, &a, &b, scale)?
    {
        return Ok(both);
    }
    let (m, inputs) = x.dims2()?;
    let outputs = dy.dim(1)?;
    let (xs, ds, fa, fb) = (Held::new(&x), Held::new(&dy), Held::new(&a), Held::new(&b));
    let low = project(xs.parts()?, m, Factor { parts: fa.parts()?, side: Side::Ranks }, None, 1.0)?;
    let factor = Factor { parts: fb.parts()?, side: Side::Columns };
    let (back, db) = of_dy(&ds, (m, outputs), &low, factor, scale)?;
    let da = outer(xs.parts()?, &back, inputs, Side::Ranks, scale)?;
    Ok((da, db))
}

/// `g = dy B` (m, r) and `dB = scale dy^T h` (out, r) for dy (m, out), h (m, r) and a factor that lies as `B`.
fn of_dy(
    dy: &Held<'_>,
    (m, outputs): (usize, usize),
    low: &Tensor,
    factor: Factor<'_>,
    scale: f64,
) -> Result<(Tensor, Tensor)> {
    if let Some(both) = back(dy.parts()?, low, factor, scale)? {
        return Ok(both);
    }
    let g = project(dy.parts()?, m, factor, None, 1.0)?;
    Ok((g, outer(dy.parts()?, low, outputs, Side::Columns, scale)?))
}

/// The norms of the rows of `W + scale B A`, from the squares of those of `W` (out), outside of any graph: (out); `None` where
/// there is no kernel for that. a (r, in), b (out, r).
pub(crate) fn norms(
    base: &FrozenLinear,
    a: &Tensor,
    b: &Tensor,
    squares: &Tensor,
    scale: f64,
) -> Result<Option<Tensor>> {
    if base.quantized_weight().is_some() || a.dtype() != DType::F32 {
        return Ok(None);
    }
    let weight = base.weight()?;
    if !has_kernels(&weight, a.dim(0)?) || !weight.is_contiguous() {
        return Ok(None);
    }
    skinny::norms(&aligned(&weight)?, &aligned(a)?, &aligned(b)?, &aligned(squares)?, scale).map(Some)
}

/// Two layers added up for x (..., in), `x (W + V)^T + bias`, for V (out, in) in the dtype of x, bf16 or f32.
pub(crate) fn both_layers(
    base: &FrozenLinear,
    other: &Tensor,
    x: &CudaStorage,
    lx: &Layout,
) -> Result<(CudaStorage, Shape)> {
    let (mut y, shape) = Frozen(base.clone()).cuda_fwd(x, lx)?;
    add_product(&mut y, (x, lx), rows(lx.shape()), other, Way::Forward)?;
    Ok((y, shape))
}

/// The way back, `dy (W + V)`, for dy (m, out): (m, in).
pub(crate) fn both_back(base: &FrozenLinear, other: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let (weight, dy) = (base.weight()?, aligned(dy)?);
    let (held, weight) = (Held::new(&dy), Held::new(&weight));
    let ((dy, ldy), (weight, lw)) = (held.parts()?, weight.parts()?);
    let ((m, outputs), (_, inputs)) = (ldy.shape().dims2()?, lw.shape().dims2()?);
    let mut dx = dy.matmul(weight, (1, m, inputs, outputs), ldy, lw)?;
    add_product(&mut dx, (dy, ldy), m, other, Way::Backward)?;
    Ok(tensor(dx, (m, inputs)))
}

/// The sum over the rows of `a * b`, both (m, n) of one dtype: (n, 1), f32.
pub(crate) fn products_of_columns(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (a, b, size) = (aligned(a)?, aligned(b)?, a.dims2()?);
    let (held_a, held_b) = (Held::new(&a), Held::new(&b));
    dot(held_a.parts()?, held_b.parts()?, size)
}

/// The layer with its change: `W x + bias + scale B (A x)`, each half in the precision that is its own: the products with
/// the weight in the dtype of x, those with a and b in f32, added before the one rounding of the sum.
///
/// x: (..., in), of the weight's dtype; a: (r, in), b: (out, r). With a ratio (out, 1), each column of the result is
/// multiplied by its number, and the layer must have no bias; the ratio has no zeros.
pub(crate) fn beside(
    base: &FrozenLinear,
    x: &Tensor,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
    ratio: Option<&Tensor>,
) -> Result<Tensor> {
    change(Some(base), x, a, b, scale, ratio)
}

/// The change without its layer: `scale B (A x)` in the dtype of x, with sums in f32.
pub(crate) fn alone(x: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    change(None, x, a, b, scale, None)
}

fn change(
    base: Option<&FrozenLinear>,
    x: &Tensor,
    a: &Tensor,
    b: &Tensor,
    scale: f64,
    ratio: Option<&Tensor>,
) -> Result<Tensor> {
    let b = match ratio {
        None => b.clone(),
        Some(ratio) => Tensor::cat(&[&b.to_dtype(DType::F32)?, &ratio.to_dtype(DType::F32)?], 1)?, // an operation takes three tensors
    };
    let (a, b) = (aligned(&a.to_dtype(DType::F32)?)?, aligned(&b.to_dtype(DType::F32)?)?);
    let tracked = x.track_op() || a.track_op() || b.track_op();
    let own = match ratio {
        None => None,
        Some(_) => Some(Own::new(&b.detach())?),
    };
    let op = Change { base: base.cloned(), scale, tracked, low: Arc::default(), own };
    aligned(x)?.apply_op3(&a, &b, op)
}

/// The parts of B with its ratio beside it, outside of any graph.
struct Own {
    /// (out, r)
    b: Tensor,
    /// (out, 1)
    ratio: Tensor,
}

impl Own {
    fn new(both: &Tensor) -> Result<Self> {
        let r = both.dim(1)? - 1;
        let part = |start, n| both.narrow(1, start, n)?.contiguous();
        Ok(Self { b: part(0, r)?, ratio: part(r, 1)? })
    }
}

struct Change {
    base: Option<FrozenLinear>,
    scale: f64,
    tracked: bool,
    /// `x A^T`, for the backward pass.
    low: Arc<Mutex<Option<Tensor>>>,
    /// Where there is a ratio.
    own: Option<Own>,
}

impl CustomOp3 for Change {
    fn name(&self) -> &'static str {
        "lora-change-cuda"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        not_here(self.name())
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        a: &CudaStorage,
        la: &Layout,
        b: &CudaStorage,
        lb: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let low =
            project((x, lx), rows(lx.shape()), Factor { parts: (a, la), side: Side::Ranks }, None, 1.0)?;
        let factor = Factor { parts: (b, lb), side: Side::Columns };
        let (y, shape) = match (&self.base, &self.own) {
            (Some(base), None) => with_change(base, (x, lx), &low, factor, self.scale)?,
            (Some(base), Some(own)) => {
                let (mut y, shape) = Frozen(base.clone()).cuda_fwd(x, lx)?;
                let held = Held::new(&own.b);
                let factor = Factor { parts: held.parts()?, side: Side::Columns };
                expand_times(&mut y, &Base::Output, &low, factor, self.scale, Some(&own.ratio))?;
                (y, shape)
            }
            (None, _) => {
                let y = expanded(x, &Base::Nothing, &low, factor, self.scale)?;
                (y, with_last(lx.shape(), lb.shape().dims2()?.0).into())
            }
        };
        if self.tracked {
            *self.low.lock().unwrap_or_else(PoisonError::into_inner) = Some(low);
        }
        Ok((y, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (m, (outputs, _), (_, inputs)) = (rows(x.shape()), b.dims2()?, a.dims2()?);
        // As if the ratio stood in B, and below in the weight.
        let scaled = match &self.own {
            None => b.clone(),
            Some(own) => own.b.broadcast_mul(&own.ratio)?,
        };
        let dy = aligned(&dy.detach())?.reshape((m, outputs))?;
        let flat = x.detach().reshape((m, inputs))?;
        let low = self.low.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (xs, ds, fa, fb) = (Held::new(&flat), Held::new(&dy), Held::new(a), Held::new(&scaled));
        let (fa, fb) = (
            Factor { parts: fa.parts()?, side: Side::Ranks },
            Factor { parts: fb.parts()?, side: Side::Columns },
        );
        let low = match low {
            Some(low) => low,
            None => project(xs.parts()?, m, fa, None, 1.0)?,
        };
        let (back, db) = of_dy(&ds, (m, outputs), &low, fb, self.scale)?;
        let da = outer(xs.parts()?, &back, inputs, Side::Ranks, self.scale)?;
        let dx = if x.track_op() {
            let dx = match &self.base {
                Some(base) => {
                    let base = match &self.own {
                        None => base.clone(),
                        Some(own) => {
                            let weight = base.weight()?.to_dtype(DType::F32)?;
                            base.with_weight(&weight.broadcast_mul(&own.ratio)?)?
                        }
                    };
                    through(&base, &ds, m, &back, fa, self.scale)?
                }
                None => expanded(ds.storage()?, &Base::Nothing, &back, fa, self.scale)?,
            };
            Some(tensor(dx, x.shape()))
        } else {
            None
        };
        let Some(own) = &self.own else { return Ok((dx, Some(da), Some(db))) };
        let of_ratio = products_of_columns(&dy, &y.detach().reshape((m, outputs))?)?.div(&own.ratio)?;
        let db = Tensor::cat(&[&db.broadcast_mul(&own.ratio)?, &of_ratio], 1)?;
        Ok((dx, Some(da), Some(db)))
    }
}

/// The layer and its low-rank change, `W x + bias + scale h M`, for h (rows, r).
pub(super) fn with_change(
    base: &FrozenLinear,
    (x, lx): (&CudaStorage, &Layout),
    low: &Tensor,
    factor: Factor<'_>,
    scale: f64,
) -> Result<(CudaStorage, Shape)> {
    let weight = base.weight()?;
    if !takes(&weight) {
        let (mut y, shape) = Frozen(base.clone()).cuda_fwd(x, lx)?;
        expand(&mut y, &Base::Output, low, factor, scale)?;
        return Ok((y, shape));
    }
    let (m, n) = (rows(lx.shape()), base.out_features());
    let mut y = expanded(x, &Base::Nothing, low, factor, scale)?;
    add_product(&mut y, (x, lx), m, &weight, Way::Forward)?;
    if let Some(bias) = base.bias() {
        let held = Held::new(bias);
        let (bias, layout) = held.parts()?;
        y = y.binary_impl::<Add>(bias, &Layout::contiguous((m, n)), &layout.broadcast_as((m, n))?)?;
    }
    Ok((y, with_last(lx.shape(), n).into()))
}

/// The way back, `dy W + scale g M`, for dy (m, out) and g (m, r): (m, in).
pub(super) fn through(
    base: &FrozenLinear,
    dy: &Held<'_>,
    m: usize,
    back: &Tensor,
    factor: Factor<'_>,
    scale: f64,
) -> Result<CudaStorage> {
    let weight = base.weight()?;
    if takes(&weight) {
        let mut dx = expanded(dy.storage()?, &Base::Nothing, back, factor, scale)?;
        add_product(&mut dx, dy.parts()?, m, &weight, Way::Backward)?;
        return Ok(dx);
    }
    let weight = Held::new(&weight);
    let ((dy, ldy), (weight, lw)) = (dy.parts()?, weight.parts()?);
    let (outputs, inputs) = lw.shape().dims2()?;
    let flat = Layout::contiguous_with_offset((m, outputs), ldy.start_offset());
    let mut dx = dy.matmul(weight, (1, m, inputs, outputs), &flat, lw)?;
    expand(&mut dx, &Base::Output, back, factor, scale)?;
    Ok(dx)
}

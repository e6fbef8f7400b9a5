//! LoRA on CUDA: what of it is done by the kernels for few ranks.
//!
//! With `h = x A^T` and `g = dy B`, both (rows, r), the gradients are `dA = scale g^T x` and `dB = scale dy^T h`: nothing of
//! the size of the weight is made. x and dy are read once for both gradients in f32, which makes h and g too (`sweep`), and in
//! bf16 (`pair`); h and g come with the frozen products in bf16 on Hopper (`layer`).

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::op::Add;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp3, DType, Layout, Result, Shape, Tensor};

use super::launch::{Held, aligned, not_here, tensor};
use super::layer::{Columns, Low, Used, layer};
use super::onto::{Way, add_product, comes_second};
use super::skinny::{Base, Factor, MOST_RANKS, Side, dot, expand, expand_times, expanded, outer, project};
use super::sweep::sweep;
use super::{pair, skinny};
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
    skinny::effective(&aligned(weight)?, &aligned(a)?, &aligned(b)?, scale)
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
    let back = project(ds.parts()?, m, Factor { parts: fb.parts()?, side: Side::Columns }, None, 1.0)?;
    both_outer((&xs, inputs, &back), (&ds, outputs, &low), scale)
}

/// `dA = scale g^T x` (r, in) and `dB = scale dy^T h` (out, r) for x (m, in), dy (m, out), g and h (m, r).
fn both_outer(
    (x, inputs, back): (&Held<'_>, usize, &Tensor),
    (dy, outputs, low): (&Held<'_>, usize, &Tensor),
    scale: f64,
) -> Result<(Tensor, Tensor)> {
    if pair::takes(x.storage()?.dtype()) {
        return pair::pair(x.parts()?, back, dy.parts()?, low, scale);
    }
    let da = outer(x.parts()?, back, inputs, Side::Ranks, scale)?;
    Ok((da, outer(dy.parts()?, low, outputs, Side::Columns, scale)?))
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
        // Of one output the parts are contiguous where they stand, the second at any place.
        let part = |start, n| aligned(&both.narrow(1, start, n)?);
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
        let (y, shape, low) = self.forward((x, lx), (a, la), (b, lb))?;
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
        let (back, dx) = if x.track_op() {
            let (back, dx) = self.back(&ds, m, fa, fb)?;
            (back, Some(tensor(dx, x.shape())))
        } else {
            (project(ds.parts()?, m, fb, None, 1.0)?, None)
        };
        let (da, db) = both_outer((&xs, inputs, &back), (&ds, outputs, &low), self.scale)?;
        let Some(own) = &self.own else { return Ok((dx, Some(da), Some(db))) };
        let of_ratio = products_of_columns(&dy, &y.detach().reshape((m, outputs))?)?.div(&own.ratio)?;
        let db = Tensor::cat(&[&db.broadcast_mul(&own.ratio)?, &of_ratio], 1)?;
        Ok((dx, Some(da), Some(db)))
    }
}

impl Change {
    /// y, its shape, and `h = x A^T`.
    fn forward(
        &self,
        (x, lx): (&CudaStorage, &Layout),
        a: (&CudaStorage, &Layout),
        (b, lb): (&CudaStorage, &Layout),
    ) -> Result<(CudaStorage, Shape, Tensor)> {
        let (m, a) = (rows(lx.shape()), Factor { parts: a, side: Side::Ranks });
        let held = self.own.as_ref().map(|own| Held::new(&own.b));
        let parts = held.as_ref().map_or(Ok((b, lb)), Held::parts)?;
        let factor = Factor { parts, side: Side::Columns };
        if let Some(base) = &self.base {
            let columns = Columns { bias: base.bias(), ratio: self.own.as_ref().map(|own| &own.ratio) };
            let weight = (&base.weight()?, Way::Forward);
            if let Some((y, low)) =
                layer((x, lx), m, weight, Low::Of(a, Used::All), factor, self.scale, columns)?
            {
                return Ok((y, with_last(lx.shape(), base.out_features()).into(), low));
            }
        }
        let low = project((x, lx), m, a, None, 1.0)?;
        let (y, shape) = match (&self.base, &self.own) {
            (Some(base), None) => with_change(base, (x, lx), &low, factor, self.scale)?,
            (Some(base), Some(own)) => {
                let (mut y, shape) = Frozen(base.clone()).cuda_fwd(x, lx)?;
                expand_times(&mut y, Base::Output, &low, factor, self.scale, Some(&own.ratio))?;
                (y, shape)
            }
            (None, _) => {
                let y = expanded(x, Base::Nothing, &low, factor, self.scale)?;
                (y, with_last(lx.shape(), lb.shape().dims2()?.0).into())
            }
        };
        Ok((y, shape, low))
    }

    /// `g = dy B` (m, r) and the gradient of x, for dy (m, out), with a and b by ranks and by columns.
    fn back(&self, dy: &Held<'_>, m: usize, a: Factor<'_>, b: Factor<'_>) -> Result<(Tensor, CudaStorage)> {
        let Some(base) = &self.base else {
            let back = project(dy.parts()?, m, b, None, 1.0)?;
            let dx = expanded(dy.storage()?, Base::Nothing, &back, a, self.scale)?;
            return Ok((back, dx));
        };
        let base = match &self.own {
            None => base.clone(),
            Some(own) => {
                let weight = base.weight()?.to_dtype(DType::F32)?;
                base.with_weight(&weight.broadcast_mul(&own.ratio)?)?
            }
        };
        let weight = (&base.weight()?, Way::Backward);
        let both = layer(dy.parts()?, m, weight, Low::Of(b, Used::All), a, self.scale, Columns::default())?;
        if let Some((dx, back)) = both {
            return Ok((back, dx));
        }
        let back = project(dy.parts()?, m, b, None, 1.0)?;
        let dx = through(&base, dy, m, &back, a, self.scale)?;
        Ok((back, dx))
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
    let columns = Columns { bias: base.bias(), ratio: None };
    let way = (&weight, Way::Forward);
    if let Some((y, _)) = layer((x, lx), rows(lx.shape()), way, Low::Given(low), factor, scale, columns)? {
        return Ok((y, with_last(lx.shape(), base.out_features()).into()));
    }
    if !comes_second(&weight) {
        let (mut y, shape) = Frozen(base.clone()).cuda_fwd(x, lx)?;
        expand(&mut y, Base::Output, low, factor, scale)?;
        return Ok((y, shape));
    }
    let (m, n) = (rows(lx.shape()), base.out_features());
    let mut y = expanded(x, Base::Nothing, low, factor, scale)?;
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
    let way = (&weight, Way::Backward);
    let columns = Columns::default();
    if let Some((dx, _)) = layer(dy.parts()?, m, way, Low::Given(back), factor, scale, columns)? {
        return Ok(dx);
    }
    if comes_second(&weight) {
        let mut dx = expanded(dy.storage()?, Base::Nothing, back, factor, scale)?;
        add_product(&mut dx, dy.parts()?, m, &weight, Way::Backward)?;
        return Ok(dx);
    }
    let weight = Held::new(&weight);
    let ((dy, ldy), (weight, lw)) = (dy.parts()?, weight.parts()?);
    let (outputs, inputs) = lw.shape().dims2()?;
    let flat = Layout::contiguous_with_offset((m, outputs), ldy.start_offset());
    let mut dx = dy.matmul(weight, (1, m, inputs, outputs), &flat, lw)?;
    expand(&mut dx, Base::Output, back, factor, scale)?;
    Ok(dx)
}

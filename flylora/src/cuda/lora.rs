//! LoRA on CUDA: what of it is done by the kernels for few ranks.
//!
//! With `h = x A^T` and `g = dy B`, both (rows, r), the gradients are `dA = scale g^T x` and `dB = scale dy^T h`: x and dy
//! are read twice each, and nothing of the size of the weight is made.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp3, DType, Layout, Result, Shape, Tensor};

use super::launch::{Held, aligned, not_here, tensor};
use super::skinny::{Base, Factor, MOST_RANKS, Side, expand, expanded, outer, project};
use crate::FrozenLinear;
use crate::frozen::{Frozen, rows};

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

/// `dA` (r, in) and `dB` (out, r) for x (m, in) and dy (m, out); a, b and both results f32. `low`: `x A^T`, where it is
/// there already.
pub(crate) fn gradients(
    (x, dy): (&Tensor, &Tensor),
    (a, b): (&Tensor, &Tensor),
    low: Option<Tensor>,
    scale: f64,
) -> Result<(Tensor, Tensor)> {
    let (x, dy, a, b) = (aligned(x)?, aligned(dy)?, aligned(a)?, aligned(b)?);
    let (m, inputs) = x.dims2()?;
    let outputs = dy.dim(1)?;
    let (xs, ds, fa, fb) = (Held::new(&x), Held::new(&dy), Held::new(&a), Held::new(&b));
    let low = match low {
        Some(low) => low,
        None => project(xs.parts()?, m, Factor { parts: fa.parts()?, side: Side::Ranks }, None, 1.0)?,
    };
    let db = outer(ds.parts()?, &low, outputs, Side::Columns, scale)?;
    let back = project(ds.parts()?, m, Factor { parts: fb.parts()?, side: Side::Columns }, None, 1.0)?;
    let da = outer(xs.parts()?, &back, inputs, Side::Ranks, scale)?;
    Ok((da, db))
}

/// The layer with its change: `W x + bias + scale B (A x)`, each half in the precision that is its own: the products with
/// the weight in the dtype of x, those with a and b in f32, added before the one rounding of the sum.
///
/// x: (..., in), of the weight's dtype; a: (r, in), b: (out, r).
pub(crate) fn beside(base: &FrozenLinear, x: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let (a, b) = (aligned(&a.to_dtype(DType::F32)?)?, aligned(&b.to_dtype(DType::F32)?)?);
    let tracked = x.track_op() || a.track_op() || b.track_op();
    let op = Beside { base: base.clone(), scale, tracked, low: Arc::default() };
    aligned(x)?.apply_op3(&a, &b, op)
}

struct Beside {
    base: FrozenLinear,
    scale: f64,
    tracked: bool,
    /// `x A^T`, for the backward pass.
    low: Arc<Mutex<Option<Tensor>>>,
}

impl CustomOp3 for Beside {
    fn name(&self) -> &'static str {
        "lora-beside-cuda"
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
        let (mut y, shape) = Frozen(self.base.clone()).cuda_fwd(x, lx)?;
        let low =
            project((x, lx), rows(lx.shape()), Factor { parts: (a, la), side: Side::Ranks }, None, 1.0)?;
        let factor = Factor { parts: (b, lb), side: Side::Columns };
        expand(&mut y, &Base::Output, &low, factor, self.scale)?;
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
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let m = rows(x.shape());
        let dy = aligned(&dy.detach())?.reshape((m, self.base.out_features()))?;
        let flat = x.detach().reshape((m, self.base.in_features()))?;
        let low = self.low.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (xs, ds, fa, fb) = (Held::new(&flat), Held::new(&dy), Held::new(a), Held::new(b));
        let (fa, fb) = (
            Factor { parts: fa.parts()?, side: Side::Ranks },
            Factor { parts: fb.parts()?, side: Side::Columns },
        );
        let low = match low {
            Some(low) => low,
            None => project(xs.parts()?, m, fa, None, 1.0)?,
        };
        let back = project(ds.parts()?, m, fb, None, 1.0)?;
        let db = outer(ds.parts()?, &low, self.base.out_features(), Side::Columns, self.scale)?;
        let da = outer(xs.parts()?, &back, self.base.in_features(), Side::Ranks, self.scale)?;
        let dx = if x.track_op() {
            let mut dx = through(&self.base, &ds, m)?;
            expand(&mut dx, &Base::Output, &back, fa, self.scale)?;
            Some(tensor(dx, x.shape()))
        } else {
            None
        };
        Ok((dx, Some(da), Some(db)))
    }
}

/// `dy W` for dy (m, out): (m, in).
pub(super) fn through(base: &FrozenLinear, dy: &Held<'_>, m: usize) -> Result<CudaStorage> {
    let weight = base.weight()?;
    let weight = Held::new(&weight);
    let ((dy, ldy), (weight, lw)) = (dy.parts()?, weight.parts()?);
    let (outputs, inputs) = lw.shape().dims2()?;
    let flat = Layout::contiguous_with_offset((m, outputs), ldy.start_offset());
    dy.matmul(weight, (1, m, inputs, outputs), &flat, lw)
}

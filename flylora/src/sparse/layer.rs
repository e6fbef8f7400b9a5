//! A frozen layer with its routed change as one operation on the CPU, so that the two are added in place: as operations of
//! their own they would take several tensors of the output's size more, forward and backward.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, Device, InplaceOp2, Layout, Result, Shape, Tensor, bail,
};

use super::cpu::{self, Float};
use super::ops::{BackB, BackY, slice};
use super::{Selection, SparseMatrix};
use crate::FrozenLinear;
use crate::frozen::{Frozen, rows};

/// Chooses the ranks of each row from `y = A x`: (m, r).
pub(crate) type Route = dyn Fn(&[f32]) -> Selection + Send + Sync;

/// `W x + bias + scale B (y of the chosen ranks)` for x (..., in) on the CPU, and how it chose. x, b (out, r) and the layer
/// are all f32, or all f64.
pub(crate) fn routed_layer(
    base: &FrozenLinear,
    x: &Tensor,
    b: &Tensor,
    sparse: Arc<SparseMatrix>,
    scale: f64,
    route: Box<Route>,
) -> Result<(Tensor, Arc<Selection>)> {
    let kept = Arc::new(Mutex::new(None));
    let op = Layer { base: base.clone(), sparse, scale, route, kept: Arc::clone(&kept) };
    let y = x.contiguous()?.apply_op2(&b.contiguous()?, op)?;
    let kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
    match kept.as_ref() {
        Some(Kept { selection, .. }) => Ok((y, Arc::clone(selection))),
        None => bail!("routed-layer: nothing was routed"),
    }
}

struct Layer {
    base: FrozenLinear,
    sparse: Arc<SparseMatrix>,
    scale: f64,
    route: Box<Route>,
    kept: Arc<Mutex<Option<Kept>>>,
}

/// What the backward pass needs.
struct Kept {
    selection: Arc<Selection>,
    /// `scale A x`: (m, r)
    low: Tensor,
}

impl Layer {
    /// Adds the change to y: (m, out).
    fn change<T: Float>(&self, x: &[T], b: &[T], y: &mut [T]) -> Result<Kept> {
        let mut low = cpu::project(x, &self.sparse);
        let selection = (self.route)(&low.iter().map(|v| v.to_f64() as f32).collect::<Vec<f32>>());
        let scale = T::from_f64(self.scale);
        for value in &mut low {
            *value *= scale;
        }
        let (r, k, out) = (selection.r, selection.k, self.base.out_features());
        cpu::routed(y, &low, &cpu::transpose(b, out, r), &selection.chosen, (r, k, out));
        let m = low.len() / r.max(1);
        Ok(Kept { selection: Arc::new(selection), low: Tensor::from_vec(low, (m, r), &Device::Cpu)? })
    }
}

impl CustomOp2 for Layer {
    fn name(&self) -> &'static str {
        "routed-layer"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        b: &CpuStorage,
        lb: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (mut y, shape) = Frozen(self.base.clone()).cpu_fwd(x, lx)?;
        let kept = match (x, b, &mut y) {
            (CpuStorage::F32(x), CpuStorage::F32(b), CpuStorage::F32(y)) => {
                self.change(slice(x, lx)?, slice(b, lb)?, y)?
            }
            (CpuStorage::F64(x), CpuStorage::F64(b), CpuStorage::F64(y)) => {
                self.change(slice(x, lx)?, slice(b, lb)?, y)?
            }
            _ => bail!("{}: expected all of f32 or all of f64", self.name()),
        };
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(kept);
        Ok((y, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Kept { selection, low }) = kept.as_ref() else { return Ok((None, None)) };
        let dy = dy.detach().contiguous()?.reshape((rows(x.shape()), self.base.out_features()))?;
        let db = dy.apply_op2_no_bwd(low, &BackB(Arc::clone(selection)))?;
        if !x.track_op() {
            return Ok((None, Some(db)));
        }
        let dx = dy.matmul(&self.base.weight()?)?; // (m, in)
        let back = dy.apply_op2_no_bwd(&b.detach(), &BackY(Arc::clone(selection)))?; // (m, r)
        dx.inplace_op2(&(back * self.scale)?, &AddProjected(Arc::clone(&self.sparse)))?;
        Ok((Some(dx.reshape(x.shape())?), Some(db)))
    }
}

/// `dx += dy A`: dx (m, in), dy (m, r).
struct AddProjected(Arc<SparseMatrix>);

impl InplaceOp2 for AddProjected {
    fn name(&self) -> &'static str {
        "sparse-projection-backward"
    }

    fn cpu_fwd(&self, dx: &mut CpuStorage, _: &Layout, dy: &CpuStorage, layout: &Layout) -> Result<()> {
        match (dx, dy) {
            (CpuStorage::F32(dx), CpuStorage::F32(dy)) => {
                cpu::project_back(dx, slice(dy, layout)?, &self.0);
            }
            (CpuStorage::F64(dx), CpuStorage::F64(dy)) => {
                cpu::project_back(dx, slice(dy, layout)?, &self.0);
            }
            _ => bail!("{}: expected both of f32 or both of f64", self.name()),
        }
        Ok(())
    }
}

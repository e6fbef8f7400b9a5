//! The loops as differentiable ops of candle.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

use super::SparseMatrix;
use super::cpu::{self, Float};

/// `y = x A^T` for contiguous x (m, columns) on the CPU, in f32 or f64: (m, rows). `A` gets no gradient.
pub(crate) fn project(x: &Tensor, a: &Arc<SparseMatrix>) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Project(Arc::clone(a)))
}

/// Which of `r` ranks each row makes use of.
#[derive(Debug)]
pub(crate) struct Selection {
    /// (m, k), ascending in each row.
    pub(crate) chosen: Vec<u32>,
    pub(crate) r: usize,
    pub(crate) k: usize,
}

impl Selection {
    /// How many rows make use of each rank: (r).
    pub(crate) fn counts(&self) -> Vec<f32> {
        let mut counts = vec![0f32; self.r];
        for i in &self.chosen {
            if let Some(count) = counts.get_mut(*i as usize) {
                *count += 1.0;
            }
        }
        counts
    }
}

/// `delta[m] = sum over the chosen i of y[m][i] B[.][i]`: y (m, r), b (out, r), on the CPU in f32 or f64: (m, out).
pub(crate) fn routed_product(y: &Tensor, b: &Tensor, selection: &Arc<Selection>) -> Result<Tensor> {
    y.contiguous()?.apply_op2(&b.contiguous()?, Routed(Arc::clone(selection)))
}

/// The values of a contiguous tensor.
pub(super) fn slice<'a, T>(values: &'a [T], layout: &Layout) -> Result<&'a [T]> {
    let (start, end) = layout
        .contiguous_offsets()
        .ok_or_else(|| candle_core::Error::Msg("a sparse product takes contiguous tensors".into()))?;
    values
        .get(start..end)
        .ok_or_else(|| candle_core::Error::Msg("a tensor is larger than its storage".into()))
}

/// Runs a loop on one tensor of f32 or f64.
macro_rules! on_floats {
    ($name:literal, $storage:expr, $layout:expr, |$values:ident| $body:expr) => {
        match $storage {
            CpuStorage::F32(values) => {
                let $values = slice(values, $layout)?;
                CpuStorage::F32($body)
            }
            CpuStorage::F64(values) => {
                let $values = slice(values, $layout)?;
                CpuStorage::F64($body)
            }
            other => {
                use candle_core::backend::BackendStorage as _;
                return Err(candle_core::Error::UnsupportedDTypeForOp(other.dtype(), $name).bt());
            }
        }
    };
}

/// Runs a loop on two tensors, both of f32 or both of f64.
macro_rules! on_pairs {
    ($name:literal, ($s1:expr, $l1:expr), ($s2:expr, $l2:expr), $body:expr) => {
        match ($s1, $s2) {
            (CpuStorage::F32(a), CpuStorage::F32(b)) => {
                CpuStorage::F32($body(slice(a, $l1)?, slice(b, $l2)?))
            }
            (CpuStorage::F64(a), CpuStorage::F64(b)) => {
                CpuStorage::F64($body(slice(a, $l1)?, slice(b, $l2)?))
            }
            (other, _) => {
                use candle_core::backend::BackendStorage as _;
                return Err(candle_core::Error::UnsupportedDTypeForOp(other.dtype(), $name).bt());
            }
        }
    };
}

struct Project(Arc<SparseMatrix>);

impl CustomOp1 for Project {
    fn name(&self) -> &'static str {
        "sparse-projection"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (m, _) = layout.shape().dims2()?;
        let y = on_floats!("sparse-projection", storage, layout, |x| cpu::project(x, &self.0));
        Ok((y, (m, self.0.rows).into()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        dy.detach().contiguous()?.apply_op1_no_bwd(&ProjectBack(Arc::clone(&self.0))).map(Some)
    }
}

struct ProjectBack(Arc<SparseMatrix>);

impl CustomOp1 for ProjectBack {
    fn name(&self) -> &'static str {
        "sparse-projection-backward"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (m, _) = layout.shape().dims2()?;
        let dx = on_floats!("sparse-projection-backward", storage, layout, |dy| project_back(dy, &self.0));
        Ok((dx, (m, self.0.columns).into()))
    }
}

fn project_back<T: Float>(dy: &[T], a: &SparseMatrix) -> Vec<T> {
    let mut dx = vec![T::default(); dy.len() / a.rows.max(1) * a.columns];
    cpu::project_back(&mut dx, dy, a);
    dx
}

struct Routed(Arc<Selection>);

fn routed<T: Float>(y: &[T], b: &[T], s: &Selection, out: usize) -> Vec<T> {
    let mut delta = vec![T::default(); y.len() / s.r.max(1) * out];
    cpu::routed(&mut delta, y, &cpu::transpose(b, out, s.r), &s.chosen, (s.r, s.k, out));
    delta
}

impl CustomOp2 for Routed {
    fn name(&self) -> &'static str {
        "routed-product"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((m, _), (out, _)) = (l1.shape().dims2()?, l2.shape().dims2()?);
        let delta = on_pairs!("routed-product", (s1, l1), (s2, l2), |y, b| routed(y, b, &self.0, out));
        Ok((delta, (m, out).into()))
    }

    fn bwd(
        &self,
        y: &Tensor,
        b: &Tensor,
        _delta: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.detach().contiguous()?;
        let dy = grad.apply_op2_no_bwd(&b.detach().contiguous()?, &BackY(Arc::clone(&self.0)))?;
        let db = grad.apply_op2_no_bwd(&y.detach().contiguous()?, &BackB(Arc::clone(&self.0)))?;
        Ok((Some(dy), Some(db)))
    }
}

pub(super) struct BackY(pub(super) Arc<Selection>);

pub(super) fn back_y<T: Float>(grad: &[T], b: &[T], s: &Selection, out: usize) -> Vec<T> {
    cpu::routed_back_y(grad, &cpu::transpose(b, out, s.r), &s.chosen, (s.r, s.k, out))
}

impl CustomOp2 for BackY {
    fn name(&self) -> &'static str {
        "routed-product-backward"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((m, out), _) = (l1.shape().dims2()?, l2.shape().dims2()?);
        let dy = on_pairs!("routed-product-backward", (s1, l1), (s2, l2), |g, b| back_y(g, b, &self.0, out));
        Ok((dy, (m, self.0.r).into()))
    }
}

pub(super) struct BackB(pub(super) Arc<Selection>);

pub(super) fn back_b<T: Float>(grad: &[T], y: &[T], s: &Selection, out: usize) -> Vec<T> {
    cpu::transpose(&cpu::routed_back_b(grad, y, &s.chosen, (s.r, s.k, out)), s.r, out)
}

impl CustomOp2 for BackB {
    fn name(&self) -> &'static str {
        "routed-product-backward"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((_, out), _) = (l1.shape().dims2()?, l2.shape().dims2()?);
        let db = on_pairs!("routed-product-backward", (s1, l1), (s2, l2), |g, y| back_b(g, y, &self.0, out));
        Ok((db, (out, self.0.r).into()))
    }
}

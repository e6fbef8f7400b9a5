//! Projection, causal attention and output projection in one operation on CUDA.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::attention::Attention;
use super::launch::{
    Element, aligned, by_dtype, from_storage, is_empty, not_here, tensor, view, wrap, zeros,
};
use super::rope;
use crate::ops::backward::deliver;
use crate::ops::{Heads, Rope};

/// See [`crate::ops::self_attention`]; shapes and dtypes have been checked, and `attention::supports` holds.
pub(in crate::ops) fn self_attention(
    x: &Tensor,
    qkv: &Tensor,
    out: &Tensor,
    heads: Heads,
    positions: Option<&Rope>,
) -> Result<Tensor> {
    if is_empty(&[x, qkv, out]) {
        let (b, t, _) = x.dims3()?;
        return zeros(x.device(), (b, t, out.dim(0)?), x.dtype());
    }
    let op = SelfAttention {
        attention: Attention { heads, rope: positions.cloned() },
        tracked: x.track_op() || qkv.track_op() || out.track_op(),
        saved: Arc::default(),
    };
    aligned(x)?.apply_op3(&aligned(qkv)?, &aligned(out)?, op)
}

struct Saved {
    /// The rotated projection, (b, t, packed).
    rotated: Tensor,
    /// The output of the attention, (b, t, query dim).
    attended: Tensor,
    /// The logarithms of the sums of exponentials, (b, query, t).
    logs: Tensor,
}

struct SelfAttention {
    attention: Attention,
    tracked: bool,
    saved: Arc<Mutex<Option<Saved>>>,
}

impl SelfAttention {
    fn forward<T: Element>(
        &self,
        mut projected: CudaStorage,
        (out, lo): (&CudaStorage, &Layout),
        (b, t): (usize, usize),
    ) -> Result<CudaStorage> {
        let (heads, (columns, width)) = (self.attention.heads, lo.shape().dims2()?);
        let (packed, rows, device) = (heads.packed(), b * t, projected.device().clone());
        if let Some(table) = &self.attention.rope {
            let slice = projected.as_cuda_slice_mut::<T>()?;
            rope::rotate::<T>(&device, slice, heads, (rows, t), table, 1.0)?;
        }
        let layout = Layout::contiguous((b, t, packed));
        let (attended, logs) = self.attention.forward::<T>(&device, &view(&projected, &layout)?, (b, t))?;
        let attended = wrap(attended, &device);
        let flat = Layout::contiguous((rows, width));
        let y = attended.matmul(out, (1, rows, columns, width), &flat, &lo.transpose(0, 1)?)?;
        if self.tracked {
            *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some(Saved {
                rotated: from_storage(projected, (b, t, packed)),
                attended: from_storage(attended, (b, t, width)),
                logs: tensor(logs, &device, (b, heads.query, t)),
            });
        }
        Ok(y)
    }
}

impl CustomOp3 for SelfAttention {
    fn name(&self) -> &'static str {
        "vesper-self-attention-cuda"
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
        qkv: &CudaStorage,
        lq: &Layout,
        out: &CudaStorage,
        lo: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let ((b, t, d), (packed, _), (columns, _)) =
            (lx.shape().dims3()?, lq.shape().dims2()?, lo.shape().dims2()?);
        let flat = Layout::contiguous_with_offset((b * t, d), lx.start_offset());
        let projected = x.matmul(qkv, (1, b * t, packed, d), &flat, &lq.transpose(0, 1)?)?;
        let y = by_dtype!(x.dtype(), T => self.forward::<T>(projected, (out, lo), (b, t))?);
        Ok((y, (b, t, columns).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        qkv: &Tensor,
        out: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Saved { rotated, attended, logs }) = &*saved else { return Ok((None, None, None)) };
        let ((b, t, d), (packed, _), (columns, width)) = (x.dims3()?, qkv.dims2()?, out.dims2()?);
        let rows = b * t;
        let dy = aligned(dy)?.reshape((rows, columns))?;
        let dattended = dy.matmul(&out.detach())?; // (rows, width)
        let dout =
            if out.track_op() { Some(dy.t()?.matmul(&attended.reshape((rows, width))?)?) } else { None };
        let dprojected = by_dtype!(x.dtype(), T => {
            self.attention.backward::<T>(rotated, attended, logs, &dattended)?
        });
        let dprojected = dprojected.reshape((rows, packed))?;
        let dx =
            if x.track_op() { Some(dprojected.matmul(&qkv.detach())?.reshape(x.shape())?) } else { None };
        let dqkv = if qkv.track_op() {
            Some(dprojected.t()?.matmul(&x.detach().reshape((rows, d))?)?)
        } else {
            None
        };
        Ok((dx, deliver(qkv, dqkv)?, deliver(out, dout)?))
    }
}

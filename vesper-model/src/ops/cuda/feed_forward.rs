//! The gated feed-forward on CUDA: products by candle's cuBLAS, the gate and its gradient by the kernels of era-act.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp3, Layout, Result, Shape, Tensor};
use era_act::Activation;

use super::launch::{Held, aligned, from_storage, is_empty, not_here, zeros};
use crate::ops::backward::deliver;

/// See [`crate::ops::gated_feed_forward`]; shapes and dtypes have been checked.
pub(in crate::ops) fn gated_feed_forward(
    x: &Tensor,
    gate_up: &Tensor,
    down: &Tensor,
    activation: Activation,
) -> Result<Tensor> {
    if is_empty(&[x, gate_up, down]) {
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = down.dim(0)?;
        }
        return zeros(x.device(), dims, x.dtype());
    }
    let tracked = x.track_op() || gate_up.track_op() || down.track_op();
    let op = GatedFeedForward { activation, tracked, saved: Arc::default() };
    aligned(x)?.apply_op3(&aligned(gate_up)?, &aligned(down)?, op)
}

struct GatedFeedForward {
    activation: Activation,
    tracked: bool,
    /// The packed product, (rows, 2 ffn).
    saved: Arc<Mutex<Option<Tensor>>>,
}

impl CustomOp3 for GatedFeedForward {
    fn name(&self) -> &'static str {
        "vesper-gated-feed-forward-cuda"
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
        gate_up: &CudaStorage,
        lg: &Layout,
        down: &CudaStorage,
        ld: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let ((packed, d), (out, ffn)) = (lg.shape().dims2()?, ld.shape().dims2()?);
        let mut dims = lx.shape().dims().to_vec();
        let rows = lx.shape().elem_count() / d;
        if let Some(last) = dims.last_mut() {
            *last = out;
        }
        let flat = Layout::contiguous_with_offset((rows, d), lx.start_offset());
        let product = x.matmul(gate_up, (1, rows, packed, d), &flat, &lg.transpose(0, 1)?)?;
        let product = from_storage(product, (rows, packed));
        let inner = self.activation.gated(&product)?; // (rows, ffn)
        let held = Held::new(&inner);
        let y = held.storage()?.matmul(down, (1, rows, out, ffn), held.layout(), &ld.transpose(0, 1)?)?;
        if self.tracked {
            *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some(product);
        }
        Ok((y, dims.into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        gate_up: &Tensor,
        down: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(packed) = saved else { return Ok((None, None, None)) };
        let (rows, _) = packed.dims2()?;
        let ((_, d), (out, _)) = (gate_up.dims2()?, down.dims2()?);
        let dy = aligned(dy)?.reshape((rows, out))?;
        let dinner = dy.matmul(&down.detach())?;
        let (dpacked, inner) = if down.track_op() {
            let (dpacked, inner) = self.activation.gated_backward_and_value(&packed, &dinner)?;
            (dpacked, Some(inner))
        } else {
            (self.activation.gated_backward(&packed, &dinner)?, None)
        };
        drop(dinner);
        let ddown = inner.map(|inner| dy.t()?.matmul(&inner)).transpose()?;
        let dx =
            if x.track_op() { Some(dpacked.matmul(&gate_up.detach())?.reshape(x.shape())?) } else { None };
        let dgate_up = if gate_up.track_op() {
            Some(dpacked.t()?.matmul(&x.detach().reshape((rows, d))?)?)
        } else {
            None
        };
        Ok((dx, deliver(gate_up, dgate_up)?, deliver(down, ddown)?))
    }
}

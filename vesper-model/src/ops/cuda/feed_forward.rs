//! The gated feed-forward on CUDA: products by candle's cuBLAS, the gate and its gradient in one kernel each.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, LaunchConfig};
use candle_core::{CpuStorage, CudaStorage, CustomOp3, Layout, Result, Shape, Tensor};
use era_act::{Activation, Era};

use super::launch::{
    Element, Held, Module, aligned, allocate, by_dtype, from_storage, is_empty, is_wide, launch, name,
    not_here, size, tensor, view, wrap, zeros,
};

#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    rows: u64,
    width: u32,
    kind: u32,
    a: f32,
    b: f32,
}

const _: () = assert!(size_of::<Params>() == 24);
// SAFETY: plain numbers in the layout of `GatedParams`.
unsafe impl DeviceRepr for Params {}

/// An activation that the kernels know: its number there and its parameters.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Kind {
    number: u32,
    a: f32,
    b: f32,
}

impl Kind {
    /// None where there is no kernel, or the parameters are invalid.
    pub(in crate::ops) fn of(activation: &Activation) -> Option<Self> {
        activation.validate().ok()?;
        let (number, a, b) = match *activation {
            Activation::Era(Era::GateEntropy { temperature, strength }) => (0, 1.0 / temperature, strength),
            Activation::Era(Era::GeluSoftplus { gamma }) => (1, gamma, 0.0),
            Activation::Silu => (2, 0.0, 0.0),
            Activation::GeluTanh => (3, 0.0, 0.0),
            Activation::Gelu => (4, 0.0, 0.0),
            Activation::Relu => (5, 0.0, 0.0),
            Activation::ReluSquared => (6, 0.0, 0.0),
            _ => return None,
        };
        Some(Self { number, a: a as f32, b: b as f32 })
    }
}

/// See [`crate::ops::gated_feed_forward`]; shapes and dtypes have been checked.
pub(in crate::ops) fn gated_feed_forward(
    x: &Tensor,
    gate_up: &Tensor,
    down: &Tensor,
    kind: Kind,
) -> Result<Tensor> {
    if is_empty(&[x, gate_up, down]) {
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = down.dim(0)?;
        }
        return zeros(x.device(), dims, x.dtype());
    }
    let tracked = x.track_op() || gate_up.track_op() || down.track_op();
    let op = GatedFeedForward { kind, tracked, saved: Arc::default() };
    aligned(x)?.apply_op3(&aligned(gate_up)?, &aligned(down)?, op)
}

pub(super) struct GatedFeedForward {
    kind: Kind,
    tracked: bool,
    /// The packed product, (rows, 2 ffn).
    saved: Arc<Mutex<Option<Tensor>>>,
}

impl GatedFeedForward {
    /// The gate alone.
    pub(super) fn new(kind: Kind) -> Self {
        Self { kind, tracked: false, saved: Arc::default() }
    }

    fn launch_over(&self, rows: usize, width: usize, vector: usize) -> Result<(LaunchConfig, Params)> {
        let vectors = width / vector;
        let threads = vectors.next_multiple_of(32).min(256);
        let config = LaunchConfig {
            grid_dim: (size(vectors.div_ceil(threads))?, size(rows.min(65_535))?, 1),
            block_dim: (size(threads)?, 1, 1),
            shared_mem_bytes: 0,
        };
        let Kind { number: kind, a, b } = self.kind;
        Ok((config, Params { rows: rows as u64, width: size(width)?, kind, a, b }))
    }

    /// packed: (rows, 2 width) to (rows, width)
    pub(super) fn gate<T: Element>(
        &self,
        packed: &CudaStorage,
        rows: usize,
        width: usize,
    ) -> Result<CudaStorage> {
        let device = packed.device();
        let layout = Layout::contiguous((rows, 2 * width));
        let wide = is_wide::<T>(width, &[]);
        let (config, params) = self.launch_over(rows, width, if wide { T::WIDE } else { 1 })?;
        let name = name::<T>("gated_forward", wide);
        let mut inner = allocate::<T>(device, rows * width)?;
        let packed = view::<T>(packed, &layout)?;
        launch!(device, Module::FeedForward, &name, config, &packed, &mut inner, &params);
        Ok(wrap(inner, device))
    }

    /// The packed gradient, and the gated values again where the gradient of `down` needs them.
    pub(super) fn gate_backward<T: Element>(
        &self,
        packed: &Tensor,
        dinner: &Tensor,
        wanted: bool,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let (rows, width) = dinner.dims2()?;
        let (packed, dinner) = (Held::new(packed), Held::new(dinner));
        let device = packed.device()?;
        let wide = is_wide::<T>(width, &[packed.layout(), dinner.layout()]);
        let (config, params) = self.launch_over(rows, width, if wide { T::WIDE } else { 1 })?;
        let name = name::<T>("gated_backward", wide);
        let mut dpacked = allocate::<T>(device, 2 * rows * width)?;
        let (from, dy) = (packed.view::<T>()?, dinner.view::<T>()?);
        let inner = if wanted {
            let mut inner = allocate::<T>(device, rows * width)?;
            launch!(
                device,
                Module::FeedForward,
                &name,
                config,
                &from,
                &dy,
                &mut dpacked,
                &mut inner,
                &params
            );
            Some(tensor(inner, device, (rows, width)))
        } else {
            let none = 0u64;
            launch!(device, Module::FeedForward, &name, config, &from, &dy, &mut dpacked, &none, &params);
            None
        };
        Ok((tensor(dpacked, device, (rows, 2 * width)), inner))
    }
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
        let inner = by_dtype!(x.dtype(), T => self.gate::<T>(&product, rows, ffn)?);
        let wide = Layout::contiguous((rows, ffn));
        let y = inner.matmul(down, (1, rows, out, ffn), &wide, &ld.transpose(0, 1)?)?;
        if self.tracked {
            *self.saved.lock().unwrap_or_else(PoisonError::into_inner) =
                Some(from_storage(product, (rows, packed)));
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
        let (dpacked, inner) =
            by_dtype!(x.dtype(), T => self.gate_backward::<T>(&packed, &dinner, down.track_op())?);
        drop(dinner);
        let ddown = inner.map(|inner| dy.t()?.matmul(&inner)).transpose()?;
        let dx =
            if x.track_op() { Some(dpacked.matmul(&gate_up.detach())?.reshape(x.shape())?) } else { None };
        let dgate_up = if gate_up.track_op() {
            Some(dpacked.t()?.matmul(&x.detach().reshape((rows, d))?)?)
        } else {
            None
        };
        Ok((dx, dgate_up, ddown))
    }
}

//! Causal attention on CUDA: rotation in one kernel, then blocked attention, in bf16 and f16 on tensor cores.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DeviceRepr, LaunchConfig};
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp1, DType, Layout, Result, Shape, Tensor, bail,
};

use super::launch::{
    Element, Module, aligned, allocate, by_dtype, is_empty, launch, not_here, size, tensor, view, wrap, zeros,
};
use super::{attention_warpgroup as warpgroup, rope};
use crate::ops::{Heads, Rope};

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Params {
    pub(super) t: u32,
    query: u32,
    kv: u32,
    dim: u32,
    scale: f32,
}

const _: () = assert!(size_of::<Params>() == 20);
// SAFETY: plain numbers in the layout of `AttentionParams`.
unsafe impl DeviceRepr for Params {}

/// One kernel's blocks; the same as in its `.cu` file.
#[derive(Clone, Copy)]
pub(super) struct Blocks {
    /// Rows of queries (forward, gradient of q) or keys (gradients of k and v) that a block owns.
    own: usize,
    threads: u32,
    /// Bytes of shared memory.
    shared: usize,
}

impl Blocks {
    /// Heads go first, so that the tiles with the most work of all heads start together.
    pub(super) fn config(self, heads: usize, t: usize) -> Result<LaunchConfig> {
        let tiles = t.div_ceil(self.own);
        if tiles > 65_535 {
            bail!("a sequence of {t} is too long for the CUDA attention");
        }
        Ok(LaunchConfig {
            grid_dim: (size(heads)?, size(tiles)?, 1),
            block_dim: (self.threads, 1, 1),
            shared_mem_bytes: size(self.shared)?,
        })
    }
}

/// The kernels for heads of up to `dim`.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    /// Without tensor cores.
    pub(super) plain: bool,
    pub(super) dim: usize,
    pub(super) forward: Blocks,
    pub(super) backward_kv: Blocks,
    pub(super) backward_q: Blocks,
}

impl Kernels {
    /// Tiles of `own` rows, steps of `step` rows, twice so that one is loaded while the other is worked on.
    const fn tensor(
        dim: usize,
        forward: [usize; 2],
        backward_kv: [usize; 2],
        backward_q: [usize; 2],
    ) -> Self {
        const fn blocks([own, step]: [usize; 2], owned: usize, dim: usize, more: usize) -> Blocks {
            Blocks { own, threads: 128, shared: 2 * dim * (owned * own + 4 * step) + more }
        }
        Self {
            plain: false,
            dim,
            forward: blocks(forward, 1, dim, 0),
            backward_kv: blocks(backward_kv, 2, dim, 16 * backward_kv[1]),
            backward_q: blocks(backward_q, 2, dim, 0),
        }
    }

    /// Tiles of 32 rows everywhere.
    const fn plain(dim: usize) -> Self {
        const fn blocks(dim: usize, tiles: usize, scores: usize) -> Blocks {
            Blocks { own: 32, threads: 256, shared: tiles * 128 * (dim + 4) + scores * 4224 }
        }
        Self {
            plain: true,
            dim,
            forward: blocks(dim, 3, 1),
            backward_kv: blocks(dim, 4, 2),
            backward_q: blocks(dim, 4, 1),
        }
    }

    /// Those for heads of a size in a dtype.
    fn of(dim: usize, dtype: DType) -> Option<&'static Self> {
        let tensor = cfg!(tensor_cores) && matches!(dtype, DType::BF16 | DType::F16) && dim.is_multiple_of(8);
        // Devices before 8.0 have too little shared memory for the larger tiles.
        let largest = if cfg!(tensor_cores) { 128 } else { 64 };
        KERNELS.iter().find(|k| k.plain != tensor && dim <= k.dim && k.dim <= largest)
    }

    pub(super) fn backward_module(&self) -> Module {
        if self.plain { Module::AttentionPlain } else { Module::AttentionBackward }
    }

    pub(super) fn name<T: Element>(&self, kernel: &str) -> String {
        let plain = if self.plain { "plain_" } else { "" };
        format!("attention_{plain}{kernel}_{}_{}", T::NAME, self.dim)
    }
}

const KERNELS: [Kernels; 4] = [
    Kernels::tensor(64, [128, 64], [64, 64], [128, 64]),
    Kernels::tensor(128, [128, 64], [64, 64], [128, 32]),
    Kernels::plain(64),
    Kernels::plain(128),
];

/// Whether there are kernels for these heads in this dtype.
pub(in crate::ops) fn supports(heads: Heads, dtype: DType) -> bool {
    Kernels::of(heads.dim, dtype).is_some()
}

/// See [`crate::ops::causal_attention`]; shapes have been checked and `supports` holds.
pub(in crate::ops) fn causal_attention(
    qkv: &Tensor,
    heads: Heads,
    positions: Option<&Rope>,
) -> Result<Tensor> {
    let (b, t, _) = qkv.dims3()?;
    if is_empty(&[qkv]) {
        return zeros(qkv.device(), (b, t, heads.query * heads.dim), qkv.dtype());
    }
    let op = CausalAttention {
        attention: Attention { heads, rope: positions.cloned() },
        tracked: qkv.track_op(),
        saved: Arc::default(),
    };
    aligned(qkv)?.apply_op1(op)
}

/// The arithmetic, without a graph.
#[derive(Clone)]
pub(super) struct Attention {
    pub(super) heads: Heads,
    pub(super) rope: Option<Rope>,
}

impl Attention {
    pub(super) fn params<T: Element>(&self, t: usize) -> Result<(Params, &'static Kernels)> {
        let Heads { query, kv, dim } = self.heads;
        let Some(kernels) = Kernels::of(dim, T::DTYPE) else { bail!("no CUDA attention for heads of {dim}") };
        let scale = (1.0 / (dim as f64).sqrt()) as f32;
        Ok((Params { t: size(t)?, query: size(query)?, kv: size(kv)?, dim: size(dim)?, scale }, kernels))
    }

    /// From a rotated projection (b, t, packed) to (b, t, query dim) and the logarithms that the backward needs,
    /// (b, query, t).
    pub(super) fn forward<T: Element>(
        &self,
        device: &CudaDevice,
        rotated: &CudaView<'_, T>,
        (b, t): (usize, usize),
    ) -> Result<(CudaSlice<T>, CudaSlice<f32>)> {
        let (params, kernels) = self.params::<T>(t)?;
        let Heads { query, dim, .. } = self.heads;
        let mut out = allocate::<T>(device, b * t * query * dim)?;
        let mut logs = allocate::<f32>(device, b * query * t)?;
        if warpgroup::supports(self.heads, T::DTYPE) {
            warpgroup::forward(device, rotated, (&mut out, &mut logs), (b, t), self.heads, &params)?;
            return Ok((out, logs));
        }
        let (name, config) = (kernels.name::<T>("forward"), kernels.forward.config(b * query, t)?);
        let module = if kernels.plain { Module::AttentionPlain } else { Module::Attention };
        launch!(device, module, &name, config, rotated, &mut out, &mut logs, &params);
        Ok((out, logs))
    }
}

#[derive(Clone)]
struct Saved {
    /// The rotated projection, where there is a rotation.
    rotated: Option<Tensor>,
    logs: Tensor,
}

struct CausalAttention {
    attention: Attention,
    tracked: bool,
    saved: Arc<Mutex<Option<Saved>>>,
}

impl CausalAttention {
    fn forward<T: Element>(&self, qkv: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
        let (b, t, packed) = layout.shape().dims3()?;
        let device = qkv.device();
        let from = view::<T>(qkv, layout)?;
        let rotated = match &self.attention.rope {
            Some(table) => Some(rope::rotated::<T>(device, &from, self.attention.heads, t, table)?),
            None => None,
        };
        let source = rotated.as_ref().map_or(from, CudaSlice::as_view);
        let (out, logs) = self.attention.forward::<T>(device, &source, (b, t))?;
        if self.tracked {
            let saved = Saved {
                rotated: rotated.map(|rotated| tensor(rotated, device, (b, t, packed))),
                logs: tensor(logs, device, (b, self.attention.heads.query, t)),
            };
            *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        }
        Ok(wrap(out, device))
    }
}

impl CustomOp1 for CausalAttention {
    fn name(&self) -> &'static str {
        "vesper-causal-attention-cuda"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        not_here(self.name())
    }

    fn cuda_fwd(&self, qkv: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (b, t, _) = layout.shape().dims3()?;
        let Heads { query, dim, .. } = self.attention.heads;
        let out = by_dtype!(qkv.dtype(), T => self.forward::<T>(qkv, layout)?);
        Ok((out, (b, t, query * dim).into()))
    }

    fn bwd(&self, qkv: &Tensor, out: &Tensor, dout: &Tensor) -> Result<Option<Tensor>> {
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(Saved { rotated, logs }) = saved else { return Ok(None) };
        let (rotated, dout) = (rotated.unwrap_or_else(|| qkv.clone()), aligned(dout)?);
        let dqkv = by_dtype!(qkv.dtype(), T => self.attention.backward::<T>(&rotated, out, &logs, &dout)?);
        Ok(Some(dqkv))
    }
}

//! Attention of new tokens over a cache on CUDA: a kernel that rotates and keeps, and blocked attention.

use std::sync::OnceLock;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{CpuStorage, CudaStorage, InplaceOp2, Layout, Result, Tensor, bail};

use super::attention::{Attention, Params};
use super::attention_warpgroup as warpgroup;
use super::launch::{
    Element, Held, Module, aligned, allocate, blocks, by_dtype, launch, name, not_here, size, tensor, view,
};
use crate::ops::{Heads, Place, Rope};

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct CachedParams {
    pub(super) attention: Params,
    pub(super) first: u32,
    row: u32,
    pub(super) rows: u32,
    pub(super) capacity: u32,
}

const _: () = assert!(size_of::<CachedParams>() == 36);
// SAFETY: plain numbers in the layout of `CachedParams`.
unsafe impl DeviceRepr for CachedParams {}

/// See [`crate::ops::cached_attention`]; shapes have been checked, and `attention::supports` holds.
pub(in crate::ops) fn cached_attention(
    qkv: &Tensor,
    cache: &Tensor,
    heads: Heads,
    positions: &Rope,
    place: Place,
) -> Result<Tensor> {
    let op = CachedAttention { heads, positions, place, out: OnceLock::new() };
    cache.inplace_op2(&aligned(qkv)?, &op)?;
    let Some(out) = op.out.into_inner() else { bail!("cached_attention has no result") };
    Ok(out)
}

/// candle hands out a storage for writing to such an operation alone.
struct CachedAttention<'a> {
    heads: Heads,
    positions: &'a Rope,
    place: Place,
    out: OnceLock<Tensor>,
}

impl CachedAttention<'_> {
    fn run<T: Element>(
        &self,
        (cache, lc): (&mut CudaStorage, &Layout),
        (qkv, lq): (&CudaStorage, &Layout),
    ) -> Result<Tensor> {
        let Heads { query, kv, dim } = self.heads;
        let ((_, t, _), (_, rows, _, capacity, _)) = (lq.shape().dims3()?, lc.shape().dims5()?);
        let device = qkv.device();
        let attention = Attention { heads: self.heads, rope: None };
        let (params, kernels) = attention.params::<T>(t)?;
        let params = CachedParams {
            attention: params,
            first: size(self.place.position)?,
            row: size(self.place.row)?,
            rows: size(rows)?,
            capacity: size(capacity)?,
        };
        let Some((0, end)) = lc.contiguous_offsets() else {
            bail!("a cache must be contiguous and a storage of its own: {lc:?}");
        };
        let mut cache = cache.as_cuda_slice_mut::<T>()?.slice_mut(..end);

        let qkv = view::<T>(qkv, lq)?;
        let mut q = allocate::<T>(device, t * query * dim)?;
        let wide = (dim / 2).is_multiple_of(T::WIDE);
        let vectors = (query + 2 * kv) * dim / 2 / if wide { T::WIDE } else { 1 };
        let config = blocks(t, vectors.next_multiple_of(32).clamp(32, 256) as u32)?;
        let (cos, sin) = (Held::new(self.positions.cos()), Held::new(self.positions.sin()));
        let (cos, sin) = (cos.view::<f32>()?, sin.view::<f32>()?);
        let kernel = name::<T>("cache", wide);
        launch!(device, Module::Cache, &kernel, config, &qkv, &cos, &sin, &mut q, &mut cache, &params);

        let cache = cache.as_view();
        let mut out = allocate::<T>(device, t * query * dim)?;
        if warpgroup::supports(self.heads, T::DTYPE) {
            warpgroup::cached(device, (&q.as_view(), &cache), &mut out, self.heads, &params)?;
            return Ok(tensor(out, device, (1, t, query * dim)));
        }
        let module = if kernels.plain { Module::AttentionCachedPlain } else { Module::AttentionCached };
        let (kernel, config) = (kernels.name::<T>("cached"), kernels.forward.config(query, t)?);
        launch!(device, module, &kernel, config, &q, &cache, &mut out, &params);
        Ok(tensor(out, device, (1, t, query * dim)))
    }
}

impl InplaceOp2 for CachedAttention<'_> {
    fn name(&self) -> &'static str {
        "vesper-cached-attention-cuda"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<()> {
        not_here(self.name())
    }

    fn cuda_fwd(&self, cache: &mut CudaStorage, lc: &Layout, qkv: &CudaStorage, lq: &Layout) -> Result<()> {
        let out = by_dtype!(qkv.dtype(), T => self.run::<T>((cache, lc), (qkv, lq))?);
        let _ = self.out.set(out); // an operation runs once
        Ok(())
    }
}

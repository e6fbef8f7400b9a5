//! Causal attention by products of warpgroups, which compute capability 9.0 has: bf16 and f16, heads of up to 128.

use std::mem::MaybeUninit;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaView, DevicePtr, DeviceRepr, LaunchConfig, sys,
};
use candle_core::{CudaDevice, DType, Result, bail};

use super::attention::Params;
use super::cached_attention::CachedParams;
use super::launch::{Element, Module, launch, multiprocessors, size};
use crate::ops::Heads;

/// Rows of queries (forward, gradient of q) or of keys (gradients of k and v) that a block owns at a time.
const OWN: usize = 128;

/// Whether there are kernels for these heads in this dtype.
pub(super) fn supports(heads: Heads, dtype: DType) -> bool {
    cfg!(warpgroups)
        && matches!(dtype, DType::BF16 | DType::F16)
        && heads.dim.is_multiple_of(8)
        && (8..=128).contains(&heads.dim)
}

/// The head size that the kernels have tiles for.
fn tile(dim: usize) -> usize {
    if dim <= 64 { 64 } else { 128 }
}

/// A tensor (b, t, heads, dim) for the copy engine, in boxes of 64 rows of a head and 64 columns: the `TensorMap` of
/// pipeline.cuh.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct TensorMap(sys::CUtensorMap);

const _: () = assert!(size_of::<TensorMap>() == 128);
// SAFETY: 128 bytes in the layout of `TensorMap`.
unsafe impl DeviceRepr for TensorMap {}

impl TensorMap {
    /// Of contiguous (b, t, heads, dim).
    fn new<T: Element>(
        device: &CudaDevice,
        of: &CudaView<'_, T>,
        (b, t, heads, dim): (usize, usize, usize, usize),
    ) -> Result<Self> {
        Self::strided(device, of, [b, t, heads, dim], [t * heads * dim, heads * dim, dim])
    }

    /// Strides in elements, of all dimensions but the last.
    fn strided<T: Element>(
        device: &CudaDevice,
        of: &CudaView<'_, T>,
        sizes: [usize; 4],
        strides: [usize; 3],
    ) -> Result<Self> {
        let last: usize = sizes.iter().zip(&strides).map(|(&n, &stride)| n.saturating_sub(1) * stride).sum();
        if sizes.contains(&0) || of.len() < last + sizes[3] {
            bail!("a tensor of {} elements has no {sizes:?} of strides {strides:?}", of.len());
        }
        let dtype = match T::DTYPE {
            DType::BF16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            DType::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            other => bail!("no CUDA attention by warpgroups for {other:?}"),
        };
        // From the innermost dimension on; strides in bytes.
        let [b, t, heads, dim] = sizes.map(|n| n as u64);
        let sizes = [dim, heads, t, b];
        let [b, t, heads] = strides.map(|n| (n * size_of::<T>()) as u64);
        let strides = [heads, t, b];
        let (rows, steps) = ([64, 1, 64, 1], [1; 4]);
        // Held no longer than this: the device has one stream, so that nothing frees or writes the memory before the
        // kernel.
        let stream = device.cuda_stream();
        let (address, _held) = of.device_ptr(&stream);
        let mut map = MaybeUninit::<Self>::uninit();
        // SAFETY: the arrays have as many elements as the tensor has dimensions (strides one less), and live until
        // the call returns, which writes all of the map where it succeeds. The address and the strides are multiples
        // of 16 bytes.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr().cast(),
                dtype,
                4,
                address as *mut std::ffi::c_void,
                sizes.as_ptr(),
                strides.as_ptr(),
                rows.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE, // zeros
            )
            .result()
            .w()?;
            Ok(map.assume_init())
        }
    }
}

/// As many blocks as run at a time, each with pairs of tiles: two warpgroups that compute and one that fetches.
fn config(device: &CudaDevice, heads: usize, t: usize, shared: usize) -> Result<LaunchConfig> {
    let pairs = heads * t.div_ceil(OWN).div_ceil(2);
    let blocks = size(pairs)?.min(size(multiprocessors(device)?)?);
    Ok(LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (384, 1, 1), shared_mem_bytes: size(shared)? })
}

/// The shared memory of the forward's tiles and barriers.
fn forward_bytes(tile: usize) -> usize {
    1536 * tile + 96
}

/// From a rotated projection (b, t, packed) to `out` (b, t, query dim) and `logs` (b, query, t).
pub(super) fn forward<T: Element>(
    device: &CudaDevice,
    qkv: &CudaView<'_, T>,
    (out, logs): (&mut CudaSlice<T>, &mut CudaSlice<f32>),
    (b, t): (usize, usize),
    heads: Heads,
    params: &Params,
) -> Result<()> {
    let Heads { query, kv, dim } = heads;
    let map = TensorMap::new(device, qkv, (b, t, query + 2 * kv, dim))?;
    let tile = tile(dim);
    let config = config(device, b * query, t, forward_bytes(tile))?;
    let (name, all) = (format!("attention_warpgroup_forward_{}_{tile}", T::NAME), size(b * query)?);
    launch!(device, Module::AttentionWarpgroup, &name, config, &map, out, logs, params, &all);
    Ok(())
}

/// From rotated queries (t, query, dim) and a cache (2, rows, kv, capacity, dim), in which keys and values are
/// already, to `out` (t, query dim).
pub(super) fn cached<T: Element>(
    device: &CudaDevice,
    (q, cache): (&CudaView<'_, T>, &CudaView<'_, T>),
    out: &mut CudaSlice<T>,
    heads: Heads,
    params: &CachedParams,
) -> Result<()> {
    let Heads { query, kv, dim } = heads;
    let [t, first, rows, capacity] =
        [params.attention.t, params.first, params.rows, params.capacity].map(|n| n as usize);
    let q = TensorMap::new(device, q, (1, t, query, dim))?;
    // What comes after the new tokens is none of theirs. (The driver takes strides in any order.)
    let sizes = [2 * rows, first + t, kv, dim];
    let cache = TensorMap::strided(device, cache, sizes, [kv * capacity * dim, dim, capacity * dim])?;
    let tile = tile(dim);
    let config = config(device, query, t, forward_bytes(tile))?;
    let name = format!("attention_warpgroup_cached_{}_{tile}", T::NAME);
    launch!(device, Module::AttentionWarpgroupCached, &name, config, &q, &cache, out, params);
    Ok(())
}

/// What the gradient is computed from.
pub(super) struct Inputs<'a, T: Element> {
    /// The rotated projection, (b, t, packed).
    pub(super) qkv: &'a CudaView<'a, T>,
    /// (b, t, query dim)
    pub(super) dout: &'a CudaView<'a, T>,
    /// The logarithms of the forward, (b, query, t).
    pub(super) logs: &'a CudaView<'a, f32>,
    /// The sums of dout times out, (b, query, t).
    pub(super) dots: &'a CudaSlice<f32>,
    /// The addresses of the cosines and sines that turn the result back, or 0.
    pub(super) tables: (u64, u64),
}

/// Writes the gradient of the projection, (b, t, packed).
pub(super) fn backward<T: Element>(
    device: &CudaDevice,
    from: &Inputs<'_, T>,
    dqkv: &mut CudaSlice<T>,
    (b, t): (usize, usize),
    heads: Heads,
    params: &Params,
) -> Result<()> {
    let Heads { query, kv, dim } = heads;
    let Inputs { logs, dots, tables: (cos, sin), .. } = *from;
    let qkv = TensorMap::new(device, from.qkv, (b, t, query + 2 * kv, dim))?;
    let dout = TensorMap::new(device, from.dout, (b, t, query, dim))?;
    let tile = tile(dim);
    // Rows of the tiles that a block goes through, and how many of them are in shared memory.
    let [of_kv, of_q] = if tile == 64 { [(64, 4), (128, 2)] } else { [(64, 3), (64, 3)] };
    for (kernel, heads, (step, stages)) in [("kv", kv, of_kv), ("q", query, of_q)] {
        let shared = 2 * tile * (4 * OWN + 2 * step * stages) + 8 * step * stages + 16 * stages + 32;
        let (config, all) = (config(device, b * heads, t, shared)?, size(b * heads)?);
        let name = format!("attention_warpgroup_backward_{kernel}_{}_{tile}", T::NAME);
        let module = Module::AttentionWarpgroupBackward;
        launch!(device, module, &name, config, &qkv, &dout, logs, dots, &cos, &sin, &mut *dqkv, params, &all);
    }
    Ok(())
}

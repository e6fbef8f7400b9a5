//! The CUDA back end: one file an operation, its kernels beside it in the `.cu` file of the same name.
//!
//! Everything runs on candle's own stream. Each function takes storages or tensors that are on one CUDA device and
//! contiguous, of f32, bf16 or f16; the dispatch in `ops` sees to that.

pub(super) mod attention;
mod attention_backward;
mod attention_warpgroup;
mod blas;
mod blas_lt;
pub(super) mod cached_attention;
mod cast;
mod chain;
pub(super) mod cross_entropy;
pub(super) mod decode;
mod decode_matrix;
pub(super) mod decoder;
pub(super) mod dropout;
pub(super) mod embedding;
pub(super) mod feed_forward;
pub(super) mod graph;
mod launch;
pub(super) mod layer_norm;
mod norms;
pub(super) mod residual;
pub(super) mod rms_norm;
mod rope;
pub(super) mod self_attention;

pub(super) use launch::{has_kernels, zeros};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{result, sys};
use candle_core::{CudaDevice, Result};

/// See [`super::prepare_cuda_device`].
pub(super) fn prepare(device: &CudaDevice) -> Result<()> {
    // SAFETY: the events order work on several streams of one context. This device has one stream, or, opened by
    // `Device::new_cuda`, the stream of the calling thread, for which the events are made but never waited on.
    unsafe { device.disable_event_tracking() };
    let stream = device.cuda_stream();
    let mut keep = u64::MAX;
    // SAFETY: the device handle is that of a live context, the pool is the device's own, and the attribute takes a
    // 64-bit number, which is copied before the call returns.
    unsafe {
        let pool = result::device::get_default_mem_pool(stream.context().cu_device()).w()?;
        result::mem_pool::set_attribute(
            pool,
            sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
            std::ptr::from_mut(&mut keep).cast(),
        )
        .w()
    }
}

/// See [`super::release_unused_memory`].
pub(super) fn release(device: &CudaDevice) -> Result<()> {
    let stream = device.cuda_stream();
    stream.synchronize().w()?; // what is freed behind running work counts as used
    let handle = stream.context().cu_device();
    // SAFETY: the device handle is that of a live context, and the pool is the device's own.
    unsafe {
        let pool = result::device::get_default_mem_pool(handle).w()?;
        result::mem_pool::trim_to(pool, 0).w()?;
        sys::cuDeviceGraphMemTrim(handle).result().w() // what graphs that are gone have left
    }
}

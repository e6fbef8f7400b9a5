//! Launches, and the addresses of tensors.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, LaunchConfig};
use candle_core::{CpuStorage, CudaStorage, DType, InplaceOp1, Layout, Result, Storage, Tensor, bail};
use half::{bf16, f16};
use std::cell::Cell;

/// The compiled kernels, a constant a `.cu` file.
#[allow(unreachable_pub, reason = "the builder writes the constants")]
pub(super) mod ptx {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

/// Launches a kernel: `launch!(device, MODULE, name, config, arguments...)`, each argument a reference.
macro_rules! launch {
    ($device:expr, $module:ident, $name:expr, $config:expr, $($argument:expr),+ $(,)?) => {{
        use candle_core::cuda_backend::WrapErr as _;
        use candle_core::cuda_backend::cudarc::driver::PushKernelArg as _;
        let function = $device.get_or_load_custom_func(
            $name,
            concat!("velvet-optim-", stringify!($module)),
            super::launch::ptx::$module,
        )?;
        let mut builder = function.builder();
        $(builder.arg($argument);)+
        // SAFETY: the arguments are in the order and of the types of the kernel in the `.cu` file of that name. The
        // addresses among them are of live device memory of this stream's device, as long as the kernel takes it to be,
        // and memory that is freed after the launch is freed in the order of the stream.
        unsafe { builder.launch($config) }.w()?;
    }};
}
pub(super) use launch;

/// A launch of `blocks` blocks of `threads` threads.
pub(super) fn blocks(blocks: u32, threads: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 }
}

/// A size as the kernels take it.
pub(super) fn size(n: usize) -> Result<u32> {
    match i32::try_from(n) {
        Ok(n) => Ok(n as u32),
        Err(_) => bail!("{n} is too large for a CUDA kernel"),
    }
}

/// The name of an element type in the names of kernels; `None` without kernels.
pub(super) fn name(dtype: DType) -> Option<&'static str> {
    match dtype {
        DType::F32 => Some("f32"),
        DType::BF16 => Some("bf16"),
        DType::F16 => Some("f16"),
        _ => None,
    }
}

/// Runs generic code for the element type of a dtype that tensors on a device may have.
macro_rules! by_dtype {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            DType::F32 => {
                type $T = f32;
                $body
            }
            DType::F64 => {
                type $T = f64;
                $body
            }
            DType::BF16 => {
                type $T = bf16;
                $body
            }
            DType::F16 => {
                type $T = f16;
                $body
            }
            DType::U8 => {
                type $T = u8;
                $body
            }
            other => bail!("no CUDA kernel for {other:?}"),
        }
    };
}

/// The address of the first element of a contiguous tensor, for reading.
///
/// The stream waits for what other streams still write there. The address is good as long as the tensor lives, and for
/// work that was launched on the stream before it goes.
pub(super) fn address(tensor: &Tensor, stream: &CudaStream) -> Result<u64> {
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { bail!("a tensor of a CUDA step is not on a CUDA device") };
    let start = start(layout)?;
    let base = by_dtype!(storage.dtype(), T => {
        let (base, _record) = T::as_cuda_slice(storage)?.device_ptr(stream);
        base
    });
    Ok(base + start * storage.dtype().size_in_bytes() as u64)
}

/// The address of the first element of a contiguous tensor that has elements, for writing.
pub(super) fn address_mut(tensor: &Tensor, stream: &CudaStream) -> Result<u64> {
    let lend = Lend { stream, address: Cell::new(0) };
    tensor.inplace_op1(&lend)?;
    Ok(lend.address.get())
}

struct Lend<'a> {
    stream: &'a CudaStream,
    address: Cell<u64>,
}

impl InplaceOp1 for Lend<'_> {
    fn name(&self) -> &'static str {
        "velvet-step-cuda"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        bail!("a tensor of a CUDA step is not on a CUDA device")
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let (dtype, start) = (storage.dtype(), start(layout)?);
        let base = by_dtype!(dtype, T => {
            let (base, _record) = T::as_cuda_slice_mut(storage)?.device_ptr_mut(self.stream);
            base
        });
        self.address.set(base + start * dtype.size_in_bytes() as u64);
        Ok(())
    }
}

fn start(layout: &Layout) -> Result<u64> {
    match layout.contiguous_offsets() {
        Some((start, _)) => Ok(start as u64),
        None => bail!("cannot update a parameter that is not contiguous"),
    }
}

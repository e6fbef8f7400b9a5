//! Element types, views of storages, and launches.

use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DeviceRepr, LaunchConfig};
use candle_core::op::BackpropOp;
use candle_core::{
    CudaDevice, CudaStorage, DType, Device, Layout, Result, Shape, Storage, Tensor, WithDType, bail,
};

/// The compiled kernels, a constant a `.cu` file.
#[allow(unreachable_pub)] // the generated file knows nothing of this module
mod ptx {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

/// What every kernel gets.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Params {
    pub(super) n: u64,
    pub(super) width: u32,
    pub(super) a: f32,
    pub(super) a_low: f32,
    pub(super) b: f32,
}

const _: () = assert!(size_of::<Params>() == 24);
// SAFETY: plain numbers in the layout of the kernels' `Params`.
unsafe impl DeviceRepr for Params {}

/// A type that the kernels read and write.
pub(super) trait Element: CudaDType + DeviceRepr + WithDType {
    /// In the names of kernels.
    const NAME: &'static str;
    /// How many elements 16 bytes hold.
    const WIDE: usize = 16 / size_of::<Self>();
}

impl Element for f32 {
    const NAME: &'static str = "f32";
}

impl Element for half::bf16 {
    const NAME: &'static str = "bf16";
}

impl Element for half::f16 {
    const NAME: &'static str = "f16";
}

/// Runs generic code for the element type of a dtype.
macro_rules! by_dtype {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            candle_core::DType::F16 => {
                type $T = half::f16;
                $body
            }
            other => candle_core::bail!("no CUDA kernel for {other:?}"),
        }
    };
}
pub(super) use by_dtype;

/// A `.cu` file.
#[derive(Debug, Clone, Copy)]
pub(super) enum Module {
    Elementwise,
    Gated,
    Learned,
}

impl Module {
    /// The name that candle keeps it under, unique in a process.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Elementwise => "era-act-elementwise",
            Self::Gated => "era-act-gated",
            Self::Learned => "era-act-learned",
        }
    }

    pub(super) fn ptx(self) -> &'static str {
        match self {
            Self::Elementwise => ptx::ELEMENTWISE,
            Self::Gated => ptx::GATED,
            Self::Learned => ptx::LEARNED,
        }
    }
}

/// Launches a kernel: `launch!(device, module, name, config, arguments...)`, each argument a reference.
macro_rules! launch {
    ($device:expr, $module:expr, $name:expr, $config:expr, $($argument:expr),+ $(,)?) => {{
        use candle_core::cuda_backend::WrapErr as _;
        use candle_core::cuda_backend::cudarc::driver::PushKernelArg as _;
        let module: $crate::cuda::launch::Module = $module;
        let function = $device.get_or_load_custom_func($name, module.name(), module.ptx())?;
        let mut builder = function.builder();
        $(builder.arg($argument);)+
        // SAFETY: the arguments are in the order and of the types of the kernel in the `.cu` file of the module, and
        // the sizes among them are those of the buffers.
        unsafe { builder.launch($config) }.w()?;
    }};
}
pub(super) use launch;

/// A launch of `blocks` blocks of 256 threads.
pub(super) fn blocks(blocks: usize) -> Result<LaunchConfig> {
    Ok(LaunchConfig { grid_dim: (size(blocks)?, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 })
}

/// A launch over rows of `vectors` vectors, in blocks of at most 256 threads of as few idle columns as can be, and at
/// most `blocks` blocks where the columns allow it.
pub(super) fn grid(rows: usize, vectors: usize, blocks: usize) -> Result<LaunchConfig> {
    let idle = |x: &usize| (vectors.next_multiple_of(*x), usize::MAX - x);
    let x =
        if vectors < 32 { vectors.max(1) } else { (1..=8).map(|w| 32 * w).min_by_key(idle).unwrap_or(256) };
    let y = (256 / x).max(1);
    let columns = vectors.div_ceil(x).max(1);
    let bands = rows.div_ceil(y).clamp(1, (blocks / columns).clamp(1, 65_535));
    Ok(LaunchConfig {
        grid_dim: (size(columns)?, size(bands)?, 1),
        block_dim: (size(x)?, size(y)?, 1),
        shared_mem_bytes: 0,
    })
}

/// A size as the kernels take it.
pub(super) fn size(n: usize) -> Result<u32> {
    match i32::try_from(n) {
        Ok(n) => Ok(n as u32),
        Err(_) => bail!("a size of {n} is too large for a CUDA kernel"),
    }
}

/// Memory for `n` elements, to be written by the next kernel. Never empty, which the driver does not allow.
pub(super) fn allocate<T: DeviceRepr>(device: &CudaDevice, n: usize) -> Result<CudaSlice<T>> {
    // SAFETY: every caller passes it to a kernel that writes all of it before anything reads it.
    unsafe { device.alloc::<T>(n.max(1)) }
}

/// The elements of a contiguous storage that starts at a multiple of 16 bytes.
pub(super) fn view<'a, T: CudaDType>(storage: &'a CudaStorage, layout: &Layout) -> Result<CudaView<'a, T>> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("a CUDA kernel got a tensor that is not contiguous: {layout:?}");
    };
    if !(start * size_of::<T>()).is_multiple_of(16) {
        bail!("a CUDA kernel got a tensor that does not start at a multiple of 16 bytes: {layout:?}");
    }
    let slice = storage.as_cuda_slice::<T>()?;
    match slice.try_slice(start..end) {
        Some(view) => Ok(view),
        None => bail!("layout {layout:?} reaches outside a storage"),
    }
}

/// The storage of what a kernel wrote.
pub(super) fn wrap<T: CudaDType>(slice: CudaSlice<T>, device: &CudaDevice) -> CudaStorage {
    CudaStorage::wrap_cuda_slice(slice, device.clone())
}

/// A tensor, outside of any graph, of what a kernel wrote.
pub(super) fn tensor(storage: CudaStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

/// Zeros outside of any graph: what an activation of nothing gives. (The driver allocates and launches nothing empty,
/// so candle's own operations fail on it.)
pub(super) fn nothing(device: &Device, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    let device = device.as_cuda_device()?;
    let storage = by_dtype!(dtype, T => wrap(device.alloc_zeros::<T>(1)?, device));
    Ok(tensor(storage, shape))
}

/// The same values in contiguous memory that starts at a multiple of 16 bytes.
pub(super) fn aligned(tensor: &Tensor) -> Result<Tensor> {
    let tensor = tensor.contiguous()?;
    let offset = tensor.layout().start_offset() * tensor.dtype().size_in_bytes();
    if offset.is_multiple_of(16) { Ok(tensor) } else { tensor.force_contiguous() }
}

//! Element types, views of storages, and launches.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaView, DeviceRepr, LaunchConfig, sys};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{
    CudaDevice, CudaStorage, DType, Device, Layout, Result, Shape, Storage, StorageRef, Tensor, WithDType,
    bail,
};

/// The compiled kernels, a constant a `.cu` file.
#[allow(unreachable_pub)] // the generated file knows nothing of this module
mod ptx {
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

/// A type that the kernels read and write.
pub(super) trait Element: CudaDType + DeviceRepr + WithDType {
    /// In the names of kernels.
    const NAME: &'static str;
    /// How many elements 16 bytes hold.
    const WIDE: usize = 16 / size_of::<Self>();
    /// The kernels on tensor cores for products with few ranks, where there are any.
    const TENSOR: Option<Module> = None;
}

impl Element for f32 {
    const NAME: &'static str = "f32";
    const TENSOR: Option<Module> = if cfg!(tensor_cores) { Some(Module::TensorF32) } else { None };
}

impl Element for half::bf16 {
    const NAME: &'static str = "bf16";
    const TENSOR: Option<Module> = if cfg!(tensor_cores) { Some(Module::Tensor) } else { None };
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Module {
    Skinny,
    Tensor,
    TensorF32,
    Sweep,
    SweepTensor,
    Pair,
    Layer,
    Route,
    Select,
    Dropout,
}

impl Module {
    /// The name that candle keeps it under, unique in a process.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Skinny => "flylora-skinny",
            Self::Tensor => "flylora-tensor",
            Self::TensorF32 => "flylora-tensor-f32",
            Self::Sweep => "flylora-sweep",
            Self::SweepTensor => "flylora-sweep-tensor",
            Self::Pair => "flylora-pair",
            Self::Layer => "flylora-layer",
            Self::Route => "flylora-route",
            Self::Select => "flylora-select",
            Self::Dropout => "flylora-dropout",
        }
    }

    pub(super) fn ptx(self) -> &'static str {
        match self {
            Self::Skinny => ptx::SKINNY,
            Self::Tensor => ptx::TENSOR,
            Self::TensorF32 => ptx::TENSOR_F32,
            Self::Sweep => ptx::SWEEP,
            Self::SweepTensor => ptx::SWEEP_TENSOR,
            Self::Pair => ptx::PAIR,
            Self::Layer => ptx::LAYER,
            Self::Route => ptx::ROUTE,
            Self::Select => ptx::SELECT,
            Self::Dropout => ptx::DROPOUT,
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
        let config = $config;
        $crate::cuda::launch::allow_shared(&function, config.shared_mem_bytes)?;
        let mut builder = function.builder();
        $(builder.arg($argument);)+
        // SAFETY: the arguments are in the order and of the types of the kernel in the `.cu` file of the module, and
        // the sizes among them are those of the buffers.
        unsafe { builder.launch(config) }.w()?;
    }};
}
pub(super) use launch;

/// Shared memory above 48 KiB a block has to be asked for: what a launch adds counts together with what the kernel itself
/// declares, which is below 32 KiB in all that a launch adds to.
pub(super) fn allow_shared(
    function: &candle_core::cuda_backend::cudarc::driver::CudaFunction,
    bytes: u32,
) -> Result<()> {
    const FREE: u32 = 48 * 1024;
    if bytes > FREE - 32 * 1024 {
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(attribute, bytes.max(FREE) as i32).w()?; // never less than without asking
    }
    Ok(())
}

/// A number that the driver knows of a device.
pub(super) fn attribute(device: &CudaDevice, attribute: sys::CUdevice_attribute) -> Result<usize> {
    let value = device.cuda_stream().context().attribute(attribute).w()?;
    Ok(usize::try_from(value).unwrap_or(0))
}

/// How many multiprocessors a device has: at least 1.
pub(super) fn multiprocessors(device: &CudaDevice) -> Result<usize> {
    let attribute = attribute(device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    Ok(attribute.max(1))
}

/// A size as the kernels take it.
pub(super) fn size(n: usize) -> Result<u32> {
    match i32::try_from(n) {
        Ok(n) => Ok(n as u32),
        Err(_) => bail!("a size of {n} is too large for a CUDA kernel"),
    }
}

pub(super) fn config(grid: (usize, usize), block: (usize, usize), shared: usize) -> Result<LaunchConfig> {
    Ok(LaunchConfig {
        grid_dim: (size(grid.0)?, size(grid.1)?, 1),
        block_dim: (size(block.0)?, size(block.1)?, 1),
        shared_mem_bytes: size(shared)?,
    })
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

/// A tensor that is held for reading.
pub(super) struct Held<'a> {
    storage: StorageRef<'a>,
    layout: &'a Layout,
}

impl<'a> Held<'a> {
    pub(super) fn new(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage, layout }
    }

    pub(super) fn storage(&self) -> Result<&CudaStorage> {
        match &*self.storage {
            Storage::Cuda(storage) => Ok(storage),
            _ => bail!("a CUDA kernel got a tensor that is not on a CUDA device"),
        }
    }

    pub(super) fn parts(&self) -> Result<(&CudaStorage, &Layout)> {
        Ok((self.storage()?, self.layout))
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

/// Zeros outside of any graph, also of an empty shape, which the driver does not allocate.
pub(super) fn zeros(device: &Device, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    let (device, shape) = (device.as_cuda_device()?, shape.into());
    let n = shape.elem_count().max(1);
    let storage = by_dtype!(dtype, T => wrap(device.alloc_zeros::<T>(n)?, device));
    Ok(tensor(storage, shape))
}

/// The same values in contiguous memory that starts at a multiple of 16 bytes.
pub(crate) fn aligned(tensor: &Tensor) -> Result<Tensor> {
    let tensor = tensor.contiguous()?;
    let offset = tensor.layout().start_offset() * tensor.dtype().size_in_bytes();
    if offset.is_multiple_of(16) { Ok(tensor) } else { tensor.force_contiguous() }
}

/// What the CPU half of a CUDA operation says: the dispatch never sends it there.
pub(super) fn not_here<R>(name: &str) -> Result<R> {
    bail!("{name}: the CUDA operation got tensors on the CPU")
}

//! Element types, views of storages, and launches.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::cublas::sys::cudaDataType_t;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaSlice, CudaView, DeviceRepr, LaunchConfig, sys,
};
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
    /// In cuBLAS.
    const BLAS: cudaDataType_t;
    /// How many elements 16 bytes hold.
    const WIDE: usize = 16 / size_of::<Self>();
}

impl Element for f32 {
    const NAME: &'static str = "f32";
    const BLAS: cudaDataType_t = cudaDataType_t::CUDA_R_32F;
}

impl Element for half::bf16 {
    const NAME: &'static str = "bf16";
    const BLAS: cudaDataType_t = cudaDataType_t::CUDA_R_16BF;
}

impl Element for half::f16 {
    const NAME: &'static str = "f16";
    const BLAS: cudaDataType_t = cudaDataType_t::CUDA_R_16F;
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

/// A `.cu` file, and the constant of its compiled kernels.
macro_rules! modules {
    ($($module:ident $constant:ident,)+) => {
        /// A `.cu` file.
        #[derive(Debug, Clone, Copy)]
        pub(super) enum Module {
            $($module,)+
        }

        impl Module {
            /// The name that candle keeps it under, unique in a process.
            pub(super) fn name(self) -> &'static str {
                match self {
                    $(Self::$module => concat!("vesper-", stringify!($module)),)+
                }
            }

            pub(super) fn ptx(self) -> &'static str {
                match self {
                    $(Self::$module => ptx::$constant,)+
                }
            }
        }
    };
}

modules! {
    Attention ATTENTION,
    AttentionBackward ATTENTION_BACKWARD,
    AttentionCached ATTENTION_CACHED,
    AttentionCachedPlain ATTENTION_CACHED_PLAIN,
    AttentionPlain ATTENTION_PLAIN,
    AttentionWarpgroup ATTENTION_WARPGROUP,
    AttentionWarpgroupBackward ATTENTION_WARPGROUP_BACKWARD,
    AttentionWarpgroupCached ATTENTION_WARPGROUP_CACHED,
    Cache CACHE,
    Cast CAST,
    CrossEntropy CROSS_ENTROPY,
    DecodeAttention DECODE_ATTENTION,
    DecodeBf16 DECODE_BF16,
    DecodeF16 DECODE_F16,
    DecodeF32 DECODE_F32,
    DecodeNext DECODE_NEXT,
    DecodeQ2K DECODE_Q2_K,
    DecodeQ3K DECODE_Q3_K,
    DecodeQ4K DECODE_Q4_K,
    DecodeQ4_0 DECODE_Q4_0,
    DecodeQ4_1 DECODE_Q4_1,
    DecodeQ5K DECODE_Q5_K,
    DecodeQ5_0 DECODE_Q5_0,
    DecodeQ5_1 DECODE_Q5_1,
    DecodeQ6K DECODE_Q6_K,
    DecodeQ8_0 DECODE_Q8_0,
    Dropout DROPOUT,
    Embedding EMBEDDING,
    LayerNorm LAYER_NORM,
    Norms NORMS,
    Residual RESIDUAL,
    RmsNorm RMS_NORM,
    Rope ROPE,
}

/// Launches a kernel: `launch!(device, module, name, config, arguments...)`, each argument a reference.
macro_rules! launch {
    ($device:expr, $module:expr, $name:expr, $config:expr, $($argument:expr),+ $(,)?) => {{
        use candle_core::cuda_backend::WrapErr as _;
        use candle_core::cuda_backend::cudarc::driver::PushKernelArg as _;
        let module: $crate::ops::cuda::launch::Module = $module;
        let function = $device.get_or_load_custom_func($name, module.name(), module.ptx())?;
        let config = $config;
        $crate::ops::cuda::launch::allow_shared(&function, config.shared_mem_bytes)?;
        let mut builder = function.builder();
        $(builder.arg($argument);)+
        // SAFETY: the arguments are in the order and of the types of the kernel in the `.cu` file of the same name,
        // and the sizes among them are those of the buffers.
        unsafe { builder.launch(config) }.w()?;
    }};
}
pub(super) use launch;

/// Shared memory above 48 KiB a block has to be asked for: what a launch adds counts together with what the kernel itself
/// declares, which is below 32 KiB in all that a launch adds to.
///
/// What was asked for holds for all who launch the kernel on the device, so it never becomes less.
pub(super) fn allow_shared(function: &CudaFunction, bytes: u32) -> Result<()> {
    const FREE: u32 = 48 * 1024;
    /// The most that was asked for, by the function's handle.
    static ASKED: Mutex<BTreeMap<usize, u32>> = Mutex::new(BTreeMap::new());
    if bytes <= FREE - 32 * 1024 {
        return Ok(());
    }
    let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    let wanted = bytes.max(FREE); // never less than without asking
    let mut asked = ASKED.lock().unwrap_or_else(PoisonError::into_inner);
    let handle = function.cu_function() as usize;
    let most = asked.get(&handle).map_or(wanted, |&before| before.max(wanted));
    if function.set_attribute(attribute, most as i32).is_ok() {
        asked.insert(handle, most);
        return Ok(());
    }
    // The handle may have been that of another function, which is gone.
    function.set_attribute(attribute, wanted as i32).w()?;
    asked.insert(handle, wanted);
    Ok(())
}

/// A launch of `blocks` blocks of `threads` threads.
pub(super) fn blocks(blocks: usize, threads: u32) -> Result<LaunchConfig> {
    Ok(LaunchConfig { grid_dim: (size(blocks)?, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 })
}

/// A size as the kernels take it.
pub(super) fn size(n: usize) -> Result<u32> {
    match i32::try_from(n) {
        Ok(n) => Ok(n as u32),
        Err(_) => bail!("a size of {n} is too large for a CUDA kernel"),
    }
}

/// How many multiprocessors the device has.
pub(super) fn multiprocessors(device: &CudaDevice) -> Result<usize> {
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
    Ok(device.cuda_stream().context().attribute(attribute).w()?.max(1) as usize)
}

/// Memory for `n` elements, to be written by the next kernel. Never empty, which the driver does not allow.
pub(super) fn allocate<T: DeviceRepr>(device: &CudaDevice, n: usize) -> Result<CudaSlice<T>> {
    // SAFETY: every caller passes it to a kernel or a product that writes all of it before anything reads it.
    unsafe { device.alloc::<T>(n.max(1)) }
}

/// The elements of a contiguous storage.
pub(super) fn view<'a, T: CudaDType>(storage: &'a CudaStorage, layout: &Layout) -> Result<CudaView<'a, T>> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("a CUDA kernel got a tensor that is not contiguous: {layout:?}");
    };
    let slice = storage.as_cuda_slice::<T>()?;
    match slice.try_slice(start..end) {
        Some(view) => Ok(view),
        None => bail!("layout {layout:?} reaches outside a storage"),
    }
}

/// Whether rows of `width` elements of the layouts can be read 16 bytes at a time.
pub(super) fn is_wide<T: Element>(width: usize, layouts: &[&Layout]) -> bool {
    width.is_multiple_of(T::WIDE) && layouts.iter().all(|l| l.start_offset().is_multiple_of(T::WIDE))
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

    pub(super) fn layout(&self) -> &Layout {
        self.layout
    }

    pub(super) fn view<T: CudaDType>(&self) -> Result<CudaView<'_, T>> {
        view(self.storage()?, self.layout)
    }

    pub(super) fn device(&self) -> Result<&CudaDevice> {
        Ok(self.storage()?.device())
    }
}

/// The storage of what a kernel wrote.
pub(super) fn wrap<T: CudaDType>(slice: CudaSlice<T>, device: &CudaDevice) -> CudaStorage {
    CudaStorage::wrap_cuda_slice(slice, device.clone())
}

/// A tensor, outside of any graph, of what a kernel wrote.
pub(super) fn tensor<T: CudaDType>(
    slice: CudaSlice<T>,
    device: &CudaDevice,
    shape: impl Into<Shape>,
) -> Tensor {
    from_storage(wrap(slice, device), shape)
}

pub(super) fn from_storage(storage: CudaStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

/// Zeros outside of any graph: what an operation on nothing gives. (The driver allocates and launches nothing empty,
/// so candle's own operations fail on it.)
pub(in crate::ops) fn zeros(device: &Device, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    let (device, shape) = (device.as_cuda_device()?, shape.into());
    let n = shape.elem_count().max(1);
    let storage = by_dtype!(dtype, T => wrap(device.alloc_zeros::<T>(n)?, device));
    Ok(from_storage(storage, shape))
}

/// Whether one of the inputs has no elements.
pub(super) fn is_empty(inputs: &[&Tensor]) -> bool {
    inputs.iter().any(|x| x.elem_count() == 0)
}

/// The same values in contiguous memory that starts at a multiple of 16 bytes.
pub(super) fn aligned(tensor: &Tensor) -> Result<Tensor> {
    let tensor = tensor.contiguous()?;
    let offset = tensor.layout().start_offset() * tensor.dtype().size_in_bytes();
    if offset.is_multiple_of(16) { Ok(tensor) } else { tensor.force_contiguous() }
}

/// The name of a kernel for the element type, over vectors of 16 bytes or single elements.
pub(super) fn name<T: Element>(kernel: &str, wide: bool) -> String {
    format!("{kernel}_{}_{}", T::NAME, if wide { "wide" } else { "single" })
}

/// What the CPU half of a CUDA operation says: the dispatch never sends it there.
pub(super) fn not_here<R>(name: &str) -> Result<R> {
    bail!("{name}: the CUDA operation got tensors on the CPU")
}

/// Whether there are kernels for a dtype.
pub(in crate::ops) fn has_kernels(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::BF16 | DType::F16)
}

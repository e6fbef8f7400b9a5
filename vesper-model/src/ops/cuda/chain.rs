//! Launches of kernels that begin before the one in front of them has ended: programmatic dependent launch, from compute
//! capability 9.0 on. Such a kernel waits by itself (`griddepcontrol.wait`) before it reads what others wrote.

use std::ffi::c_void;
use std::sync::Arc;

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, CudaStream, LaunchConfig, sys};
use candle_core::{CudaDevice, Result};

/// A stream, and whether its launches overlap.
pub(super) struct Chain {
    stream: Arc<CudaStream>,
    overlap: bool,
}

impl Chain {
    pub(super) fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
        // Kernels that were compiled for less do not wait, and must not overlap.
        let overlap = cfg!(dependent_launch) && stream.context().attribute(attribute).w()? >= 9;
        Ok(Self { stream, overlap })
    }

    /// # Safety
    /// The arguments point to values of the types of the kernel's parameters, in their order, and the addresses among them
    /// to memory of the sizes that it expects. With overlap the kernel waits before it reads or writes memory that
    /// kernels before it in the stream write or read.
    pub(super) unsafe fn launch(
        &self,
        function: &CudaFunction,
        config: LaunchConfig,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        self.stream.context().bind_to_thread().w()?;
        let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
        value.programmaticStreamSerializationAllowed = 1;
        let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        let mut attribute = sys::CUlaunchAttribute { id, pad: [0; 4], value };
        let ((x, y, z), (a, b, c)) = (config.grid_dim, config.block_dim);
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: a,
            blockDimY: b,
            blockDimZ: c,
            sharedMemBytes: config.shared_mem_bytes,
            hStream: self.stream.cu_stream(),
            attrs: &raw mut attribute,
            numAttrs: u32::from(self.overlap),
        };
        // SAFETY: the configuration and what it points to live until the call returns; the rest is the caller's promise.
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                function.cu_function(),
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .w()
    }
}

/// `follow!(chain, function, config, arguments...)`, each argument a reference: the next kernel of a chain.
macro_rules! follow {
    ($chain:expr, $function:expr, $config:expr, $($argument:expr),+ $(,)?) => {{
        let mut arguments = [$(std::ptr::from_ref($argument).cast_mut().cast::<std::ffi::c_void>()),+];
        // SAFETY: the arguments are in the order and of the types of the kernel in the `.cu` file, the sizes among them
        // are those of the buffers, and every kernel of a chain waits before it touches memory that others write.
        unsafe { $chain.launch($function, $config, &mut arguments) }?;
    }};
}
pub(super) use follow;

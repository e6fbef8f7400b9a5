//! How a CUDA device is set up for training.

use candle_core::{Device, Result};

/// Opens the CUDA device `ordinal`, set up for training.
///
/// All work goes to one stream of its own, whichever thread asks for it (the stream of [`Device::new_cuda`] is another
/// one in each thread), and [`prepare_cuda_device`] has been applied.
///
/// # Errors
/// No such device, no driver, or a build without the feature `cuda`.
///
/// # Examples
/// ```
/// use candle_core::Device;
/// let device = vesper_model::ops::cuda_device(0).unwrap_or(Device::Cpu);
/// # let _ = device;
/// ```
pub fn cuda_device(ordinal: usize) -> Result<Device> {
    let device = Device::new_cuda_with_stream(ordinal)?;
    prepare_cuda_device(&device)?;
    Ok(device)
}

/// Sets up a CUDA device for training: call it before the first tensor is made there. Nothing on other devices.
///
/// - The memory pool keeps what is freed: by default it hands everything back to the driver at each
///   synchronisation, and every step allocates it anew.
/// - Allocations carry no events any more: candle creates two for each, which only matter where several streams share
///   a tensor.
///
/// Afterwards the tensors of this device are for its own stream: candle's own calls keep to that. A device of
/// [`Device::new_cuda`] has a stream a thread and orders nothing between them, before this call or after it: use it in
/// one thread, or open the device by [`cuda_device`].
///
/// # Errors
/// What the driver reports.
pub fn prepare_cuda_device(device: &Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return super::cuda::prepare(device);
    }
    let _ = device;
    Ok(())
}

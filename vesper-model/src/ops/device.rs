//! How a device is set up for training.

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

/// Hands the memory that a CUDA device's pool keeps but no tensor uses back to the driver, for other programs; waits for
/// the device. Nothing on other devices.
///
/// After [`prepare_cuda_device`] the pool keeps what the largest step so far needed: useful between a training and
/// something smaller.
///
/// # Errors
/// What the driver reports.
///
/// # Examples
/// ```
/// use vesper_model::ops::release_unused_memory;
/// release_unused_memory(&candle_core::Device::Cpu)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn release_unused_memory(device: &Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return super::cuda::release(device);
    }
    let _ = device;
    Ok(())
}

/// Sets up the process for training on the CPU: call it once, before the first tensor is made. It returns whether it
/// has changed anything.
///
/// A step of training allocates and frees every activation and gradient, several times the size of the model. By
/// default glibc's allocator hands large blocks back to the kernel at once, which clears each of their pages when they
/// come back, and stops the other threads for a moment: that can take half of a step. After this call it keeps what is
/// freed, up to the process's own peak, until the process ends. With other allocators and on other systems nothing
/// happens.
///
/// # Examples
/// ```
/// vesper_model::ops::prepare_cpu();
/// let device = candle_core::Device::Cpu;
/// # let _ = device;
/// ```
///
/// # References
/// `man 3 mallopt`: `M_MMAP_THRESHOLD`, `M_TRIM_THRESHOLD`, `M_TOP_PAD`.
pub fn prepare_cpu() -> bool {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        // Blocks of up to a GiB come from the heap, which grows by 64 MiB and never shrinks.
        let settings =
            [(libc::M_MMAP_THRESHOLD, 1 << 30), (libc::M_TRIM_THRESHOLD, -1), (libc::M_TOP_PAD, 64 << 20)];
        // SAFETY: mallopt takes two numbers, locks what it changes, and answers 0 to those that it does not take.
        settings.into_iter().all(|(parameter, value)| unsafe { libc::mallopt(parameter, value) } == 1)
    }
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    false
}

#[cfg(test)]
mod tests {
    #[test]
    fn glibc_takes_the_settings_every_time() {
        let expected = cfg!(all(target_os = "linux", target_env = "gnu"));
        assert_eq!([super::prepare_cpu(), super::prepare_cpu()], [expected; 2]);
    }
}

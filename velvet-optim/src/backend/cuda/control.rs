//! The optimizer's own state on the device, and the kernels that work on it.

use super::Failure;
use super::launch::{blocks, launch, size};
use super::layout::{BITS, COEFFICIENT_WORDS, Control, Number, Present, Settings, THREADS};
use super::plan::Plan;
use crate::backend::Snapshot;
use crate::error::Result;
use crate::parameter::UpdateSize;
use crate::stats::Stats;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DeviceRepr, PinnedHostSlice, ValidAsZeroBits, sys,
};
use candle_core::{CudaDevice, DType, Tensor};
use std::sync::atomic::{AtomicU64, Ordering};

/// Memory of this back end's own: nothing else has it, and only kernels on one stream touch it.
pub(super) struct Buffer<T> {
    slice: CudaSlice<T>,
    /// Of the first element.
    pub(super) address: u64,
}

impl<T: DeviceRepr + ValidAsZeroBits> Buffer<T> {
    /// At least one element, all zero.
    pub(super) fn zeros(device: &CudaDevice, len: usize) -> candle_core::Result<Self> {
        let slice = device.alloc_zeros::<T>(len.max(1))?;
        let stream = device.cuda_stream();
        let address = slice.device_ptr(&stream).0;
        Ok(Self { slice, address })
    }

    pub(super) fn read(&self, device: &CudaDevice, len: usize) -> candle_core::Result<Vec<T>> {
        let mut values = device.cuda_stream().clone_dtoh(&self.slice).w()?;
        values.truncate(len);
        Ok(values)
    }

    /// Replaces the first elements; more than there are is an error.
    pub(super) fn write(&mut self, device: &CudaDevice, values: &[T]) -> candle_core::Result<()> {
        if values.len() > self.slice.len() {
            candle_core::bail!("{} values for a buffer of {}", values.len(), self.slice.len())
        }
        if values.is_empty() {
            return Ok(());
        }
        device.cuda_stream().memcpy_htod(values, &mut self.slice).w()
    }
}

/// Everything on the device that is not a state array.
pub(super) struct ControlBlock {
    device: CudaDevice,
    parameters: usize,
    control: Buffer<Control>,
    products: Buffer<f64>,
    sizes: Buffer<f64>,
    pub(super) sums: Buffer<f64>,
    failed_sums: Buffer<f64>,
    /// The learning rate of each parameter in this step.
    rates: Buffer<f64>,
    measured: Buffer<f64>,
    /// A sum a chunk.
    pub(super) partials: Buffer<f64>,
    /// What the update of each chunk was: three sums.
    pub(super) changes: Buffer<f64>,
    pub(super) coefficients: Buffer<u64>,
    mailbox: Mailbox,
}

impl ControlBlock {
    pub(super) fn new(device: &CudaDevice, parameters: usize, chunks: usize) -> Result<Self> {
        let doubles = |len| Buffer::<f64>::zeros(device, len);
        Ok(Self {
            parameters,
            control: Buffer::zeros(device, 1)?,
            products: doubles(2 * parameters)?,
            sizes: doubles(3 * parameters)?,
            sums: doubles(parameters)?,
            failed_sums: doubles(parameters)?,
            rates: doubles(parameters)?,
            measured: doubles(3 * parameters)?,
            partials: doubles(chunks)?,
            changes: doubles(3 * chunks)?,
            coefficients: Buffer::zeros(device, COEFFICIENT_WORDS * parameters)?,
            mailbox: Mailbox::new(device)?,
            device: device.clone(),
        })
    }

    pub(super) fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// The address of the control block itself.
    pub(super) fn address(&self) -> u64 {
        self.control.address
    }

    /// Replaces everything.
    pub(super) fn write(&mut self, lr: f64, from: &Snapshot) -> Result<()> {
        let Snapshot { stats, averages, products, sizes } = from;
        let control = Control {
            base_lr: lr,
            averages: averages.map(|average| average.unwrap_or(f64::NAN)),
            grad_norm: stats.grad_norm.unwrap_or(0.0),
            clip_scale: stats.clip_scale,
            lr: stats.lr,
            beta1: stats.beta1,
            progress: stats.progress.unwrap_or(0.0),
            update_ratio: stats.update_ratio.unwrap_or(0.0),
            step: stats.step,
            skipped: stats.skipped,
            ignored: stats.ignored_losses,
            has_norm: u64::from(stats.grad_norm.is_some()),
            has_progress: u64::from(stats.progress.is_some()),
            has_ratio: u64::from(stats.update_ratio.is_some()),
            ..Control::default()
        };
        self.clear_failure()?;
        self.control.write(&self.device, &[control])?;
        self.products.write(&self.device, products.as_flattened())?;
        let sizes: Vec<f64> = sizes
            .iter()
            .flat_map(|size| size.map_or([f64::NAN; 3], |size| [size.change, size.weight, size.ratio]))
            .collect();
        Ok(self.sizes.write(&self.device, &sizes)?)
    }

    pub(super) fn read(&self) -> Result<Snapshot> {
        let control = self.read_control()?;
        let some = |has: u64, value: f64| (has != 0).then_some(value);
        let products = self.products.read(&self.device, 2 * self.parameters)?;
        let sizes = self.sizes.read(&self.device, 3 * self.parameters)?;
        Ok(Snapshot {
            stats: Stats {
                step: control.step,
                grad_norm: some(control.has_norm, control.grad_norm),
                clip_scale: control.clip_scale,
                lr: control.lr,
                beta1: control.beta1,
                progress: some(control.has_progress, control.progress),
                update_ratio: some(control.has_ratio, control.update_ratio),
                skipped: control.skipped,
                ignored_losses: control.ignored,
            },
            averages: control.averages.map(|average| Some(average).filter(|average| !average.is_nan())),
            products: products.as_chunks().0.to_vec(),
            sizes: sizes
                .as_chunks()
                .0
                .iter()
                .map(|&[change, weight, ratio]| {
                    (!change.is_nan()).then_some(UpdateSize { change, weight, ratio })
                })
                .collect(),
        })
    }

    fn read_control(&self) -> Result<Control> {
        let values = self.control.read(&self.device, 1)?;
        Ok(values.first().copied().unwrap_or_default())
    }

    pub(super) fn failure(&self, wait: bool) -> Result<Option<Failure>> {
        if !wait && !self.mailbox.is_full() {
            return Ok(None);
        }
        let control = self.read_control()?;
        if control.failed_step == 0 {
            return Ok(None);
        }
        let sums = self.failed_sums.read(&self.device, self.parameters)?;
        self.clear_failure()?;
        let positions =
            (0..sums.len()).filter(|&i| sums.get(i).is_some_and(|sum| !sum.is_finite())).collect();
        Ok(Some(Failure { step: control.failed_step, norm: control.failed_norm, positions }))
    }

    fn clear_failure(&self) -> Result<()> {
        let (device, mailbox) = (&self.device, self.mailbox.address);
        launch!(device, CONTROL, "clear_failure", blocks(1, 1), &self.control.address, &mailbox);
        // So that a failure is not seen twice.
        Ok(device.cuda_stream().synchronize().w()?)
    }

    pub(super) fn observe(&self, settings: &Settings, loss: Number, entropy: Number) -> Result<()> {
        let (device, control) = (&self.device, self.control.address);
        launch!(device, CONTROL, "observe", blocks(1, 1), &control, settings, &loss, &entropy);
        Ok(())
    }

    pub(super) fn set_learning_rate(&self, lr: f64) -> Result<()> {
        let (device, control) = (&self.device, self.control.address);
        launch!(device, CONTROL, "set_learning_rate", blocks(1, 1), &control, &lr);
        Ok(())
    }

    pub(super) fn begin(&self, settings: &Settings) -> Result<()> {
        let (device, control, mailbox) = (&self.device, self.control.address, self.mailbox.address);
        let (sums, failed) = (self.sums.address, self.failed_sums.address);
        launch!(device, CONTROL, "begin", blocks(1, THREADS), &control, settings, &sums, &failed, &mailbox);
        Ok(())
    }

    pub(super) fn end(&self, settings: &Settings) -> Result<()> {
        let (device, control, measured) = (&self.device, self.control.address, self.measured.address);
        launch!(device, CONTROL, "end", blocks(1, THREADS), &control, settings, &measured);
        Ok(())
    }

    pub(super) fn coefficients(&self, settings: &Settings, plan: &Plan, positions: &[usize]) -> Result<()> {
        let (device, control, params) = (&self.device, self.control.address, plan.params());
        let (products, sizes, rates) = (self.products.address, self.sizes.address, self.rates.address);
        let out = self.coefficients.address;
        for Segment { present, base, count } in segments(self.parameters, positions)? {
            launch!(
                device,
                CONTROL,
                "coefficients",
                blocks(count.div_ceil(128), 128),
                &control,
                settings,
                &*present,
                &params,
                &base,
                &count,
                &products,
                &sizes,
                &rates,
                &out
            );
        }
        Ok(())
    }

    pub(super) fn finish_sums(&self, plan: &Plan, positions: &[usize]) -> Result<()> {
        let (device, params) = (&self.device, plan.params());
        let (partials, sums) = (self.partials.address, self.sums.address);
        for Segment { present, base, count } in segments(self.parameters, positions)? {
            let config = blocks(count.div_ceil(8), 256);
            launch!(
                device,
                CONTROL,
                "finish_sums",
                config,
                &*present,
                &params,
                &base,
                &count,
                &partials,
                &sums
            );
        }
        Ok(())
    }

    pub(super) fn finish_weights(&self, plan: &Plan, positions: &[usize]) -> Result<()> {
        if positions.is_empty() {
            return Ok(());
        }
        let (device, params) = (&self.device, plan.params());
        let (partials, sizes) = (self.partials.address, self.sizes.address);
        for Segment { present, base, count } in segments(self.parameters, positions)? {
            let config = blocks(count.div_ceil(8), 256);
            launch!(
                device,
                CONTROL,
                "finish_weights",
                config,
                &*present,
                &params,
                &base,
                &count,
                &partials,
                &sizes
            );
        }
        Ok(())
    }

    pub(super) fn finish_aligned(&self, plan: &Plan, positions: &[usize]) -> Result<()> {
        let (device, control, params) = (&self.device, self.control.address, plan.params());
        let (partials, out) = (self.partials.address, self.coefficients.address);
        for Segment { present, base, count } in segments(self.parameters, positions)? {
            launch!(
                device,
                CONTROL,
                "finish_aligned",
                blocks(count.div_ceil(8), 256),
                &control,
                &*present,
                &params,
                &base,
                &count,
                &partials,
                &out
            );
        }
        Ok(())
    }

    pub(super) fn finish_measured(&self, plan: &Plan, positions: &[usize]) -> Result<()> {
        let (device, control, params) = (&self.device, self.control.address, plan.params());
        let (changes, rates) = (self.changes.address, self.rates.address);
        let (measured, sizes) = (self.measured.address, self.sizes.address);
        for Segment { present, base, count } in segments(self.parameters, positions)? {
            launch!(
                device,
                CONTROL,
                "finish_measured",
                blocks(count.div_ceil(8), 256),
                &control,
                &*present,
                &params,
                &base,
                &count,
                &changes,
                &rates,
                &measured,
                &sizes
            );
        }
        Ok(())
    }
}

impl Drop for ControlBlock {
    fn drop(&mut self) {
        // Kernels that are still running may write to the mailbox, and where each thread has a stream of its own they
        // may be on another thread's. A device that cannot be waited for runs none.
        let _ = self.device.cuda_stream().context().synchronize();
    }
}

/// Some consecutive parameters, and which of them take part.
struct Segment {
    present: Box<Present>,
    base: u32,
    count: u32,
}

fn segments(parameters: usize, positions: &[usize]) -> Result<Vec<Segment>> {
    (0..parameters)
        .step_by(BITS)
        .map(|base| {
            let present = Box::new(Present::new(base, positions.iter().copied()));
            Ok(Segment { present, base: size(base)?, count: size((parameters - base).min(BITS))? })
        })
        .collect()
}

/// A word of the host's memory that kernels write: the number of a step that failed, or 0.
struct Mailbox {
    /// Keeps the memory.
    _memory: PinnedHostSlice<u64>,
    word: *mut u64,
    /// The same as kernels take it: with unified addressing it is one address.
    address: u64,
}

// SAFETY: the word is reached only as an atomic, and the memory goes only when the owner does.
unsafe impl Send for Mailbox {}
// SAFETY: as above.
unsafe impl Sync for Mailbox {}

impl Mailbox {
    fn new(device: &CudaDevice) -> candle_core::Result<Self> {
        let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
        let stream = device.cuda_stream();
        // SAFETY: the memory is set before anything reads it, on the next lines.
        let mut memory = unsafe { stream.context().alloc_pinned_with_flags::<u64>(1, flags) }.w()?;
        let word = memory.as_mut_ptr().w()?;
        // SAFETY: the address is of one u64 that was just allocated, and nothing else knows it yet.
        unsafe { word.write(0) };
        Ok(Self { _memory: memory, word, address: word as u64 })
    }

    fn is_full(&self) -> bool {
        // SAFETY: the word is aligned and lives as long as `self`; the host reaches it only here, as an atomic, and the
        // device writes it whole.
        let word = unsafe { AtomicU64::from_ptr(self.word) };
        word.load(Ordering::Acquire) != 0
    }
}

/// A number that lies on the device.
pub(super) fn number(tensor: &Tensor, stream: &CudaStream) -> Result<Number> {
    let kind = match tensor.dtype() {
        DType::F32 => 2,
        DType::F64 => 3,
        DType::BF16 => 4,
        DType::F16 => 5,
        other => {
            let (shape, dtype) = (tensor.dims().to_vec(), other.as_str().to_owned());
            return Err(crate::Error::Loss { shape, dtype });
        }
    };
    Ok(Number { at: super::launch::address(tensor, stream)?, value: 0.0, kind, pad: 0 })
}

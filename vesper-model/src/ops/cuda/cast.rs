//! Weights in the precision of the activations.

use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DevicePtrMut, DeviceRepr};
use candle_core::{DType, Result, Tensor, bail};

use super::launch::{Element, Held, Module, aligned, allocate, blocks, launch, size, tensor};

/// Elements that a thread reads before it writes: four times 16 bytes.
const ELEMENTS: usize = 16;
const THREADS: u32 = 256;
/// Weights of a launch.
const MANY: usize = 64;

/// `CastTable` of the kernel.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Table {
    from: [u64; MANY],
    to: [u64; MANY],
    elements: [u64; MANY],
    /// The first thread block of each weight, and after them their number.
    first: [u32; MANY + 1],
    weights: u32,
}

const _: () = assert!(size_of::<Table>() == 1800);
// SAFETY: plain numbers in the layout of `CastTable`.
unsafe impl DeviceRepr for Table {}

/// The values in `dtype`, outside of any graph, contiguous and at a multiple of 16 bytes.
///
/// From f32 to bf16 and f16, which is what mixed precision needs, by a kernel at the speed of a copy, one launch for many
/// weights; candle's casts move an element at a time.
pub(super) fn weights(weights: &[&Tensor], dtype: DType) -> Result<Vec<Tensor>> {
    let mut all: Vec<Tensor> = weights.iter().map(|weight| weight.detach()).collect();
    let narrowed = matches!(dtype, DType::BF16 | DType::F16);
    let (mut many, others): (Vec<&mut Tensor>, Vec<&mut Tensor>) =
        all.iter_mut().partition(|w| narrowed && w.dtype() == DType::F32 && w.elem_count() > 0);
    for weight in others {
        *weight = aligned(&weight.to_dtype(dtype)?)?;
    }
    for some in many.chunks_mut(MANY) {
        match dtype {
            DType::BF16 => narrow::<half::bf16>(some)?,
            _ => narrow::<half::f16>(some)?,
        }
    }
    Ok(all)
}

/// As [`weights`], of one.
pub(super) fn weight(weight: &Tensor, dtype: DType) -> Result<Tensor> {
    Ok(weights(&[weight], dtype)?.swap_remove(0))
}

/// Puts their values as T in the place of weights in f32, which are not empty and at most [`MANY`].
fn narrow<T: Element>(weights: &mut [&mut Tensor]) -> Result<()> {
    let mut table = Table {
        from: [0; MANY],
        to: [0; MANY],
        elements: [0; MANY],
        first: [0; MANY + 1],
        weights: size(weights.len())?,
    };
    let from = weights.iter().map(|weight| aligned(weight)).collect::<Result<Vec<_>>>()?;
    let Some(first) = from.first() else { return Ok(()) };
    let device = Held::new(first).device()?.clone();
    let stream = device.cuda_stream();
    let (mut total, mut out) = (0, Vec::with_capacity(from.len()));
    for (i, weight) in from.iter().enumerate() {
        if !weight.device().same_device(first.device()) {
            bail!("weights on {:?} and {:?}", first.device().location(), weight.device().location());
        }
        let (held, n) = (Held::new(weight), weight.elem_count());
        let mut own = allocate::<T>(&device, n)?;
        table.from[i] = held.view::<f32>()?.device_ptr(&stream).0;
        table.to[i] = own.device_ptr_mut(&stream).0;
        table.elements[i] = n as u64;
        table.first[i] = size(total)?;
        total += n.div_ceil(ELEMENTS * THREADS as usize);
        out.push(own);
    }
    table.first[from.len()] = size(total)?;
    launch!(device, Module::Cast, &format!("cast_{}", T::NAME), blocks(total, THREADS)?, &table);
    for ((weight, own), from) in weights.iter_mut().zip(out).zip(&from) {
        **weight = tensor(own, &device, from.shape());
    }
    Ok(())
}

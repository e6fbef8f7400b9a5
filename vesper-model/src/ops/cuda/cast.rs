//! Weights in the precision of the activations.

use candle_core::{DType, Result, Tensor};

use super::launch::{Element, Held, Module, aligned, allocate, blocks, launch, tensor};

/// Elements that a thread reads before it writes: four times 16 bytes.
const ELEMENTS: usize = 16;
const THREADS: u32 = 256;

/// The values in `dtype`, outside of any graph, contiguous and at a multiple of 16 bytes.
///
/// From f32 to bf16 and f16, which is what mixed precision needs, by a kernel at the speed of a copy; candle's casts move an
/// element at a time.
pub(super) fn weight(weight: &Tensor, dtype: DType) -> Result<Tensor> {
    let weight = weight.detach();
    match (weight.dtype(), dtype) {
        (DType::F32, DType::BF16) if weight.elem_count() > 0 => narrow::<half::bf16>(&aligned(&weight)?),
        (DType::F32, DType::F16) if weight.elem_count() > 0 => narrow::<half::f16>(&aligned(&weight)?),
        _ => aligned(&weight.to_dtype(dtype)?),
    }
}

fn narrow<T: Element>(weight: &Tensor) -> Result<Tensor> {
    let (held, n) = (Held::new(weight), weight.elem_count());
    let (device, from, total) = (held.device()?, held.view::<f32>()?, n as u64);
    let mut out = allocate::<T>(device, n)?;
    let config = blocks(n.div_ceil(ELEMENTS * THREADS as usize).min(1 << 20), THREADS)?;
    let name = format!("cast_{}", T::NAME);
    launch!(device, Module::Cast, &name, config, &from, &mut out, &total);
    Ok(tensor(out, device, weight.shape()))
}

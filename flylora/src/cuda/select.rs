//! Which values are the largest, on the device, by `select.cu`.

use candle_core::{Result, Tensor};

use super::launch::{Held, Module, aligned, allocate, config, launch, size, tensor, view, wrap};

/// What the kernels keep between passes: four numbers and the counts of 2048 digits.
const STATE: usize = 4 + 2048;

/// 1 for the `n` largest of f32 values, else 0, of their shape; of equal values the same as on the CPU.
pub(crate) fn largest(values: &Tensor, n: usize) -> Result<Tensor> {
    let elements = values.elem_count();
    if n == 0 {
        return values.zeros_like();
    }
    if n >= elements {
        return values.ones_like();
    }
    let device = values.device().as_cuda_device()?;
    let values = aligned(&values.detach())?;
    let held = Held::new(&values);
    let (storage, layout) = held.parts()?;
    let view = view::<f32>(storage, layout)?;
    let mut state = device.alloc_zeros::<u32>(STATE)?;
    let (count, wanted) = (size(elements)?, size(n)?);
    let grid = config((elements.div_ceil(1024).min(512), 1), (256, 1), 0)?;
    for pass in 0..6u32 {
        launch!(device, Module::Select, "count", grid, &view, &count, &wanted, &pass, &mut state);
    }
    let mut mask = allocate::<f32>(device, elements)?;
    launch!(device, Module::Select, "mark", grid, &view, &mut mask, &count, &state);
    Ok(tensor(wrap(mask, device), values.shape()))
}

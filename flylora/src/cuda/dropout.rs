//! Dropout on CUDA: the numbers of the CPU, by `dropout.cu`.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{CudaStorage, Layout, Result};

use super::launch::{Element, Module, allocate, by_dtype, config, launch, view, wrap};
use crate::dropout::Draw;

#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    elements: u64,
    key: u64,
    pass: u64,
    least: u32,
    factor: f32,
}

const _: () = assert!(size_of::<Params>() == 32);
// SAFETY: plain numbers in the layout of `DropoutParams`.
unsafe impl DeviceRepr for Params {}

/// What is left of x, contiguous and aligned.
pub(crate) fn dropped(draw: Draw, x: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
    fn run<T: Element>(draw: Draw, x: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
        let (device, elements) = (x.device(), layout.shape().elem_count());
        let Draw { key, pass, least, factor } = draw;
        let params = Params { elements: elements as u64, key, pass, least, factor: factor as f32 };
        let mut y = allocate::<T>(device, elements)?;
        if elements > 0 {
            let config = config((elements.div_ceil(1024).min(1 << 16), 1), (256, 1), 0)?;
            let name = format!("dropout_{}", T::NAME);
            let x = view::<T>(x, layout)?;
            launch!(device, Module::Dropout, &name, config, &x, &mut y, &params);
        }
        Ok(wrap(y, device))
    }
    by_dtype!(x.dtype(), T => run::<T>(draw, x, layout))
}

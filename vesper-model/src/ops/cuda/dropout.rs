//! Dropout on CUDA.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::launch::{
    Element, Module, aligned, allocate, blocks, by_dtype, is_empty, launch, not_here, view, wrap, zeros,
};
use crate::ops::Philox;

#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    n: u64,
    offset: u64,
    keys: [[u32; 2]; 10],
    last: u32,
    scale: f32,
}

const _: () = assert!(size_of::<Params>() == 104);
// SAFETY: plain numbers in the layout of `DropoutParams`.
unsafe impl DeviceRepr for Params {}

/// See [`crate::ops::dropout`]; words below `threshold` are dropped, of which there are some.
pub(in crate::ops) fn dropout(x: &Tensor, threshold: u64, scale: f64, random: Philox) -> Result<Tensor> {
    if is_empty(&[x]) {
        return zeros(x.device(), x.shape(), x.dtype());
    }
    aligned(x)?.apply_op1(Dropout { threshold, scale, random })
}

struct Dropout {
    threshold: u64,
    scale: f64,
    random: Philox,
}

impl Dropout {
    fn run<T: Element>(&self, x: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
        let (device, n) = (x.device(), layout.shape().elem_count());
        let params = Params {
            n: n as u64,
            offset: self.random.offset,
            keys: self.random.keys(),
            // 2^32 where all are dropped.
            last: (self.threshold - 1).min(u32::MAX.into()) as u32,
            scale: self.scale as f32,
        };
        let mut y = allocate::<T>(device, n)?;
        let name = format!("dropout_{}", T::NAME);
        let config = blocks(n.div_ceil(16 / size_of::<T>() * 256).clamp(1, 1 << 16), 256)?;
        let x = view::<T>(x, layout)?;
        launch!(device, Module::Dropout, &name, config, &x, &mut y, &params);
        Ok(wrap(y, device))
    }
}

impl CustomOp1 for Dropout {
    fn name(&self) -> &'static str {
        "vesper-dropout-cuda"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        not_here(self.name())
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let y = by_dtype!(x.dtype(), T => self.run::<T>(x, layout)?);
        Ok((y, layout.shape().clone()))
    }

    fn bwd(&self, _x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        aligned(dy)?.apply_op1_no_bwd(self).map(Some)
    }
}

//! RMSNorm on CUDA.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, LaunchConfig};
use candle_core::{CpuStorage, CudaStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::launch::{
    Element, Held, Module, aligned, allocate, blocks, by_dtype, is_empty, is_wide, launch, multiprocessors,
    not_here, size, tensor, view, wrap, zeros,
};

use crate::ops::residual::Normed;

/// Warps, and so rows at a time, of a block.
const WARPS: usize = 4;

#[repr(C)]
#[derive(Clone, Copy)]
struct Params {
    rows: u64,
    d: u32,
    eps: f32,
}

const _: () = assert!(size_of::<Params>() == 16);
// SAFETY: plain numbers in the layout of `RmsNormParams`.
unsafe impl DeviceRepr for Params {}

/// See [`crate::ops::rms_norm`]; shapes and dtypes have been checked.
pub(in crate::ops) fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    after_residual(x, w, eps, Normed::default())
}

/// The same of a residual sum, whose own pass may have left the result in `normed`.
pub(super) fn after_residual(
    x: &Tensor,
    w: &Tensor,
    eps: f64,
    normed: Normed<CudaStorage>,
) -> Result<Tensor> {
    if is_empty(&[x]) {
        return zeros(x.device(), x.shape(), x.dtype());
    }
    aligned(x)?.apply_op2(&aligned(w)?, RmsNorm { eps, normed })
}

/// The kernel for rows of `d` elements: a lane keeps up to eight vectors of 16 bytes in registers.
fn kernel<T: Element>(direction: &str, d: usize, layouts: &[&Layout]) -> String {
    let wide = is_wide::<T>(d, layouts);
    let vectors = match d.div_ceil(32 * T::WIDE) {
        _ if !wide => "single",
        0..=1 => "wide1",
        2 => "wide2",
        3 => "wide3",
        4 => "wide4",
        5..=6 => "wide6",
        7..=8 => "wide8",
        _ => "wide",
    };
    format!("rms_norm_{direction}_{}_{vectors}", T::NAME)
}

struct RmsNorm {
    eps: f64,
    normed: Normed<CudaStorage>,
}

impl RmsNorm {
    fn params(&self, elements: usize, d: usize) -> Result<Params> {
        Ok(Params { rows: (elements / d) as u64, d: size(d)?, eps: self.eps as f32 })
    }

    fn forward<T: Element>(
        &self,
        (x, lx): (&CudaStorage, &Layout),
        (w, lw): (&CudaStorage, &Layout),
    ) -> Result<CudaStorage> {
        let (device, n, d) = (x.device(), lx.shape().elem_count(), lw.shape().elem_count());
        let mut y = allocate::<T>(device, n)?;
        let params = self.params(n, d)?;
        let name = kernel::<T>("forward", d, &[lx, lw]);
        let config = blocks((n / d).div_ceil(WARPS), 32 * WARPS as u32)?;
        let (x, w) = (view::<T>(x, lx)?, view::<T>(w, lw)?);
        launch!(device, Module::RmsNorm, &name, config, &x, &w, &mut y, &params);
        Ok(wrap(y, device))
    }

    fn backward<T: Element>(
        &self,
        x: &Tensor,
        w: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (n, d) = (x.elem_count(), w.elem_count());
        let (x, w, dy, tracked) = (Held::new(x), Held::new(w), Held::new(dy), (x.track_op(), w.track_op()));
        let device = x.device()?;
        let mut dx = allocate::<T>(device, n)?;
        let params = self.params(n, d)?;
        let name = kernel::<T>("backward", d, &[x.layout(), w.layout(), dy.layout()]);
        let grid = (n / d).div_ceil(WARPS).min(4 * multiprocessors(device)?);
        let config = blocks(grid, 32 * WARPS as u32)?;
        let (xv, wv, dyv) = (x.view::<T>()?, w.view::<T>()?, dy.view::<T>()?);
        let dw = if tracked.1 {
            let mut partial = allocate::<f32>(device, grid * WARPS * d)?;
            launch!(device, Module::RmsNorm, &name, config, &xv, &wv, &dyv, &mut dx, &mut partial, &params);
            let mut dw = allocate::<T>(device, d)?;
            let name = format!("rms_norm_reduce_{}", T::NAME);
            let config = LaunchConfig {
                grid_dim: (size(d.div_ceil(32))?, 1, 1),
                block_dim: (32, 32, 1),
                shared_mem_bytes: 0,
            };
            let (parts, columns) = (size(grid * WARPS)?, size(d)?);
            launch!(device, Module::RmsNorm, &name, config, &partial, &mut dw, &parts, &columns);
            Some(tensor(dw, device, d))
        } else {
            let none = 0u64;
            launch!(device, Module::RmsNorm, &name, config, &xv, &wv, &dyv, &mut dx, &none, &params);
            None
        };
        let dx = if tracked.0 { Some(tensor(dx, device, x.layout().shape())) } else { None };
        Ok((dx, dw))
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "vesper-rms-norm-cuda"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        not_here(self.name())
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        w: &CudaStorage,
        lw: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let y = match self.normed.take() {
            Some(y) => y,
            None => by_dtype!(x.dtype(), T => self.forward::<T>((x, lx), (w, lw))?),
        };
        Ok((y, lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = aligned(dy)?;
        by_dtype!(x.dtype(), T => self.backward::<T>(x, w, &dy))
    }
}

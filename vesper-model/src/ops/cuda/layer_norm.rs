//! LayerNorm on CUDA.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, LaunchConfig};
use candle_core::{CpuStorage, CudaStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::launch::{
    Element, Held, Module, aligned, allocate, blocks, by_dtype, is_empty, is_wide, launch, multiprocessors,
    name, not_here, size, tensor, view, wrap, zeros,
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
// SAFETY: plain numbers in the layout of `LayerNormParams`.
unsafe impl DeviceRepr for Params {}

/// See [`crate::ops::layer_norm`]; shapes and dtypes have been checked. `normed` may hold the result already.
pub(in crate::ops) fn layer_norm(
    x: &Tensor,
    w: &Tensor,
    b: Option<&Tensor>,
    eps: f64,
    normed: Normed<CudaStorage>,
) -> Result<Tensor> {
    if is_empty(&[x]) {
        return zeros(x.device(), x.shape(), x.dtype());
    }
    let b = match b {
        Some(b) => aligned(b)?,
        None => zeros(w.device(), w.shape(), w.dtype())?,
    };
    aligned(x)?.apply_op3(&aligned(w)?, &b, LayerNorm { eps, normed })
}

struct LayerNorm {
    eps: f64,
    normed: Normed<CudaStorage>,
}

impl LayerNorm {
    fn params(&self, elements: usize, d: usize) -> Result<Params> {
        Ok(Params { rows: (elements / d) as u64, d: size(d)?, eps: self.eps as f32 })
    }

    fn forward<T: Element>(
        &self,
        (x, lx): (&CudaStorage, &Layout),
        (w, lw): (&CudaStorage, &Layout),
        (b, lb): (&CudaStorage, &Layout),
    ) -> Result<CudaStorage> {
        let (device, n, d) = (x.device(), lx.shape().elem_count(), lw.shape().elem_count());
        let mut y = allocate::<T>(device, n)?;
        let params = self.params(n, d)?;
        let name = name::<T>("layer_norm_forward", is_wide::<T>(d, &[lx, lw, lb]));
        let config = blocks((n / d).div_ceil(WARPS), 32 * WARPS as u32)?;
        let (x, w, b) = (view::<T>(x, lx)?, view::<T>(w, lw)?, view::<T>(b, lb)?);
        launch!(device, Module::LayerNorm, &name, config, &x, &w, &b, &mut y, &params);
        Ok(wrap(y, device))
    }

    fn backward<T: Element>(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (n, d) = (x.elem_count(), w.elem_count());
        let tracked = (x.track_op(), w.track_op(), b.track_op());
        let (x, w, dy) = (Held::new(x), Held::new(w), Held::new(dy));
        let device = x.device()?;
        let mut dx = allocate::<T>(device, n)?;
        let params = self.params(n, d)?;
        let wide = is_wide::<T>(d, &[x.layout(), w.layout(), dy.layout()]);
        let kernel = name::<T>("layer_norm_backward", wide);
        let grid = (n / d).div_ceil(WARPS).min(4 * multiprocessors(device)?);
        let config = blocks(grid, 32 * WARPS as u32)?;
        let (xv, wv, dyv) = (x.view::<T>()?, w.view::<T>()?, dy.view::<T>()?);
        let (mut dw, mut db) = (None, None);
        if tracked.1 || tracked.2 {
            let parts = grid * WARPS;
            let mut partial = allocate::<f32>(device, 2 * parts * d)?;
            launch!(
                device,
                Module::LayerNorm,
                &kernel,
                config,
                &xv,
                &wv,
                &dyv,
                &mut dx,
                &mut partial,
                &params
            );
            let reduce = |half: usize| -> Result<Tensor> {
                let mut out = allocate::<T>(device, d)?;
                let name = format!("layer_norm_reduce_{}", T::NAME);
                let config = LaunchConfig {
                    grid_dim: (size(d.div_ceil(32))?, 1, 1),
                    block_dim: (32, 32, 1),
                    shared_mem_bytes: 0,
                };
                let from = partial.slice(half * parts * d..(half + 1) * parts * d);
                let (parts, columns) = (size(parts)?, size(d)?);
                launch!(device, Module::LayerNorm, &name, config, &from, &mut out, &parts, &columns);
                Ok(tensor(out, device, d))
            };
            dw = tracked.1.then(|| reduce(0)).transpose()?;
            db = tracked.2.then(|| reduce(1)).transpose()?;
        } else {
            let none = 0u64;
            launch!(device, Module::LayerNorm, &kernel, config, &xv, &wv, &dyv, &mut dx, &none, &params);
        }
        let dx = tracked.0.then(|| tensor(dx, device, x.layout().shape()));
        Ok((dx, dw, db))
    }
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "vesper-layer-norm-cuda"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        not_here(self.name())
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        w: &CudaStorage,
        lw: &Layout,
        b: &CudaStorage,
        lb: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let y = match self.normed.take() {
            Some(y) => y,
            None => by_dtype!(x.dtype(), T => self.forward::<T>((x, lx), (w, lw), (b, lb))?),
        };
        Ok((y, lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = aligned(dy)?;
        by_dtype!(x.dtype(), T => self.backward::<T>(x, w, b, &dy))
    }
}

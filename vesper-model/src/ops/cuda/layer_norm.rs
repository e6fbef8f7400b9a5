//! LayerNorm on CUDA.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::launch::{
    Element, Held, Module, aligned, allocate, by_dtype, is_empty, launch, not_here, tensor, view, wrap, zeros,
};
use super::norms::{Kernel, Params, a_warp_a_row, kernel, reduce, warps_that_stay};
use crate::ops::backward::deliver;
use crate::ops::residual::Normed;

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
    fn forward<T: Element>(
        &self,
        (x, lx): (&CudaStorage, &Layout),
        (w, lw): (&CudaStorage, &Layout),
        (b, lb): (&CudaStorage, &Layout),
    ) -> Result<CudaStorage> {
        let (device, n, d) = (x.device(), lx.shape().elem_count(), lw.shape().elem_count());
        let mut y = allocate::<T>(device, n)?;
        let (params, config) = (Params::new(n, d, self.eps)?, a_warp_a_row(n / d)?);
        let Kernel { name, .. } = kernel::<T>("layer_norm_forward", d, &[lx, lw, lb]);
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
        let params = Params::new(n, d, self.eps)?;
        let kernel = kernel::<T>("layer_norm_backward", d, &[x.layout(), w.layout(), dy.layout()]);
        let (config, parts) = warps_that_stay(device, Module::LayerNorm, &kernel, n / d)?;
        let name = kernel.name;
        let (xv, wv, dyv) = (x.view::<T>()?, w.view::<T>()?, dy.view::<T>()?);
        let (mut dw, mut db) = (None, None);
        if tracked.1 || tracked.2 {
            let mut partial = allocate::<f32>(device, 2 * parts * d)?;
            launch!(device, Module::LayerNorm, &name, config, &xv, &wv, &dyv, &mut dx, &mut partial, &params);
            let (for_w, for_b) = partial.split_at(parts * d);
            dw = tracked.1.then(|| reduce::<T>(device, &for_w, parts, d)).transpose()?;
            db = tracked.2.then(|| reduce::<T>(device, &for_b, parts, d)).transpose()?;
        } else {
            let none = 0u64;
            launch!(device, Module::LayerNorm, &name, config, &xv, &wv, &dyv, &mut dx, &none, &params);
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
        let (dx, dw, db) = by_dtype!(x.dtype(), T => self.backward::<T>(x, w, b, &dy)?);
        Ok((dx, deliver(w, dw)?, deliver(b, db)?))
    }
}

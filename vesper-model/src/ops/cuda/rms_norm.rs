//! RMSNorm on CUDA.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::DevicePtr;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};

use super::launch::{
    Element, Held, Module, aligned, allocate, by_dtype, is_empty, launch, not_here, tensor, view, wrap, zeros,
};
use super::norms::{Kernel, Params, a_warp_a_row, kernel, reduce, warps_that_stay};
use crate::ops::backward::deliver;
use crate::ops::residual::Normed;

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

struct RmsNorm {
    eps: f64,
    normed: Normed<CudaStorage>,
}

impl RmsNorm {
    fn forward<T: Element>(
        &self,
        (x, lx): (&CudaStorage, &Layout),
        (w, lw): (&CudaStorage, &Layout),
    ) -> Result<CudaStorage> {
        let (device, n, d) = (x.device(), lx.shape().elem_count(), lw.shape().elem_count());
        let mut y = allocate::<T>(device, n)?;
        let (params, config) = (Params::new(n, d, self.eps)?, a_warp_a_row(n / d)?);
        let Kernel { name, .. } = kernel::<T>("rms_norm_forward", d, &[lx, lw]);
        let (x, w) = (view::<T>(x, lx)?, view::<T>(w, lw)?);
        launch!(device, Module::RmsNorm, &name, config, &x, &w, &mut y, &params);
        Ok(wrap(y, device))
    }
}

/// The gradients of x and, in `wanted`'s dtype (that of x, or f32), of w; `base` is added to that of x.
pub(super) fn backward<T: Element>(
    x: &Tensor,
    w: &Tensor,
    dy: &Tensor,
    base: Option<&Tensor>,
    eps: f64,
    wanted: Option<DType>,
) -> Result<(Tensor, Option<Tensor>)> {
    let (n, d) = (x.elem_count(), w.elem_count());
    let (x, w, dy, base) = (Held::new(x), Held::new(w), Held::new(dy), base.map(Held::new));
    let device = x.device()?;
    let mut dx = allocate::<T>(device, n)?;
    let params = Params::new(n, d, eps)?;
    let other = base.as_ref().map_or(dy.layout(), Held::layout);
    let kernel = kernel::<T>("rms_norm_backward", d, &[x.layout(), w.layout(), dy.layout(), other]);
    let (config, parts) = warps_that_stay(device, Module::RmsNorm, &kernel, n / d)?;
    let name = kernel.name;
    let (xv, wv, dyv) = (x.view::<T>()?, w.view::<T>()?, dy.view::<T>()?);
    let base = base.as_ref().map(Held::view::<T>).transpose()?;
    let stream = device.cuda_stream();
    let held = base.as_ref().map(|base| base.device_ptr(&stream));
    let base = held.as_ref().map_or(0, |held| held.0);
    let dw = if wanted.is_some() {
        let mut partial = allocate::<f32>(device, parts * d)?;
        launch!(
            device,
            Module::RmsNorm,
            &name,
            config,
            &xv,
            &wv,
            &dyv,
            &base,
            &mut dx,
            &mut partial,
            &params
        );
        let partial = partial.slice(..);
        Some(match wanted {
            Some(DType::F32) => reduce::<f32>(device, &partial, parts, d)?,
            _ => reduce::<T>(device, &partial, parts, d)?,
        })
    } else {
        let none = 0u64;
        launch!(device, Module::RmsNorm, &name, config, &xv, &wv, &dyv, &base, &mut dx, &none, &params);
        None
    };
    Ok((tensor(dx, device, x.layout().shape()), dw))
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
        let (dy, wanted) = (aligned(dy)?, w.track_op().then(|| w.dtype()));
        let (dx, dw) = by_dtype!(x.dtype(), T => backward::<T>(x, w, &dy, None, self.eps, wanted)?);
        Ok((x.track_op().then_some(dx), deliver(w, dw)?))
    }
}

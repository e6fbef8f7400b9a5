//! A residual sum and the norm after it on CUDA.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::launch::{
    Element, Held, Module, aligned, allocate, by_dtype, is_empty, launch, not_here, view, wrap,
};
use super::norms::{Kernel, Params, a_warp_a_row, kernel};
use super::{layer_norm, rms_norm};
use crate::ops::residual::{Norm, Normed};

/// See [`crate::ops::residual_rms_norm`] and [`crate::ops::residual_layer_norm`]; shapes and dtypes have been checked.
pub(in crate::ops) fn residual_norm(
    x: &Tensor,
    residual: &Tensor,
    w: &Tensor,
    b: Option<&Tensor>,
    norm: Norm,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    let normed = Normed::default();
    let sum = if is_empty(&[x]) {
        super::launch::zeros(x.device(), x.shape(), x.dtype())?
    } else {
        aligned(x)?.apply_op2(
            &aligned(residual)?,
            ResidualSum { norm: norm.aligned()?, eps, normed: normed.clone() },
        )?
    };
    let y = match b {
        Some(b) => layer_norm::layer_norm(&sum, w, Some(b), eps, normed)?,
        None => rms_norm::after_residual(&sum, w, eps, normed)?,
    };
    Ok((sum, y))
}

impl Norm {
    /// The same with parameters that vectors of 16 bytes can read.
    fn aligned(self) -> Result<Self> {
        Ok(match self {
            Self::Rms { w } => Self::Rms { w: aligned(&w)? },
            Self::Layer { w, b } => Self::Layer { w: aligned(&w)?, b: aligned(&b)? },
        })
    }
}

/// The sum, with the norm on the way.
struct ResidualSum {
    norm: Norm,
    eps: f64,
    normed: Normed<CudaStorage>,
}

impl ResidualSum {
    fn run<T: Element>(
        &self,
        (x, lx): (&CudaStorage, &Layout),
        (residual, lr): (&CudaStorage, &Layout),
    ) -> Result<CudaStorage> {
        let (w, b) = match &self.norm {
            Norm::Rms { w } => (Held::new(w), None),
            Norm::Layer { w, b } => (Held::new(w), Some(Held::new(b))),
        };
        let (device, n, d) = (x.device(), lx.shape().elem_count(), w.layout().shape().elem_count());
        let (mut sum, mut y) = (allocate::<T>(device, n)?, allocate::<T>(device, n)?);
        let (params, config) = (Params::new(n, d, self.eps)?, a_warp_a_row(n / d)?);
        let bias = b.as_ref().map_or(w.layout(), Held::layout);
        let Kernel { name, .. } = kernel::<T>("residual_norm", d, &[lx, lr, w.layout(), bias]);
        let (x, residual, w) = (view::<T>(x, lx)?, view::<T>(residual, lr)?, w.view::<T>()?);
        let module = Module::Residual;
        if let Some(b) = &b {
            let b = b.view::<T>()?;
            launch!(device, module, &name, config, &x, &residual, &w, &b, &mut sum, &mut y, &params);
        } else {
            let none = 0u64;
            launch!(device, module, &name, config, &x, &residual, &w, &none, &mut sum, &mut y, &params);
        }
        self.normed.put(wrap(y, device));
        Ok(wrap(sum, device))
    }
}

impl CustomOp2 for ResidualSum {
    fn name(&self) -> &'static str {
        "vesper-residual-sum-cuda"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        not_here(self.name())
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        residual: &CudaStorage,
        lr: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let sum = by_dtype!(x.dtype(), T => self.run::<T>((x, lx), (residual, lr))?);
        Ok((sum, lx.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        residual: &Tensor,
        _sum: &Tensor,
        dsum: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let gradient = |input: &Tensor| input.track_op().then(|| dsum.clone());
        Ok((gradient(x), gradient(residual)))
    }
}

//! ERA with its parameters in device memory: one kernel forward, and one backward that adds up their gradients too.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, Layout, Result, Shape, Storage, Tensor, bail};

use super::launch::{Element, Module, Params, allocate, blocks, by_dtype, launch, size, tensor, view, wrap};
use super::{BLOCKS, UNROLL, not_here, over, over_rows, prepared, rows};
use crate::op::halved;

/// The most blocks of a backward kernel, each of which leaves a pair of sums: the same on every device.
const SUMS: usize = 2048;

/// `name` is that of the form; x prepared, parameters: (2) or (1), f32, on the device of x.
pub(crate) fn learned(name: &'static str, x: &Tensor, parameters: &Tensor) -> Result<Tensor> {
    x.apply_op2(parameters, Learned { name, gated: false })
}

/// The gated form; gate_up prepared: (..., 2 F).
pub(crate) fn learned_gated(name: &'static str, gate_up: &Tensor, parameters: &Tensor) -> Result<Tensor> {
    gate_up.apply_op2(parameters, Learned { name, gated: true })
}

struct Learned {
    name: &'static str,
    gated: bool,
}

/// Sizes alone: the parameters are read by the kernel.
fn params(n: usize, width: usize) -> Result<Params> {
    Ok(Params { n: n as u64, width: size(width)?, a: 0.0, a_low: 0.0, b: 0.0 })
}

impl Learned {
    fn forward<T: Element>(
        &self,
        (x, layout): (&CudaStorage, &Layout),
        (parameters, lp): (&CudaStorage, &Layout),
    ) -> Result<CudaStorage> {
        let (device, n) = (x.device(), layout.shape().elem_count());
        let (from, learned) = (view::<T>(x, layout)?, view::<f32>(parameters, lp)?);
        if self.gated {
            let (rows, width) = rows(layout)?;
            let mut y = allocate::<T>(device, rows * width)?;
            let (config, ending) = over_rows::<T>(rows, width, BLOCKS)?;
            let name = format!("learned_gated_forward_{}_{ending}", self.name);
            let params = params(rows, width)?;
            launch!(device, Module::Learned, &name, config, &from, &learned, &mut y, &params);
            return Ok(wrap(y, device));
        }
        let mut y = allocate::<T>(device, n)?;
        let name = format!("learned_forward_{}_{}", self.name, T::NAME);
        let params = params(n, 0)?;
        launch!(device, Module::Learned, &name, over::<T>(n)?, &from, &learned, &mut y, &params);
        Ok(wrap(y, device))
    }

    /// The gradient of x, and those of the parameters: (2).
    fn backward<T: Element>(
        &self,
        (x, layout): (&CudaStorage, &Layout),
        (parameters, lp): (&CudaStorage, &Layout),
        (dy, ldy): (&CudaStorage, &Layout),
    ) -> Result<(CudaStorage, CudaStorage)> {
        let (device, n) = (x.device(), layout.shape().elem_count());
        let (from, learned, dy) = (view::<T>(x, layout)?, view::<f32>(parameters, lp)?, view::<T>(dy, ldy)?);
        let mut dx = allocate::<T>(device, n)?;
        let (name, config, params) = if self.gated {
            let (rows, width) = rows(layout)?;
            let (config, ending) = over_rows::<T>(rows, width, SUMS)?;
            (format!("learned_gated_backward_{}_{ending}", self.name), config, params(rows, width)?)
        } else {
            let config = blocks(n.div_ceil(256 * UNROLL * T::WIDE).min(SUMS))?;
            (format!("learned_backward_{}_{}", self.name, T::NAME), config, params(n, 0)?)
        };
        let parts = config.grid_dim.0 * config.grid_dim.1;
        let mut partial = allocate::<f64>(device, 2 * parts as usize)?;
        launch!(device, Module::Learned, &name, config, &from, &dy, &learned, &mut dx, &mut partial, &params);
        let mut sums = allocate::<f32>(device, 2)?;
        launch!(device, Module::Learned, "learned_sums", blocks(1)?, &partial, &mut sums, &parts);
        Ok((wrap(dx, device), wrap(sums, device)))
    }
}

impl CustomOp2 for Learned {
    fn name(&self) -> &'static str {
        "era-act-learned-cuda"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        not_here(self.name())
    }

    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        layout: &Layout,
        parameters: &CudaStorage,
        lp: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let y = by_dtype!(x.dtype(), T => self.forward::<T>((x, layout), (parameters, lp))?);
        let shape = if self.gated { halved(layout.shape(), rows(layout)?.1) } else { layout.shape().clone() };
        Ok((y, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        parameters: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = prepared(dy)?;
        let (xs, lx) = x.storage_and_layout();
        let (ps, lp) = parameters.storage_and_layout();
        let (ds, ld) = dy.storage_and_layout();
        let (Storage::Cuda(xs), Storage::Cuda(ps), Storage::Cuda(ds)) = (&*xs, &*ps, &*ds) else {
            bail!("a CUDA kernel got a tensor that is not on a CUDA device");
        };
        let (dx, sums) = by_dtype!(x.dtype(), T => self.backward::<T>((xs, lx), (ps, lp), (ds, ld))?);
        let dp = tensor(sums, 2).narrow(0, 0, parameters.elem_count())?;
        Ok((Some(tensor(dx, x.shape())), Some(dp)))
    }
}

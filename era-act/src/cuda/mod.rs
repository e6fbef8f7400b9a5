//! The CUDA back end: launches of the kernels in the `.cu` files beside this one, on candle's own stream.
#![allow(unsafe_code, reason = "launches, and memory that a kernel is about to fill")]

mod launch;
mod learned;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, LaunchConfig};
use candle_core::{CudaStorage, DType, Layout, Result, Shape, Storage, Tensor, bail};

use crate::op::{gated_width, halved};
use launch::{Element, Module, Params, allocate, blocks, by_dtype, grid, launch, nothing, size, view, wrap};

pub(crate) use learned::{learned, learned_gated};

/// An activation as the kernels know it: a part of their names, and its parameters.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernel {
    name: &'static str,
    a: f32,
    a_low: f32,
    b: f32,
}

impl Kernel {
    /// A function without parameters.
    pub(crate) fn plain(name: &'static str) -> Self {
        Self { name, a: 0.0, a_low: 0.0, b: 0.0 }
    }

    pub(crate) fn gate_entropy(temperature: f64, strength: f64) -> Self {
        let inverse = 1.0 / temperature;
        let a = inverse as f32;
        Self { name: "gate_entropy", a, a_low: (inverse - f64::from(a)) as f32, b: strength as f32 }
    }

    pub(crate) fn gelu_softplus(gamma: f64) -> Self {
        Self { name: "gelu_softplus", a: gamma as f32, a_low: 0.0, b: 0.0 }
    }

    fn params(self, n: usize, width: usize) -> Result<Params> {
        Ok(Params { n: n as u64, width: size(width)?, a: self.a, a_low: self.a_low, b: self.b })
    }
}

/// Vectors of 16 bytes that a thread of the elementwise kernels takes.
const UNROLL: usize = 2;
/// The most blocks of a launch over rows.
const BLOCKS: usize = 1 << 22;

/// Whether there are kernels for a tensor.
pub(crate) fn has_kernels(x: &Tensor) -> bool {
    x.device().is_cuda() && matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16)
}

/// The tensor as the kernels take it: on a CUDA device contiguous, from a multiple of 16 bytes on; else as it is.
pub(crate) fn prepared(x: &Tensor) -> Result<Tensor> {
    if has_kernels(x) && x.elem_count() > 0 { launch::aligned(x) } else { Ok(x.clone()) }
}

/// The result where there is nothing to compute: an empty tensor, outside of any graph.
pub(crate) fn empty(x: &Tensor, shape: impl Into<Shape>) -> Result<Tensor> {
    nothing(x.device(), shape, x.dtype())
}

/// A launch over `n` elements.
fn over<T: Element>(n: usize) -> Result<LaunchConfig> {
    blocks(n.div_ceil(256 * UNROLL * T::WIDE))
}

/// A launch over rows of `width`, whether by vectors, and the name's ending.
fn over_rows<T: Element>(rows: usize, width: usize, blocks: usize) -> Result<(LaunchConfig, String)> {
    let wide = width.is_multiple_of(T::WIDE);
    let vectors = if wide { width / T::WIDE } else { width };
    let ending = format!("{}_{}", T::NAME, if wide { "wide" } else { "single" });
    Ok((grid(rows, vectors, blocks)?, ending))
}

/// `y[i] = f(x[i])`
pub(crate) fn forward(f: Kernel, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
    fn run<T: Element>(f: Kernel, x: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
        let (device, n) = (x.device(), layout.shape().elem_count());
        let mut y = allocate::<T>(device, n)?;
        let name = format!("forward_{}_{}", f.name, T::NAME);
        let (x, params) = (view::<T>(x, layout)?, f.params(n, 0)?);
        launch!(device, Module::Elementwise, &name, over::<T>(n)?, &x, &mut y, &params);
        Ok(wrap(y, device))
    }
    let y = by_dtype!(x.dtype(), T => run::<T>(f, x, layout)?);
    Ok((y, layout.shape().clone()))
}

/// `dx[i] = dy[i] f'(x[i])`
pub(crate) fn backward(
    f: Kernel,
    (x, lx): (&CudaStorage, &Layout),
    (dy, ldy): (&CudaStorage, &Layout),
) -> Result<(CudaStorage, Shape)> {
    fn run<T: Element>(
        f: Kernel,
        (x, lx): (&CudaStorage, &Layout),
        (dy, ldy): (&CudaStorage, &Layout),
    ) -> Result<CudaStorage> {
        let (device, n) = (x.device(), lx.shape().elem_count());
        let mut dx = allocate::<T>(device, n)?;
        let name = format!("backward_{}_{}", f.name, T::NAME);
        let (x, dy, params) = (view::<T>(x, lx)?, view::<T>(dy, ldy)?, f.params(n, 0)?);
        launch!(device, Module::Elementwise, &name, over::<T>(n)?, &x, &dy, &mut dx, &params);
        Ok(wrap(dx, device))
    }
    let dx = by_dtype!(x.dtype(), T => run::<T>(f, (x, lx), (dy, ldy))?);
    Ok((dx, lx.shape().clone()))
}

/// Rows and half their width.
fn rows(layout: &Layout) -> Result<(usize, usize)> {
    let width = gated_width(layout.shape())?;
    Ok((layout.shape().elem_count() / (2 * width).max(1), width))
}

/// `f(gate) up` of rows `[gate | up]`.
pub(crate) fn gated(f: Kernel, packed: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
    fn run<T: Element>(f: Kernel, packed: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
        let (device, (rows, width)) = (packed.device(), rows(layout)?);
        let mut y = allocate::<T>(device, rows * width)?;
        let (config, ending) = over_rows::<T>(rows, width, BLOCKS)?;
        let name = format!("gated_forward_{}_{ending}", f.name);
        let (packed, params) = (view::<T>(packed, layout)?, f.params(rows, width)?);
        launch!(device, Module::Gated, &name, config, &packed, &mut y, &params);
        Ok(wrap(y, device))
    }
    let y = by_dtype!(packed.dtype(), T => run::<T>(f, packed, layout)?);
    Ok((y, halved(layout.shape(), rows(layout)?.1)))
}

/// The packed gradient, rows of `[dy up f'(gate) | dy f(gate)]`, and `f(gate) up` again where it is wanted.
fn gated_gradient(
    f: Kernel,
    (packed, layout): (&CudaStorage, &Layout),
    (dy, ldy): (&CudaStorage, &Layout),
    wanted: bool,
) -> Result<(CudaStorage, Option<CudaStorage>)> {
    fn run<T: Element>(
        f: Kernel,
        (packed, layout): (&CudaStorage, &Layout),
        (dy, ldy): (&CudaStorage, &Layout),
        wanted: bool,
    ) -> Result<(CudaStorage, Option<CudaStorage>)> {
        let (device, (rows, width)) = (packed.device(), rows(layout)?);
        let mut dpacked = allocate::<T>(device, 2 * rows * width)?;
        let (config, ending) = over_rows::<T>(rows, width, BLOCKS)?;
        let name = format!("gated_backward_{}_{ending}", f.name);
        let (from, dy) = (view::<T>(packed, layout)?, view::<T>(dy, ldy)?);
        let params = f.params(rows, width)?;
        let inner: Option<CudaSlice<T>> = if wanted {
            let mut inner = allocate::<T>(device, rows * width)?;
            launch!(device, Module::Gated, &name, config, &from, &dy, &mut dpacked, &mut inner, &params);
            Some(inner)
        } else {
            launch!(device, Module::Gated, &name, config, &from, &dy, &mut dpacked, &0u64, &params);
            None
        };
        Ok((wrap(dpacked, device), inner.map(|inner| wrap(inner, device))))
    }
    by_dtype!(packed.dtype(), T => run::<T>(f, (packed, layout), (dy, ldy), wanted))
}

pub(crate) fn gated_backward(
    f: Kernel,
    packed: (&CudaStorage, &Layout),
    dy: (&CudaStorage, &Layout),
) -> Result<(CudaStorage, Shape)> {
    let (dpacked, _) = gated_gradient(f, packed, dy, false)?;
    Ok((dpacked, packed.1.shape().clone()))
}

/// [`gated_backward`] of prepared tensors, and the gated values again, outside of any graph.
pub(crate) fn gated_backward_and_value(f: Kernel, packed: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let (from, layout) = packed.storage_and_layout();
    let (gradient, ldy) = dy.storage_and_layout();
    let (Storage::Cuda(from), Storage::Cuda(gradient)) = (&*from, &*gradient) else {
        bail!("a CUDA kernel got a tensor that is not on a CUDA device");
    };
    match gated_gradient(f, (from, layout), (gradient, ldy), true)? {
        (dpacked, Some(value)) => {
            Ok((launch::tensor(dpacked, packed.shape()), launch::tensor(value, dy.shape())))
        }
        _ => bail!("the gated values were not made"),
    }
}

/// What the CPU half of a CUDA operation says: the dispatch never sends it there.
fn not_here<R>(name: &str) -> Result<R> {
    bail!("{name}: the CUDA operation got tensors on the CPU")
}

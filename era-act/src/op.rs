//! The custom ops, and the one place that looks at the device.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Device, Layout, Result, Shape, Tensor};

use crate::cpu;
#[cfg(feature = "cuda")]
use crate::cuda;
use crate::element::Element;
use crate::layout::elements;
use crate::pointwise::Pointwise;
use crate::{Error, reference};

/// `f` of every element of `x`: the fused kernel where there is one, else the composition of candle ops.
pub(crate) fn forward<P: Pointwise>(f: P, x: &Tensor) -> Result<Tensor> {
    check_dtype(x)?;
    match x.device() {
        Device::Cpu => x.apply_op1(Forward(f)),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) if cuda::has_kernels(x) => match x.elem_count() {
            0 => cuda::empty(x, x.shape()),
            _ => cuda::prepared(x)?.apply_op1(Forward(f)),
        },
        _ => reference::composed(f, x),
    }
}

/// The gradient of [`forward`] for an output gradient `dy`, outside of any graph.
pub(crate) fn backward<P: Pointwise>(f: P, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    check_dtype(x)?;
    let (x, dy) = (x.detach(), dy.detach());
    match x.device() {
        Device::Cpu => x.apply_op2_no_bwd(&dy, &Backward(f)),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) if cuda::has_kernels(&x) => match x.elem_count() {
            0 => cuda::empty(&x, x.shape()),
            _ => cuda::prepared(&x)?.apply_op2_no_bwd(&cuda::prepared(&dy)?, &Backward(f)),
        },
        _ => differentiated(&x, &dy, |x| reference::composed(f, x)),
    }
}

/// The gradient of a composition of candle ops.
fn differentiated(x: &Tensor, dy: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let leaf = candle_core::Var::from_tensor(x)?;
    let weighted = (f(leaf.as_tensor())? * dy)?.sum_all()?;
    match weighted.backward()?.remove(leaf.as_tensor()) {
        Some(gradient) => Ok(gradient),
        None => x.zeros_like(),
    }
}

/// `f(gate) up` of the packed `[gate | up]`: the fused kernel where there is one, else the composition.
pub(crate) fn gated<P: Pointwise>(f: P, gate_up: &Tensor) -> Result<Tensor> {
    check_dtype(gate_up)?;
    gated_width(gate_up.shape())?;
    match gate_up.device() {
        Device::Cpu => gate_up.apply_op1(Gated(f)),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) if cuda::has_kernels(gate_up) => match gate_up.elem_count() {
            0 => cuda::empty(gate_up, halved(gate_up.shape(), gated_width(gate_up.shape())?)),
            _ => cuda::prepared(gate_up)?.apply_op1(Gated(f)),
        },
        _ => reference::composed_gated(f, gate_up),
    }
}

/// The packed gradient of [`gated`] for an output gradient `dy`, outside of any graph.
pub(crate) fn gated_backward<P: Pointwise>(f: P, gate_up: &Tensor, dy: &Tensor) -> Result<Tensor> {
    check_dtype(gate_up)?;
    gated_width(gate_up.shape())?;
    let (gate_up, dy) = (gate_up.detach(), dy.detach());
    match gate_up.device() {
        Device::Cpu => gate_up.apply_op2_no_bwd(&dy, &GatedBackward(f)),
        #[cfg(feature = "cuda")]
        Device::Cuda(_) if cuda::has_kernels(&gate_up) => match gate_up.elem_count() {
            0 => cuda::empty(&gate_up, gate_up.shape()),
            _ => cuda::prepared(&gate_up)?.apply_op2_no_bwd(&cuda::prepared(&dy)?, &GatedBackward(f)),
        },
        _ => differentiated(&gate_up, &dy, |x| reference::composed_gated(f, x)),
    }
}

/// [`gated_backward`], and the values of [`gated`] again: in one kernel where there is one that does both.
pub(crate) fn gated_backward_and_value<P: Pointwise>(
    f: P,
    gate_up: &Tensor,
    dy: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (gate_up, dy) = (gate_up.detach(), dy.detach());
    #[cfg(feature = "cuda")]
    if cuda::has_kernels(&gate_up) && gate_up.elem_count() > 0 {
        check_halved(gate_up.shape(), dy.shape())?;
        let (gate_up, dy) = (cuda::prepared(&gate_up)?, cuda::prepared(&dy)?);
        return cuda::gated_backward_and_value(f.kernel(), &gate_up, &dy);
    }
    Ok((gated_backward(f, &gate_up, &dy)?, gated(f, &gate_up)?))
}

pub(crate) fn check_dtype(x: &Tensor) -> Result<()> {
    match x.dtype() {
        DType::F32 | DType::F64 | DType::BF16 | DType::F16 => Ok(()),
        got => Err(Error::DType { got }.into()),
    }
}

/// Half of the last dimension.
pub(crate) fn gated_width(shape: &Shape) -> Result<usize> {
    match shape.dims().last() {
        Some(last) if last % 2 == 0 => Ok(last / 2),
        _ => Err(Error::GatedShape { got: shape.dims().to_vec() }.into()),
    }
}

pub(crate) fn halved(shape: &Shape, width: usize) -> Shape {
    let mut dims = shape.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = width;
    }
    Shape::from(dims)
}

/// Calls a generic function with the element type of a CPU storage.
macro_rules! by_dtype {
    ($storage:expr, $T:ident => $body:expr) => {
        match $storage {
            CpuStorage::F32(_) => {
                type $T = f32;
                $body
            }
            CpuStorage::F64(_) => {
                type $T = f64;
                $body
            }
            CpuStorage::BF16(_) => {
                type $T = half::bf16;
                $body
            }
            CpuStorage::F16(_) => {
                type $T = half::f16;
                $body
            }
            other => Err(Error::DType { got: candle_core::backend::BackendStorage::dtype(other) }.into()),
        }
    };
}

pub(crate) fn storage<T: Element>(data: Vec<T>) -> CpuStorage {
    T::to_cpu_storage_owned(data)
}

fn same_shape(op: &'static str, a: &Shape, b: &Shape) -> Result<()> {
    if a == b {
        return Ok(());
    }
    Err(candle_core::Error::ShapeMismatchBinaryOp { lhs: b.clone(), rhs: a.clone(), op }.bt())
}

/// That `dy` is a gradient for the gated form of `packed`.
fn check_halved(packed: &Shape, dy: &Shape) -> Result<()> {
    same_shape("era-act-gated-backward", dy, &halved(packed, gated_width(packed)?))
}

/// A gradient as the kernels take it.
#[cfg_attr(not(feature = "cuda"), expect(clippy::unnecessary_wraps, reason = "it may fail with CUDA"))]
fn prepared(dy: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    return cuda::prepared(dy);
    #[cfg(not(feature = "cuda"))]
    Ok(dy.clone())
}

pub(crate) use by_dtype;

struct Forward<P>(P);

impl<P: Pointwise> CustomOp1 for Forward<P> {
    fn name(&self) -> &'static str {
        "era-act"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        by_dtype!(x, T => {
            let y = cpu::forward(self.0, &elements::<T>(x, layout)?);
            Ok((storage(y), layout.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::forward(self.0.kernel(), x, layout)
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        x.apply_op2_no_bwd(&prepared(dy)?, &Backward(self.0)).map(Some)
    }
}

pub(crate) struct Backward<P>(pub(crate) P);

impl<P: Pointwise> CustomOp2 for Backward<P> {
    fn name(&self) -> &'static str {
        "era-act-backward"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        dy: &CpuStorage,
        ldy: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        same_shape(self.name(), ldy.shape(), lx.shape())?;
        by_dtype!(x, T => {
            let dx = cpu::backward(self.0, &elements::<T>(x, lx)?, &elements::<T>(dy, ldy)?);
            Ok((storage(dx), lx.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        dy: &CudaStorage,
        ldy: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        same_shape(self.name(), ldy.shape(), lx.shape())?;
        cuda::backward(self.0.kernel(), (x, lx), (dy, ldy))
    }
}

struct Gated<P>(P);

impl<P: Pointwise> CustomOp1 for Gated<P> {
    fn name(&self) -> &'static str {
        "era-act-gated"
    }

    fn cpu_fwd(&self, packed: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let width = gated_width(layout.shape())?;
        by_dtype!(packed, T => {
            let y = cpu::gated_forward(self.0, &elements::<T>(packed, layout)?, width);
            Ok((storage(y), halved(layout.shape(), width)))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        cuda::gated(self.0.kernel(), x, layout)
    }

    fn bwd(&self, packed: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        packed.apply_op2_no_bwd(&prepared(dy)?, &GatedBackward(self.0)).map(Some)
    }
}

pub(crate) struct GatedBackward<P>(pub(crate) P);

impl<P: Pointwise> CustomOp2 for GatedBackward<P> {
    fn name(&self) -> &'static str {
        "era-act-gated-backward"
    }

    fn cpu_fwd(
        &self,
        packed: &CpuStorage,
        layout: &Layout,
        dy: &CpuStorage,
        ldy: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let width = gated_width(layout.shape())?;
        check_halved(layout.shape(), ldy.shape())?;
        by_dtype!(packed, T => {
            let (packed, dy) = (elements::<T>(packed, layout)?, elements::<T>(dy, ldy)?);
            Ok((storage(cpu::gated_backward(self.0, &packed, &dy, width)), layout.shape().clone()))
        })
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        lx: &Layout,
        dy: &CudaStorage,
        ldy: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        check_halved(lx.shape(), ldy.shape())?;
        cuda::gated_backward(self.0.kernel(), (x, lx), (dy, ldy))
    }
}

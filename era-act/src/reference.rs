//! The activations as compositions of differentiable candle ops: the specification of the fused kernels.
//!
//! Slow, and every step allocates; but each runs on any device that candle has, and candle differentiates it. Devices
//! without a fused kernel run these. Half types are computed in f32, as in the kernels.

use candle_core::{D, DType, Result, Tensor};

use crate::pointwise::{Pointwise, Visitor};
use crate::{Activation, op};

/// [`Activation::forward`] in candle ops; x: any shape.
///
/// # Errors
///
/// Those of [`Activation::forward`].
pub fn forward(activation: &Activation, x: &Tensor) -> Result<Tensor> {
    struct Composed<'a>(&'a Tensor);
    impl Visitor for Composed<'_> {
        type Output = Result<Tensor>;

        fn visit<P: Pointwise>(self, function: P) -> Result<Tensor> {
            composed(function, self.0)
        }
    }
    activation.validate()?;
    activation.visit(Composed(x))
}

/// [`Activation::gated`] in candle ops; gate_up: (..., 2 F), returns (..., F).
///
/// # Errors
///
/// Those of [`Activation::gated`].
pub fn gated(activation: &Activation, gate_up: &Tensor) -> Result<Tensor> {
    struct Composed<'a>(&'a Tensor);
    impl Visitor for Composed<'_> {
        type Output = Result<Tensor>;

        fn visit<P: Pointwise>(self, function: P) -> Result<Tensor> {
            composed_gated(function, self.0)
        }
    }
    activation.validate()?;
    activation.visit(Composed(gate_up))
}

pub(crate) fn composed<P: Pointwise>(f: P, x: &Tensor) -> Result<Tensor> {
    match x.dtype() {
        DType::BF16 | DType::F16 => f.reference(&x.to_dtype(DType::F32)?)?.to_dtype(x.dtype()),
        _ => f.reference(x),
    }
}

pub(crate) fn composed_gated<P: Pointwise>(f: P, gate_up: &Tensor) -> Result<Tensor> {
    let width = op::gated_width(gate_up.shape())?;
    let half = |start| match gate_up.dtype() {
        DType::BF16 | DType::F16 => gate_up.narrow(D::Minus1, start, width)?.to_dtype(DType::F32),
        _ => gate_up.narrow(D::Minus1, start, width),
    };
    (f.reference(&half(0)?)? * half(width)?)?.to_dtype(gate_up.dtype())
}

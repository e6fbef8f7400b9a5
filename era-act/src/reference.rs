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
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use era_act::{Activation, reference};
/// let x = Tensor::new(&[-1f32, 0., 2.], &Device::Cpu)?;
/// let activation: Activation = "era".parse()?;
/// let plain = reference::forward(&activation, &x)?.to_vec1::<f32>()?;
/// let fused = activation.forward(&x)?.to_vec1::<f32>()?;
/// assert!(plain.iter().zip(&fused).all(|(a, b)| (a - b).abs() < 1e-6));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
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
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use era_act::{Activation, reference};
/// let gate_up = Tensor::new(&[[1f32, -1., 3., 4.]], &Device::Cpu)?; // [gate | up]
/// let y = reference::gated(&Activation::Relu, &gate_up)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[3., 0.]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
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

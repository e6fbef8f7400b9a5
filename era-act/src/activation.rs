use candle_core::{Result, Tensor};
use serde::Serialize;

use crate::pointwise::gelu_erf::GeluErf;
use crate::pointwise::gelu_tanh::GeluTanh;
use crate::pointwise::relu::{Relu, ReluSquared};
use crate::pointwise::silu::Silu;
use crate::pointwise::{Pointwise, Visitor};
use crate::{Era, Error, op};

/// An elementwise activation, ERA or one that it is compared with; all run through the same fused kernels.
///
/// It goes where a `candle_nn::Activation` stood: a `Module`, a field of a serde configuration that reads the names of
/// Hugging Face (`silu`, `gelu_pytorch_tanh`, ...) and `era`, and `TryFrom` for the values of candle's own.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use era_act::Activation;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let activation: Activation = "silu".parse()?;
/// let gate_up = Tensor::new(&[[1f32, -2.0, 10.0, 20.0]], &Device::Cpu)?; // (1, 2 F), F = 2
/// let y = activation.gated(&gate_up)?.to_vec2::<f32>()?; // (1, F)
/// assert!((y[0][0] - 0.731059 * 10.0).abs() < 1e-4);
/// assert!((y[0][1] - -2.0 * 0.119203 * 20.0).abs() < 1e-4);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Activation {
    /// See [`Era`].
    Era(Era),
    /// `x sigmoid(x)`, also called swish.
    Silu,
    /// `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`, PyTorch's `gelu(approximate="tanh")`.
    GeluTanh,
    /// `x Phi(x)`, `Phi` the normal distribution function.
    Gelu,
    /// `max(x, 0)`, with slope 0 at 0.
    Relu,
    /// `max(x, 0)^2`.
    ReluSquared,
}

impl Default for Activation {
    /// ERA by gate entropy, with its default parameters.
    fn default() -> Self {
        Self::Era(Era::default())
    }
}

impl Activation {
    /// Checks that every parameter is in its range.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] names the first one that is not.
    pub fn validate(&self) -> std::result::Result<(), Error> {
        match self {
            Self::Era(era) => era.validate(),
            _ => Ok(()),
        }
    }

    /// Applies the activation to every element; x: any shape and strides, f32, f64, bf16 or f16.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] or [`Error::DType`], inside a [`candle_core::Error`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        struct Fused<'a>(&'a Tensor);
        impl Visitor for Fused<'_> {
            type Output = Result<Tensor>;

            fn visit<P: Pointwise>(self, function: P) -> Result<Tensor> {
                op::forward(function, self.0)
            }
        }
        self.validate()?;
        self.visit(Fused(x))
    }

    /// The gradient of [`forward`](Self::forward) on its own, for the backward pass of a larger fused operation.
    ///
    /// x and dy, the gradient of the result, of one shape and dtype; returns that of x. Nothing is tracked.
    ///
    /// # Errors
    ///
    /// Those of [`forward`](Self::forward), and a shape or dtype of dy that does not fit.
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use era_act::Activation;
    ///
    /// let x = Tensor::new(&[-2f32, 3.0], &Device::Cpu)?;
    /// let dy = Tensor::new(&[1f32, 0.5], &Device::Cpu)?;
    /// assert_eq!(Activation::ReluSquared.backward(&x, &dy)?.to_vec1::<f32>()?, [0.0, 3.0]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn backward(&self, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        struct Backward<'a>(&'a Tensor, &'a Tensor);
        impl Visitor for Backward<'_> {
            type Output = Result<Tensor>;

            fn visit<P: Pointwise>(self, function: P) -> Result<Tensor> {
                op::backward(function, self.0, self.1)
            }
        }
        self.validate()?;
        self.visit(Backward(x, dy))
    }

    /// The gated form: `activation(gate) * up` of a packed input, in one pass.
    ///
    /// gate_up: (..., 2 F), the gates first, then the values that they scale; returns (..., F). The backward pass
    /// returns the packed gradient, (..., 2 F), and keeps the input alone.
    ///
    /// # Errors
    ///
    /// [`Error::GatedShape`] where the last dimension is odd or missing, else as [`forward`](Self::forward).
    pub fn gated(&self, gate_up: &Tensor) -> Result<Tensor> {
        struct Fused<'a>(&'a Tensor);
        impl Visitor for Fused<'_> {
            type Output = Result<Tensor>;

            fn visit<P: Pointwise>(self, function: P) -> Result<Tensor> {
                op::gated(function, self.0)
            }
        }
        self.validate()?;
        self.visit(Fused(gate_up))
    }

    /// The gradient of [`gated`](Self::gated) on its own, for the backward pass of a larger fused operation.
    ///
    /// gate_up: (..., 2 F), dy: (..., F), the gradient of the result; returns the packed gradient, (..., 2 F). Nothing
    /// is tracked.
    ///
    /// # Errors
    ///
    /// Those of [`gated`](Self::gated), and a shape of dy that does not fit.
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use era_act::Activation;
    ///
    /// let gate_up = Tensor::new(&[[2f32, 3.0]], &Device::Cpu)?; // gate 2, up 3
    /// let dy = Tensor::new(&[[1f32]], &Device::Cpu)?;
    /// let gradient = Activation::Relu.gated_backward(&gate_up, &dy)?;
    /// assert_eq!(gradient.to_vec2::<f32>()?, [[3.0, 2.0]]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn gated_backward(&self, gate_up: &Tensor, dy: &Tensor) -> Result<Tensor> {
        struct Backward<'a>(&'a Tensor, &'a Tensor);
        impl Visitor for Backward<'_> {
            type Output = Result<Tensor>;

            fn visit<P: Pointwise>(self, function: P) -> Result<Tensor> {
                op::gated_backward(function, self.0, self.1)
            }
        }
        self.validate()?;
        self.visit(Backward(gate_up, dy))
    }

    /// [`gated_backward`](Self::gated_backward), and the values of [`gated`](Self::gated) again: on CUDA one kernel does
    /// both, which saves reading the input twice where the next matrix needs them for its own gradient.
    ///
    /// gate_up: (..., 2 F), dy: (..., F); returns (..., 2 F) and (..., F). Nothing is tracked.
    ///
    /// # Errors
    ///
    /// Those of [`gated_backward`](Self::gated_backward).
    ///
    /// # Examples
    ///
    /// ```
    /// use candle_core::{Device, Tensor};
    /// use era_act::Activation;
    ///
    /// let gate_up = Tensor::new(&[[2f32, 3.0]], &Device::Cpu)?; // gate 2, up 3
    /// let dy = Tensor::new(&[[1f32]], &Device::Cpu)?;
    /// let (gradient, value) = Activation::Relu.gated_backward_and_value(&gate_up, &dy)?;
    /// assert_eq!(gradient.to_vec2::<f32>()?, [[3.0, 2.0]]);
    /// assert_eq!(value.to_vec2::<f32>()?, [[6.0]]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn gated_backward_and_value(&self, gate_up: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
        struct Backward<'a>(&'a Tensor, &'a Tensor);
        impl Visitor for Backward<'_> {
            type Output = Result<(Tensor, Tensor)>;

            fn visit<P: Pointwise>(self, function: P) -> Self::Output {
                op::gated_backward_and_value(function, self.0, self.1)
            }
        }
        self.validate()?;
        self.visit(Backward(gate_up, dy))
    }

    pub(crate) fn visit<V: Visitor>(&self, visitor: V) -> V::Output {
        match self {
            Self::Era(era) => era.visit(visitor),
            Self::Silu => visitor.visit(Silu),
            Self::GeluTanh => visitor.visit(GeluTanh),
            Self::Gelu => visitor.visit(GeluErf),
            Self::Relu => visitor.visit(Relu),
            Self::ReluSquared => visitor.visit(ReluSquared),
        }
    }
}

impl candle_nn::Module for Activation {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Activation::forward(self, x)
    }
}

impl From<Era> for Activation {
    fn from(era: Era) -> Self {
        Self::Era(era)
    }
}

impl TryFrom<candle_nn::Activation> for Activation {
    type Error = Error;

    /// The same function; [`Error::Candle`] where there is none here.
    fn try_from(activation: candle_nn::Activation) -> std::result::Result<Self, Error> {
        use candle_nn::Activation as Candle;
        Ok(match activation {
            Candle::Silu | Candle::Swish => Self::Silu,
            Candle::Gelu => Self::Gelu,
            Candle::NewGelu | Candle::GeluPytorchTanh => Self::GeluTanh,
            Candle::Relu => Self::Relu,
            Candle::Relu2 => Self::ReluSquared,
            other => return Err(Error::Candle { got: format!("{other:?}") }),
        })
    }
}

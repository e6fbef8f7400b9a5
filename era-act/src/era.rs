use candle_core::{Result, Tensor};
use serde::{Deserialize, Serialize};

use crate::Error;
use crate::pointwise::Visitor;
use crate::pointwise::gate_entropy::GateEntropy;
use crate::pointwise::gelu_softplus::GeluSoftplus;
use crate::pointwise::gelu_tanh::GeluTanh;
use crate::pointwise::silu::Silu;

/// ERA, an activation that adds an entropy term to a smooth gate.
///
/// ```text
/// GateEntropy    x g (1 + s H(g)),  g = sigmoid(x / T),  H(g) = -g ln g - (1 - g) ln(1 - g)
/// GeluSoftplus   GELU_tanh(x) + gamma softplus(x)
/// ```
///
/// Both are functions of one element: the output at a position depends on no other position, so a causal model stays
/// causal. Both are smooth and stable for every finite input in every dtype.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use era_act::Era;
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::new(&[-1e4f32, 0.0, 1.0, 1e4], &Device::Cpu)?;
/// let y = Era::default().forward(&x)?.to_vec1::<f32>()?;
/// assert_eq!((y[0], y[1], y[3]), (0.0, 0.0, 1e4));
/// // sigmoid(1) = 0.731059, and its entropy is 0.582203 nats
/// assert!((y[2] - 0.731059 * (1.0 + 0.1 * 0.582203)).abs() < 1e-5);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Era {
    /// The input times its gate, raised where the gate is undecided.
    GateEntropy {
        /// `T`, the width of the gate; from 1e-6 to 1e6, 1 by default.
        #[serde(default = "default_temperature")]
        temperature: f64,
        /// `s`, the weight of the entropy; finite in f32, 0.1 by default. 0 gives SiLU (of `x / T`, times `T`).
        #[serde(default = "default_weight")]
        strength: f64,
    },
    /// The tanh form of GELU, raised by a softplus.
    GeluSoftplus {
        /// The weight of the softplus; finite in f32, 0.1 by default. 0 gives GELU. `ERA(0) = gamma ln 2`.
        #[serde(default = "default_weight")]
        gamma: f64,
    },
}

/// The range of the temperature.
pub(crate) const TEMPERATURES: [f64; 2] = [1e-6, 1e6];

fn default_temperature() -> f64 {
    1.0
}

fn default_weight() -> f64 {
    0.1
}

impl Default for Era {
    /// The gate-entropy form with `T = 1` and `s = 0.1`.
    fn default() -> Self {
        Self::GateEntropy { temperature: default_temperature(), strength: default_weight() }
    }
}

impl Era {
    /// The GELU + softplus form with `gamma = 0.1`.
    pub fn gelu_softplus() -> Self {
        Self::GeluSoftplus { gamma: default_weight() }
    }

    /// Checks that every parameter is in its range.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] names the first one that is not.
    pub fn validate(&self) -> std::result::Result<(), Error> {
        let finite = |activation, parameter, got: f64| {
            // As f32, since that is what the kernels and most devices compute in.
            if (got as f32).is_finite() {
                return Ok(());
            }
            Err(Error::Parameter { activation, parameter, expected: "a finite f32", got })
        };
        match *self {
            Self::GateEntropy { temperature, strength } => {
                let [least, most] = TEMPERATURES;
                if !(least..=most).contains(&temperature) {
                    return Err(Error::Parameter {
                        activation: "gate_entropy",
                        parameter: "temperature",
                        expected: "from 1e-6 to 1e6",
                        got: temperature,
                    });
                }
                finite("gate_entropy", "strength", strength)
            }
            Self::GeluSoftplus { gamma } => finite("gelu_softplus", "gamma", gamma),
        }
    }

    /// Applies the activation to every element; x: any shape and strides, f32, f64, bf16 or f16.
    ///
    /// The backward pass is exact and keeps the input alone. Half types are computed in f32 and rounded once.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] or [`Error::DType`], inside a [`candle_core::Error`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        crate::Activation::Era(*self).forward(x)
    }

    /// The gated form: `era(gate) * up` of a packed input, in one pass.
    ///
    /// gate_up: (..., 2 F), the gates first, then the values that they scale; returns (..., F). The backward pass
    /// returns the packed gradient, (..., 2 F), and keeps the input alone.
    ///
    /// # Errors
    ///
    /// [`Error::GatedShape`] where the last dimension is odd or missing, else as [`forward`](Self::forward).
    pub fn gated(&self, gate_up: &Tensor) -> Result<Tensor> {
        crate::Activation::Era(*self).gated(gate_up)
    }

    pub(crate) fn visit<V: Visitor>(&self, visitor: V) -> V::Output {
        match *self {
            // Without their terms they are these to the bit, the sign of a zero and infinities among them.
            Self::GateEntropy { temperature: 1.0, strength: 0.0 } => visitor.visit(Silu),
            Self::GeluSoftplus { gamma: 0.0 } => visitor.visit(GeluTanh),
            Self::GateEntropy { temperature, strength } => {
                visitor.visit(GateEntropy { temperature, strength })
            }
            Self::GeluSoftplus { gamma } => visitor.visit(GeluSoftplus { gamma }),
        }
    }
}

impl candle_nn::Module for Era {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Era::forward(self, x)
    }
}

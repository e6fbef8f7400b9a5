use candle_core::{CpuStorage, CustomOp2, DType, Device, Layout, Result, Shape, Tensor, Var};
use candle_nn::{Init, VarBuilder};

#[cfg(feature = "cuda")]
use crate::cuda;
use crate::era::TEMPERATURES;
use crate::layout::elements;
use crate::op::{by_dtype, check_dtype, gated_width, halved, storage};
use crate::pointwise::gate_entropy::GateEntropy;
use crate::pointwise::gelu_softplus::{GeluSoftplus, softplus};
use crate::pointwise::gelu_tanh::GeluTanh;
use crate::pointwise::{Learned, Pointwise};
use crate::{Era, Error, cpu, op};

/// ERA whose parameters are trained: temperature and strength, or gamma.
///
/// ```text
/// GateEntropy    T = exp(log_temperature) and s are trained:   dy/dT = -z^2 g'(z) (1 + s H - s z g),  dy/ds = x g H
/// GeluSoftplus   gamma is trained:                             dy/dgamma = softplus(x)
/// ```
///
/// The variables are scalars in f32; the temperature is kept as its logarithm, so that it stays positive. Forward and
/// backward are the fused kernels of [`Era`] and one more pass over the input for the parameters' gradients, whose sums
/// are in f64 and do not depend on the number of threads. On CUDA the kernels read the parameters where they lie, so that
/// nothing waits for the device (and values out of range are not noticed there), and the backward kernel adds up the
/// parameters' gradients as it goes. On devices without a kernel it is a composition of candle ops.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Optimizer, SGD, VarBuilder, VarMap};
/// use era_act::{Era, LearnedEra};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let variables = VarMap::new();
/// let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
/// let activation = LearnedEra::new(Era::default(), vb.pp("act"))?;
/// let x = Tensor::new(&[[-1f32, 0.5, 2.0]], &Device::Cpu)?;
///
/// // Towards the values of another strength.
/// let target = Era::GateEntropy { temperature: 1.0, strength: 0.6 }.forward(&x)?;
/// let loss = || activation.forward(&x)?.sub(&target)?.sqr()?.sum_all();
/// let mut sgd = SGD::new(variables.all_vars(), 0.1)?;
/// let before = loss()?.to_scalar::<f32>()?;
/// for _ in 0..30 {
///     sgd.backward_step(&loss()?)?;
/// }
/// assert!(loss()?.to_scalar::<f32>()? < 0.1 * before);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct LearnedEra {
    form: Form,
}

#[derive(Clone, Debug)]
enum Form {
    GateEntropy { log_temperature: Tensor, strength: Tensor },
    GeluSoftplus { gamma: Tensor },
}

const LOG_TEMPERATURE: &str = "log_temperature";
const STRENGTH: &str = "strength";
const GAMMA: &str = "gamma";

impl LearnedEra {
    /// Makes the variables `log_temperature` and `strength`, or `gamma`, under the builder's prefix; they start at the
    /// values of `era`, or are those that the builder has already.
    ///
    /// # Errors
    ///
    /// Those of [`Era::validate`] inside a [`candle_core::Error`], and candle's own.
    #[expect(clippy::needless_pass_by_value, reason = "by value, as the constructors of candle-nn")]
    pub fn new(era: Era, vb: VarBuilder<'_>) -> Result<Self> {
        Self::with(era, |name, value| vb.get_with_hints_dtype((), name, Init::Const(value), DType::F32))
    }

    /// As [`new`](Self::new), with variables outside of any `VarMap`.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn alone(era: Era, device: &Device) -> Result<Self> {
        Self::with(era, |_, value| Ok(Var::new(value as f32, device)?.into_inner()))
    }

    fn with(era: Era, variable: impl Fn(&str, f64) -> Result<Tensor>) -> Result<Self> {
        era.validate()?;
        let form = match era {
            Era::GateEntropy { temperature, strength } => Form::GateEntropy {
                log_temperature: variable(LOG_TEMPERATURE, temperature.ln())?,
                strength: variable(STRENGTH, strength)?,
            },
            Era::GeluSoftplus { gamma } => Form::GeluSoftplus { gamma: variable(GAMMA, gamma)? },
        };
        Ok(Self { form })
    }

    /// The variables by name.
    pub fn parameters(&self) -> Vec<(&'static str, Tensor)> {
        match &self.form {
            Form::GateEntropy { log_temperature, strength } => {
                vec![(LOG_TEMPERATURE, log_temperature.clone()), (STRENGTH, strength.clone())]
            }
            Form::GeluSoftplus { gamma } => vec![(GAMMA, gamma.clone())],
        }
    }

    /// The activation with the values of the variables as they are now.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] where training has brought one out of its range, inside a [`candle_core::Error`].
    pub fn era(&self) -> Result<Era> {
        let value =
            |t: &Tensor| -> Result<f64> { Ok(f64::from(t.to_dtype(DType::F32)?.to_scalar::<f32>()?)) };
        let era = match &self.form {
            Form::GateEntropy { log_temperature, strength } => {
                let temperature = from_logarithm(value(log_temperature)?);
                Era::GateEntropy { temperature, strength: value(strength)? }
            }
            Form::GeluSoftplus { gamma } => Era::GeluSoftplus { gamma: value(gamma)? },
        };
        era.validate()?;
        Ok(era)
    }

    /// The parameters as one tensor: (2) or (1), with their graph.
    fn packed(&self) -> Result<Tensor> {
        match &self.form {
            Form::GateEntropy { log_temperature, strength } => {
                Tensor::stack(&[&log_temperature.exp()?, strength], 0)
            }
            Form::GeluSoftplus { gamma } => gamma.reshape(1),
        }
    }

    /// The form as the CUDA kernels name it.
    #[cfg(feature = "cuda")]
    fn kernel(&self) -> &'static str {
        match &self.form {
            Form::GateEntropy { .. } => "gate_entropy",
            Form::GeluSoftplus { .. } => "gelu_softplus",
        }
    }

    /// Applies the activation to every element; x: any shape and strides, f32, f64, bf16 or f16.
    ///
    /// # Errors
    ///
    /// As [`era`](Self::era), and [`Error::DType`].
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        check_dtype(x)?;
        #[cfg(feature = "cuda")]
        if cuda::has_kernels(x) {
            return match x.elem_count() {
                0 => cuda::empty(x, x.shape()),
                _ => cuda::learned(self.kernel(), &cuda::prepared(x)?, &self.packed()?),
            };
        }
        if !x.device().is_cpu() {
            return self.composed(x);
        }
        let parameters = self.packed()?;
        match self.era()? {
            Era::GateEntropy { temperature, strength } => {
                x.apply_op2(&parameters, Forward(GateEntropy { temperature, strength }))
            }
            Era::GeluSoftplus { gamma } => x.apply_op2(&parameters, Forward(GeluSoftplus { gamma })),
        }
    }

    /// The gated form: `era(gate) * up` of a packed input; gate_up: (..., 2 F), returns (..., F).
    ///
    /// # Errors
    ///
    /// [`Error::GatedShape`] where the last dimension is odd or missing, else as [`forward`](Self::forward).
    pub fn gated(&self, gate_up: &Tensor) -> Result<Tensor> {
        check_dtype(gate_up)?;
        let width = gated_width(gate_up.shape())?;
        #[cfg(feature = "cuda")]
        if cuda::has_kernels(gate_up) {
            return match gate_up.elem_count() {
                0 => cuda::empty(gate_up, halved(gate_up.shape(), width)),
                _ => cuda::learned_gated(self.kernel(), &cuda::prepared(gate_up)?, &self.packed()?),
            };
        }
        if !gate_up.device().is_cpu() {
            let half = |start| gate_up.narrow(candle_core::D::Minus1, start, width);
            return self.composed(&half(0)?)? * half(width)?;
        }
        let parameters = self.packed()?;
        match self.era()? {
            Era::GateEntropy { temperature, strength } => {
                gate_up.apply_op2(&parameters, Gated(GateEntropy { temperature, strength }))
            }
            Era::GeluSoftplus { gamma } => gate_up.apply_op2(&parameters, Gated(GeluSoftplus { gamma })),
        }
    }

    /// The same in differentiable candle ops: the specification of the kernels.
    ///
    /// # Errors
    ///
    /// candle's own.
    pub fn composed(&self, x: &Tensor) -> Result<Tensor> {
        let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let (input, as_input) = (x.to_dtype(wide)?, |t: &Tensor| t.to_dtype(wide));
        let y = match &self.form {
            Form::GateEntropy { log_temperature, strength } => {
                let z = input.broadcast_div(&as_input(log_temperature)?.exp()?)?;
                let gate = candle_nn::ops::sigmoid(&z)?;
                let magnitude = z.abs()?;
                let exp = magnitude.neg()?.exp()?;
                let one_plus = (&exp + 1.0)?;
                let entropy = (one_plus.log()? + (magnitude * exp.div(&one_plus)?)?)?;
                ((input * gate)? * (entropy.broadcast_mul(&as_input(strength)?)? + 1.0)?)?
            }
            Form::GeluSoftplus { gamma } => {
                let raised = softplus(&input)?.broadcast_mul(&as_input(gamma)?)?;
                (GeluTanh.reference(&input)? + raised)?
            }
        };
        y.to_dtype(x.dtype())
    }
}

impl candle_nn::Module for LearnedEra {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        LearnedEra::forward(self, x)
    }
}

/// The temperature of a logarithm in f32, whose rounding may put either end of the range a little outside of it.
fn from_logarithm(log_temperature: f64) -> f64 {
    let (temperature, slack) = (log_temperature.exp(), 1e-6);
    let [least, most] = TEMPERATURES;
    let near = (least * (1.0 - slack)..=most * (1.0 + slack)).contains(&temperature);
    if near { temperature.clamp(least, most) } else { temperature }
}

struct Forward<P>(P);

impl<P: Learned> CustomOp2 for Forward<P> {
    fn name(&self) -> &'static str {
        "era-act-learned"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_dtype!(x, T => {
            let y = cpu::forward(self.0, &elements::<T>(x, lx)?);
            Ok((storage(y), lx.shape().clone()))
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        parameters: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dx = x.apply_op2_no_bwd(dy, &op::Backward(self.0))?;
        let dp = x.apply_op2_no_bwd(dy, &Sums { f: self.0, gated: false })?;
        Ok((Some(dx), Some(dp.narrow(0, 0, parameters.elem_count())?)))
    }
}

struct Gated<P>(P);

impl<P: Learned> CustomOp2 for Gated<P> {
    fn name(&self) -> &'static str {
        "era-act-learned-gated"
    }

    fn cpu_fwd(
        &self,
        packed: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let width = gated_width(layout.shape())?;
        by_dtype!(packed, T => {
            let y = cpu::gated_forward(self.0, &elements::<T>(packed, layout)?, width);
            Ok((storage(y), halved(layout.shape(), width)))
        })
    }

    fn bwd(
        &self,
        packed: &Tensor,
        parameters: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dx = packed.apply_op2_no_bwd(dy, &op::GatedBackward(self.0))?;
        let dp = packed.apply_op2_no_bwd(dy, &Sums { f: self.0, gated: true })?;
        Ok((Some(dx), Some(dp.narrow(0, 0, parameters.elem_count())?)))
    }
}

/// The gradients of the parameters: (2), f32.
struct Sums<P> {
    f: P,
    gated: bool,
}

impl<P: Learned> CustomOp2 for Sums<P> {
    fn name(&self) -> &'static str {
        "era-act-learned-backward"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        dy: &CpuStorage,
        ldy: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        by_dtype!(x, T => {
            let (x, dy) = (elements::<T>(x, lx)?, elements::<T>(dy, ldy)?);
            let sums = if self.gated {
                cpu::gated_parameter_sums(self.f, &x, &dy, gated_width(lx.shape())?)
            } else {
                cpu::parameter_sums(self.f, &x, &dy)
            };
            Ok((CpuStorage::F32(sums.iter().map(|sum| *sum as f32).collect()), Shape::from(2)))
        })
    }
}

//! Whether the gradient of a loss reaches every trained variable.

use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};

use crate::{Error, Result};

/// Checks that every variable got a gradient: to be called once, after the first backward pass.
///
/// candle cuts gradients in silence in some of its ops; a training run then goes on with adapters that never change.
/// Give the parameters in the order of the forward pass: the error then says between which two the cut lies.
///
/// # Errors
///
/// [`Error::NoGradient`] names the first variable without one. Where one after it has a gradient, what was cut is its
/// own path, not a layer behind it.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::Linear;
/// use flylora::{LoraConfig, LoraLinear, audit};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let base = Linear::new(Tensor::randn(0f32, 0.1, (6, 12), &Device::Cpu)?, None);
/// let layer = LoraLinear::seeded(base, &LoraConfig::default().with_r(2), "q_proj")?;
/// let x = Tensor::randn(0f32, 1.0, (3, 12), &Device::Cpu)?;
/// let y = layer.forward(&x)?;
/// audit(layer.parameters(), &y.sqr()?.mean_all()?.backward()?)?;
///
/// // This op of candle has no backward pass, and says nothing.
/// let cut = candle_nn::ops::rms_norm(&y, &Tensor::ones(6, DType::F32, &Device::Cpu)?, 1e-5)?;
/// let loss = cut.sqr()?.mean_all()?;
/// let error = audit(layer.parameters(), &loss.backward()?).unwrap_err();
/// assert!(error.to_string().starts_with("lora_A.weight has no gradient"));
/// # Ok(())
/// # }
/// ```
pub fn audit<S: AsRef<str>>(parameters: impl IntoIterator<Item = (S, Var)>, grads: &GradStore) -> Result<()> {
    let parameters: Vec<(S, bool)> =
        parameters.into_iter().map(|(name, var)| (name, grads.get(&var).is_some())).collect();
    let Some(first) = parameters.iter().position(|(_, reached)| !reached) else { return Ok(()) };
    let next = parameters.iter().skip(first).find(|(_, reached)| *reached);
    let name = |entry: &(S, bool)| entry.0.as_ref().to_owned();
    let parameter = parameters.get(first).map(name).unwrap_or_default();
    let why = match next.map(name) {
        None if first == 0 => {
            "no parameter has one: the loss is cut off behind all of them, or uses none of them".to_owned()
        }
        None => {
            "those before it have one, and none from there on: the layer is not used, or its own path is cut"
                .to_owned()
        }
        Some(next) => format!(
            "{next}, which comes after it, has one: an op without a backward pass lies between the two, or the layer is \
             not used"
        ),
    };
    Err(Error::NoGradient { parameter, why: Some(why) })
}

/// What [`trace`] runs: a step of a model's forward pass.
pub type Stage<'a> = (&'a str, Box<dyn Fn(&Tensor) -> candle_core::Result<Tensor> + 'a>);

/// Runs the stages of a forward pass one after the other, each on a variable of its own, and says which of them passes
/// no gradient on to its input.
///
/// That is how the op is found which [`audit`] can only place between two layers.
///
/// # Errors
///
/// [`Error::NoGradient`] names the first stage that cuts, with the op's own message where it has one; and candle's own.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use flylora::trace;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let x = Tensor::randn(0f32, 1.0, (3, 8), &Device::Cpu)?;
/// let scale = Tensor::ones(8, x.dtype(), x.device())?;
/// let error = trace(
///     &x,
///     &[
///         ("tanh", Box::new(|x: &Tensor| x.tanh())),
///         ("norm", Box::new(|x: &Tensor| candle_nn::ops::rms_norm(x, &scale, 1e-5))),
///         ("square", Box::new(|x: &Tensor| x.sqr())),
///     ],
/// )
/// .unwrap_err();
/// assert!(error.to_string().starts_with("the input of norm has no gradient"), "{error}");
/// # Ok(())
/// # }
/// ```
pub fn trace(x: &Tensor, stages: &[Stage<'_>]) -> Result<()> {
    let mut x = x.detach();
    for (name, stage) in stages {
        let input = Var::from_tensor(&x)?;
        let y = stage(&input)?;
        let cut =
            |why: String| Error::NoGradient { parameter: format!("the input of {name}"), why: Some(why) };
        let grads = y.sum_all()?.backward().map_err(|e| cut(e.to_string()))?;
        if grads.get(&input).is_none() {
            return Err(cut(format!("{name} is, or holds, an op that detaches its result")));
        }
        x = y.detach();
    }
    Ok(())
}

//! The entropy floors of the paper: output activations that keep a policy or a classifier from becoming too sure.

use candle_core::{D, DType, Result, Tensor};
use serde::{Deserialize, Serialize};

use crate::Error;

/// `tau` of the paper: the largest of the probabilities that the entropies are made from is about `1 / tau`.
const TAU: f64 = 4.0;

/// A floor under the entropy of a categorical distribution: logits in, logits out.
///
/// ```text
/// h  = slope softmax(z) + b,    C = exp(H0 - 1),  slope = (ln tau / tau - C / D) / (1 - 1 / D),  b = (C - slope) / D
/// z' = W(-h), the lower branch of Lambert's function, so that exp(z') has the entropies -p ln p = h, which sum to C
/// ```
///
/// The softmax of `z'` then has an entropy of at least `H0` nats, whatever the network says, and keeps the order of its
/// logits. The paper approximates `W` by `-1 - sqrt(2 u) - 3 u / 4`, `u = -1 - ln h`; [`Lambert::Paper`] is that, which
/// may miss the floor by about a hundredth of a nat, and [`Lambert::Exact`] adds two steps of Newton's method.
///
/// Differentiable candle ops in f32 (f64 for f64), on every device.
///
/// # References
///
/// Kang et al., Entropy Regularizing Activation, [arXiv 2510.08549](https://arxiv.org/abs/2510.08549)
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use era_act::floor::{DiscreteFloor, entropy};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let floor = DiscreteFloor::new(10, 0.8)?; // 10 classes, at least 0.8 nats
/// let sure = Tensor::new(&[[90f32, 0., 0., 0., 0., 0., 0., 0., 0., 0.]], &Device::Cpu)?;
/// assert!(entropy(&sure)?.to_vec1::<f32>()?[0] < 1e-6);
/// let held = floor.forward(&sure)?;
/// assert!(entropy(&held)?.to_vec1::<f32>()?[0] > 0.79);
/// assert_eq!(held.argmax(1)?.to_vec1::<u32>()?, [0]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiscreteFloor {
    /// `D`, the number of classes: at least 2.
    pub classes: usize,
    /// `H0`, the least entropy, in nats: from 0 up to `ln D - 0.06` (`1 + ln(D ln 4 / 4)`).
    pub least: f64,
    /// How `W` is computed.
    #[serde(default)]
    pub lambert: Lambert,
}

/// How the inverse of `-p ln p` is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Lambert {
    /// The paper's approximation and two steps of Newton's method.
    #[default]
    Exact,
    /// The paper's approximation.
    Paper,
}

impl DiscreteFloor {
    /// A floor of `least` nats for `classes` classes.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] where the floor is not in its range.
    pub fn new(classes: usize, least: f64) -> std::result::Result<Self, Error> {
        let floor = Self { classes, least, lambert: Lambert::default() };
        floor.validate()?;
        Ok(floor)
    }

    /// Sets how `W` is computed.
    pub fn with_lambert(mut self, lambert: Lambert) -> Self {
        self.lambert = lambert;
        self
    }

    /// Checks that every field is in its range.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] names the first one that is not.
    pub fn validate(&self) -> std::result::Result<(), Error> {
        let fail = |parameter, expected, got| {
            Err(Error::Parameter { activation: "discrete_floor", parameter, expected, got })
        };
        if self.classes < 2 {
            return fail("classes", "at least 2", self.classes as f64);
        }
        let most = 1.0 + (self.classes as f64 * TAU.ln() / TAU).ln();
        if !(self.least >= 0.0 && self.least <= most) {
            return fail("least", "from 0 to ln(classes) - 0.06", self.least);
        }
        Ok(())
    }

    /// logits: (..., classes), returns (..., classes) in the same dtype.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`]; [`Error::Classes`] for another last dimension; and candle's own.
    pub fn forward(&self, logits: &Tensor) -> Result<Tensor> {
        self.validate()?;
        if logits.dims().last() != Some(&self.classes) {
            return Err(Error::Classes { expected: self.classes, got: logits.dims().to_vec() }.into());
        }
        if logits.elem_count() == 0 {
            return Ok(logits.clone());
        }
        let d = self.classes as f64;
        let c = (self.least - 1.0).exp();
        let slope = (TAU.ln() / TAU - c / d) / (1.0 - 1.0 / d);
        let b = (c - slope) / d;
        let wide = wide(logits)?;
        // Not `softmax_last_dim`, which has no backward pass.
        let h = ((candle_nn::ops::softmax(&wide, D::Minus1)? * slope)? + b)?;
        let log_h = h.log()?;
        let u = (log_h.neg()? - 1.0)?; // over 0, since h < 1 / e
        let mut z = ((((&u * 2.0)?.sqrt()?.neg()? - 1.0)?) - (&u * 0.75)?)?;
        if self.lambert == Lambert::Exact {
            for _ in 0..2 {
                // For f(z) = z + ln(-z) - ln h, which is 0 at W: f' = 1 + 1 / z.
                let f = ((&z + z.neg()?.log()?)? - &log_h)?;
                z = (&z - f.div(&(z.recip()? + 1.0)?)?)?;
            }
        }
        z.to_dtype(logits.dtype())
    }

    /// The cross-entropy of the held logits: logits (n, classes), targets (n) of u32, returns a scalar in f32 or f64.
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward).
    pub fn cross_entropy(&self, logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
        candle_nn::loss::cross_entropy(&wide(&self.forward(logits)?)?, targets)
    }
}

impl candle_nn::Module for DiscreteFloor {
    fn forward(&self, logits: &Tensor) -> Result<Tensor> {
        DiscreteFloor::forward(self, logits)
    }
}

/// The entropy of the softmax of logits, in nats: (..., classes) to (...). A class with the logit minus infinity, which is
/// ruled out, adds nothing.
///
/// # Errors
///
/// candle's own.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// let logits = Tensor::new(&[[0f32, 0., 0., 0.], [100., 0., 0., 0.]], &Device::Cpu)?;
/// let nats = era_act::floor::entropy(&logits)?.to_vec1::<f32>()?;
/// assert!((nats[0] - 4f32.ln()).abs() < 1e-6 && nats[1] < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn entropy(logits: &Tensor) -> Result<Tensor> {
    if logits.elem_count() == 0 {
        return wide(logits)?.sum(D::Minus1);
    }
    let log_p = candle_nn::ops::log_softmax(&wide(logits)?, D::Minus1)?;
    // 0 times minus infinity is NaN: a probability of 0 has a finite logarithm here, below that of any other.
    let log_p = log_p.maximum(-1e3)?;
    (log_p.exp()? * &log_p)?.sum(D::Minus1)?.neg()
}

/// A floor under the sum of the log deviations of a diagonal Gaussian, and so under its entropy, which is that sum and
/// `dims / 2 ln(2 pi e)`.
///
/// ```text
/// ln sigma_i = max(ln sigma_max + (S - D ln sigma_max) softmax(r)_i,  ln sigma_min)       S: the least sum
/// ```
///
/// The network's outputs `r` only share out what is below `sigma_max`.
///
/// # Examples
///
/// ```
/// use candle_core::{Device, Tensor};
/// use era_act::floor::GaussianFloor;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let floor = GaussianFloor::new(3, -4.0)?; // three dimensions, ln sigma to sum to -4 at least
/// let r = Tensor::new(&[[50f32, 0.0, -50.0]], &Device::Cpu)?;
/// let log_sigma = floor.forward(&r)?;
/// assert!(log_sigma.sum_all()?.to_scalar::<f32>()? > -4.001);
/// // The negative log-likelihood of targets (n, D) around means (n, D).
/// let zeros = r.zeros_like()?;
/// assert!(floor.nll(&zeros, &r, &zeros)?.to_scalar::<f32>()?.is_finite());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GaussianFloor {
    /// `D`, the number of dimensions: at least 1.
    pub dims: usize,
    /// `S`, the least sum of `ln sigma`: at most `dims * max_log_sigma`.
    pub least: f64,
    /// `ln sigma_min`, the least of each: less than `max_log_sigma`, -5 by default.
    #[serde(default = "default_min")]
    pub min_log_sigma: f64,
    /// `ln sigma_max`, the most of each: finite, 2 by default.
    #[serde(default = "default_max")]
    pub max_log_sigma: f64,
}

fn default_min() -> f64 {
    -5.0
}

fn default_max() -> f64 {
    2.0
}

impl GaussianFloor {
    /// A floor of `least` under the sum of the log deviations.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] where the floor is not in its range.
    pub fn new(dims: usize, least: f64) -> std::result::Result<Self, Error> {
        let floor = Self { dims, least, min_log_sigma: default_min(), max_log_sigma: default_max() };
        floor.validate()?;
        Ok(floor)
    }

    /// A floor under the entropy itself, in nats.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn of_entropy(dims: usize, entropy: f64) -> std::result::Result<Self, Error> {
        Self::new(dims, entropy - dims as f64 * half_log_two_pi_e())
    }

    /// Sets the least and the most of each log deviation.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn with_range(mut self, min_log_sigma: f64, max_log_sigma: f64) -> std::result::Result<Self, Error> {
        (self.min_log_sigma, self.max_log_sigma) = (min_log_sigma, max_log_sigma);
        self.validate()?;
        Ok(self)
    }

    /// Checks that every field is in its range.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`] names the first one that is not.
    pub fn validate(&self) -> std::result::Result<(), Error> {
        let fail = |parameter, expected, got| {
            Err(Error::Parameter { activation: "gaussian_floor", parameter, expected, got })
        };
        if self.dims == 0 {
            return fail("dims", "at least 1", 0.0);
        }
        if !self.max_log_sigma.is_finite() {
            return fail("max_log_sigma", "finite", self.max_log_sigma);
        }
        if !(self.min_log_sigma < self.max_log_sigma && self.min_log_sigma.is_finite()) {
            return fail("min_log_sigma", "less than max_log_sigma", self.min_log_sigma);
        }
        if !(self.least <= self.dims as f64 * self.max_log_sigma && self.least.is_finite()) {
            return fail("least", "at most dims * max_log_sigma", self.least);
        }
        Ok(())
    }

    /// The log deviations; raw: (..., dims), returns (..., dims) in the same dtype.
    ///
    /// # Errors
    ///
    /// [`Error::Parameter`]; [`Error::Classes`] for another last dimension; and candle's own.
    pub fn forward(&self, raw: &Tensor) -> Result<Tensor> {
        self.validate()?;
        if raw.dims().last() != Some(&self.dims) {
            return Err(Error::Classes { expected: self.dims, got: raw.dims().to_vec() }.into());
        }
        if raw.elem_count() == 0 {
            return Ok(raw.clone());
        }
        let room = self.least - self.dims as f64 * self.max_log_sigma; // 0 or less
        let share = candle_nn::ops::softmax(&wide(raw)?, D::Minus1)?;
        let log_sigma = ((share * room)? + self.max_log_sigma)?;
        log_sigma.maximum(self.min_log_sigma)?.to_dtype(raw.dtype())
    }

    /// The mean negative log-likelihood of targets (n, dims) around means (n, dims), with log deviations from raw
    /// (n, dims): a scalar in f32 or f64, in nats a row.
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward).
    pub fn nll(&self, mean: &Tensor, raw: &Tensor, target: &Tensor) -> Result<Tensor> {
        let log_sigma = wide(&self.forward(raw)?)?;
        let z = ((wide(target)? - wide(mean)?)? * log_sigma.neg()?.exp()?)?;
        let constant = 0.5 * (2.0 * std::f64::consts::PI).ln();
        (((z.sqr()? * 0.5)? + log_sigma)? + constant)?.sum(D::Minus1)?.mean_all()
    }

    /// The entropy of a Gaussian with these log deviations, in nats: (..., dims) to (...).
    ///
    /// # Errors
    ///
    /// candle's own.
    pub fn entropy(log_sigma: &Tensor) -> Result<Tensor> {
        let log_sigma = wide(log_sigma)?;
        let dims = log_sigma.dim(D::Minus1)? as f64;
        log_sigma.sum(D::Minus1)? + dims * half_log_two_pi_e()
    }
}

impl candle_nn::Module for GaussianFloor {
    fn forward(&self, raw: &Tensor) -> Result<Tensor> {
        GaussianFloor::forward(self, raw)
    }
}

/// `ln(2 pi e) / 2`, the entropy of a Gaussian with deviation 1.
fn half_log_two_pi_e() -> f64 {
    0.5 * (2.0 * std::f64::consts::PI * std::f64::consts::E).ln()
}

fn wide(t: &Tensor) -> Result<Tensor> {
    if t.dtype() == DType::F64 { Ok(t.clone()) } else { t.to_dtype(DType::F32) }
}

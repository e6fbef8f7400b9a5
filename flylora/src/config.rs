use serde::{Deserialize, Serialize};

use crate::dropout::check_rate;
use crate::{Error, Result};

/// What the product `B A` is multiplied by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Scaling {
    /// `alpha / r`, as in the LoRA paper.
    #[default]
    AlphaOverR,
    /// `alpha / sqrt(r)`, rank-stabilised ([arXiv 2312.03732](https://arxiv.org/abs/2312.03732)); PEFT's `use_rslora`.
    AlphaOverSqrtR,
}

/// What an adapter of the LoRA kind starts from. With each of them the layer starts as its base.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum LoraInit {
    /// `A` uniform in `+-1 / sqrt(in)`, `B` zero: PEFT's default.
    #[default]
    KaimingUniform,
    /// `A` normal with deviation `1 / r`, `B` zero; PEFT's `gaussian`.
    Gaussian,
    /// Neither is zero, but their product is: `A = Q1^T R1`, `B = R2 Q2`, with `Q1` and `Q2` the odd and the even rows
    /// of a random orthogonal matrix and `R` normal with deviation 0.1. `r` must be even. PEFT's `orthogonal`.
    Orthogonal,
    /// The `r` largest singular directions of the weight, which are then what is trained ([arXiv
    /// 2404.02948](https://arxiv.org/abs/2404.02948)); PEFT's `pissa`. The adapter's change is `B A - B0 A0`, with `A0`
    /// and `B0` the start, so the base keeps its weight; files hold it as plain LoRA of rank `2 r`.
    Pissa {
        /// Steps of subspace iteration of a randomised decomposition (4 is good, PEFT's `pissa_niter_4`); `None` is
        /// the exact one, whose time grows with the cube of the layer's size.
        iterations: Option<usize>,
    },
}

/// How an adapter of the LoRA kind is made.
///
/// # Examples
///
/// ```
/// use flylora::LoraConfig;
///
/// let config = LoraConfig::default().with_r(16).with_alpha(32.0);
/// assert_eq!(config.scale(), 2.0);
/// assert!(config.with_r(0).validate().is_err());
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// The rank of the update: at least 1, 8 by default. It may be larger than the layer, except with PiSSA's start.
    pub r: usize,
    /// The numerator of the scale: finite and not 0, 8 by default.
    pub alpha: f64,
    /// What `alpha` is divided by: `r` by default.
    pub scaling: Scaling,
    /// What the initial values are drawn from, together with the name of the layer; 0 by default.
    pub seed: u64,
    /// What the adapter starts from.
    #[serde(skip_serializing_if = "is_default")]
    pub init: LoraInit,
    /// The share of the adapter's input that is dropped in training: from 0 up to, not including, 1; 0 by default. PEFT's
    /// `lora_dropout`. It is on only between calls of [`Adapter::set_training`](crate::Adapter::set_training).
    #[serde(skip_serializing_if = "is_default")]
    pub dropout: f64,
    /// Whether `B` has a bias, trained with it and scaled as the product is; false by default. PEFT's `lora_bias`. For LoRA
    /// alone, of layers.
    #[serde(skip_serializing_if = "is_default")]
    pub bias: bool,
}

pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Default for LoraConfig {
    fn default() -> Self {
        let (scaling, init) = (Scaling::default(), LoraInit::default());
        Self { r: 8, alpha: 8.0, scaling, seed: 0, init, dropout: 0.0, bias: false }
    }
}

impl LoraConfig {
    /// Sets the rank.
    pub fn with_r(mut self, r: usize) -> Self {
        self.r = r;
        self
    }

    /// Sets the numerator of the scale.
    pub fn with_alpha(mut self, alpha: f64) -> Self {
        self.alpha = alpha;
        self
    }

    /// Sets what `alpha` is divided by.
    pub fn with_scaling(mut self, scaling: Scaling) -> Self {
        self.scaling = scaling;
        self
    }

    /// Sets the seed.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets what the adapter starts from.
    pub fn with_init(mut self, init: LoraInit) -> Self {
        self.init = init;
        self
    }

    /// Sets the share of the input that is dropped in training.
    pub fn with_dropout(mut self, dropout: f64) -> Self {
        self.dropout = dropout;
        self
    }

    /// Sets whether `B` has a bias.
    pub fn with_bias(mut self, bias: bool) -> Self {
        self.bias = bias;
        self
    }

    /// What the product `B A` is multiplied by.
    pub fn scale(&self) -> f64 {
        match self.scaling {
            Scaling::AlphaOverR => self.alpha / self.r as f64,
            Scaling::AlphaOverSqrtR => self.alpha / (self.r as f64).sqrt(),
        }
    }

    /// Checks all that can be checked without a layer.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] names the first field that is not in its range.
    pub fn validate(&self) -> Result<()> {
        if self.r == 0 {
            return Err(Error::Config { field: "r", expected: "at least 1".into(), got: self.r.to_string() });
        }
        if !self.alpha.is_finite() || self.alpha == 0.0 {
            let expected = "finite and not 0".into();
            return Err(Error::Config { field: "alpha", expected, got: self.alpha.to_string() });
        }
        if self.init == LoraInit::Orthogonal && !self.r.is_multiple_of(2) {
            let expected = "even for the orthogonal start".into();
            return Err(Error::Config { field: "r", expected, got: self.r.to_string() });
        }
        check_rate(self.dropout)
    }

    /// Checks the configuration for a layer of the given size.
    ///
    /// # Errors
    ///
    /// [`Error::Config`], also where a weight has fewer singular directions than PiSSA's start asks for.
    pub fn validate_for(&self, in_features: usize, out_features: usize) -> Result<()> {
        self.validate()?;
        if matches!(self.init, LoraInit::Pissa { .. }) && self.r > in_features.min(out_features) {
            let expected = format!("at most min(in, out) = min({in_features}, {out_features}) for PiSSA");
            return Err(Error::Config { field: "r", expected, got: self.r.to_string() });
        }
        Ok(())
    }

    /// That no bias is asked for where there is none.
    pub(crate) fn check_no_bias(&self, what: &str) -> Result<()> {
        if self.bias {
            return Err(Error::Config {
                field: "bias",
                expected: format!("false for {what}"),
                got: "true".into(),
            });
        }
        Ok(())
    }
}

use serde::{Deserialize, Serialize};

use crate::Error;

/// Which of a row's values decide which ranks it makes use of. The paper has both: the two choose differently.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Routing {
    /// The largest of `|y| + d` (Eq. 8 of the paper).
    #[default]
    Magnitude,
    /// The largest of `y + d` (Eq. 10 of the paper).
    Signed,
}

/// How an adapter of the FlyLoRA kind is made; the defaults are the paper's recipe.
///
/// # Examples
///
/// ```
/// use flylora::{FlyLoraConfig, Routing};
///
/// let config = FlyLoraConfig::default().with_ranks(16, 4).with_routing(Routing::Signed);
/// assert!(config.validate().is_ok());
/// assert!(config.with_ranks(16, 17).validate().is_err()); // a row cannot make use of 17 ranks of 16
/// ```
///
/// # References
///
/// FlyLoRA, [arXiv:2510.08396](https://arxiv.org/abs/2510.08396).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FlyLoraConfig {
    /// The number of ranks that there are: at least 1, 32 by default. It may be larger than the layer.
    pub r: usize,
    /// The number of ranks that a row makes use of: from 1 to `r`, 8 by default.
    pub k: usize,
    /// The share of nonzeros in each row of `A`: in (0, 1], 8 / 32 by default.
    pub density: f64,
    /// The numerator of the scale `alpha / r`: finite and not 0, 64 by default.
    pub alpha: f64,
    /// What decides which ranks a row makes use of.
    pub routing: Routing,
    /// What a rank's bias moves by in each step, up where it is used less than the mean and down where more: 0 (off) or
    /// more, 1e-3 by default.
    pub balance_rate: f64,
    /// What `A` is drawn from, together with the name of the layer; 0 by default.
    pub seed: u64,
}

impl Default for FlyLoraConfig {
    fn default() -> Self {
        Self {
            r: 32,
            k: 8,
            density: 0.25,
            alpha: 64.0,
            routing: Routing::default(),
            balance_rate: 1e-3,
            seed: 0,
        }
    }
}

impl FlyLoraConfig {
    /// Sets the number of ranks that there are, and of those that a row makes use of.
    pub fn with_ranks(mut self, r: usize, k: usize) -> Self {
        (self.r, self.k) = (r, k);
        self
    }

    /// Sets the share of nonzeros of `A`.
    pub fn with_density(mut self, density: f64) -> Self {
        self.density = density;
        self
    }

    /// Sets the numerator of the scale.
    pub fn with_alpha(mut self, alpha: f64) -> Self {
        self.alpha = alpha;
        self
    }

    /// Sets what decides which ranks a row makes use of.
    pub fn with_routing(mut self, routing: Routing) -> Self {
        self.routing = routing;
        self
    }

    /// Sets what a rank's bias moves by in each step.
    pub fn with_balance_rate(mut self, rate: f64) -> Self {
        self.balance_rate = rate;
        self
    }

    /// Sets the seed.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// What the product is multiplied by.
    pub fn scale(&self) -> f64 {
        self.alpha / self.r as f64
    }

    /// The number of nonzeros in a row of `A` for a layer of that input size.
    pub fn nonzeros(&self, in_features: usize) -> usize {
        ((self.density * in_features as f64).round() as usize).clamp(1, in_features.max(1))
    }

    /// Checks that every field is in its range.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] names the first one that is not.
    pub fn validate(&self) -> crate::Result<()> {
        let fail =
            |field, expected: &str, got: String| Err(Error::Config { field, expected: expected.into(), got });
        if self.r == 0 {
            return fail("r", "at least 1", self.r.to_string());
        }
        if self.k == 0 || self.k > self.r {
            return fail("k", &format!("from 1 to r = {}", self.r), self.k.to_string());
        }
        if !(self.density > 0.0 && self.density <= 1.0) {
            return fail("density", "over 0 and at most 1", self.density.to_string());
        }
        if !self.alpha.is_finite() || self.alpha == 0.0 {
            return fail("alpha", "finite and not 0", self.alpha.to_string());
        }
        if !self.balance_rate.is_finite() || self.balance_rate < 0.0 {
            return fail("balance_rate", "0 or more", self.balance_rate.to_string());
        }
        Ok(())
    }
}

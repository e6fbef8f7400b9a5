//! How large a model suits how much text and computing: scaling laws, and what follows from them.
//!
//! Training a model of `N` parameters on `D` tokens takes about `C = 6 N D` operations: two for each parameter and
//! token forward, four backward (attention over long sequences comes on top). A [`Law`] says which `N` and `D` make the
//! best of a `C`.
//!
//! These laws were fitted to models of 70 million to 16 billion parameters on web text. For smaller ones, and for text
//! that is read several times, they give the order of magnitude.
//!
//! # References
//!
//! Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models", <https://arxiv.org/abs/2203.15556>;
//! Besiroglu et al. (Epoch AI) 2024, "Chinchilla Scaling: A replication attempt", <https://arxiv.org/abs/2404.10102>;
//! Muennighoff et al. 2023, "Scaling Data-Constrained Language Models", <https://arxiv.org/abs/2305.16264>.

mod architecture;
mod law;

use crate::error::{DataError, Result};

pub use architecture::Architecture;
pub use law::{Budget, Law, LossFit};

/// Operations a parameter and token that training takes: `C = 6 N D`.
pub const FLOPS_PER_PARAMETER_AND_TOKEN: f64 = 6.0;

/// How often a text can be read before reading it again teaches clearly less than new text would (Muennighoff et al.
/// 2023).
pub const USEFUL_EPOCHS: f64 = 4.0;

/// A model's size and what it is trained on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sizing {
    /// Parameters, `N`.
    pub parameters: f64,
    /// Tokens to train on, `D`; with text that is read twice, twice its tokens.
    pub tokens: f64,
}

impl Sizing {
    /// The operations that training takes, `C = 6 N D`.
    pub fn flops(self) -> f64 {
        FLOPS_PER_PARAMETER_AND_TOKEN * self.parameters * self.tokens
    }

    /// How often a text of `tokens` tokens is read.
    ///
    /// # Errors
    ///
    /// [`DataError::Sizing`] where `tokens` is not positive.
    pub fn epochs(self, tokens: f64) -> Result<f64> {
        Ok(self.tokens / positive("the epochs of a text", "tokens", tokens)?)
    }

    /// The hours that training takes.
    ///
    /// # Errors
    ///
    /// [`DataError::Sizing`] where the speed is not positive.
    pub fn hours(self, tokens_per_second: f64) -> Result<f64> {
        Ok(self.tokens / positive("the time of a training", "tokens a second", tokens_per_second)? / 3600.0)
    }
}

/// Of models with these numbers of parameters, the index of the one that suits a budget best: the one whose size has
/// the smallest ratio to the law's optimum, at most `tolerance` times too large or too small.
///
/// # Errors
///
/// [`DataError::Sizing`] where none is near enough (it says which is nearest), where there are no models, where
/// `tolerance` is below 1, and for what [`Law::optimum`] refuses.
///
/// # Examples
///
/// ```
/// use vesper_data::sizing::{Budget, Law, choose};
///
/// let models = [1.7e6, 6.9e6, 22.9e6];
/// // 500 million tokens at 20 a parameter: 25 million parameters.
/// assert_eq!(choose(&models, Law::default(), Budget::Tokens(5e8), 2.0)?, 2);
/// // For a few pages there is none.
/// let error = choose(&models, Law::default(), Budget::Tokens(1e5), 2.0).unwrap_err();
/// assert_eq!(
///     error.to_string(),
///     "no size for a text of 100000 tokens: the best model has 5000 parameters, \
///      the nearest has 1700000, which is 340 times as many (expected at most 2 times)"
/// );
/// # Ok::<(), vesper_data::DataError>(())
/// ```
pub fn choose(parameters: &[f64], law: Law, budget: Budget, tolerance: f64) -> Result<usize> {
    let refused = |problem| Err(DataError::Sizing { asked: budget.to_string(), problem });
    if tolerance.is_nan() || tolerance < 1.0 {
        return refused(format!("a tolerance of {tolerance}, expected a factor of at least 1"));
    }
    let best = law.optimum(budget)?.parameters;
    let ratio = |parameters: f64| (parameters / best).ln().abs();
    let usable = parameters.iter().copied().enumerate().filter(|(_, n)| n.is_finite() && *n > 0.0);
    let Some((index, nearest)) = usable.min_by(|a, b| ratio(a.1).total_cmp(&ratio(b.1))) else {
        return refused("there is no model to choose from".to_owned());
    };
    if ratio(nearest) <= tolerance.ln() {
        return Ok(index);
    }
    let found = if nearest > best {
        format!("{:.0} times as many", nearest / best)
    } else {
        format!("{:.0} times too few", best / nearest)
    };
    refused(format!(
        "the best model has {best:.0} parameters, the nearest has {nearest:.0}, which is {found} (expected at most \
         {tolerance} times)"
    ))
}

/// The value, if it is a positive number.
fn positive(asked: &str, name: &str, value: f64) -> Result<f64> {
    if value.is_finite() && value > 0.0 {
        return Ok(value);
    }
    let problem = format!("{name} is {value}, expected a positive number");
    Err(DataError::Sizing { asked: asked.to_owned(), problem })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRESETS: [f64; 5] = [1.7e6, 6.9e6, 22.9e6, 109.6e6, 341.2e6];

    #[test]
    fn the_model_nearest_by_ratio_is_chosen() {
        for (tokens, index) in [(34e6, 0), (138e6, 1), (458e6, 2), (2e9, 3), (7e9, 4), (12e9, 4)] {
            assert_eq!(
                choose(&PRESETS, Law::default(), Budget::Tokens(tokens), 2.0).unwrap(),
                index,
                "{tokens}"
            );
        }
        // Between 22.9 and 109.6 million the middle is their geometric mean, 50.1 million.
        assert_eq!(choose(&PRESETS, Law::default(), Budget::Tokens(20.0 * 50e6), 2.5).unwrap(), 2);
        assert_eq!(choose(&PRESETS, Law::default(), Budget::Tokens(20.0 * 50.2e6), 2.5).unwrap(), 3);
    }

    #[test]
    fn what_fits_no_model_is_refused_and_not_replaced() {
        let message = |models: &[f64], budget, tolerance| {
            choose(models, Law::default(), budget, tolerance).unwrap_err().to_string()
        };
        let large = message(&PRESETS, Budget::Tokens(2e12), 2.0);
        assert!(
            large.starts_with("no size for a text of 2000000000000 tokens: the best model has"),
            "{large}"
        );
        assert!(large.contains("the nearest has 341200000, which is 293 times too few"), "{large}");
        assert!(message(&[], Budget::Tokens(1e9), 2.0).contains("no model to choose from"));
        assert!(message(&[0.0, f64::NAN], Budget::Tokens(1e9), 2.0).contains("no model to choose from"));
        for tolerance in [0.5, -1.0, f64::NAN] {
            assert!(message(&PRESETS, Budget::Tokens(1e9), tolerance).contains("at least 1"));
        }
    }

    #[test]
    fn epochs_and_hours_follow_from_the_tokens() {
        let sizing = Sizing { parameters: 1e6, tokens: 72e6 };
        assert_eq!(sizing.flops(), 432e12);
        assert_eq!(sizing.epochs(18e6).unwrap(), 4.0);
        assert_eq!(sizing.hours(20_000.0).unwrap(), 1.0);
        for wrong in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(sizing.epochs(wrong).is_err() && sizing.hours(wrong).is_err());
        }
    }
}

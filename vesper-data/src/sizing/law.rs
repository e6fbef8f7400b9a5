//! Scaling laws.

use std::fmt;

use super::{FLOPS_PER_PARAMETER_AND_TOKEN, Sizing, positive};
use crate::error::{DataError, Result};

/// What there is: operations, text or a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// Operations to spend.
    Flops(f64),
    /// Tokens to train on.
    Tokens(f64),
    /// Parameters to train.
    Parameters(f64),
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flops(flops) => write!(f, "a budget of {flops:e} operations"),
            Self::Tokens(tokens) => write!(f, "a text of {tokens} tokens"),
            Self::Parameters(parameters) => write!(f, "a model of {parameters} parameters"),
        }
    }
}

/// The loss of a model of `N` parameters after `D` tokens, in nats a token of the text that it was fitted on:
///
/// ```text
/// L(N, D) = E + A / N^alpha + B / D^beta
/// ```
///
/// `E` is what no model can know, the second term what a larger model would, the third what more text would.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossFit {
    /// The entropy of text, `E`.
    pub e: f64,
    /// `A`.
    pub a: f64,
    /// `B`.
    pub b: f64,
    /// The exponent of the parameters.
    pub alpha: f64,
    /// The exponent of the tokens.
    pub beta: f64,
}

impl LossFit {
    /// The constants that Hoffmann et al. 2022 published (equation 10, approach 3).
    pub const HOFFMANN: Self = Self { e: 1.69, a: 406.4, b: 410.7, alpha: 0.34, beta: 0.28 };

    /// The constants that Epoch AI found in the same measurements (Besiroglu et al. 2024): those of the paper do not
    /// fit its own data, nor its rule of 20 tokens a parameter; these do.
    pub const EPOCH_AI: Self = Self { e: 1.8172, a: 482.01, b: 2085.43, alpha: 0.3478, beta: 0.3658 };

    /// The loss of a model.
    ///
    /// # Errors
    ///
    /// [`DataError::Sizing`] where parameters or tokens are not positive.
    ///
    /// # Examples
    ///
    /// ```
    /// use vesper_data::sizing::{LossFit, Sizing};
    ///
    /// // Chinchilla: 70 billion parameters, 1.4 trillion tokens.
    /// let loss = LossFit::HOFFMANN.loss(Sizing { parameters: 70e9, tokens: 1.4e12 })?;
    /// assert!((loss - 1.937).abs() < 1e-3);
    /// # Ok::<(), vesper_data::DataError>(())
    /// ```
    pub fn loss(&self, sizing: Sizing) -> Result<f64> {
        let n = positive("a loss", "the number of parameters", sizing.parameters)?;
        let d = positive("a loss", "the number of tokens", sizing.tokens)?;
        Ok(self.e + self.a / n.powf(self.alpha) + self.b / d.powf(self.beta))
    }
}

/// How operations are best shared between parameters and tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Law {
    /// This many tokens a parameter, whatever the size. Default: 20, the rule of Hoffmann et al. 2022.
    Ratio(f64),
    /// What makes a fitted loss smallest for given operations:
    ///
    /// ```text
    /// N = G (C/6)^(beta/(alpha+beta)),   D = (C/6)^(alpha/(alpha+beta)) / G,
    /// G = (alpha A / (beta B))^(1/(alpha+beta))
    /// ```
    Fit(LossFit),
}

impl Default for Law {
    fn default() -> Self {
        Self::Ratio(20.0)
    }
}

impl Law {
    /// The best size and number of tokens for what there is.
    ///
    /// # Errors
    ///
    /// [`DataError::Sizing`] where the budget, or a constant of the law, is not a positive number, and where the result
    /// is less than one parameter or one token, or too large to be a number.
    ///
    /// # Examples
    ///
    /// ```
    /// use vesper_data::sizing::{Budget, Law};
    ///
    /// // Chinchilla's own budget: 70 billion parameters and 1.4 trillion tokens.
    /// let best = Law::default().optimum(Budget::Flops(5.88e23))?;
    /// assert!((best.parameters / 70e9 - 1.0).abs() < 1e-9);
    /// assert!((best.tokens / 1.4e12 - 1.0).abs() < 1e-9);
    /// # Ok::<(), vesper_data::DataError>(())
    /// ```
    pub fn optimum(self, budget: Budget) -> Result<Sizing> {
        let asked = budget.to_string();
        let (Budget::Flops(value) | Budget::Tokens(value) | Budget::Parameters(value)) = budget;
        positive(&asked, "it", value)?;
        let product = |flops: f64| flops / FLOPS_PER_PARAMETER_AND_TOKEN; // N D
        let (parameters, tokens) = match self {
            Self::Ratio(ratio) => {
                positive(&asked, "the number of tokens a parameter", ratio)?;
                match budget {
                    Budget::Flops(flops) => {
                        let n = (product(flops) / ratio).sqrt();
                        (n, ratio * n)
                    }
                    Budget::Tokens(tokens) => (tokens / ratio, tokens),
                    Budget::Parameters(parameters) => (parameters, ratio * parameters),
                }
            }
            Self::Fit(LossFit { a, b, alpha, beta, .. }) => {
                for (name, value) in [("A", a), ("B", b), ("alpha", alpha), ("beta", beta)] {
                    positive(&asked, name, value)?;
                }
                let g = (alpha * a / (beta * b)).powf((alpha + beta).recip());
                let (n_power, d_power) = (beta / (alpha + beta), alpha / (alpha + beta));
                let of_product = |product: f64| (g * product.powf(n_power), product.powf(d_power) / g);
                match budget {
                    Budget::Flops(flops) => of_product(product(flops)),
                    Budget::Tokens(tokens) => (of_product((g * tokens).powf(d_power.recip())).0, tokens),
                    Budget::Parameters(n) => (n, of_product((n / g).powf(n_power.recip())).1),
                }
            }
        };
        let sizing = Sizing { parameters, tokens };
        let problem = if sizing.flops().is_finite() && parameters >= 1.0 && tokens >= 1.0 {
            return Ok(sizing);
        } else if parameters < 1.0 || tokens < 1.0 {
            format!("it is too small: the law gives {parameters:.3e} parameters and {tokens:.3e} tokens")
        } else {
            "it is too large to calculate with".to_owned()
        };
        Err(DataError::Sizing { asked, problem })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LAWS: [Law; 3] = [Law::Ratio(20.0), Law::Fit(LossFit::HOFFMANN), Law::Fit(LossFit::EPOCH_AI)];

    fn near(a: f64, b: f64, tolerance: f64) -> bool {
        (a / b - 1.0).abs() < tolerance
    }

    #[test]
    fn the_papers_numbers_come_out() {
        // Hoffmann et al., table 3: 67 billion parameters and 1.5 trillion tokens for the operations of Gopher.
        let best = Law::default().optimum(Budget::Flops(5.76e23)).unwrap();
        assert!(near(best.parameters, 67e9, 0.05) && near(best.tokens, 1.5e12, 0.1), "{best:?}");
        // Their approach 3: 40 billion parameters for the same.
        let best = Law::Fit(LossFit::HOFFMANN).optimum(Budget::Flops(5.76e23)).unwrap();
        assert!((30e9..45e9).contains(&best.parameters), "{best:?}");
        // Besiroglu et al.: about 20 tokens a parameter for the same.
        let best = Law::Fit(LossFit::EPOCH_AI).optimum(Budget::Flops(5.76e23)).unwrap();
        assert!((15.0..30.0).contains(&(best.tokens / best.parameters)), "{best:?}");
    }

    #[test]
    fn a_fitted_law_gives_the_lowest_loss() {
        for fit in [LossFit::HOFFMANN, LossFit::EPOCH_AI] {
            let best = Law::Fit(fit).optimum(Budget::Flops(1e20)).unwrap();
            let loss = |factor: f64| {
                let shifted = Sizing { parameters: best.parameters * factor, tokens: best.tokens / factor };
                fit.loss(shifted).unwrap()
            };
            assert!(loss(1.0) < loss(1.02) && loss(1.0) < loss(0.98), "{best:?}");
        }
    }

    #[test]
    fn what_has_no_answer_is_refused_with_what_was_asked() {
        for law in LAWS {
            for value in [0.0, -5.0, f64::NAN, f64::INFINITY] {
                for budget in [Budget::Flops(value), Budget::Tokens(value), Budget::Parameters(value)] {
                    let message = law.optimum(budget).unwrap_err().to_string();
                    assert!(message.contains("expected a positive number"), "{message}");
                }
            }
            assert!(law.optimum(Budget::Flops(1e-9)).unwrap_err().to_string().contains("too small"));
            assert!(law.optimum(Budget::Parameters(1e300)).unwrap_err().to_string().contains("too large"));
        }
        let message = Law::Ratio(0.0).optimum(Budget::Tokens(5.0)).unwrap_err().to_string();
        assert_eq!(
            message,
            "no size for a text of 5 tokens: the number of tokens a parameter is 0, expected a positive number"
        );
        let fit = LossFit { beta: f64::NAN, ..LossFit::EPOCH_AI };
        assert!(Law::Fit(fit).optimum(Budget::Flops(1e20)).unwrap_err().to_string().contains("beta is NaN"));
        assert!(LossFit::HOFFMANN.loss(Sizing { parameters: 0.0, tokens: 1.0 }).is_err());
    }

    proptest! {
        #[test]
        fn the_three_questions_have_the_same_answer(exponent in 12.0..26.0_f64, law in prop::sample::select(&LAWS[..])) {
            let best = law.optimum(Budget::Flops(10f64.powf(exponent))).unwrap();
            prop_assert!(near(best.flops(), 10f64.powf(exponent), 1e-9));
            for budget in [Budget::Tokens(best.tokens), Budget::Parameters(best.parameters)] {
                let again = law.optimum(budget).unwrap();
                prop_assert!(near(again.parameters, best.parameters, 1e-6), "{:?} {:?}", again, best);
                prop_assert!(near(again.tokens, best.tokens, 1e-6), "{:?} {:?}", again, best);
            }
        }
    }
}

//! From the tokens of an answer to the answer.

use serde::{Deserialize, Serialize};

use super::calibration::{Calibration, Method, log_odds};
use super::metrics::invalid;
use crate::Result;

/// How the probabilities of the tokens make one of the answer, which is wrong if any of its tokens is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Aggregate {
    /// `1 - prod (1 - p_i)`: as if the tokens were wrong independently of each other.
    #[default]
    Independent,
    /// `mean p_i`.
    Mean,
    /// `max p_i`.
    Largest,
}

impl Aggregate {
    /// The aggregate of the tokens' probabilities of an error; 0 for no tokens.
    ///
    /// # Examples
    /// ```
    /// use vesper_model::metacognition::Aggregate;
    /// assert_eq!(Aggregate::Independent.of(&[0.5, 0.5]), 0.75);
    /// assert_eq!(Aggregate::Mean.of(&[0.5, 0.1]), 0.3);
    /// assert_eq!(Aggregate::Largest.of(&[0.5, 0.1]), 0.5);
    /// ```
    pub fn of(self, tokens: &[f64]) -> f64 {
        match self {
            Self::Independent => 1.0 - tokens.iter().map(|p| 1.0 - p).product::<f64>(),
            Self::Mean if tokens.is_empty() => 0.0,
            Self::Mean => tokens.iter().sum::<f64>() / tokens.len() as f64,
            Self::Largest => tokens.iter().copied().fold(0.0, f64::max),
        }
    }

    /// The log-odds of the aggregate, kept finite: what answers are calibrated over.
    pub fn score(self, tokens: &[f64]) -> f64 {
        log_odds(self.of(tokens))
    }
}

/// The probability that an answer is wrong.
///
/// ```text
/// p = calibration(log-odds of aggregate(p_1 ... p_n))
/// ```
///
/// Errors of neighbouring tokens are not independent, so the aggregate alone is not calibrated.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AnswerCalibration {
    /// What is made of the tokens.
    pub aggregate: Aggregate,
    /// What is made of that. By default it stays as it is.
    pub calibration: Calibration,
}

impl AnswerCalibration {
    /// Fits on answers: `tokens[i]` are the probabilities of answer `i`, `wrong[i]` whether it was wrong.
    ///
    /// # Errors
    /// [`ModelError::InvalidPredictions`](crate::ModelError::InvalidPredictions) for no answers, or NaN.
    pub fn fit(aggregate: Aggregate, method: Method, tokens: &[Vec<f64>], wrong: &[bool]) -> Result<Self> {
        if tokens.is_empty() {
            return Err(invalid("there are no answers to calibrate on: the split is empty"));
        }
        let scores: Vec<f64> = tokens.iter().map(|tokens| aggregate.score(tokens)).collect();
        Ok(Self { aggregate, calibration: Calibration::fit(method, &scores, wrong)? })
    }

    /// The probability that an answer with these tokens is wrong.
    pub fn apply(&self, tokens: &[f64]) -> f64 {
        self.calibration.apply(self.aggregate.score(tokens))
    }
}

//! Whatever says how probable an error is.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::calibration::log_odds;
use super::metrics::invalid;
use super::{AnswerCalibration, Calibration, ErrorHead, Method, Predictions, TokenStatistics};
use crate::Result;

/// One choice of a model, as it is made.
#[derive(Debug, Clone, Copy)]
pub struct TokenView<'a> {
    /// The choice and the distribution that it was made from.
    pub statistics: TokenStatistics,
    /// The hidden state behind that distribution, of `hidden` elements in any shape; `None` where the model shows none.
    pub hidden: Option<&'a Tensor>,
}

/// A score of how likely a choice is wrong: larger is likelier, on any scale.
pub trait ErrorScore: std::fmt::Debug {
    /// The score of one choice.
    ///
    /// # Errors
    /// What the score is computed from is missing or no number.
    fn score(&self, token: &TokenView<'_>) -> Result<f64>;

    /// The scores of all predictions of a text.
    ///
    /// # Errors
    /// As [`ErrorScore::score`].
    fn scores(&self, predictions: &Predictions) -> Result<Vec<f64>>;
}

/// Plain scores of the distribution, which need no training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Measure {
    /// The log-odds of another token, `ln((1 - P(chosen)) / P(chosen))`; of greedy choices P(chosen) is the largest
    /// probability.
    Probability,
    /// The entropy of the distribution.
    Entropy,
    /// `- (P(chosen) - max P(others))`.
    Margin,
}

impl Measure {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Probability, Self::Entropy, Self::Margin];

    /// The score of a choice.
    pub fn of(self, statistics: &TokenStatistics) -> f64 {
        match self {
            Self::Probability => -log_odds(statistics.probability),
            Self::Entropy => statistics.entropy,
            Self::Margin => -statistics.margin,
        }
    }
}

impl ErrorScore for Measure {
    fn score(&self, token: &TokenView<'_>) -> Result<f64> {
        Ok(self.of(&token.statistics))
    }

    fn scores(&self, predictions: &Predictions) -> Result<Vec<f64>> {
        Ok(predictions.statistics().iter().map(|statistics| self.of(statistics)).collect())
    }
}

impl ErrorScore for ErrorHead {
    fn score(&self, token: &TokenView<'_>) -> Result<f64> {
        Ok(self.assess_token(token)?.score)
    }

    fn scores(&self, predictions: &Predictions) -> Result<Vec<f64>> {
        Ok(self.assess_all(predictions)?.into_iter().map(|assessment| assessment.score).collect())
    }
}

impl<S: ErrorScore + ?Sized> ErrorScore for &S {
    fn score(&self, token: &TokenView<'_>) -> Result<f64> {
        (**self).score(token)
    }

    fn scores(&self, predictions: &Predictions) -> Result<Vec<f64>> {
        (**self).scores(predictions)
    }
}

/// A calibrated probability of an error: what a [`Regulator`](super::Regulator) acts on.
pub trait Confidence {
    /// The probability that a choice is wrong.
    ///
    /// # Errors
    /// As [`ErrorScore::score`].
    fn p_wrong(&self, token: &TokenView<'_>) -> Result<f64>;

    /// The probability that an answer is wrong whose tokens have these probabilities.
    fn p_answer_wrong(&self, tokens: &[f64]) -> f64;
}

/// A score and its calibrations.
///
/// # Examples
/// ```
/// use vesper_model::metacognition::{Calibrated, Confidence, Measure, TokenStatistics, TokenView};
///
/// // The log-odds of 1 - P(chosen), uncalibrated: the probability that the model gives to all other tokens.
/// let confidence = Calibrated::new(Measure::Probability);
/// let statistics = TokenStatistics::greedy(&[3f32.ln(), 0.0])?;
/// let p = confidence.p_wrong(&TokenView { statistics, hidden: None })?;
/// assert!((p - 0.25).abs() < 1e-6);
/// assert!((confidence.p_answer_wrong(&[p, p]) - (1.0 - 0.75f64.powi(2))).abs() < 1e-6);
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Calibrated<S> {
    /// The score.
    pub score: S,
    /// From the score of a token to a probability.
    pub calibration: Calibration,
    /// From the probabilities of tokens to that of an answer.
    pub answer: AnswerCalibration,
}

impl<S: ErrorScore> Calibrated<S> {
    /// A score that is taken for log-odds, and tokens that are taken for independent.
    pub fn new(score: S) -> Self {
        Self { score, calibration: Calibration::default(), answer: AnswerCalibration::default() }
    }

    /// A score that is calibrated on predictions.
    ///
    /// # Errors
    /// [`ModelError::InvalidPredictions`](crate::ModelError::InvalidPredictions) for none, and those of the score.
    pub fn fit(score: S, method: Method, predictions: &Predictions) -> Result<Self> {
        let calibration = Calibration::fit(method, &score.scores(predictions)?, &predictions.wrong())?;
        Ok(Self { score, calibration, answer: AnswerCalibration::default() })
    }

    /// Sets the calibration of answers.
    pub fn with_answer(mut self, answer: AnswerCalibration) -> Self {
        self.answer = answer;
        self
    }

    /// The probabilities that the predictions of a text are wrong.
    ///
    /// # Errors
    /// Those of the score.
    pub fn p_all_wrong(&self, predictions: &Predictions) -> Result<Vec<f64>> {
        let scores = self.score.scores(predictions)?;
        Ok(scores.into_iter().map(|score| self.calibration.apply(score)).collect())
    }
}

impl<S: ErrorScore> Confidence for Calibrated<S> {
    fn p_wrong(&self, token: &TokenView<'_>) -> Result<f64> {
        let p = self.calibration.apply(self.score.score(token)?);
        if p.is_nan() {
            return Err(invalid(format!("{:?} gives NaN for a choice", self.score)));
        }
        Ok(p)
    }

    fn p_answer_wrong(&self, tokens: &[f64]) -> f64 {
        self.answer.apply(tokens)
    }
}

impl ErrorHead {
    /// Calibrates the head's scores on predictions that did not train it.
    ///
    /// # Errors
    /// [`ModelError::InvalidPredictions`](crate::ModelError::InvalidPredictions) for none, and those of
    /// [`ErrorHead::assess`].
    pub fn calibrate(self, method: Method, predictions: &Predictions) -> Result<Self> {
        let calibration = Calibration::fit(method, &self.scores(predictions)?, &predictions.wrong())?;
        Ok(self.with_calibration(calibration))
    }

    /// The head with its own calibrations, as a [`Confidence`].
    pub fn confidence(&self) -> Calibrated<&Self> {
        Calibrated { score: self, calibration: self.calibration.clone(), answer: self.answer.clone() }
    }
}

//! The head: from features of a prediction to the probabilities of its kinds.

use candle_core::{DType, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::metrics::invalid;
use super::{
    AnswerCalibration, BaseModel, Calibration, ErrorKind, HeadConfig, Predictions, TokenStatistics, TokenView,
};
use crate::{ModelError, Result};

const HIDDEN: &str = "hidden";
const OUTPUT: &str = "output";

/// What an [`ErrorHead`] says of one prediction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Assessment {
    /// The log-odds of an error, before calibration.
    pub score: f64,
    /// The calibrated probability that it is wrong.
    pub p_wrong: f64,
    /// The probabilities of [`ErrorKind::ALL`]: no error has `1 - p_wrong`, the errors share the rest.
    pub kinds: [f64; 4],
}

/// A small network beside a frozen model that predicts the model's errors.
///
/// ```text
/// x = (features - shift) / scale                    (n, features), by the training predictions
/// y = W [silu(V x + c), x] + b                      (n, 4); with 0 units y = W x + b
/// score = y_0,   P(None) = 1 - sigmoid(score)       before calibration
/// P(kind | an error) = softmax(y_1, y_2, y_3)
/// p_wrong = calibration(score)
/// ```
///
/// Made by [`ErrorHead::new`], trained by [`HeadTraining::run`](super::HeadTraining::run), calibrated by
/// [`ErrorHead::calibrate`], stored by [`ErrorHead::save`].
///
/// # References
/// Kadavath et al. 2022, [arXiv:2207.05221](https://arxiv.org/abs/2207.05221), train such a head ("P(IK)") with the model;
/// here the model stays as it is.
#[derive(Debug)]
pub struct ErrorHead {
    pub(super) config: HeadConfig,
    pub(super) base: BaseModel,
    /// (1, features) each
    pub(super) shift: Tensor,
    pub(super) scale: Tensor,
    pub(super) layers: Vec<Layer>,
    pub(super) calibration: Calibration,
    pub(super) answer: AnswerCalibration,
}

/// x W^T + b
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) name: &'static str,
    pub(super) weight: Var,
    pub(super) bias: Var,
}

impl Layer {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        x.matmul(&self.weight.t()?)?.broadcast_add(&self.bias)
    }
}

impl ErrorHead {
    /// A new head for a model, with values that depend on the seed alone, and the scale of the features of `predictions`, on
    /// whose device it is.
    ///
    /// # Errors
    /// [`ModelError::InvalidMetacognition`] for a setting out of range, or predictions that were collected for other choices
    /// or kinds; [`ModelError::InvalidPredictions`] for none.
    pub fn new(base: &BaseModel, config: &HeadConfig, predictions: &Predictions, seed: u64) -> Result<Self> {
        config.validate()?;
        let collected = predictions.config();
        if (collected.kinds, collected.choice) != (config.kinds, config.choice) {
            return Err(ModelError::InvalidMetacognition {
                field: "kinds and choice",
                got: format!("{:?} and {:?}", config.kinds, config.choice),
                expected: "those that the predictions were collected with",
            });
        }
        let hidden = predictions.hidden()?;
        let device = hidden.device().clone();
        check_width(&hidden, base)?;
        let features = config.features.of(Some(&hidden), predictions.statistics(), &device)?;
        let shift = features.mean_keepdim(0)?;
        let deviation = features.broadcast_sub(&shift)?.sqr()?.mean_keepdim(0)?.sqrt()?;
        // A feature that never changes says nothing, and must not be divided by zero.
        let scale = deviation.maximum(1e-4)?;

        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let layers = sizes(config, base)
            .into_iter()
            .map(|(name, input, output)| {
                let bound = 1.0 / (input as f64).sqrt();
                let mut draw = |n: usize| -> Vec<f32> {
                    (0..n).map(|_| (bound * (2.0 * random.random::<f64>() - 1.0)) as f32).collect()
                };
                let weight = Tensor::from_vec(draw(output * input), (output, input), &device)?;
                let bias = Tensor::from_vec(draw(output), output, &device)?;
                Ok(Layer { name, weight: Var::from_tensor(&weight)?, bias: Var::from_tensor(&bias)? })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            config: *config,
            base: base.clone(),
            shift,
            scale,
            layers,
            calibration: Calibration::default(),
            answer: AnswerCalibration::default(),
        })
    }

    /// Its shape, and what it is trained to say.
    pub fn config(&self) -> &HeadConfig {
        &self.config
    }

    /// The model that it is for.
    pub fn base(&self) -> &BaseModel {
        &self.base
    }

    /// What is trained, by name.
    pub fn parameters(&self) -> Vec<(String, Var)> {
        let both = |layer: &Layer| {
            [
                (format!("{}.weight", layer.name), layer.weight.clone()),
                (format!("{}.bias", layer.name), layer.bias.clone()),
            ]
        };
        self.layers.iter().flat_map(both).collect()
    }

    /// The calibration of a token's score.
    pub fn calibration(&self) -> &Calibration {
        &self.calibration
    }

    /// The calibration of answers.
    pub fn answer(&self) -> &AnswerCalibration {
        &self.answer
    }

    /// Sets the calibration of a token's score; by default the score is taken for the log-odds that it is trained to be.
    pub fn with_calibration(mut self, calibration: Calibration) -> Self {
        self.calibration = calibration;
        self
    }

    /// Sets the calibration of answers; by default the tokens count as independent.
    pub fn with_answer(mut self, answer: AnswerCalibration) -> Self {
        self.answer = answer;
        self
    }

    /// The features of predictions, (n, features), as the first layer takes them.
    pub(super) fn features(&self, hidden: Option<&Tensor>, statistics: &[TokenStatistics]) -> Result<Tensor> {
        if let Some(hidden) = hidden {
            check_width(hidden, &self.base)?;
        }
        let features = self.config.features.of(hidden, statistics, self.shift.device())?;
        Ok(features.broadcast_sub(&self.shift)?.broadcast_div(&self.scale)?)
    }

    /// y, (n, 4), with gradients to the parameters.
    pub(super) fn forward(&self, features: &Tensor) -> Result<Tensor> {
        let mut x = features.clone();
        for layer in &self.layers {
            x = match layer.name {
                HIDDEN => Tensor::cat(&[&layer.forward(&x)?.silu()?, &x], 1)?,
                _ => layer.forward(&x)?,
            };
        }
        Ok(x)
    }

    /// Assesses predictions.
    ///
    /// ```text
    /// hidden: (n, hidden), any float dtype; not needed by a head over statistics    statistics: n    result: n
    /// ```
    ///
    /// # Errors
    /// [`ModelError::InvalidPredictions`] for hidden states that are missing, of another width, NaN or infinite.
    pub fn assess(&self, hidden: Option<&Tensor>, statistics: &[TokenStatistics]) -> Result<Vec<Assessment>> {
        if statistics.is_empty() {
            return Ok(Vec::new());
        }
        let features = self.features(hidden, statistics)?;
        if features.dim(0)? != statistics.len() {
            return Err(invalid(format!(
                "{} hidden states for {} choices",
                features.dim(0)?,
                statistics.len()
            )));
        }
        let outputs = self.forward(&features)?.detach().to_dtype(DType::F64)?.to_vec2::<f64>()?;
        outputs.iter().map(|row| self.assessment(row)).collect()
    }

    /// Assesses all predictions of a text.
    ///
    /// # Errors
    /// As [`ErrorHead::assess`].
    pub fn assess_all(&self, predictions: &Predictions) -> Result<Vec<Assessment>> {
        self.assess(Some(&predictions.hidden()?), predictions.statistics())
    }

    fn assessment(&self, outputs: &[f64]) -> Result<Assessment> {
        let [score, errors @ ..] = outputs else { return Err(invalid("the head has no outputs")) };
        let max = errors.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = errors.iter().map(|logit| (logit - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        if !(score.is_finite() && total.is_finite()) {
            return Err(invalid("the head's output is NaN or infinite: its weights or the features are"));
        }
        let p_wrong = self.calibration.apply(*score);
        let mut kinds = [1.0 - p_wrong, 0.0, 0.0, 0.0];
        for (kind, weight) in kinds.iter_mut().skip(1).zip(&weights) {
            *kind = p_wrong * weight / total;
        }
        Ok(Assessment { score: *score, p_wrong, kinds })
    }

    /// Assesses one choice, as it is made.
    ///
    /// # Errors
    /// As [`ErrorHead::assess`].
    pub fn assess_token(&self, token: &TokenView<'_>) -> Result<Assessment> {
        let hidden = token.hidden.map(|hidden| hidden.flatten_all()?.unsqueeze(0)).transpose()?;
        let all = self.assess(hidden.as_ref(), &[token.statistics])?;
        all.first().copied().ok_or_else(|| invalid("no assessment"))
    }
}

/// name, input and output of each layer
pub(super) fn sizes(config: &HeadConfig, base: &BaseModel) -> Vec<(&'static str, usize, usize)> {
    let (features, kinds) = (config.features.size(base.hidden_size), ErrorKind::ALL.len());
    match config.units {
        0 => vec![(OUTPUT, features, kinds)],
        units => vec![(HIDDEN, features, units), (OUTPUT, units + features, kinds)],
    }
}

fn check_width(hidden: &Tensor, base: &BaseModel) -> Result<()> {
    match hidden.dims() {
        [_, width] if *width == base.hidden_size => Ok(()),
        other => Err(invalid(format!(
            "hidden states of shape {other:?}, expected (n, {}) as the head's model has them",
            base.hidden_size
        ))),
    }
}

//! Training a head on what a model predicted.

use candle_core::{D, Tensor};
use candle_nn::Optimizer;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::metrics::invalid;
use super::{ErrorHead, Predictions};
use crate::{ModelError, Result};

/// How long a head is trained.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::VarMap;
/// use velvet_optim::{Velvet, VelvetConfig};
/// use vesper_model::metacognition::{BaseModel, Calibration, ErrorHead, HeadConfig, HeadTraining, Method, Predictions};
/// use vesper_model::{VesperConfig, VesperLM};
///
/// // Any model and any text; both should be held out from what the model was trained on.
/// let config = VesperConfig::preset("nano")?.with_vocab(64);
/// let model = VesperLM::initialize(&config, &VarMap::new(), 0, DType::F32, &Device::Cpu)?;
/// let rows = |start: u32| Tensor::from_vec((0..18).map(|i| (start + i * i) % 64).collect(), (2, 9), &Device::Cpu);
///
/// let settings = HeadConfig::default().with_units(8);
/// let mut collect = |start| -> vesper_model::Result<Predictions> {
///     let (mut predictions, rows) = (Predictions::new(&settings)?, rows(start)?);
///     predictions.add(&model, &rows.narrow(1, 0, 8)?, &rows.narrow(1, 1, 8)?)?;
///     Ok(predictions)
/// };
/// let (training, held_out) = (collect(0)?, collect(1)?);
///
/// let head = ErrorHead::new(&BaseModel::of(&model)?, &settings, &training, 42)?;
/// let mut optimizer = Velvet::named(head.parameters(), VelvetConfig { lr: 1e-2, ..Default::default() })?;
/// let trained = HeadTraining::default().run(&head, &training, &mut optimizer)?;
/// assert!(trained.losses.last() < trained.losses.first());
///
/// let head = head.calibrate(Method::Platt, &held_out)?;
/// let folder = tempfile::tempdir()?;
/// head.save(folder.path())?;
/// let head = ErrorHead::load_for(folder.path(), &model)?;
/// assert!(head.assess_all(&held_out)?.iter().all(|a| (0.0..=1.0).contains(&a.p_wrong)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadTraining {
    /// How often each prediction is seen. At least 1. Default 4.
    pub epochs: usize,
    /// Predictions a step. At least 1. Default 256.
    pub batch: usize,
    /// Of their order. Default 0.
    pub seed: u64,
}

impl Default for HeadTraining {
    fn default() -> Self {
        Self { epochs: 4, batch: 256, seed: 0 }
    }
}

/// What came of the training of a head.
#[derive(Debug, Clone, PartialEq)]
pub struct Trained {
    /// The mean loss in each epoch, in nats: the cross-entropy of the kinds.
    pub losses: Vec<f64>,
    /// Steps of the optimizer.
    pub steps: usize,
}

impl HeadTraining {
    /// Trains a head with an optimizer of its [`parameters`](ErrorHead::parameters), whose learning rate falls linearly to
    /// 0. The model is not needed any more, and not changed.
    ///
    /// ```text
    /// loss = - mean of  ln(1 - sigmoid(y_0))                                   where there is no error
    ///                   ln sigmoid(y_0) + ln softmax(y_1, y_2, y_3)[kind]      else
    /// ```
    ///
    /// # Errors
    /// [`ModelError::InvalidMetacognition`] for 0 epochs or predictions a step; [`ModelError::InvalidPredictions`] for none, or
    /// a loss that is no number.
    pub fn run(
        &self,
        head: &ErrorHead,
        predictions: &Predictions,
        optimizer: &mut impl Optimizer,
    ) -> Result<Trained> {
        for (field, value) in [("epochs", self.epochs), ("batch", self.batch)] {
            if value == 0 {
                return Err(ModelError::InvalidMetacognition {
                    field,
                    got: "0".into(),
                    expected: "at least 1",
                });
            }
        }
        let features = head.features(Some(&predictions.hidden()?), predictions.statistics())?;
        let device = features.device().clone();
        let kinds: Vec<u32> = predictions.kinds().iter().map(|kind| kind.index() as u32).collect();
        let kinds = Tensor::new(kinds, &device)?;

        let n = predictions.len();
        let total = self.epochs * n.div_ceil(self.batch);
        let lr = optimizer.learning_rate();
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        let mut order: Vec<u32> = (0..n as u32).collect();
        let (mut losses, mut step) = (Vec::new(), 0);
        for _ in 0..self.epochs {
            order.shuffle(&mut random);
            let mut sum = 0.0;
            for rows in order.chunks(self.batch) {
                let chosen = Tensor::new(rows, &device)?;
                let outputs = head.forward(&features.index_select(&chosen, 0)?)?; // (rows, 4)
                let loss = loss(&outputs, &kinds.index_select(&chosen, 0)?)?;
                let value = f64::from(loss.to_scalar::<f32>()?);
                if !value.is_finite() {
                    return Err(invalid(format!(
                        "the head's loss is {value} at step {step}; try a lower learning rate"
                    )));
                }
                sum += value * rows.len() as f64;
                optimizer.set_learning_rate(lr * (1.0 - step as f64 / total as f64));
                optimizer.backward_step(&loss)?;
                step += 1;
            }
            losses.push(sum / n as f64);
        }
        optimizer.set_learning_rate(lr);
        Ok(Trained { losses, steps: step })
    }
}

/// outputs: (rows, 4); kinds: (rows), u32, 0 for no error
fn loss(outputs: &Tensor, kinds: &Tensor) -> Result<Tensor> {
    let wrong = kinds.ne(0_u32)?.to_dtype(outputs.dtype())?; // (rows)
    let score = outputs.narrow(1, 0, 1)?.squeeze(1)?;
    // - ln sigmoid(y) = softplus(y) - y,  - ln(1 - sigmoid(y)) = softplus(y) = max(y, 0) + ln(1 + exp(-|y|))
    let softplus = (score.relu()? + (score.abs()?.neg()?.exp()? + 1.0)?.log()?)?;
    let binary = (softplus - (&score * &wrong)?)?;
    let log_p = candle_nn::ops::log_softmax(&outputs.narrow(1, 1, 3)?, D::Minus1)?;
    // Kind 1 is the first of the errors; where there is none, what is gathered counts nothing.
    let error = kinds.maximum(1_u32)?.broadcast_sub(&Tensor::new(1_u32, kinds.device())?)?.unsqueeze(1)?;
    let kind = (log_p.gather(&error, 1)?.squeeze(1)? * wrong)?;
    Ok((binary - kind)?.mean_all()?)
}

//! What a model predicts on text that it was not trained on, and whether it was right.

use candle_core::{DType, Tensor};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::metrics::invalid;
use super::{ErrorKind, HeadConfig, TokenStatistics};
use crate::generate::{GenerationConfig, Sampler};
use crate::{ModelError, Result, VesperLM};

/// Which token of the model is judged.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Choice {
    /// The likeliest.
    #[default]
    Greedy,
    /// One that is drawn from the whole distribution.
    Drawn {
        /// Divides the logits before the draw; over 0.
        temperature: f64,
        /// Of the draws.
        seed: u64,
    },
}

impl Choice {
    pub(super) fn validate(self) -> Result<()> {
        match self {
            Self::Drawn { temperature, .. } if !(temperature.is_finite() && temperature > 0.0) => {
                let (got, expected) = (temperature.to_string(), "a positive number");
                Err(ModelError::InvalidMetacognition { field: "choice.temperature", got, expected })
            }
            Self::Drawn { .. } | Self::Greedy => Ok(()),
        }
    }
}

/// Predictions of a frozen model: for every token of a text its hidden state, its choice and what came of it.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::VarMap;
/// use vesper_model::metacognition::{HeadConfig, Predictions};
/// use vesper_model::{VesperConfig, VesperLM};
///
/// let config = VesperConfig::preset("nano")?.with_vocab(64);
/// let model = VesperLM::initialize(&config, &VarMap::new(), 0, DType::F32, &Device::Cpu)?;
/// let mut predictions = Predictions::new(&HeadConfig::default())?;
/// let rows = Tensor::new(&[[1u32, 2, 3, 4], [4, 3, 2, 1]], &Device::Cpu)?;
/// predictions.add(&model, &rows.narrow(1, 0, 3)?, &rows.narrow(1, 1, 3)?)?; // (batch, t), shifted by one
/// assert_eq!((predictions.len(), predictions.wrong().len()), (6, 6));
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
#[derive(Debug)]
pub struct Predictions {
    config: HeadConfig,
    /// None for greedy choices.
    sampler: Option<Sampler>,
    /// (rows, hidden) each
    hidden: Vec<Tensor>,
    statistics: Vec<TokenStatistics>,
    kinds: Vec<ErrorKind>,
}

impl Predictions {
    /// None yet; `config` says which choices are judged, and what kinds of errors there are.
    ///
    /// # Errors
    /// [`ModelError::InvalidMetacognition`] as [`HeadConfig::validate`] has it.
    pub fn new(config: &HeadConfig) -> Result<Self> {
        config.validate()?;
        let sampler = match config.choice {
            Choice::Greedy => None,
            Choice::Drawn { temperature, seed } => {
                let settings = GenerationConfig::default().with_temperature(temperature).with_seed(seed);
                Some(Sampler::new(&settings.with_top_k(0).with_top_p(1.0))?)
            }
        };
        Ok(Self { config: *config, sampler, hidden: Vec::new(), statistics: Vec::new(), kinds: Vec::new() })
    }

    /// Adds the model's predictions on some rows.
    ///
    /// ```text
    /// ids, targets: (batch, t), u32
    /// ```
    ///
    /// Targets of `u32::MAX` do not count. The model gets no gradients.
    ///
    /// # Errors
    /// Those of [`VesperLM::forward`]; [`ModelError::InvalidLogits`] and [`ModelError::InvalidPredictions`] for NaN in what
    /// the model computes; [`ModelError::TokenOutOfRange`] for a target that is not in its vocabulary. Nothing is added
    /// then.
    pub fn add(&mut self, model: &VesperLM, ids: &Tensor, targets: &Tensor) -> Result<()> {
        let model = model.detach();
        let hidden = model.hidden_states(ids)?.flatten_to(1)?.contiguous()?; // (batch * t, hidden)
        let targets = targets.flatten_all()?.to_vec1::<u32>()?;
        if targets.len() != hidden.dim(0)? {
            return Err(invalid(format!("{} targets for {} ids", targets.len(), hidden.dim(0)?)));
        }
        if !all_finite(&hidden)? {
            return Err(invalid("a hidden state is NaN or infinite (has training diverged?)"));
        }
        let counted: Vec<u32> =
            targets.iter().zip(0..).filter(|(target, _)| **target != u32::MAX).map(|(_, row)| row).collect();
        if counted.is_empty() {
            return Ok(());
        }
        let hidden = hidden.index_select(&Tensor::new(counted.as_slice(), hidden.device())?, 0)?;
        let logits = model.logits(&hidden)?.to_dtype(DType::F32)?;
        let vocab = logits.dim(1)?;
        let logits = logits.flatten_all()?.to_vec1::<f32>()?;
        let targets: Vec<u32> = targets.into_iter().filter(|target| *target != u32::MAX).collect();

        let drawn: Option<Vec<u32>> = match &mut self.sampler {
            None => None,
            Some(sampler) => Some(
                logits
                    .chunks_exact(vocab)
                    .map(|row| sampler.sample(&mut row.to_vec(), &[]))
                    .collect::<Result<_>>()?,
            ),
        };
        let judged = logits
            .par_chunks_exact(vocab)
            .zip(targets.par_iter())
            .enumerate()
            .map(|(i, (row, target))| {
                let statistics = match drawn.as_ref().and_then(|drawn| drawn.get(i)) {
                    Some(chosen) => TokenStatistics::of(row, *chosen)?,
                    None => TokenStatistics::greedy(row)?,
                };
                Ok((statistics, self.config.kinds.kind(row, &statistics, *target)?))
            })
            .collect::<Result<Vec<_>>>()?;
        self.hidden.push(hidden.to_dtype(DType::F32)?);
        for (statistics, kind) in judged {
            self.statistics.push(statistics);
            self.kinds.push(kind);
        }
        Ok(())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.kinds.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }

    /// What the model chose, and from which distribution.
    pub fn statistics(&self) -> &[TokenStatistics] {
        &self.statistics
    }

    /// What came of it.
    pub fn kinds(&self) -> &[ErrorKind] {
        &self.kinds
    }

    /// Whether it was wrong.
    pub fn wrong(&self) -> Vec<bool> {
        self.kinds.iter().map(|kind| kind.is_wrong()).collect()
    }

    /// The hidden states, (n, hidden), in f32.
    ///
    /// # Errors
    /// [`ModelError::InvalidPredictions`] where there are none.
    pub fn hidden(&self) -> Result<Tensor> {
        if self.is_empty() {
            return Err(invalid("there are no predictions: the split is empty"));
        }
        Ok(Tensor::cat(&self.hidden, 0)?)
    }

    /// What they were collected for.
    pub fn config(&self) -> &HeadConfig {
        &self.config
    }
}

/// Whether no element is NaN or infinite.
pub(super) fn all_finite(x: &Tensor) -> Result<bool> {
    // 0 times anything else is 0.
    let zero = x.to_dtype(DType::F32)?.affine(0.0, 0.0)?.sum_all()?.to_scalar::<f32>()?;
    Ok(zero == 0.0)
}

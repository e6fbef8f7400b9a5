//! What an error head sees of a prediction.

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::calibration::log_odds;
use super::metrics::invalid;
use super::{TokenStatistics, predictions::all_finite};
use crate::Result;

/// What an error head sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Features {
    /// The hidden state after the last norm, which the output layer scores.
    Hidden,
    /// The log-odds and the probability of the choice, the largest probability, the entropy and the margin.
    Statistics,
    /// Both.
    #[default]
    Both,
}

const STATISTICS: usize = 5;

impl Features {
    /// How many numbers they are, for a model of this hidden size.
    pub fn size(self, hidden: usize) -> usize {
        match self {
            Self::Hidden => hidden,
            Self::Statistics => STATISTICS,
            Self::Both => hidden + STATISTICS,
        }
    }

    /// hidden: (n, hidden), of any float dtype and device; statistics: n; result: (n, size), f32 on the device
    pub(super) fn of(
        self,
        hidden: Option<&Tensor>,
        statistics: &[TokenStatistics],
        device: &Device,
    ) -> Result<Tensor> {
        let n = statistics.len();
        let numbers = || -> Result<Tensor> {
            let row = |s: &TokenStatistics| {
                [log_odds(s.probability), s.probability, s.largest, s.entropy, s.margin].map(|v| v as f32)
            };
            let numbers: Vec<f32> = statistics.iter().flat_map(row).collect();
            Ok(Tensor::from_vec(numbers, (n, STATISTICS), device)?)
        };
        let states = || -> Result<Tensor> {
            let Some(hidden) = hidden else {
                return Err(invalid(
                    "there is no hidden state, and the head is made for one: run the model first",
                ));
            };
            let hidden = hidden.detach().to_dtype(DType::F32)?.to_device(device)?;
            if !all_finite(&hidden)? {
                return Err(invalid("a hidden state is NaN or infinite (has training diverged?)"));
            }
            Ok(hidden)
        };
        match self {
            Self::Hidden => states(),
            Self::Statistics => numbers(),
            Self::Both => Ok(Tensor::cat(&[states()?, numbers()?], 1)?),
        }
    }
}

//! The back end of devices that a build has none for: it never has an optimizer.

use super::Snapshot;
use crate::config::VelvetConfig;
use crate::error::Result;
use crate::parameter::Parameter;
use candle_core::Tensor;

/// As in the CUDA back end.
pub(crate) struct Failure {
    pub(crate) step: u64,
    pub(crate) norm: f64,
    pub(crate) positions: Vec<usize>,
}

/// No optimizer.
pub(crate) enum Resident {}

impl Resident {
    #[allow(clippy::unnecessary_wraps, reason = "as the back end that it stands for")]
    pub(crate) fn new(_: &[Parameter], _: &VelvetConfig) -> Result<Option<Self>> {
        Ok(None)
    }

    pub(crate) fn push(&mut self, _: &[Parameter], _: f64, _: &Snapshot) -> Result<()> {
        match *self {}
    }

    pub(crate) fn snapshot(&self) -> Result<Snapshot> {
        match *self {}
    }

    pub(crate) fn failure(&self, _: bool) -> Result<Option<Failure>> {
        match *self {}
    }

    pub(crate) fn invalidate(&mut self) {
        match *self {}
    }

    pub(crate) fn has_observed(&self) -> bool {
        match *self {}
    }

    pub(crate) fn holds(&self, _: &Tensor) -> bool {
        match *self {}
    }

    pub(crate) fn observe(&mut self, _: &VelvetConfig, _: &Tensor, _: Option<&Tensor>) -> Result<()> {
        match *self {}
    }

    pub(crate) fn observe_values(&mut self, _: &VelvetConfig, _: f64, _: Option<f64>) -> Result<()> {
        match *self {}
    }

    pub(crate) fn set_learning_rate(&mut self, _: f64) -> Result<()> {
        match *self {}
    }

    pub(crate) fn step(&mut self, _: &[Parameter], _: &VelvetConfig, _: &[(usize, Tensor)]) -> Result<()> {
        match *self {}
    }
}

//! The adaptive parts: what the observed loss and the last step change in an update.
//!
//! Each part is a choice in [`VelvetConfig`] (an enum with `Off`) and a small pure state:
//! it is fed one number at a time, and answers with one number. None touches a tensor.
//!
//! | part | needs | changes |
//! |---|---|---|
//! | [`EntropyLr`] | the loss (or the entropy) | the learning rate, at the start |
//! | [`PerplexityMomentum`] | the loss | the momenta |
//! | [`Brake`] | loss and entropy | the learning rate |
//! | [`PolyakCap`] | the loss, and the measured update | the learning rate |
//! | [`TrustRegion`] | the measured update | each parameter's learning rate |

mod brake;
mod ema;
mod entropy_lr;
mod perplexity_momentum;
mod polyak;
mod trust;

pub use brake::{Brake, BrakeState};
pub use ema::Ema;
pub use entropy_lr::{EntropyLr, ProgressSignal, WarmUpState};
pub use perplexity_momentum::{PerplexityMomentum, ProgressState};
pub use polyak::{PolyakCap, PolyakState};
pub use trust::TrustRegion;

use crate::config::VelvetConfig;
use crate::error::Result;

/// The states of all parts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Adaptive {
    pub(crate) warm_up: WarmUpState,
    pub(crate) momentum: ProgressState,
    pub(crate) brake: BrakeState,
    pub(crate) polyak: PolyakState,
}

/// The averages of all parts, for a checkpoint: warm-up, momentum, brake, loss and rate of the Polyak cap.
pub(crate) type Averages = [Option<f64>; 5];

impl Adaptive {
    pub(crate) fn new(config: &VelvetConfig, [warm_up, momentum, gap, loss, rate]: Averages) -> Self {
        Self {
            warm_up: WarmUpState::with_average(config.entropy_lr, warm_up),
            momentum: ProgressState::with_average(config.perplexity_momentum, momentum),
            brake: BrakeState::with_average(config.brake, gap),
            polyak: PolyakState::with_averages(config.polyak, [loss, rate]),
        }
    }

    pub(crate) fn averages(&self) -> Averages {
        let [loss, rate] = self.polyak.averages();
        [self.warm_up.average(), self.momentum.average(), self.brake.average(), loss, rate]
    }

    pub(crate) fn observe(&mut self, loss: f64, entropy: Option<f64>) {
        self.warm_up.observe(loss, entropy);
        self.momentum.observe(loss);
        if let Some(entropy) = entropy {
            self.brake.observe(loss, entropy);
        }
        self.polyak.observe(loss);
    }

    /// The learning rate of the next step.
    pub(crate) fn lr(&self, base: f64) -> f64 {
        self.polyak.cap(base * self.warm_up.value() * self.brake.value())
    }
}

pub(crate) fn validate(config: &VelvetConfig) -> Result<()> {
    config.entropy_lr.validate()?;
    config.perplexity_momentum.validate()?;
    config.brake.validate()?;
    config.polyak.validate()?;
    config.trust_region.validate()
}

//! What a model knows about its own errors, and what decoding makes of that.
//!
//! An [`ErrorHead`] is a small network over the hidden states of a frozen model. For every token it says how probable it is
//! that the model's choice is wrong, and what kind of error it is ([`ErrorKind`], with a class for no error):
//!
//! ```text
//! held-out text -> Predictions -> HeadTraining -> ErrorHead -> calibrate, on other held-out text -> P(wrong)
//! ```
//!
//! Plain measures of the distribution ([`Measure`]: the probability of the choice, the entropy, the margin) give a score
//! for the same thing without any training, and are calibrated in the same way, so that they can be compared
//! ([`metrics`]). Whatever gives such a probability is a [`Confidence`], and a [`Regulator`] watches it while an answer is
//! decoded ([`Regulation`]): it lowers the temperature, asks for another draft, or abstains.
//!
//! # References
//! Guo et al. 2017, [arXiv:1706.04599](https://arxiv.org/abs/1706.04599) (calibration); Kadavath et al. 2022,
//! [arXiv:2207.05221](https://arxiv.org/abs/2207.05221) (a head that says whether the model knows); El-Yaniv and Wiener
//! 2010 (abstaining: selective prediction); Nelson and Narens 1990 (monitoring and control).

mod answer;
mod calibration;
mod confidence;
mod config;
mod driver;
mod features;
mod file;
mod fingerprint;
mod head;
mod kind;
pub mod metrics;
mod predictions;
mod regulator;
mod statistics;
mod training;

pub use answer::{Aggregate, AnswerCalibration};
pub use calibration::{Calibration, Method};
pub use confidence::{Calibrated, Confidence, ErrorScore, Measure, TokenView};
pub use config::{BaseModel, HeadConfig};
pub use driver::{Draft, Introspective, Regulated, Regulation, Token};
pub use features::Features;
pub use fingerprint::fingerprint;
pub use head::{Assessment, ErrorHead};
pub use kind::{ErrorKind, KindRule};
pub use predictions::{Choice, Predictions};
pub use regulator::{Action, Event, Regulator, RegulatorConfig, State, Verdict};
pub use statistics::TokenStatistics;
pub use training::{HeadTraining, Trained};

#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

pub mod adaptive;
mod backend;
mod checkpoint;
mod config;
mod error;
mod options;
mod parameter;
mod preset;
mod rule;
mod stats;
mod step;
mod velvet;

pub use adaptive::{EntropyLr, PerplexityMomentum};
pub use config::VelvetConfig;
pub use error::{Error, Result};
pub use options::{BackendChoice, GradClip, MissingGradients, NonFinite, WeightDecayOn};
pub use stats::Stats;
pub use velvet::Velvet;

// candle is part of this crate's interface: these are the versions it was built with.
pub use candle_core;
pub use candle_nn;
pub use candle_nn::Optimizer;

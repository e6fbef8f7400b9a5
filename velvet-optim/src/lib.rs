#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod accumulate;
pub mod adaptive;
mod average;
mod backend;
mod checkpoint;
mod config;
mod error;
mod group;
mod options;
mod parameter;
mod preset;
mod quantised;
mod resident;
mod rounding;
mod rule;
mod schedule;
mod state;
mod stats;
mod step;
mod velvet;

pub use accumulate::Accumulator;
pub use adaptive::{Brake, EntropyLr, PerplexityMomentum, PolyakCap, ProgressSignal, TrustRegion};
pub use average::{Averaging, Swapped, WeightAverage};
pub use config::VelvetConfig;
pub use error::{Error, Result};
pub use group::{ParamGroup, Training};
pub use options::{
    BackendChoice, CautiousUpdate, DecayMode, GradClip, HalfParameters, MissingGradients, Momentum,
    NonFinite, SparseRows, StateFormat, UpdateNorms, WeightDecayOn,
};
pub use rule::{Lion, Orthogonal, RowMoment, Rule, Sgd, newton_schulz};
pub use schedule::{Curve, Schedule, Span};
pub use stats::Stats;
pub use velvet::Velvet;

// candle is part of this crate's interface: these are the versions it was built with.
pub use candle_core;
pub use candle_nn;
pub use candle_nn::Optimizer;

#![doc = include_str!("../README.md")]
#![deny(unsafe_op_in_unsafe_fn, clippy::undocumented_unsafe_blocks)]

pub mod chat;
pub mod config;
mod error;
pub mod generate;
pub mod hf;
pub mod metacognition;
mod model;
pub mod ops;
pub mod quantized;

pub use candle_core;
pub use candle_nn;
pub use config::{AdapterConfig, Projection, VesperConfig};
pub use error::{ModelError, Result};
pub use flylora;
pub use model::{Activations, BatchSession, DecodeStep, Parameter, Session, VesperLM, initialize, trainable};

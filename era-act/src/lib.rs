#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod activation;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod element;
mod era;
mod error;
pub mod floor;
mod layout;
mod learned;
mod names;
mod op;
mod pointwise;
mod real;
pub mod reference;

pub use activation::Activation;
pub use candle_core;
pub use era::Era;
pub use error::Error;
pub use learned::LearnedEra;

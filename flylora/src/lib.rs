#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod adapter;
mod config;
mod error;
pub mod files;
mod frozen;
mod init;
mod linear;

pub use adapter::{Adapter, LoraAdapter, Merge};
pub use candle_core;
pub use candle_nn;
pub use config::{LoraConfig, Scaling};
pub use error::{Error, Result};
pub use files::{load_adapters, save_adapters};
pub use frozen::FrozenLinear;
pub use linear::{AdapterLinear, LoraLinear};

#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

pub mod adapter;
mod audit;
mod combine;
mod config;
#[cfg(feature = "cuda")]
mod cuda;
mod dropout;
mod effective;
mod embedding;
mod error;
pub mod files;
mod frozen;
mod init;
mod linear;
mod merge;
mod multi;
mod place;
mod report;
mod sparse;
mod svd;
mod targets;

pub use adapter::{
    AdaLoraAdapter, AdaLoraConfig, Adapter, AdapterKind, DoraAdapter, FlyLoraAdapter, FlyLoraConfig,
    LoraAdapter, MaskSelection, MaskedLoraAdapter, MaskedLoraConfig, Merge, RankBudget, RankBudgetConfig,
    Routing, Step, penalty,
};
pub use audit::{Stage, audit, trace};
pub use candle_core;
pub use candle_nn;
pub use combine::{Combination, MajoritySign, Over, combine, combine_embeddings};
pub use config::{LoraConfig, LoraInit, Scaling};
pub use embedding::LoraEmbedding;
pub use error::{Error, Result};
pub use files::{load_adapters, save_adapters};
pub use frozen::FrozenLinear;
pub use linear::{AdapterLinear, AnyLinear, LoraLinear};
pub use multi::MultiLinear;
pub use place::Place;
pub use report::{AdapterReport, Baseline, BaselineReport, Counted, Counts, ParameterReport};
pub use targets::Targets;

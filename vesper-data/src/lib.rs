#![doc = include_str!("../README.md")]

pub mod batch;
pub mod cache;
pub mod corpus;
mod error;
pub mod french;
pub mod sizing;
pub mod source;
mod temporary;
pub mod tokenizer;
pub mod tokens;

pub use batch::{
    Batch, BatchSampler, EvalBatches, PackedBatch, PackedSampler, PackedState, Prefetch, SamplerConfig,
    SamplerState,
};
pub use cache::{BuildProgress, CacheBuilder, CacheKey, CacheStatus, TextCounts, TokenCache};
pub use error::{DataError, Place, Result};
pub use source::{Document, Documents, Mixture, ReadReport, ReadSettings, Sources};
pub use tokenizer::{Encoded, TextTokenizer, TrainConfig};
pub use tokens::Tokens;

/// The version of candle whose [`Tensor`](candle_core::Tensor) and [`Device`](candle_core::Device) this
/// crate's interface uses.
pub use candle_core;

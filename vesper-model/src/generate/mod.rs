//! Generation: choosing tokens, turning them into text as they come, and the loop around both.
//!
//! [`GenerationConfig`] holds the settings, [`Sampler`] chooses one token from a row of logits by a list of
//! [`LogitsProcessor`]s,
//! [`TokenStream`] turns ids into text piece by piece, and [`Generator`] runs a model that implements
//! [`NextLogits`] until something stops it.

mod batch;
mod config;
mod generator;
mod processor;
mod sampler;
mod stream;

pub use batch::BatchLogits;
pub use config::GenerationConfig;
pub(crate) use config::OneOrMany;
pub use generator::{Generator, NextLogits, Pieces, StopReason};
pub use processor::{
    BadWords, ForcedPrefix, FrequencyPenalty, History, LogitsProcessor, MinNewTokens, MinP, NoRepeatNgram,
    RepetitionPenalty, Temperature, TopK, TopP, Typical,
};
pub use sampler::Sampler;
pub use stream::{SpecialTokens, TokenStream};

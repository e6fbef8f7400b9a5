//! The adaptive parts: what the observed loss changes in an update.
//!
//! Each part is a choice in [`VelvetConfig`](crate::VelvetConfig) (an enum with `Off`) and a small pure state:
//! it is fed one loss at a time with `observe`, and answers with one number. Neither touches a tensor.

mod ema;
mod entropy_lr;
mod perplexity_momentum;

pub use ema::Ema;
pub use entropy_lr::{EntropyLr, WarmUpState};
pub use perplexity_momentum::{PerplexityMomentum, ProgressState};

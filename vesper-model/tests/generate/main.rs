//! Sampling, streaming and the generation loop.

#![allow(clippy::unwrap_used)] // helpers of tests

mod batch;
mod beam;
mod config;
mod events;
mod fake;
mod generator;
mod processors;
mod sampler;
mod stop;
mod stream;
mod vesper;

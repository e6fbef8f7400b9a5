//! Sampling, streaming and the generation loop.

#![allow(clippy::unwrap_used)] // helpers of tests

mod config;
mod generator;
mod processors;
mod sampler;
mod stream;

//! The CUDA kernels against the reference path in f64 on the CPU, and against candle's composition of ops in the same
//! dtype on the same device. Each test passes over itself, by name, where there is no CUDA device.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used)] // helpers of tests

mod attention;
mod captured;
mod common;
mod cross_entropy;
mod decode;
mod decoder;
mod drawn;
mod greedy;
mod layers;
mod model;
mod norms_and_terms;
mod quantized;

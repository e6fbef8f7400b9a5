//! Decoding with a cache against the whole model at once: one sequence and several, by the fused step and without it.

#![allow(clippy::unwrap_used)] // helpers of tests

mod batch;
mod common;
mod session;

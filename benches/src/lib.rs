//! Shared parts of the benchmarks, and the study of the optimizer.

pub mod record;
pub mod study;

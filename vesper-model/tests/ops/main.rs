//! The fused operations against their references and against finite differences.

#![allow(clippy::unwrap_used)] // helpers of tests

mod attention;
mod common;
mod cross_entropy;
mod embedding;
mod feed_forward;
mod linear;
mod rms_norm;
mod self_attention;

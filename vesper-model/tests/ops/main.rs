//! The fused operations against their references and against finite differences.

#![allow(clippy::unwrap_used)] // helpers of tests

mod attention;
mod backward;
mod captured;
mod checkpoint;
mod common;
mod cross_entropy;
mod decoder;
mod dropout;
mod embedding;
mod empty;
mod feed_forward;
mod layer_norm;
mod linear;
mod mixed;
mod residual;
mod rms_norm;
mod rope;
mod self_attention;
mod sizes;

//! The fused operations against their references and against finite differences.

mod attention;
mod common;
mod cross_entropy;
mod embedding;
mod linear;
mod rms_norm;

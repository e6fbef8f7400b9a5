//! A frozen sparse projection and a product with a few columns a row, without doing the work of the zeros.
//!
//! The ops run on the CPU in f32 and f64; elsewhere the same is computed densely in candle's own ops.

mod cpu;
mod layer;
mod matrix;
mod ops;

pub(crate) use cpu::top_k;
pub(crate) use layer::{Route, routed_layer};
pub(crate) use matrix::SparseMatrix;
pub(crate) use ops::{Selection, project, routed_product};

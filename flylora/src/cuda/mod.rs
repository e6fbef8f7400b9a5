//! The CUDA back end: launches of the kernels in the `.cu` files beside this one, on candle's own stream.
#![allow(unsafe_code, reason = "launches, and memory that a kernel is about to fill")]

mod dropout;
mod fly;
mod launch;
mod layer;
mod lora;
mod onto;
mod pair;
mod select;
mod skinny;
mod sweep;

use candle_core::{DType, Result, Tensor};

use crate::frozen::with_last;

pub(crate) use dropout::dropped;
pub(crate) use fly::{Routed, routed_layer, used};
pub(crate) use launch::aligned;
pub(crate) use lora::{
    alone, beside, both_back, both_layers, effective, gradients, has_kernels, norms, products_of_columns,
};
pub(crate) use select::largest;

/// What a layer gives for no rows on a CUDA device, where candle's own operations fail on nothing; else `None`.
pub(crate) fn nothing(x: &Tensor, outputs: usize) -> Result<Option<Tensor>> {
    let here = x.device().is_cuda() && matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16);
    if !here || x.elem_count() > 0 {
        return Ok(None);
    }
    launch::zeros(x.device(), with_last(x.shape(), outputs), x.dtype()).map(Some)
}

//! The frozen weight in GGUF blocks: forward is candle's quantised product, backward takes a few rows at a time.

use candle_core::quantized::QTensor;
use candle_core::{Device, Result, Tensor};

/// Bytes of dequantised weight that the backward pass holds at a time.
const CHUNK: usize = 1 << 20;

/// `dy W` for dy (m, out) in f32, W (out, in) in blocks: (m, in). Never holds more than a megabyte of `W`.
pub(super) fn product(dy: &Tensor, weight: &QTensor, device: &Device) -> Result<Tensor> {
    let (out_features, in_features) = weight.shape().dims2()?;
    let rows = (CHUNK / (4 * in_features)).clamp(1, out_features);
    let mut dx: Option<Tensor> = None;
    for start in (0..out_features).step_by(rows) {
        let len = rows.min(out_features - start);
        let ids = Tensor::arange(start as u32, (start + len) as u32, device)?;
        let part = weight.embedding(&ids)?; // (len, in)
        let part = dy.narrow(1, start, len)?.contiguous()?.matmul(&part)?;
        dx = Some(match dx {
            None => part,
            Some(dx) => (dx + part)?,
        });
    }
    match dx {
        Some(dx) => Ok(dx),
        None => Tensor::zeros((dy.dim(0)?, in_features), dy.dtype(), device),
    }
}

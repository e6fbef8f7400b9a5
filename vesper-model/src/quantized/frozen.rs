//! The layer that an adapter stands beside.

use candle_core::quantized::QMatMul;
use flylora::FrozenLinear;

use super::Weight;
use crate::Result;

/// The rows of a weight from `start` on, as a layer that is not trained.
pub(crate) fn frozen(weight: &Weight, start: usize, rows: usize) -> Result<FrozenLinear> {
    Ok(match weight {
        Weight::Plain(weight) => FrozenLinear::new(weight.narrow(0, start, rows)?, None)?,
        Weight::Blocks(blocks) => {
            FrozenLinear::quantized(QMatMul::QTensor(blocks.narrow(start, rows)?), None)?
        }
    })
}

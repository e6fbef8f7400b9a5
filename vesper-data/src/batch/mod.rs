//! Tokens as batches of inputs and targets: windows of the stream or packed documents, shuffled and resumable for
//! training, in order for evaluation.
//!
//! A target that does not count is [`IGNORE`](crate::tokens::IGNORE), in every kind of batch.

mod eval;
mod host;
mod order;
mod pack;
mod packed;
mod prefetch;
mod sampler;

use candle_core::Tensor;

use crate::error::{DataError, Result};

pub use eval::EvalBatches;
pub use host::{HostBatch, HostPackedBatch};
pub use order::ORDER;
pub(crate) use order::mix;
pub use pack::{BLOCK_DOCUMENTS, PACKING};
pub use packed::{PackedBatch, PackedSampler, PackedState};
pub use prefetch::{BatchSource, Prefetch};
pub use sampler::{BatchSampler, SamplerConfig, SamplerState};

/// Inputs and the tokens that follow them.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Token ids, `(batch, seq)`, u32.
    pub inputs: Tensor,
    /// The token after each input, `(batch, seq)`, u32: `targets[b][t] = inputs[b][t + 1]`, or
    /// [`IGNORE`](crate::tokens::IGNORE) where that token is no target of the loss.
    pub targets: Tensor,
    /// How many targets count: the weight of the batch's mean loss in a mean over several batches.
    pub counted: usize,
}

/// How many windows of `seq` inputs (and one target more) `tokens` tokens hold.
fn window_count(tokens: usize, seq: usize) -> Result<usize> {
    match tokens.saturating_sub(1).checked_div(seq) {
        None | Some(0) => Err(DataError::TooFewTokens {
            seq,
            needed: (seq as u64).saturating_add(1),
            tokens: tokens as u64,
        }),
        Some(windows) => Ok(windows),
    }
}

/// The most tokens a batch may have: candle's kernels count elements with 32 bits.
const MAX_BATCH_TOKENS: usize = u32::MAX as usize;

fn check_batch(batch: usize, seq: usize) -> Result<()> {
    let wrong = |name, got: usize, expected| Err(DataError::Config { name, got: got.to_string(), expected });
    if batch == 0 {
        return wrong("batch", batch, "at least 1");
    }
    if seq == 0 {
        return wrong("seq", seq, "at least 1");
    }
    match batch.checked_mul(seq) {
        Some(tokens) if tokens <= MAX_BATCH_TOKENS => Ok(()),
        _ => wrong("batch", batch, "batch * seq below 2^32"),
    }
}

/// Refuses a saved state that counts differently from this program.
fn check_names(names: &[(&'static str, &str, &'static str)]) -> Result<()> {
    for &(name, saved, now) in names {
        if saved != now {
            return Err(DataError::StateOrder { name, saved: saved.to_owned(), now });
        }
    }
    Ok(())
}

/// Refuses a saved state of other data.
fn check_numbers(numbers: &[(&'static str, u64, u64)]) -> Result<()> {
    for &(name, saved, now) in numbers {
        if saved != now {
            return Err(DataError::State { name, saved, now });
        }
    }
    Ok(())
}

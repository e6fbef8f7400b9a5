//! Windows of tokens as batches of inputs and targets: shuffled and resumable for training, in order for
//! evaluation.

mod eval;
mod order;
mod sampler;

use candle_core::{Device, Tensor};

use crate::error::{DataError, Result};
use crate::tokens::Tokens;

pub use eval::EvalBatches;
pub use sampler::{BatchSampler, SamplerConfig, SamplerState};

/// Inputs and the tokens that follow them.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Token ids, `(batch, seq)`, u32.
    pub inputs: Tensor,
    /// The token after each input, `(batch, seq)`, u32: `targets[b][t] = inputs[b][t + 1]`.
    pub targets: Tensor,
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

/// Puts windows `indices` side by side; window `i` covers tokens `i * seq ..= (i + 1) * seq`.
fn gather(tokens: &Tokens, seq: usize, indices: &[usize], device: &Device) -> Result<Batch> {
    let mut window = vec![0; seq + 1];
    let mut inputs: Vec<u32> = Vec::with_capacity(indices.len() * seq);
    let mut targets: Vec<u32> = Vec::with_capacity(indices.len() * seq);
    for &index in indices {
        tokens.read_into(index * seq, &mut window)?;
        inputs.extend(window.iter().take(seq));
        targets.extend(window.iter().skip(1));
    }
    let shape = (indices.len(), seq);
    Ok(Batch {
        inputs: Tensor::from_vec(inputs, shape, device)?,
        targets: Tensor::from_vec(targets, shape, device)?,
    })
}

//! The loss on held-out text.

use anyhow::Result;
use candle_core::Device;
use vesper_data::{EvalBatches, Tokens};
use vesper_model::VesperLM;

use crate::settings::Settings;

/// Mean loss, in nats a token, over the first windows of about `limit` tokens, always the same.
///
/// `model` is one without gradients ([`VesperLM::detach`]).
///
/// # Errors
/// A device that is out of memory.
pub fn held_out_loss(
    model: &VesperLM,
    tokens: &Tokens,
    settings: &Settings,
    device: &Device,
    limit: usize,
) -> Result<f64> {
    let windows = (limit / settings.seq).max(1);
    let batches = EvalBatches::new(tokens.clone(), settings.batch, settings.seq, device)?.limit(windows);
    let (mut sum, mut count) = (0.0, 0.0);
    for batch in batches {
        let batch = batch?;
        let n = batch.counted as f64; // the last batch may be smaller, and answers may be all that counts
        let loss = model.loss(&batch.inputs, &batch.targets)?.loss;
        sum += f64::from(loss.to_scalar::<f32>()?) * n;
        count += n;
    }
    Ok(sum / count)
}

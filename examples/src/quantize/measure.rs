//! Loss and speed of a model.

use std::time::Instant;

use anyhow::{Result, bail};
use candle_core::Device;
use serde::{Deserialize, Serialize};
use vesper_data::Tokens;
use vesper_model::VesperLM;
use vesper_model::generate::NextLogits;

use crate::evaluate::held_out_loss;
use crate::settings::Settings;

/// Tokens that are decoded one by one for the loss, and for the speed.
const DECODED: usize = 1024;
const TIMED: usize = 128;
/// How often a speed is measured; the best counts, for everything else on the machine only takes from it.
const ROUNDS: usize = 5;

/// What was measured of one model.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Measured {
    /// Mean loss on held-out text, read in windows, in nats a token.
    pub loss: f64,
    /// Its exponential.
    pub perplexity: f64,
    /// The perplexity where the model reads one token at a time, as it writes: on fewer tokens.
    pub perplexity_token_by_token: f64,
    /// Tokens a second in writing, one sequence.
    pub decode_tokens_per_second: f64,
    /// Tokens a second in reading a prompt.
    pub prefill_tokens_per_second: f64,
}

/// Windows of text to measure on.
#[derive(Debug)]
pub struct Measure<'a> {
    /// The text.
    pub tokens: &'a Tokens,
    /// Of it, the most to judge the loss by.
    pub limit: usize,
    /// Batch and window.
    pub settings: &'a Settings,
    /// Where the models are.
    pub device: &'a Device,
}

impl Measure<'_> {
    /// Loss and perplexities of a model.
    ///
    /// # Errors
    /// A device that is out of memory, a loss that is no number.
    pub fn quality(&self, model: &VesperLM) -> Result<Measured> {
        let loss = held_out_loss(&model.detach(), self.tokens, self.settings, self.device, self.limit)?;
        if !loss.is_finite() {
            bail!("the loss on the held-out text is {loss}");
        }
        let decoded = self.decoded_loss(model)?;
        Ok(Measured {
            loss,
            perplexity: loss.exp(),
            perplexity_token_by_token: decoded.exp(),
            ..Measured::default()
        })
    }

    /// Mean loss over the first windows, one token after the other.
    fn decoded_loss(&self, model: &VesperLM) -> Result<f64> {
        let seq = self.settings.seq;
        let windows = (DECODED / seq).max(1).min((self.tokens.len() - 1) / seq);
        let (mut sum, mut count) = (0.0, 0.0);
        for window in 0..windows {
            let tokens = self.tokens.get(window * seq..(window + 1) * seq + 1)?;
            let mut session = model.session(seq)?;
            for (&input, &target) in tokens.iter().zip(&tokens[1..]) {
                let logits = session.append(&[input])?;
                let most = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
                let sum_exp: f64 = logits.iter().map(|&logit| (f64::from(logit) - most).exp()).sum();
                let own = logits.get(target as usize).copied().unwrap_or(f32::NEG_INFINITY);
                sum += most + sum_exp.ln() - f64::from(own);
                count += 1.0;
            }
        }
        Ok(sum / count)
    }

    /// Fills in the speeds of all models, in turns, so that what else the machine does meets all of them.
    ///
    /// # Errors
    /// A device that is out of memory.
    pub fn speeds(&self, models: &mut [(&VesperLM, &mut Measured)]) -> Result<()> {
        for _ in 0..ROUNDS {
            for (model, measured) in models.iter_mut() {
                let most = model.config().max_position_embeddings;
                let prompt = self.tokens.get(0..self.settings.seq.min(most).min(self.tokens.len()))?;
                let mut session = model.session(prompt.len())?;
                let started = Instant::now();
                session.append(&prompt)?;
                let rate = prompt.len() as f64 / started.elapsed().as_secs_f64();
                measured.prefill_tokens_per_second = measured.prefill_tokens_per_second.max(rate);

                let text = self.tokens.get(0..(TIMED + 1).min(most).min(self.tokens.len()))?;
                let mut session = model.session(text.len())?;
                let Some((first, rest)) = text.split_first() else { continue };
                session.append(&[*first])?;
                let started = Instant::now();
                for &id in rest {
                    session.append(&[id])?;
                }
                let rate = rest.len() as f64 / started.elapsed().as_secs_f64();
                measured.decode_tokens_per_second = measured.decode_tokens_per_second.max(rate);
            }
        }
        Ok(())
    }
}

//! What a run is, said before it, and what came of it, said and written after it.

use std::path::Path;

use serde::Serialize;
use vesper_model::VesperConfig;

use crate::data::Data;
use crate::log::Record;
use crate::say;
use crate::settings::Settings;

/// `summary.json`; losses and entropies in nats a token.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// Name of the preset.
    pub size: String,
    /// Numbers that the model learned.
    pub parameters: usize,
    /// Tokens trained on.
    pub tokens: u64,
    /// Seconds in training steps, without evaluations and checkpoints.
    pub seconds: f64,
    /// Their quotient.
    pub tokens_per_second: f64,
    /// Of the last step; none where the log of a run that goes on was lost.
    pub final_loss: Option<f64>,
    /// On held-out text, at the end; none in the same way.
    pub eval_loss: Option<f64>,
    /// What a model without context reaches.
    pub unigram_entropy: f64,
    /// What no model can be better than, where it is known.
    pub floor: Option<f64>,
}

impl Summary {
    /// Of a run that made all its steps in `seconds`.
    pub fn new(
        settings: &Settings,
        config: &VesperConfig,
        data: &Data,
        records: &[Record],
        seconds: f64,
    ) -> Self {
        let tokens = settings.steps * settings.tokens_per_step();
        let last = records.last();
        Self {
            size: settings.size.clone(),
            parameters: config.num_parameters(),
            tokens,
            seconds,
            tokens_per_second: tokens as f64 / seconds,
            final_loss: last.map(|r| r.loss),
            eval_loss: last.and_then(|r| r.eval_loss),
            unigram_entropy: data.unigram_entropy,
            floor: data.floor,
        }
    }

    /// Prints it for people.
    pub fn print(&self, out: &Path) {
        let held_out = match (self.eval_loss, self.floor) {
            (Some(loss), Some(floor)) => {
                let above = 100.0 * (loss / floor - 1.0);
                format!("Held-out loss {loss:.3} nats a token, {above:.1} % above the floor of {floor:.3}")
            }
            (Some(loss), None) => {
                format!("Held-out loss {loss:.3} nats a token, unigram entropy {:.3}", self.unigram_entropy)
            }
            (None, _) => "The held-out loss is not known: it is not in log.jsonl".into(),
        };
        say!(
            "Trained on {} tokens in {:.0} s ({:.0} tokens a second). {held_out}.",
            self.tokens,
            self.seconds,
            self.tokens_per_second
        );
        say!("Chat with it: cargo run --release --example chat -- --model {}", out.display());
    }
}

/// Prints what a run will do, from step `done` on.
pub fn describe(settings: &Settings, config: &VesperConfig, data: &Data, out: &Path, done: u64) {
    say!(
        "VesperLM {}: {} parameters ({} layers, {} heads, width {}, vocabulary {}), {} on {}",
        settings.size,
        config.num_parameters(),
        config.num_hidden_layers,
        config.num_attention_heads,
        config.hidden_size,
        config.vocab_size,
        settings.dtype,
        settings.device,
    );
    say!(
        "Data: {}, {} tokens to train on, {} held out; unigram entropy {:.3} nats a token{}",
        data.name,
        data.train.len(),
        data.eval.len(),
        data.unigram_entropy,
        data.floor.map_or(String::new(), |floor| format!(", floor {floor:.3}")),
    );
    say!(
        "Run: {} steps of {} x {} tokens, {} with learning rate {}, in {}{}",
        settings.steps,
        settings.batch,
        settings.seq,
        settings.optimizer,
        settings.lr,
        out.display(),
        if done > 0 { format!(", after step {done}") } else { String::new() },
    );
}

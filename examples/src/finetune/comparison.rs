//! The comparison of methods of fine-tuning: its file, and its table.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::say;

/// `finetune.json`; losses in nats a token.
#[derive(Debug, Serialize)]
pub struct Comparison {
    /// The model that was tuned.
    pub model: String,
    /// What it was tuned on.
    pub data: Vec<PathBuf>,
    /// The adapters' rank.
    pub rank: usize,
    /// Before the adapters.
    pub dropout: f64,
    /// Of each training.
    pub steps: u64,
    /// Rows of a step.
    pub batch: usize,
    /// Tokens of a row.
    pub seq: usize,
    /// Of the adapters and the order of the data.
    pub seed: u64,
    /// Trained on.
    pub train_tokens: usize,
    /// Held out.
    pub held_out_tokens: usize,
    /// Held-out loss of the model as it was.
    pub base_loss: f64,
    /// In the order in which they were tried.
    pub methods: Vec<Row>,
}

/// What came of a method, with its best learning rate.
#[derive(Debug, Serialize)]
pub struct Row {
    /// As the flag names it.
    pub method: &'static str,
    /// The best learning rate.
    pub lr: f64,
    /// At that rate.
    pub held_out_loss: f64,
    /// Of each learning rate that was tried; null where it is no number.
    pub tried: Vec<(f64, f64)>,
    /// Numbers that are trained.
    pub trainable: usize,
    /// Of these, what a token uses.
    pub active_per_token: usize,
    /// Of the model's parameters.
    pub percent: f64,
    /// Seconds in training steps.
    pub seconds: f64,
    /// The most memory that training took beside the loaded model, in bytes; none on a GPU, where it is not counted.
    pub peak_bytes: Option<usize>,
    /// Whether the adapter can be merged.
    pub merge: &'static str,
}

impl Comparison {
    /// Says the table, and which methods may be better at a learning rate that was not tried.
    pub fn print(&self, out: &Path) {
        say!(
            "\n{:8} {:>9} {:>13} {:>10} {:>10} {:>9} {:>9} {:>9}  merge",
            "method",
            "lr",
            "held-out loss",
            "trainable",
            "per token",
            "percent",
            "MiB",
            "seconds"
        );
        say!("{:8} {:>9} {:>13.4}", "none", "", self.base_loss);
        for row in &self.methods {
            let memory =
                row.peak_bytes.map_or("-".into(), |b| format!("{:.1}", b as f64 / f64::from(1 << 20)));
            say!(
                "{:8} {:>9} {:>13.4} {:>10} {:>10} {:>8.2}% {memory:>9} {:>9.1}  {}",
                row.method,
                row.lr,
                row.held_out_loss,
                row.trainable,
                row.active_per_token,
                row.percent,
                row.seconds,
                row.merge
            );
        }
        say!("One seed, {} steps; memory beside the loaded model. Written to {}.", self.steps, out.display());
        // Where the last rate tried is the best, the best is not known: such rows are less comparable.
        for (side, last) in [("highest", f64::max as fn(f64, f64) -> f64), ("lowest", f64::min)] {
            let at = self.methods.iter().filter(|row| {
                let rates = row.tried.iter().map(|(lr, _)| *lr);
                row.tried.len() > 1 && rates.reduce(last) == Some(row.lr)
            });
            let at: Vec<&str> = at.map(|row| row.method).collect();
            if !at.is_empty() {
                let names = at.join(", ");
                say!("Best at the {side} learning rate of those tried, and maybe better beyond it: {names}");
            }
        }
    }
}

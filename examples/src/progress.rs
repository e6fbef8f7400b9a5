//! The progress bar of a training run.

use indicatif::{ProgressBar, ProgressStyle};

use crate::log::Record;

/// A bar with loss, perplexity, learning rate, gradient norm, tokens a second and the time that remains.
#[derive(Debug)]
pub struct Progress(ProgressBar);

impl Progress {
    /// A bar of `steps`, of which `done` are behind. Where stderr is no terminal, only [`Progress::line`] prints.
    pub fn new(steps: u64, done: u64) -> Self {
        let bar = ProgressBar::new(steps).with_position(done);
        let style = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg}, {eta} left");
        if let Ok(style) = style {
            bar.set_style(style);
        }
        bar.reset_eta();
        Self(bar)
    }

    /// Shows a step.
    pub fn step(&self, record: &Record, tokens_per_second: f64) {
        self.0.set_message(format!(
            "loss {:.3} ppl {:.1} lr {:.1e} norm {} {:.0} tok/s",
            record.loss,
            record.perplexity,
            record.lr,
            record.grad_norm.map_or("-".into(), |n| format!("{n:.2}")),
            tokens_per_second
        ));
        self.0.set_position(record.step);
    }

    /// Prints a line above the bar, or alone where there is no terminal.
    pub fn line(&self, text: &str) {
        if self.0.is_hidden() {
            crate::say!("{text}");
        } else {
            self.0.println(text);
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}

//! The progress bar of a training run.

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};

use crate::log::Record;

/// A bar with loss, perplexity, learning rate, gradient norm, tokens a second and the time that remains; it goes away
/// when it is dropped. Where stderr is no terminal, only evaluations are printed.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    /// Moving average.
    tokens_per_second: Option<f64>,
}

impl Progress {
    /// A bar of `steps`, of which `done` are behind.
    pub fn new(steps: u64, done: u64) -> Self {
        let bar = ProgressBar::new(steps).with_finish(ProgressFinish::AndClear);
        if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len} {msg}, {eta} left") {
            bar.set_style(style);
        }
        // The steps of an earlier run took none of this one's time: the estimate begins when it has seen them.
        bar.update(|state| state.set_pos(done));
        bar.reset_eta();
        Self { bar, tokens_per_second: None }
    }

    /// Shows a step.
    pub fn step(&mut self, record: &Record) {
        let speed = self
            .tokens_per_second
            .map_or(record.tokens_per_second, |average| 0.9 * average + 0.1 * record.tokens_per_second);
        self.tokens_per_second = Some(speed);
        self.bar.set_message(format!(
            "loss {:.3} ppl {:.1} lr {:.1e} norm {} {speed:.0} tok/s",
            record.loss,
            record.perplexity,
            record.lr,
            record.grad_norm.map_or("-".into(), |norm| format!("{norm:.2}")),
        ));
        self.bar.set_position(record.step);
        if let Some(eval_loss) = record.eval_loss {
            self.line(&format!(
                "step {}: loss {:.4}, held-out loss {eval_loss:.4}",
                record.step, record.loss
            ));
        }
    }

    fn line(&self, text: &str) {
        if self.bar.is_hidden() {
            crate::say!("{text}");
        } else {
            self.bar.println(text);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_time_that_is_left_does_not_count_the_steps_of_an_earlier_run() {
        let progress = Progress::new(1000, 900);
        assert_eq!(progress.bar.position(), 900);
        std::thread::sleep(Duration::from_millis(50));
        progress.bar.set_position(901);
        // A step in 50 ms leaves 5 s for 99 of them; 901 steps in 50 ms would leave 5 ms.
        assert!(progress.bar.eta() > Duration::from_secs(1), "{:?}", progress.bar.eta());
    }
}

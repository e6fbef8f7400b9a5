use super::{History, LogitsProcessor, exclude};

/// Excludes every token that would repeat a run of `n` tokens of the history, the prompt's too.
#[derive(Debug, Clone)]
pub struct NoRepeatNgram {
    n: usize,
}

impl NoRepeatNgram {
    /// Runs of `n` tokens appear once; 1 lets each token appear once, 0 allows everything.
    pub fn new(n: usize) -> Self {
        Self { n }
    }
}

impl LogitsProcessor for NoRepeatNgram {
    fn process(&mut self, scores: &mut [f32], history: History<'_>) {
        let Some(open) = self.n.checked_sub(1).and_then(|n| history.last(n)) else { return };
        let banned = history.tokens().windows(self.n).filter_map(|run| {
            let (last, start) = run.split_last()?;
            (start == open).then_some(*last)
        });
        banned.for_each(|id| exclude(scores, id));
    }
}

use super::{History, LogitsProcessor, exclude};

/// Excludes every token that would repeat a run of `n` tokens of the history, the prompt's too.
///
/// # Examples
/// ```
/// use vesper_model::generate::{History, LogitsProcessor, NoRepeatNgram};
/// let mut scores = [0f32; 4];
/// NoRepeatNgram::new(2).process(&mut scores, History::new(&[1, 2, 3, 1], 0));
/// assert_eq!(scores, [0., 0., f32::NEG_INFINITY, 0.]); // "1 2" is there already
/// ```
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

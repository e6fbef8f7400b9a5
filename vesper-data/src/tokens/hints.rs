//! Finding a run of many: a part of a data set by document is made of hundreds of thousands.

use std::ops::Range;
use std::sync::Arc;

/// Fewer runs are found fast enough.
const MIN_RUNS: usize = 64;
/// About how many runs a hint stands for.
const RUNS: usize = 8;

/// Among which runs that with a document, or a position, is: so that a search touches a few neighbouring ones only.
#[derive(Clone, Debug)]
pub(super) struct Hints {
    /// Every so many documents or positions there is a hint.
    step: usize,
    /// How many runs begin at or before each multiple of `step`.
    begun: Arc<[usize]>,
}

impl Hints {
    /// Hints for `count` runs that begin at `keys`, in order, of `total` documents or positions.
    pub(super) fn new(keys: impl Iterator<Item = usize>, count: usize, total: usize) -> Self {
        if count < MIN_RUNS {
            return Self { step: usize::MAX, begun: Arc::default() };
        }
        let step = (total / count).max(1).saturating_mul(RUNS);
        let mut begun = Vec::with_capacity(total / step + 1);
        for (before, key) in keys.enumerate() {
            while begun.len().saturating_mul(step) < key {
                begun.push(before);
            }
        }
        begun.resize(total / step + 1, count);
        Self { step, begun: begun.into() }
    }

    /// Runs among which the last that begins at or before `key` is, of `count` in all.
    pub(super) fn among(&self, key: usize, count: usize) -> Range<usize> {
        let hint = key / self.step;
        let begun = |hint: usize| self.begun.get(hint).copied();
        let from = begun(hint).unwrap_or(0).saturating_sub(1);
        from..begun(hint + 1).unwrap_or(count).max(from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_run_is_among_those_that_are_hinted_at(
            lengths in prop::collection::vec(prop_oneof![0..4_usize, 0..400_usize], 1..300),
            keys in prop::collection::vec(any::<prop::sample::Index>(), 20),
        ) {
            let begins: Vec<usize> = lengths.iter().scan(0, |end, length| {
                let begin = *end;
                *end += length;
                Some(begin)
            }).collect();
            let total: usize = lengths.iter().sum();
            let hints = Hints::new(begins.iter().copied(), begins.len(), total);
            for key in keys.iter().map(|key| key.index(total + 1)).chain([0, total, total + 1, usize::MAX]) {
                let run = begins.partition_point(|&begin| begin <= key).saturating_sub(1);
                let among = hints.among(key, begins.len());
                prop_assert!(among.contains(&run), "{key}: {run} in {among:?}");
                let found = among.start + begins[among].partition_point(|&begin| begin <= key);
                prop_assert_eq!(found.saturating_sub(1), run);
            }
        }
    }
}

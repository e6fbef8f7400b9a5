//! Views of a part of the documents: what is trained on, and what is held out.

use std::sync::Arc;

use super::{Run, Tokens};
use crate::batch::mix;
use crate::error::{DataError, Result};

impl Tokens {
    /// Cuts the stream into a training part and an evaluation part, its contiguous tail.
    ///
    /// The cut is at the end of the document nearest to `(1 - eval_fraction) * len`, unless that would make
    /// the evaluation part less than half or more than one and a half times as long as asked for: then, as
    /// with one long document, the cut is exactly where it was asked for. A fraction of 0 gives an empty
    /// evaluation part. Where there are documents enough, [`split_documents`](Self::split_documents) is the better
    /// one: its parts stay what they are when data is added.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] where `eval_fraction` is not in `0.0..1.0`, [`DataError::CacheDamaged`].
    ///
    /// # Examples
    ///
    /// ```
    /// use vesper_data::Tokens;
    ///
    /// let tokens = Tokens::from_documents([Ok(vec![1; 70]), Ok(vec![2; 22]), Ok(vec![3; 8])])?;
    /// let (train, eval) = tokens.split(0.1)?;
    /// assert_eq!((train.len(), eval.len()), (92, 8));
    /// # Ok::<(), vesper_data::DataError>(())
    /// ```
    pub fn split(&self, eval_fraction: f64) -> Result<(Self, Self)> {
        check(eval_fraction)?;
        let asked = ((self.len as f64 * eval_fraction).round() as usize).min(self.len);
        let cut = self.len - asked;
        let near = if asked == 0 { None } else { self.boundary_near(cut, asked / 2)? };
        let cut = near.unwrap_or(cut);
        Ok((self.slice(0, cut)?, self.slice(cut, self.len)?))
    }

    /// The document boundary nearest to `cut`, inside the view, at most `reach` away.
    fn boundary_near(&self, cut: usize, reach: usize) -> Result<Option<usize>> {
        let document = self.document_at(cut)?;
        let mut nearest: Option<usize> = None;
        for index in [document.checked_sub(1), Some(document)].into_iter().flatten() {
            if index >= self.documents {
                continue;
            }
            let end = self.document(index)?.end;
            let better = nearest.is_none_or(|nearest| end.abs_diff(cut) < nearest.abs_diff(cut));
            if end > 0 && end < self.len && end.abs_diff(cut) <= reach && better {
                nearest = Some(end);
            }
        }
        Ok(nearest)
    }

    /// The view of the tokens `start..end`, which must exist.
    fn slice(&self, start: usize, end: usize) -> Result<Self> {
        let mut builder = Builder::default();
        let mut index = self.run_at(start);
        while let Some(whole) = self.run(index) {
            index += 1;
            if whole.run.offset >= end {
                break;
            }
            let (from, to) = (whole.run.offset.max(start), whole.end.min(end));
            if from >= to {
                continue;
            }
            // Empty documents at the cut are in neither part.
            let first = if from == whole.run.offset { whole.run.first } else { self.document_at(from)? };
            let last = if to == whole.end { whole.documents_end } else { self.document_at(to - 1)? + 1 };
            let document = whole.run.document + (first - whole.run.first);
            builder.push(whole.run.start + (from - whole.run.offset), to - from, document, last - first);
        }
        Ok(builder.view(self))
    }

    /// Divides the documents into those to train on and those to evaluate on, about `eval_fraction` of them.
    ///
    /// A document's side depends on its ids and the seed alone: it stays the same when other documents are added or
    /// removed, and copies of a document are on one side. The ids are not copied or read where they are in a cache;
    /// its index has a hash of each document. Windows run over the documents of a part as if they were one stream.
    ///
    /// ```text
    /// held out where mix(hash(ids) xor mix(seed)) < eval_fraction * 2^64
    /// mix: SplitMix64's   hash: the first 8 bytes of SHA-256
    /// ```
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] where `eval_fraction` is not in `0.0..1.0`, [`DataError::CacheDamaged`].
    ///
    /// # Examples
    ///
    /// ```
    /// use vesper_data::Tokens;
    ///
    /// let documents = |count: u32| (0..count).map(|id| Ok(vec![id; 10]));
    /// let (train, eval) = Tokens::from_documents(documents(1000))?.split_documents(0.1, 7)?;
    /// assert_eq!(train.document_count() + eval.document_count(), 1000);
    /// assert!((60..140).contains(&eval.document_count()));
    ///
    /// // With more data, the held-out part keeps what it had.
    /// let (_, more) = Tokens::from_documents(documents(1100))?.split_documents(0.1, 7)?;
    /// assert_eq!(more.to_vec()?[..eval.len()], eval.to_vec()?);
    /// # Ok::<(), vesper_data::DataError>(())
    /// ```
    ///
    /// # References
    ///
    /// Steele, Lea, Flood 2014, <https://doi.org/10.1145/2714064.2660195> (SplitMix64).
    pub fn split_documents(&self, eval_fraction: f64, seed: u64) -> Result<(Self, Self)> {
        check(eval_fraction)?;
        // Exact: a fraction has 53 bits, and 2^64 times a number below 1 fits.
        let bound = (eval_fraction * 18_446_744_073_709_551_616.0) as u64;
        let key = mix(seed);
        let (mut train, mut eval) = (Builder::default(), Builder::default());
        let mut index = 0;
        while let Some(whole) = self.run(index) {
            index += 1;
            for document in whole.run.document..whole.run.document + (whole.documents_end - whole.run.first) {
                let stored = self.storage.document(document)?;
                let inside = |position: usize| position.clamp(whole.run.start, whole.storage_end());
                let (start, end) = (inside(stored.start), inside(stored.end));
                let held_out = mix(self.storage.document_hash(document)? ^ key) < bound;
                let side = if held_out { &mut eval } else { &mut train };
                side.push(start, end - start, document, 1);
            }
        }
        Ok((train.view(self), eval.view(self)))
    }
}

fn check(eval_fraction: f64) -> Result<()> {
    if (0.0..1.0).contains(&eval_fraction) {
        return Ok(());
    }
    Err(DataError::Config {
        name: "eval_fraction",
        got: eval_fraction.to_string(),
        expected: "a number from 0 up to but not including 1",
    })
}

/// The runs of a view, from neighbouring pieces.
#[derive(Default)]
struct Builder {
    runs: Vec<Run>,
    len: usize,
    documents: usize,
}

impl Builder {
    /// Appends `len` tokens of the storage from `start` on, in `documents` documents from `document` on.
    fn push(&mut self, start: usize, len: usize, document: usize, documents: usize) {
        let goes_on = self.runs.last().is_some_and(|run| {
            run.start + (self.len - run.offset) == start
                && run.document + (self.documents - run.first) == document
        });
        if !goes_on {
            self.runs.push(Run { start, offset: self.len, document, first: self.documents });
        }
        self.len += len;
        self.documents += documents;
    }

    fn view(self, of: &Tokens) -> Tokens {
        let Self { runs, len, documents } = self;
        Tokens::of_runs(Arc::clone(&of.storage), runs, len, documents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn documents(lengths: &[usize]) -> Tokens {
        Tokens::from_documents(lengths.iter().map(|&n| Ok(vec![1; n]))).unwrap()
    }

    fn ends(tokens: &Tokens) -> Vec<usize> {
        tokens.documents().map(|document| document.unwrap().end).collect()
    }

    #[test]
    fn one_long_document_is_cut_exactly() {
        let (train, eval) = documents(&[1000]).split(0.1).unwrap();
        assert_eq!((train.len(), eval.len()), (900, 100));
        assert_eq!((ends(&train), ends(&eval)), (vec![900], vec![100]));
    }

    #[test]
    fn the_cut_is_at_the_nearest_end_of_a_document() {
        let (train, eval) = documents(&[40, 45, 7, 8]).split(0.1).unwrap();
        assert_eq!((train.len(), eval.len()), (92, 8));
        assert_eq!((ends(&train), ends(&eval)), (vec![40, 85, 92], vec![8]));
    }

    #[test]
    fn a_boundary_too_far_away_is_not_taken() {
        // The boundaries 50 and 100 are both further than 5 from 90.
        let (train, eval) = documents(&[50, 50]).split(0.1).unwrap();
        assert_eq!((train.len(), eval.len()), (90, 10));
    }

    #[test]
    fn a_part_can_be_cut_again() {
        let (train, _) = documents(&[10, 10, 10, 10]).split(0.25).unwrap();
        let (first, second) = train.split(0.34).unwrap();
        assert_eq!((first.len(), second.len()), (20, 10));
        assert_eq!(ends(&second), [10]);
    }

    #[test]
    fn a_fraction_of_zero_evaluates_nothing_and_other_fractions_are_refused() {
        let tokens = documents(&[10]);
        assert!(tokens.split(0.0).unwrap().1.is_empty());
        assert!(tokens.split_documents(0.0, 1).unwrap().1.is_empty());
        for fraction in [1.0, -0.1, f64::NAN, f64::INFINITY] {
            assert!(
                tokens.split(fraction).is_err() && tokens.split_documents(fraction, 1).is_err(),
                "{fraction}"
            );
        }
    }

    #[test]
    fn an_empty_part_can_be_cut_and_read() {
        let (_, empty) = documents(&[10]).split(0.0).unwrap();
        let (first, second) = empty.split(0.5).unwrap();
        assert!(first.is_empty() && second.is_empty());
        assert!(empty.to_vec().unwrap().is_empty());
        assert!(matches!(empty.get(0..1), Err(DataError::Range { end: 1, len: 0, .. })));
        assert!(empty.document(0).is_err());
        assert_eq!(empty.split_documents(0.5, 0).unwrap().0.document_count(), 0);
    }

    #[test]
    fn reading_past_the_end_of_a_part_is_an_error_though_the_data_goes_on() {
        let (train, _) = documents(&[10, 10]).split(0.5).unwrap();
        let mut out = [0; 4];
        assert!(train.read_into(6, &mut out).is_ok());
        assert!(matches!(train.read_into(7, &mut out), Err(DataError::Range { start: 7, end: 11, len: 10 })));
        assert!(train.read_into(usize::MAX, &mut out).is_err());
    }

    /// The values are those of `tests/golden/orders.py`, which knows nothing of this file: a change here would move
    /// documents from one side of everyone's data to the other.
    #[test]
    fn the_side_of_a_document_never_changes() {
        let tokens = Tokens::from_documents((0..40_u32).map(|id| Ok(vec![id, 7, id * 1000]))).unwrap();
        let (_, eval) = tokens.split_documents(0.2, 42).unwrap();
        let held_out: Vec<u32> = eval.to_vec().unwrap().chunks(3).map(|document| document[0]).collect();
        assert_eq!(held_out, [3, 5, 6, 7, 16, 27]);
    }

    #[test]
    fn a_document_keeps_its_side_when_others_are_added_and_copies_share_one() {
        let sides = |documents: &[u32]| {
            let tokens = Tokens::from_documents(documents.iter().map(|&id| Ok(vec![id, 1]))).unwrap();
            let (train, eval) = tokens.split_documents(0.3, 5).unwrap();
            let ids = |part: Tokens| -> std::collections::BTreeSet<u32> {
                part.to_vec().unwrap().chunks(2).map(|document| document[0]).collect()
            };
            (ids(train), ids(eval))
        };
        let few: Vec<u32> = (0..100).collect();
        let many: Vec<u32> = (50..200).rev().chain(0..100).collect(); // other places, and copies
        let ((train, eval), (more_train, more_eval)) = (sides(&few), sides(&many));
        assert!(train.is_subset(&more_train) && eval.is_subset(&more_eval));
        assert!(more_train.is_disjoint(&more_eval));
        assert!((15..45).contains(&eval.len()), "{}", eval.len());
        assert_ne!(eval, {
            let tokens = Tokens::from_documents(few.iter().map(|&id| Ok(vec![id, 1]))).unwrap();
            let (_, other_seed) = tokens.split_documents(0.3, 6).unwrap();
            other_seed.to_vec().unwrap().chunks(2).map(|document| document[0]).collect()
        });
    }

    proptest! {
        #[test]
        fn views_of_views_have_the_tokens_of_their_documents(
            lengths in prop::collection::vec(0..9_usize, 0..30),
            fraction in 0.0..0.99_f64,
            again in 0.0..0.99_f64,
            seed: u64,
        ) {
            // Each token names its document and its place in it.
            let all: Vec<Vec<u32>> = lengths.iter().enumerate().map(|(d, &n)| (0..n).map(|t| (d * 100 + t) as u32).collect()).collect();
            let tokens = Tokens::from_documents(all.iter().cloned().map(Ok)).unwrap();
            let (train, eval) = tokens.split_documents(fraction, seed).unwrap();
            prop_assert_eq!(train.document_count() + eval.document_count(), lengths.len());
            let mut seen: Vec<u32> = train.to_vec().unwrap();
            seen.extend(eval.to_vec().unwrap());
            seen.sort_unstable();
            prop_assert_eq!(seen, all.concat());
            for (part, is_train) in [(&train, true), (&eval, false)] {
                let mut end = 0;
                for document in part.documents() {
                    let document = document.unwrap();
                    prop_assert_eq!(document.start, end);
                    end = document.end;
                    let ids = part.get(document).unwrap();
                    if let Some(first) = ids.first() {
                        prop_assert_eq!(&ids, &all[*first as usize / 100]);
                    }
                }
                prop_assert_eq!(end, part.len());
                // A part of a part, by position and by document.
                let (head, tail) = part.split(again).unwrap();
                prop_assert_eq!([head.to_vec().unwrap(), tail.to_vec().unwrap()].concat(), part.to_vec().unwrap());
                for cut in [&head, &tail] {
                    let lengths: usize = cut.documents().map(|document| document.unwrap().len()).sum();
                    prop_assert_eq!(lengths, cut.len());
                }
                // The sides of whole documents do not depend on the view.
                let (same, none) = part.split_documents(fraction, seed).unwrap();
                let (same, none) = if is_train { (same, none) } else { (none, same) };
                prop_assert_eq!(same.len(), part.len());
                prop_assert!(none.is_empty());
            }
        }
    }
}

//! A stream of token ids, in memory or in a memory-mapped cache file.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::cache::TokenCache;
use crate::error::{DataError, Result};

/// Ids below this are counted in a flat table, others in a map: an id may be as large as `u32::MAX`.
const FLAT_COUNTS: u32 = 1 << 20;

/// A view of a stream of token ids: cheap to clone, since the ids themselves are shared.
///
/// # Examples
///
/// ```
/// use vesper_data::Tokens;
///
/// let tokens = Tokens::from(vec![5_u32, 3, 9, 9]);
/// assert_eq!(tokens.len(), 4);
/// assert_eq!(tokens.get(1..3), Some(vec![3, 9]));
/// assert_eq!(tokens.get(3..5), None);
/// ```
#[derive(Clone, Debug)]
pub struct Tokens {
    storage: Arc<Storage>,
    start: usize,
    end: usize,
}

#[derive(Debug)]
enum Storage {
    U16 { ids: Vec<u16>, document_ends: Vec<usize> },
    U32 { ids: Vec<u32>, document_ends: Vec<usize> },
    Cache(TokenCache),
}

impl Storage {
    fn len(&self) -> usize {
        match self {
            Self::U16 { ids, .. } => ids.len(),
            Self::U32 { ids, .. } => ids.len(),
            Self::Cache(cache) => cache.len(),
        }
    }

    /// Writes ids `start..start + out.len()`, which must exist, into `out`; says whether they did.
    fn read(&self, start: usize, out: &mut [u32]) -> bool {
        let Some(end) = start.checked_add(out.len()) else { return false };
        match self {
            Self::U16 { ids, .. } => {
                let Some(ids) = ids.get(start..end) else { return false };
                out.iter_mut().zip(ids).for_each(|(out, &id)| *out = u32::from(id));
            }
            Self::U32 { ids, .. } => {
                let Some(ids) = ids.get(start..end) else { return false };
                out.copy_from_slice(ids);
            }
            Self::Cache(cache) => return cache.read_into(start, out),
        }
        true
    }

    fn document_count(&self) -> usize {
        match self {
            Self::U16 { document_ends, .. } | Self::U32 { document_ends, .. } => document_ends.len(),
            Self::Cache(cache) => cache.document_count(),
        }
    }

    fn document_end(&self, index: usize) -> Option<usize> {
        match self {
            Self::U16 { document_ends, .. } | Self::U32 { document_ends, .. } => {
                document_ends.get(index).copied()
            }
            Self::Cache(cache) => cache.document_end(index),
        }
    }

    /// The first document whose end is past `position`.
    fn document_after(&self, position: usize) -> usize {
        let (mut low, mut high) = (0, self.document_count());
        while low < high {
            let middle = low + (high - low) / 2;
            if self.document_end(middle).is_some_and(|end| end <= position) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }
}

impl Tokens {
    /// Joins documents into one stream that remembers where each one ends.
    ///
    /// # Errors
    ///
    /// The first error that the iterator yields.
    ///
    /// # Examples
    ///
    /// ```
    /// use vesper_data::Tokens;
    ///
    /// let tokens = Tokens::from_documents([Ok(vec![1, 2, 0]), Ok(vec![3, 0])])?;
    /// assert_eq!(tokens.to_vec(), [1, 2, 0, 3, 0]);
    /// assert_eq!(tokens.document_ends().collect::<Vec<_>>(), [3, 5]);
    /// # Ok::<(), vesper_data::DataError>(())
    /// ```
    pub fn from_documents<I, T>(documents: I) -> Result<Self>
    where
        I: IntoIterator<Item = Result<T>>,
        T: AsRef<[u32]>,
    {
        let mut narrow: Vec<u16> = Vec::new();
        let mut wide: Option<Vec<u32>> = None;
        let mut document_ends = Vec::new();
        for document in documents {
            let document = document?;
            let ids = document.as_ref();
            // Two bytes an id as long as every id so far fits.
            if wide.is_none() && ids.iter().any(|&id| u16::try_from(id).is_err()) {
                wide = Some(narrow.iter().map(|&id| u32::from(id)).collect());
                narrow = Vec::new();
            }
            if let Some(wide) = &mut wide {
                wide.extend_from_slice(ids);
                document_ends.push(wide.len());
            } else {
                narrow.extend(ids.iter().map(|&id| id as u16));
                document_ends.push(narrow.len());
            }
        }
        Ok(Self::whole(match wide {
            Some(ids) => Storage::U32 { ids, document_ends },
            None => Storage::U16 { ids: narrow, document_ends },
        }))
    }

    pub(crate) fn from_cache(cache: TokenCache) -> Self {
        Self::whole(Storage::Cache(cache))
    }

    fn whole(storage: Storage) -> Self {
        let end = storage.len();
        Self { storage: Arc::new(storage), start: 0, end }
    }

    /// The number of tokens.
    pub fn len(&self) -> usize {
        self.end - self.start
    }

    /// Whether there is no token at all.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The ids at the positions `range`, or `None` where the stream does not have them all.
    pub fn get(&self, range: Range<usize>) -> Option<Vec<u32>> {
        if range.start > range.end || range.end > self.len() {
            return None;
        }
        let mut ids = vec![0; range.end - range.start];
        self.storage.read(self.start.checked_add(range.start)?, &mut ids).then_some(ids)
    }

    /// Copies the ids from position `start` on into `out`, all of it.
    ///
    /// # Errors
    ///
    /// [`DataError::Range`] where the stream has fewer than `start + out.len()` tokens.
    pub fn read_into(&self, start: usize, out: &mut [u32]) -> Result<()> {
        let fits = start.checked_add(out.len()).is_some_and(|end| end <= self.len());
        if fits && self.storage.read(self.start + start, out) {
            return Ok(());
        }
        let end = start.saturating_add(out.len()) as u64;
        Err(DataError::Range { start: start as u64, end, len: self.len() as u64 })
    }

    /// All ids, copied into a vector.
    pub fn to_vec(&self) -> Vec<u32> {
        self.get(0..self.len()).unwrap_or_default()
    }

    /// The positions, within this view, at which a document ends; the last one may be cut off by the view.
    pub fn document_ends(&self) -> impl Iterator<Item = usize> + '_ {
        let first = self.storage.document_after(self.start);
        (first..self.storage.document_count())
            .map_while(|index| self.storage.document_end(index))
            .take_while(|&end| end <= self.end)
            .map(|end| end - self.start)
    }

    /// Cuts the stream into a training part and an evaluation part, its contiguous tail.
    ///
    /// The cut is at the end of the document nearest to `(1 - eval_fraction) * len`, unless that would make
    /// the evaluation part less than half or more than one and a half times as long as asked for: then, as
    /// with one long document, the cut is exactly where it was asked for. A fraction of 0 gives an empty
    /// evaluation part.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] where `eval_fraction` is not in `0.0..1.0`.
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
        if !(0.0..1.0).contains(&eval_fraction) {
            return Err(DataError::Config {
                name: "eval_fraction",
                got: eval_fraction.to_string(),
                expected: "a number from 0 up to but not including 1",
            });
        }
        let asked = ((self.len() as f64 * eval_fraction).round() as usize).min(self.len());
        let cut = self.end - asked;
        let cut = if asked == 0 { cut } else { self.boundary_near(cut, asked / 2).unwrap_or(cut) };
        Ok((Self { end: cut, ..self.clone() }, Self { start: cut, ..self.clone() }))
    }

    /// The document boundary nearest to the absolute position `cut`, inside the view, at most `reach` away.
    fn boundary_near(&self, cut: usize, reach: usize) -> Option<usize> {
        let after = self.storage.document_after(cut);
        let candidates = [after.checked_sub(1), Some(after)];
        candidates
            .into_iter()
            .flatten()
            .filter_map(|index| self.storage.document_end(index))
            .filter(|&end| end > self.start && end < self.end && end.abs_diff(cut) <= reach)
            .min_by_key(|&end| end.abs_diff(cut))
    }

    /// The entropy of the ids' frequencies, in nats: the loss of the best model that ignores all context.
    ///
    /// ```text
    /// H = -sum_t p(t) ln p(t),   p(t) = count(t) / len
    /// ```
    ///
    /// A model whose loss is not far below it has learned nothing but frequencies. It is 0 for an empty
    /// stream.
    ///
    /// # Examples
    ///
    /// ```
    /// use vesper_data::Tokens;
    ///
    /// let entropy = Tokens::from(vec![7_u32, 8, 7, 8]).unigram_entropy();
    /// assert!((entropy - 2f64.ln()).abs() < 1e-12);
    /// ```
    pub fn unigram_entropy(&self) -> f64 {
        let mut flat: Vec<u64> = Vec::new();
        let mut sparse: BTreeMap<u32, u64> = BTreeMap::new();
        self.for_each_chunk(|ids| {
            for &id in ids {
                if id >= FLAT_COUNTS {
                    *sparse.entry(id).or_default() += 1;
                    continue;
                }
                if flat.len() <= id as usize {
                    flat.resize(id as usize + 1, 0);
                }
                if let Some(count) = flat.get_mut(id as usize) {
                    *count += 1;
                }
            }
        });
        let total = self.len() as f64;
        // `- 0.0` of a stream with one kind of token prints as "-0".
        0.0_f64.max(
            flat.iter()
                .chain(sparse.values())
                .filter(|&&count| count > 0)
                .map(|&count| count as f64 / total)
                .map(|p| -p * p.ln())
                .sum(),
        )
    }

    /// The highest id, or `None` for an empty stream.
    pub fn max_id(&self) -> Option<u32> {
        let mut highest = None;
        self.for_each_chunk(|ids| highest = highest.max(ids.iter().copied().max()));
        highest
    }

    /// Hands all ids to `f` in order, in pieces that fit the processor's cache.
    fn for_each_chunk(&self, mut f: impl FnMut(&[u32])) {
        let mut buffer = [0_u32; 4096];
        let mut position = self.start;
        while position < self.end {
            let take = (self.end - position).min(buffer.len());
            let chunk = buffer.get_mut(..take).unwrap_or_default();
            if !self.storage.read(position, chunk) {
                return;
            }
            f(chunk);
            position += take;
        }
    }
}

impl From<Vec<u32>> for Tokens {
    /// One document.
    fn from(ids: Vec<u32>) -> Self {
        let document_ends = vec![ids.len()];
        Self::whole(Storage::U32 { ids, document_ends })
    }
}

impl From<Vec<u16>> for Tokens {
    /// One document.
    fn from(ids: Vec<u16>) -> Self {
        let document_ends = vec![ids.len()];
        Self::whole(Storage::U16 { ids, document_ends })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn documents(lengths: &[usize]) -> Tokens {
        Tokens::from_documents(lengths.iter().map(|&n| Ok(vec![1; n]))).unwrap()
    }

    #[test]
    fn one_long_document_is_cut_exactly() {
        let (train, eval) = documents(&[1000]).split(0.1).unwrap();
        assert_eq!((train.len(), eval.len()), (900, 100));
    }

    #[test]
    fn the_cut_is_at_the_nearest_end_of_a_document() {
        let (train, eval) = documents(&[40, 45, 7, 8]).split(0.1).unwrap();
        assert_eq!((train.len(), eval.len()), (92, 8));
        assert_eq!(train.document_ends().collect::<Vec<_>>(), [40, 85, 92]);
        assert_eq!(eval.document_ends().collect::<Vec<_>>(), [8]);
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
        assert_eq!(second.document_ends().collect::<Vec<_>>(), [10]);
    }

    #[test]
    fn a_fraction_of_zero_evaluates_nothing_and_other_fractions_are_refused() {
        let tokens = documents(&[10]);
        assert!(tokens.split(0.0).unwrap().1.is_empty());
        for fraction in [1.0, -0.1, f64::NAN, f64::INFINITY] {
            assert!(tokens.split(fraction).is_err(), "{fraction}");
        }
    }

    #[test]
    fn an_empty_stream_has_no_entropy_and_no_highest_id() {
        let tokens = Tokens::from(Vec::<u32>::new());
        assert_eq!((tokens.unigram_entropy(), tokens.max_id()), (0.0, None));
    }

    #[test]
    fn entropy_counts_ids_of_any_size() {
        let tokens = Tokens::from(vec![0, u32::MAX, FLAT_COUNTS, FLAT_COUNTS - 1]);
        assert!((tokens.unigram_entropy() - 4f64.ln()).abs() < 1e-12);
        assert_eq!(Tokens::from(vec![3_u32; 9]).unigram_entropy().to_string(), "0");
    }

    #[test]
    fn ids_stay_two_bytes_wide_until_one_needs_four() {
        let narrow = Tokens::from_documents([Ok([1_u32, 65535])]).unwrap();
        let wide = Tokens::from_documents([Ok([1_u32, 65535]), Ok([65536, 2])]).unwrap();
        assert!(matches!(*narrow.storage, Storage::U16 { .. }));
        assert!(matches!(*wide.storage, Storage::U32 { .. }));
        assert_eq!(wide.to_vec(), [1, 65535, 65536, 2]);
        assert_eq!(wide.document_ends().collect::<Vec<_>>(), [2, 4]);
    }

    #[test]
    fn reading_past_the_end_of_a_part_is_an_error_though_the_data_goes_on() {
        let (train, _) = documents(&[10, 10]).split(0.5).unwrap();
        let mut out = [0; 4];
        assert!(train.read_into(6, &mut out).is_ok());
        assert!(matches!(train.read_into(7, &mut out), Err(DataError::Range { start: 7, end: 11, len: 10 })));
        assert!(train.read_into(usize::MAX, &mut out).is_err());
    }
}

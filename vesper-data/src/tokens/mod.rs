//! A stream of token ids, in memory or in a cache.

mod hints;
mod loss;
mod split;
mod storage;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::cache::TokenCache;
use crate::error::{DataError, Result};
use crate::tokenizer::Encoded;
use hints::Hints;
use storage::{Ids, Memory, Storage};

pub use loss::IGNORE;
pub(crate) use loss::push_ignored;
pub(crate) use storage::document_hash;

/// Ids below this are counted in a flat table, others in a map: an id may be as large as `u32::MAX`.
const FLAT_COUNTS: u32 = 1 << 20;

/// A view of a stream of token ids: cheap to clone, since the ids themselves are shared.
///
/// A view is made of runs of neighbouring documents of the whole stream; positions and documents are counted in the
/// view. Reading the ids of a cache for the first time verifies its checksums, so reading can fail.
///
/// # Examples
///
/// ```
/// use vesper_data::Tokens;
///
/// let tokens = Tokens::from(vec![5_u32, 3, 9, 9]);
/// assert_eq!(tokens.len(), 4);
/// assert_eq!(tokens.get(1..3)?, [3, 9]);
/// assert!(tokens.get(3..5).is_err());
/// # Ok::<(), vesper_data::DataError>(())
/// ```
#[derive(Clone)]
pub struct Tokens {
    storage: Arc<Storage>,
    runs: Arc<[Run]>,
    len: usize,
    documents: usize,
    /// Where to look for the run of a position, and of a document.
    by_position: Hints,
    by_document: Hints,
}

/// Neighbouring tokens of the storage. A run ends where the next one of the view starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    /// The first token, in the storage and in the view.
    start: usize,
    offset: usize,
    /// The first document, in the storage and in the view; the run may have only a part of it.
    document: usize,
    first: usize,
}

/// A run and where it ends, in the view.
#[derive(Clone, Copy)]
struct Whole {
    run: Run,
    end: usize,
    documents_end: usize,
}

impl Whole {
    fn storage_end(self) -> usize {
        self.run.start + (self.end - self.run.offset)
    }
}

impl Tokens {
    /// Joins documents into one stream that remembers where each one ends, and which tokens are targets of the loss.
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
    /// assert_eq!(tokens.to_vec()?, [1, 2, 0, 3, 0]);
    /// assert_eq!(tokens.document(1)?, 3..5);
    /// # Ok::<(), vesper_data::DataError>(())
    /// ```
    pub fn from_documents<I, T>(documents: I) -> Result<Self>
    where
        I: IntoIterator<Item = Result<T>>,
        T: Into<Encoded>,
    {
        let mut memory = Memory::default();
        for document in documents {
            let document = document?.into();
            memory.push(&document.ids, document.loss.as_deref());
        }
        Ok(Self::whole(Storage::Memory(memory)))
    }

    pub(crate) fn from_cache(cache: TokenCache) -> Self {
        Self::whole(Storage::Cache(cache))
    }

    fn whole(storage: Storage) -> Self {
        let (len, documents) = (storage.len(), storage.document_count());
        let run = Run { start: 0, offset: 0, document: 0, first: 0 };
        Self::of_runs(Arc::new(storage), vec![run], len, documents)
    }

    fn of_runs(storage: Arc<Storage>, runs: Vec<Run>, len: usize, documents: usize) -> Self {
        Self {
            by_position: Hints::new(runs.iter().map(|run| run.offset), runs.len(), len),
            by_document: Hints::new(runs.iter().map(|run| run.first), runs.len(), documents),
            storage,
            runs: runs.into(),
            len,
            documents,
        }
    }

    /// The number of tokens.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no token at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The number of documents, empty ones and parts of documents included.
    pub fn document_count(&self) -> usize {
        self.documents
    }

    /// Whether the loss leaves out some of the tokens of the stream that this is a view of.
    pub fn has_ignored(&self) -> bool {
        self.storage.has_ignored()
    }

    /// Run `index` and where it ends.
    fn run(&self, index: usize) -> Option<Whole> {
        let run = *self.runs.get(index)?;
        let (end, documents_end) =
            self.runs.get(index + 1).map_or((self.len, self.documents), |next| (next.offset, next.first));
        Some(Whole { run, end, documents_end })
    }

    /// The number of the run with the token at `position`.
    fn run_at(&self, position: usize) -> usize {
        self.run_before(&self.by_position, position, |run| run.offset)
    }

    /// The number of the last run whose `key` is not above `wanted`.
    fn run_before(&self, hints: &Hints, wanted: usize, key: fn(&Run) -> usize) -> usize {
        let among = hints.among(wanted, self.runs.len());
        let from = among.start;
        let runs = self.runs.get(among).unwrap_or_default();
        (from + runs.partition_point(|run| key(run) <= wanted)).saturating_sub(1)
    }

    /// Calls `f` with the parts of `range`, which must exist, in the storage and in the view.
    fn parts(
        &self,
        range: Range<usize>,
        f: &mut dyn FnMut(Range<usize>, Range<usize>) -> Result<()>,
    ) -> Result<()> {
        let mut position = range.start;
        let mut index = self.run_at(position);
        while position < range.end {
            let Some(whole) = self.run(index) else { return Err(self.no_range(&range)) };
            index += 1;
            let end = range.end.min(whole.end);
            if end <= position {
                continue;
            }
            let start = whole.run.start + (position - whole.run.offset);
            f(start..start + (end - position), position..end)?;
            position = end;
        }
        Ok(())
    }

    fn no_range(&self, range: &Range<usize>) -> DataError {
        DataError::Range { start: range.start as u64, end: range.end as u64, len: self.len as u64 }
    }

    /// The ids at the positions `range`.
    ///
    /// # Errors
    ///
    /// [`DataError::Range`] where the stream does not have them all, [`DataError::CacheDamaged`].
    pub fn get(&self, range: Range<usize>) -> Result<Vec<u32>> {
        if range.start > range.end || range.end > self.len {
            return Err(self.no_range(&range));
        }
        let mut ids = vec![0; range.end - range.start];
        self.read_into(range.start, &mut ids)?;
        Ok(ids)
    }

    /// Copies the ids from position `start` on into `out`, all of it.
    ///
    /// # Errors
    ///
    /// [`DataError::Range`] where the stream has fewer than `start + out.len()` tokens, [`DataError::CacheDamaged`]
    /// where a shard that is read for the first time is damaged.
    pub fn read_into(&self, start: usize, out: &mut [u32]) -> Result<()> {
        let range = start..start.saturating_add(out.len());
        if range.end > self.len {
            return Err(self.no_range(&range));
        }
        self.parts(range, &mut |stored, own| {
            self.storage
                .read(stored.start, out.get_mut(own.start - start..own.end - start).unwrap_or_default())
        })
    }

    /// Hands the parts of `range` that the loss leaves out to `f`, in order.
    ///
    /// # Errors
    ///
    /// [`DataError::Range`] where the stream does not have all of it, [`DataError::CacheDamaged`].
    ///
    /// # Examples
    ///
    /// ```
    /// use vesper_data::{Encoded, Tokens};
    ///
    /// // A question of three tokens, and an answer of two, which alone is learned.
    /// let pair = Encoded { ids: vec![7, 8, 9, 4, 0], unknown: 0, loss: Some(vec![3..5]) };
    /// let tokens = Tokens::from_documents([Ok(pair)])?;
    /// let mut ignored = Vec::new();
    /// tokens.for_each_ignored(1..5, |range| ignored.push(range))?;
    /// assert_eq!(ignored, [1..3]);
    /// # Ok::<(), vesper_data::DataError>(())
    /// ```
    pub fn for_each_ignored(&self, range: Range<usize>, mut f: impl FnMut(Range<usize>)) -> Result<()> {
        if range.end > self.len {
            return Err(self.no_range(&range));
        }
        if !self.has_ignored() {
            return Ok(());
        }
        self.parts(range, &mut |stored, own| {
            self.storage.ignored(stored.clone(), &mut |ignored| {
                f(ignored.start - stored.start + own.start..ignored.end - stored.start + own.start);
            })
        })
    }

    /// All ids, copied into a vector.
    ///
    /// # Errors
    ///
    /// [`DataError::CacheDamaged`].
    pub fn to_vec(&self) -> Result<Vec<u32>> {
        self.get(0..self.len)
    }

    /// Where document `index` is, or the part of it that the view has.
    ///
    /// # Errors
    ///
    /// [`DataError::Range`] where there is no such document, [`DataError::CacheDamaged`].
    pub fn document(&self, index: usize) -> Result<Range<usize>> {
        let none = || DataError::Range {
            start: index as u64,
            end: (index as u64).saturating_add(1),
            len: self.documents as u64,
        };
        if index >= self.documents {
            return Err(none());
        }
        let (whole, stored) = self.stored(index).ok_or_else(none)??;
        let view = |position: usize| position - whole.run.start + whole.run.offset;
        Ok(view(stored.start)..view(stored.end))
    }

    /// Where document `index` is in the storage, or the part of it that the view has.
    pub(crate) fn stored_document(&self, index: usize) -> Result<Range<usize>> {
        let none = || self.no_range(&(index..index.saturating_add(1)));
        self.stored(index).ok_or_else(none)?.map(|(_, stored)| stored)
    }

    /// The run of document `index`, and where the document is in the storage.
    fn stored(&self, index: usize) -> Option<Result<(Whole, Range<usize>)>> {
        let whole = self.run(self.run_before(&self.by_document, index, |run| run.first))?;
        let stored = self.storage.document(whole.run.document + (index - whole.run.first));
        let inside = move |position: usize| position.clamp(whole.run.start, whole.storage_end());
        Some(stored.map(|stored| (whole, inside(stored.start)..inside(stored.end))))
    }

    /// Copies the ids from the storage's position `start` on, which must exist, into `out`.
    pub(crate) fn read_stored(&self, start: usize, out: &mut [u32]) -> Result<()> {
        self.storage.read(start, out)
    }

    /// Hands the parts of the storage's `range` that the loss leaves out to `f`, in order.
    pub(crate) fn for_each_ignored_stored(
        &self,
        range: Range<usize>,
        f: &mut dyn FnMut(Range<usize>),
    ) -> Result<()> {
        self.storage.ignored(range, f)
    }

    /// The documents in order.
    ///
    /// # Errors
    ///
    /// Yields [`DataError::CacheDamaged`].
    pub fn documents(&self) -> impl Iterator<Item = Result<Range<usize>>> + '_ {
        (0..self.documents).map(|index| self.document(index))
    }

    /// The document, in the view, with the token at `position`.
    fn document_at(&self, position: usize) -> Result<usize> {
        let Some(whole) = self.run(self.run_at(position)) else { return Ok(self.documents) };
        let stored = self.storage.document_after(whole.run.start + (position - whole.run.offset))?;
        Ok((whole.run.first + stored.saturating_sub(whole.run.document)).min(whole.documents_end))
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
    /// # Errors
    ///
    /// [`DataError::CacheDamaged`].
    ///
    /// # Examples
    ///
    /// ```
    /// use vesper_data::Tokens;
    ///
    /// let entropy = Tokens::from(vec![7_u32, 8, 7, 8]).unigram_entropy()?;
    /// assert!((entropy - 2f64.ln()).abs() < 1e-12);
    /// # Ok::<(), vesper_data::DataError>(())
    /// ```
    pub fn unigram_entropy(&self) -> Result<f64> {
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
        })?;
        let total = self.len as f64;
        // `- 0.0` of a stream with one kind of token prints as "-0".
        Ok(0.0_f64.max(
            flat.iter()
                .chain(sparse.values())
                .filter(|&&count| count > 0)
                .map(|&count| count as f64 / total)
                .map(|p| -p * p.ln())
                .sum(),
        ))
    }

    /// The highest id, or `None` for an empty stream.
    ///
    /// # Errors
    ///
    /// [`DataError::CacheDamaged`].
    pub fn max_id(&self) -> Result<Option<u32>> {
        let mut highest = None;
        self.for_each_chunk(|ids| highest = highest.max(ids.iter().copied().max()))?;
        Ok(highest)
    }

    /// Hands all ids to `f` in order, in pieces that fit the processor's cache.
    fn for_each_chunk(&self, mut f: impl FnMut(&[u32])) -> Result<()> {
        let mut buffer = [0_u32; 4096];
        let mut position = 0;
        while position < self.len {
            let take = (self.len - position).min(buffer.len());
            let chunk = buffer.get_mut(..take).unwrap_or_default();
            self.read_into(position, chunk)?;
            f(chunk);
            position += take;
        }
        Ok(())
    }

    /// A 64-bit number that differs for other data: of a cache from what it was made from, which needs no reading; of
    /// tokens in memory from up to 4096 of them.
    pub(crate) fn digest(&self) -> Result<u64> {
        const SAMPLES: usize = 4096;
        // FNV-1a.
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let mut add = |bytes: &[u8]| {
            for byte in bytes {
                hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
            }
        };
        add(&(self.len as u64).to_le_bytes());
        match &*self.storage {
            Storage::Cache(cache) => {
                let key = cache.key();
                add(&key.content);
                add(&key.tokenizer);
                add(&(cache.len() as u64).to_le_bytes());
                for run in self.runs.iter() {
                    add(&(run.start as u64).to_le_bytes());
                    add(&(run.offset as u64).to_le_bytes());
                }
            }
            Storage::Memory(_) => {
                let mut id = [0];
                let samples = SAMPLES.min(self.len);
                for sample in 0..samples {
                    self.read_into((sample as u128 * self.len as u128 / samples as u128) as usize, &mut id)?;
                    add(&id[0].to_le_bytes());
                }
            }
        }
        Ok(hash)
    }
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokens")
            .field("len", &self.len)
            .field("documents", &self.documents)
            .field("runs", &self.runs.len())
            .finish_non_exhaustive()
    }
}

impl From<Vec<u32>> for Tokens {
    /// One document.
    fn from(ids: Vec<u32>) -> Self {
        Self::whole(Storage::Memory(Memory::one_document(Ids::U32(ids))))
    }
}

impl From<Vec<u16>> for Tokens {
    /// One document.
    fn from(ids: Vec<u16>) -> Self {
        Self::whole(Storage::Memory(Memory::one_document(Ids::U16(ids))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_stream_has_no_entropy_and_no_highest_id() {
        let tokens = Tokens::from(Vec::<u32>::new());
        assert_eq!((tokens.unigram_entropy().unwrap(), tokens.max_id().unwrap()), (0.0, None));
    }

    #[test]
    fn entropy_counts_ids_of_any_size() {
        let tokens = Tokens::from(vec![0, u32::MAX, FLAT_COUNTS, FLAT_COUNTS - 1]);
        assert!((tokens.unigram_entropy().unwrap() - 4f64.ln()).abs() < 1e-12);
        assert_eq!(Tokens::from(vec![3_u32; 9]).unigram_entropy().unwrap().to_string(), "0");
    }

    #[test]
    fn ids_stay_two_bytes_wide_until_one_needs_four() {
        let narrow = Tokens::from_documents([Ok(vec![1, 65535])]).unwrap();
        let wide = Tokens::from_documents([Ok(vec![1, 65535]), Ok(vec![65536, 2])]).unwrap();
        let ids = |tokens: &Tokens| match &*tokens.storage {
            Storage::Memory(memory) => matches!(memory.ids, Ids::U16(_)),
            Storage::Cache(_) => panic!(),
        };
        assert!(ids(&narrow) && !ids(&wide));
        assert_eq!(wide.to_vec().unwrap(), [1, 65535, 65536, 2]);
        assert_eq!(wide.documents().map(Result::unwrap).collect::<Vec<_>>(), [0..2, 2..4]);
    }

    #[test]
    fn documents_and_ranges_that_there_are_not_are_errors() {
        let tokens = Tokens::from_documents([Ok(vec![1, 2]), Ok(vec![])]).unwrap();
        assert_eq!(tokens.document(1).unwrap(), 2..2);
        assert!(matches!(tokens.document(2), Err(DataError::Range { start: 2, end: 3, len: 2 })));
        assert!(tokens.document(usize::MAX).is_err());
        #[allow(clippy::reversed_empty_ranges)]
        let backwards = 2..1;
        assert!(tokens.get(backwards).is_err());
        assert!(tokens.read_into(usize::MAX, &mut [0]).is_err());
        assert!(tokens.for_each_ignored(0..3, |_| ()).is_err());
    }
}

//! Token ids in memory-mapped files, so that a data set is tokenised once.
//!
//! A cache is a folder: a manifest that says what it was made from (by SHA-256), and shards that hold the ids, an
//! index of the documents and the ranges that the loss leaves out. The byte layout is in the book's page
//! "The format of the token cache".
//!
//! [`TokenCache::open_or_build`] makes the cache anew when its sources or the tokenizer change. Opening reads headers
//! alone. Each shard has its checksums, which are verified when the shard is first used, or all at once by
//! [`TokenCache::verify`], at 1 GB/s and more on a processor with SHA instructions.

mod build;
mod fields;
mod lock;
mod manifest;
mod shard;
mod stamp;
mod write;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use crate::error::{DataError, Result};
use crate::tokenizer::Encoded;
use crate::tokens::Tokens;
use manifest::Manifest;
use shard::Shard;
use write::Plan;

pub use build::{BuildPhase, BuildProgress, CacheBuilder, CacheStatus, RebuildReason};
pub(crate) use manifest::MANIFEST;

/// What a cache was made from: two caches with equal keys hold equal tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheKey {
    /// SHA-256 over the sources: how they are read, and the length and SHA-256 of each file.
    pub content: [u8; 32],
    /// SHA-256 of the tokenizer, as [`crate::TextTokenizer::fingerprint`] computes it.
    pub tokenizer: [u8; 32],
    /// The tokenizer's vocabulary size: every id is below it. Up to 65536, ids take two bytes, else four.
    pub vocab_size: u64,
}

/// What was counted while the text of a cache was read; all 0 where it was not made from text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TextCounts {
    /// Bytes of the documents' text, without what file formats put around it.
    pub bytes: u64,
    /// Characters of these.
    pub characters: u64,
    /// Records that were broken and passed over.
    pub skipped: u64,
    /// Questions, of files and records with questions and answers on a text.
    pub questions: u64,
    /// Those of the questions that the text does not answer.
    pub impossible: u64,
    /// Answers that are not where the file says, but elsewhere in the text.
    pub wrong_offsets: u64,
}

/// An open cache: cheap to clone, since the maps are shared.
///
/// # Safety of the memory map
///
/// The shards are mapped, not read. A program that changes or shortens one while it is mapped changes the ids under
/// this program, or has the system stop it: leave an open cache alone. This crate itself never writes into a finished
/// shard; a cache that is made anew gets new ones. On Windows the old ones stay as long as they are open, and are
/// removed by the next build.
///
/// # Examples
///
/// ```
/// use vesper_data::{CacheKey, TokenCache};
///
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("tokens");
/// let key = CacheKey { content: [0; 32], tokenizer: [0; 32], vocab_size: 100 };
/// TokenCache::build(&path, key, [Ok(vec![5, 99, 0]), Ok(vec![7, 0])])?;
///
/// let cache = TokenCache::open(&path)?;
/// assert_eq!(cache.tokens().to_vec()?, [5, 99, 0, 7, 0]);
/// assert_eq!(cache.document_count(), 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct TokenCache {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    manifest: Manifest,
    shards: Vec<Shard>,
}

impl TokenCache {
    /// Opens a cache: reads its manifest and the headers of its shards, and nothing else.
    ///
    /// # Errors
    ///
    /// [`DataError::Missing`], [`DataError::CacheVersion`] for a cache of another version of the format, and
    /// [`DataError::CacheDamaged`] for a file of it that is missing, cut short, or something else altogether. What is
    /// wrong inside of a shard comes up when it is first used: see [`verify`](Self::verify).
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let manifest = Manifest::read(path)?;
        Self::open_shards(path, manifest)
    }

    fn open_shards(path: &Path, manifest: Manifest) -> Result<Self> {
        let plan = Plan::new(path, manifest.key, manifest.shard_tokens);
        let count = manifest.shards.len();
        let (mut tokens, mut documents) = (0, 0);
        let mut shards = Vec::with_capacity(count);
        for (index, entry) in manifest.shards.iter().enumerate() {
            let file = plan.shard_path(index as u64);
            let shard = Shard::open(&file, manifest.key.vocab_size).map_err(|error| match error {
                DataError::Missing { path } => {
                    DataError::CacheDamaged { path, problem: format!("shard {index} of {count} is missing") }
                }
                other => other,
            })?;
            let header = shard.header();
            let expected = (manifest.width, index as u64, tokens, documents);
            if (header.width, header.index, header.first_token, header.first_document) != expected
                || header.entry() != *entry
            {
                return Err(shard.damaged("it is not the one that the manifest names"));
            }
            tokens += header.tokens;
            documents += header.documents;
            shards.push(shard);
        }
        Ok(Self { inner: Arc::new(Inner { path: path.to_path_buf(), manifest, shards }) })
    }

    /// Writes a cache of `documents` into the folder `path` (created where missing) and opens it: see
    /// [`CacheBuilder::build`].
    ///
    /// # Errors
    ///
    /// The first error of the iterator, [`DataError::TokenRange`] for an id not below `key.vocab_size`, or
    /// [`DataError::Io`] where a file cannot be written.
    pub fn build<I, T>(path: impl AsRef<Path>, key: CacheKey, documents: I) -> Result<Self>
    where
        I: IntoIterator<Item = Result<T>>,
        T: Into<Encoded>,
    {
        CacheBuilder::new().build(path, key, documents)
    }

    /// Reads the whole cache and verifies it: every checksum, every id and every document's end. What was verified
    /// before, here or on first use, is not read again.
    ///
    /// # Errors
    ///
    /// [`DataError::CacheDamaged`] that names the first shard that is damaged.
    ///
    /// # Examples
    ///
    /// ```
    /// use vesper_data::{CacheKey, TokenCache};
    ///
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("tokens");
    /// let key = CacheKey { content: [0; 32], tokenizer: [0; 32], vocab_size: 100 };
    /// TokenCache::build(&path, key, [Ok(vec![5, 99, 0])])?;
    /// TokenCache::open(&path)?.verify()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn verify(&self) -> Result<()> {
        let results: Vec<Result<()>> = self
            .inner
            .shards
            .par_iter()
            .map(|shard| shard.verify_index().and_then(|()| shard.verify_ids()))
            .collect();
        results.into_iter().collect()
    }

    /// The folder of the cache.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The files of the shards, in order.
    pub fn shards(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.inner.shards.iter().map(Shard::path)
    }

    /// What the cache was made from.
    pub fn key(&self) -> CacheKey {
        self.inner.manifest.key
    }

    /// The number of tokens.
    pub fn len(&self) -> usize {
        // The shards' lengths were compared with the counts, so these fit the address space.
        self.inner.manifest.tokens as usize
    }

    /// Whether there is no token at all.
    pub fn is_empty(&self) -> bool {
        self.inner.manifest.tokens == 0
    }

    /// The number of documents.
    pub fn document_count(&self) -> usize {
        self.inner.manifest.documents as usize
    }

    /// How many times the tokenizer met text that it had no token for: lost text, where it is not 0.
    pub fn unknown_tokens(&self) -> u64 {
        self.inner.manifest.unknown
    }

    /// How many records of the sources were broken and passed over.
    pub fn skipped_records(&self) -> u64 {
        self.inner.manifest.text.skipped
    }

    /// What was counted while the text was read, so that it need not be read again for that.
    ///
    /// # Examples
    ///
    /// ```
    /// use vesper_data::{Sources, TextTokenizer, TokenCache};
    ///
    /// # let folder = tempfile::tempdir()?;
    /// let source = folder.path().join("a.txt");
    /// std::fs::write(&source, "L'été.")?;
    /// let tokenizer = TextTokenizer::train_bpe([Ok("L'été.")], 260)?;
    /// let (cache, _) = TokenCache::open_or_build(folder.path(), &Sources::new([source]), &tokenizer)?;
    /// let counts = cache.text_counts();
    /// assert_eq!((counts.bytes, counts.characters, counts.skipped), (8, 6, 0));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn text_counts(&self) -> TextCounts {
        self.inner.manifest.text
    }

    /// The bytes of the documents' text; 0 where the cache was not made from text.
    pub fn text_bytes(&self) -> u64 {
        self.inner.manifest.text.bytes
    }

    /// Whether the loss leaves out some of the tokens: see [`Encoded::loss`].
    pub fn has_ignored(&self) -> bool {
        self.inner.shards.iter().any(Shard::has_ignored)
    }

    /// The stream of ids, which keeps the files open.
    pub fn tokens(&self) -> Tokens {
        Tokens::from_cache(self.clone())
    }

    /// The shard with the token at `position`, where there is one.
    fn shard_of(&self, position: usize) -> Option<&Shard> {
        let shards = &self.inner.shards;
        let after = shards.partition_point(|shard| shard.tokens().start <= position);
        // Shards without tokens start where the next one does.
        shards.get(after.checked_sub(1)?).filter(|shard| shard.tokens().contains(&position))
    }

    fn shard_of_document(&self, index: usize) -> Option<&Shard> {
        let shards = &self.inner.shards;
        let after = shards.partition_point(|shard| shard.documents().start <= index);
        shards.get(after.checked_sub(1)?).filter(|shard| shard.documents().contains(&index))
    }

    /// Where document `index`, which must exist, is.
    pub(crate) fn document(&self, index: usize) -> Result<Range<usize>> {
        let shard = self.shard_of_document(index).ok_or_else(|| self.no_document(index))?;
        let (own, first) = (shard.document(index - shard.documents().start)?, shard.tokens().start);
        Ok(first + own.start..first + own.end)
    }

    /// The hash of document `index`, which must exist.
    pub(crate) fn document_hash(&self, index: usize) -> Result<u64> {
        let shard = self.shard_of_document(index).ok_or_else(|| self.no_document(index))?;
        shard.document_hash(index - shard.documents().start)
    }

    fn no_document(&self, index: usize) -> DataError {
        let (start, len) = (index as u64, self.document_count() as u64);
        DataError::Range { start, end: start.saturating_add(1), len }
    }

    /// The first document that ends past `position`.
    pub(crate) fn document_after(&self, position: usize) -> Result<usize> {
        match self.shard_of(position) {
            Some(shard) => {
                let tokens = shard.tokens();
                Ok(shard.documents().start + shard.document_after(position - tokens.start)?)
            }
            None => Ok(self.document_count()),
        }
    }

    /// Writes ids `start..start + out.len()`, which must exist, into `out`.
    pub(crate) fn read_into(&self, start: usize, out: &mut [u32]) -> Result<()> {
        self.in_shards(start..start.saturating_add(out.len()), &mut |shard, part| {
            let own = part.start - shard.tokens().start;
            shard.read(own, out.get_mut(part.start - start..part.end - start).unwrap_or_default())
        })
    }

    /// Hands the parts of `range` that the loss leaves out to `f`.
    pub(crate) fn ignored(&self, range: Range<usize>, f: &mut dyn FnMut(Range<usize>)) -> Result<()> {
        self.in_shards(range, &mut |shard, part| {
            let first = shard.tokens().start;
            shard.ignored(part.start - first..part.end - first, &mut |own| {
                f(own.start + first..own.end + first);
            })
        })
    }

    /// Calls `f` with each shard that has a part of `range`, and that part.
    fn in_shards(
        &self,
        range: Range<usize>,
        f: &mut dyn FnMut(&Shard, Range<usize>) -> Result<()>,
    ) -> Result<()> {
        let mut position = range.start;
        while position < range.end {
            let Some(shard) = self.shard_of(position) else {
                let (start, end) = (range.start as u64, range.end as u64);
                return Err(DataError::Range { start, end, len: self.len() as u64 });
            };
            let end = range.end.min(shard.tokens().end);
            f(shard, position..end)?;
            position = end;
        }
        Ok(())
    }
}

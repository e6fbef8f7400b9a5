//! A memory-mapped file of token ids, so that a data set is tokenised once.
//!
//! The file names the sources' bytes and the tokenizer it was made from (by SHA-256): when either changes,
//! [`TokenCache::open_or_build`] makes it anew. All bytes are covered by checksums, which are verified each
//! time the file is opened: that reads it once, at about 1 GB/s on a processor with SHA instructions.

mod header;
mod open;
mod write;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use sha2::{Digest, Sha256};

use crate::error::{DataError, Result};
use crate::tokenizer::Encoded;
use crate::tokens::Tokens;
use header::{HEADER_BYTES, Header, HeaderError, VERSION, Width};

pub use open::{CacheStatus, RebuildReason};

/// What a cache was made from: two caches with equal keys hold equal tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheKey {
    /// SHA-256 over the sources' bytes, as [`crate::source::content_digest`] computes it.
    pub content: [u8; 32],
    /// SHA-256 of the tokenizer, as [`crate::TextTokenizer::fingerprint`] computes it.
    pub tokenizer: [u8; 32],
    /// The tokenizer's vocabulary size: every id is below it. Up to 65536, ids take two bytes, else four.
    pub vocab_size: u64,
}

/// An open cache file: cheap to clone, since the map is shared.
///
/// # Safety of the memory map
///
/// The file is mapped, not read. A program that changes or shortens it while it is mapped changes the ids
/// under this program, or has the system stop it: leave an open cache alone. This crate itself never writes
/// into a finished cache; it puts a new file in its place. On Windows the system refuses that as long as the
/// old file is open, so drop every [`TokenCache`] and [`Tokens`] of a cache before it is built again.
///
/// # Examples
///
/// ```
/// use vesper_data::{CacheKey, Encoded, TokenCache};
///
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("tokens.bin");
/// let key = CacheKey { content: [0; 32], tokenizer: [0; 32], vocab_size: 100 };
/// TokenCache::build(&path, key, [Ok(vec![5, 99, 0]), Ok(vec![7, 0])])?;
///
/// let cache = TokenCache::open(&path)?;
/// assert_eq!(cache.tokens().to_vec(), [5, 99, 0, 7, 0]);
/// assert_eq!(cache.document_count(), 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct TokenCache {
    map: Arc<Mmap>,
    header: Header,
    path: PathBuf,
}

impl TokenCache {
    /// Opens a cache and verifies all of it.
    ///
    /// # Errors
    ///
    /// [`DataError::Missing`], [`DataError::CacheVersion`] for a file of another version of the format, and
    /// [`DataError::CacheDamaged`] for a file that is cut short, changed, or something else altogether.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (file, header) = open_header(path)?;
        // SAFETY: the map is read-only and its length is the file's, which `open_header` has compared with
        // the header. What is left is the file changing while it is mapped: the type's documentation rules it
        // out, and this crate replaces cache files instead of writing into them.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| DataError::io("map", path, error))?;
        let cache = Self { map: Arc::new(map), header, path: path.to_path_buf() };
        cache.verify()?;
        Ok(cache)
    }

    /// Writes a cache of `documents` to `path` and opens it.
    ///
    /// The file appears under its name only when it is complete: it is written to a temporary file in the
    /// same folder (created where missing), synchronised and renamed.
    ///
    /// # Errors
    ///
    /// The first error of the iterator, [`DataError::TokenRange`] for an id not below `key.vocab_size`, or
    /// [`DataError::Io`] where the file cannot be written.
    pub fn build<I, T>(path: impl AsRef<Path>, key: CacheKey, documents: I) -> Result<Self>
    where
        I: IntoIterator<Item = Result<T>>,
        T: Into<Encoded>,
    {
        let path = path.as_ref();
        write::write(path, key, documents)?;
        Self::open(path)
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the cache was made from.
    pub fn key(&self) -> CacheKey {
        self.header.key
    }

    /// The number of tokens.
    pub fn len(&self) -> usize {
        // The file's length was compared with the header, so the count fits the address space.
        self.header.tokens as usize
    }

    /// Whether there is no token at all.
    pub fn is_empty(&self) -> bool {
        self.header.tokens == 0
    }

    /// The number of documents.
    pub fn document_count(&self) -> usize {
        self.header.documents as usize
    }

    /// How many times the tokenizer met text that it had no token for: lost text, where it is not 0.
    pub fn unknown_tokens(&self) -> u64 {
        self.header.unknown
    }

    /// The stream of ids, which keeps the file open.
    pub fn tokens(&self) -> Tokens {
        Tokens::from_cache(self.clone())
    }

    /// One past the last position of document `index`.
    pub(crate) fn document_end(&self, index: usize) -> Option<usize> {
        let start = HEADER_BYTES.checked_add(self.header.id_bytes()? as usize)?;
        let (bytes, _) = self.map.get(start..)?.as_chunks::<8>();
        bytes.get(index).map(|end| u64::from_le_bytes(*end) as usize)
    }

    /// Writes ids `start..start + out.len()` into `out`; says whether the cache has them.
    pub(crate) fn read_into(&self, start: usize, out: &mut [u32]) -> bool {
        let Some(end) = start.checked_add(out.len()).filter(|&end| end <= self.len()) else { return false };
        let bytes_at = |token: usize| HEADER_BYTES + token * self.header.width.bytes();
        let Some(bytes) = self.map.get(bytes_at(start)..bytes_at(end)) else { return false };
        match self.header.width {
            Width::Two => {
                let (ids, _) = bytes.as_chunks::<2>();
                out.iter_mut().zip(ids).for_each(|(out, id)| *out = u16::from_le_bytes(*id).into());
            }
            Width::Four => {
                let (ids, _) = bytes.as_chunks::<4>();
                out.iter_mut().zip(ids).for_each(|(out, id)| *out = u32::from_le_bytes(*id));
            }
        }
        true
    }

    fn damaged(&self, problem: impl Into<String>) -> DataError {
        DataError::CacheDamaged { path: self.path.clone(), problem: problem.into() }
    }

    /// Checks everything behind the header: the checksum, each id and each document's end.
    fn verify(&self) -> Result<()> {
        let payload =
            self.map.get(HEADER_BYTES..).ok_or_else(|| self.damaged("it was cut while it was opened"))?;
        if Sha256::digest(payload)[..] != self.header.payload_digest[..] {
            return Err(self.damaged("the checksum of its tokens does not match"));
        }
        // The checksum guards against accidents, the rest against a file that was made wrong on purpose.
        let mut ids = vec![0; 1 << 16];
        let mut position = 0;
        while position < self.len() {
            let take = (self.len() - position).min(ids.len());
            let chunk = ids.get_mut(..take).unwrap_or_default();
            self.read_into(position, chunk);
            if let Some(&id) = chunk.iter().find(|&&id| u64::from(id) >= self.header.key.vocab_size) {
                let size = self.header.key.vocab_size;
                return Err(self.damaged(format!("it holds id {id}, expected ids below {size}")));
            }
            position += take;
        }
        let mut last = 0;
        for index in 0..self.document_count() {
            let end = self.document_end(index).unwrap_or(usize::MAX);
            if end < last || end > self.len() {
                return Err(self.damaged(format!(
                    "document {index} ends at token {end}, expected {last} to {}",
                    self.len()
                )));
            }
            last = end;
        }
        if self.document_count() > 0 && last != self.len() {
            return Err(self.damaged(format!("its documents end at {last} of {} tokens", self.len())));
        }
        Ok(())
    }
}

/// Opens a file and reads its header; the file's length fits it.
fn open_header(path: &Path) -> Result<(File, Header)> {
    let read = |error| DataError::io("read", path, error);
    let mut file = File::open(path).map_err(|error| DataError::io("open", path, error))?;
    let metadata = file.metadata().map_err(read)?;
    let mut bytes = Vec::with_capacity(HEADER_BYTES);
    (&mut file).take(HEADER_BYTES as u64).read_to_end(&mut bytes).map_err(read)?;
    let header = Header::parse(&bytes, metadata.len()).map_err(|error| match error {
        HeaderError::Version(found) => {
            DataError::CacheVersion { path: path.to_path_buf(), found, supported: VERSION }
        }
        HeaderError::Damaged(problem) => DataError::CacheDamaged { path: path.to_path_buf(), problem },
    })?;
    if usize::try_from(metadata.len()).is_err() {
        let problem = format!("it has {} bytes, more than this machine can map", metadata.len());
        return Err(DataError::CacheDamaged { path: path.to_path_buf(), problem });
    }
    Ok((file, header))
}

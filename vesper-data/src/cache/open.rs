//! Reusing a cache as long as it fits its sources and tokenizer.

use std::fmt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{CacheKey, TokenCache, open_header};
use crate::error::{DataError, Result};
use crate::source::{Documents, content_digest};
use crate::tokenizer::TextTokenizer;

/// What [`TokenCache::open_or_build`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CacheStatus {
    /// The file was there and fits.
    Reused,
    /// There was no file.
    Built,
    /// There was a file, made from something else.
    Rebuilt(RebuildReason),
}

/// Why a cache file was made anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RebuildReason {
    /// The sources' bytes differ.
    SourcesChanged,
    /// The tokenizer differs.
    TokenizerChanged,
    /// Both differ.
    SourcesAndTokenizerChanged,
}

impl fmt::Display for CacheStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reused => "reused",
            Self::Built => "built",
            Self::Rebuilt(RebuildReason::SourcesChanged) => "rebuilt, since the data changed",
            Self::Rebuilt(RebuildReason::TokenizerChanged) => "rebuilt, since the tokenizer changed",
            Self::Rebuilt(RebuildReason::SourcesAndTokenizerChanged) => {
                "rebuilt, since the data and the tokenizer changed"
            }
        })
    }
}

impl TokenCache {
    /// Opens the cache of `sources` in the folder `dir`, after building it where there is none or where the
    /// sources' bytes or the tokenizer are no longer those it was built from.
    ///
    /// Each document ends with the tokenizer's end-of-text id, where it has one. The file's name depends on
    /// the sources' paths, so that one folder can hold the caches of several data sets. All sources are read
    /// once to see whether they changed.
    ///
    /// # Errors
    ///
    /// Those of [`Documents::open`] and of the tokenizer; [`DataError::CacheDamaged`] where the file is
    /// there, but cut short or changed (it is left as it is: the message says to delete it);
    /// [`DataError::SourceChanged`] where a source changes while it is tokenised.
    ///
    /// # Examples
    ///
    /// ```
    /// use vesper_data::{CacheStatus, TextTokenizer, TokenCache};
    ///
    /// # let folder = tempfile::tempdir()?;
    /// let source = folder.path().join("story.txt");
    /// std::fs::write(&source, "Once upon a time.")?;
    /// let tokenizer = TextTokenizer::train_bpe([Ok("Once upon a time.")], 260)?;
    ///
    /// let (_, status) = TokenCache::open_or_build(folder.path(), &[source.clone()], &tokenizer)?;
    /// assert_eq!(status, CacheStatus::Built);
    /// let (cache, status) = TokenCache::open_or_build(folder.path(), &[source], &tokenizer)?;
    /// assert_eq!(status, CacheStatus::Reused);
    /// assert_eq!(tokenizer.decode(&cache.tokens().to_vec())?, "Once upon a time.");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open_or_build(
        dir: impl AsRef<Path>,
        sources: &[PathBuf],
        tokenizer: &TextTokenizer,
    ) -> Result<(Self, CacheStatus)> {
        let path = dir.as_ref().join(file_name(sources)?);
        let key = CacheKey {
            content: content_digest(sources)?,
            tokenizer: tokenizer.fingerprint(),
            vocab_size: tokenizer.vocab_size() as u64,
        };
        // Only the header is read here, and the file is closed again: Windows renames over no open file.
        let status = match open_header(&path).map(|(_, header)| header.key) {
            Ok(found) if found == key => return Ok((Self::open(&path)?, CacheStatus::Reused)),
            Ok(found) => {
                CacheStatus::Rebuilt(match (found.content == key.content, found.tokenizer == key.tokenizer) {
                    (true, _) => RebuildReason::TokenizerChanged,
                    (false, true) => RebuildReason::SourcesChanged,
                    (false, false) => RebuildReason::SourcesAndTokenizerChanged,
                })
            }
            Err(DataError::Missing { .. }) => CacheStatus::Built,
            Err(error) => return Err(error),
        };
        // A source that changes meanwhile must not be stored under the key of what it was before.
        let unchanged = std::iter::once_with(|| match content_digest(sources) {
            Ok(now) if now == key.content => None,
            Ok(_) => {
                Some(Err(DataError::SourceChanged { path: sources.first().cloned().unwrap_or_default() }))
            }
            Err(error) => Some(Err(error)),
        });
        let documents = tokenizer.encode_documents(Documents::open(sources)?).chain(unchanged.flatten());
        let cache = Self::build(&path, key, documents)?;
        Ok((cache, status))
    }
}

/// The name of the cache file of these paths.
fn file_name(sources: &[PathBuf]) -> Result<String> {
    let mut digest = Sha256::new();
    for source in sources {
        let path = std::path::absolute(source).map_err(|error| DataError::io("find", source, error))?;
        digest.update(path.to_string_lossy().as_bytes());
        digest.update([0]);
    }
    let digest: [u8; 32] = digest.finalize().into();
    let short = u64::from_be_bytes(*digest.first_chunk().unwrap_or(&[0; 8]));
    Ok(format!("tokens-{short:016x}.bin"))
}

//! Building a cache, and reusing it as long as it fits its sources and tokenizer.

use std::cell::OnceCell;
use std::fmt;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

use super::fields::short_hex;
use super::lock::Lock;
use super::manifest::Manifest;
use super::stamp::{Files, SourceStamp, content, first_difference};
use super::write::{Done, Plan, Writer};
use super::{CacheKey, TextCounts, TokenCache};
use crate::error::{DataError, Result};
use crate::source::{Document, ReadReport, Sources};
use crate::tokenizer::{Encoded, TextTokenizer};

/// What [`TokenCache::open_or_build`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CacheStatus {
    /// The cache was there and fits.
    Reused,
    /// There was no cache.
    Built,
    /// There was a part of the cache, of an earlier build that was stopped: what was missing was built.
    Continued,
    /// There was a cache, made from something else.
    Rebuilt(RebuildReason),
}

/// Why a cache was made anew. Of the sources it names the first file that is new, gone or other than it was; none where
/// only the way they are read differs.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RebuildReason {
    /// The sources' bytes, or the way they are read, differ.
    SourcesChanged(Option<PathBuf>),
    /// The tokenizer differs.
    TokenizerChanged,
    /// Both differ.
    SourcesAndTokenizerChanged(Option<PathBuf>),
}

impl fmt::Display for CacheStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, file) = match self {
            Self::Reused => ("reused", &None),
            Self::Built => ("built", &None),
            Self::Continued => ("built, from where an earlier build stopped", &None),
            Self::Rebuilt(RebuildReason::SourcesChanged(file)) => ("rebuilt, since the data changed", file),
            Self::Rebuilt(RebuildReason::TokenizerChanged) => ("rebuilt, since the tokenizer changed", &None),
            Self::Rebuilt(RebuildReason::SourcesAndTokenizerChanged(file)) => {
                ("rebuilt, since the data and the tokenizer changed", file)
            }
        };
        match file {
            Some(file) => write!(f, "{what} ({})", file.display()),
            None => f.write_str(what),
        }
    }
}

/// What a build is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BuildPhase {
    /// Another process, or another thread, builds the same cache: this one waits, and then uses that.
    Waiting,
    /// The shards that an earlier build finished are verified.
    Verifying,
    /// The documents of these shards are read and passed over.
    Skipping,
    /// Documents are tokenised and written.
    Tokenizing,
}

/// How far a build has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BuildProgress {
    /// What is being done.
    pub phase: BuildPhase,
    /// Documents done, those of earlier builds included.
    pub documents: u64,
    /// Tokens of these.
    pub tokens: u64,
    /// Bytes of text read so far, which is some megabytes ahead of the documents; 0 where documents come as ids.
    pub bytes: u64,
    /// Bytes of all source files: more or less than there are bytes of text, where the format has more than text in
    /// it or is compressed; 0 where documents come as ids.
    pub source_bytes: u64,
}

type Callback<'a> = Box<dyn FnMut(&BuildProgress) -> ControlFlow<()> + 'a>;

/// Opens caches and builds them, with settings.
///
/// # Examples
///
/// ```
/// use std::ops::ControlFlow;
/// use vesper_data::{CacheBuilder, Sources, TextTokenizer};
///
/// # let folder = tempfile::tempdir()?;
/// let source = folder.path().join("story.txt");
/// std::fs::write(&source, "Once upon a time.")?;
/// let tokenizer = TextTokenizer::train_bpe([Ok("Once upon a time.")], 260)?;
///
/// let mut documents = 0;
/// let builder = CacheBuilder::new().with_shard_tokens(1 << 20).on_progress(|progress| {
///     documents = progress.documents; // ControlFlow::Break(()) would stop the build
///     ControlFlow::Continue(())
/// });
/// let (cache, _) = builder.open_or_build(folder.path(), &Sources::new([source]), &tokenizer)?;
/// assert_eq!(cache.document_count(), 1);
/// assert_eq!(documents, 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct CacheBuilder<'a> {
    shard_tokens: u64,
    callback: Option<Callback<'a>>,
    report: ReadReport,
}

impl fmt::Debug for CacheBuilder<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CacheBuilder").field("shard_tokens", &self.shard_tokens).finish_non_exhaustive()
    }
}

impl Default for CacheBuilder<'_> {
    fn default() -> Self {
        Self { shard_tokens: 64 << 20, callback: None, report: ReadReport::default() }
    }
}

impl<'a> CacheBuilder<'a> {
    /// The usual settings.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the most tokens of a shard; one document that is longer makes a longer shard. Default 64 Mi (128 or
    /// 256 MB), at least 1. A build that is stopped loses no more than one unfinished shard. It has no influence on
    /// the tokens, but a build with another setting does not go on where one with this setting stopped.
    pub fn with_shard_tokens(mut self, tokens: u64) -> Self {
        self.shard_tokens = tokens;
        self
    }

    /// Calls `f` for each document and while waiting. When it answers [`ControlFlow::Break`], the build stops with
    /// [`DataError::Interrupted`]; the shards that are finished stay for the next one.
    pub fn on_progress(mut self, f: impl FnMut(&BuildProgress) -> ControlFlow<()> + 'a) -> Self {
        self.callback = Some(Box::new(f));
        self
    }

    /// Has what is read while a cache is built counted in `report`, of which the caller keeps a clone: which records
    /// are broken, with file and line. A cache that is reused leaves it as it is; [`TokenCache::text_counts`] has the
    /// counts of either.
    pub fn with_report(mut self, report: ReadReport) -> Self {
        self.report = report;
        self
    }

    fn check(&self) -> Result<()> {
        if self.shard_tokens == 0 {
            let expected = "at least 1";
            return Err(DataError::Config { name: "shard_tokens", got: "0".into(), expected });
        }
        Ok(())
    }

    /// Writes a cache of `documents` into the folder `path` (created where missing) and opens it.
    ///
    /// Each shard is written to a temporary file, synchronised and renamed; the manifest comes last, so the cache is
    /// there complete or not at all. Shards of the same `key` and settings that are there already, from a build that
    /// was stopped, are verified and kept: `documents` must then begin with the same documents again, which are
    /// passed over. While another process builds in the same folder, this one waits.
    ///
    /// # Errors
    ///
    /// The first error of the iterator, [`DataError::TokenRange`] for an id not below `key.vocab_size`,
    /// [`DataError::SourceChanged`] where there are fewer documents than there were, [`DataError::Interrupted`], or
    /// [`DataError::Io`] where a file cannot be written.
    pub fn build<I, T>(mut self, path: impl AsRef<Path>, key: CacheKey, documents: I) -> Result<TokenCache>
    where
        I: IntoIterator<Item = Result<T>>,
        T: Into<Encoded>,
    {
        self.check()?;
        let path = path.as_ref();
        let plan = Plan::new(path, key, self.shard_tokens);
        let mut reporter =
            Reporter { callback: self.callback.take(), path, progress: progress(0), bytes: None };
        let _lock = Lock::acquire(path, || reporter.report(BuildPhase::Waiting))?;
        plan.clean_temporary();
        let done = plan.finished(|| reporter.report(BuildPhase::Verifying))?;
        let mut documents = documents.into_iter();
        for document in 0..done.documents {
            reporter.progress.documents = document;
            reporter.report(BuildPhase::Skipping)?;
            documents.next().ok_or_else(|| DataError::SourceChanged { path: path.to_path_buf() })??;
        }
        let manifest = plan.manifest(write(&plan, done, documents, &mut reporter, &|| Ok(()))?);
        manifest.write(path)?;
        plan.clean(manifest.shards.len());
        TokenCache::open_shards(path, manifest)
    }

    /// Opens the cache of `sources` in the folder `dir`, after building it where that is needed: see
    /// [`TokenCache::open_or_build`].
    ///
    /// # Errors
    ///
    /// Those of [`TokenCache::open_or_build`], and [`DataError::Interrupted`].
    pub fn open_or_build(
        mut self,
        dir: impl AsRef<Path>,
        sources: &Sources,
        tokenizer: &TextTokenizer,
    ) -> Result<(TokenCache, CacheStatus)> {
        self.check()?;
        let folder = dir.as_ref().join(folder_name(sources)?);
        let recipe = Recipe {
            folder: &folder,
            settings: sources.settings_digest()?,
            files: Files::look(sources.files()?)?,
            digested: OnceCell::new(),
            tokenizer,
        };
        if let Verdict::Fits(manifest) = recipe.compare()? {
            return Ok((TokenCache::open_shards(&folder, *manifest)?, CacheStatus::Reused));
        }

        let bytes = Arc::new(AtomicU64::new(0));
        let progress = progress(recipe.files.bytes());
        let callback = self.callback.take();
        let mut reporter = Reporter { callback, path: &folder, progress, bytes: Some(Arc::clone(&bytes)) };
        let _lock = Lock::acquire(&folder, || reporter.report(BuildPhase::Waiting))?;
        // Another process may have built it meanwhile.
        let reason = match recipe.compare()? {
            Verdict::Fits(manifest) => {
                return Ok((TokenCache::open_shards(&folder, *manifest)?, CacheStatus::Reused));
            }
            Verdict::Stale(reason) => Some(reason),
            Verdict::Missing => None,
        };

        let digested = recipe.digest(&[])?;
        let plan = Plan::new(&folder, recipe.key(digested), self.shard_tokens);
        plan.clean_temporary();
        let done = plan.finished(|| reporter.report(BuildPhase::Verifying))?;
        let status = match (reason, done.documents) {
            (Some(reason), _) => CacheStatus::Rebuilt(reason),
            (None, 0) => CacheStatus::Built,
            (None, _) => CacheStatus::Continued,
        };
        let report = self.report;
        let before = TextCounts::of(&report);
        let mut documents = sources.read(report.clone())?;
        let mut counted = documents.by_ref().inspect(|document: &Result<Document>| {
            if let Ok(document) = document {
                bytes.fetch_add(document.text.len() as u64, Ordering::Relaxed);
            }
        });
        for document in 0..done.documents {
            reporter.progress.documents = document;
            reporter.report(BuildPhase::Skipping)?;
            let changed =
                || DataError::SourceChanged { path: sources.paths().first().cloned().unwrap_or_default() };
            counted.next().ok_or_else(changed)??;
        }
        // A source that changes meanwhile must not be stored under the key of what it was before.
        let unchanged = || recipe.files.check(digested);
        let encoded = tokenizer.encode_documents(counted);
        let done = write(&plan, done, encoded, &mut reporter, &unchanged)?;
        unchanged()?;
        let manifest = Manifest {
            settings: recipe.settings,
            files: digested.to_vec(),
            text: TextCounts::of(&report).since(before),
            ..plan.manifest(done)
        };
        manifest.write(&folder)?;
        plan.clean(manifest.shards.len());
        Ok((TokenCache::open_shards(&folder, manifest)?, status))
    }
}

impl TokenCache {
    /// Opens the cache of `sources` in the folder `dir`, after building it where there is none or where the
    /// sources' bytes or the tokenizer are no longer those it was built from.
    ///
    /// Each document ends with the tokenizer's end-of-text id, where it has one. The name of the cache's folder
    /// depends on the sources' paths, so that `dir` can hold the caches of several data sets.
    ///
    /// Whether a source changed is seen from its length and its modification time; where these differ, or the time
    /// was too recent to tell, from the SHA-256 of its bytes. A change that keeps the length and puts the time back
    /// is not noticed: delete the folder of the cache after such a change.
    ///
    /// A build that was stopped is continued: its finished shards are verified and kept, and only the rest is
    /// tokenised. While another process builds the same cache, this one waits and then uses it.
    ///
    /// # Errors
    ///
    /// Those of [`Sources::documents`] and of the tokenizer; [`DataError::CacheDamaged`] or
    /// [`DataError::CacheVersion`] where a cache is there, but cannot be opened (it is left as it is: the message
    /// says what to delete); [`DataError::SourceChanged`] where a source changes while it is tokenised. What is wrong
    /// inside of a shard comes up when it is first used: see [`verify`](Self::verify).
    ///
    /// # Examples
    ///
    /// ```
    /// use vesper_data::{CacheStatus, Sources, TextTokenizer, TokenCache};
    ///
    /// # let folder = tempfile::tempdir()?;
    /// let source = folder.path().join("story.txt");
    /// std::fs::write(&source, "Once upon a time.")?;
    /// let tokenizer = TextTokenizer::train_bpe([Ok("Once upon a time.")], 260)?;
    /// let sources = Sources::new([source]);
    ///
    /// let (_, status) = TokenCache::open_or_build(folder.path(), &sources, &tokenizer)?;
    /// assert_eq!(status, CacheStatus::Built);
    /// let (cache, status) = TokenCache::open_or_build(folder.path(), &sources, &tokenizer)?;
    /// assert_eq!(status, CacheStatus::Reused);
    /// assert_eq!(tokenizer.decode(&cache.tokens().to_vec()?)?, "Once upon a time.");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open_or_build(
        dir: impl AsRef<Path>,
        sources: &Sources,
        tokenizer: &TextTokenizer,
    ) -> Result<(Self, CacheStatus)> {
        CacheBuilder::new().open_or_build(dir, sources, tokenizer)
    }
}

impl TextCounts {
    fn of(report: &ReadReport) -> Self {
        Self {
            bytes: report.bytes(),
            characters: report.characters(),
            skipped: report.skipped(),
            questions: report.questions(),
            impossible: report.impossible(),
            wrong_offsets: report.wrong_offsets(),
        }
    }

    /// What was counted after `before`.
    fn since(self, before: Self) -> Self {
        Self {
            bytes: self.bytes.saturating_sub(before.bytes),
            characters: self.characters.saturating_sub(before.characters),
            skipped: self.skipped.saturating_sub(before.skipped),
            questions: self.questions.saturating_sub(before.questions),
            impossible: self.impossible.saturating_sub(before.impossible),
            wrong_offsets: self.wrong_offsets.saturating_sub(before.wrong_offsets),
        }
    }
}

/// Writes the documents after those that are done.
fn write<I, T>(
    plan: &Plan,
    done: Done,
    documents: I,
    reporter: &mut Reporter<'_>,
    check: &dyn Fn() -> Result<()>,
) -> Result<Done>
where
    I: IntoIterator<Item = Result<T>>,
    T: Into<Encoded>,
{
    let mut writer = Writer::new(plan, done, check);
    for document in documents {
        writer.push(document?.into())?;
        (reporter.progress.documents, reporter.progress.tokens) = (writer.documents(), writer.tokens());
        reporter.report(BuildPhase::Tokenizing)?;
    }
    writer.finish()
}

fn progress(source_bytes: u64) -> BuildProgress {
    BuildProgress { phase: BuildPhase::Waiting, documents: 0, tokens: 0, bytes: 0, source_bytes }
}

/// Tells the caller how far the build has come.
struct Reporter<'a> {
    callback: Option<Callback<'a>>,
    path: &'a Path,
    progress: BuildProgress,
    bytes: Option<Arc<AtomicU64>>,
}

impl Reporter<'_> {
    fn report(&mut self, phase: BuildPhase) -> Result<()> {
        let Some(callback) = &mut self.callback else { return Ok(()) };
        self.progress.phase = phase;
        self.progress.bytes = self.bytes.as_ref().map_or(0, |bytes| bytes.load(Ordering::Relaxed));
        match callback(&self.progress) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(DataError::Interrupted {
                path: self.path.to_path_buf(),
                documents: self.progress.documents,
                tokens: self.progress.tokens,
            }),
        }
    }
}

/// What a cache is to be made from, and where it is.
struct Recipe<'a> {
    folder: &'a Path,
    settings: [u8; 32],
    files: Files,
    digested: OnceCell<Vec<SourceStamp>>,
    tokenizer: &'a TextTokenizer,
}

enum Verdict {
    Fits(Box<Manifest>),
    Stale(RebuildReason),
    Missing,
}

impl Recipe<'_> {
    fn key(&self, digested: &[SourceStamp]) -> CacheKey {
        CacheKey {
            content: content(&self.settings, digested),
            tokenizer: self.tokenizer.fingerprint(),
            vocab_size: self.tokenizer.vocab_size() as u64,
        }
    }

    /// The files with their digests, which are computed once: read, where `known` does not vouch for a file.
    fn digest(&self, known: &[SourceStamp]) -> Result<&[SourceStamp]> {
        if self.digested.get().is_none() {
            let _ = self.digested.set(self.files.digest(known)?);
        }
        Ok(self.digested.get().map_or(&[], Vec::as_slice))
    }

    /// Whether the cache that is there fits.
    fn compare(&self) -> Result<Verdict> {
        let mut manifest = match Manifest::read(self.folder) {
            Ok(manifest) => manifest,
            Err(DataError::Missing { .. }) => return Ok(Verdict::Missing),
            Err(error) => return Err(error),
        };
        let looks_the_same =
            manifest.settings == self.settings && self.files.unchanged_since(&manifest.files);
        let key =
            if looks_the_same { self.key(&manifest.files) } else { self.key(self.digest(&manifest.files)?) };
        if manifest.key == key {
            let digested = self.digested.get().filter(|digested| **digested != manifest.files);
            if let Some(digested) = digested {
                manifest.files.clone_from(digested);
                // Next time the files look the same; where that cannot be written, they are only read once more.
                if let Ok(Some(_lock)) = Lock::try_acquire(self.folder) {
                    let _ = manifest.write(self.folder);
                }
            }
            return Ok(Verdict::Fits(Box::new(manifest)));
        }
        let (content, tokenizer) =
            (manifest.key.content == key.content, manifest.key.tokenizer == key.tokenizer);
        let file = || Ok::<_, DataError>(first_difference(&manifest.files, self.digest(&manifest.files)?));
        Ok(Verdict::Stale(match (content, tokenizer) {
            (true, _) => RebuildReason::TokenizerChanged,
            (false, true) => RebuildReason::SourcesChanged(file()?),
            (false, false) => RebuildReason::SourcesAndTokenizerChanged(file()?),
        }))
    }
}

/// The name of the cache's folder for these paths.
fn folder_name(sources: &Sources) -> Result<String> {
    let mut digest = Sha256::new();
    for source in sources.paths() {
        let path = std::path::absolute(source).map_err(|error| DataError::io("find", source, error))?;
        digest.update(path.as_os_str().as_encoded_bytes());
        digest.update([0]);
    }
    Ok(format!("tokens-{}", short_hex(&digest.finalize().into())))
}

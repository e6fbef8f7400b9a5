//! Writing a cache: shard after shard, each to a temporary file that is then renamed; the manifest comes last.

use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use super::fields::{HEADER_BYTES, Width};
use super::manifest::{Manifest, ShardEntry};
use super::shard::{Shard, ShardHeader, file_name};
use super::stamp::SourceStamp;
use super::{CacheKey, TextCounts};
use crate::error::{DataError, Result};
use crate::tokenizer::Encoded;
use crate::tokens::{document_hash, push_ignored};

/// The most documents, and about the most ranges without loss, of a shard: they are kept in memory until it is
/// finished.
const MAX_DOCUMENTS: usize = 1 << 20;
const MAX_IGNORED: usize = 1 << 20;

/// What decides over the shards, and where they go.
#[derive(Debug)]
pub(super) struct Plan {
    folder: PathBuf,
    key: CacheKey,
    shard_tokens: u64,
    build: [u8; 32],
    width: Width,
}

impl Plan {
    pub(super) fn new(folder: &Path, key: CacheKey, shard_tokens: u64) -> Self {
        let mut build = Sha256::new_with_prefix(b"vesper token cache 3");
        build.update(key.content);
        build.update(key.tokenizer);
        build.update(key.vocab_size.to_le_bytes());
        build.update(shard_tokens.to_le_bytes());
        let build = build.finalize().into();
        Self {
            folder: folder.to_path_buf(),
            key,
            shard_tokens,
            build,
            width: Width::for_vocab(key.vocab_size),
        }
    }

    pub(super) fn shard_path(&self, index: u64) -> PathBuf {
        self.folder.join(file_name(&self.build, index))
    }

    /// The shards that an earlier build finished, verified, and the number of their documents and tokens. What comes
    /// after the first that is missing or damaged is not used.
    pub(super) fn finished(&self, mut tick: impl FnMut() -> Result<()>) -> Result<Done> {
        let mut done = Done::default();
        loop {
            tick()?;
            let index = done.shards.len() as u64;
            let Ok(shard) = Shard::open(&self.shard_path(index), self.key.vocab_size) else {
                return Ok(done);
            };
            let header = shard.header();
            let fits = header.build == self.build
                && (header.width, header.index) == (self.width, index)
                && (header.first_token, header.first_document) == (done.tokens, done.documents)
                && shard.verify_ids().is_ok()
                && shard.verify_index().is_ok();
            if !fits {
                return Ok(done);
            }
            done.push(header);
        }
    }

    /// Removes what a build leaves behind that is not part of the finished cache: shards of other builds, and
    /// temporary files of builds that were killed. Only files with the names that builds give them are touched.
    pub(super) fn clean(&self, keep: usize) {
        let keep: Vec<String> = (0..keep as u64).map(|index| file_name(&self.build, index)).collect();
        for entry in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if (is_shard_name(name) && !keep.iter().any(|kept| kept == name))
                || crate::temporary::is_name(name)
            {
                // A file that cannot be removed costs space, nothing else; Windows keeps one that is open.
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    /// Removes the temporary files of builds that were killed.
    pub(super) fn clean_temporary(&self) {
        for entry in std::fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_some_and(crate::temporary::is_name) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    pub(super) fn manifest(&self, done: Done) -> Manifest {
        Manifest {
            width: self.width,
            key: self.key,
            tokens: done.tokens,
            documents: done.documents,
            unknown: done.unknown,
            text: TextCounts::default(),
            shard_tokens: self.shard_tokens,
            settings: [0; 32],
            shards: done.shards,
            files: Vec::<SourceStamp>::new(),
        }
    }
}

/// Whether a builder gives such a name: 16 hexadecimal digits, a number, ".shard".
fn is_shard_name(name: &str) -> bool {
    name.strip_suffix(".shard").and_then(|name| name.split_once('-')).is_some_and(|(build, index)| {
        build.len() == 16
            && build.bytes().all(|byte| byte.is_ascii_hexdigit())
            && index.len() >= 5
            && index.bytes().all(|byte| byte.is_ascii_digit())
    })
}

/// The finished shards of a build.
#[derive(Debug, Default)]
pub(super) struct Done {
    pub(super) shards: Vec<ShardEntry>,
    pub(super) tokens: u64,
    pub(super) documents: u64,
    unknown: u64,
}

impl Done {
    fn push(&mut self, header: &ShardHeader) {
        self.tokens += header.tokens;
        self.documents += header.documents;
        self.unknown = self.unknown.saturating_add(header.unknown);
        self.shards.push(header.entry());
    }
}

/// Appends documents to the shards of a plan.
pub(super) struct Writer<'a> {
    plan: &'a Plan,
    done: Done,
    current: Option<Open>,
    /// Asked before a shard is put in its place.
    check: &'a dyn Fn() -> Result<()>,
}

impl<'a> Writer<'a> {
    pub(super) fn new(plan: &'a Plan, done: Done, check: &'a dyn Fn() -> Result<()>) -> Self {
        Self { plan, done, current: None, check }
    }

    pub(super) fn documents(&self) -> u64 {
        self.done.documents + self.current.as_ref().map_or(0, |open| open.documents.len() as u64)
    }

    pub(super) fn tokens(&self) -> u64 {
        self.done.tokens + self.current.as_ref().map_or(0, |open| open.tokens)
    }

    pub(super) fn push(&mut self, document: Encoded) -> Result<()> {
        let Encoded { ids, unknown, loss } = document;
        let vocab_size = self.plan.key.vocab_size;
        if let Some(&id) = ids.iter().find(|&&id| u64::from(id) >= vocab_size) {
            return Err(DataError::TokenRange { id: id.into(), vocab_size });
        }
        // A document is never cut: only one that is longer than a shard makes a longer shard.
        if self.current.as_ref().is_some_and(|open| {
            open.documents.len() >= MAX_DOCUMENTS
                || open.ignored.len() >= MAX_IGNORED
                || open.tokens + ids.len() as u64 > self.plan.shard_tokens
        }) {
            self.finish_shard()?;
        }
        let open = match &mut self.current {
            Some(open) => open,
            None => self.current.insert(Open::new(self.plan)?),
        };
        let path = &self.plan.folder;
        open.push(&ids, unknown, loss.as_deref())
            .map_err(|error| DataError::io("write a shard in", path, error))
    }

    fn finish_shard(&mut self) -> Result<()> {
        let Some(open) = self.current.take() else { return Ok(()) };
        (self.check)()?;
        let header = open.finish(self.plan, &self.done)?;
        self.done.push(&header);
        Ok(())
    }

    pub(super) fn finish(mut self) -> Result<Done> {
        self.finish_shard()?;
        Ok(self.done)
    }
}

/// A shard that is being written.
struct Open {
    out: BufWriter<NamedTempFile>,
    digest: Sha256,
    width: Width,
    tokens: u64,
    unknown: u64,
    documents: Vec<(u64, u64)>,
    ignored: Vec<(u64, u64)>,
    buffer: Vec<u8>,
}

impl Open {
    fn new(plan: &Plan) -> Result<Self> {
        let failed = |error| DataError::io("create a file in", &plan.folder, error);
        let mut out =
            BufWriter::with_capacity(1 << 20, crate::temporary::file(&plan.folder).map_err(failed)?);
        out.write_all(&[0; HEADER_BYTES]).map_err(failed)?;
        Ok(Self {
            out,
            digest: Sha256::new(),
            width: plan.width,
            tokens: 0,
            unknown: 0,
            documents: Vec::new(),
            ignored: Vec::new(),
            buffer: Vec::new(),
        })
    }

    fn push(
        &mut self,
        ids: &[u32],
        unknown: u64,
        loss: Option<&[std::ops::Range<usize>]>,
    ) -> std::io::Result<()> {
        self.buffer.clear();
        match self.width {
            Width::Two => self.buffer.extend(ids.iter().flat_map(|&id| (id as u16).to_le_bytes())),
            Width::Four => self.buffer.extend(ids.iter().flat_map(|&id| id.to_le_bytes())),
        }
        self.digest.update(&self.buffer);
        self.out.write_all(&self.buffer)?;
        push_ignored(&mut self.ignored, self.tokens, ids.len() as u64, loss);
        self.tokens += ids.len() as u64;
        self.documents.push((self.tokens, document_hash(ids)));
        self.unknown = self.unknown.saturating_add(unknown);
        Ok(())
    }

    /// Writes the padding, the index and the header, and puts the shard in its place.
    fn finish(mut self, plan: &Plan, done: &Done) -> Result<ShardHeader> {
        let path = plan.shard_path(done.shards.len() as u64);
        let failed = |error| DataError::io("write", &path, error);
        let written = self.tokens * self.width.bytes() as u64;
        let padding = (written.next_multiple_of(8) - written) as usize;
        let padding = [0_u8; 8].get(..padding).unwrap_or_default().to_vec();
        self.digest.update(&padding);
        self.out.write_all(&padding).map_err(failed)?;
        let mut index_digest = Sha256::new();
        for pairs in [&self.documents, &self.ignored] {
            for (first, second) in pairs {
                let bytes = (u128::from(*first) | u128::from(*second) << 64).to_le_bytes();
                index_digest.update(bytes);
                self.out.write_all(&bytes).map_err(failed)?;
            }
        }
        let header = ShardHeader {
            width: self.width,
            index: done.shards.len() as u64,
            first_token: done.tokens,
            first_document: done.documents,
            tokens: self.tokens,
            documents: self.documents.len() as u64,
            ignored: self.ignored.len() as u64,
            unknown: self.unknown,
            build: plan.build,
            ids_digest: self.digest.finalize().into(),
            index_digest: index_digest.finalize().into(),
        };
        let mut file = self.out.into_inner().map_err(|error| failed(error.into_error()))?;
        file.seek(SeekFrom::Start(0)).map_err(failed)?;
        file.write_all(&header.to_bytes()).map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        file.persist(&path).map_err(|error| failed(error.error))?;
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_builds_give_are_those_of_shards() {
        assert!(is_shard_name(&file_name(&[0xAB; 32], 7)));
        assert!(is_shard_name("0123456789abcdef-123456.shard"));
        for other in
            ["notes.shard", "0123456789abcdef-1.shard", "0123456789abcdeg-00001.shard", "a-00001.bin"]
        {
            assert!(!is_shard_name(other), "{other}");
        }
    }
}

//! The manifest: what a cache was made from, and its shards.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::fields::{Fields, HEADER_BYTES, Problem, VERSION, Width, check_digest, seal, unseal};
use super::stamp::{SourceStamp, Stamp};
use super::{CacheKey, TextCounts};
use crate::error::{DataError, Result};

/// The name of a cache's manifest in its folder.
pub(crate) const MANIFEST: &str = "manifest.bin";

/// The first eight bytes, those of version 1 as well.
pub(super) const MAGIC: [u8; 8] = *b"VSPTOKEN";

/// The size of a row of the table of shards.
const SHARD_BYTES: u64 = 64;
/// The size of a row of the table of files, less its path.
const FILE_BYTES: u64 = 56;
/// No manifest is longer: its tables are of shards and files, not of documents.
const MAX_BYTES: u64 = 1 << 30;

/// What the manifest knows of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ShardEntry {
    pub(super) tokens: u64,
    pub(super) documents: u64,
    pub(super) ignored: u64,
    pub(super) unknown: u64,
    /// SHA-256 of the shard's header, which has those of the rest.
    pub(super) header: [u8; 32],
}

/// What a manifest says: `docs/src/cache-format.md` has the layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Manifest {
    pub(super) width: Width,
    pub(super) key: CacheKey,
    pub(super) tokens: u64,
    pub(super) documents: u64,
    pub(super) unknown: u64,
    pub(super) text: TextCounts,
    pub(super) shard_tokens: u64,
    /// How the sources were read; zeros where the cache was not made from files.
    pub(super) settings: [u8; 32],
    pub(super) shards: Vec<ShardEntry>,
    pub(super) files: Vec<SourceStamp>,
}

impl Manifest {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend_from_slice(&(self.files.len() as u32).to_le_bytes());
        for number in [
            self.shards.len() as u64,
            self.tokens,
            self.documents,
            self.key.vocab_size,
            self.unknown,
            self.text.skipped,
            self.text.bytes,
            self.shard_tokens,
        ] {
            body.extend_from_slice(&number.to_le_bytes());
        }
        for digest in [&self.key.content, &self.key.tokenizer, &self.settings] {
            body.extend_from_slice(digest);
        }
        let TextCounts { characters, questions, impossible, wrong_offsets, .. } = self.text;
        for number in [characters, questions, impossible, wrong_offsets] {
            body.extend_from_slice(&number.to_le_bytes());
        }
        let mut bytes = seal(MAGIC, self.width, &body).to_vec();
        for shard in &self.shards {
            for number in [shard.tokens, shard.documents, shard.ignored, shard.unknown] {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
            bytes.extend_from_slice(&shard.header);
        }
        for file in &self.files {
            bytes.extend_from_slice(&(file.path.len() as u32).to_le_bytes());
            bytes.extend_from_slice(&file.stamp.nanoseconds.to_le_bytes());
            bytes.extend_from_slice(&file.stamp.seconds.to_le_bytes());
            bytes.extend_from_slice(&file.stamp.length.to_le_bytes());
            bytes.extend_from_slice(&file.content);
            bytes.extend_from_slice(&file.path);
        }
        let digest: [u8; 32] = Sha256::digest(&bytes).into();
        bytes.extend_from_slice(&digest);
        bytes
    }

    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Problem> {
        let (width, mut fields) = unseal(bytes, MAGIC, "a token cache")?;
        let file_count = fields.u32()?;
        let shard_count = fields.u64()?;
        let tokens = fields.u64()?;
        let documents = fields.u64()?;
        let vocab_size = fields.u64()?;
        let unknown = fields.u64()?;
        let skipped = fields.u64()?;
        let bytes_of_text = fields.u64()?;
        let shard_tokens = fields.u64()?;
        let content = fields.take()?;
        let tokenizer = fields.take()?;
        let settings = fields.take()?;
        let text = TextCounts {
            bytes: bytes_of_text,
            characters: fields.u64()?,
            skipped,
            questions: fields.u64()?,
            impossible: fields.u64()?,
            wrong_offsets: fields.u64()?,
        };
        let key = CacheKey { content, tokenizer, vocab_size };

        // Counts that the file cannot hold are refused before memory is taken for them.
        let least = shard_count
            .checked_mul(SHARD_BYTES)
            .and_then(|shards| shards.checked_add(u64::from(file_count) * FILE_BYTES))
            .and_then(|tables| tables.checked_add(HEADER_BYTES as u64 + 32));
        if least.is_none_or(|least| least > bytes.len() as u64) {
            return Err(Problem::damage(format!(
                "it has {} bytes, too few for its {shard_count} shards and {file_count} source files",
                bytes.len()
            )));
        }
        let (body, digest) =
            bytes.split_last_chunk::<32>().ok_or_else(|| Problem::damage("it is too short"))?;
        check_digest("its tables", body, *digest)?;
        let mut fields = Fields::new(body.get(HEADER_BYTES..).unwrap_or_default());
        let mut shards = Vec::with_capacity(shard_count as usize);
        for _ in 0..shard_count {
            shards.push(ShardEntry {
                tokens: fields.u64()?,
                documents: fields.u64()?,
                ignored: fields.u64()?,
                unknown: fields.u64()?,
                header: fields.take()?,
            });
        }
        let mut files = Vec::with_capacity(file_count as usize);
        for _ in 0..file_count {
            let path_bytes = fields.u32()? as usize;
            let nanoseconds = fields.u32()?;
            let seconds = i64::from_le_bytes(fields.take()?);
            let length = fields.u64()?;
            let content = fields.take()?;
            let path = fields.bytes(path_bytes)?.to_vec();
            files.push(SourceStamp { path, stamp: Stamp { length, seconds, nanoseconds }, content });
        }
        if fields.bytes(1).is_ok() {
            return Err(Problem::damage("it is longer than its tables"));
        }
        let sum = |count: fn(&ShardEntry) -> u64| {
            shards.iter().try_fold(0_u64, |sum, shard| sum.checked_add(count(shard)))
        };
        for (name, total, sum) in [
            ("tokens", tokens, sum(|shard| shard.tokens)),
            ("documents", documents, sum(|shard| shard.documents)),
            ("unknown tokens", unknown, sum(|shard| shard.unknown)),
        ] {
            // As many bytes as tokens fit no address space: positions are computed without further checks.
            if sum.is_none_or(|sum| sum != total || sum > isize::MAX as u64 / 16) {
                return Err(Problem::damage(format!(
                    "it counts {total} {name}, its shards {}",
                    sum.map_or("more than any file holds".to_owned(), |sum| sum.to_string())
                )));
            }
        }
        Ok(Self { width, key, tokens, documents, unknown, text, shard_tokens, settings, shards, files })
    }

    /// Reads the manifest of the cache in `folder`; a file in its place is taken for one.
    pub(super) fn read(folder: &Path) -> Result<Self> {
        let inside = folder.join(MANIFEST);
        let path = if folder.is_file() { folder } else { &inside };
        let failed = |error| DataError::io("read", path, error);
        let file = File::open(path).map_err(|error| DataError::io("open", path, error))?;
        let length = file.metadata().map_err(failed)?.len();
        let mut bytes = Vec::new();
        // No more than the mark and the version of a file that cannot be a manifest, such as a cache of version 1.
        let most = if length > MAX_BYTES || path == folder { HEADER_BYTES as u64 } else { MAX_BYTES };
        file.take(most).read_to_end(&mut bytes).map_err(failed)?;
        Self::parse(&bytes).map_err(|problem| match problem {
            Problem::Version(found) => {
                DataError::CacheVersion { path: path.to_path_buf(), found, supported: VERSION }
            }
            // Some file that was named: not one to be deleted.
            Problem::Damage(problem) if path == folder => {
                DataError::Unreadable { path: path.to_path_buf(), format: "a token cache", problem }
            }
            Problem::Damage(problem) => DataError::CacheDamaged { path: path.to_path_buf(), problem },
        })
    }

    /// Puts the manifest in its place in one step.
    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(MANIFEST);
        let failed = |error| DataError::io("write", &path, error);
        let mut file = crate::temporary::file(folder).map_err(failed)?;
        file.write_all(&self.to_bytes()).map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        file.persist(&path).map_err(|error| failed(error.error))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn manifest(shards: Vec<ShardEntry>, files: Vec<SourceStamp>) -> Manifest {
        Manifest {
            width: Width::Two,
            key: CacheKey { content: [1; 32], tokenizer: [2; 32], vocab_size: 300 },
            tokens: shards.iter().map(|shard| shard.tokens).sum(),
            documents: shards.iter().map(|shard| shard.documents).sum(),
            unknown: shards.iter().map(|shard| shard.unknown).sum(),
            text: TextCounts {
                bytes: 99,
                characters: 98,
                skipped: 5,
                questions: 4,
                impossible: 3,
                wrong_offsets: 2,
            },
            shard_tokens: 1 << 26,
            settings: [3; 32],
            shards,
            files,
        }
    }

    fn shard(tokens: u64) -> ShardEntry {
        ShardEntry { tokens, documents: 2, ignored: 1, unknown: 3, header: [4; 32] }
    }

    prop_compose! {
        fn any_file()(path in prop::collection::vec(any::<u8>(), 0..20), length: u64, seconds: i64, nanoseconds: u32, content: [u8; 32]) -> SourceStamp {
            SourceStamp { path, stamp: Stamp { length, seconds, nanoseconds }, content }
        }
    }

    proptest! {
        #[test]
        fn a_manifest_reads_back_as_written(tokens in prop::collection::vec(0..1_u64 << 40, 0..5), files in prop::collection::vec(any_file(), 0..4)) {
            let manifest = manifest(tokens.into_iter().map(shard).collect(), files);
            prop_assert_eq!(Manifest::parse(&manifest.to_bytes()), Ok(manifest));
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(Manifest::parse(&bytes).is_err());
        }

        /// The checksums are right here, so that the checks behind them see arbitrary fields.
        #[test]
        fn no_fields_make_the_reader_panic(body in prop::collection::vec(any::<u8>(), 0..204), tables in prop::collection::vec(any::<u8>(), 0..200), small: bool) {
            let mut body = body;
            if small {
                // Counts small enough that the tables are read.
                body.resize(204, 0);
                for (at, size) in [(0, 4), (4, 8)] {
                    body[at..at + size].fill(0);
                    body[at] = tables.len() as u8 % 3;
                }
            }
            let mut bytes = [seal(MAGIC, Width::Two, &body).as_slice(), &tables].concat();
            let digest: [u8; 32] = Sha256::digest(&bytes).into();
            bytes.extend_from_slice(&digest);
            if let Ok(manifest) = Manifest::parse(&bytes) {
                prop_assert_eq!(manifest.to_bytes().len(), bytes.len());
            }
        }
    }

    #[test]
    fn counts_that_overflow_or_differ_are_an_error() {
        let mut wrong = manifest(vec![shard(1), shard(2)], Vec::new());
        wrong.shards[0].tokens = u64::MAX;
        for tokens in [1, u64::MAX] {
            wrong.tokens = tokens;
            let parsed = Manifest::parse(&wrong.to_bytes());
            assert!(
                matches!(&parsed, Err(Problem::Damage(problem)) if problem.contains("its shards more")),
                "{parsed:?}"
            );
        }
        let mut more = manifest(vec![shard(1)], Vec::new());
        more.documents += 1;
        let parsed = Manifest::parse(&more.to_bytes());
        assert_eq!(parsed, Err(Problem::damage("it counts 3 documents, its shards 2")));
    }

    #[test]
    fn another_version_and_another_byte_order_are_told_apart_from_damage() {
        let good = manifest(Vec::new(), Vec::new()).to_bytes();
        let mut version = good.clone();
        version[8] = 1;
        assert_eq!(Manifest::parse(&version), Err(Problem::Version(1)));
        let mut order = good;
        order[12..16].reverse();
        let parsed = Manifest::parse(&order);
        assert_eq!(parsed, Err(Problem::damage("its byte order mark is 0d0c0b0a, expected 0a0b0c0d")));
    }

    #[test]
    fn a_width_that_no_writer_uses_is_an_error_even_with_a_right_checksum() {
        let mut bytes = manifest(Vec::new(), Vec::new()).to_bytes();
        bytes[16] = 3;
        let digest: [u8; 32] = Sha256::digest(&bytes[..224]).into();
        bytes[224..256].copy_from_slice(&digest);
        let parsed = Manifest::parse(&bytes);
        assert!(
            matches!(&parsed, Err(Problem::Damage(problem)) if problem.contains("3 bytes")),
            "{parsed:?}"
        );
    }
}

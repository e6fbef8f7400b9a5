//! A shard: a part of the ids, the index of its documents, and the ranges that the loss leaves out.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use memmap2::Mmap;
use sha2::{Digest, Sha256};

use super::fields::{HEADER_BYTES, Problem, VERSION, Width, check_digest, seal, short_hex, unseal};
use super::manifest::ShardEntry;
use crate::error::{DataError, Result};

/// The first eight bytes of every shard.
const MAGIC: [u8; 8] = *b"VSPSHARD";
/// The bytes of a document in the index: where it ends, and its hash.
const DOCUMENT_BYTES: u64 = 16;
/// The bytes of a range that the loss leaves out: its start and its end.
const IGNORED_BYTES: u64 = 16;

/// What the header of a shard says: `docs/src/cache-format.md` has the layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ShardHeader {
    pub(super) width: Width,
    pub(super) index: u64,
    /// The position of its first token, and the number of its first document, in the whole cache.
    pub(super) first_token: u64,
    pub(super) first_document: u64,
    pub(super) tokens: u64,
    pub(super) documents: u64,
    pub(super) ignored: u64,
    pub(super) unknown: u64,
    /// SHA-256 of all that decides which shards there are.
    pub(super) build: [u8; 32],
    pub(super) ids_digest: [u8; 32],
    pub(super) index_digest: [u8; 32],
}

impl ShardHeader {
    pub(super) fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut body = vec![0; 4];
        for number in [
            self.index,
            self.first_token,
            self.first_document,
            self.tokens,
            self.documents,
            self.ignored,
            self.unknown,
        ] {
            body.extend_from_slice(&number.to_le_bytes());
        }
        for digest in [&self.build, &self.ids_digest, &self.index_digest] {
            body.extend_from_slice(digest);
        }
        seal(MAGIC, self.width, &body)
    }

    /// Reads and checks a header; `file_bytes` is the length of the whole file.
    fn parse(bytes: &[u8], file_bytes: u64) -> Result<Self, Problem> {
        let (width, mut fields) = unseal(bytes, MAGIC, "a shard of a token cache")?;
        fields.u32()?;
        let header = Self {
            width,
            index: fields.u64()?,
            first_token: fields.u64()?,
            first_document: fields.u64()?,
            tokens: fields.u64()?,
            documents: fields.u64()?,
            ignored: fields.u64()?,
            unknown: fields.u64()?,
            build: fields.take()?,
            ids_digest: fields.take()?,
            index_digest: fields.take()?,
        };
        match header.file_bytes() {
            Some(expected) if expected == file_bytes => Ok(header),
            Some(expected) => Err(Problem::damage(format!("it has {file_bytes} bytes, expected {expected}"))),
            None => Err(Problem::damage(format!(
                "its header counts {} tokens, {} documents and {} ranges: no file is so long",
                header.tokens, header.documents, header.ignored
            ))),
        }
    }

    /// The bytes that the ids take, padding included.
    fn id_bytes(&self) -> Option<u64> {
        self.tokens.checked_mul(self.width.bytes() as u64)?.checked_next_multiple_of(8)
    }

    /// The length of the whole file, or `None` where no file is so long.
    fn file_bytes(&self) -> Option<u64> {
        let index = self.documents.checked_mul(DOCUMENT_BYTES)?;
        let ignored = self.ignored.checked_mul(IGNORED_BYTES)?;
        let bytes =
            (HEADER_BYTES as u64).checked_add(self.id_bytes()?)?.checked_add(index)?.checked_add(ignored)?;
        isize::try_from(bytes).is_ok().then_some(bytes)
    }

    /// What the manifest keeps of it.
    pub(super) fn entry(&self) -> ShardEntry {
        ShardEntry {
            tokens: self.tokens,
            documents: self.documents,
            ignored: self.ignored,
            unknown: self.unknown,
            header: Sha256::digest(self.to_bytes()).into(),
        }
    }
}

/// The name of a shard's file.
pub(super) fn file_name(build: &[u8; 32], index: u64) -> String {
    format!("{}-{index:05}.shard", short_hex(build))
}

/// An open shard. The ids and the index are verified when they are first used.
#[derive(Debug)]
pub(super) struct Shard {
    map: Mmap,
    header: ShardHeader,
    vocab_size: u64,
    path: PathBuf,
    ids: Range<usize>,
    documents: Range<usize>,
    ignored: Range<usize>,
    ids_verified: OnceLock<Result<(), String>>,
    index_verified: OnceLock<Result<(), String>>,
}

impl Shard {
    /// Opens a shard and checks its header.
    pub(super) fn open(path: &Path, vocab_size: u64) -> Result<Self> {
        let file = File::open(path).map_err(|error| DataError::io("open", path, error))?;
        // SAFETY: the map is read-only, and all reading goes through checked slices of it. What is left is the file
        // changing while it is mapped: the documentation of `TokenCache` rules it out, and this crate replaces the
        // files of a cache instead of writing into them.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| DataError::io("map", path, error))?;
        let header = ShardHeader::parse(&map, map.len() as u64).map_err(|problem| match problem {
            Problem::Version(found) => {
                DataError::CacheVersion { path: path.to_path_buf(), found, supported: VERSION }
            }
            Problem::Damage(problem) => DataError::CacheDamaged { path: path.to_path_buf(), problem },
        })?;
        // The header was compared with the file's length: no sum overflows.
        let ids = HEADER_BYTES..HEADER_BYTES + header.tokens as usize * header.width.bytes();
        let start = HEADER_BYTES + header.id_bytes().unwrap_or_default() as usize;
        let documents = start..start + (header.documents * DOCUMENT_BYTES) as usize;
        let ignored = documents.end..documents.end + (header.ignored * IGNORED_BYTES) as usize;
        Ok(Self {
            map,
            header,
            vocab_size,
            path: path.to_path_buf(),
            ids,
            documents,
            ignored,
            ids_verified: OnceLock::new(),
            index_verified: OnceLock::new(),
        })
    }

    pub(super) fn header(&self) -> &ShardHeader {
        &self.header
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The positions of its tokens in the whole cache.
    pub(super) fn tokens(&self) -> Range<usize> {
        let start = self.header.first_token as usize;
        start..start + self.header.tokens as usize
    }

    /// The numbers of its documents in the whole cache.
    pub(super) fn documents(&self) -> Range<usize> {
        let start = self.header.first_document as usize;
        start..start + self.header.documents as usize
    }

    pub(super) fn has_ignored(&self) -> bool {
        self.header.ignored > 0
    }

    pub(super) fn damaged(&self, problem: &str) -> DataError {
        let problem = format!("shard {}: {problem}", self.header.index);
        DataError::CacheDamaged { path: self.path.clone(), problem }
    }

    fn slice(&self, range: &Range<usize>) -> &[u8] {
        self.map.get(range.clone()).unwrap_or_default()
    }

    /// Writes the ids from the shard's own position `start` on into `out`; the shard has them.
    pub(super) fn read(&self, start: usize, out: &mut [u32]) -> Result<()> {
        self.verify_ids()?;
        let width = self.header.width.bytes();
        let bytes = self.slice(&self.ids).get(start * width..).unwrap_or_default();
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
        Ok(())
    }

    fn pairs<'a>(&'a self, range: &Range<usize>) -> &'a [[u8; 16]] {
        self.slice(range).as_chunks::<16>().0
    }

    /// Where the shard's document `index` is, in the shard's own positions.
    pub(super) fn document(&self, index: usize) -> Result<Range<usize>> {
        self.verify_index()?;
        let pairs = self.pairs(&self.documents);
        let end = |index: usize| pairs.get(index).map(|pair| pair_of(pair).0 as usize);
        // A document is in one shard: the first begins where the shard does.
        let start = index.checked_sub(1).and_then(end).unwrap_or(0);
        end(index).map(|end| start..end).ok_or_else(|| self.no_document(index))
    }

    /// The hash of the shard's document `index`.
    pub(super) fn document_hash(&self, index: usize) -> Result<u64> {
        self.verify_index()?;
        let pair = self.pairs(&self.documents).get(index);
        pair.map(|pair| pair_of(pair).1).ok_or_else(|| self.no_document(index))
    }

    fn no_document(&self, index: usize) -> DataError {
        self.damaged(&format!("it has no document {index}"))
    }

    /// The first of the shard's documents that ends past the shard's own `position`.
    pub(super) fn document_after(&self, position: usize) -> Result<usize> {
        self.verify_index()?;
        Ok(self.pairs(&self.documents).partition_point(|pair| pair_of(pair).0 <= position as u64))
    }

    /// Hands the parts of the shard's own `range` that the loss leaves out to `f`.
    pub(super) fn ignored(&self, range: Range<usize>, f: &mut dyn FnMut(Range<usize>)) -> Result<()> {
        if !self.has_ignored() {
            return Ok(());
        }
        self.verify_index()?;
        let pairs = self.pairs(&self.ignored);
        let first = pairs.partition_point(|pair| pair_of(pair).1 <= range.start as u64);
        for pair in pairs.get(first..).unwrap_or_default() {
            let (start, end) = pair_of(pair);
            if start >= range.end as u64 {
                break;
            }
            f(range.start.max(start as usize)..range.end.min(end as usize));
        }
        Ok(())
    }

    pub(super) fn verify_ids(&self) -> Result<()> {
        let verified = self.ids_verified.get_or_init(|| {
            let section = HEADER_BYTES..self.documents.start;
            self.check("its ids", &section, self.header.ids_digest)?;
            // The checksum guards against accidents, this against a file that was made wrong on purpose.
            self.check_ids()
        });
        verified.as_ref().map(|&()| ()).map_err(|problem| self.damaged(problem))
    }

    pub(super) fn verify_index(&self) -> Result<()> {
        let verified = self.index_verified.get_or_init(|| {
            let section = self.documents.start..self.ignored.end;
            self.check("its index", &section, self.header.index_digest)?;
            self.check_index()
        });
        verified.as_ref().map(|&()| ()).map_err(|problem| self.damaged(problem))
    }

    fn check(&self, what: &str, section: &Range<usize>, expected: [u8; 32]) -> Result<(), String> {
        check_digest(what, self.slice(section), expected).map_err(|problem| match problem {
            Problem::Damage(problem) => problem,
            Problem::Version(version) => format!("it is of version {version}"),
        })
    }

    fn check_ids(&self) -> Result<(), String> {
        let bytes = self.slice(&self.ids);
        let highest = match self.header.width {
            Width::Two => {
                bytes.as_chunks::<2>().0.iter().map(|id| u16::from_le_bytes(*id)).max().map(u32::from)
            }
            Width::Four => bytes.as_chunks::<4>().0.iter().map(|id| u32::from_le_bytes(*id)).max(),
        };
        match highest {
            Some(id) if u64::from(id) >= self.vocab_size => {
                Err(format!("it holds id {id}, expected ids below {}", self.vocab_size))
            }
            _ => Ok(()),
        }
    }

    fn check_index(&self) -> Result<(), String> {
        let tokens = self.header.tokens;
        let mut last = 0;
        for (index, pair) in self.pairs(&self.documents).iter().enumerate() {
            let (end, _) = pair_of(pair);
            if end < last || end > tokens {
                return Err(format!("document {index} ends at token {end}, expected {last} to {tokens}"));
            }
            last = end;
        }
        if last != tokens {
            return Err(format!("its documents end at {last} of {tokens} tokens"));
        }
        let mut last = 0;
        for (index, pair) in self.pairs(&self.ignored).iter().enumerate() {
            let (start, end) = pair_of(pair);
            if start < last || end <= start || end > tokens {
                return Err(format!(
                    "range {index} without loss is {start}..{end}, expected a part of {last}..{tokens}"
                ));
            }
            last = end;
        }
        Ok(())
    }
}

fn pair_of(pair: &[u8; 16]) -> (u64, u64) {
    let number = u128::from_le_bytes(*pair);
    (number as u64, (number >> 64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(tokens: u64, documents: u64, ignored: u64) -> ShardHeader {
        ShardHeader {
            width: Width::Four,
            index: 1,
            first_token: 2,
            first_document: 3,
            tokens,
            documents,
            ignored,
            unknown: 4,
            build: [5; 32],
            ids_digest: [6; 32],
            index_digest: [7; 32],
        }
    }

    #[test]
    fn counts_that_overflow_are_an_error() {
        for (tokens, documents, ignored) in [
            (u64::MAX, 0, 0),
            (u64::MAX / 4, 0, 0),
            (0, u64::MAX, 0),
            (0, u64::MAX / 16, 1),
            (0, 0, u64::MAX / 16),
            (1 << 60, 1 << 59, 1 << 59),
            (1 << 61, 0, 0),
        ] {
            let bytes = header(tokens, documents, ignored).to_bytes();
            let Err(Problem::Damage(problem)) = ShardHeader::parse(&bytes, 256) else { panic!() };
            assert!(problem.contains("no file is so long"), "{problem}");
        }
    }

    proptest! {
        #[test]
        fn a_header_reads_back_as_written(tokens in 0..1_u64 << 40, documents in 0..1_u64 << 30, ignored in 0..1_u64 << 30) {
            let header = header(tokens, documents, ignored);
            let length = header.file_bytes().unwrap();
            prop_assert_eq!(ShardHeader::parse(&header.to_bytes(), length), Ok(header));
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), length: u64) {
            prop_assert!(ShardHeader::parse(&bytes, length).is_err());
        }

        /// The checksum is right here, so that the checks behind it see arbitrary fields.
        #[test]
        fn no_fields_make_the_reader_panic(body in prop::collection::vec(any::<u8>(), 0..204), length: u64) {
            let _ = ShardHeader::parse(&seal(MAGIC, Width::Two, &body), length);
        }
    }
}

//! The fixed-size header of a cache file, and the checks that need no more than the header.

use sha2::{Digest, Sha256};

use super::CacheKey;

/// The first eight bytes of every token cache.
pub(super) const MAGIC: [u8; 8] = *b"VSPTOKEN";
/// The version that this program writes, and the only one that it reads.
pub(super) const VERSION: u32 = 1;
/// The header's size; the ids follow at once, aligned for any width.
pub(super) const HEADER_BYTES: usize = 256;
/// Where the header's own digest is: over all bytes before it.
const DIGEST_AT: usize = HEADER_BYTES - 32;

/// How many bytes an id takes in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Width {
    Two,
    Four,
}

impl Width {
    /// The narrowest width that holds every id below `vocab_size`.
    pub(super) fn for_vocab(vocab_size: u64) -> Self {
        if vocab_size <= 1 << 16 { Self::Two } else { Self::Four }
    }

    pub(super) fn bytes(self) -> usize {
        match self {
            Self::Two => 2,
            Self::Four => 4,
        }
    }
}

/// What the header says.
///
/// ```text
/// offset  bytes  field (numbers are little-endian)
///      0      8  magic "VSPTOKEN"
///      8      4  version
///     12      4  bytes an id: 2 or 4
///     16      8  token count
///     24      8  document count
///     32      8  vocabulary size: every id is below it
///     40      8  unknown tokens
///     48     32  SHA-256 of the sources
///     80     32  SHA-256 of the tokenizer
///    112     32  SHA-256 of everything after the header
///    144     80  zeros
///    224     32  SHA-256 of bytes 0..224
///    256         ids, zeros up to a multiple of 8, then the end of each document as u64
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) width: Width,
    pub(super) tokens: u64,
    pub(super) documents: u64,
    pub(super) unknown: u64,
    pub(super) key: CacheKey,
    pub(super) payload_digest: [u8; 32],
}

/// Why bytes are not a header.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum HeaderError {
    Version(u32),
    Damaged(String),
}

/// Reads fixed-size fields from a slice, front to back.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

impl Header {
    pub(super) fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(self.width.bytes() as u32).to_le_bytes());
        for number in [self.tokens, self.documents, self.key.vocab_size, self.unknown] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        for digest in [&self.key.content, &self.key.tokenizer, &self.payload_digest] {
            bytes.extend_from_slice(digest);
        }
        bytes.resize(DIGEST_AT, 0);
        let digest: [u8; 32] = Sha256::digest(&bytes).into();
        bytes.extend_from_slice(&digest);
        let mut header = [0; HEADER_BYTES];
        header.copy_from_slice(&bytes);
        header
    }

    /// Reads and checks a header; `file_bytes` is the length of the whole file.
    pub(super) fn parse(bytes: &[u8], file_bytes: u64) -> Result<Self, HeaderError> {
        let damaged = |problem: String| HeaderError::Damaged(problem);
        let short =
            || damaged(format!("it has {file_bytes} bytes, expected at least a header of {HEADER_BYTES}"));
        let mut fields = Fields(bytes);
        let magic: [u8; 8] = fields.take().ok_or_else(short)?;
        if magic != MAGIC {
            return Err(damaged(format!(
                "it starts with \"{}\", expected the mark \"{}\" of a token cache",
                magic.escape_ascii(),
                MAGIC.escape_ascii()
            )));
        }
        let version = fields.u32().ok_or_else(short)?;
        if version != VERSION {
            return Err(HeaderError::Version(version));
        }
        let (body, digest) = bytes
            .first_chunk::<HEADER_BYTES>()
            .and_then(|header| header.split_last_chunk::<32>())
            .ok_or_else(short)?;
        if Sha256::digest(body)[..] != digest[..] {
            return Err(damaged("the checksum of its header does not match".into()));
        }

        let width = match fields.u32().ok_or_else(short)? {
            2 => Width::Two,
            4 => Width::Four,
            other => return Err(damaged(format!("its ids have {other} bytes, expected 2 or 4"))),
        };
        let tokens = fields.u64().ok_or_else(short)?;
        let documents = fields.u64().ok_or_else(short)?;
        let vocab_size = fields.u64().ok_or_else(short)?;
        let unknown = fields.u64().ok_or_else(short)?;
        let content = fields.take().ok_or_else(short)?;
        let tokenizer = fields.take().ok_or_else(short)?;
        let payload_digest = fields.take().ok_or_else(short)?;
        let key = CacheKey { content, tokenizer, vocab_size };
        let header = Self { width, tokens, documents, unknown, key, payload_digest };

        let expected = header.file_bytes().ok_or_else(|| {
            damaged(format!(
                "its header counts {tokens} tokens and {documents} documents: no file is so long"
            ))
        })?;
        if expected != file_bytes {
            return Err(damaged(format!("it has {file_bytes} bytes, expected {expected}")));
        }
        Ok(header)
    }

    /// The bytes that the ids take, padding included.
    pub(super) fn id_bytes(&self) -> Option<u64> {
        self.tokens.checked_mul(self.width.bytes() as u64)?.checked_next_multiple_of(8)
    }

    /// The length of the whole file, or `None` where it overflows.
    pub(super) fn file_bytes(&self) -> Option<u64> {
        let ends = self.documents.checked_mul(8)?;
        (HEADER_BYTES as u64).checked_add(self.id_bytes()?)?.checked_add(ends)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(tokens: u64, documents: u64, width: Width) -> Header {
        let key = CacheKey { content: [1; 32], tokenizer: [2; 32], vocab_size: 300 };
        Header { width, tokens, documents, unknown: 4, key, payload_digest: [3; 32] }
    }

    #[test]
    fn counts_that_overflow_are_an_error() {
        for (tokens, documents) in
            [(u64::MAX, 0), (u64::MAX / 4, 0), (0, u64::MAX), (0, u64::MAX / 8), (u64::MAX / 4 - 64, 1)]
        {
            let bytes = header(tokens, documents, Width::Four).to_bytes();
            let parsed = Header::parse(&bytes, 256);
            assert!(
                matches!(&parsed, Err(HeaderError::Damaged(problem)) if problem.contains("counts") || problem.contains("expected")),
                "{parsed:?}"
            );
        }
        let overflow = header(u64::MAX, 1, Width::Two).to_bytes();
        let Err(HeaderError::Damaged(problem)) = Header::parse(&overflow, 256) else { panic!() };
        assert!(problem.contains("no file is so long"), "{problem}");
    }

    #[test]
    fn another_version_is_told_apart_from_damage() {
        let mut bytes = header(0, 0, Width::Two).to_bytes();
        bytes[8] = 2;
        assert_eq!(Header::parse(&bytes, 256), Err(HeaderError::Version(2)));
    }

    #[test]
    fn a_width_that_no_writer_uses_is_an_error_even_with_a_right_checksum() {
        let mut bytes = header(0, 0, Width::Two).to_bytes();
        bytes[12] = 3;
        let digest: [u8; 32] = Sha256::digest(&bytes[..DIGEST_AT]).into();
        bytes[DIGEST_AT..].copy_from_slice(&digest);
        assert!(matches!(Header::parse(&bytes, 256), Err(HeaderError::Damaged(p)) if p.contains("3 bytes")));
    }

    proptest! {
        #[test]
        fn a_header_reads_back_as_written(tokens in 0..1_u64 << 40, documents in 0..1_u64 << 30, wide: bool) {
            let header = header(tokens, documents, if wide { Width::Four } else { Width::Two });
            let length = header.file_bytes().unwrap();
            prop_assert_eq!(Header::parse(&header.to_bytes(), length), Ok(header));
        }

        #[test]
        fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), length: u64) {
            prop_assert!(Header::parse(&bytes, length).is_err());
        }

        #[test]
        fn no_bytes_after_a_right_start_make_the_reader_panic(
            body in prop::collection::vec(any::<u8>(), DIGEST_AT - 12),
            length: u64,
        ) {
            // The checksum is right here, so that the checks behind it see arbitrary fields.
            let mut bytes = [MAGIC.as_slice(), &VERSION.to_le_bytes(), &body].concat();
            let digest: [u8; 32] = Sha256::digest(&bytes).into();
            bytes.extend_from_slice(&digest);
            prop_assert!(Header::parse(&bytes, length).is_err());
        }
    }
}

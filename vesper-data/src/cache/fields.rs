//! Fixed-size fields in bytes, little-endian.

use sha2::{Digest, Sha256};

/// The version that this program writes, and the only one that it reads.
pub(super) const VERSION: u32 = 3;
/// Reads as another number where bytes were swapped.
pub(super) const BYTE_ORDER: u32 = 0x0A0B_0C0D;
/// The size of the headers of both kinds of file; the last 32 bytes are the SHA-256 of those before.
pub(super) const HEADER_BYTES: usize = 256;
pub(super) const DIGEST_AT: usize = HEADER_BYTES - 32;

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

    fn parse(bytes: u32) -> Result<Self, Problem> {
        match bytes {
            2 => Ok(Self::Two),
            4 => Ok(Self::Four),
            other => Err(Problem::damage(format!("its ids have {other} bytes, expected 2 or 4"))),
        }
    }
}

/// Why bytes are not what they should be.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Problem {
    Version(u32),
    Damage(String),
}

impl Problem {
    pub(super) fn damage(problem: impl Into<String>) -> Self {
        Self::Damage(problem.into())
    }
}

/// Reads fields from a slice, front to back; there are none left where a read gives an error.
pub(super) struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn take<const N: usize>(&mut self) -> Result<[u8; N], Problem> {
        let (head, tail) = self.0.split_first_chunk::<N>().ok_or_else(cut_short)?;
        self.0 = tail;
        Ok(*head)
    }

    pub(super) fn bytes(&mut self, count: usize) -> Result<&'a [u8], Problem> {
        let (head, tail) = self.0.split_at_checked(count).ok_or_else(cut_short)?;
        self.0 = tail;
        Ok(head)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Problem> {
        self.take().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Problem> {
        self.take().map(u64::from_le_bytes)
    }
}

fn cut_short() -> Problem {
    Problem::damage("its tables are cut short")
}

/// The first 20 bytes of a header, then `body`, zeros, and the digest.
pub(super) fn seal(magic: [u8; 8], width: Width, body: &[u8]) -> [u8; HEADER_BYTES] {
    let mut bytes = Vec::with_capacity(HEADER_BYTES);
    bytes.extend_from_slice(&magic);
    for number in [VERSION, BYTE_ORDER, width.bytes() as u32] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(body);
    bytes.resize(DIGEST_AT, 0);
    let digest: [u8; 32] = Sha256::digest(&bytes).into();
    bytes.extend_from_slice(&digest);
    let mut header = [0; HEADER_BYTES];
    header.copy_from_slice(&bytes);
    header
}

/// Checks what both kinds of header have in common; gives the width and the fields after it.
pub(super) fn unseal<'a>(
    bytes: &'a [u8],
    magic: [u8; 8],
    what: &str,
) -> Result<(Width, Fields<'a>), Problem> {
    let short = |_| {
        Problem::damage(format!("it has {} bytes, expected at least a header of {HEADER_BYTES}", bytes.len()))
    };
    let mut fields = Fields::new(bytes);
    let found: [u8; 8] = fields.take().map_err(short)?;
    if found != magic {
        return Err(Problem::damage(format!(
            "it starts with \"{}\", expected the mark \"{}\" of {what}",
            found.escape_ascii(),
            magic.escape_ascii()
        )));
    }
    let version = fields.u32().map_err(short)?;
    if version != VERSION {
        return Err(Problem::Version(version));
    }
    let (body, digest) = bytes
        .first_chunk::<HEADER_BYTES>()
        .and_then(|header| header.split_last_chunk::<32>())
        .ok_or_else(|| short(Problem::Version(version)))?;
    let order = fields.u32()?;
    if order != BYTE_ORDER {
        return Err(Problem::damage(format!(
            "its byte order mark is {order:08x}, expected {BYTE_ORDER:08x}"
        )));
    }
    check_digest("its header", body, *digest)?;
    let width = Width::parse(fields.u32()?)?;
    Ok((width, fields))
}

/// Compares the SHA-256 of `bytes`.
pub(super) fn check_digest(what: &str, bytes: &[u8], expected: [u8; 32]) -> Result<(), Problem> {
    let found: [u8; 32] = Sha256::digest(bytes).into();
    if found == expected {
        return Ok(());
    }
    Err(Problem::damage(format!(
        "the checksum of {what} does not match: expected {}, got {}",
        short_hex(&expected),
        short_hex(&found)
    )))
}

/// The first eight bytes of a digest, in hexadecimal.
pub(super) fn short_hex(digest: &[u8; 32]) -> String {
    let short = u64::from_be_bytes(*digest.first_chunk().unwrap_or(&[0; 8]));
    format!("{short:016x}")
}

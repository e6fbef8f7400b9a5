//! Writing a cache file: to a temporary file beside it, then renamed.

use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::Path;

use sha2::{Digest, Sha256};
use tempfile::NamedTempFile;

use super::CacheKey;
use super::header::{HEADER_BYTES, Header, Width};
use crate::error::{DataError, Result};
use crate::tokenizer::Encoded;

/// Writes all documents and the header, and puts the file in its place: complete, or not at all.
pub(super) fn write<I, T>(path: &Path, key: CacheKey, documents: I) -> Result<()>
where
    I: IntoIterator<Item = Result<T>>,
    T: Into<Encoded>,
{
    let failed = |error| DataError::io("write", path, error);
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(folder).map_err(|error| DataError::io("create", folder, error))?;
    let mut file =
        crate::temporary::file(folder).map_err(|error| DataError::io("create a file in", folder, error))?;

    let mut payload = Payload::new(&mut file, Width::for_vocab(key.vocab_size));
    payload.reserve_header().map_err(failed)?;
    let mut ends = Vec::new();
    let mut unknown = 0_u64;
    for document in documents {
        let Encoded { ids, unknown: missed, loss: _ } = document?.into();
        if let Some(&id) = ids.iter().find(|&&id| u64::from(id) >= key.vocab_size) {
            return Err(DataError::TokenRange { id: id.into(), vocab_size: key.vocab_size });
        }
        payload.ids(&ids).map_err(failed)?;
        ends.push(payload.tokens);
        unknown = unknown.saturating_add(missed);
    }
    let (width, tokens) = (payload.width, payload.tokens);
    let payload_digest = payload.finish(&ends).map_err(failed)?;

    let header = Header { width, tokens, documents: ends.len() as u64, unknown, key, payload_digest };
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    file.write_all(&header.to_bytes()).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}

/// The part after the header, hashed as it is written.
struct Payload<'a> {
    out: BufWriter<&'a mut NamedTempFile>,
    digest: Sha256,
    width: Width,
    tokens: u64,
    buffer: Vec<u8>,
}

impl<'a> Payload<'a> {
    fn new(file: &'a mut NamedTempFile, width: Width) -> Self {
        let out = BufWriter::with_capacity(1 << 20, file);
        Self { out, digest: Sha256::new(), width, tokens: 0, buffer: Vec::new() }
    }

    fn reserve_header(&mut self) -> std::io::Result<()> {
        self.out.write_all(&[0; HEADER_BYTES])
    }

    fn ids(&mut self, ids: &[u32]) -> std::io::Result<()> {
        self.buffer.clear();
        match self.width {
            Width::Two => ids.iter().for_each(|&id| self.buffer.extend((id as u16).to_le_bytes())),
            Width::Four => ids.iter().for_each(|&id| self.buffer.extend(id.to_le_bytes())),
        }
        self.tokens += ids.len() as u64;
        self.put()
    }

    fn put(&mut self) -> std::io::Result<()> {
        self.digest.update(&self.buffer);
        self.out.write_all(&self.buffer)
    }

    /// Writes the padding and the document ends; gives the digest of the whole payload.
    fn finish(mut self, ends: &[u64]) -> std::io::Result<[u8; 32]> {
        let written = self.tokens * self.width.bytes() as u64;
        let padding = (written.next_multiple_of(8) - written) as usize;
        self.buffer.clear();
        self.buffer.resize(padding, 0);
        for end in ends {
            self.buffer.extend_from_slice(&end.to_le_bytes());
        }
        self.put()?;
        self.out.flush()?;
        Ok(self.digest.finalize().into())
    }
}

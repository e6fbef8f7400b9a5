//! A file's bytes, decompressed.

use std::fs::File;
use std::io::{BufRead, BufReader, Chain, Cursor, Read};
use std::path::Path;
use std::sync::Arc;

use super::gzip::GzipReader;
use super::zstd::ZstdReader;
use crate::error::{DataError, Result, one_line};

const BUFFER: usize = 1 << 16;
const GZIP: &[u8] = &[0x1F, 0x8B];
const ZSTD: &[u8] = &[0x28, 0xB5, 0x2F, 0xFD];
/// A frame to be passed over, with which a zstd file may begin: the first byte is 0x50 to 0x5F.
const ZSTD_SKIPPABLE: &[u8] = &[0x2A, 0x4D, 0x18];

/// The bytes of a file, which are decompressed if the first of them say that it is compressed.
pub(super) struct Input {
    path: Arc<Path>,
    compression: Option<&'static str>,
    reader: Chain<Cursor<Vec<u8>>, Box<dyn BufRead + Send>>,
}

impl Input {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let failed = |error| DataError::io("open", path, error);
        let file = File::open(path).map_err(failed)?;
        let mut file = BufReader::with_capacity(BUFFER, file);
        let start = file.fill_buf().map_err(|error| DataError::io("read", path, error))?;
        let skippable = start.first().is_some_and(|first| first & 0xF0 == 0x50)
            && start.get(1..).is_some_and(|rest| rest.starts_with(ZSTD_SKIPPABLE));
        let (compression, reader): (_, Box<dyn BufRead + Send>) = if start.starts_with(GZIP) {
            (Some("gzip"), Box::new(BufReader::with_capacity(BUFFER, GzipReader::new(file))))
        } else if start.starts_with(ZSTD) || skippable {
            (Some("zstd"), Box::new(BufReader::with_capacity(BUFFER, ZstdReader::new(file))))
        } else {
            (None, Box::new(file))
        };
        Ok(Self { path: path.into(), compression, reader: Cursor::new(Vec::new()).chain(reader) })
    }

    /// Bytes in memory, for a look at the start of a file.
    pub(super) fn of(bytes: &[u8]) -> Self {
        let nothing: Box<dyn BufRead + Send> = Box::new(std::io::empty());
        Self {
            path: Path::new("").into(),
            compression: None,
            reader: Cursor::new(bytes.to_vec()).chain(nothing),
        }
    }

    pub(super) fn path(&self) -> &Arc<Path> {
        &self.path
    }

    /// The name of the compression, if there is one.
    pub(super) fn compression(&self) -> Option<&'static str> {
        self.compression
    }

    /// The first bytes, up to `length` of them, which stay to be read. Only before anything else is read.
    pub(super) fn peek(&mut self, length: usize) -> Result<&[u8]> {
        let (start, rest) = self.reader.get_mut();
        let missing = length.saturating_sub(start.get_ref().len());
        let read = rest.take(missing as u64).read_to_end(start.get_mut());
        let length = length.min(start.get_ref().len());
        read.map_err(|error| self.failed(error))?;
        Ok(self.reader.get_ref().0.get_ref().get(..length).unwrap_or_default())
    }

    /// What an error of reading is.
    pub(super) fn failed(&self, error: std::io::Error) -> DataError {
        match self.compression {
            Some(format) => DataError::Unreadable {
                path: self.path.to_path_buf(),
                format,
                problem: format!("it is cut short or damaged ({})", one_line(error)),
            },
            None => DataError::io("read", &self.path, error),
        }
    }
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.reader.read(buffer)
    }
}

impl BufRead for Input {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        self.reader.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        self.reader.consume(amount);
    }
}

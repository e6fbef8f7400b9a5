//! A file's lines as valid UTF-8, for the formats that are read line by line.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::Arc;

use crate::error::{DataError, Result};

const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// The lines of a file, each with its line break; a byte order mark at the start of the file is dropped.
pub(super) struct Lines {
    reader: BufReader<File>,
    path: Arc<Path>,
    /// The number of lines read so far.
    line: u64,
    /// The number of bytes read so far.
    offset: u64,
}

impl Lines {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| DataError::io("open", path, error))?;
        let reader = BufReader::with_capacity(1 << 16, file);
        Ok(Self { reader, path: path.into(), line: 0, offset: 0 })
    }

    pub(super) fn path(&self) -> &Arc<Path> {
        &self.path
    }

    /// The number, from 1, of the line that was read last.
    pub(super) fn number(&self) -> u64 {
        self.line
    }

    /// The next line, or `None` at the end of the file.
    pub(super) fn next_line(&mut self) -> Result<Option<String>> {
        let mut bytes = Vec::new();
        let read = self
            .reader
            .read_until(b'\n', &mut bytes)
            .map_err(|error| DataError::io("read", &self.path, error))?;
        if read == 0 {
            return Ok(None);
        }
        self.line += 1;
        let start = self.offset;
        self.offset += read as u64;
        let mut dropped = 0;
        if self.line == 1 && bytes.starts_with(BYTE_ORDER_MARK) {
            dropped = BYTE_ORDER_MARK.len();
            bytes.drain(..dropped);
        }
        // A line break is never part of a longer UTF-8 sequence: a file is valid if each of its lines is.
        String::from_utf8(bytes).map(Some).map_err(|error| DataError::InvalidUtf8 {
            path: self.path.to_path_buf(),
            line: self.line,
            offset: start + (dropped + error.utf8_error().valid_up_to()) as u64,
            hint: encoding_hint(start, error.as_bytes()),
        })
    }
}

/// The encoding that the bytes of a bad line point to.
fn encoding_hint(start: u64, line: &[u8]) -> &'static str {
    if start == 0 && (line.starts_with(b"\xFF\xFE") || line.starts_with(b"\xFE\xFF")) {
        " (it looks like UTF-16: save it as UTF-8)"
    } else if line.contains(&0) {
        " (it looks like a binary file)"
    } else {
        ""
    }
}

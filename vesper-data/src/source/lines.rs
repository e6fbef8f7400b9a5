//! A file's lines as valid UTF-8, for the formats that are read line by line.

use std::io::{BufRead, Read};
use std::path::Path;
use std::sync::Arc;

use super::input::Input;
use super::settings::too_long;
use crate::error::{DataError, Place, Result};

const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// The lines of a file, each with its line break; a byte order mark at the start of the file is dropped.
///
/// After a line that is a broken record the next one can be read.
pub(super) struct Lines {
    input: Input,
    /// The most bytes that a line may have.
    limit: usize,
    /// The number of lines read so far.
    line: u64,
    /// The number of bytes read so far.
    offset: u64,
}

impl Lines {
    pub(super) fn new(input: Input, limit: usize) -> Self {
        Self { input, limit, line: 0, offset: 0 }
    }

    pub(super) fn path(&self) -> &Arc<Path> {
        self.input.path()
    }

    /// The number, from 1, of the line that was read last.
    pub(super) fn number(&self) -> u64 {
        self.line
    }

    /// That the record which starts on `line` cannot be used.
    pub(super) fn broken(&self, line: u64, problem: String) -> DataError {
        DataError::Record { path: self.path().to_path_buf(), place: Place::Line(line), problem }
    }

    /// The next line, or `None` at the end of the file.
    pub(super) fn next_line(&mut self) -> Result<Option<String>> {
        let mut bytes = Vec::new();
        // One byte more than is allowed, to see that a line is too long.
        let most = (self.limit as u64).saturating_add(1);
        let mut read = self.read_until_break(most, &mut bytes)?;
        if read == 0 {
            return Ok(None);
        }
        self.line += 1;
        let start = self.offset;
        let long = bytes.len() > self.limit;
        let mut rest = Vec::new();
        while long && !bytes.ends_with(b"\n") && !rest.ends_with(b"\n") {
            rest.clear();
            let more = self.read_until_break(1 << 16, &mut rest)?;
            if more == 0 {
                break;
            }
            read += more;
        }
        self.offset += read as u64;
        if long {
            return Err(self.broken(self.line, too_long("line", self.limit)));
        }
        let mut dropped = 0;
        if self.line == 1 && bytes.starts_with(BYTE_ORDER_MARK) {
            dropped = BYTE_ORDER_MARK.len();
            bytes.drain(..dropped);
        }
        // A line break is never part of a longer UTF-8 sequence: a file is valid if each of its lines is.
        String::from_utf8(bytes).map(Some).map_err(|error| DataError::InvalidUtf8 {
            path: self.path().to_path_buf(),
            line: self.line,
            offset: start + (dropped + error.utf8_error().valid_up_to()) as u64,
            hint: encoding_hint(start, error.as_bytes()),
        })
    }

    /// Reads up to and with the next line break, but at most `most` bytes.
    fn read_until_break(&mut self, most: u64, bytes: &mut Vec<u8>) -> Result<usize> {
        let read = self.input.by_ref().take(most).read_until(b'\n', bytes);
        read.map_err(|error| self.input.failed(error))
    }

    /// The next line, with `\n` for `\r\n` at its end.
    pub(super) fn next_text_line(&mut self) -> Result<Option<String>> {
        let mut line = self.next_line()?;
        if let Some(line) = &mut line
            && line.ends_with("\r\n")
        {
            line.truncate(line.len() - 2);
            line.push('\n');
        }
        Ok(line)
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

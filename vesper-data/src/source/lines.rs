//! A file's lines as valid UTF-8, for the formats that are read line by line.

use std::io::{BufRead, Read};
use std::path::Path;
use std::sync::Arc;

use super::input::Input;
use super::settings::too_long;
use super::text::SEPARATOR;
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
    /// What was read of the rest of a line of which a part was given, and whether there is such a rest.
    rest: Vec<u8>,
    inside: bool,
}

impl Lines {
    pub(super) fn new(input: Input, limit: usize) -> Self {
        Self { input, limit, line: 0, offset: 0, rest: Vec::new(), inside: false }
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
        self.text(bytes, start).map(Some)
    }

    /// Bytes that begin at `start` of the file, as text.
    fn text(&self, mut bytes: Vec<u8>, start: u64) -> Result<String> {
        let mut dropped = 0;
        if start == 0 && bytes.starts_with(BYTE_ORDER_MARK) {
            dropped = BYTE_ORDER_MARK.len();
            bytes.drain(..dropped);
        }
        // A line break is never part of a longer UTF-8 sequence: a file is valid if each of its lines is.
        String::from_utf8(bytes).map_err(|error| DataError::InvalidUtf8 {
            path: self.path().to_path_buf(),
            line: self.line,
            offset: start + (dropped + error.utf8_error().valid_up_to()) as u64,
            hint: encoding_hint(start, error.as_bytes()),
        })
    }

    /// The next line, or a part of at most `most` bytes of it, with `\n` for `\r\n` at its end: whatever its length is,
    /// no more of a line is in memory. A part ends before white space where that is possible, and within no
    /// [`SEPARATOR`] that has no line break in it.
    pub(super) fn next_text_part(&mut self, most: usize) -> Result<Option<String>> {
        // Room for the longest character, and for a separator that must not be cut.
        let most = most.max(2 * SEPARATOR.len());
        let mut bytes = std::mem::take(&mut self.rest);
        let start = self.offset;
        if bytes.len() < most && !bytes.ends_with(b"\n") {
            self.read_until_break((most - bytes.len()) as u64, &mut bytes)?;
        }
        if bytes.is_empty() {
            self.inside = false;
            return Ok(None);
        }
        self.line += u64::from(!self.inside);
        self.inside = !bytes.ends_with(b"\n");
        if self.inside && bytes.len() >= most {
            let end = part(&bytes);
            self.rest = bytes.split_off(end);
        }
        self.offset += bytes.len() as u64;
        let mut text = self.text(bytes, start)?;
        break_of_text(&mut text);
        Ok(Some(text))
    }

    /// Reads up to and with the next line break, but at most `most` bytes.
    fn read_until_break(&mut self, most: u64, bytes: &mut Vec<u8>) -> Result<usize> {
        let read = self.input.by_ref().take(most).read_until(b'\n', bytes);
        read.map_err(|error| self.input.failed(error))
    }

    /// The next line, with `\n` for `\r\n` at its end.
    pub(super) fn next_text_line(&mut self) -> Result<Option<String>> {
        let mut line = self.next_line()?;
        if let Some(line) = &mut line {
            break_of_text(line);
        }
        Ok(line)
    }
}

/// Makes `\n` of `\r\n` at the end of a line.
fn break_of_text(line: &mut String) {
    if line.ends_with("\r\n") {
        line.truncate(line.len() - 2);
        line.push('\n');
    }
}

/// How many bytes of a part of a line are given: the others may belong together with what follows.
fn part(bytes: &[u8]) -> usize {
    let last = |found: fn(&u8) -> bool| bytes.iter().rposition(found).filter(|&at| at > 0);
    let end = last(|byte| *byte == b' ').unwrap_or_else(|| {
        // A character ends before the last byte that can begin one, or there.
        let begins = last(|byte| *byte & 0xC0 != 0x80).unwrap_or(bytes.len());
        let mark = last(|byte| *byte == b'<').unwrap_or(begins);
        if mark + SEPARATOR.len() > begins { mark } else { begins }
    });
    if end == 0 { bytes.len() } else { end }
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(bytes: &[u8], mut next: impl FnMut(&mut Lines) -> Result<Option<String>>) -> Vec<(u64, String)> {
        let mut lines = Lines::new(Input::of(bytes), usize::MAX);
        let mut found = Vec::new();
        while let Some(text) = next(&mut lines).unwrap() {
            found.push((lines.number(), text));
        }
        found
    }

    #[test]
    fn a_part_ends_before_white_space_and_within_no_separator_or_character() {
        let parts = |text: &str| {
            all(text.as_bytes(), |lines| lines.next_text_part(26))
                .into_iter()
                .map(|(_, text)| text)
                .collect::<Vec<_>>()
        };
        assert_eq!(parts("one two three four five six\n"), ["one two three four five", " six\n"]);
        assert_eq!(parts(&"é".repeat(20)), ["é".repeat(12), "é".repeat(8)]);
        assert_eq!(parts("a<|endoftext|><|endoftext|>b"), ["a<|endoftext|>", "<|endoftext|>b"]);
        assert_eq!(parts(&"<|endoftext|>".repeat(2)), ["<|endoftext|>"; 2]);
        let break_at_the_end = format!("{}\r\nb", "a".repeat(25));
        assert_eq!(parts(&break_at_the_end), ["a".repeat(25), "\n".to_owned(), "b".to_owned()]);
    }

    proptest! {
        #[test]
        fn parts_put_together_are_the_lines(text in "(é|a|<|[|]>| |\n|\r\n|<[|]endoftext[|]>)*", most in 0..60_usize) {
            let mut joined: Vec<(u64, String)> = Vec::new();
            for (line, part) in all(text.as_bytes(), |lines| lines.next_text_part(most)) {
                prop_assert!(!part.is_empty() && part.len() <= most.max(2 * SEPARATOR.len()));
                match joined.last_mut() {
                    Some((last, text)) if *last == line => text.push_str(&part),
                    _ => joined.push((line, part)),
                }
            }
            prop_assert_eq!(joined, all(text.as_bytes(), Lines::next_text_line));
        }
    }
}

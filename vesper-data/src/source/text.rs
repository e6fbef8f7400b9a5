//! Plain text: one document a file, or several with a separator between them.

use std::path::Path;

use super::lines::Lines;
use super::{Document, FileDocuments, Format};
use crate::error::Result;

/// What separates documents within a text file.
pub const SEPARATOR: &str = "<|endoftext|>";

/// UTF-8 text.
///
/// A file is one document, or several with [`SEPARATOR`] between them; line breaks next to a separator belong
/// to it. Documents of white space alone are passed over. `\r\n` becomes `\n`, so that a file gives the same
/// tokens on every system.
#[derive(Clone, Copy, Debug)]
pub struct PlainText;

impl Format for PlainText {
    fn name(&self) -> &'static str {
        "plain text"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["txt", "text", "md"]
    }

    fn open(&self, path: &Path) -> Result<FileDocuments> {
        let mut reader = TextReader::new(Lines::open(path)?);
        Ok(Box::new(std::iter::from_fn(move || reader.next_document().transpose())))
    }
}

struct TextReader {
    lines: Lines,
    /// The line that was read last, and how much of it is used up.
    line: String,
    used: usize,
    /// Whether a separator comes before the document that is read next.
    after_separator: bool,
}

impl TextReader {
    fn new(lines: Lines) -> Self {
        Self { lines, line: String::new(), used: 0, after_separator: false }
    }

    /// Makes sure that a part of the current line is left; `false` at the end of the file.
    fn fill(&mut self) -> Result<bool> {
        if self.used < self.line.len() {
            return Ok(true);
        }
        let Some(mut line) = self.lines.next_line()? else { return Ok(false) };
        if line.ends_with("\r\n") {
            line.truncate(line.len() - 2);
            line.push('\n');
        }
        self.line = line;
        self.used = 0;
        // A line of a byte order mark alone is empty, and no separator can follow it.
        Ok(true)
    }

    fn next_document(&mut self) -> Result<Option<Document>> {
        loop {
            let mut text = String::new();
            let mut start = None;
            let mut separator = None;
            while separator.is_none() && self.fill()? {
                let rest = self.line.get(self.used..).unwrap_or_default();
                separator = rest.find(SEPARATOR);
                let piece = rest.get(..separator.unwrap_or(rest.len())).unwrap_or_default();
                self.used += piece.len() + separator.map_or(0, |_| SEPARATOR.len());
                // Line breaks after a separator belong to it.
                if !(self.after_separator && text.is_empty() && piece == "\n") {
                    start.get_or_insert(self.lines.number());
                    text.push_str(piece);
                }
            }
            if separator.is_some() {
                text.truncate(text.trim_end_matches('\n').len());
            }
            self.after_separator = separator.is_some();
            if !text.trim().is_empty() {
                let line = start.unwrap_or(1);
                return Ok(Some(Document { text, path: self.lines.path().clone(), line, loss: None }));
            }
            if separator.is_none() {
                return Ok(None);
            }
        }
    }
}

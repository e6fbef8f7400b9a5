//! Plain text: one document a file, or several with a separator between them, or one a line.

use super::format::{Context, FileDocuments, Format};
use super::input::Input;
use super::lines::Lines;
use super::settings::too_long;
use super::{Document, TextDocuments};
use crate::error::{DataError, Result};

/// What separates documents within a text file.
pub const SEPARATOR: &str = "<|endoftext|>";

/// UTF-8 text.
///
/// A file is one document, or several with [`SEPARATOR`] between them; line breaks next to a separator belong
/// to it. Documents of white space alone are passed over. `\r\n` becomes `\n`, so that a file gives the same
/// tokens on every system.
pub(super) struct PlainText;

impl Format for PlainText {
    fn name(&self) -> &'static str {
        "text"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["txt", "text", "md"]
    }

    fn open(&self, input: Input, context: &Context) -> Result<FileDocuments> {
        let limit = context.settings.max_record();
        let mut lines = Lines::new(input, limit);
        Ok(match context.settings.text_documents {
            TextDocuments::Separated => {
                let mut reader = TextReader::new(lines, limit);
                Box::new(std::iter::from_fn(move || reader.next_document().transpose()))
            }
            TextDocuments::Lines => Box::new(std::iter::from_fn(move || next_line(&mut lines).transpose())),
        })
    }
}

/// The next line that is not blank, without its line break.
fn next_line(lines: &mut Lines) -> Result<Option<Document>> {
    while let Some(mut line) = lines.next_text_line()? {
        line.truncate(line.trim_end_matches('\n').len());
        if !line.trim().is_empty() {
            let (path, number) = (lines.path().clone(), lines.number());
            return Ok(Some(Document { text: line, path, line: number, loss: None }));
        }
    }
    Ok(None)
}

struct TextReader {
    lines: Lines,
    limit: usize,
    /// The line that was read last, and how much of it is used up.
    line: String,
    used: usize,
    /// Whether a separator comes before the document that is read next.
    after_separator: bool,
    /// Whether what is left of the current document belongs to a broken record.
    broken: bool,
}

impl TextReader {
    fn new(lines: Lines, limit: usize) -> Self {
        Self { lines, limit, line: String::new(), used: 0, after_separator: false, broken: false }
    }

    /// Makes sure that a part of the current line is left; `false` at the end of the file.
    fn fill(&mut self) -> Result<bool> {
        if self.used < self.line.len() {
            return Ok(true);
        }
        self.line.clear();
        self.used = 0;
        let Some(line) = self.lines.next_text_line()? else { return Ok(false) };
        self.line = line;
        // A line of a byte order mark alone is empty, and no separator can follow it.
        Ok(true)
    }

    /// Reads on to the next separator, or to the end of the file.
    fn skip_document(&mut self) -> Result<()> {
        loop {
            match self.fill() {
                Ok(false) => return Ok(()),
                Ok(true) => {
                    let rest = self.line.get(self.used..).unwrap_or_default();
                    if let Some(at) = rest.find(SEPARATOR) {
                        self.used += at + SEPARATOR.len();
                        self.after_separator = true;
                        return Ok(());
                    }
                    self.used = self.line.len();
                }
                // A part of the same broken record.
                Err(error) if error.is_broken_record() => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn next_document(&mut self) -> Result<Option<Document>> {
        if std::mem::take(&mut self.broken) {
            self.skip_document()?;
        }
        let document = self.read_document();
        self.broken = document.as_ref().is_err_and(DataError::is_broken_record);
        document
    }

    fn read_document(&mut self) -> Result<Option<Document>> {
        loop {
            let mut text = String::new();
            let mut start = None;
            let mut separator = None;
            while separator.is_none() && self.fill()? {
                let rest = self.line.get(self.used..).unwrap_or_default();
                separator = rest.find(SEPARATOR);
                let piece = rest.get(..separator.unwrap_or(rest.len())).unwrap_or_default();
                // Line breaks after a separator belong to it.
                if !(self.after_separator && text.is_empty() && piece == "\n") {
                    let start = *start.get_or_insert(self.lines.number());
                    if text.len() + piece.len() > self.limit {
                        return Err(self.lines.broken(start, too_long("document", self.limit)));
                    }
                    text.push_str(piece);
                }
                self.used += piece.len() + separator.map_or(0, |_| SEPARATOR.len());
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

//! Plain text: one document a file, or several with a separator between them, or one a line.

use super::format::{Context, FileDocuments, Format};
use super::input::Input;
use super::lines::Lines;
use super::settings::too_long;
use super::{Document, ReadReport, TextDocuments};
use crate::error::{DataError, Result};

/// What separates documents within a text file.
pub const SEPARATOR: &str = "<|endoftext|>";

/// UTF-8 text.
///
/// A file is one document, or several with [`SEPARATOR`] between them; line breaks next to a separator belong
/// to it. Documents of white space alone are passed over. `\r\n` becomes `\n`, so that a file gives the same
/// tokens on every system. What is longer than [`ReadSettings::max_text_bytes`](super::ReadSettings::max_text_bytes)
/// is given in pieces, so that no text has to fit in memory.
pub(super) struct PlainText;

impl Format for PlainText {
    fn name(&self) -> &'static str {
        "text"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["txt", "text", "md"]
    }

    fn open(&self, input: Input, context: &Context) -> Result<FileDocuments> {
        let mut lines = Lines::new(input, context.settings.max_record());
        Ok(match context.settings.text_documents {
            TextDocuments::Separated => {
                let mut reader = TextReader::new(lines, context);
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

/// How much of a line is looked at at a time.
const PART: usize = 1 << 20;

struct TextReader {
    lines: Lines,
    /// A document with more bytes is a broken record.
    limit: usize,
    /// A document with more bytes is given in pieces.
    most: usize,
    report: ReadReport,
    /// The line that was read last, and how much of it is used up.
    line: String,
    used: usize,
    /// Whether a separator comes before the document that is read next.
    after_separator: bool,
    /// Whether what is left of the current document belongs to a broken record.
    broken: bool,
    /// Whether the document that is read next is a piece of the one before it.
    continues: bool,
}

impl TextReader {
    fn new(lines: Lines, context: &Context) -> Self {
        Self {
            lines,
            limit: context.settings.max_record(),
            most: context.settings.max_text(),
            report: context.report.clone(),
            line: String::new(),
            used: 0,
            after_separator: false,
            broken: false,
            continues: false,
        }
    }

    /// Makes sure that a part of the current line is left; `false` at the end of the file.
    fn fill(&mut self) -> Result<bool> {
        if self.used < self.line.len() {
            return Ok(true);
        }
        self.line.clear();
        self.used = 0;
        // Where lines may be as long as a document in one piece, no more than a part of one has to be in memory.
        let line = if self.limit < self.most {
            self.lines.next_text_line()
        } else {
            self.lines.next_text_part(PART.min(self.most))
        };
        let Some(line) = line? else { return Ok(false) };
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
            let mut cut = false;
            while separator.is_none() && self.fill()? {
                let rest = self.line.get(self.used..).unwrap_or_default();
                separator = rest.find(SEPARATOR);
                let piece = rest.get(..separator.unwrap_or(rest.len())).unwrap_or_default();
                // Line breaks after a separator belong to it.
                if !(self.after_separator && text.is_empty() && piece == "\n") {
                    let start = *start.get_or_insert(self.lines.number());
                    let long = text.len() + piece.len();
                    if long > self.limit {
                        return Err(self.lines.broken(start, too_long("document", self.limit)));
                    }
                    if long > self.most && !text.is_empty() {
                        // The piece and what follows it is the next document.
                        (cut, separator) = (true, None);
                        break;
                    }
                    text.push_str(piece);
                }
                self.used += piece.len() + separator.map_or(0, |_| SEPARATOR.len());
            }
            if separator.is_some() {
                text.truncate(text.trim_end_matches('\n').len());
            }
            self.after_separator = separator.is_some();
            let first = cut && !self.continues;
            self.continues = cut;
            if !text.trim().is_empty() {
                let line = start.unwrap_or(1);
                if first {
                    let note = format!(
                        "the document has more than {} bytes (max-text-bytes): it is read as several",
                        self.most
                    );
                    self.report.note(|| self.lines.broken(line, note).to_string());
                }
                return Ok(Some(Document { text, path: self.lines.path().clone(), line, loss: None }));
            }
            if separator.is_none() && !cut {
                return Ok(None);
            }
        }
    }
}

//! JSONL: one JSON object a line.

use super::Document;
use super::format::{Context, FileDocuments, Format};
use super::input::Input;
use super::lines::Lines;
use super::record;
use crate::error::{Place, Result};

/// One JSON object a line: `{"text": "..."}`.
///
/// Blank lines are passed over, and so are documents of white space alone. Text is taken as it is, `\r\n` included.
pub(super) struct Jsonl;

impl Format for Jsonl {
    fn name(&self) -> &'static str {
        "jsonl"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["jsonl", "ndjson", "json"]
    }

    fn open(&self, input: Input, context: &Context) -> Result<FileDocuments> {
        let mut lines = Lines::new(input, context.settings.max_record());
        let context = context.clone();
        Ok(Box::new(std::iter::from_fn(move || next_document(&mut lines, &context).transpose())))
    }
}

fn next_document(lines: &mut Lines, context: &Context) -> Result<Option<Document>> {
    while let Some(line) = lines.next_line()? {
        if line.trim().is_empty() {
            continue;
        }
        let place = || Place::Line(lines.number());
        let document = record::parse(line.as_bytes(), None)
            .and_then(|value| record::document(&value, context, lines.path(), place))
            .map_err(|problem| lines.broken(lines.number(), problem))?;
        if document.is_some() {
            return Ok(document);
        }
    }
    Ok(None)
}

//! JSONL: on each line an object with the text in its field "text".

use std::path::Path;

use serde_json::Value;

use super::lines::Lines;
use super::{Document, FileDocuments, Format};
use crate::error::{DataError, Result, one_line};

/// One JSON object a line: `{"text": "..."}`.
///
/// Other fields are ignored, blank lines are passed over, and so are documents of white space alone. Text is
/// taken as it is, `\r\n` included.
#[derive(Clone, Copy, Debug)]
pub struct Jsonl;

impl Format for Jsonl {
    fn name(&self) -> &'static str {
        "JSONL"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["jsonl"]
    }

    fn open(&self, path: &Path) -> Result<FileDocuments> {
        let mut lines = Lines::open(path)?;
        Ok(Box::new(std::iter::from_fn(move || next_document(&mut lines).transpose())))
    }
}

fn next_document(lines: &mut Lines) -> Result<Option<Document>> {
    while let Some(line) = lines.next_line()? {
        if line.trim().is_empty() {
            continue;
        }
        let text = text_of(&line).map_err(|problem| DataError::Jsonl {
            path: lines.path().to_path_buf(),
            line: lines.number(),
            problem,
        })?;
        if text.trim().is_empty() {
            continue;
        }
        return Ok(Some(Document { text, path: lines.path().clone(), line: lines.number(), loss: None }));
    }
    Ok(None)
}

/// The field "text" of the object that `line` is, or what else it is.
fn text_of(line: &str) -> Result<String, String> {
    let value: Value = serde_json::from_str(line).map_err(|error| {
        let column = error.column();
        // Without serde's own "at line 1 column n": the line it means is not the file's.
        let message =
            one_line(error).rsplit_once(" at line ").map_or_else(String::new, |(m, _)| m.to_owned());
        format!("invalid JSON at column {column}: {message}")
    })?;
    let Value::Object(mut object) = value else {
        return Err(format!("expected an object like {{\"text\": \"...\"}}, got {}", kind(&value)));
    };
    match object.remove("text") {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("\"text\" is {}, expected a string", kind(&other))),
        None if object.is_empty() => Err("the field \"text\" is missing (it has no fields)".to_owned()),
        None => {
            let mut fields: Vec<&String> = object.keys().collect();
            fields.sort_unstable();
            let fields: Vec<String> = fields.iter().take(8).map(|field| format!("{field:?}")).collect();
            Err(format!("the field \"text\" is missing (the fields are: {})", fields.join(", ")))
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

//! Documents, read from files, folders and archives of many formats.
//!
//! [`Sources`] says what is read and how; [`Documents`] reads it. Everything streams: no more than one record
//! (and one page of a Parquet file) is in memory at a time.
//!
//! A format is one file that implements the trait `Format`, and one row in [`FormatKind`].

mod detect;
mod dialogue;
mod discover;
mod documents;
mod field;
mod format;
mod gzip;
#[cfg(feature = "hub")]
mod hub;
mod input;
mod json;
mod json_stream;
mod jsonl;
mod layout;
mod lines;
mod mixture;
mod parquet;
mod record;
mod report;
mod settings;
mod sources;
mod squad;
mod text;
mod zstd;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

pub use documents::Documents;
pub use field::FieldPath;
pub use format::FormatKind;
#[cfg(feature = "hub")]
pub use hub::Hub;
pub use layout::Labels;
pub use mixture::{Mixture, WhenOut};
pub use report::ReadReport;
pub use settings::{BrokenRecords, Fields, LossOn, ReadSettings, SquadDocuments, TextDocuments};
pub use sources::{Sources, content_digest};
pub use text::SEPARATOR;

/// One text, and where it is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The text, which is more than white space.
    pub text: String,
    /// The file.
    pub path: Arc<Path>,
    /// The line of the file on which the document starts, from 1; in a Parquet file its row.
    pub line: u64,
    /// The byte ranges of [`Document::text`] that the loss is taken over, in order and apart from each other;
    /// `None`: all of it.
    pub loss: Option<Vec<Range<usize>>>,
}

impl AsRef<str> for Document {
    fn as_ref(&self) -> &str {
        &self.text
    }
}

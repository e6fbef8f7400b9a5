//! What a format is, and which there are.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::dialogue::Dialogue;
use super::input::Input;
use super::json::Json;
use super::jsonl::Jsonl;
use super::parquet::Parquet;
use super::squad::Squad;
use super::text::PlainText;
use super::{Document, ReadReport, ReadSettings};
use crate::error::{DataError, Result};

/// The documents of one file, in the file's order.
///
/// After an error for which [`DataError::is_broken_record`] holds, it goes on with the next record; after any
/// other it is not asked again.
pub(super) type FileDocuments = Box<dyn Iterator<Item = Result<Document>> + Send>;

/// How files are read, and where that is told.
#[derive(Clone, Debug)]
pub(super) struct Context {
    pub(super) settings: Arc<ReadSettings>,
    pub(super) report: ReadReport,
}

/// A kind of file that holds documents.
pub(super) trait Format: Sync {
    /// The name, for messages and settings.
    fn name(&self) -> &'static str;

    /// The extensions, in lower case and without the dot, of files that can be of this format.
    fn extensions(&self) -> &'static [&'static str];

    /// Reads a file from its start. The documents it yields hold more than white space: others are passed over.
    fn open(&self, input: Input, context: &Context) -> Result<FileDocuments>;
}

/// A format of files.
///
/// # Examples
///
/// ```
/// use vesper_data::source::FormatKind;
///
/// let kind: FormatKind = "squad".parse()?;
/// assert_eq!(kind, FormatKind::Squad);
/// assert_eq!(kind.to_string(), "squad");
/// # Ok::<(), vesper_data::DataError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum FormatKind {
    /// UTF-8 text: `text`.
    Text,
    /// Transcripts with a `[speaker001:]` before each turn, and a blank line between conversations: `dialogue`.
    Dialogue,
    /// One JSON object a line: `jsonl`.
    Jsonl,
    /// A JSON document that holds a list of records: `json`.
    Json,
    /// Questions on paragraphs, in the JSON layout of SQuAD 1.1 and 2: `squad`.
    Squad,
    /// Apache Parquet: `parquet`.
    Parquet,
}

impl FormatKind {
    /// Every format, with the ones for which a file's extension is looked up first.
    pub const ALL: &[Self] =
        &[Self::Text, Self::Dialogue, Self::Jsonl, Self::Json, Self::Squad, Self::Parquet];

    /// The name: what [`FromStr`](std::str::FromStr) takes and [`Display`](std::fmt::Display) gives.
    pub fn name(self) -> &'static str {
        self.format().name()
    }

    /// The extensions, in lower case and without the dot, of files that can be of this format. Compressed files
    /// have `.gz` or `.zst` behind it.
    pub fn extensions(self) -> &'static [&'static str] {
        self.format().extensions()
    }

    pub(super) fn format(self) -> &'static dyn Format {
        match self {
            Self::Text => &PlainText,
            Self::Dialogue => &Dialogue,
            Self::Jsonl => &Jsonl,
            Self::Json => &Json,
            Self::Squad => &Squad,
            Self::Parquet => &Parquet,
        }
    }
}

impl std::fmt::Display for FormatKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for FormatKind {
    type Err = DataError;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.iter().copied().find(|kind| kind.name() == name).ok_or_else(|| DataError::Config {
            name: "format",
            got: name.to_owned(),
            expected: "text, dialogue, jsonl, json, squad or parquet",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_format_is_found_by_its_name_and_written_as_it() {
        for kind in FormatKind::ALL {
            assert_eq!(kind.name().parse::<FormatKind>().unwrap(), *kind);
            assert_eq!(serde_json::to_string(kind).unwrap(), format!("{:?}", kind.name()));
            assert!(kind.extensions().iter().all(|name| **name == name.to_ascii_lowercase()));
        }
        let error = "csv".parse::<FormatKind>().unwrap_err().to_string();
        let names: Vec<_> = FormatKind::ALL.iter().map(|kind| kind.name()).collect();
        let (last, rest) = names.split_last().unwrap();
        assert_eq!(error, format!("format is csv: expected {} or {last}", rest.join(", ")));
    }
}

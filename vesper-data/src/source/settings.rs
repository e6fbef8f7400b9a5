//! How files are read.

use serde::{Deserialize, Serialize};

use super::{FieldPath, FormatKind, Labels};
use crate::error::{DataError, Result};

/// What a document of a plain text file is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TextDocuments {
    /// What stands between two [`SEPARATOR`](super::SEPARATOR)s; the whole file where there is none.
    #[default]
    Separated,
    /// Each line that is not blank.
    Lines,
}

/// Where the text of a record is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fields {
    /// The first of these that the record has: `text`; a conversation in `messages` or `conversations`; `instruction`
    /// (with `input`, where there is one) and `output`; `context`, `question` and `answers`.
    #[default]
    Auto,
    /// The strings at this path.
    Text(FieldPath),
    /// A conversation: a list of messages at this path, each an object with `role` (or `from`) and `content` (or
    /// `value`).
    Chat(FieldPath),
    /// An instruction and its answer.
    Instruction {
        /// The instruction.
        instruction: FieldPath,
        /// What it is to be done with: left out where the record does not have it, or has it blank.
        #[serde(default)]
        input: Option<FieldPath>,
        /// The answer.
        output: FieldPath,
    },
}

/// What a document of a SQuAD file is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SquadDocuments {
    /// A paragraph, one question on it and its first answer.
    #[default]
    Pairs,
    /// A paragraph with all of its questions and answers: running text, all of which counts in the loss.
    Paragraphs,
}

/// What counts in the loss, of documents that have questions and answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossOn {
    /// The answers: turns of the assistant, outputs of instructions, answers to questions.
    #[default]
    Answers,
    /// Everything.
    Everything,
}

/// How many broken records are passed over before one is an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BrokenRecords {
    /// This many; with 0 the first one is the error.
    AtMost(u64),
    /// Any number.
    Any,
}

impl Default for BrokenRecords {
    fn default() -> Self {
        Self::AtMost(0)
    }
}

/// How files are read. Each setting concerns the formats that know it, and no other.
///
/// # Examples
///
/// ```
/// use vesper_data::{ReadSettings, Sources};
/// use vesper_data::source::BrokenRecords;
///
/// # let folder = tempfile::tempdir()?;
/// # let file = folder.path().join("pages.jsonl");
/// std::fs::write(&file, "{\"page\": {\"body\": \"Un.\"}}\nnonsense\n{\"page\": {\"body\": \"Deux.\"}}\n")?;
/// let settings = ReadSettings::default().with_text("page.body").with_broken(BrokenRecords::AtMost(10));
/// let mut documents = Sources::new([file]).with_settings(settings).documents()?;
/// let report = documents.report();
/// let texts = documents.map(|document| Ok(document?.text)).collect::<vesper_data::Result<Vec<_>>>()?;
/// assert_eq!(texts, ["Un.", "Deux."]);
/// assert_eq!(report.skipped(), 1);
/// assert!(report.messages()[0].contains("pages.jsonl, line 2: invalid JSON"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct ReadSettings {
    /// The format of every file. None (the default): by each file's content and name.
    pub format: Option<FormatKind>,
    /// What a document of a plain text file is. By default what separators separate.
    pub text_documents: TextDocuments,
    /// Where the text of a JSON or Parquet record is. By default the fields say it by their names.
    pub fields: Fields,
    /// Where in a JSON document its list of records is. None (the default): the document is the list, or else is
    /// itself the one record.
    pub records: Option<FieldPath>,
    /// What a document of a SQuAD file is. By default one question.
    pub squad: SquadDocuments,
    /// What counts in the loss, of documents that have questions and answers. By default the answers.
    pub loss: LossOn,
    /// What stands before the turns of conversations, questions and answers. By default English words.
    pub labels: Labels,
    /// How many broken records are passed over. By default none.
    pub broken: BrokenRecords,
    /// The most bytes that a line, a JSON record or a document may have, at least 1: a longer one is a broken
    /// record, and is not read into memory. By default 1 GiB.
    pub max_record_bytes: u64,
    /// The most bytes that a document of plain text may have, at least 1: a longer one is given in pieces, each a
    /// document, that end after a line break, or before white space in a longer line. By default 64 MiB.
    pub max_text_bytes: u64,
}

impl Default for ReadSettings {
    fn default() -> Self {
        Self {
            format: None,
            text_documents: TextDocuments::default(),
            fields: Fields::default(),
            records: None,
            squad: SquadDocuments::default(),
            loss: LossOn::default(),
            labels: Labels::default(),
            broken: BrokenRecords::default(),
            max_record_bytes: 1 << 30,
            max_text_bytes: 64 << 20,
        }
    }
}

impl ReadSettings {
    /// Sets [`ReadSettings::format`].
    pub fn with_format(self, format: FormatKind) -> Self {
        Self { format: Some(format), ..self }
    }

    /// Sets [`ReadSettings::text_documents`].
    pub fn with_text_documents(self, text_documents: TextDocuments) -> Self {
        Self { text_documents, ..self }
    }

    /// Sets [`ReadSettings::fields`].
    pub fn with_fields(self, fields: Fields) -> Self {
        Self { fields, ..self }
    }

    /// Takes the text at this path: [`Fields::Text`].
    pub fn with_text(self, path: impl Into<FieldPath>) -> Self {
        self.with_fields(Fields::Text(path.into()))
    }

    /// Takes the conversation at this path: [`Fields::Chat`].
    pub fn with_chat(self, path: impl Into<FieldPath>) -> Self {
        self.with_fields(Fields::Chat(path.into()))
    }

    /// Sets [`ReadSettings::records`].
    pub fn with_records(self, path: impl Into<FieldPath>) -> Self {
        Self { records: Some(path.into()), ..self }
    }

    /// Sets [`ReadSettings::squad`].
    pub fn with_squad(self, squad: SquadDocuments) -> Self {
        Self { squad, ..self }
    }

    /// Sets [`ReadSettings::loss`].
    pub fn with_loss(self, loss: LossOn) -> Self {
        Self { loss, ..self }
    }

    /// Sets [`ReadSettings::labels`].
    pub fn with_labels(self, labels: Labels) -> Self {
        Self { labels, ..self }
    }

    /// Sets [`ReadSettings::broken`].
    pub fn with_broken(self, broken: BrokenRecords) -> Self {
        Self { broken, ..self }
    }

    /// Sets [`ReadSettings::max_record_bytes`].
    pub fn with_max_record_bytes(self, max_record_bytes: u64) -> Self {
        Self { max_record_bytes, ..self }
    }

    /// Sets [`ReadSettings::max_text_bytes`].
    pub fn with_max_text_bytes(self, max_text_bytes: u64) -> Self {
        Self { max_text_bytes, ..self }
    }

    /// Checks every setting.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] names the one that is out of its range.
    pub fn validate(&self) -> Result<()> {
        for (name, bytes) in
            [("max-record-bytes", self.max_record_bytes), ("max-text-bytes", self.max_text_bytes)]
        {
            if bytes == 0 {
                return Err(DataError::Config { name, got: "0".to_owned(), expected: "at least 1" });
            }
        }
        let fields = match &self.fields {
            Fields::Auto => vec![],
            Fields::Text(path) | Fields::Chat(path) => vec![path],
            Fields::Instruction { instruction, input, output } => {
                std::iter::once(instruction).chain(input).chain([output]).collect()
            }
        };
        for path in fields {
            path.validate("fields")?;
        }
        self.records.as_ref().map_or(Ok(()), |path| path.validate("records"))
    }

    /// [`ReadSettings::max_record_bytes`] as a length in memory.
    pub(super) fn max_record(&self) -> usize {
        usize::try_from(self.max_record_bytes).unwrap_or(usize::MAX)
    }

    /// [`ReadSettings::max_text_bytes`] as a length in memory.
    pub(super) fn max_text(&self) -> usize {
        usize::try_from(self.max_text_bytes).unwrap_or(usize::MAX)
    }
}

/// What is wrong with a record of more than `limit` bytes.
pub(super) fn too_long(what: &str, limit: usize) -> String {
    format!("the {what} has more than {limit} bytes (max-record-bytes)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_survive_being_written_and_read() {
        let settings = ReadSettings::default()
            .with_format(FormatKind::Json)
            .with_fields(Fields::Instruction { instruction: "q".into(), input: None, output: "/a/0".into() })
            .with_records("data.items")
            .with_broken(BrokenRecords::Any)
            .with_labels(Labels::french());
        let json = serde_json::to_string(&settings).unwrap();
        assert_eq!(serde_json::from_str::<ReadSettings>(&json).unwrap(), settings);
        let short = r#"{"broken": {"at-most": 3}, "fields": {"text": "a.b"}}"#;
        let expected = ReadSettings::default().with_broken(BrokenRecords::AtMost(3)).with_text("a.b");
        assert_eq!(serde_json::from_str::<ReadSettings>(short).unwrap(), expected);
        assert!(serde_json::from_str::<ReadSettings>(r#"{"brokn": "any"}"#).is_err());
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let message = |settings: ReadSettings| settings.validate().unwrap_err().to_string();
        let settings = ReadSettings::default();
        assert!(settings.validate().is_ok());
        assert_eq!(
            message(settings.clone().with_max_record_bytes(0)),
            "max-record-bytes is 0: expected at least 1"
        );
        assert_eq!(
            message(settings.clone().with_max_text_bytes(0)),
            "max-text-bytes is 0: expected at least 1"
        );
        for path in ["", "a..b", ".a", "/", "/a//b"] {
            let text = message(settings.clone().with_text(path));
            assert!(text.starts_with(&format!("fields is {path:?}: expected")), "{text}");
            let text = message(settings.clone().with_records(path));
            assert!(text.starts_with(&format!("records is {path:?}: expected")), "{text}");
        }
        let fields =
            Fields::Instruction { instruction: "a".into(), input: Some("".into()), output: "b".into() };
        assert!(settings.clone().with_fields(fields).validate().is_err());
    }
}

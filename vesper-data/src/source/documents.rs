//! The documents of sources, one after the other.

use std::collections::VecDeque;
use std::iter::FusedIterator;
use std::path::{Path, PathBuf};

use super::discover::SourceFile;
use super::format::{Context, FileDocuments};
use super::input::Input;
use super::mixture::MixedDocuments;
use super::{BrokenRecords, Document, ReadReport, Sources, detect};
use crate::error::{DataError, Result};

/// The documents of files and folders, in order, or of a [`Mixture`](super::Mixture).
///
/// After an error the iterator ends. Files are read as they are needed: no more than one record, and one page of a
/// Parquet file, is in memory at a time. [`Documents::report`] tells what was passed over.
///
/// # Examples
///
/// ```
/// use vesper_data::Documents;
///
/// # let folder = tempfile::tempdir()?;
/// std::fs::write(folder.path().join("a.txt"), "One.<|endoftext|>Two.")?;
/// std::fs::write(folder.path().join("b.jsonl"), r#"{"text": "Three."}"#)?;
///
/// let mut texts = Vec::new();
/// for document in Documents::open(&[folder.path().to_path_buf()])? {
///     texts.push(document?.text);
/// }
/// assert_eq!(texts, ["One.", "Two.", "Three."]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Documents {
    reading: Reading,
    report: ReadReport,
    /// Whether a document that is given counts in the report: not within a mixture, which counts it itself.
    counts: bool,
    done: bool,
}

enum Reading {
    Files(Files),
    Mixture(Box<MixedDocuments>),
}

impl Documents {
    /// Reads files and folders with the default settings: [`Sources::documents`] of [`Sources::new`].
    ///
    /// # Errors
    ///
    /// Those of [`Sources::documents`].
    pub fn open(sources: &[PathBuf]) -> Result<Self> {
        Sources::new(sources).documents()
    }

    /// What was read and passed over so far. It may be kept, and asked while and after the documents are read.
    pub fn report(&self) -> ReadReport {
        self.report.clone()
    }

    pub(super) fn of_files(files: Vec<SourceFile>, first: PathBuf, context: Context) -> Self {
        let report = context.report.clone();
        let files = Files {
            rest: files.into(),
            current: None,
            first,
            any: false,
            skipped: 0,
            first_broken: None,
            context,
        };
        Self { reading: Reading::Files(files), report, counts: true, done: false }
    }

    pub(super) fn of_mixture(mixed: MixedDocuments, report: ReadReport) -> Self {
        Self { reading: Reading::Mixture(Box::new(mixed)), report, counts: true, done: false }
    }

    /// These documents as a part of others, whose report counts them.
    pub(super) fn uncounted(self) -> Self {
        Self { counts: false, ..self }
    }
}

impl Iterator for Documents {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let item = match &mut self.reading {
            Reading::Files(files) => files.advance().transpose(),
            Reading::Mixture(mixed) => mixed.advance().transpose(),
        };
        self.done = !matches!(item, Some(Ok(_)));
        if let (Some(Ok(document)), true) = (&item, self.counts) {
            self.report.document(&document.text);
        }
        item
    }
}

impl FusedIterator for Documents {}

impl std::fmt::Debug for Documents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut debug = f.debug_struct("Documents");
        if let Reading::Files(files) = &self.reading {
            debug.field("current", &files.current.as_ref().map(|open| &open.file.path));
            debug.field("rest", &files.rest.len());
        }
        debug.field("report", &self.report).finish_non_exhaustive()
    }
}

/// The documents of files.
struct Files {
    rest: VecDeque<SourceFile>,
    current: Option<OpenFile>,
    /// The first path that was named, for the message when there is no text at all.
    first: PathBuf,
    any: bool,
    /// The number of broken records so far, and the first of them.
    skipped: u64,
    first_broken: Option<String>,
    context: Context,
}

struct OpenFile {
    file: SourceFile,
    documents: FileDocuments,
    /// Whether it gave anything: a document, or a broken record.
    any: bool,
}

impl Files {
    /// The next document, or `None` at the end.
    fn advance(&mut self) -> Result<Option<Document>> {
        loop {
            let Some(current) = &mut self.current else {
                let Some(file) = self.rest.pop_front() else {
                    if self.any {
                        return Ok(None);
                    }
                    let why = match &self.first_broken {
                        Some(first) if self.skipped == 1 => format!(": its one record is broken: {first}"),
                        Some(first) => {
                            format!(": its {} records are broken, the first: {first}", self.skipped)
                        }
                        None => String::new(),
                    };
                    return Err(DataError::NoText { path: self.first.clone(), why });
                };
                let documents = open(&file.path, &self.context)?;
                self.current = Some(OpenFile { file, documents, any: false });
                continue;
            };
            match current.documents.next() {
                Some(Ok(document)) => {
                    current.any = true;
                    self.any = true;
                    return Ok(Some(document));
                }
                Some(Err(error)) => {
                    current.any = true;
                    self.skip(error)?;
                }
                None if current.file.named && !current.any => {
                    return Err(DataError::NoText { path: current.file.path.clone(), why: String::new() });
                }
                None => self.current = None,
            }
        }
    }

    /// Passes over what `error` concerns, if that is one record and the settings allow it.
    fn skip(&mut self, error: DataError) -> Result<()> {
        if !error.is_broken_record() {
            return Err(error);
        }
        let limit = match self.context.settings.broken {
            BrokenRecords::AtMost(0) => return Err(error),
            BrokenRecords::AtMost(limit) => limit,
            BrokenRecords::Any => u64::MAX,
        };
        if self.skipped == limit {
            return Err(DataError::TooManyBroken { limit, last: Box::new(error) });
        }
        self.skipped += 1;
        self.first_broken.get_or_insert_with(|| error.to_string());
        self.context.report.skip(&error);
        Ok(())
    }
}

fn open(path: &Path, context: &Context) -> Result<FileDocuments> {
    let mut input = Input::open(path)?;
    let kind = detect::format(&mut input, context.settings.format)?;
    kind.format().open(input, context)
}

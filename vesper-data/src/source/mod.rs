//! Documents, read from files and folders.
//!
//! A format is one file that implements [`Format`], and one row in [`FORMATS`].

mod discover;
mod jsonl;
mod lines;
mod sources;
mod text;

use std::io::Read;
use std::iter::FusedIterator;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::error::{DataError, Result};
use discover::SourceFile;

pub use jsonl::Jsonl;
pub use sources::Sources;
pub use text::{PlainText, SEPARATOR};

/// Every format, with the ones for which a file's extension is looked up first.
pub const FORMATS: &[&dyn Format] = &[&PlainText, &Jsonl];

/// One text, and where it is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The text, which is more than white space.
    pub text: String,
    /// The file.
    pub path: Arc<Path>,
    /// The line of the file on which the document starts, from 1.
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

/// The documents of one file, in the file's order.
pub type FileDocuments = Box<dyn Iterator<Item = Result<Document>> + Send>;

/// A kind of file that holds documents.
pub trait Format: Sync {
    /// The name, for messages.
    fn name(&self) -> &'static str;

    /// The extensions, in lower case and without the dot, of this format's files.
    fn extensions(&self) -> &'static [&'static str];

    /// Opens a file. The documents it yields hold more than white space: others are passed over.
    ///
    /// # Errors
    ///
    /// [`DataError::Missing`] or [`DataError::Io`]; what is wrong inside of the file comes from the iterator.
    fn open(&self, path: &Path) -> Result<FileDocuments>;
}

/// The documents of files and folders, in order.
///
/// A folder stands for all files below it that have the extension of a [`Format`], in the order of their
/// names; hidden files and folders (`.name`) are passed over. A file that is named itself is read whatever
/// its extension is: as plain text where the extension is unknown.
///
/// After an error the iterator ends. Files are read as they are needed: no more than one document is in
/// memory at a time.
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
    files: std::vec::IntoIter<SourceFile>,
    current: Option<OpenFile>,
    /// The first path that was named, for the message when there is no text at all.
    first: PathBuf,
    any: bool,
    done: bool,
}

struct OpenFile {
    file: SourceFile,
    documents: FileDocuments,
    any: bool,
}

impl Documents {
    /// Finds all files of `sources`.
    ///
    /// # Errors
    ///
    /// [`DataError::NoSources`] for an empty list, [`DataError::Missing`] for a path that does not exist,
    /// [`DataError::NoText`] for an empty file that was named, [`DataError::NoFiles`] for a folder without a
    /// file that can be read, or [`DataError::Io`]. The iterator itself yields the errors inside of files,
    /// and [`DataError::NoText`] for a named file, or for a whole data set, of white space alone.
    pub fn open(sources: &[PathBuf]) -> Result<Self> {
        let files = discover::files(sources)?;
        let first = sources.first().cloned().unwrap_or_default();
        Ok(Self { files: files.into_iter(), current: None, first, any: false, done: false })
    }

    /// The next document, or `None` at the end.
    fn advance(&mut self) -> Result<Option<Document>> {
        loop {
            let Some(current) = &mut self.current else {
                let Some(file) = self.files.next() else {
                    if self.any {
                        return Ok(None);
                    }
                    return Err(DataError::NoText { path: self.first.clone() });
                };
                let documents = file.format.open(&file.path)?;
                self.current = Some(OpenFile { file, documents, any: false });
                continue;
            };
            if let Some(document) = current.documents.next() {
                let document = document?;
                current.any = true;
                self.any = true;
                return Ok(Some(document));
            }
            if current.file.named && !current.any {
                return Err(DataError::NoText { path: current.file.path.clone() });
            }
            self.current = None;
        }
    }
}

impl Iterator for Documents {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let item = self.advance().transpose();
        self.done = !matches!(item, Some(Ok(_)));
        item
    }
}

impl FusedIterator for Documents {}

impl std::fmt::Debug for Documents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let current = self.current.as_ref().map(|open| &open.file.path);
        f.debug_struct("Documents")
            .field("current", &current)
            .field("rest", &self.files.len())
            .finish_non_exhaustive()
    }
}

/// SHA-256 over the formats, lengths and bytes of all files of `sources`, in order; their names do not count.
///
/// # Errors
///
/// Those of [`Documents::open`] and of reading the files.
pub fn content_digest(sources: &[PathBuf]) -> Result<[u8; 32]> {
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    for SourceFile { path, format, .. } in discover::files(sources)? {
        let mut file = std::fs::File::open(&path).map_err(|error| DataError::io("open", &path, error))?;
        let mut content = Sha256::new();
        let mut length = 0_u64;
        loop {
            let read = file.read(&mut buffer).map_err(|error| DataError::io("read", &path, error))?;
            if read == 0 {
                break;
            }
            content.update(buffer.get(..read).unwrap_or_default());
            length += read as u64;
        }
        // The length and the digest of each file, so that text moved from one file to the next is noticed.
        digest.update(format.name().as_bytes());
        digest.update([0]);
        digest.update(length.to_le_bytes());
        digest.update(content.finalize());
    }
    Ok(digest.finalize().into())
}

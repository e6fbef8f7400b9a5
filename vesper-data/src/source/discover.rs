//! From the paths that were named to the files to read.

use std::path::{Path, PathBuf};

use super::{FORMATS, Format, PlainText};
use crate::error::{DataError, Result};

/// A file to read, and how.
pub(super) struct SourceFile {
    pub(super) path: PathBuf,
    pub(super) format: &'static dyn Format,
    /// Whether the file itself was named, not a folder that holds it.
    pub(super) named: bool,
}

/// All files of `sources`, in order.
pub(super) fn files(sources: &[PathBuf]) -> Result<Vec<SourceFile>> {
    if sources.is_empty() {
        return Err(DataError::NoSources);
    }
    let mut files = Vec::new();
    for path in sources {
        let metadata = std::fs::metadata(path).map_err(|error| DataError::io("open", path, error))?;
        if metadata.is_dir() {
            let before = files.len();
            folder(path, &mut Vec::new(), &mut files)?;
            if files.len() == before {
                return Err(DataError::NoFiles { path: path.clone(), expected: extensions() });
            }
        } else {
            // Only a regular file's length says that it is empty: a pipe's is always 0.
            if metadata.is_file() && metadata.len() == 0 {
                return Err(DataError::NoText { path: path.clone() });
            }
            let format = format_of(path).unwrap_or(&PlainText);
            files.push(SourceFile { path: path.clone(), format, named: true });
        }
    }
    Ok(files)
}

/// Adds the files below `path`; `above` holds the real paths of the folders that lead to it.
fn folder(path: &Path, above: &mut Vec<PathBuf>, files: &mut Vec<SourceFile>) -> Result<()> {
    let failed = |error| DataError::io("read", path, error);
    let real = path.canonicalize().map_err(failed)?;
    // A link to a folder further up would go round for ever.
    if above.contains(&real) {
        return Ok(());
    }
    above.push(real);
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        entries.push(entry.map_err(failed)?.file_name());
    }
    entries.sort();
    for name in entries {
        if name.as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let child = path.join(name);
        // A link to nothing inside of a folder is as good as no file.
        let Ok(metadata) = std::fs::metadata(&child) else { continue };
        if metadata.is_dir() {
            folder(&child, above, files)?;
        } else if let Some(format) = format_of(&child) {
            files.push(SourceFile { path: child, format, named: false });
        }
    }
    above.pop();
    Ok(())
}

/// The format of a file with this name, if there is one.
fn format_of(path: &Path) -> Option<&'static dyn Format> {
    let extension = path.extension()?.to_str()?.to_ascii_lowercase();
    FORMATS.iter().copied().find(|format| format.extensions().contains(&extension.as_str()))
}

/// All extensions, for a message: ".txt, .md or .jsonl".
fn extensions() -> String {
    let all: Vec<String> = FORMATS
        .iter()
        .flat_map(|format| format.extensions())
        .map(|extension| format!(".{extension}"))
        .collect();
    match all.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        _ => all.concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extensions_are_known_in_any_case() {
        assert_eq!(format_of(Path::new("A.TXT")).unwrap().name(), "plain text");
        assert_eq!(format_of(Path::new("a.b.JsonL")).unwrap().name(), "JSONL");
        assert!(format_of(Path::new("txt")).is_none());
        assert!(format_of(Path::new("a.parquet")).is_none());
    }

    #[test]
    fn no_extension_belongs_to_two_formats() {
        let mut all: Vec<_> = FORMATS.iter().flat_map(|format| format.extensions()).collect();
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
        assert!(all.iter().all(|extension| **extension == extension.to_ascii_lowercase()));
        assert_eq!(extensions(), ".txt, .text, .md or .jsonl");
    }
}

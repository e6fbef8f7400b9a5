//! From the paths that were named to the files to read.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use glob::{MatchOptions, Pattern};

use super::{FormatKind, detect};
use crate::error::{DataError, Result, one_line};

/// A file to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SourceFile {
    pub(super) path: PathBuf,
    /// Whether the file itself was named, not a folder or a pattern that leads to it.
    pub(super) named: bool,
}

/// Adds the files that `path` stands for: a file, a folder or a pattern. Folders give the files of `format`, or of any.
pub(super) fn files(path: &Path, format: Option<FormatKind>, files: &mut Vec<SourceFile>) -> Result<()> {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) => {
            // A file may have a star in its name, too.
            return match path.to_str() {
                Some(pattern) if is_pattern(path.as_os_str()) => matches(pattern, format, files),
                _ => Err(DataError::io("open", path, error)),
            };
        }
    };
    if metadata.is_dir() {
        let before = files.len();
        folder(path, format, &mut Vec::new(), files)?;
        if files.len() == before {
            let expected = detect::extensions(format);
            return Err(DataError::NoFiles { path: path.to_path_buf(), expected });
        }
        return Ok(());
    }
    // Only a regular file's length says that it is empty: a pipe's is always 0.
    if metadata.is_file() && metadata.len() == 0 {
        return Err(DataError::NoText { path: path.to_path_buf(), why: String::new() });
    }
    files.push(SourceFile { path: path.to_path_buf(), named: true });
    Ok(())
}

/// Adds the files that fit a pattern, in the order of their names; folders that fit it give the files below them.
fn matches(pattern: &str, format: Option<FormatKind>, files: &mut Vec<SourceFile>) -> Result<()> {
    // What comes before the first part with a star is one folder.
    let mut parts = Path::new(pattern).components().peekable();
    let mut base = PathBuf::new();
    while let Some(part) = parts.next_if(|part| !is_pattern(part.as_os_str())) {
        base.push(part);
    }
    let parts: Vec<_> = parts.map(|part| part.as_os_str().to_string_lossy()).collect();
    let parsed = Pattern::new(&parts.join("/")).map_err(|error| DataError::Config {
        name: "a pattern of files",
        got: format!("{pattern} ({})", one_line(error)),
        expected: "*, ?, [a-z], or ** for folders within folders",
    })?;
    let deep = parts.iter().any(|part| part == "**");
    let depth = if deep { usize::MAX } else { parts.len() };
    let hidden = parts.iter().any(|part| part.starts_with('.'));
    let mut search = Search { base, pattern: parsed, deep, hidden, format, files: Vec::new() };
    search.folder(Path::new(""), depth, &mut Vec::new())?;
    if search.files.is_empty() {
        return Err(DataError::NoMatch { pattern: pattern.to_owned() });
    }
    files.append(&mut search.files);
    Ok(())
}

fn is_pattern(name: &OsStr) -> bool {
    name.as_encoded_bytes().iter().any(|byte| b"*?[".contains(byte))
}

/// A search for files by a pattern.
struct Search {
    /// The folder that the pattern starts in; empty for the one that the program runs in.
    base: PathBuf,
    /// The pattern for what comes behind it.
    pattern: Pattern,
    /// Whether the pattern has a `**`, below which the files of a folder fit it themselves.
    deep: bool,
    /// Whether hidden folders are looked into.
    hidden: bool,
    format: Option<FormatKind>,
    files: Vec<SourceFile>,
}

impl Search {
    /// Looks `depth` folders deep into the folder `path` of the base; `above` as in [`folder`].
    fn folder(&mut self, path: &Path, depth: usize, above: &mut Vec<PathBuf>) -> Result<()> {
        // As in a shell, a star does not stand for the dot of a hidden file, nor for a slash.
        let options = MatchOptions {
            require_literal_leading_dot: true,
            require_literal_separator: true,
            ..MatchOptions::new()
        };
        let here = if self.base.as_os_str().is_empty() && path.as_os_str().is_empty() {
            PathBuf::from(".")
        } else {
            self.base.join(path)
        };
        if !enter(&here, above)? {
            return Ok(());
        }
        for (name, child, is_dir) in entries(&here)? {
            let relative = path.join(&name);
            // Not below ".", if nothing was named.
            let child = if self.base.as_os_str().is_empty() { relative.clone() } else { child };
            let fits = self.pattern.matches_path_with(&relative, options);
            if !is_dir {
                if fits {
                    self.files.push(SourceFile { path: child, named: false });
                }
            } else if fits && !self.deep {
                folder(&child, self.format, above, &mut self.files)?;
            } else if depth > 1 && (self.hidden || !is_hidden(&name)) {
                self.folder(&relative, depth - 1, above)?;
            }
        }
        above.pop();
        Ok(())
    }
}

/// Whether a folder is one to go into: a link to a folder further up would go round for ever. It is then the last of
/// `above`, the real paths of the folders that lead to it.
fn enter(path: &Path, above: &mut Vec<PathBuf>) -> Result<bool> {
    let real = path.canonicalize().map_err(|error| DataError::io("read", path, error))?;
    let new = !above.contains(&real);
    if new {
        above.push(real);
    }
    Ok(new)
}

/// What is in a folder, in the order of the names: name, path, and whether it is a folder.
fn entries(path: &Path) -> Result<Vec<(OsString, PathBuf, bool)>> {
    let failed = |error| DataError::io("read", path, error);
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let child = path.join(&name);
        // A link to nothing inside of a folder is as good as no file.
        let Ok(metadata) = std::fs::metadata(&child) else { continue };
        entries.push((name, child, metadata.is_dir()));
    }
    entries.sort();
    Ok(entries)
}

fn is_hidden(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".")
}

/// Adds the files below `path`; `above` holds the real paths of the folders that lead to it.
fn folder(
    path: &Path,
    format: Option<FormatKind>,
    above: &mut Vec<PathBuf>,
    files: &mut Vec<SourceFile>,
) -> Result<()> {
    if !enter(path, above)? {
        return Ok(());
    }
    for (name, child, is_dir) in entries(path)? {
        if is_hidden(&name) {
            continue;
        }
        if is_dir {
            folder(&child, format, above, files)?;
        } else if detect::is_data(&child, format) {
            files.push(SourceFile { path: child, named: false });
        }
    }
    above.pop();
    Ok(())
}

//! What a data set is read from: paths, and how they are read.

use std::path::PathBuf;

use sha2::{Digest, Sha256};

use super::{Documents, discover};
use crate::error::Result;

/// Files and folders, and how they are read: everything that decides which documents there are.
///
/// # Examples
///
/// ```
/// use vesper_data::Sources;
///
/// # let folder = tempfile::tempdir()?;
/// let file = folder.path().join("a.txt");
/// std::fs::write(&file, "One.<|endoftext|>Two.")?;
/// let sources = Sources::new([file.clone()]);
/// assert_eq!(sources.files()?, [file]);
/// assert_eq!(sources.documents()?.count(), 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Sources {
    paths: Vec<PathBuf>,
}

impl Sources {
    /// Reads these files and folders, in order.
    pub fn new(paths: impl IntoIterator<Item = impl Into<PathBuf>>) -> Self {
        Self { paths: paths.into_iter().map(Into::into).collect() }
    }

    /// The paths as they were named.
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// All files that will be read, in order.
    ///
    /// # Errors
    ///
    /// Those of [`Documents::open`].
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        Ok(discover::files(&self.paths)?.into_iter().map(|file| file.path).collect())
    }

    /// The documents, in order.
    ///
    /// # Errors
    ///
    /// Those of [`Documents::open`].
    pub fn documents(&self) -> Result<Documents> {
        Documents::open(&self.paths)
    }

    /// SHA-256 of everything but the files' bytes that decides which documents there are: the format of each file,
    /// and the settings.
    ///
    /// # Errors
    ///
    /// Those of [`Documents::open`].
    pub fn settings_digest(&self) -> Result<[u8; 32]> {
        let mut digest = Sha256::new();
        for file in discover::files(&self.paths)? {
            digest.update(file.format.name().as_bytes());
            digest.update([0]);
        }
        Ok(digest.finalize().into())
    }
}

impl From<&[PathBuf]> for Sources {
    fn from(paths: &[PathBuf]) -> Self {
        Self::new(paths)
    }
}

//! What a data set is read from: paths, and how they are read.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::discover::{self, SourceFile};
use super::format::Context;
use super::input::Input;
use super::{BrokenRecords, Documents, Mixture, ReadReport, ReadSettings, detect};
use crate::error::{DataError, Result};

/// What comes before the name of a data set of the Hugging Face hub.
const HUB: &str = "hf://";

/// Files, folders and data sets, and how they are read: everything that decides which documents there are.
///
/// A path is one of these:
///
/// - a file, which is read whatever its name is;
/// - a folder: all files below it whose extension is that of a [`FormatKind`](super::FormatKind), in the order of
///   their names; hidden files and folders (`.name`) are passed over;
/// - a pattern such as `data/*.txt` or `data/**/part-?.jsonl.gz`: all files that fit it, in the order of their names;
/// - with the feature `hub`, a data set of the Hugging Face hub: `hf://datasets/OWNER/NAME`, with `@REVISION` and a
///   path or a pattern behind it where wanted (see `source::Hub`).
///
/// The format of each file is found by its content and name, unless [`ReadSettings::format`] says it. Text that is
/// compressed with gzip or zstd is decompressed.
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
    settings: Arc<ReadSettings>,
    mixture: Option<Box<Mixture>>,
    #[cfg(feature = "hub")]
    hub: super::hub::Shared,
}

impl Sources {
    /// Reads these files, folders, patterns and data sets, in order.
    pub fn new(paths: impl IntoIterator<Item = impl Into<PathBuf>>) -> Self {
        Self { paths: paths.into_iter().map(Into::into).collect(), ..Self::default() }
    }

    /// Sets how the files are read. The parts of a mixture keep their own settings.
    pub fn with_settings(self, settings: ReadSettings) -> Self {
        Self { settings: Arc::new(settings), ..self }
    }

    /// Sets how data sets of the Hugging Face hub are found. The parts of a mixture keep their own.
    #[cfg(feature = "hub")]
    pub fn with_hub(self, hub: super::Hub) -> Self {
        Self { hub: hub.into(), ..self }
    }

    /// The paths as they were named; of a mixture those of all of its parts.
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// How the files are read.
    pub fn settings(&self) -> &ReadSettings {
        &self.settings
    }

    /// All files that will be read, in order; of a mixture those of each part, one part after the other.
    ///
    /// Data sets of the Hugging Face hub are downloaded.
    ///
    /// # Errors
    ///
    /// Those of [`Sources::documents`], but for the settings.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        if let Some(mixture) = &self.mixture {
            let mut files = Vec::new();
            for (sources, _) in &mixture.parts {
                files.extend(sources.files()?);
            }
            return Ok(files);
        }
        Ok(self.discover()?.into_iter().map(|file| file.path).collect())
    }

    /// The documents, in order.
    ///
    /// # Errors
    ///
    /// [`DataError::NoSources`] for an empty list, [`DataError::Missing`] for a path that does not exist,
    /// [`DataError::NoText`] for an empty file that was named, [`DataError::NoFiles`] for a folder without a
    /// file that can be read, [`DataError::NoMatch`] for a pattern that no file fits, [`DataError::Config`] for a
    /// setting out of its range, [`DataError::Feature`], [`DataError::HubPermission`] or [`DataError::Hub`] for a
    /// data set of the hub, or [`DataError::Io`].
    ///
    /// The iterator itself yields [`DataError::Unreadable`] for a file that is damaged or not of its format,
    /// [`DataError::Record`] or [`DataError::InvalidUtf8`] for a broken record, [`DataError::TooManyBroken`] where the
    /// settings allow some, but not as many, and [`DataError::NoText`] for a named file, or for a whole data set, of
    /// white space alone.
    pub fn documents(&self) -> Result<Documents> {
        self.read(ReadReport::default())
    }

    /// The documents, reported in `report`.
    pub(crate) fn read(&self, report: ReadReport) -> Result<Documents> {
        if let Some(mixture) = &self.mixture {
            let mixed = mixture.documents(&report)?;
            return Ok(Documents::of_mixture(mixed, report));
        }
        self.settings.validate()?;
        let files = self.discover()?;
        let first = self.paths.first().cloned().unwrap_or_default();
        Ok(Documents::of_files(files, first, Context { settings: self.settings.clone(), report }))
    }

    /// SHA-256 of everything but the files' bytes that decides which documents there are: the format of each file,
    /// the settings, and the weights and seed of a mixture. Where files lie, and how many broken records are allowed,
    /// does not count.
    ///
    /// # Errors
    ///
    /// Those of [`Sources::documents`] and of reading the start of each file.
    pub fn settings_digest(&self) -> Result<[u8; 32]> {
        let mut digest = Sha256::new();
        if let Some(mixture) = &self.mixture {
            mixture.digest(&mut digest)?;
            return Ok(digest.finalize().into());
        }
        self.settings.validate()?;
        let settings = ReadSettings {
            format: None,
            broken: BrokenRecords::default(),
            ..ReadSettings::clone(&self.settings)
        };
        let settings = serde_json::to_vec(&settings).map_err(|error| DataError::Config {
            name: "the settings",
            got: error.to_string(),
            expected: "what JSON can hold",
        })?;
        digest.update(settings);
        for file in self.discover()? {
            digest.update([0]);
            digest.update(self.format_of(&file.path)?.as_bytes());
        }
        Ok(digest.finalize().into())
    }

    /// The name of the format that a file is read as.
    fn format_of(&self, path: &Path) -> Result<&'static str> {
        Ok(detect::format(&mut Input::open(path)?, self.settings.format)?.name())
    }

    /// Finds all files.
    fn discover(&self) -> Result<Vec<SourceFile>> {
        if self.paths.is_empty() {
            return Err(DataError::NoSources);
        }
        let mut files = Vec::new();
        for path in &self.paths {
            match path.to_str().filter(|path| path.starts_with(HUB)) {
                Some(name) => self.discover_on_hub(name, &mut files)?,
                None => discover::files(path, self.settings.format, &mut files)?,
            }
        }
        Ok(files)
    }

    #[cfg(feature = "hub")]
    fn discover_on_hub(&self, name: &str, files: &mut Vec<SourceFile>) -> Result<()> {
        let found = self.hub.files(name, self.settings.format)?;
        files.extend(found.into_iter().map(|path| SourceFile { path, named: false }));
        Ok(())
    }

    #[cfg(not(feature = "hub"))]
    #[expect(clippy::unused_self, reason = "the hub's settings are in it where there is a hub")]
    fn discover_on_hub(&self, name: &str, _: &mut Vec<SourceFile>) -> Result<()> {
        Err(DataError::Feature { what: name.to_owned(), feature: "hub" })
    }

    /// Sets how many broken records are passed over, in all parts.
    pub(super) fn pass_over(&mut self, broken: BrokenRecords) {
        Arc::make_mut(&mut self.settings).broken = broken;
        if let Some(mixture) = &mut self.mixture {
            for (sources, _) in &mut mixture.parts {
                sources.pass_over(broken);
            }
        }
    }
}

impl From<&[PathBuf]> for Sources {
    fn from(paths: &[PathBuf]) -> Self {
        Self::new(paths)
    }
}

impl From<Mixture> for Sources {
    fn from(mixture: Mixture) -> Self {
        let paths = mixture.parts.iter().flat_map(|(sources, _)| sources.paths.clone()).collect();
        Self { paths, mixture: Some(Box::new(mixture)), ..Self::default() }
    }
}

/// SHA-256 over the formats, lengths and bytes of all files of `sources`, in order; their names do not count.
///
/// # Errors
///
/// Those of [`Documents::open`] and of reading the files.
pub fn content_digest(sources: &[PathBuf]) -> Result<[u8; 32]> {
    let sources = Sources::new(sources);
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    for SourceFile { path, .. } in sources.discover()? {
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
        digest.update(sources.format_of(&path)?.as_bytes());
        digest.update([0]);
        digest.update(length.to_le_bytes());
        digest.update(content.finalize());
    }
    Ok(digest.finalize().into())
}

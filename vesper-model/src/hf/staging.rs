//! Files that are written aside, and put in their places when all of them are there.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::{CONFIG, WEIGHTS, io};
use crate::Result;

/// A temporary folder on the disk of the directory, removed unless it becomes the directory.
pub(super) struct Staging {
    folder: TempDir,
    target: PathBuf,
    existed: bool,
}

impl Staging {
    pub(super) fn beside(target: &Path) -> Result<Self> {
        let existed = target.is_dir();
        let parent = match target.parent() {
            _ if existed => target,
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).map_err(io(parent))?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(".saving-");
        // The folder is to become the directory, which others may read: temporary folders are private otherwise.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        let folder = builder.tempdir_in(parent).map_err(io(target))?;
        Ok(Self { folder, target: target.to_path_buf(), existed })
    }

    /// Writes a file in the folder; an error names the file that it was to become.
    pub(super) fn file(&self, name: &str, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        use crate::ModelError::{InvalidFile, Io};
        let path = self.target.join(name);
        write(&self.folder.path().join(name)).map_err(|error| match error {
            Io { source, .. } => Io { path, source },
            InvalidFile { reason, .. } => InvalidFile { path, reason },
            other => other,
        })
    }

    /// Puts the weights and the texts that were written in their places.
    pub(super) fn install(self, texts: &[(&'static str, String)]) -> Result<()> {
        if self.existed {
            self.replace(texts)?;
            sync_folder(&self.target);
        } else {
            fs::rename(self.folder.path(), &self.target).map_err(io(&self.target))?;
            let _ = self.folder.keep();
            sync_folder(self.target.parent().unwrap_or(Path::new(".")));
        }
        Ok(())
    }

    fn replace(&self, texts: &[(&'static str, String)]) -> Result<()> {
        let config = self.target.join(CONFIG);
        let aside = self.folder.path().join("old-config.json");
        let unchanged = fs::read_to_string(&config)
            .is_ok_and(|old| texts.iter().any(|(name, text)| *name == CONFIG && *text == old));
        let moved = !unchanged && config.exists();
        if moved {
            fs::rename(&config, &aside).map_err(io(&config))?;
        }
        // The one that can fail though all is written: Windows does not replace a file that a reader has mapped.
        if let Err(error) = self.rename(WEIGHTS) {
            if moved {
                fs::rename(&aside, &config).map_err(io(&config))?;
            }
            return Err(error);
        }
        texts.iter().try_for_each(|(name, _)| self.rename(name))
    }

    /// Puts one file that was written in its place.
    pub(super) fn rename(&self, name: &str) -> Result<()> {
        let path = self.target.join(name);
        fs::rename(self.folder.path().join(name), &path).map_err(io(&path))
    }
}

/// Makes renames in the folder last through a power cut, where a system can say so. Not being able to is no
/// failure: the files themselves are on the disk.
fn sync_folder(folder: &Path) {
    #[cfg(unix)]
    if let Ok(folder) = fs::File::open(if folder.as_os_str().is_empty() { Path::new(".") } else { folder }) {
        let _ = folder.sync_all();
    }
    #[cfg(not(unix))]
    let _ = folder;
}

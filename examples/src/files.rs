//! Writing small files so that a crash or a full disk leaves the old one.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tempfile::NamedTempFile;

/// Writes a file through a temporary one in the same folder, flushed to disk before it takes its place.
///
/// # Errors
/// A full disk, a missing folder: names the file.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    replace(path, |file| file.write_all(bytes))
}

/// Like [`write()`], with the content written by `fill`.
///
/// # Errors
/// As [`write()`], and those of `fill`.
pub fn replace(path: &Path, fill: impl FnOnce(&mut NamedTempFile) -> std::io::Result<()>) -> Result<()> {
    let folder = parent(path);
    let write = || -> std::io::Result<()> {
        let mut file = temporary(folder)?;
        fill(&mut file)?;
        file.flush()?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

/// The folder that a path is in.
fn parent(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A temporary file with the permissions of any new file; `tempfile`'s own are for its owner alone.
fn temporary(folder: &Path) -> std::io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    #[cfg(unix)]
    builder.permissions(permissions); // less the umask
    builder.tempfile_in(folder)
}

/// Writes a value as indented JSON.
///
/// # Errors
/// As [`write()`].
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    write(path, &text)
}

/// Reads a value of JSON.
///
/// # Errors
/// A missing file or one that is not what it should be: names the file and the place in it.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is damaged", path.display()))
}

/// Makes a folder and those above it.
///
/// # Errors
/// Names the folder.
pub fn create_dir(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).with_context(|| format!("cannot create the folder {}", path.display()))
}

/// A folder that a program begins to fill: until it is kept, an error takes away again what was not there before, so that a
/// wrong argument leaves nothing.
#[derive(Debug)]
pub struct NewFolder(Arc<Mutex<Begun>>);

/// What is to happen to a [`NewFolder`], for others who may have to end the program.
#[derive(Debug)]
pub struct Begun {
    /// The folders that were made, the outermost first, and whether it is the one that is filled.
    new: Vec<(PathBuf, bool)>,
    kept: bool,
}

impl Begun {
    /// Whether what is in it is worth keeping.
    pub fn is_kept(&self) -> bool {
        self.kept
    }

    /// Takes away again what is not kept. To be repeated where another thread may have gone on making folders.
    pub fn remove(&self) {
        if self.kept {
            return;
        }
        // The program ends in any case. Those above may have got other things since, of other programs: these stay.
        for (folder, filled) in self.new.iter().rev() {
            if *filled {
                remove_while_written(folder);
            } else {
                let _ = std::fs::remove_dir(folder);
            }
        }
    }
}

/// Takes away a folder in which another thread may still be making files: as soon as it has another name, that finds none.
fn remove_while_written(folder: &Path) {
    if folder.symlink_metadata().is_err() {
        return;
    }
    let aside = tempfile::tempdir_in(parent(folder));
    let moved =
        aside.and_then(|aside| std::fs::rename(folder, aside.path().join("removed")).map(|()| aside.close()));
    if moved.is_err() {
        // Not where a file in it is open, on some systems.
        let _ = std::fs::remove_dir_all(folder);
    }
}

impl NewFolder {
    /// Makes a folder and those above it.
    ///
    /// # Errors
    /// Names the folder.
    pub fn create(path: &Path) -> Result<Self> {
        Self::create_after(path, |_| Ok(())).map(|(folder, ())| folder)
    }

    /// As [`NewFolder::create`], once it is arranged for how it may go again.
    ///
    /// # Errors
    /// As [`NewFolder::create`], and those of `arrange`.
    pub fn create_after<T>(
        path: &Path,
        arrange: impl FnOnce(Arc<Mutex<Begun>>) -> Result<T>,
    ) -> Result<(Self, T)> {
        // A link that leads nowhere is there: it would go, too.
        let there = |path: &Path| path.as_os_str().is_empty() || path.symlink_metadata().is_ok();
        let missing: Vec<&Path> = path.ancestors().take_while(|path| !there(path)).collect();
        let folder = Self(Arc::new(Mutex::new(Begun { new: Vec::new(), kept: false })));
        let arranged = arrange(Arc::clone(&folder.0))?;
        // What is made of them goes again; what another program makes in the meantime is not ours.
        for missing in missing.into_iter().rev() {
            let mut begun = folder.lock();
            match std::fs::create_dir(missing) {
                Ok(()) => begun.new.push((missing.to_path_buf(), missing == path)),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => begun.new.clear(),
                Err(_) => break, // said below
            }
        }
        create_dir(path)?;
        Ok((folder, arranged))
    }

    /// What is in it is worth keeping, whatever happens.
    pub fn keep(&mut self) {
        self.lock().kept = true;
    }

    fn lock(&self) -> MutexGuard<'_, Begun> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        // Waits where Ctrl-C is removing it.
        self.lock().remove();
    }
}

/// The length of a file, in bytes.
///
/// # Errors
/// Names the file.
pub fn size(path: &Path) -> Result<u64> {
    let about = std::fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(about.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_not_kept_leaves_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let (old, new) = (folder.path().join("old"), folder.path().join("old/a/b"));
        create_dir(&old).unwrap();
        std::fs::write(old.join("mine"), "text").unwrap();
        let begun = NewFolder::create(&new).unwrap();
        std::fs::write(new.join("part"), "text").unwrap();
        drop(begun);
        assert!(old.join("mine").is_file() && !old.join("a").exists());
        drop(NewFolder::create(&old).unwrap());
        assert!(old.join("mine").is_file());
        // What others put beside it stays.
        let begun = NewFolder::create(&new).unwrap();
        std::fs::write(old.join("a/others"), "text").unwrap();
        drop(begun);
        assert!(old.join("a/others").is_file() && !new.exists());
        // So does nothing of this one, whoever is still writing.
        let begun = NewFolder::create(&new).unwrap();
        let writing = std::thread::spawn({
            let new = new.clone();
            // Ends when the folder is gone.
            move || {
                (0..1_000_000)
                    .take_while(|name| std::fs::create_dir(new.join(format!("{name}"))).is_ok())
                    .count()
            }
        });
        while !new.join("10").exists() {
            std::thread::yield_now();
        }
        drop(begun);
        assert!(!new.exists() && writing.join().unwrap() > 10);
        let mut begun = NewFolder::create(&new).unwrap();
        begun.keep();
        drop(begun);
        assert!(new.is_dir());
        // A file where a folder must be.
        let error = NewFolder::create(&old.join("mine/c")).unwrap_err();
        assert!(error.to_string().contains("mine/c"), "{error}");
        assert!(old.join("mine").is_file());
        #[cfg(unix)]
        {
            // A link to what is not there is there.
            std::os::unix::fs::symlink("elsewhere", old.join("link")).unwrap();
            for path in ["link", "link/c"] {
                let error = NewFolder::create(&old.join(path)).unwrap_err();
                assert!(error.to_string().contains(path), "{error}");
                assert!(old.join("link").is_symlink(), "{path}");
            }
        }
    }
}

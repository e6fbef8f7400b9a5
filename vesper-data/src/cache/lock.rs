//! One builder a cache at a time, whatever process it is in.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;
use std::time::Duration;

use crate::error::{DataError, Result};

/// The file in a cache's folder that its builder holds locked. It stays there when the builder is done: removing it
/// could take it away from under a process that waits for it.
const LOCK: &str = "build.lock";

/// How often a process that waits asks again.
const PATIENCE: Duration = Duration::from_millis(20);

/// The right to build the cache in a folder. The system takes it back when the process ends, however it ends.
#[derive(Debug)]
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    /// Waits until no one else holds the lock; `wait` is called again and again meanwhile and may give up.
    pub(super) fn acquire(folder: &Path, mut wait: impl FnMut() -> Result<()>) -> Result<Self> {
        loop {
            if let Some(lock) = Self::try_acquire(folder)? {
                return Ok(lock);
            }
            wait()?;
            std::thread::sleep(PATIENCE);
        }
    }

    /// The lock, or `None` where someone else holds it.
    pub(super) fn try_acquire(folder: &Path) -> Result<Option<Self>> {
        std::fs::create_dir_all(folder).map_err(|error| DataError::io("create", folder, error))?;
        let path = folder.join(LOCK);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| DataError::io("create", &path, error))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Self { _file: file })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(DataError::io("lock", &path, error)),
        }
    }
}

//! The standard output: a closed pipe is no error, anything else is, such as a full disk.

use std::io::{Error, ErrorKind, Result};
use std::sync::OnceLock;

/// The first thing that went wrong.
static FAILED: OnceLock<Error> = OnceLock::new();

/// Keeps what went wrong in writing to the standard output for [`check`].
pub fn keep(written: Result<()>) {
    if let Err(error) = written
        && error.kind() != ErrorKind::BrokenPipe
    {
        // Later errors follow from the first.
        let _ = FAILED.set(error);
    }
}

/// Whether all that was said has been written, as far as somebody reads it.
///
/// # Errors
/// What went wrong first.
pub fn check() -> anyhow::Result<()> {
    match FAILED.get() {
        Some(error) => Err(anyhow::anyhow!("cannot write to the standard output: {error}")),
        None => Ok(()),
    }
}

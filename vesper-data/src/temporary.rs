//! Temporary files that become files of the user.

use std::path::Path;

const PREFIX: &str = ".vesper-";

/// A temporary file with the permissions of any new file; `tempfile`'s own are for its owner alone.
pub(crate) fn file(folder: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    #[cfg(unix)]
    builder.permissions(permissions); // less the umask
    builder.prefix(PREFIX).tempfile_in(folder)
}

/// Whether a file has the name of a temporary one: a program that was killed leaves it.
pub(crate) fn is_name(name: &str) -> bool {
    name.starts_with(PREFIX)
}

//! How a source file looked when it was read: to see without reading it that it is still the same.

use std::fs::Metadata;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sha2::{Digest, Sha256};

use crate::error::{DataError, Result};

/// Files that changed within this time before they were looked at may change again without another time: file
/// systems keep times in steps of up to two seconds.
const RECENT: Duration = Duration::from_secs(2);
/// The nanoseconds of a time that says nothing.
const NO_TIME: u32 = u32::MAX;

/// Length and modification time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) length: u64,
    /// Since 1970; before it, they are negative.
    pub(super) seconds: i64,
    pub(super) nanoseconds: u32,
}

/// A source file: its path, how it looked, and the SHA-256 of its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SourceStamp {
    /// The absolute path as the system has it.
    pub(super) path: Vec<u8>,
    pub(super) stamp: Stamp,
    pub(super) content: [u8; 32],
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        let length = metadata.len();
        let since = metadata.modified().map(|time| match time.duration_since(UNIX_EPOCH) {
            Ok(after) => (after.as_secs() as i64, after.subsec_nanos()),
            // Negative seconds and positive nanoseconds, as the system itself has it.
            Err(before) => {
                let before = before.duration();
                match before.subsec_nanos() {
                    0 => (-(before.as_secs() as i64), 0),
                    nanoseconds => (-(before.as_secs() as i64) - 1, 1_000_000_000 - nanoseconds),
                }
            }
        });
        let (seconds, nanoseconds) = since.unwrap_or((0, NO_TIME));
        Self { length, seconds, nanoseconds }
    }

    /// Looks at a file.
    pub(super) fn read(path: &Path) -> Result<Self> {
        std::fs::metadata(path)
            .map(|metadata| Self::of(&metadata))
            .map_err(|error| DataError::io("open", path, error))
    }

    /// Whether a file that looked like `self` and looks like `now` cannot have changed.
    pub(super) fn vouches_for(self, now: Self) -> bool {
        self == now && self.nanoseconds != NO_TIME
    }

    /// Without a time that is too recent to say anything.
    fn settled(self) -> Self {
        let modified = u64::try_from(self.seconds).ok().and_then(|seconds| {
            UNIX_EPOCH.checked_add(Duration::new(seconds, self.nanoseconds.min(999_999_999)))
        });
        let recent = modified.is_some_and(|modified| modified + RECENT > SystemTime::now());
        if recent { Self { nanoseconds: NO_TIME, ..self } } else { self }
    }
}

/// All files of a data set, as they look now.
#[derive(Debug)]
pub(super) struct Files {
    paths: Vec<PathBuf>,
    names: Vec<Vec<u8>>,
    now: Vec<Stamp>,
}

impl Files {
    pub(super) fn look(paths: Vec<PathBuf>) -> Result<Self> {
        let names = paths.iter().map(|path| name(path)).collect::<Result<_>>()?;
        let now = paths.iter().map(|path| Stamp::read(path)).collect::<Result<_>>()?;
        Ok(Self { paths, names, now })
    }

    /// The lengths of all files together.
    pub(super) fn bytes(&self) -> u64 {
        self.now.iter().map(|stamp| stamp.length).sum()
    }

    /// Whether these are the files of `known`, in their order, and none has changed as far as can be seen.
    pub(super) fn unchanged_since(&self, known: &[SourceStamp]) -> bool {
        self.names.len() == known.len()
            && self
                .names
                .iter()
                .zip(&self.now)
                .zip(known)
                .all(|((name, now), known)| *name == known.path && known.stamp.vouches_for(*now))
    }

    /// The files with the digests of their bytes: read, where `known` does not vouch for them.
    pub(super) fn digest(&self, known: &[SourceStamp]) -> Result<Vec<SourceStamp>> {
        let by_name: std::collections::HashMap<&[u8], &SourceStamp> =
            known.iter().map(|known| (known.path.as_slice(), known)).collect();
        let rows = self.paths.iter().zip(&self.names).zip(&self.now);
        rows.map(|((path, name), now)| {
            let known = by_name.get(name.as_slice()).filter(|known| known.stamp.vouches_for(*now));
            let content = match known {
                Some(known) => known.content,
                None => digest_file(path)?,
            };
            Ok(SourceStamp { path: name.clone(), stamp: now.settled(), content })
        })
        .collect()
    }

    /// Checks that no file has changed since it was looked at and digested: [`DataError::SourceChanged`] names it.
    pub(super) fn check(&self, digested: &[SourceStamp]) -> Result<()> {
        for ((path, before), digested) in self.paths.iter().zip(&self.now).zip(digested) {
            let changed =
                |same| if same { Ok(()) } else { Err(DataError::SourceChanged { path: path.clone() }) };
            match Stamp::read(path) {
                Ok(now) if before.vouches_for(now) => {}
                Ok(_) => changed(digest_file(path)? == digested.content)?,
                Err(_) => changed(false)?,
            }
        }
        Ok(())
    }
}

/// SHA-256 over how the files are read, and the lengths and digests of all of them; their names do not count.
pub(super) fn content(settings: &[u8; 32], files: &[SourceStamp]) -> [u8; 32] {
    let mut digest = Sha256::new_with_prefix(settings);
    for file in files {
        // The length and the digest of each file, so that text moved from one file to the next is noticed.
        digest.update(file.stamp.length.to_le_bytes());
        digest.update(file.content);
    }
    digest.finalize().into()
}

/// The first file that is new or other than it was, else the first one that is gone, else the first one in another place.
pub(super) fn first_difference(before: &[SourceStamp], now: &[SourceStamp]) -> Option<PathBuf> {
    let same = |file: &SourceStamp, all: &[SourceStamp]| {
        all.iter().any(|other| other.path == file.path && other.content == file.content)
    };
    let changed = now.iter().find(|file| !same(file, before));
    let gone = || before.iter().find(|file| !same(file, now));
    let moved = || now.iter().zip(before).find(|(now, before)| now.path != before.path).map(|(now, _)| now);
    changed.or_else(gone).or_else(moved).map(|file| path_of(&file.path))
}

/// The path whose [`name`] this is.
fn path_of(name: &[u8]) -> PathBuf {
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        std::ffi::OsStr::from_bytes(name).into()
    }
    #[cfg(not(unix))]
    {
        String::from_utf8_lossy(name).into_owned().into()
    }
}

fn name(path: &Path) -> Result<Vec<u8>> {
    let path = std::path::absolute(path).map_err(|error| DataError::io("find", path, error))?;
    Ok(path.as_os_str().as_encoded_bytes().to_vec())
}

fn digest_file(path: &Path) -> Result<[u8; 32]> {
    let mut file = std::fs::File::open(path).map_err(|error| DataError::io("open", path, error))?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer).map_err(|error| DataError::io("read", path, error))? {
            0 => return Ok(digest.finalize().into()),
            read => digest.update(buffer.get(..read).unwrap_or_default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recent_time_does_not_vouch_for_a_file_and_an_old_one_does() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        std::fs::write(&path, "one").unwrap();
        let set =
            |time| std::fs::File::options().append(true).open(&path).unwrap().set_modified(time).unwrap();
        set(SystemTime::now());
        let files = Files::look(vec![path.clone()]).unwrap();
        let known = files.digest(&[]).unwrap();
        assert!(!files.unchanged_since(&known));
        for old in [UNIX_EPOCH + Duration::from_millis(1500), UNIX_EPOCH - Duration::from_millis(1500)] {
            set(old);
            let files = Files::look(vec![path.clone()]).unwrap();
            let known = files.digest(&[]).unwrap();
            assert!(files.unchanged_since(&known));
            assert_eq!(known[0].stamp.nanoseconds, 500_000_000);
        }
    }

    #[test]
    fn a_file_is_read_again_only_where_it_looks_different() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        let old = UNIX_EPOCH + Duration::from_secs(1000);
        let write = |text: &str, time| {
            std::fs::write(&path, text).unwrap();
            std::fs::File::options().append(true).open(&path).unwrap().set_modified(time).unwrap();
            Files::look(vec![path.clone()]).unwrap()
        };
        let before = write("one", old);
        let known = before.digest(&[]).unwrap();
        // What is not noticed: another text of the same length and time.
        let sly = write("two", old);
        assert!(sly.unchanged_since(&known));
        assert_eq!(sly.digest(&known).unwrap(), known);
        let touched = write("one", old + Duration::from_secs(1));
        assert!(!touched.unchanged_since(&known));
        assert_eq!(touched.digest(&known).unwrap()[0].content, known[0].content);
        before.check(&known).unwrap();
        write("two", old + Duration::from_secs(2));
        let error = before.check(&known).unwrap_err();
        assert!(error.to_string().contains("a.txt changed while it was read"), "{error}");
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(before.check(&known), Err(DataError::SourceChanged { .. })));
    }
}

//! The one error type of the crate.

use std::path::{Path, PathBuf};

/// The result of every fallible function of this crate.
pub type Result<T, E = DataError> = std::result::Result<T, E>;

/// What can go wrong between a text file and a batch.
///
/// Every message is one line that names the file (and line) concerned, what was found and what was expected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The operating system refused to read or write a file.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: "open", "read", "write", ...
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// A path that was named does not exist.
    #[error("{} does not exist", path.display())]
    Missing {
        /// The path as it was named.
        path: PathBuf,
    },
    /// No path was named at all.
    #[error("no data was named: expected at least one file or folder")]
    NoSources,
    /// A folder holds no file of a known format.
    #[error("{} holds no readable file: expected at least one {expected}", path.display())]
    NoFiles {
        /// The folder.
        path: PathBuf,
        /// The extensions that are read.
        expected: String,
    },
    /// A file, or a whole data set, holds no text.
    #[error("{} holds no text", path.display())]
    NoText {
        /// The file, or the first of the paths of the data set.
        path: PathBuf,
    },
    /// A file is not UTF-8.
    #[error("{}, line {line}: invalid UTF-8 at byte {offset} of the file{hint}", path.display())]
    InvalidUtf8 {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// The offset of the first bad byte, from the start of the file.
        offset: u64,
        /// A guess at the encoding, or nothing.
        hint: &'static str,
    },
    /// A line of a JSONL file is not an object with a "text" string.
    #[error("{}, line {line}: {problem}", path.display())]
    Jsonl {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What was found and expected.
        problem: String,
    },
    /// The data changed between two readings.
    #[error("{} changed while it was read: start again when it is complete", path.display())]
    SourceChanged {
        /// The first path of the data set.
        path: PathBuf,
    },
    /// A tokenizer file cannot be used.
    #[error("{}: {problem}", path.display())]
    TokenizerFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A tokenizer failed on a text or on ids.
    #[error("the tokenizer failed to {action}: {problem}")]
    Tokenizer {
        /// What it was doing: "encode", "decode", ...
        action: &'static str,
        /// Its own message.
        problem: String,
    },
    /// A cache file is damaged, or is no token cache.
    #[error("{} is damaged ({problem}): delete the file to have it rebuilt", path.display())]
    CacheDamaged {
        /// The file.
        path: PathBuf,
        /// What was found and expected.
        problem: String,
    },
    /// A cache file comes from another version of the format.
    #[error(
        "{} is a token cache of version {found}, this program reads version {supported}: \
         delete the file to have it rebuilt",
        path.display()
    )]
    CacheVersion {
        /// The file.
        path: PathBuf,
        /// The version in the file.
        found: u32,
        /// The version that this program reads and writes.
        supported: u32,
    },
    /// A token id does not belong to the vocabulary.
    #[error("token id {id} is outside the vocabulary of {vocab_size} tokens")]
    TokenRange {
        /// The id.
        id: u64,
        /// The number of tokens of the vocabulary.
        vocab_size: u64,
    },
    /// Tokens were asked for that the stream does not have.
    #[error("tokens {start}..{end} were asked for, the data has {len}")]
    Range {
        /// The first position asked for.
        start: u64,
        /// One past the last position asked for.
        end: u64,
        /// The number of tokens there are.
        len: u64,
    },
    /// A setting is out of its range.
    #[error("{name} is {got}: expected {expected}")]
    Config {
        /// The name of the setting.
        name: &'static str,
        /// Its value.
        got: String,
        /// The values it may have.
        expected: &'static str,
    },
    /// The data is shorter than one training window.
    #[error("seq is {seq}: one window needs {needed} tokens, the data has {tokens}")]
    TooFewTokens {
        /// The sequence length asked for.
        seq: usize,
        /// `seq + 1`.
        needed: u64,
        /// The number of tokens there are.
        tokens: u64,
    },
    /// A saved sampler state belongs to other data or another configuration.
    #[error("the saved data position does not fit: {name} was {saved}, now it is {now}")]
    State {
        /// What differs.
        name: &'static str,
        /// The value in the saved state.
        saved: u64,
        /// The value of this sampler.
        now: u64,
    },
    /// No model size follows from what was asked.
    #[error("no size for {asked}: {problem}")]
    Sizing {
        /// What was asked: a budget, or sizes.
        asked: String,
        /// Why there is no answer.
        problem: String,
    },
    /// candle could not place a batch on the device.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl DataError {
    /// An [`DataError::Io`], or [`DataError::Missing`] where the file is not there.
    pub(crate) fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        if source.kind() == std::io::ErrorKind::NotFound && matches!(action, "open" | "read") {
            return Self::Missing { path: path.to_path_buf() };
        }
        Self::Io { action, path: path.to_path_buf(), source }
    }
}

impl From<DataError> for candle_core::Error {
    fn from(error: DataError) -> Self {
        match error {
            DataError::Candle(error) => error,
            other => Self::wrap(other),
        }
    }
}

/// A message of another crate on one line.
pub(crate) fn one_line(message: impl std::fmt::Display) -> String {
    message.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_survives_the_trip_through_candle() {
        let error = candle_core::Error::from(DataError::Missing { path: "nowhere.txt".into() });
        assert!(error.to_string().starts_with("nowhere.txt does not exist"), "{error}");
    }

    #[test]
    fn a_message_of_several_lines_becomes_one() {
        assert_eq!(one_line("a\n  b\r\nc"), "a b c");
    }
}

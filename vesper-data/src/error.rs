//! The one error type of the crate.

use std::path::{Path, PathBuf};

/// The result of every fallible function of this crate.
pub type Result<T, E = DataError> = std::result::Result<T, E>;

/// Which record of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// The one that starts on this line, from 1.
    Line(u64),
    /// This row of a table, from 1.
    Row(u64),
    /// This element of a list, from 1.
    Record {
        /// Its number, from 1.
        number: u64,
        /// The line on which it starts, from 1.
        line: u64,
    },
    /// A question.
    Question {
        /// Its id, as the file gives it.
        id: String,
        /// The line on which its paragraph starts, from 1.
        line: u64,
    },
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Line(line) => write!(f, "line {line}"),
            Self::Row(row) => write!(f, "row {row}"),
            Self::Record { number, line } => write!(f, "record {number} (line {line})"),
            Self::Question { id, line } => write!(f, "question {id} (line {line})"),
        }
    }
}

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
    #[error("{} holds no text{why}", path.display())]
    NoText {
        /// The file, or the first of the paths of the data set.
        path: PathBuf,
        /// What is wrong with its records, or nothing.
        why: String,
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
    /// A record of a file cannot be used.
    #[error("{}, {place}: {problem}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// The record.
        place: Place,
        /// What was found and expected.
        problem: String,
    },
    /// There are more records that cannot be used than the settings allow.
    #[error("more than {limit} broken records, the last of them: {last}")]
    TooManyBroken {
        /// The number that is allowed.
        limit: u64,
        /// What is wrong with the one that is too many.
        last: Box<DataError>,
    },
    /// A file is cut short, damaged, or not of the format that it is read as.
    #[error("{} cannot be read as {format}: {problem}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The format, or the compression.
        format: &'static str,
        /// What was found and expected.
        problem: String,
    },
    /// No file fits a pattern like `data/*.txt`.
    #[error("no file fits the pattern {pattern}")]
    NoMatch {
        /// The pattern as it was named.
        pattern: String,
    },
    /// Something needs a feature of this crate that the program was built without.
    #[error("{what} needs a program built with vesper-data's feature \"{feature}\"")]
    Feature {
        /// What needs it.
        what: String,
        /// The feature.
        feature: &'static str,
    },
    /// The Hugging Face hub asks for a permission, or for a name that exists.
    #[error(
        "the hub refuses the data set {dataset} (status {status}): log in, open {url}, and accept its conditions \
         where it has some; then give a token of that account (from {tokens}) in the variable HF_TOKEN, or by \
         \"hf auth login\""
    )]
    HubPermission {
        /// The data set.
        dataset: String,
        /// The HTTP status: 401 or 403.
        status: u16,
        /// The data set's page.
        url: String,
        /// The page for tokens.
        tokens: String,
    },
    /// A data set of the Hugging Face hub cannot be read.
    #[error("cannot read {dataset} from the Hugging Face hub: {problem}")]
    Hub {
        /// The data set, as it was named.
        dataset: String,
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
    /// A file of a cache is damaged, or is none.
    #[error("{} is damaged ({problem}): delete {} to have it rebuilt", path.display(), whole(path).display())]
    CacheDamaged {
        /// The file.
        path: PathBuf,
        /// What was found and expected.
        problem: String,
    },
    /// A cache comes from another version of the format.
    #[error(
        "{} is of a token cache of version {found}, this program reads version {supported}: \
         delete {} to have it rebuilt",
        path.display(),
        whole(path).display()
    )]
    CacheVersion {
        /// The file.
        path: PathBuf,
        /// The version in the file.
        found: u32,
        /// The version that this program reads and writes.
        supported: u32,
    },
    /// The caller stopped the building of a cache.
    #[error(
        "the building of {} was stopped after {documents} documents ({tokens} tokens): started again, it goes on \
         after the last of its shards that are finished",
        path.display()
    )]
    Interrupted {
        /// The cache's folder.
        path: PathBuf,
        /// The documents that were tokenised, those of the unfinished shard included.
        documents: u64,
        /// Their tokens.
        tokens: u64,
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
    /// A saved state counts in an order or a packing that this program does not have.
    #[error(
        "the saved data position counts in {name} \"{saved}\", this program has \"{now}\": \
         finish the run with the version that began it, or begin a new one"
    )]
    StateOrder {
        /// "the order" or "the packing".
        name: &'static str,
        /// The one of the saved state.
        saved: String,
        /// The one of this program.
        now: &'static str,
    },
    /// The thread that prepares batches has ended.
    #[error("no more batches are prepared: {problem}")]
    Prefetch {
        /// Why.
        problem: String,
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

    /// Whether it concerns one record only, so that those behind it can still be read.
    pub(crate) fn is_broken_record(&self) -> bool {
        matches!(self, Self::Record { .. } | Self::InvalidUtf8 { .. })
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

/// What to delete where this file of a cache is damaged: its folder, or the file where it stands alone.
fn whole(path: &Path) -> &Path {
    let of_cache = path.extension().is_some_and(|extension| extension == "shard")
        || path.file_name().is_some_and(|name| name == crate::cache::MANIFEST);
    path.parent().filter(|folder| of_cache && !folder.as_os_str().is_empty()).unwrap_or(path)
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

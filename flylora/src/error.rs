use std::path::PathBuf;

use candle_core::DType;

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong, with where it did.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A field of a configuration is not in its range.
    #[error("{field} must be {expected}, got {got}")]
    Config {
        /// The field.
        field: &'static str,
        /// The range, in words.
        expected: String,
        /// The value.
        got: String,
    },
    /// A tensor does not have the shape that it must have.
    #[error("{name}: expected shape {expected:?}, got {got:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// The shape that it must have.
        expected: Vec<usize>,
        /// The shape that it has.
        got: Vec<usize>,
    },
    /// A weight is no matrix, or an empty one.
    #[error("a frozen weight must be a matrix (out, in) that is not empty, got shape {got:?}")]
    WeightShape {
        /// The weight's shape.
        got: Vec<usize>,
    },
    /// A tensor does not have a dtype that it may have.
    #[error("{name}: expected dtype {expected}, got {got:?}")]
    DType {
        /// The tensor.
        name: String,
        /// The dtypes that it may have.
        expected: String,
        /// The dtype that it has.
        got: DType,
    },
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A file is not what its name says: truncated, or of another format.
    #[error("{}: {message}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A file lacks a key.
    #[error("{}: no tensor named {key}", path.display())]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
    /// A file has a key that belongs to no adapter.
    #[error("{}: the tensor {key} belongs to none of the adapters to load{}", path.display(), more(*.others))]
    UnexpectedKey {
        /// The file.
        path: PathBuf,
        /// The first such key.
        key: String,
        /// How many more there are.
        others: usize,
    },
    /// A tensor in a file does not fit its adapter.
    #[error("{}: {key}: expected shape {expected:?}, got {got:?}", path.display())]
    FileShape {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The adapter's shape.
        expected: Vec<usize>,
        /// The shape in the file.
        got: Vec<usize>,
    },
    /// A field of an adapter's configuration file asks for what this crate does not do.
    #[error("{}: {field} = {value} is not supported ({reason})", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// Its value, as JSON.
        value: String,
        /// What is supported.
        reason: &'static str,
    },
    /// A field of an adapter's configuration file differs from the adapter that it is loaded into.
    #[error("{}: {module}: {field} is {got} in the file and {expected} in the adapter", path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// The path of the adapted module.
        module: String,
        /// The field.
        field: &'static str,
        /// The adapter's value.
        expected: String,
        /// The file's value.
        got: String,
    },
    /// A matrix cannot be decomposed.
    #[error("a matrix of shape {shape:?} cannot be decomposed: {message}")]
    Decomposition {
        /// Its rows and columns.
        shape: (usize, usize),
        /// Why not.
        message: &'static str,
    },
    /// A regular expression cannot be read.
    #[error("{field} = {pattern:?} is not a regular expression: {message}")]
    Pattern {
        /// The field that it stands in.
        field: String,
        /// The expression.
        pattern: String,
        /// What is wrong with it.
        message: String,
    },
    /// An adapter is asked for by a name that none has.
    #[error("there is no adapter named {name:?}, only {known:?}")]
    UnknownAdapter {
        /// The name asked for.
        name: String,
        /// The names that there are.
        known: Vec<String>,
    },
    /// A trained variable is not reached by the gradient.
    #[error("{parameter} has no gradient{}", .why.as_ref().map_or_else(String::new, |why| format!(": {why}")))]
    NoGradient {
        /// The first such variable.
        parameter: String,
        /// What cut it off, where that can be told.
        why: Option<String>,
    },
    /// The adapters given do not go together, or there is none.
    #[error("{message}")]
    Adapters {
        /// What is wrong with them.
        message: String,
    },
    /// An error from candle.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

fn more(others: usize) -> String {
    if others == 0 { String::new() } else { format!(" (and {others} more)") }
}

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            other => candle_core::Error::wrap(other),
        }
    }
}

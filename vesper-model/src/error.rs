//! Everything that can go wrong in this crate.

use std::path::PathBuf;

/// The crate's result.
pub type Result<T, E = ModelError> = std::result::Result<T, E>;

/// Everything that can go wrong in this crate. Messages name the file, the key and what was expected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A preset that does not exist.
    #[error("unknown model size `{name}`; there are {known}")]
    UnknownPreset {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// A configuration that does not make a model.
    #[error("invalid model configuration: {field} is {got}, expected {expected}")]
    InvalidConfig {
        /// The field, by its name in `config.json`.
        field: &'static str,
        /// Its value.
        got: String,
        /// What it must be.
        expected: String,
    },
    /// A type of quantised weights that does not exist.
    #[error("unknown type of weights `{name}`; there are {known}")]
    UnknownBlockType {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// A model that cannot be quantised.
    #[error("this model cannot be quantised: {reason}")]
    NotQuantisable {
        /// Why.
        reason: String,
    },
    /// A file that cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file whose content is not what it must be.
    #[error("{path}: {reason}")]
    InvalidFile {
        /// The file.
        path: PathBuf,
        /// What is wrong, where, and what was expected.
        reason: String,
    },
    /// A parameter that the configuration asks for is not there.
    #[error("the model has no parameter named `{name}`")]
    MissingParameter {
        /// Its name.
        name: String,
    },
    /// A tokenizer that has more entries than the model's embedding.
    #[error(
        "the tokenizer has {tokenizer} entries but the model's vocabulary has {model}: use the tokenizer that the model was trained with"
    )]
    TokenizerTooLarge {
        /// Entries of the tokenizer.
        tokenizer: usize,
        /// Rows of the embedding.
        model: usize,
    },
    /// A token id that the model has no embedding for.
    #[error("token id {id} is outside the model's vocabulary of {vocab}")]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// Rows of the embedding.
        vocab: usize,
    },
    /// A sequence longer than the model or its cache can take.
    #[error("a sequence of {got} tokens is longer than the {limit} that this model takes")]
    SequenceTooLong {
        /// Tokens asked for.
        got: usize,
        /// Tokens possible.
        limit: usize,
    },
    /// Lists for another number of sequences than there are.
    #[error("got lists for {got} sequences, but the session has {expected}")]
    Rows {
        /// Lists given.
        got: usize,
        /// Sequences there are.
        expected: usize,
    },
    /// A sequence that is not there.
    #[error("there is no sequence {row}: the session has {rows}, from 0 on")]
    NoRow {
        /// What was asked for.
        row: usize,
        /// Sequences there are.
        rows: usize,
    },
    /// A generation setting outside its range.
    #[error("invalid generation setting: {field} is {got}, expected {expected}")]
    InvalidGeneration {
        /// The setting.
        field: &'static str,
        /// Its value.
        got: String,
        /// What it must be.
        expected: &'static str,
    },
    /// Nothing to continue: no prompt, and no token that begins a document.
    #[error("the prompt is empty and the model names no bos_token_id to begin with: give at least one token")]
    EmptyPrompt,
    /// Scores from which no token can be chosen.
    #[error("cannot choose the next token: {reason}")]
    InvalidLogits {
        /// Which score is wrong, and how.
        reason: String,
    },
    /// The system gives no thread to generate on.
    #[error("cannot start a thread to generate on: {0}")]
    Thread(#[source] std::io::Error),
    /// The tokenizer failed.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A chat template that cannot be read or rendered.
    #[error("{template}: {reason}")]
    ChatTemplate {
        /// Where it stands, and the line.
        template: String,
        /// What is wrong.
        reason: String,
    },
    /// A conversation that the model's chat template does not take.
    #[error("{template} refuses this conversation: {reason}")]
    ConversationRefused {
        /// Where it stands.
        template: String,
        /// The template's own words.
        reason: String,
    },
    /// A message that does not fit into the context even without the messages before it.
    #[error("the last message makes a prompt of {got} tokens, but the model reads at most {limit}")]
    MessageTooLong {
        /// Tokens of the message, of the system prompt, and of what the template writes around them.
        got: usize,
        /// Tokens that leave room for an answer.
        limit: usize,
    },
    /// An adapter failed.
    #[error(transparent)]
    Adapter(#[from] flylora::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// A setting of metacognition outside its range.
    #[error("invalid setting of metacognition: {field} is {got}, expected {expected}")]
    InvalidMetacognition {
        /// The setting.
        field: &'static str,
        /// Its value.
        got: String,
        /// What it must be.
        expected: &'static str,
    },
    /// Predictions or scores from which nothing can be learned or measured.
    #[error("these predictions cannot be used: {reason}")]
    InvalidPredictions {
        /// What is wrong with them.
        reason: String,
    },
    /// An error head that was trained for another model.
    #[error("{head} was trained for another model: {what} is {got}, expected {expected}")]
    OtherModel {
        /// The head, by its file where it has one.
        head: String,
        /// What is another.
        what: &'static str,
        /// The model's.
        got: String,
        /// The head's.
        expected: String,
    },
}

impl From<ModelError> for candle_core::Error {
    fn from(error: ModelError) -> Self {
        match error {
            ModelError::Candle(error) => error,
            other => Self::wrap(other),
        }
    }
}

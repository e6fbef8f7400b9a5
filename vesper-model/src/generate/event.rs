//! What a generation reports.

use std::fmt;

/// One thing that happened in a generation, in order: each token, the text that it completes, and at last the end.
///
/// # Examples
/// ```
/// use vesper_model::generate::{Event, StopReason};
///
/// let events = [Event::Text("Once".into()), Event::Text(" upon".into()), Event::Finish(StopReason::Eos(2))];
/// let text: String = events.iter().filter_map(Event::text).collect();
/// assert_eq!(text, "Once upon");
/// ```
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A token was chosen. The one that ends the text is none: [`StopReason::Eos`] has it.
    Token(Token),
    /// The next piece of the text, never empty. It ends where a grapheme ends, and nothing that is a stop string or may still
    /// become one is in it, so it can come some tokens after those that it is made of. Only where there is a tokenizer.
    Text(String),
    /// Why there is no more: the last event.
    Finish(StopReason),
}

impl Event {
    /// The id of an [`Event::Token`].
    pub fn id(&self) -> Option<u32> {
        match self {
            Self::Token(token) => Some(token.id),
            _ => None,
        }
    }

    /// The piece of an [`Event::Text`].
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Text(piece) => Some(piece),
            _ => None,
        }
    }
}

/// A chosen token and how probable it was, in natural logarithms.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Under the distribution that it was drawn from: the softmax of the scores that all processors left, temperature
    /// and truncation included. Of a greedy choice: the softmax of the scores whose largest it was, after the constraints
    /// and without temperature.
    pub log_probability: f64,
    /// Under the model's own distribution, the softmax of its logits before any processor, over the ids that may be chosen;
    /// where [`Request::with_model_log_probabilities`](super::Request::with_model_log_probabilities) asks for it.
    pub model_log_probability: Option<f64>,
}

/// Why a generation gives no more tokens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum StopReason {
    /// The model chose this token, which ends the text and is no part of it.
    Eos(u32),
    /// The text came to this stop string, which is no part of it.
    Stop(String),
    /// `max_new_tokens` are generated, or there are `max_length` with the prompt.
    MaxTokens,
    /// The model cannot remember more tokens.
    ContextFull,
    /// The caller asked for it: [`Cancellation`](super::Cancellation).
    Cancelled,
    /// An error, which is given as such.
    Failed,
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Eos(id) => write!(f, "end of text (token {id})"),
            Self::Stop(text) => write!(f, "the stop string {text:?}"),
            Self::MaxTokens => f.write_str("the most tokens asked for"),
            Self::ContextFull => f.write_str("the model's context is full"),
            Self::Cancelled => f.write_str("cancelled"),
            Self::Failed => f.write_str("an error"),
        }
    }
}

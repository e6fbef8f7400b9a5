//! Generation: choosing tokens, turning them into text as they come, and the loop around both.
//!
//! [`GenerationConfig`] holds the settings, [`Sampler`] chooses one token from a row of logits by a list of
//! [`LogitsProcessor`]s, [`TokenStream`] turns ids into text piece by piece, [`StopStrings`] lets it through in whole
//! graphemes, and [`Generator`] runs a model that implements [`NextLogits`] and gives [`Event`]s until something stops it,
//! a [`Cancellation`] for one. [`BatchGenerator`] does the same for several sequences at once, and [`beam_search`] looks for the
//! likeliest continuation, both with a model that implements [`BatchLogits`].

mod batch_generator;
mod batch_logits;
mod beam;
mod cancel;
mod config;
mod event;
#[cfg(feature = "async")]
mod event_stream;
mod generator;
mod processor;
mod request;
mod sampler;
pub(crate) mod scores;
mod sequence;
mod stop;
mod stream;

pub use batch_generator::BatchGenerator;
pub use batch_logits::BatchLogits;
pub use beam::{Hypothesis, beam_search};
pub use cancel::Cancellation;
pub(crate) use config::OneOrMany;
pub use config::{EarlyStopping, GenerationConfig};
pub use event::{Event, StopReason, Token};
#[cfg(feature = "async")]
pub use event_stream::EventStream;
pub use generator::{Generator, NextLogits};
pub use processor::{
    BadWords, ForcedPrefix, FrequencyPenalty, History, LogitsProcessor, MinNewTokens, MinP, NoRepeatNgram,
    RepetitionPenalty, Temperature, TopK, TopP, Typical,
};
pub use request::Request;
pub use sampler::Sampler;
pub(crate) use sequence::first_tokens;
pub use stop::{Piece, StopStrings};
pub use stream::{SpecialTokens, TokenStream};

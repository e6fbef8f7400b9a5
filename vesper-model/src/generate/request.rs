//! What is asked of a generator.

use super::processor::LogitsProcessor;
use super::{Cancellation, GenerationConfig};

/// A prompt, the settings to continue it by, and what no file stores.
///
/// # Examples
/// ```
/// use vesper_model::generate::{Cancellation, GenerationConfig, Request};
///
/// let cancellation = Cancellation::new();
/// let request = Request::new([1, 2, 3], GenerationConfig::greedy().with_eos([0]))
///     .with_vocab_limit(50_257)
///     .with_cancellation(&cancellation);
/// # drop(request);
/// ```
#[derive(Debug)]
pub struct Request {
    pub(super) prompt: Vec<u32>,
    pub(super) config: GenerationConfig,
    pub(super) vocab_limit: usize,
    pub(super) cancellation: Cancellation,
    pub(super) model_log_probabilities: bool,
    pub(super) processors: Vec<Box<dyn LogitsProcessor>>,
}

impl Request {
    /// Continues `prompt` by `config`; an empty one begins with the `bos_token_id`.
    pub fn new(prompt: impl Into<Vec<u32>>, config: GenerationConfig) -> Self {
        Self {
            prompt: prompt.into(),
            config,
            vocab_limit: usize::MAX,
            cancellation: Cancellation::new(),
            model_log_probabilities: false,
            processors: Vec::new(),
        }
    }

    /// Never generates an id of `limit` or more; see [`Sampler::with_vocab_limit`](super::Sampler::with_vocab_limit).
    pub fn with_vocab_limit(mut self, limit: usize) -> Self {
        self.vocab_limit = limit;
        self
    }

    /// Stops before the next token once `cancellation` is set.
    pub fn with_cancellation(mut self, cancellation: &Cancellation) -> Self {
        self.cancellation = cancellation.clone();
        self
    }

    /// Sets whether [`Token::model_log_probability`](super::Token::model_log_probability) is there. It costs a copy of the
    /// logits and a pass over them.
    pub fn with_model_log_probabilities(mut self, wanted: bool) -> Self {
        self.model_log_probabilities = wanted;
        self
    }

    /// Adds a processor of one's own; see [`Sampler::with_processor`](super::Sampler::with_processor).
    pub fn with_processor(mut self, processor: impl LogitsProcessor + 'static) -> Self {
        self.processors.push(Box::new(processor));
        self
    }
}

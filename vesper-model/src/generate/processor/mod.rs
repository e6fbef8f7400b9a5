//! What changes the scores of the next token before one is chosen: one processor a file.

mod bad_words;
mod forced_prefix;
mod frequency;
mod min_new_tokens;
mod min_p;
mod no_repeat_ngram;
mod repetition;
mod temperature;
mod top_k;
mod top_p;
mod typical;

pub use bad_words::BadWords;
pub use forced_prefix::ForcedPrefix;
pub use frequency::FrequencyPenalty;
pub use min_new_tokens::MinNewTokens;
pub use min_p::MinP;
pub use no_repeat_ngram::NoRepeatNgram;
pub use repetition::RepetitionPenalty;
pub use temperature::Temperature;
pub use top_k::TopK;
pub use top_p::TopP;
pub use typical::Typical;

use super::GenerationConfig;

/// The tokens so far.
///
/// # Examples
/// ```
/// use vesper_model::generate::History;
/// let history = History::new(&[5, 6, 7], 2);
/// assert_eq!((history.tokens(), history.generated()), (&[5, 6, 7][..], &[7][..]));
/// assert_eq!((history.last(2), history.last(4)), (Some(&[6, 7][..]), None));
/// ```
#[derive(Debug, Clone, Copy)]
pub struct History<'a> {
    tokens: &'a [u32],
    prompt: usize,
}

impl<'a> History<'a> {
    /// A history whose first `prompt` tokens are the prompt.
    pub fn new(tokens: &'a [u32], prompt: usize) -> Self {
        Self { tokens, prompt: prompt.min(tokens.len()) }
    }

    /// All tokens, prompt first.
    pub fn tokens(&self) -> &'a [u32] {
        self.tokens
    }

    /// The tokens that were generated.
    pub fn generated(&self) -> &'a [u32] {
        self.tokens.get(self.prompt..).unwrap_or_default()
    }

    /// The last `n` tokens, or `None` where there are fewer.
    pub fn last(&self, n: usize) -> Option<&'a [u32]> {
        self.tokens.get(self.tokens.len().checked_sub(n)?..)
    }
}

/// Changes the scores of the next token, `(vocab,)`; minus infinity excludes a token.
///
/// Scores are no NaN and not plus infinity; a processor keeps it so. If it excludes every token, there is none to choose, which
/// is an error. A history may hold ids that have no score.
///
/// # Examples
/// ```
/// use vesper_model::generate::{GenerationConfig, History, LogitsProcessor, Sampler};
///
/// /// Only even tokens.
/// #[derive(Debug)]
/// struct Even;
///
/// impl LogitsProcessor for Even {
///     fn process(&mut self, scores: &mut [f32], _history: History<'_>) {
///         scores.iter_mut().skip(1).step_by(2).for_each(|score| *score = f32::NEG_INFINITY);
///     }
/// }
///
/// let mut sampler = Sampler::new(&GenerationConfig::greedy())?.with_processor(Even);
/// assert_eq!(sampler.sample(&mut [0.0, 3.0, 1.0], &[])?, 2);
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
pub trait LogitsProcessor: std::fmt::Debug + Send {
    /// Changes `scores` in place.
    fn process(&mut self, scores: &mut [f32], history: History<'_>);
}

/// Those that act on greedy choices too, in Hugging Face's order.
pub(super) fn constraints(config: &GenerationConfig) -> Vec<Box<dyn LogitsProcessor>> {
    let mut all: Vec<Box<dyn LogitsProcessor>> = Vec::new();
    if config.repetition_penalty != 1.0 {
        all.push(Box::new(RepetitionPenalty::new(config.repetition_penalty)));
    }
    if config.frequency_penalty != 0.0 || config.presence_penalty != 0.0 {
        all.push(Box::new(FrequencyPenalty::new(config.frequency_penalty, config.presence_penalty)));
    }
    if config.no_repeat_ngram_size > 0 {
        all.push(Box::new(NoRepeatNgram::new(config.no_repeat_ngram_size)));
    }
    if !config.bad_words_ids.is_empty() {
        all.push(Box::new(BadWords::new(config.bad_words_ids.clone(), &config.eos_token_id)));
    }
    if config.min_new_tokens > 0 {
        all.push(Box::new(MinNewTokens::new(config.min_new_tokens, config.eos_token_id.clone())));
    }
    if !config.forced_prefix.is_empty() {
        all.push(Box::new(ForcedPrefix::new(config.forced_prefix.clone())));
    }
    all
}

/// Those that shape what is drawn from, in Hugging Face's order.
pub(super) fn shapers(config: &GenerationConfig) -> Vec<Box<dyn LogitsProcessor>> {
    let mut all: Vec<Box<dyn LogitsProcessor>> = Vec::new();
    if config.is_greedy() {
        return all;
    }
    if config.temperature != 1.0 {
        all.push(Box::new(Temperature::new(config.temperature)));
    }
    if config.top_k > 0 {
        all.push(Box::new(TopK::new(config.top_k)));
    }
    if config.top_p < 1.0 {
        all.push(Box::new(TopP::new(config.top_p)));
    }
    if config.min_p > 0.0 {
        all.push(Box::new(MinP::new(config.min_p)));
    }
    if config.typical_p < 1.0 {
        all.push(Box::new(Typical::new(config.typical_p)));
    }
    all
}

/// A token that is not excluded, with its weight: `exp(score - the largest score)`.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    id: usize,
    score: f32,
    weight: f64,
}

/// Puts the tokens that are not excluded into `out`, in order of their ids; gives the sum of their weights.
fn candidates(scores: &[f32], out: &mut Vec<Candidate>) -> f64 {
    let max = f64::from(scores.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    out.clear();
    out.extend(
        scores
            .iter()
            .enumerate()
            .filter(|(_, score)| **score > f32::NEG_INFINITY)
            .map(|(id, &score)| Candidate { id, score, weight: (f64::from(score) - max).exp() }),
    );
    out.iter().map(|candidate| candidate.weight).sum()
}

/// The larger score first, the lower id among equals.
fn likelier_first(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.score.total_cmp(&a.score).then(a.id.cmp(&b.id))
}

/// Excludes all tokens but those of `kept`.
fn keep_only(scores: &mut [f32], kept: &[Candidate]) {
    scores.fill(f32::NEG_INFINITY);
    for candidate in kept {
        if let Some(score) = scores.get_mut(candidate.id) {
            *score = candidate.score;
        }
    }
}

/// Excludes a token.
fn exclude(scores: &mut [f32], id: u32) {
    if let Some(score) = scores.get_mut(id as usize) {
        *score = f32::NEG_INFINITY;
    }
}

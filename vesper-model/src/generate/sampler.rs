//! Choosing one token from a row of logits.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::processor::{self, History, LogitsProcessor};
use super::scores::{argmax, no_token};
use super::{GenerationConfig, Token};
use crate::ops::scores::{log_sum_exp, weights};
use crate::{ModelError, Result};

/// Chooses tokens by the settings of a [`GenerationConfig`], reproducibly by its seed.
///
/// The steps, in Hugging Face's order, for logits `l` of `(vocab,)`, each a [`LogitsProcessor`]:
///
/// ```text
/// RepetitionPenalty   l_i <- l_i / r  if l_i > 0, else l_i * r     for every distinct i of the history
/// FrequencyPenalty    l_i <- l_i - f * count_i - p                 for every i that was generated
/// NoRepeatNgram       excludes what would repeat n tokens
/// BadWords            excludes the end of each unwanted sequence
/// MinNewTokens        excludes the end of the text
/// ForcedPrefix        leaves one token at the beginning of an answer
/// one's own           with_processor, in their order
/// greedy              argmax l, the lowest id among equals         (if so configured: ends here)
/// Temperature         l_i <- (l_i - max l) / T
/// TopK                keeps the k largest l, and what equals the last of them
/// TopP                keeps the smallest set of the largest P with sum(set) >= p
/// MinP                keeps P(i) >= p * max P
/// Typical             keeps the P(i) whose surprise is nearest to the entropy
/// draw                P(i) = exp(l_i) / sum(exp(l))                over the tokens that are left
/// ```
///
/// The processors compute probabilities in f64; the draw and the log-probabilities take exponentials in f32 and add them up in
/// f64. One draw takes one number of a ChaCha8 stream, whatever the settings.
///
/// # Examples
/// ```
/// use vesper_model::generate::{GenerationConfig, Sampler};
///
/// let mut sampler = Sampler::new(&GenerationConfig::default().with_top_k(1))?;
/// assert_eq!(sampler.sample(&mut [0.1, 2.0, -1.0], &[])?, 1);
///
/// // A penalty of 10 on token 1, which is in the history: 2 / 10 is less than 1.5.
/// let config = GenerationConfig::greedy().with_repetition_penalty(10.0);
/// assert_eq!(Sampler::new(&config)?.sample(&mut [1.5, 2.0, -1.0], &[1])?, 0);
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
///
/// # References
/// The order is that of `GenerationMixin._get_logits_processor` in Hugging Face's transformers; the processors name their
/// own sources.
#[derive(Debug)]
pub struct Sampler {
    greedy: bool,
    constraints: Vec<Box<dyn LogitsProcessor>>,
    shapers: Vec<Box<dyn LogitsProcessor>>,
    prompt: usize,
    vocab_limit: usize,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// A sampler at the start of its random stream.
    ///
    /// # Errors
    /// [`ModelError::InvalidGeneration`] as [`GenerationConfig::validate`] has it.
    pub fn new(config: &GenerationConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            greedy: config.is_greedy(),
            constraints: processor::constraints(config),
            shapers: processor::shapers(config),
            prompt: 0,
            vocab_limit: usize::MAX,
            rng: ChaCha8Rng::seed_from_u64(config.seed),
        })
    }

    /// Never chooses an id of `limit` or more: those are rows that pad the embedding beyond the tokenizer.
    pub fn with_vocab_limit(mut self, limit: usize) -> Self {
        self.vocab_limit = limit;
        self
    }

    /// Says how many tokens at the beginning of every history are the prompt (none, if this is not called): some
    /// processors look at what was generated alone.
    pub fn with_prompt(mut self, tokens: usize) -> Self {
        self.prompt = tokens;
        self
    }

    /// Adds a processor of one's own, after the constraints of the configuration and before the temperature.
    pub fn with_processor(self, processor: impl LogitsProcessor + 'static) -> Self {
        self.with_boxed_processor(Box::new(processor))
    }

    pub(super) fn with_boxed_processor(mut self, processor: Box<dyn LogitsProcessor>) -> Self {
        self.constraints.push(processor);
        self
    }

    pub(super) fn set_vocab_limit(&mut self, limit: usize) {
        self.vocab_limit = limit;
    }

    /// Chooses the next token.
    ///
    /// `logits`: `(vocab,)`, changed in place by the processors. A score of minus infinity excludes its token. `history`:
    /// the tokens so far, prompt included.
    ///
    /// # Errors
    /// [`ModelError::InvalidLogits`] for NaN or plus infinity, or when no token is left;
    /// [`ModelError::TokenOutOfRange`] for a history that is not of this vocabulary.
    pub fn sample(&mut self, logits: &mut [f32], history: &[u32]) -> Result<u32> {
        check_history(history, logits.len())?;
        let possible = within(logits, self.vocab_limit);
        let best = argmax(possible)?;
        if self.constraints.is_empty() && self.greedy {
            return Ok(best);
        }
        let history = History::new(history, self.prompt);
        self.constrain(possible, history)?;
        if self.greedy {
            return argmax(possible);
        }
        self.shapers.iter_mut().for_each(|processor| processor.process(possible, history));
        self.draw(possible)
    }

    /// Chooses the next token as [`Sampler::sample`] does, and says how probable it was. `model`: whether under the model's
    /// own distribution too.
    ///
    /// # Errors
    /// Those of [`Sampler::sample`].
    ///
    /// # Examples
    /// ```
    /// use vesper_model::generate::{GenerationConfig, Sampler};
    ///
    /// // Of the odds 3 : 6 : 1 the likelier two are left.
    /// let config = GenerationConfig::default().with_temperature(1.0).with_top_k(2).with_top_p(1.0);
    /// let token = Sampler::new(&config)?.choose(&mut [3f32.ln(), 6f32.ln(), 0.0], &[], true)?;
    /// let expected: [f64; 2] = if token.id == 1 { [2.0 / 3.0, 0.6] } else { [1.0 / 3.0, 0.3] };
    /// assert!((token.log_probability - expected[0].ln()).abs() < 1e-6);
    /// assert!((token.model_log_probability.unwrap() - expected[1].ln()).abs() < 1e-6);
    /// # Ok::<(), vesper_model::ModelError>(())
    /// ```
    pub fn choose(&mut self, logits: &mut [f32], history: &[u32], model: bool) -> Result<Token> {
        let before = model.then(|| logits.to_vec());
        let id = self.sample(logits, history)?;
        let limit = self.vocab_limit;
        let log_probability = |scores: &mut [f32]| log_probability(within(scores, limit), id);
        Ok(Token {
            id,
            log_probability: log_probability(logits),
            model_log_probability: before.map(|mut before| log_probability(&mut before)),
        })
    }

    /// Turns logits into log-probabilities, `log_softmax`, and lets the constraints change them, as beam search needs it. Gives
    /// those of the ids that may be chosen.
    ///
    /// `single`: there is one beam, which is the greedy choice. The constraints then see the logits, as they do there.
    pub(super) fn log_probabilities<'l>(
        &mut self,
        logits: &'l mut [f32],
        history: &[u32],
        single: bool,
    ) -> Result<&'l [f32]> {
        check_history(history, logits.len())?;
        let possible = within(logits, self.vocab_limit);
        argmax(possible)?;
        let history = History::new(history, self.prompt);
        if single {
            self.constrain(possible, history)?;
            log_softmax(possible);
        } else {
            log_softmax(possible);
            self.constraints.iter_mut().for_each(|processor| processor.process(possible, history));
        }
        Ok(possible)
    }

    fn constrain(&mut self, scores: &mut [f32], history: History<'_>) -> Result<()> {
        self.constraints.iter_mut().for_each(|processor| processor.process(scores, history));
        let excluded = scores.iter().all(|score| *score == f32::NEG_INFINITY);
        if excluded && !self.constraints.is_empty() { Err(all_excluded()) } else { Ok(()) }
    }

    fn draw(&mut self, logits: &[f32]) -> Result<u32> {
        argmax(logits)?;
        let weights = weights(logits);
        let total: f64 = weights.iter().copied().map(f64::from).sum();
        let target = self.rng.random::<f64>() * total;
        let mut cumulative = 0.0;
        let chosen = weights.iter().position(|&weight| {
            cumulative += f64::from(weight);
            target < cumulative
        });
        // The target may round up to the total itself: then the last token that has any weight is meant.
        let chosen = chosen.or_else(|| weights.iter().rposition(|&weight| weight > 0.0));
        chosen.map(|id| id as u32).ok_or_else(no_token)
    }
}

/// No score at all is another error.
fn check_history(history: &[u32], vocab: usize) -> Result<()> {
    match history.iter().find(|&&id| id as usize >= vocab) {
        Some(&id) if vocab > 0 => Err(ModelError::TokenOutOfRange { id, vocab }),
        _ => Ok(()),
    }
}

/// The scores of the ids under `limit`.
fn within(scores: &mut [f32], limit: usize) -> &mut [f32] {
    let limit = limit.min(scores.len());
    &mut scores[..limit]
}

fn log_softmax(scores: &mut [f32]) {
    let total = log_sum_exp(scores);
    for score in scores.iter_mut() {
        *score = (f64::from(*score) - total) as f32;
    }
}

pub(super) fn all_excluded() -> ModelError {
    ModelError::InvalidLogits {
        reason: "every token is excluded (by bad_words_ids, no_repeat_ngram_size, min_new_tokens, a forced_prefix of \
                 tokens that the model does not have or a processor of one's own)"
            .into(),
    }
}

/// The logarithm of a token's share of the softmax.
fn log_probability(scores: &[f32], id: u32) -> f64 {
    let Some(&score) = scores.get(id as usize) else { return f64::NEG_INFINITY };
    f64::from(score) - log_sum_exp(scores)
}

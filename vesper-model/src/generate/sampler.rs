//! Choosing one token from a row of logits.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::GenerationConfig;
use super::processor::{self, History, LogitsProcessor};
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
/// TopK                keeps the k largest l, lower ids first among equals
/// TopP                keeps the smallest set of the largest P with sum(set) >= p
/// MinP                keeps P(i) >= p * max P
/// Typical             keeps the P(i) whose surprise is nearest to the entropy
/// draw                P(i) = exp(l_i) / sum(exp(l))                over the tokens that are left
/// ```
///
/// Probabilities are computed in f64. One draw takes one number of a ChaCha8 stream, whatever the settings.
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
    pub fn with_processor(mut self, processor: impl LogitsProcessor + 'static) -> Self {
        self.constraints.push(Box::new(processor));
        self
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
        if let Some(&id) = history.iter().find(|&&id| id as usize >= logits.len()) {
            return Err(ModelError::TokenOutOfRange { id, vocab: logits.len() });
        }
        let limit = self.vocab_limit.min(logits.len());
        let possible = &mut logits[..limit];
        let best = argmax(possible)?;
        let history = History::new(history, self.prompt);
        self.constraints.iter_mut().for_each(|processor| processor.process(possible, history));
        if self.greedy {
            return if self.constraints.is_empty() { Ok(best) } else { argmax(possible) };
        }
        self.shapers.iter_mut().for_each(|processor| processor.process(possible, history));
        self.draw(possible)
    }

    fn draw(&mut self, logits: &[f32]) -> Result<u32> {
        let max = f64::from(logits[argmax(logits)? as usize]);
        let weight = |&logit: &f32| (f64::from(logit) - max).exp();
        let total: f64 = logits.iter().map(weight).sum();
        let target = self.rng.random::<f64>() * total;
        let mut cumulative = 0.0;
        let chosen = logits.iter().position(|logit| {
            cumulative += weight(logit);
            target < cumulative
        });
        // The target may round up to the total itself: then the last token that has any weight is meant.
        let chosen = chosen.or_else(|| logits.iter().rposition(|logit| weight(logit) > 0.0));
        chosen.map(|id| id as u32).ok_or_else(no_token)
    }
}

/// The lowest id among the largest scores. Refuses scores that are no numbers.
fn argmax(logits: &[f32]) -> Result<u32> {
    let mut best: Option<(u32, f32)> = None;
    for (&logit, id) in logits.iter().zip(0..) {
        if logit.is_nan() || logit == f32::INFINITY {
            return Err(ModelError::InvalidLogits {
                reason: format!(
                    "the score of token {id} is {logit}, expected a finite number (has training diverged?)"
                ),
            });
        }
        if logit > best.map_or(f32::NEG_INFINITY, |(_, score)| score) {
            best = Some((id, logit));
        }
    }
    best.map(|(id, _)| id).ok_or_else(no_token)
}

fn no_token() -> ModelError {
    ModelError::InvalidLogits { reason: "no token has a score over minus infinity".into() }
}

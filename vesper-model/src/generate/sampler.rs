//! Choosing one token from a row of logits.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::GenerationConfig;
use crate::{ModelError, Result};

/// Chooses tokens by the settings of a [`GenerationConfig`], reproducibly by its seed.
///
/// The steps, in Hugging Face's order, for logits `l` of `(vocab,)`:
///
/// ```text
/// repetition penalty  l_i <- l_i / r  if l_i > 0, else l_i * r     for every distinct i of the history
/// greedy              argmax l, the lowest id among equals           (if so configured: ends here)
/// temperature         w_i = exp((l_i - max l) / T)
/// top-k               keeps the k largest l, lower ids first among equals
/// top-p               keeps the smallest set of the largest w with sum(set) >= p * sum(kept by top-k)
/// draw                P(i) = w_i / sum(w)                            over the tokens that are left
/// ```
///
/// The weights are computed in f64. Subtracting the maximum before dividing keeps any temperature, however
/// small, from overflowing. One draw takes one number of a ChaCha8 stream, whatever the settings.
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
/// Repetition penalty: Keskar et al. 2019, [arXiv:1909.05858](https://arxiv.org/abs/1909.05858).
/// Top-p: Holtzman et al. 2019, [arXiv:1904.09751](https://arxiv.org/abs/1904.09751).
#[derive(Debug, Clone)]
pub struct Sampler {
    /// `None`: greedy.
    temperature: Option<f64>,
    top_k: usize,
    top_p: f64,
    penalty: f64,
    vocab_limit: usize,
    rng: ChaCha8Rng,
    /// Kept between calls for its memory: the candidates with their weights.
    candidates: Vec<Candidate>,
    /// Kept between calls for its memory, all false: the tokens of the history.
    seen: Vec<bool>,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    id: u32,
    logit: f32,
    weight: f64,
}

impl Sampler {
    /// A sampler at the start of its random stream.
    ///
    /// # Errors
    /// [`ModelError::InvalidGeneration`] as [`GenerationConfig::validate`] has it.
    pub fn new(config: &GenerationConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            temperature: (!config.is_greedy()).then_some(config.temperature),
            top_k: config.top_k,
            top_p: config.top_p,
            penalty: config.repetition_penalty,
            vocab_limit: usize::MAX,
            rng: ChaCha8Rng::seed_from_u64(config.seed),
            candidates: Vec::new(),
            seen: Vec::new(),
        })
    }

    /// Never chooses an id of `limit` or more: those are rows that pad the embedding beyond the tokenizer.
    pub fn with_vocab_limit(mut self, limit: usize) -> Self {
        self.vocab_limit = limit;
        self
    }

    /// Chooses the next token.
    ///
    /// `logits`: `(vocab,)`, changed in place by the repetition penalty. A score of minus infinity excludes its
    /// token. `history`: the tokens so far, prompt included.
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
        if self.penalty != 1.0 {
            self.penalize(possible, history);
        }
        match self.temperature {
            None if self.penalty == 1.0 => Ok(best),
            None => argmax(possible),
            Some(temperature) => self.draw(possible, temperature),
        }
    }

    fn penalize(&mut self, logits: &mut [f32], history: &[u32]) {
        self.seen.resize(logits.len(), false);
        for &id in history {
            // A history may hold tokens at or over the vocabulary's limit: they cannot be chosen anyway.
            let (Some(logit), Some(seen)) = (logits.get_mut(id as usize), self.seen.get_mut(id as usize))
            else {
                continue;
            };
            if !*seen {
                *seen = true;
                *logit = penalized(*logit, self.penalty);
            }
        }
        for &id in history {
            if let Some(seen) = self.seen.get_mut(id as usize) {
                *seen = false;
            }
        }
    }

    fn draw(&mut self, logits: &[f32], temperature: f64) -> Result<u32> {
        let max = f64::from(logits[argmax(logits)? as usize]);
        let mut kept = std::mem::take(&mut self.candidates);
        kept.clear();
        kept.extend(logits.iter().zip(0..).filter(|(logit, _)| **logit > f32::NEG_INFINITY).map(
            |(&logit, id)| Candidate { id, logit, weight: ((f64::from(logit) - max) / temperature).exp() },
        ));
        if self.top_k > 0 && self.top_k < kept.len() {
            kept.select_nth_unstable_by(self.top_k - 1, likelier_first);
            kept.truncate(self.top_k);
            // The selection leaves its survivors in no particular order, and the sum depends on the order.
            kept.sort_unstable_by_key(|candidate| candidate.id);
        }
        if self.top_p < 1.0 {
            keep_top_p(&mut kept, self.top_p);
        }
        let total = sum(&kept);
        let target = self.rng.random::<f64>() * total;
        let mut cumulative = 0.0;
        let chosen = kept.iter().find(|candidate| {
            cumulative += candidate.weight;
            target < cumulative
        });
        // The target may round up to the total itself: then the last token that has any weight is meant.
        let chosen = chosen.or_else(|| kept.iter().rfind(|candidate| candidate.weight > 0.0));
        let chosen = chosen.map(|candidate| candidate.id).ok_or_else(no_token);
        self.candidates = kept;
        chosen
    }
}

/// Divides positive and multiplies other logits, so that a penalty over 1 always lowers them. Stays finite.
fn penalized(logit: f32, penalty: f64) -> f32 {
    let logit = f64::from(logit);
    let changed = if logit > 0.0 { logit / penalty } else { logit * penalty };
    if logit.is_finite() {
        changed.clamp(f64::from(f32::MIN), f64::from(f32::MAX)) as f32
    } else {
        f32::NEG_INFINITY
    }
}

fn likelier_first(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

fn sum(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|candidate| candidate.weight).sum()
}

fn keep_top_p(kept: &mut Vec<Candidate>, p: f64) {
    let total = sum(kept);
    // All tokens under this weight together hold less than 1 - p: they need not be sorted.
    let floor = (1.0 - p) * total / kept.len() as f64;
    kept.retain(|candidate| candidate.weight >= floor);
    kept.sort_unstable_by(likelier_first);
    let mut cumulative = 0.0;
    let reached = kept.iter().position(|candidate| {
        cumulative += candidate.weight;
        cumulative >= p * total
    });
    if let Some(last) = reached {
        kept.truncate(last + 1);
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

//! How a derivation makes its choices: the one trait that generating and parsing share.

use std::convert::Infallible;

use rand::RngCore;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// The two things that a derivation does: it chooses among weighted alternatives, and it emits text.
///
/// The grammar is a program over this trait. Run with a [`Sampler`] it writes a story; run with a parser it
/// finds the derivations of a text. Both are the same program, so they cannot disagree about the language.
pub(super) trait Draw {
    /// Why a derivation stops before its end: never for a sampler, a mismatch for a parser.
    type Stop;

    /// Picks one alternative, with probability `weights[i] / sum(weights)`.
    fn choose(&mut self, weights: &[u32]) -> Result<usize, Self::Stop>;

    /// Appends `text` to the story.
    fn emit(&mut self, text: &str) -> Result<(), Self::Stop>;
}

/// `-ln(weights[index] / sum(weights))`, the information in one choice, in nats.
pub(super) fn surprisal(weights: &[u32], index: usize) -> f64 {
    let total: u64 = weights.iter().map(|&w| u64::from(w)).sum();
    let chosen = weights.get(index).copied().unwrap_or(0);
    (total as f64 / f64::from(chosen)).ln()
}

/// Draws from ChaCha8, keeps the text, and adds up the information of every choice.
pub(super) struct Sampler {
    rng: ChaCha8Rng,
    text: String,
    nats: f64,
}

impl Sampler {
    /// The key is `seed` (8 bytes, little endian) and `domain` (1 byte); the ChaCha stream is `index`.
    ///
    /// The key is written out here rather than derived by `seed_from_u64`, so that stories depend on the
    /// ChaCha8 standard alone and not on a helper of a library that may change.
    pub(super) fn new(seed: u64, domain: u8, index: u64) -> Self {
        let mut key = [0_u8; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8] = domain;
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(index);
        Self { rng, text: String::with_capacity(640), nats: 0.0 }
    }

    /// The text and its information in nats.
    pub(super) fn finish(self) -> (String, f64) {
        (self.text, self.nats)
    }

    /// A uniform integer below `bound`, exactly: values of the last, incomplete block are rejected.
    fn below(&mut self, bound: u64) -> u64 {
        let bound = bound.max(1);
        let limit = u64::MAX - u64::MAX % bound;
        loop {
            let value = self.rng.next_u64();
            if value < limit {
                return value % bound;
            }
        }
    }
}

impl Draw for Sampler {
    type Stop = Infallible;

    fn choose(&mut self, weights: &[u32]) -> Result<usize, Infallible> {
        if weights.len() < 2 {
            return Ok(0);
        }
        let total = weights.iter().map(|&w| u64::from(w)).sum();
        let mut rest = self.below(total);
        let mut index = 0;
        for (i, &weight) in weights.iter().enumerate() {
            index = i;
            if rest < u64::from(weight) {
                break;
            }
            rest -= u64::from(weight);
        }
        self.nats += surprisal(weights, index);
        Ok(index)
    }

    fn emit(&mut self, text: &str) -> Result<(), Infallible> {
        self.text.push_str(text);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_come_as_often_as_their_weights_say() {
        let mut sampler = Sampler::new(7, 0, 0);
        let weights = [5, 3, 0, 2];
        let mut counts = [0_u32; 4];
        for _ in 0..100_000 {
            let Ok(i) = sampler.choose(&weights);
            counts[i] += 1;
        }
        assert_eq!(counts[2], 0);
        for (count, weight) in counts.iter().zip(weights) {
            let expected = f64::from(weight) / 10.0;
            assert!((f64::from(*count) / 1e5 - expected).abs() < 0.006, "{counts:?}");
        }
    }

    #[test]
    fn nats_are_the_sum_of_the_surprisals() {
        let mut sampler = Sampler::new(7, 0, 3);
        let mut expected = 0.0;
        for weights in [&[1, 1][..], &[5, 4, 3], &[9]] {
            let Ok(i) = sampler.choose(weights);
            let total: u32 = weights.iter().sum();
            expected -= (f64::from(weights[i]) / f64::from(total)).ln();
        }
        let (text, nats) = sampler.finish();
        assert_eq!(text, "");
        assert!((nats - expected).abs() < 1e-12);
    }

    #[test]
    fn a_single_alternative_costs_nothing_and_draws_nothing() {
        let (mut a, mut b) = (Sampler::new(1, 0, 0), Sampler::new(1, 0, 0));
        let Ok(_) = a.choose(&[4]);
        let weights = [1; 1000];
        assert_eq!(a.choose(&weights), b.choose(&weights));
    }
}

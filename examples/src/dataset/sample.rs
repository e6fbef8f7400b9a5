//! Random pieces of text.

use anyhow::{Result, bail};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::dataset::access;
use crate::dataset::flags::Sample as Flags;

/// A piece of text.
#[derive(Debug, PartialEq, Eq)]
pub struct Sample {
    /// The document it is in, from 0.
    pub document: usize,
    /// Its first token in the stream of all tokens.
    pub start: usize,
    /// One past its last.
    pub end: usize,
    /// The tokens, decoded.
    pub text: String,
}

/// Draws pieces that are equally likely to begin at any token; none goes past the end of its document.
///
/// # Errors
/// Names what cannot be read or written, or a flag that is out of range.
pub fn draw(flags: &Flags) -> Result<Vec<Sample>> {
    for (flag, value) in [("--count", flags.count), ("--length", flags.length)] {
        if value == 0 {
            bail!("{flag} 0: expected at least 1");
        }
    }
    let opened = access::open(&flags.text)?;
    let tokens = opened.cache.tokens();
    let ends = tokens.documents().map(|document| Ok(document?.end)).collect::<Result<Vec<usize>>>()?;
    let mut random = ChaCha8Rng::seed_from_u64(flags.seed);
    let mut samples = Vec::new();
    for _ in 0..flags.count {
        let start = random.random_range(0..tokens.len().max(1));
        let document = ends.partition_point(|&end| end <= start);
        let end = ends.get(document).copied().unwrap_or(tokens.len()).min(start.saturating_add(flags.length));
        let ids = tokens.get(start..end)?;
        samples.push(Sample { document, start, end, text: opened.tokenizer.decode(&ids)? });
    }
    Ok(samples)
}

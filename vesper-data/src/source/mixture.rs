//! Several sources with weights.

use rand::SeedableRng;
use rand::distr::weighted::WeightedIndex;
use rand::prelude::Distribution;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{BrokenRecords, Document, Documents, ReadReport, Sources};
use crate::error::{DataError, Result};

/// The bytes of text that a draw is worth.
const CREDIT: i64 = 4096;

/// What happens when a source of a mixture has no more documents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WhenOut {
    /// The mixture ends: the weights hold for all of it, and no document comes twice.
    #[default]
    Stop,
    /// The source begins again, until each source was read to its end at least once: the weights hold for all of the
    /// mixture, and documents of small sources come several times.
    Repeat,
    /// The others go on without it: each document comes once, and the weights hold as long as all sources last.
    GoOn,
}

/// Several sources, each with its share of the text.
///
/// The weights are shares of bytes of text (so nearly of tokens), and need not add up to 1. The mixture draws a source
/// at random, by the weights; each draw is worth 4096 bytes, and a source gives documents as long as it has some of
/// that left. A long document overdraws; the draws that follow pay it back. So after any amount of text each source
/// has given its share of it, within about one document.
///
/// The draws depend on the seed alone (ChaCha with 8 rounds), so that the same sources, weights and seed give the same
/// documents in the same order. One document of each source is in memory at a time.
///
/// # Examples
///
/// ```
/// use vesper_data::{Mixture, Sources};
///
/// # let folder = tempfile::tempdir()?;
/// let (a, b) = (folder.path().join("a.jsonl"), folder.path().join("b.jsonl"));
/// std::fs::write(&a, "{\"text\": \"one two three four\"}\n".repeat(4000))?;
/// std::fs::write(&b, "{\"text\": \"un deux trois quatre\"}\n".repeat(4000))?;
/// let mixture = Mixture::new([(Sources::new([&a]), 3.0), (Sources::new([&b]), 1.0)]).with_seed(7);
/// let (mut english, mut french) = (0.0, 0.0);
/// for document in Sources::from(mixture).documents()? {
///     let document = document?;
///     *(if *document.path == *a { &mut english } else { &mut french }) += document.text.len() as f64;
/// }
/// assert!((english / french - 3.0_f64).abs() < 0.8);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Mixture {
    pub(super) parts: Vec<(Sources, f64)>,
    seed: u64,
    when_out: WhenOut,
}

impl Mixture {
    /// A mixture of sources with these weights, with the seed 0, that stops when a source runs out.
    pub fn new(parts: impl IntoIterator<Item = (Sources, f64)>) -> Self {
        Self { parts: parts.into_iter().collect(), seed: 0, when_out: WhenOut::default() }
    }

    /// Sets the seed of the draws.
    pub fn with_seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// Sets what happens when a source runs out.
    pub fn with_when_out(self, when_out: WhenOut) -> Self {
        Self { when_out, ..self }
    }

    fn validate(&self) -> Result<()> {
        if self.parts.is_empty() {
            return Err(DataError::NoSources);
        }
        for (_, weight) in &self.parts {
            if !(weight.is_finite() && *weight > 0.0) {
                return Err(DataError::Config {
                    name: "the weight of a source",
                    got: weight.to_string(),
                    expected: "a number above 0",
                });
            }
        }
        Ok(())
    }

    pub(super) fn documents(&self, report: &ReadReport) -> Result<MixedDocuments> {
        self.validate()?;
        let mut parts = Vec::new();
        for (sources, _) in &self.parts {
            let documents = sources.read(report.clone())?.uncounted();
            parts.push(Part { sources: sources.clone(), documents, credit: 0, out: false });
        }
        let draws = draws(&self.parts, |_| true)?;
        let random = ChaCha8Rng::seed_from_u64(self.seed);
        Ok(MixedDocuments { mixture: self.clone(), parts, draws, random, current: None })
    }

    /// Adds to `digest` what decides which documents there are, but for the files' bytes.
    pub(super) fn digest(&self, digest: &mut Sha256) -> Result<()> {
        self.validate()?;
        digest.update(b"mixture\0");
        digest.update(self.seed.to_le_bytes());
        digest.update([self.when_out as u8]);
        digest.update((self.parts.len() as u64).to_le_bytes());
        for (sources, weight) in &self.parts {
            digest.update(weight.to_le_bytes());
            digest.update(sources.settings_digest()?);
        }
        Ok(())
    }
}

/// The draws among the parts for which `takes_part` holds.
fn draws(parts: &[(Sources, f64)], takes_part: impl Fn(usize) -> bool) -> Result<WeightedIndex<f64>> {
    let weights = parts.iter().enumerate().map(|(at, (_, weight))| if takes_part(at) { *weight } else { 0.0 });
    WeightedIndex::new(weights).map_err(|error| DataError::Config {
        name: "the weights of a mixture",
        got: error.to_string(),
        expected: "numbers above 0 with a finite sum",
    })
}

struct Part {
    sources: Sources,
    documents: Documents,
    /// The bytes of text that it may still give.
    credit: i64,
    /// Whether it was read to its end.
    out: bool,
}

pub(super) struct MixedDocuments {
    mixture: Mixture,
    parts: Vec<Part>,
    draws: WeightedIndex<f64>,
    random: ChaCha8Rng,
    /// The part that was drawn last, while it has credit left.
    current: Option<usize>,
}

impl MixedDocuments {
    pub(super) fn advance(&mut self) -> Result<Option<Document>> {
        loop {
            let Some(at) = self.current else {
                let at = self.draws.sample(&mut self.random);
                if let Some(part) = self.parts.get_mut(at) {
                    part.credit += CREDIT;
                    self.current = (part.credit > 0).then_some(at);
                }
                continue;
            };
            let Some(part) = self.parts.get_mut(at) else { return Ok(None) };
            if let Some(document) = part.documents.next() {
                let document = document?;
                part.credit -= i64::try_from(document.text.len()).unwrap_or(i64::MAX);
                if part.credit <= 0 {
                    self.current = None;
                }
                return Ok(Some(document));
            }
            part.out = true;
            let all_out = self.parts.iter().all(|part| part.out);
            if all_out || self.mixture.when_out == WhenOut::Stop {
                return Ok(None);
            }
            if self.mixture.when_out == WhenOut::Repeat {
                self.repeat(at)?;
            } else {
                let parts = &self.parts;
                self.draws = draws(&self.mixture.parts, |at| parts.get(at).is_some_and(|part| !part.out))?;
                self.current = None;
            }
        }
    }

    /// Begins a part again. What is broken in it was reported the first time.
    fn repeat(&mut self, at: usize) -> Result<()> {
        if let Some(part) = self.parts.get_mut(at) {
            let mut again = part.sources.clone();
            again.pass_over(BrokenRecords::Any);
            part.documents = again.read(ReadReport::default())?.uncounted();
        }
        Ok(())
    }
}

//! Several sources with weights.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{BrokenRecords, Document, Documents, ReadReport, Sources};
use crate::error::{DataError, Result};

/// The most bytes of text by which chance puts a document off; a power of two.
const DELAY: u64 = 1 << 14;

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
/// The weights are shares of bytes of text (so nearly of tokens), and need not add up to 1. The next document comes
/// from the source for which
///
/// ```text
/// (bytes given so far + delay) / weight
/// ```
///
/// is least, where the delay is up to 16 KiB, drawn at random for each document. So after any amount of text each
/// source has given its share of it, within about a document and a delay, in an order without a pattern.
///
/// The draws depend on the seed alone (ChaCha with 8 rounds), so that the same sources, weights and seed give the same
/// documents in the same order. One document is in memory at a time.
///
/// # Examples
///
/// ```
/// use vesper_data::{Mixture, Sources};
///
/// # let folder = tempfile::tempdir()?;
/// let (a, b) = (folder.path().join("a.jsonl"), folder.path().join("b.jsonl"));
/// std::fs::write(&a, "{\"text\": \"one two three four\"}\n".repeat(40_000))?;
/// std::fs::write(&b, "{\"text\": \"un deux trois quatre\"}\n".repeat(40_000))?;
/// let mixture = Mixture::new([(Sources::new([&a]), 3.0), (Sources::new([&b]), 1.0)]).with_seed(7);
/// let (mut english, mut french) = (0.0, 0.0);
/// for document in Sources::from(mixture).documents()? {
///     let document = document?;
///     *(if *document.path == *a { &mut english } else { &mut french }) += document.text.len() as f64;
/// }
/// assert!((english / french - 3.0_f64).abs() < 0.3);
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
        // As with the order of windows: a saved run must find the same documents with every later version.
        let mut key = [0; 32];
        for (slot, byte) in key.iter_mut().zip(self.seed.to_le_bytes()) {
            *slot = byte;
        }
        let mut random = ChaCha8Rng::from_seed(key);
        let mut parts = Vec::new();
        for (sources, weight) in &self.parts {
            let documents = sources.read(report.clone())?.uncounted();
            let (sources, delay) = (sources.clone(), draw(&mut random));
            parts.push(Part { sources, weight: *weight, documents, given: 0, delay, out: false });
        }
        Ok(MixedDocuments { parts, random, when_out: self.when_out })
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

/// A delay.
fn draw(random: &mut ChaCha8Rng) -> u64 {
    random.next_u64() % DELAY
}

struct Part {
    sources: Sources,
    weight: f64,
    documents: Documents,
    /// The bytes of text that it gave so far.
    given: u64,
    /// By how much its next document is put off.
    delay: u64,
    /// Whether it was read to its end.
    out: bool,
}

impl Part {
    /// When it is its turn.
    fn turn(&self) -> f64 {
        (self.given + self.delay) as f64 / self.weight
    }

    /// Begins again. What is broken was reported the first time.
    fn repeat(&mut self) -> Result<()> {
        let mut again = self.sources.clone();
        again.pass_over(BrokenRecords::Any);
        self.documents = again.read(ReadReport::default())?.uncounted();
        Ok(())
    }
}

pub(super) struct MixedDocuments {
    parts: Vec<Part>,
    random: ChaCha8Rng,
    when_out: WhenOut,
}

impl MixedDocuments {
    pub(super) fn advance(&mut self) -> Result<Option<Document>> {
        loop {
            let goes_on = self.when_out == WhenOut::GoOn;
            let parts = self.parts.iter_mut().filter(|part| !(part.out && goes_on));
            let Some(part) = parts.min_by(|a, b| a.turn().total_cmp(&b.turn())) else { return Ok(None) };
            if let Some(document) = part.documents.next() {
                let document = document?;
                part.given += document.text.len() as u64;
                part.delay = draw(&mut self.random);
                return Ok(Some(document));
            }
            part.out = true;
            if self.when_out == WhenOut::Repeat {
                part.repeat()?;
            }
            if self.when_out == WhenOut::Stop || self.parts.iter().all(|part| part.out) {
                return Ok(None);
            }
        }
    }
}

//! From settings to tokens: the embedded stories or one's own text.

use std::ops::ControlFlow;
use std::path::Path;

use anyhow::{Context, Result, bail};
use vesper_data::cache::BuildPhase;
use vesper_data::corpus::{Split, StoryCorpus};
use vesper_data::{CacheBuilder, DataError, Sources, TextTokenizer, Tokens};
use vesper_model::{VesperConfig, hf};

use crate::settings::Settings;

/// What a run trains on.
#[derive(Debug)]
pub struct Data {
    /// What it is, for people.
    pub name: String,
    /// The tokenizer of all of it.
    pub tokenizer: TextTokenizer,
    /// Training tokens.
    pub train: Tokens,
    /// Held-out tokens.
    pub eval: Tokens,
    /// Entropy of the token frequencies of the training part, in nats: what a model without context reaches.
    pub unigram_entropy: f64,
    /// The information content of the held-out part, in nats a token, where it is known: no model can be better.
    pub floor: Option<f64>,
    /// SHA-256 of the sources, in hexadecimal: a run that goes on must find the same. None: the embedded stories.
    pub digest: Option<String>,
}

/// The share of one's own text that is held out.
const EVAL_SHARE: f64 = 0.05;

/// The embedded stories: vocabulary, text to train its tokenizer on, held-out stories, and at most this many bytes
/// to train on (a longer run sees them again).
const STORY_VOCAB: usize = 2560;
const STORY_TOKENIZER_BYTES: usize = 1 << 20;
const STORY_EVAL: usize = 1000;
const STORY_TRAIN_BYTES: usize = 64 << 20;

impl Data {
    /// Prepares the data of a run with a model like `preset`. `tokenizer` is that of a run that goes on; `cache` the
    /// folder of token caches.
    ///
    /// # Errors
    /// Names the file and line that cannot be used, or the flag that does not fit the data.
    pub fn prepare(
        settings: &Settings,
        preset: &VesperConfig,
        tokenizer: Option<&Path>,
        cache: &Path,
    ) -> Result<Self> {
        let tokenizer = match tokenizer.or(settings.tokenizer.as_deref()) {
            Some(file) => Some(TextTokenizer::from_file(file)?),
            None => None,
        };
        if let (Some(tokenizer), Some(entries)) = (&tokenizer, settings.vocab_size) {
            // Before the text is tokenised, which may take long.
            hf::check_tokenizer(tokenizer.inner(), &preset.clone().with_vocab(entries))
                .with_context(|| format!("--vocab-size {entries}"))?;
        }
        let data = if settings.data.is_empty() {
            Self::stories(settings, tokenizer)?
        } else {
            Self::files(settings, preset.vocab_size, tokenizer, cache)?
        };
        let (seq, train, eval) = (settings.seq, data.train.len(), data.eval.len());
        if train <= seq || eval <= seq {
            bail!(
                "--seq {seq} is longer than the data: in {}, {train} tokens are to train on and {eval} held out, \
                 and both parts need more than {seq}",
                data.name
            );
        }
        Ok(data)
    }

    fn stories(settings: &Settings, tokenizer: Option<TextTokenizer>) -> Result<Self> {
        let corpus = StoryCorpus::new(settings.seed);
        let tokenizer = if let Some(tokenizer) = tokenizer {
            tokenizer
        } else {
            let stories = corpus.take_bytes(STORY_TOKENIZER_BYTES);
            let texts = stories.iter().map(|story| Ok::<_, DataError>(story.text.as_str()));
            TextTokenizer::train_bpe(texts, settings.vocab_size.unwrap_or(STORY_VOCAB))?
        };
        let encode = |stories: &[vesper_data::corpus::Story]| -> Result<Tokens> {
            let texts = stories.iter().map(|story| Ok::<_, DataError>(story.text.clone()));
            Ok(Tokens::from_documents(tokenizer.encode_documents(texts))?)
        };
        let held_out = corpus.with_split(Split::HeldOut).take_stories(STORY_EVAL);
        let eval = encode(&held_out)?;
        // As many stories as the run reads, so that it sees each once.
        let wanted = settings.steps.saturating_mul(settings.tokens_per_step()) as f64;
        let bytes: usize = held_out.iter().map(|story| story.text.len()).sum();
        let bytes = wanted * 1.02 * bytes as f64 / eval.len().max(1) as f64;
        let train =
            encode(&corpus.take_bytes((bytes as usize).saturating_add(65_536).min(STORY_TRAIN_BYTES)))?;
        Ok(Self {
            name: "the embedded stories".into(),
            unigram_entropy: train.unigram_entropy()?,
            floor: Some(vesper_data::corpus::floor_nats(&held_out) / eval.len().max(1) as f64),
            tokenizer,
            train,
            eval,
            digest: None,
        })
    }

    fn files(
        settings: &Settings,
        default_vocab: usize,
        tokenizer: Option<TextTokenizer>,
        cache: &Path,
    ) -> Result<Self> {
        let sources = Sources::from(settings.data.as_slice());
        let tokenizer = if let Some(tokenizer) = tokenizer {
            tokenizer
        } else {
            let texts = sources.documents()?.map(|d| d.map(|d| d.text));
            TextTokenizer::train_bpe(texts, settings.vocab_size.unwrap_or(default_vocab))?
        };
        let name = settings.data.iter().map(|s| s.display().to_string()).collect::<Vec<_>>().join(", ");
        crate::files::create_dir(cache)?;
        let mut told = false;
        let builder = CacheBuilder::new().on_progress(|progress| {
            if progress.phase == BuildPhase::Waiting && !told {
                told = true;
                crate::note!("another program makes the tokens of {name}: waiting for it");
            }
            ControlFlow::Continue(())
        });
        let (cache, status) = builder.open_or_build(cache, &sources, &tokenizer)?;
        // All of it, before a run of hours begins.
        cache.verify()?;
        crate::say!("Tokens of {name}: cache {status}, {}", cache.path().display());
        if cache.unknown_tokens() > 0 {
            let share = 100.0 * cache.unknown_tokens() as f64 / cache.len().max(1) as f64;
            crate::note!("warning: the tokenizer does not know {share:.2} % of the tokens in {name}");
        }
        let digest = cache.key().content.iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
        let (train, eval) = split(&cache.tokens(), settings.seq).with_context(|| name.clone())?;
        Ok(Self {
            unigram_entropy: train.unigram_entropy()?,
            floor: None,
            digest: Some(digest),
            name,
            tokenizer,
            train,
            eval,
        })
    }
}

/// What is trained on and what is held out: by document, so that the parts stay what they are when text is added; where
/// there are too few documents for a part of about the right size, the end of the text is held out.
fn split(tokens: &Tokens, seq: usize) -> Result<(Tokens, Tokens)> {
    // A little text still needs a held-out window or two.
    let share = EVAL_SHARE.max(2.0 * (seq + 1) as f64 / tokens.len().max(1) as f64).min(0.5);
    let (train, eval) = tokens.split_documents(share, 0)?;
    let asked = share * tokens.len() as f64;
    if (asked / 2.0..asked * 2.0).contains(&(eval.len() as f64)) && train.len() > seq && eval.len() > seq {
        return Ok((train, eval));
    }
    Ok(tokens.split(share)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_documents_are_divided_and_one_is_cut() {
        let documents = |count: u32| Tokens::from_documents((0..count).map(|n| Ok(vec![n; 50]))).unwrap();
        let (train, eval) = split(&documents(1000), 64).unwrap();
        assert_eq!(train.len() + eval.len(), 50_000);
        assert!((1250..5000).contains(&eval.len()) && eval.len() % 50 == 0, "{}", eval.len());
        assert!(eval.get(0..1).unwrap() < eval.get(eval.len() - 50..eval.len() - 49).unwrap());
        assert!(eval.get(0..1).unwrap()[0] < 500, "not the end alone");
        let (train, eval) = split(&Tokens::from(vec![1_u32; 1000]), 16).unwrap();
        assert_eq!((train.len(), eval.len()), (950, 50));
    }
}

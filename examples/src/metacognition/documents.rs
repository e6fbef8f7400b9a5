//! Text that the model was not trained on, in parts that have no document in common.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use vesper_data::corpus::{Split, StoryCorpus};
use vesper_data::{DataError, Sources, TextTokenizer, Tokens};

use crate::checkpoint::Checkpoint;

/// Held-out documents, as ids.
#[derive(Debug)]
pub struct Documents {
    /// What they are, for people.
    pub name: String,
    /// Documents that were left out because they are twice there or the model was trained on them.
    pub left_out: usize,
    ids: Vec<Vec<u32>>,
}

/// What the documents are for; no document is for two things.
#[derive(Debug)]
pub struct Parts {
    /// Half of the documents: the head is trained on the model's predictions on them.
    pub training: Vec<Vec<u32>>,
    /// A fifth: scores are calibrated and thresholds are chosen on them.
    pub calibration: Vec<Vec<u32>>,
    /// The rest: what is reported is measured on them.
    pub test: Vec<Vec<u32>>,
}

impl Documents {
    /// The documents of some files, or, where there are none, the first `stories` held-out ones of the embedded corpus.
    ///
    /// # Errors
    /// Names the file and line that cannot be used; no files for a model that was trained on other text than the stories.
    pub fn read(data: &[PathBuf], stories: usize, tokenizer: &TextTokenizer, model: &Path) -> Result<Self> {
        if data.is_empty() {
            knows_the_stories(model)?;
        }
        let known = trained_on(model)?;
        let of_no_run = known.is_none();
        let mut seen = known.unwrap_or_default();
        let (name, texts) = if data.is_empty() {
            let corpus = StoryCorpus::new(story_seed(model)?).with_split(Split::HeldOut);
            let texts = corpus.take_stories(stories).into_iter().map(|story| story.text).collect();
            ("held-out embedded stories".to_owned(), texts)
        } else {
            let names: Vec<String> = data
                .iter()
                .map(|path| path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned())
                .collect();
            let texts = Sources::from(data).documents()?.map(|document| Ok(document?.text));
            (names.join(", "), texts.collect::<Result<Vec<String>>>()?)
        };
        let all = texts.len();
        let texts: Vec<String> = texts.into_iter().filter(|text| seen.insert(digest(text))).collect();
        let left_out = all - texts.len();
        let ids = tokenizer
            .encode_documents(texts.iter().map(|text| Ok::<_, DataError>(text.as_str())))
            .map(|document| Ok(document?.ids))
            .collect::<Result<Vec<_>>>()?;
        if ids.len() < 10 {
            let more = if data.is_empty() {
                "more --stories have more"
            } else {
                "a document is a file, or what is between two <|endoftext|> in it"
            };
            bail!(
                "documents of {name} that the model was not trained on: {}, expected at least 10; {more}",
                ids.len()
            );
        }
        if of_no_run {
            let other = if data.is_empty() { ", or on text of another kind alone" } else { "" };
            crate::note!(
                "warning: the model is of no run of `train`, so it may have been trained on some of these documents{other}"
            );
        }
        Ok(Self { name, left_out, ids })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Divides them, in an order that depends on the seed alone.
    pub fn parts(&self, seed: u64) -> Parts {
        let mut all = self.ids.clone();
        all.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        let test = all.split_off(all.len() * 7 / 10);
        let calibration = all.split_off(all.len() * 5 / 7);
        Parts { training: all, calibration, test }
    }
}

/// A text to go on from, and how it goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// The beginning.
    pub prompt: Vec<u32>,
    /// What follows.
    pub answer: Vec<u32>,
}

/// `count` questions at random places of the documents; none reaches over the end of its document.
///
/// # Errors
/// No document is long enough.
pub fn questions(
    documents: &[Vec<u32>],
    count: usize,
    prompt: usize,
    answer: usize,
    seed: u64,
) -> Result<Vec<Question>> {
    // Without the token that ends the document.
    let long: Vec<&[u32]> = documents
        .iter()
        .filter_map(|document| document.split_last().map(|(_, text)| text))
        .filter(|text| text.len() >= prompt + answer)
        .collect();
    if long.is_empty() {
        bail!("--context {prompt} and --answer {answer}: no document of this part has so many tokens");
    }
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let question = |i: usize| {
        let text = long.get(i % long.len()).copied().unwrap_or_default();
        let start = random.random_range(0..=text.len() - prompt - answer);
        let (prompt, rest) = text.split_at(start).1.split_at(prompt);
        Question { prompt: prompt.to_vec(), answer: rest.iter().take(answer).copied().collect() }
    };
    Ok((0..count).map(question).collect())
}

/// The tokens of documents, one after the other, at most about `limit` of them.
///
/// # Errors
/// None that memory does not give.
pub fn stream(documents: &[Vec<u32>], limit: usize) -> Result<Tokens> {
    let mut total = 0;
    let some = documents.iter().take_while(|document| {
        let wanted = total < limit;
        total += document.len();
        wanted
    });
    Ok(Tokens::from_documents(some.map(|document| Ok(document.clone())))?)
}

fn digest(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.trim().hash(&mut hasher);
    hasher.finish()
}

/// The checkpoint of the run that the model is of, where it is of one.
fn checkpoint(model: &Path) -> Option<Checkpoint> {
    let run = if model.join("checkpoint").is_dir() { model } else { model.parent()? };
    let checkpoint = Checkpoint::of(run);
    checkpoint.exists().then_some(checkpoint)
}

/// Whether the embedded stories are text of the kind that the model was trained on, as far as that is known.
fn knows_the_stories(model: &Path) -> Result<()> {
    let Some(checkpoint) = checkpoint(model) else { return Ok(()) };
    let data = checkpoint.state()?.settings.data;
    if data.is_empty() {
        return Ok(());
    }
    let names = data.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
    bail!(
        "{}: trained on {names}, not on the embedded stories: name text of the same kind that it has not seen with --data",
        model.display()
    );
}

fn story_seed(model: &Path) -> Result<u64> {
    Ok(match checkpoint(model) {
        Some(checkpoint) => checkpoint.state()?.settings.seed,
        None => 0,
    })
}

/// The texts that the model's run read, its own held-out ones included; nothing where it is of no run.
fn trained_on(model: &Path) -> Result<Option<BTreeSet<u64>>> {
    let Some(checkpoint) = checkpoint(model) else { return Ok(None) };
    let state = checkpoint.state()?;
    if state.settings.data.is_empty() {
        // More than the run can have read: a token has fewer than 8 bytes here.
        let bytes = usize::try_from(state.tokens.saturating_mul(8)).unwrap_or(usize::MAX).min(64 << 20);
        let stories = StoryCorpus::new(state.settings.seed).take_bytes(bytes);
        return Ok(Some(stories.iter().map(|story| digest(&story.text)).collect()));
    }
    let data = &state.settings.data;
    let read = || -> Result<BTreeSet<u64>> {
        Sources::from(data.as_slice()).documents()?.map(|document| Ok(digest(&document?.text))).collect()
    };
    read().map(Some).context("cannot tell which documents the model was trained on")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_have_no_document_in_common() {
        let ids = (0..100).map(|n| vec![n; 5]).collect();
        let documents = Documents { name: String::new(), left_out: 0, ids };
        let parts = documents.parts(3);
        assert_eq!((parts.training.len(), parts.calibration.len(), parts.test.len()), (50, 20, 30));
        let mut all: Vec<_> = [&parts.training[..], &parts.calibration, &parts.test].concat();
        all.sort();
        assert_eq!(all, documents.ids);
        assert_ne!(documents.parts(4).test, parts.test);
        assert_eq!(documents.parts(3).test, parts.test);
    }

    #[test]
    fn questions_are_inside_of_their_documents() {
        let documents: Vec<Vec<u32>> = vec![(0..20).collect(), (100..105).collect(), (200..208).collect()];
        let all = questions(&documents, 50, 4, 3, 1).unwrap();
        assert_eq!(all.len(), 50);
        for question in &all {
            let joined = [&question.prompt[..], &question.answer].concat();
            assert_eq!((question.prompt.len(), joined.len()), (4, 7));
            assert!(joined.windows(2).all(|pair| pair[1] == pair[0] + 1));
            // 19, 104 and 207 end their documents, and one document is too short.
            assert!(joined.iter().all(|id| ![19, 207].contains(id) && !(100..105).contains(id)));
        }
        assert!(questions(&documents, 1, 40, 3, 1).is_err());
    }
}

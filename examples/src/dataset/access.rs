//! The one place where the program meets the readers and the cache of `vesper-data`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::Value;
use vesper_data::tokenizer::TrainProgress;
use vesper_data::{Document, Documents, Sources, TextTokenizer, TokenCache, TrainConfig};

use crate::dataset::flags::Text;

/// Text as tokens.
#[derive(Debug)]
pub struct Opened {
    /// What was read.
    pub sources: Sources,
    /// What the tokens mean.
    pub tokenizer: TextTokenizer,
    /// The tokens.
    pub cache: TokenCache,
    /// What was done to have the cache, for people.
    pub status: String,
    /// How long it took.
    pub seconds: f64,
}

/// What can be said about text without a tokenizer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Documents.
    pub documents: u64,
    /// Records of the files that could not be used.
    pub records_skipped: u64,
    /// Questions, where the files hold questions about texts.
    pub questions: Option<u64>,
    /// Those of the questions that the text does not answer.
    pub impossible_questions: Option<u64>,
    /// Answers that are not where the file says, but elsewhere in the text.
    pub wrong_answer_offsets: Option<u64>,
    /// Bytes of text, without what the file formats put around it.
    pub bytes: u64,
    /// Characters.
    pub characters: u64,
}

/// The files and folders, as they are to be read.
///
/// # Errors
/// Flags that contradict each other.
pub fn sources(text: &Text) -> Result<Sources> {
    Ok(Sources::new(text.paths()).with_settings(text.read.settings()?))
}

/// The documents.
///
/// # Errors
/// Names the file or folder that cannot be read.
pub fn documents(sources: &Sources) -> Result<Documents> {
    Ok(sources.documents()?)
}

/// Reads everything once and counts.
///
/// # Errors
/// Names file and line of what cannot be read.
pub fn counts(sources: &Sources) -> Result<Counts> {
    let mut counts = Counts::default();
    let mut documents = documents(sources)?;
    for document in &mut documents {
        let Document { text, .. } = document?;
        counts.documents += 1;
        counts.bytes += text.len() as u64;
        counts.characters += text.chars().count() as u64;
    }
    let report = documents.report();
    counts.records_skipped = report.skipped();
    if report.questions() > 0 {
        counts.questions = Some(report.questions());
        counts.impossible_questions = Some(report.impossible());
        counts.wrong_answer_offsets = Some(report.wrong_offsets());
    }
    for message in report.messages() {
        crate::note!("skipped: {message}");
    }
    for note in report.notes() {
        crate::note!("note: {note}");
    }
    Ok(counts)
}

/// The tokens of text, from its cache where there is one.
///
/// # Errors
/// Names what cannot be read or written.
pub fn open(text: &Text) -> Result<Opened> {
    let started = Instant::now();
    let sources = sources(text)?;
    let bytes = file_bytes(&sources)?;
    let tokenizer = tokenizer(text, &sources, bytes)?;
    crate::files::create_dir(&text.cache)?;
    let bar = bar(bytes, "tokenising");
    let counter = bar.clone();
    let observed = tokenizer.clone().with_observer(move |more| counter.inc(more.bytes));
    let opened = TokenCache::open_or_build(&text.cache, &sources, &observed);
    bar.finish_and_clear();
    let (cache, status) = opened?;
    let seconds = started.elapsed().as_secs_f64();
    Ok(Opened { sources, tokenizer, cache, status: status.to_string(), seconds })
}

/// The tokenizer that was named, or one that is trained on the text.
fn tokenizer(text: &Text, sources: &Sources, bytes: u64) -> Result<TextTokenizer> {
    let config = text.training()?;
    let tokenizer = match (&text.tokenizer, config) {
        (Some(file), None) => TextTokenizer::from_file(file)?,
        (_, config) => train(&config.unwrap_or_default(), sources, bytes)?,
    };
    if let Some(file) = &text.save_tokenizer {
        tokenizer.save(file)?;
    }
    Ok(tokenizer)
}

fn train(config: &TrainConfig, sources: &Sources, bytes: u64) -> Result<TextTokenizer> {
    let bar = bar(bytes, "training the tokenizer: counting words");
    let trained = TextTokenizer::train(sources.documents()?, config, |progress| match progress {
        TrainProgress::Counting { bytes, .. } => bar.set_position(bytes),
        TrainProgress::Merging { tokens, vocab_size } => {
            bar.set_message(format!("training the tokenizer: {tokens} of {vocab_size} tokens"));
        }
        TrainProgress::Weighing { words } => {
            bar.set_message(format!("training the tokenizer: weighing strings of {words} words"));
        }
        _ => {}
    });
    bar.finish_and_clear();
    Ok(trained?)
}

/// The size of all files.
fn file_bytes(sources: &Sources) -> Result<u64> {
    let size = |path: &PathBuf| std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    Ok(sources.files()?.iter().map(size).sum())
}

/// A bar on stderr, if that is a terminal.
fn bar(bytes: u64, message: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(bytes).with_message(message);
    let template = "{bar:24} {bytes}/{total_bytes} {msg}, {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

/// What a cache says about itself, by name, once all of its checksums are verified.
///
/// # Errors
/// A folder that is no cache, or a damaged one.
pub fn describe(path: &Path) -> Result<Vec<(&'static str, Value)>> {
    let cache = TokenCache::open(path)?;
    cache.verify()?;
    let key = cache.key();
    let hex = |digest: [u8; 32]| digest.iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
    Ok(vec![
        ("cache", cache.path().display().to_string().into()),
        ("shards", cache.shards().len().into()),
        ("documents", cache.document_count().into()),
        ("tokens", cache.len().into()),
        ("unknown_tokens", cache.unknown_tokens().into()),
        ("records_skipped", cache.skipped_records().into()),
        ("bytes", cache.text_bytes().into()),
        ("vocab_size", key.vocab_size.into()),
        ("token_bytes", if key.vocab_size <= 1 << 16 { 2 } else { 4 }.into()),
        ("sources_sha256", hex(key.content).into()),
        ("tokenizer_sha256", hex(key.tokenizer).into()),
    ])
}

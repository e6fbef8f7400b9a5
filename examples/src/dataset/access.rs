//! The one place where the program meets the readers and the cache of `vesper-data`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::Value;
use vesper_data::tokenizer::TrainProgress;
use vesper_data::{CacheBuilder, Documents, ReadReport, Sources, TextTokenizer, TokenCache, TrainConfig};

use crate::dataset::flags::Text;
use crate::files::NewFolder;

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

/// What the cache knows of its text.
pub fn counts(cache: &TokenCache) -> Counts {
    let text = cache.text_counts();
    let of_questions = |number| (text.questions > 0).then_some(number);
    Counts {
        documents: cache.document_count() as u64,
        records_skipped: text.skipped,
        questions: of_questions(text.questions),
        impossible_questions: of_questions(text.impossible),
        wrong_answer_offsets: of_questions(text.wrong_offsets),
        bytes: text.bytes,
        characters: text.characters,
    }
}

/// Says what was passed over, and what was remarked. That stands in no cache: where it was reused, and there was
/// something, the text is read again, as far as is needed.
fn remark(sources: &Sources, cache: &TokenCache, mut report: ReadReport) -> Result<()> {
    let counts = cache.text_counts();
    if (report.documents(), report.skipped()) == (0, 0) && counts.skipped + counts.wrong_offsets > 0 {
        let mut documents = sources.documents()?;
        report = documents.report();
        let (skipped, wrong) = (counts.skipped.min(REMARKS), counts.wrong_offsets.min(REMARKS));
        while (report.messages().len() as u64) < skipped || (report.notes().len() as u64) < wrong {
            if documents.next().transpose()?.is_none() {
                break;
            }
        }
    }
    say_remarks(&report);
    if counts.skipped > REMARKS {
        crate::note!("skipped: {} records in all", counts.skipped);
    }
    Ok(())
}

/// Says what a report has: broken records that were passed over, and remarks on others.
pub fn say_remarks(report: &ReadReport) {
    for message in report.messages() {
        crate::note!("skipped: {message}");
    }
    for note in report.notes() {
        crate::note!("note: {note}");
    }
}

/// How many messages of each kind a report keeps.
const REMARKS: u64 = 20;

/// The tokens of text, from its cache where there is one.
///
/// # Errors
/// Names what cannot be read or written.
pub fn open(text: &Text) -> Result<Opened> {
    let started = Instant::now();
    let sources = sources(text)?;
    let bytes = file_bytes(&sources)?;
    let mut folder = NewFolder::create(&text.cache)?;
    let tokenizer = tokenizer(text, &sources, bytes)?;
    let bar = bar(bytes, "tokenising");
    let counter = bar.clone();
    let observed = tokenizer.clone().with_observer(move |more| counter.inc(more.bytes));
    let report = ReadReport::default();
    let builder = CacheBuilder::new().with_report(report.clone());
    let opened = builder.open_or_build(&text.cache, &sources, &observed);
    bar.finish_and_clear();
    let (cache, status) = opened?;
    folder.keep();
    remark(&sources, &cache, report)?;
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

/// The caches at `path`: itself, or those in it, where it is what `--cache` names.
///
/// # Errors
/// A path without a cache.
pub fn caches(path: &Path) -> Result<Vec<PathBuf>> {
    const MANIFEST: &str = "manifest.bin";
    if !path.exists() {
        bail!("{} does not exist", path.display());
    }
    if path.is_file() || path.join(MANIFEST).exists() {
        return Ok(vec![path.to_path_buf()]);
    }
    let read = || format!("cannot read {}", path.display());
    let mut inside = Vec::new();
    for entry in std::fs::read_dir(path).with_context(read)? {
        let child = entry.with_context(read)?.path();
        if child.join(MANIFEST).exists() {
            inside.push(child);
        }
    }
    inside.sort();
    if inside.is_empty() {
        bail!("{} holds no token cache, or none that is complete: expected a {MANIFEST}", path.display());
    }
    Ok(inside)
}

/// What a cache says about itself, by name, once all of its checksums are verified.
///
/// # Errors
/// A folder that is no cache, or a damaged one.
pub fn describe(path: &Path) -> Result<Vec<(&'static str, Value)>> {
    let cache = TokenCache::open(path)?;
    cache.verify()?;
    let (key, text) = (cache.key(), cache.text_counts());
    let hex = |digest: [u8; 32]| digest.iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"));
    Ok(vec![
        ("cache", cache.path().display().to_string().into()),
        ("shards", cache.shards().len().into()),
        ("documents", cache.document_count().into()),
        ("tokens", cache.len().into()),
        ("unknown_tokens", cache.unknown_tokens().into()),
        ("records_skipped", cache.skipped_records().into()),
        ("bytes", text.bytes.into()),
        ("characters", text.characters.into()),
        ("questions", text.questions.into()),
        ("vocab_size", key.vocab_size.into()),
        ("token_bytes", if key.vocab_size <= 1 << 16 { 2 } else { 4 }.into()),
        ("sources_sha256", hex(key.content).into()),
        ("tokenizer_sha256", hex(key.tokenizer).into()),
    ])
}

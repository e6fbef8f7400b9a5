//! What was noticed while documents were read.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::DataError;

/// How many messages of each kind are kept.
const KEPT: usize = 20;

/// Counts of what [`Documents`](super::Documents) read, passed over and noticed so far.
///
/// All clones of a report show the same counts, which grow while the documents are read, wherever that is done.
#[derive(Clone, Debug, Default)]
pub struct ReadReport(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    documents: AtomicU64,
    bytes: AtomicU64,
    characters: AtomicU64,
    skipped: AtomicU64,
    questions: AtomicU64,
    impossible: AtomicU64,
    wrong_offsets: AtomicU64,
    messages: Mutex<Vec<String>>,
    notes: Mutex<Vec<String>>,
}

impl ReadReport {
    /// Documents given.
    pub fn documents(&self) -> u64 {
        self.0.documents.load(Relaxed)
    }

    /// Bytes of text in the documents given.
    pub fn bytes(&self) -> u64 {
        self.0.bytes.load(Relaxed)
    }

    /// Characters of these.
    pub fn characters(&self) -> u64 {
        self.0.characters.load(Relaxed)
    }

    /// Broken records passed over.
    pub fn skipped(&self) -> u64 {
        self.0.skipped.load(Relaxed)
    }

    /// What is wrong with the first 20 of the broken records, each with its file and line or row.
    pub fn messages(&self) -> Vec<String> {
        copy(&self.0.messages)
    }

    /// Questions read, of files and records with questions and answers on a text.
    pub fn questions(&self) -> u64 {
        self.0.questions.load(Relaxed)
    }

    /// Those of the questions that the text does not answer.
    pub fn impossible(&self) -> u64 {
        self.0.impossible.load(Relaxed)
    }

    /// Answers that are not where the file says, but elsewhere in the text. They are used all the same.
    pub fn wrong_offsets(&self) -> u64 {
        self.0.wrong_offsets.load(Relaxed)
    }

    /// The first 20 remarks on records that were used all the same, or in pieces, each with its file and line or row.
    pub fn notes(&self) -> Vec<String> {
        copy(&self.0.notes)
    }

    pub(super) fn document(&self, text: &str) {
        self.0.documents.fetch_add(1, Relaxed);
        self.0.bytes.fetch_add(text.len() as u64, Relaxed);
        self.0.characters.fetch_add(text.chars().count() as u64, Relaxed);
    }

    pub(super) fn skip(&self, error: &DataError) {
        self.0.skipped.fetch_add(1, Relaxed);
        keep(&self.0.messages, || error.to_string());
    }

    pub(super) fn question(&self, impossible: bool) {
        self.0.questions.fetch_add(1, Relaxed);
        self.0.impossible.fetch_add(u64::from(impossible), Relaxed);
    }

    pub(super) fn wrong_offset(&self, note: impl FnOnce() -> String) {
        self.0.wrong_offsets.fetch_add(1, Relaxed);
        self.note(note);
    }

    pub(super) fn note(&self, note: impl FnOnce() -> String) {
        keep(&self.0.notes, note);
    }
}

fn keep(messages: &Mutex<Vec<String>>, message: impl FnOnce() -> String) {
    let mut messages = messages.lock().unwrap_or_else(PoisonError::into_inner);
    if messages.len() < KEPT {
        messages.push(message());
    }
}

fn copy(messages: &Mutex<Vec<String>>) -> Vec<String> {
    messages.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

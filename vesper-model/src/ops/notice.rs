//! What an operation says when it takes a slower path.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

/// Prints a line to stderr, each text once a process.
pub(super) fn once(text: String) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if !said.contains(&text) {
        eprintln!("vesper-model: {text}");
        said.insert(text);
    }
}

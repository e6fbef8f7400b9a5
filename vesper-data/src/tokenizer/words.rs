//! How often each word occurs in the text that a BPE is trained on.

use std::collections::HashMap;

use rayon::prelude::*;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use super::segment::{SEGMENT_BYTES, Segments};
use crate::error::{DataError, Result, one_line};
use crate::source::SEPARATOR;

/// How much text is cut into words at a time.
const BATCH_BYTES: usize = 8 << 20;

/// The words of all documents with their counts, sorted; in a word, each character stands for a byte.
pub(super) fn count<I, T>(documents: I) -> Result<Vec<(String, u64)>>
where
    I: IntoIterator<Item = Result<T>>,
    T: AsRef<str>,
{
    let mut counts: HashMap<String, u64> = HashMap::new();
    let mut batch: Vec<T> = Vec::new();
    let mut bytes = 0;
    for document in documents {
        let document = document?;
        bytes += document.as_ref().len();
        batch.push(document);
        if bytes >= BATCH_BYTES {
            add(&batch, &mut counts)?;
            batch.clear();
            bytes = 0;
        }
    }
    add(&batch, &mut counts)?;
    if counts.is_empty() {
        return Err(DataError::Tokenizer { action: "train", problem: "there is no text".into() });
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_unstable();
    Ok(counts)
}

fn add<T: AsRef<str>>(documents: &[T], counts: &mut HashMap<String, u64>) -> Result<()> {
    let pieces: Vec<&str> = documents
        .iter()
        // The separator is a token of its own and must not be learned as a word.
        .flat_map(|document| document.as_ref().split(SEPARATOR))
        .flat_map(|text| Segments::ByteLevel.split(text, SEGMENT_BYTES))
        .collect();
    let counted: Vec<Result<HashMap<String, u64>>> = pieces.into_par_iter().map(words_of).collect();
    for words in counted {
        for (word, count) in words? {
            *counts.entry(word).or_default() += count;
        }
    }
    Ok(())
}

fn words_of(text: &str) -> Result<HashMap<String, u64>> {
    let mut words = PreTokenizedString::from(text);
    ByteLevel::new(false, true, true)
        .pre_tokenize(&mut words)
        .map_err(|error| DataError::Tokenizer { action: "train", problem: one_line(error) })?;
    let mut counts: HashMap<String, u64> = HashMap::new();
    for (word, _, _) in words.get_splits(OffsetReferential::Original, OffsetType::None) {
        if let Some(count) = counts.get_mut(word) {
            *count += 1;
        } else {
            counts.insert(word.to_owned(), 1);
        }
    }
    Ok(counts)
}

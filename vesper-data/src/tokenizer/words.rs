//! How often each word occurs in the text that a tokenizer is trained on.

use std::collections::HashMap;

use rayon::prelude::*;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizer, Tokenizer};

use super::segment::{SEGMENT_BYTES, Segments};
use super::train::TrainProgress;
use crate::error::{DataError, Result, one_line};
use crate::source::SEPARATOR;

/// How much text is cut into words at a time.
const BATCH_BYTES: usize = 8 << 20;

/// Counts words, in an amount of memory that does not depend on the amount of text.
pub(super) struct Counter<'a> {
    /// What makes words of a text: its normalizer and its pre-tokenizer.
    words: &'a Tokenizer,
    /// Where a text may be cut without cutting words.
    segments: Segments,
    counts: HashMap<String, u64>,
    /// How many different words are kept while counting.
    limit: usize,
}

impl<'a> Counter<'a> {
    pub(super) fn new(words: &'a Tokenizer, segments: Segments, limit: usize) -> Self {
        Self { words, segments, counts: HashMap::new(), limit }
    }

    /// The words of all documents with their counts, sorted.
    pub(super) fn count<I, T>(
        mut self,
        documents: I,
        progress: &mut dyn FnMut(TrainProgress),
    ) -> Result<Vec<(String, u64)>>
    where
        I: IntoIterator<Item = Result<T>>,
        T: AsRef<str>,
    {
        let mut batch: Vec<T> = Vec::new();
        let mut bytes = 0;
        let (mut all_documents, mut all_bytes) = (0, 0);
        for document in documents {
            let document = document?;
            all_documents += 1;
            all_bytes += document.as_ref().len() as u64;
            bytes += document.as_ref().len();
            batch.push(document);
            if bytes >= BATCH_BYTES {
                self.add(&batch)?;
                batch.clear();
                bytes = 0;
                progress(TrainProgress::Counting { documents: all_documents, bytes: all_bytes });
            }
        }
        self.add(&batch)?;
        progress(TrainProgress::Counting { documents: all_documents, bytes: all_bytes });
        if self.counts.is_empty() {
            return Err(DataError::Tokenizer { action: "train", problem: "there is no text".into() });
        }
        let mut counts: Vec<_> = self.counts.into_iter().collect();
        counts.sort_unstable();
        Ok(counts)
    }

    fn add<T: AsRef<str>>(&mut self, documents: &[T]) -> Result<()> {
        let pieces: Vec<&str> = documents
            .iter()
            // The separator is a token of its own and must not be learned as a word.
            .flat_map(|document| document.as_ref().split(SEPARATOR))
            .flat_map(|text| self.segments.split(text, SEGMENT_BYTES))
            .map(|piece| piece.text)
            .collect();
        let counted: Vec<Result<HashMap<String, u64>>> =
            pieces.into_par_iter().map(|piece| words_of(self.words, piece)).collect();
        for words in counted {
            for (word, count) in words? {
                *self.counts.entry(word).or_default() += count;
            }
        }
        self.forget_rare_words();
        Ok(())
    }

    /// Drops the rarest words where there are too many different ones, until half of the limit is free: names,
    /// numbers and misspellings, which a vocabulary is too small for anyway.
    fn forget_rare_words(&mut self) {
        if self.counts.len() <= self.limit {
            return;
        }
        let mut words: Vec<(String, u64)> = self.counts.drain().collect();
        words.sort_unstable_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        words.truncate(self.limit / 2);
        self.counts.extend(words);
    }
}

fn words_of(tokenizer: &Tokenizer, text: &str) -> Result<HashMap<String, u64>> {
    let failed = |error| DataError::Tokenizer { action: "train", problem: one_line(error) };
    let mut words = tokenizer.get_added_vocabulary().extract_and_normalize(tokenizer.get_normalizer(), text);
    if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut words).map_err(failed)?;
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frequent_words_of_a_text_with_too_many_are_kept() {
        let tokenizer = super::super::train::TrainConfig::default().skeleton().unwrap();
        let mut counter = Counter::new(&tokenizer, Segments::ByteLevel, 100);
        for round in 0..20 {
            let rare: Vec<String> = (0..30).map(|word| format!("rare{}", 30 * round + word)).collect();
            counter.add(&[format!("{} often", rare.join(" "))]).unwrap();
            assert!((50..=100).contains(&counter.counts.len()) || round == 0, "{}", counter.counts.len());
        }
        assert_eq!(counter.counts.get("Ġoften"), Some(&20));
    }
}

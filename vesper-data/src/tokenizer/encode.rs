//! Encoding many documents in parallel, in their order.

use std::collections::VecDeque;
use std::ops::Range;

use rayon::prelude::*;

use super::TextTokenizer;
use super::segment::SEGMENT_BYTES;
use crate::error::Result;

/// How much text is encoded at a time: enough to keep all threads busy, little enough to be kept in memory
/// several times over.
const BATCH_BYTES: usize = 8 << 20;
const BATCH_DOCUMENTS: usize = 16 << 10;

/// The ids of a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The ids.
    pub ids: Vec<u32>,
    /// How many unknown tokens there are among them; with a BPE that has none and leaves out what it does not
    /// know, the bytes left out.
    pub unknown: u64,
    /// The ranges of [`Encoded::ids`] that are targets of the loss, in order and apart from each other; `None`:
    /// all of them.
    pub loss: Option<Vec<Range<usize>>>,
}

impl From<Vec<u32>> for Encoded {
    fn from(ids: Vec<u32>) -> Self {
        Self { ids, unknown: 0, loss: None }
    }
}

impl AsRef<[u32]> for Encoded {
    fn as_ref(&self) -> &[u32] {
        &self.ids
    }
}

/// Documents as ids: see [`TextTokenizer::encode_documents`]. After an error the iterator ends.
#[derive(Debug)]
pub struct EncodeDocuments<'a, I> {
    tokenizer: &'a TextTokenizer,
    documents: I,
    ready: VecDeque<Result<Encoded>>,
    done: bool,
}

impl<'a, I> EncodeDocuments<'a, I> {
    pub(super) fn new(tokenizer: &'a TextTokenizer, documents: I) -> Self {
        Self { tokenizer, documents, ready: VecDeque::new(), done: false }
    }
}

impl<I, T> EncodeDocuments<'_, I>
where
    I: Iterator<Item = Result<T>>,
    T: AsRef<str> + Sync,
{
    /// Takes some documents and makes their ids ready.
    fn fill(&mut self) {
        let mut batch = Vec::new();
        let mut bytes = 0;
        let mut failed = None;
        while bytes < BATCH_BYTES && batch.len() < BATCH_DOCUMENTS && !self.done {
            match self.documents.next() {
                Some(Ok(document)) => {
                    bytes += document.as_ref().len();
                    batch.push(document);
                }
                Some(Err(error)) => {
                    failed = Some(error);
                    self.done = true;
                }
                None => self.done = true,
            }
        }
        self.ready.extend(encode_all(self.tokenizer, &batch, SEGMENT_BYTES));
        self.ready.extend(failed.map(Err));
    }
}

impl<I, T> Iterator for EncodeDocuments<'_, I>
where
    I: Iterator<Item = Result<T>>,
    T: AsRef<str> + Sync,
{
    type Item = Result<Encoded>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.ready.is_empty() && !self.done {
            self.fill();
        }
        let item = self.ready.pop_front();
        if matches!(item, Some(Err(_))) {
            self.done = true;
            self.ready.clear();
        }
        item
    }
}

/// Encodes each of `documents`, in pieces of about `segment_bytes` where that is possible.
fn encode_all<T>(tokenizer: &TextTokenizer, documents: &[T], segment_bytes: usize) -> Vec<Result<Encoded>>
where
    T: AsRef<str> + Sync,
{
    let pieces: Vec<(usize, &str)> = documents
        .iter()
        .map(|document| tokenizer.segments.split(document.as_ref(), segment_bytes))
        .enumerate()
        .flat_map(|(document, pieces)| pieces.into_iter().map(move |piece| (document, piece)))
        .collect();
    let encoded: Vec<(usize, Result<Encoded>)> =
        pieces.into_par_iter().map(|(document, piece)| (document, tokenizer.encode_counted(piece))).collect();
    let mut results: Vec<Result<Encoded>> = Vec::with_capacity(documents.len());
    for (document, piece) in encoded {
        match (results.get_mut(document), piece) {
            (Some(Ok(whole)), Ok(piece)) => {
                whole.ids.extend(piece.ids);
                whole.unknown += piece.unknown;
            }
            (Some(whole), Err(error)) => *whole = Err(error),
            (Some(Err(_)), Ok(_)) => {}
            (None, piece) => results.push(piece),
        }
    }
    for whole in results.iter_mut().flatten() {
        whole.ids.extend(tokenizer.eos_id());
    }
    results
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A Unigram tokenizer with Metaspace words, as SentencePiece's models have them.
    fn unigram(prepend_scheme: &str) -> TextTokenizer {
        let vocab: Vec<(String, f64)> =
            ["<unk>", "\u{2581}", "a", "b", "c", "\u{2581}a", "ab", "\u{2581}bc", "<m>"]
                .iter()
                .zip(1..)
                .map(|(token, rank)| ((*token).to_owned(), -f64::from(rank)))
                .collect();
        let json = serde_json::json!({
            "version": "1.0",
            "added_tokens": [{"id": 8, "content": "<m>", "special": true, "lstrip": true, "rstrip": false,
                "single_word": false, "normalized": true}],
            // One whole-text rule that does what SentencePiece's table does to line breaks.
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Replace", "pattern": {"String": "\n"}, "content": " "},
                {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
            ]},
            "pre_tokenizer": {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": prepend_scheme, "split": true},
            "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab},
        });
        let mut tokenizer =
            TextTokenizer::new(serde_json::from_value(json).unwrap(), serde_json::Map::new()).unwrap();
        assert_eq!(
            tokenizer.segments,
            crate::tokenizer::Segments::Whole,
            "this normalizer is not a known one"
        );
        tokenizer.segments = crate::tokenizer::Segments::SentencePiece;
        tokenizer
    }

    fn in_pieces(tokenizer: &TextTokenizer, text: &str, bytes: usize) -> Encoded {
        encode_all(tokenizer, &[text], bytes).remove(0).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn cut_bytes_have_the_ids_of_the_whole(
            text in "([ab'.é\u{301}\u{a0}\u{2028}0-1 \n\r\t]|<[|]endoftext[|]>|\n)*",
            bytes in 1..12_usize,
        ) {
            // With tokens for runs of white space, so that a run cut in two would show.
            thread_local!(static TOKENIZER: TextTokenizer =
                TextTokenizer::train_bpe([Ok("a \n\n \n\nb  \n  ab. \n\t\n 'a\n".repeat(9))], 300).unwrap());
            let (pieces, whole) = TOKENIZER.with(|tokenizer| {
                (in_pieces(tokenizer, &text, bytes), tokenizer.encode_document(&text).unwrap())
            });
            prop_assert_eq!(pieces, whole);
        }

        #[test]
        fn cut_sentence_pieces_have_the_ids_of_the_whole(
            text in "([abc. x\u{301}\n]|<m>|\n)*",
            bytes in 1..12_usize,
        ) {
            thread_local!(static TOKENIZERS: [TextTokenizer; 2] = ["always", "first"].map(unigram));
            TOKENIZERS.with(|tokenizers| {
                for tokenizer in tokenizers {
                    let whole = tokenizer.encode_document(&text).unwrap();
                    assert_eq!(in_pieces(tokenizer, &text, bytes), whole, "{text:?}");
                }
            });
        }
    }

    #[test]
    fn a_long_text_is_in_fact_cut() {
        let tokenizer = TextTokenizer::train_bpe([Ok("line of text\n")], 260).unwrap();
        assert_eq!(tokenizer.segments.split(&"line of text\n".repeat(20_000), SEGMENT_BYTES).len(), 4);
    }
}

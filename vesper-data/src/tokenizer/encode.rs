//! Encoding many documents in parallel, in their order.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::segment::{Piece, SEGMENT_BYTES};
use super::{TextTokenizer, offsets};
use crate::error::{DataError, Result, one_line};
use crate::source::Document;

/// How much text is encoded at a time: enough to keep all threads busy, little enough to be kept in memory
/// several times over.
const BATCH_BYTES: usize = 8 << 20;
const BATCH_BYTES_A_THREAD: usize = 1 << 20;
const BATCH_DOCUMENTS: usize = 16 << 10;

/// A text to train on: a string, or a [`Document`], which knows what the loss is taken over.
pub trait TrainingText {
    /// The text.
    fn text(&self) -> &str;

    /// The byte ranges of the text that the loss is taken over, in order and apart from each other; `None`: all.
    fn loss(&self) -> Option<&[Range<usize>]> {
        None
    }
}

impl TrainingText for Document {
    fn text(&self) -> &str {
        &self.text
    }

    fn loss(&self) -> Option<&[Range<usize>]> {
        self.loss.as_deref()
    }
}

impl TrainingText for str {
    fn text(&self) -> &str {
        self
    }
}

impl TrainingText for String {
    fn text(&self) -> &str {
        self
    }
}

impl TrainingText for Cow<'_, str> {
    fn text(&self) -> &str {
        self
    }
}

impl<T: TrainingText + ?Sized> TrainingText for &T {
    fn text(&self) -> &str {
        (**self).text()
    }

    fn loss(&self) -> Option<&[Range<usize>]> {
        (**self).loss()
    }
}

impl<T: TrainingText + ?Sized> TrainingText for Box<T> {
    fn text(&self) -> &str {
        (**self).text()
    }

    fn loss(&self) -> Option<&[Range<usize>]> {
        (**self).loss()
    }
}

impl<T: TrainingText + ?Sized> TrainingText for Arc<T> {
    fn text(&self) -> &str {
        (**self).text()
    }

    fn loss(&self) -> Option<&[Range<usize>]> {
        (**self).loss()
    }
}

/// How much has been encoded since the last time: see [`TextTokenizer::with_observer`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EncodeProgress {
    /// Documents.
    pub documents: u64,
    /// Bytes of their text.
    pub bytes: u64,
    /// Their ids.
    pub tokens: u64,
}

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
    T: TrainingText + Sync,
{
    /// Takes some documents and makes their ids ready.
    fn fill(&mut self) {
        let mut batch = Vec::new();
        let mut bytes = 0;
        let mut failed = None;
        let enough = BATCH_BYTES.max(rayon::current_num_threads() * BATCH_BYTES_A_THREAD);
        while bytes < enough && batch.len() < BATCH_DOCUMENTS && !self.done {
            match self.documents.next() {
                Some(Ok(document)) => {
                    bytes += document.text().len();
                    batch.push(document);
                }
                Some(Err(error)) => {
                    failed = Some(error);
                    self.done = true;
                }
                None => self.done = true,
            }
        }
        let encoded = encode_all(self.tokenizer, &batch, SEGMENT_BYTES);
        if let Some(observer) = &self.tokenizer.observer.0 {
            let tokens = encoded.iter().flatten().map(|encoded| encoded.ids.len() as u64).sum();
            observer(EncodeProgress { documents: batch.len() as u64, bytes: bytes as u64, tokens });
        }
        self.ready.extend(encoded);
        self.ready.extend(failed.map(Err));
    }
}

impl<I, T> Iterator for EncodeDocuments<'_, I>
where
    I: Iterator<Item = Result<T>>,
    T: TrainingText + Sync,
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
    T: TrainingText + Sync,
{
    let pieces: Vec<(usize, Piece<'_>)> = documents
        .iter()
        .map(|document| tokenizer.segments.split(document.text(), segment_bytes))
        .enumerate()
        .flat_map(|(document, pieces)| pieces.into_iter().map(move |piece| (document, piece)))
        .collect();
    let encoded: Vec<(usize, Result<Encoded>)> = pieces
        .into_par_iter()
        .map(|(index, piece)| {
            let loss = documents.get(index).and_then(TrainingText::loss);
            (index, encode_piece(tokenizer, piece, loss))
        })
        .collect();
    let mut results: Vec<Result<Encoded>> = Vec::with_capacity(documents.len());
    for (document, piece) in encoded {
        match (results.get_mut(document), piece) {
            (Some(Ok(whole)), Ok(piece)) => whole.append(piece),
            (Some(whole), Err(error)) => *whole = Err(error),
            (Some(Err(_)), Ok(_)) => {}
            (None, piece) => results.push(piece),
        }
    }
    for (whole, document) in results.iter_mut().zip(documents) {
        if let Ok(whole) = whole {
            whole.end(tokenizer.eos_id(), document);
        }
    }
    results
}

/// The ids of a document, encoded in one piece.
pub(super) fn whole(tokenizer: &TextTokenizer, document: &(impl TrainingText + ?Sized)) -> Result<Encoded> {
    let piece = Piece { text: document.text(), start: 0, from: 0 };
    let mut encoded = encode_piece(tokenizer, piece, document.loss())?;
    encoded.end(tokenizer.eos_id(), document);
    Ok(encoded)
}

fn encode_piece(
    tokenizer: &TextTokenizer,
    piece: Piece<'_>,
    loss: Option<&[Range<usize>]>,
) -> Result<Encoded> {
    let Some(ranges) = loss else { return tokenizer.encode_counted(piece.text) };
    let encoding = offsets::encode(&tokenizer.inner, piece.text)
        .map_err(|error| DataError::Tokenizer { action: "encode", problem: one_line(error) })?;
    let mut encoded = tokenizer.loss.counted(piece.text, &encoding);
    encoded.loss = Some(offsets::touched(&encoding, piece, ranges));
    Ok(encoded)
}

impl Encoded {
    /// Adds the next piece of the same document.
    fn append(&mut self, piece: Self) {
        let before = self.ids.len();
        self.ids.extend(piece.ids);
        self.unknown += piece.unknown;
        if let (Some(ranges), Some(more)) = (&mut self.loss, piece.loss) {
            for range in more {
                offsets::append(ranges, before + range.start..before + range.end);
            }
        }
    }

    /// Adds the end of the text.
    fn end(&mut self, eos: Option<u32>, document: &(impl TrainingText + ?Sized)) {
        let before = self.ids.len();
        self.ids.extend(eos);
        let reached = document
            .loss()
            .and_then(|ranges| ranges.last())
            .is_some_and(|last| last.end >= document.text().len());
        if let Some(ranges) = self.loss.as_mut().filter(|_| reached && eos.is_some()) {
            offsets::append(ranges, before..before + 1);
        }
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "a document with one range that counts")]
mod tests {
    use super::*;
    use crate::tokenizer::Segments;
    use crate::tokenizer::segment::LATER_RULES;
    use proptest::prelude::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

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
        assert_eq!(tokenizer.segments, Segments::Whole, "this normalizer is not a known one");
        tokenizer.segments = Segments::SentencePiece;
        tokenizer
    }

    /// A BPE that takes the text as one word, as Llama's does, with every byte as a token of its own.
    fn llama(metaspace: bool) -> TextTokenizer {
        let mut vocab: Vec<String> = ["<s>", "</s>", "\u{2581}", "a", "b", "c"].map(str::to_owned).into();
        vocab.extend((0..=255_u8).map(|byte| format!("<0x{byte:02X}>")));
        let merges = [
            ["\u{2581}", "a"],
            ["a", "b"],
            ["\u{2581}", "\u{2581}"],
            ["\u{2581}a", "b"],
            ["\u{2581}", "b"],
            ["c", "c"],
            ["\u{2581}\u{2581}", "c"],
        ];
        vocab.extend(merges.iter().map(|pair| pair.concat()));
        let vocab: serde_json::Map<String, serde_json::Value> =
            vocab.into_iter().enumerate().map(|(id, token)| (token, id.into())).collect();
        let mut json = serde_json::json!({
            "version": "1.0",
            "added_tokens": [{"id": 0, "content": "<s>", "special": true, "lstrip": false, "rstrip": false,
                "single_word": false, "normalized": false}],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "\u{2581}"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
            ]},
            "model": {"type": "BPE", "vocab": vocab, "merges": merges, "byte_fallback": true, "fuse_unk": true,
                "unk_token": "<s>"},
        });
        if metaspace {
            json["normalizer"] = serde_json::Value::Null;
            json["pre_tokenizer"] = serde_json::json!(
                {"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "first", "split": false}
            );
        }
        let tokenizer =
            TextTokenizer::new(serde_json::from_value(json).unwrap(), serde_json::Map::new()).unwrap();
        assert_eq!(tokenizer.segments, Segments::Spaces);
        tokenizer
    }

    /// A byte-level BPE with one of the later rules, and tokens that reach over white space where rules are wrong.
    fn later(rule: &str) -> TextTokenizer {
        let mut vocab: Vec<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
        vocab.sort_unstable();
        let merges =
            [["a", "b"], ["Ġ", "a"], ["Ġ", "b"], ["Ġa", "b"], ["b", "Ġ"], ["Ċ", "Ċ"], ["Ġ", "Ġ"], ["'", "s"]];
        vocab.extend(merges.iter().map(|pair| pair.concat()));
        let vocab: serde_json::Map<String, serde_json::Value> =
            vocab.into_iter().enumerate().map(|(id, token)| (token, id.into())).collect();
        let json = serde_json::json!({
            "version": "1.0",
            "added_tokens": [{"id": vocab.len(), "content": "<s>", "special": true, "lstrip": false, "rstrip": false,
                "single_word": false, "normalized": false}],
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": false},
                {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
            ]},
            "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": true},
        });
        let tokenizer =
            TextTokenizer::new(serde_json::from_value(json).unwrap(), serde_json::Map::new()).unwrap();
        assert_eq!(tokenizer.segments, Segments::LetterSpaces);
        tokenizer
    }

    fn document(text: &str, loss: Option<Vec<Range<usize>>>) -> Document {
        Document { text: text.to_owned(), path: std::path::Path::new("a.txt").into(), line: 1, loss }
    }

    /// Encodes a document in pieces and as a whole.
    fn both(tokenizer: &TextTokenizer, document: &Document, bytes: usize) -> [Encoded; 2] {
        let pieces = encode_all(tokenizer, &[document], bytes).remove(0).unwrap();
        [pieces, tokenizer.encode_document(document).unwrap()]
    }

    /// Ranges of bytes, in order and apart, from any numbers.
    fn ranges(text: &str, mut numbers: Vec<usize>) -> Vec<Range<usize>> {
        for number in &mut numbers {
            *number %= text.len() + 1;
        }
        numbers.sort_unstable();
        numbers.dedup();
        numbers.chunks_exact(2).map(|pair| pair[0]..pair[1]).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn cut_bytes_have_the_ids_of_the_whole(
            text in "([ab'.é\u{301}\u{a0}\u{2028}0-1 \n\r\t]|<[|]endoftext[|]>|\n| )*",
            bytes in 1..12_usize,
            numbers in prop::collection::vec(any::<usize>(), 0..6),
        ) {
            // With tokens for runs of white space, so that a run cut in two would show.
            thread_local!(static TOKENIZER: TextTokenizer =
                TextTokenizer::train_bpe([Ok("a \n\n \n\nb  \n  ab. \n\t\n 'a\n".repeat(9))], 300).unwrap());
            let loss = ranges(&text, numbers);
            TOKENIZER.with(|tokenizer| {
                let [plain, whole] = both(tokenizer, &document(&text, None), bytes);
                assert_eq!(plain, whole, "{text:?}");
                let [pieces, whole] = both(tokenizer, &document(&text, Some(loss.clone())), bytes);
                assert_eq!(pieces, whole, "{text:?} {loss:?}");
                assert_eq!(pieces.ids, plain.ids);
            });
        }

        #[test]
        fn cut_bytes_of_later_rules_have_the_ids_of_the_whole(
            text in "([abB'sé\u{301}\u{a0}0-1. \n\r/]|<s>| )*",
            bytes in 1..12_usize,
            numbers in prop::collection::vec(any::<usize>(), 0..6),
        ) {
            thread_local!(static TOKENIZERS: [TextTokenizer; 4] = LATER_RULES.map(later));
            let loss = ranges(&text, numbers);
            TOKENIZERS.with(|tokenizers| {
                for tokenizer in tokenizers {
                    let [plain, whole] = both(tokenizer, &document(&text, None), bytes);
                    assert_eq!(plain, whole, "{text:?}");
                    let [pieces, whole] = both(tokenizer, &document(&text, Some(loss.clone())), bytes);
                    assert_eq!(pieces, whole, "{text:?} {loss:?}");
                }
            });
        }

        #[test]
        fn cut_sentence_pieces_have_the_ids_of_the_whole(
            text in "([abc. x\u{301}\n]|<m>|<s>|\n)*",
            bytes in 1..12_usize,
            numbers in prop::collection::vec(any::<usize>(), 0..6),
        ) {
            thread_local!(static TOKENIZERS: [TextTokenizer; 4] =
                [unigram("always"), unigram("first"), llama(false), llama(true)]);
            let loss = ranges(&text, numbers);
            TOKENIZERS.with(|tokenizers| {
                for tokenizer in tokenizers {
                    let [plain, whole] = both(tokenizer, &document(&text, None), bytes);
                    assert_eq!(plain, whole, "{text:?}");
                    let [pieces, whole] = both(tokenizer, &document(&text, Some(loss.clone())), bytes);
                    assert_eq!(pieces, whole, "{text:?} {loss:?}");
                    assert_eq!(pieces.ids, plain.ids);
                }
            });
        }
    }

    #[test]
    fn a_space_that_is_a_token_by_itself_counts_for_itself_where_a_text_is_cut() {
        // The "x" is unknown, so that the "▁" in the place of the line break stands alone.
        let tokenizer = unigram("always");
        for counts in [9..10, 10..11, 9..11, 8..9] {
            let [pieces, whole] =
                both(&tokenizer, &document("\u{301}<m><m>a\nx\n", Some(vec![counts.clone()])), 1);
            assert_eq!(pieces, whole, "{counts:?}");
        }
    }

    /// The texts of the tokens that count.
    fn counted(tokenizer: &TextTokenizer, text: &str, loss: &[Range<usize>]) -> Vec<String> {
        let encoded = tokenizer.encode_document(&document(text, Some(loss.to_vec()))).unwrap();
        let ids = encoded.loss.unwrap().into_iter().flat_map(|range| encoded.ids[range].to_vec());
        ids.map(|id| tokenizer.id_to_token(id).unwrap()).collect()
    }

    #[test]
    fn the_tokens_of_an_answer_count_and_the_end_of_text_when_it_ends_with_it() {
        let tokenizer = TextTokenizer::train_bpe([Ok("? oui ? oui ? oui")], 262).unwrap();
        let text = "é ? oui";
        assert_eq!(counted(&tokenizer, text, &[5..8]), ["Ġoui", "<|endoftext|>"]);
        assert_eq!(counted(&tokenizer, text, &[4..5]), ["Ġoui"]); // by its space
        assert_eq!(counted(&tokenizer, text, &[0..1]), ["Ã", "©"]); // a character of two tokens
        assert_eq!(counted(&tokenizer, text, &[0..0, 3..4]), ["Ġ?"]);
        assert!(counted(&tokenizer, text, &[]).is_empty());
        let all = tokenizer.encode_document(&document(text, Some(vec![0..8]))).unwrap();
        assert_eq!(all.loss, Some(vec![0..all.ids.len()]));
        assert_eq!(tokenizer.encode_document(&document(text, None)).unwrap().loss, None);
    }

    #[test]
    fn a_token_of_normalised_text_counts_where_it_was_before() {
        let text = "ab ﬁn… \u{a0} cab";
        let tokenizer = TextTokenizer::train_unigram([Ok("a b c fin... cab".repeat(9))], 40).unwrap();
        let offsets_of = |part: &str| text.find(part).map(|at| at..at + part.len()).unwrap();
        let answer = counted(&tokenizer, text, &[offsets_of("ﬁn")]).concat();
        assert_eq!(answer, "fin");
        assert_eq!(counted(&tokenizer, text, &[offsets_of("…")]).concat(), "...");
        assert_eq!(counted(&tokenizer, text, &[offsets_of("cab")]).concat(), "\u{2581}cab</s>");
        assert_eq!(
            counted(&tokenizer, text, &[0..1]).concat().trim_start_matches('\u{2581}').chars().next(),
            Some('a')
        );
    }

    #[test]
    fn a_long_text_is_in_fact_cut() {
        let tokenizer = TextTokenizer::train_bpe([Ok("line of text\n")], 260).unwrap();
        assert_eq!(tokenizer.segments.split(&"line of text\n".repeat(20_000), SEGMENT_BYTES).len(), 4);
    }
}

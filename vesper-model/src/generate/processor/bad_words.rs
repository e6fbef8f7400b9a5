use super::{History, LogitsProcessor, exclude};

/// Excludes sequences of tokens: the last token of one, where the tokens before it are the end of the history.
///
/// As in Hugging Face's `bad_words_ids`, a sequence that is nothing but a token that ends the text is ignored. There a
/// sequence is also ignored while it is longer than the history, though its last token could complete it; here it is not.
///
/// # Examples
/// ```
/// use vesper_model::generate::{History, LogitsProcessor, BadWords};
/// let mut words = BadWords::new(vec![vec![0], vec![1, 2]], &[]);
/// let mut scores = [0f32; 3];
/// words.process(&mut scores, History::new(&[1], 0));
/// assert_eq!(scores, [f32::NEG_INFINITY, 0., f32::NEG_INFINITY]);
/// ```
#[derive(Debug, Clone)]
pub struct BadWords {
    words: Vec<Vec<u32>>,
}

impl BadWords {
    /// `words`: the sequences; `eos`: the tokens that end the text.
    pub fn new(words: Vec<Vec<u32>>, eos: &[u32]) -> Self {
        let only_eos = |word: &[u32]| matches!(word, [id] if eos.contains(id));
        Self { words: words.into_iter().filter(|word| !only_eos(word)).collect() }
    }
}

impl LogitsProcessor for BadWords {
    fn process(&mut self, scores: &mut [f32], history: History<'_>) {
        for word in &self.words {
            if let Some((last, start)) = word.split_last()
                && history.last(start.len()) == Some(start)
            {
                exclude(scores, *last);
            }
        }
    }
}

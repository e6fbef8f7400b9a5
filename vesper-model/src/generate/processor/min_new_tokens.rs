use super::no_repeat_ngram::restore_if_empty;
use super::{History, LogitsProcessor, exclude};

/// Excludes the tokens that end the text until enough tokens were generated, as long as there are others.
#[derive(Debug, Clone)]
pub struct MinNewTokens {
    tokens: usize,
    eos: Vec<u32>,
}

impl MinNewTokens {
    /// At least `tokens` new tokens before one of `eos`.
    pub fn new(tokens: usize, eos: Vec<u32>) -> Self {
        Self { tokens, eos }
    }
}

impl LogitsProcessor for MinNewTokens {
    fn process(&mut self, scores: &mut [f32], history: History<'_>) {
        if history.generated().len() < self.tokens {
            let before = scores.to_vec();
            self.eos.iter().for_each(|&id| exclude(scores, id));
            restore_if_empty(scores, &before);
        }
    }
}

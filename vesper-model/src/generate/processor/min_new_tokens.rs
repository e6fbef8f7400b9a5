use super::{History, LogitsProcessor, exclude};

/// Excludes the tokens that end the text until enough tokens were generated.
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
            self.eos.iter().for_each(|&id| exclude(scores, id));
        }
    }
}

use super::{History, LogitsProcessor, exclude};

/// Excludes the tokens that end the text until enough tokens were generated.
///
/// # Examples
/// ```
/// use vesper_model::generate::{History, LogitsProcessor, MinNewTokens};
/// let mut at_least = MinNewTokens::new(1, vec![2]);
/// let mut scores = [0f32; 3];
/// at_least.process(&mut scores, History::new(&[0, 1], 2)); // two tokens of the prompt, none generated
/// assert_eq!(scores, [0., 0., f32::NEG_INFINITY]);
/// ```
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

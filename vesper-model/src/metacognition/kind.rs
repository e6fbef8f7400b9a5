//! What an error head tells apart.

use serde::{Deserialize, Serialize};

use super::TokenStatistics;
use crate::{ModelError, Result};

/// The kinds of a prediction, of which one is no error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The choice is the token that the text has.
    None,
    /// Wrong, but the model held the right token for one of the likeliest ([`KindRule::near`]).
    Near,
    /// Wrong, and the right token is not among the likeliest.
    Far,
    /// Wrong though the model gave its choice a high probability ([`KindRule::confident`]), wherever the right token is.
    Confident,
}

impl ErrorKind {
    /// All kinds, in the order of an error head's outputs.
    pub const ALL: [Self; 4] = [Self::None, Self::Near, Self::Far, Self::Confident];

    /// The place in [`ErrorKind::ALL`].
    pub(super) fn index(self) -> usize {
        self as usize
    }

    /// Whether it is an error.
    pub fn is_wrong(self) -> bool {
        self != Self::None
    }
}

/// Where the kinds of errors part.
///
/// ```text
/// None        chosen = target
/// Confident   else, if P(chosen) >= confident
/// Near        else, if fewer than `near` tokens are likelier than the target (equals count by their ids)
/// Far         else
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KindRule {
    /// How many of the likeliest tokens count as near. At least 1. Default 5.
    pub near: usize,
    /// The probability from which on an error is a confident one, over 0 and up to 1. Default .5.
    pub confident: f64,
}

impl Default for KindRule {
    fn default() -> Self {
        Self { near: 5, confident: 0.5 }
    }
}

impl KindRule {
    /// Checks both numbers against their ranges.
    ///
    /// # Errors
    /// [`ModelError::InvalidMetacognition`].
    pub fn validate(&self) -> Result<()> {
        if self.near == 0 {
            let expected = "at least 1";
            return Err(ModelError::InvalidMetacognition { field: "near", got: "0".into(), expected });
        }
        if !(self.confident > 0.0 && self.confident <= 1.0) {
            let (got, expected) = (self.confident.to_string(), "a number over 0 and up to 1");
            return Err(ModelError::InvalidMetacognition { field: "confident", got, expected });
        }
        Ok(())
    }

    /// The kind of a choice; `logits`: `(vocab,)`, those that the statistics are of.
    ///
    /// # Errors
    /// [`ModelError::TokenOutOfRange`] for a target that has no score.
    ///
    /// # Examples
    /// ```
    /// use vesper_model::metacognition::{ErrorKind, KindRule, TokenStatistics};
    ///
    /// let logits = [0.0, 0.4, 0.3, 0.2];
    /// let rule = KindRule { near: 2, confident: 0.9 };
    /// let choice = TokenStatistics::greedy(&logits)?; // token 1
    /// assert_eq!(rule.kind(&logits, &choice, 1)?, ErrorKind::None);
    /// assert_eq!(rule.kind(&logits, &choice, 2)?, ErrorKind::Near);
    /// assert_eq!(rule.kind(&logits, &choice, 3)?, ErrorKind::Far);
    /// let rule = KindRule { near: 2, confident: 0.1 };
    /// assert_eq!(rule.kind(&logits, &choice, 2)?, ErrorKind::Confident);
    /// # Ok::<(), vesper_model::ModelError>(())
    /// ```
    pub fn kind(&self, logits: &[f32], choice: &TokenStatistics, target: u32) -> Result<ErrorKind> {
        let Some(&score) = logits.get(target as usize) else {
            return Err(ModelError::TokenOutOfRange { id: target, vocab: logits.len() });
        };
        if choice.chosen == target {
            return Ok(ErrorKind::None);
        }
        if choice.probability >= self.confident {
            return Ok(ErrorKind::Confident);
        }
        let likelier = |(id, logit): (usize, f32)| logit > score || (logit == score && id < target as usize);
        let rank = logits.iter().copied().enumerate().filter(|token| likelier(*token)).count();
        Ok(if rank < self.near { ErrorKind::Near } else { ErrorKind::Far })
    }
}

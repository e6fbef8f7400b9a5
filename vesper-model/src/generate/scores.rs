//! The likeliest token.

use crate::ops::scores::{are_numbers, largest};
use crate::{ModelError, Result};

/// The lowest id among the largest scores. Refuses scores that are no numbers.
pub(crate) fn argmax(scores: &[f32]) -> Result<u32> {
    if !are_numbers(scores) {
        let bad = scores.iter().zip(0u32..).find(|(score, _)| score.is_nan() || **score == f32::INFINITY);
        if let Some((score, id)) = bad {
            return Err(ModelError::InvalidLogits {
                reason: format!(
                    "the score of token {id} is {score}, expected a finite number (has training diverged?)"
                ),
            });
        }
    }
    let largest = largest(scores);
    let place = scores.iter().position(|&score| score == largest && score > f32::NEG_INFINITY);
    place.map(|id| id as u32).ok_or_else(no_token)
}

pub(super) fn no_token() -> ModelError {
    ModelError::InvalidLogits { reason: "no token has a score over minus infinity".into() }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    fn scores(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + 13) % 1009) as f32 / 70.0 - 9.0).collect()
    }

    #[test]
    fn the_largest_is_the_first_of_them_at_any_length() {
        for n in 1..70 {
            let scores = scores(n);
            let (mut best, mut most) = (0, f32::NEG_INFINITY);
            for (i, &score) in scores.iter().enumerate() {
                if score > most {
                    (best, most) = (i, score);
                }
            }
            assert_eq!(argmax(&scores).unwrap() as usize, best);
        }
        assert_eq!(argmax(&[2.0, 7.0, 7.0]).unwrap(), 1);
        assert_eq!(argmax(&[f32::NEG_INFINITY, -1e38]).unwrap(), 1);
    }

    #[test]
    fn scores_that_are_no_numbers_are_named() {
        for (bad, n) in [(f32::NAN, 3), (f32::INFINITY, 50), (f32::NAN, 17)] {
            let mut scores = scores(n);
            scores[n - 2] = bad;
            let error = argmax(&scores).unwrap_err().to_string();
            assert!(error.contains(&format!("token {} is", n - 2)), "{error}");
        }
        for none in [&[][..], &[f32::NEG_INFINITY; 40]] {
            assert!(argmax(none).unwrap_err().to_string().contains("no token"));
        }
    }
}

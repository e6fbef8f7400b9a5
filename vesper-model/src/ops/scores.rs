//! What choosing a token asks of all scores of a vocabulary, with the processor's vector instructions.

use super::real::{self, Real, fold, simd};

/// Terms that are added up in f32 before the sum goes on in f64.
const BLOCK: usize = 512;

/// The largest score, minus infinity where there is none. A NaN is not seen.
pub(crate) fn largest(scores: &[f32]) -> f32 {
    simd(|| real::max(scores))
}

/// Whether no score is NaN or plus infinity.
pub(crate) fn are_numbers(scores: &[f32]) -> bool {
    simd(|| fold(scores.len(), |i| if scores[i] < f32::INFINITY { 0f32 } else { 1.0 })) == 0.0
}

/// `exp(score - largest)` of each score.
pub(crate) fn weights(scores: &[f32]) -> Vec<f32> {
    let mut weights = vec![0f32; scores.len()];
    simd(|| {
        let most = real::max(scores);
        for (weight, &score) in weights.iter_mut().zip(scores) {
            *weight = Real::exp(score - most);
        }
    });
    weights
}

/// `ln(sum(exp(scores)))`.
pub(crate) fn log_sum_exp(scores: &[f32]) -> f64 {
    let most = largest(scores);
    let block = |scores: &[f32]| simd(|| fold(scores.len(), |i| Real::exp(scores[i] - most)));
    f64::from(most) + scores.chunks(BLOCK).map(|scores| f64::from(block(scores))).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_near_those_in_f64() {
        for n in [1, 15, 512, 513, 32_005] {
            let mut scores: Vec<f32> = (0..n).map(|i| ((i * 7919 + 13) % 1009) as f32 / 70.0 - 9.0).collect();
            if n > 1 {
                scores[0] = f32::NEG_INFINITY;
            }
            let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(largest(&scores), most);
            let exact: Vec<f64> = scores.iter().map(|&x| (f64::from(x) - f64::from(most)).exp()).collect();
            let sum = f64::from(most) + exact.iter().sum::<f64>().ln();
            assert!((log_sum_exp(&scores) - sum).abs() < 3e-7, "{n}: {} and {sum}", log_sum_exp(&scores));
            for (weight, exact) in weights(&scores).into_iter().zip(exact) {
                // The difference of two scores is rounded too.
                assert!((f64::from(weight) - exact).abs() < 2e-6 * exact + 1e-37);
            }
        }
    }

    #[test]
    fn what_is_no_number_is_seen_at_any_place() {
        for n in [1, 16, 17, 40] {
            for place in 0..n {
                for bad in [f32::NAN, f32::INFINITY] {
                    let mut scores = vec![f32::NEG_INFINITY; n];
                    assert!(are_numbers(&scores));
                    scores[place] = bad;
                    assert!(!are_numbers(&scores));
                }
            }
        }
        assert_eq!(largest(&[]), f32::NEG_INFINITY);
    }
}

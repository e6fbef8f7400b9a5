//! How good predicted probabilities of an error are.
//!
//! `scores[i]` or `p[i]` is what was predicted of prediction `i`, larger where an error is likelier; `wrong[i]` is what
//! happened.

use crate::{ModelError, Result};

/// Bins of the calibration error, of equal width over [0, 1].
pub const BINS: usize = 15;

/// The area under the receiver operating characteristic: how probable it is that a wrong prediction has a larger score
/// than a right one; equal scores count half.
///
/// ```text
/// AUROC = (sum of the ranks of the wrong - w (w + 1) / 2) / (w r)      w wrong, r right, equal scores share a rank
/// ```
///
/// # Errors
/// [`ModelError::InvalidPredictions`] for nothing, NaN, or predictions that are all right or all wrong.
///
/// # Examples
/// ```
/// use vesper_model::metacognition::metrics::auroc;
/// assert_eq!(auroc(&[0.1, 0.4, 0.35, 0.8], &[false, false, true, true])?, 0.75);
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
///
/// # References
/// Hanley and McNeil 1982 (the area as the statistic of Mann and Whitney).
pub fn auroc(scores: &[f64], wrong: &[bool]) -> Result<f64> {
    check("scores", scores, wrong)?;
    let mut all: Vec<(f64, bool)> = scores.iter().copied().zip(wrong.iter().copied()).collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut ranks, mut before) = (0.0, 0);
    for group in all.chunk_by(|a, b| a.0 == b.0) {
        // Ranks from 1; the members of a group share their mean.
        let rank = before as f64 + f64::midpoint(group.len() as f64, 1.0);
        ranks += rank * group.iter().filter(|(_, wrong)| *wrong).count() as f64;
        before += group.len();
    }
    let w = wrong.iter().filter(|wrong| **wrong).count() as f64;
    let r = all.len() as f64 - w;
    if w == 0.0 || r == 0.0 {
        let which = if w == 0.0 { "right" } else { "wrong" };
        return Err(invalid(format!(
            "all {} predictions are {which}, so there is nothing to tell apart",
            all.len()
        )));
    }
    Ok((ranks - w * (w + 1.0) / 2.0) / (w * r))
}

/// The mean squared error of the probabilities.
///
/// ```text
/// Brier = mean (p_i - wrong_i)^2
/// ```
///
/// # Errors
/// [`ModelError::InvalidPredictions`] for nothing, or a number that is no probability.
///
/// # References
/// Brier 1950.
pub fn brier(p: &[f64], wrong: &[bool]) -> Result<f64> {
    check_probabilities(p, wrong)?;
    let sum: f64 = p.iter().zip(wrong).map(|(p, wrong)| (p - f64::from(u8::from(*wrong))).powi(2)).sum();
    Ok(sum / p.len() as f64)
}

/// One bin of a reliability diagram.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Bin {
    /// How many predictions are in it.
    pub count: usize,
    /// The mean of their probabilities; 0 where there are none.
    pub predicted: f64,
    /// The share of them that was wrong; 0 where there are none.
    pub observed: f64,
}

/// The predictions by their probability, in `bins` bins of equal width: bin m has the probabilities in ((m - 1) / bins, m /
/// bins], and the first one 0 as well.
///
/// # Errors
/// [`ModelError::InvalidPredictions`] as [`brier`], or for no bins.
pub fn reliability(p: &[f64], wrong: &[bool], bins: usize) -> Result<Vec<Bin>> {
    check_probabilities(p, wrong)?;
    if bins == 0 {
        return Err(invalid("0 bins, expected at least 1"));
    }
    let mut all = vec![Bin { count: 0, predicted: 0.0, observed: 0.0 }; bins];
    for (p, wrong) in p.iter().zip(wrong) {
        let index = ((p * bins as f64).ceil() as usize).clamp(1, bins) - 1;
        if let Some(bin) = all.get_mut(index) {
            bin.count += 1;
            bin.predicted += p;
            bin.observed += f64::from(u8::from(*wrong));
        }
    }
    for bin in all.iter_mut().filter(|bin| bin.count > 0) {
        bin.predicted /= bin.count as f64;
        bin.observed /= bin.count as f64;
    }
    Ok(all)
}

/// The expected calibration error over [`BINS`] bins.
///
/// ```text
/// ECE = sum over the bins of (count / n) |predicted - observed|
/// ```
///
/// # Errors
/// [`ModelError::InvalidPredictions`] as [`brier`].
///
/// # Examples
/// ```
/// use vesper_model::metacognition::metrics::expected_calibration_error;
/// // Two thirds were wrong of what was called half wrong.
/// let error = expected_calibration_error(&[0.5, 0.5, 0.5], &[true, true, false])?;
/// assert!((error - 1.0 / 6.0).abs() < 1e-12);
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
///
/// # References
/// Guo et al. 2017, [arXiv:1706.04599](https://arxiv.org/abs/1706.04599).
pub fn expected_calibration_error(p: &[f64], wrong: &[bool]) -> Result<f64> {
    let bins = reliability(p, wrong, BINS)?;
    let n = p.len() as f64;
    Ok(bins.iter().map(|bin| bin.count as f64 / n * (bin.predicted - bin.observed).abs()).sum())
}

/// The error rate among the predictions with the lowest scores, which are the share `coverage` of all: what is left of the
/// errors when the others are not answered.
///
/// At least one prediction is answered. Where equal scores are partly in, each of them counts for its part: that is the
/// expectation over their orders.
///
/// # Errors
/// [`ModelError::InvalidPredictions`] for nothing, NaN, or a coverage outside (0, 1].
///
/// # Examples
/// ```
/// use vesper_model::metacognition::metrics::error_at_coverage;
/// let (scores, wrong) = ([0.1, 0.2, 0.8, 0.9], [false, true, true, true]);
/// assert_eq!(error_at_coverage(&scores, &wrong, 0.5)?, 0.5);
/// assert_eq!(error_at_coverage(&scores, &wrong, 1.0)?, 0.75);
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
///
/// # References
/// El-Yaniv and Wiener 2010, On the Foundations of Noise-free Selective Classification.
pub fn error_at_coverage(scores: &[f64], wrong: &[bool], coverage: f64) -> Result<f64> {
    check("scores", scores, wrong)?;
    if !(coverage > 0.0 && coverage <= 1.0) {
        return Err(invalid(format!("a coverage of {coverage}, expected a number over 0 and up to 1")));
    }
    let mut all: Vec<(f64, bool)> = scores.iter().copied().zip(wrong.iter().copied()).collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    let answered = (coverage * all.len() as f64).round().max(1.0);
    let (mut left, mut errors) = (answered, 0.0);
    for group in all.chunk_by(|a, b| a.0 == b.0) {
        let (n, w) = (group.len() as f64, group.iter().filter(|(_, wrong)| *wrong).count() as f64);
        let taken = left.min(n);
        errors += w * taken / n;
        left -= taken;
        if left <= 0.0 {
            break;
        }
    }
    Ok(errors / answered)
}

pub(super) fn invalid(reason: impl Into<String>) -> ModelError {
    ModelError::InvalidPredictions { reason: reason.into() }
}

/// As many numbers as outcomes, at least one, none NaN.
pub(super) fn check(what: &str, values: &[f64], wrong: &[bool]) -> Result<()> {
    if values.is_empty() {
        return Err(invalid(format!("there are no {what}: the split is empty")));
    }
    if values.len() != wrong.len() {
        return Err(invalid(format!("{} {what} for {} outcomes", values.len(), wrong.len())));
    }
    match values.iter().position(|value| value.is_nan()) {
        Some(i) => Err(invalid(format!("number {i} of the {what} is NaN"))),
        None => Ok(()),
    }
}

fn check_probabilities(p: &[f64], wrong: &[bool]) -> Result<()> {
    check("probabilities", p, wrong)?;
    match p.iter().enumerate().find(|(_, p)| !(0.0..=1.0).contains(*p)) {
        Some((i, p)) => Err(invalid(format!("probability {i} is {p}, expected a number from 0 to 1"))),
        None => Ok(()),
    }
}

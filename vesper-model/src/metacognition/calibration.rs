//! From a score to a probability that can be taken at its word.

use serde::{Deserialize, Serialize};

use super::metrics::{check, invalid};
use crate::Result;

/// How a [`Calibration`] is fitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// [`Calibration::temperature`].
    Temperature,
    /// [`Calibration::platt`].
    #[default]
    Platt,
    /// [`Calibration::isotonic`].
    Isotonic,
}

/// A function from scores to probabilities.
///
/// To be fitted on predictions that neither trained the score nor test it.
///
/// # Examples
/// ```
/// use vesper_model::metacognition::Calibration;
///
/// // Of what has score 0 a quarter is wrong, of what has score 1 three quarters.
/// let scores: Vec<f64> = (0..400).map(|i| f64::from(i % 2)).collect();
/// let wrong: Vec<bool> = (0..400).map(|i| if i % 2 == 0 { i % 8 == 0 } else { i % 8 != 1 }).collect();
/// let platt = Calibration::platt(&scores, &wrong)?;
/// assert!((platt.apply(0.0) - 0.25).abs() < 0.01 && (platt.apply(1.0) - 0.75).abs() < 0.01);
/// let isotonic = Calibration::isotonic(&scores, &wrong)?;
/// assert!((isotonic.apply(0.5) - 0.5).abs() < 1e-9);
/// # Ok::<(), vesper_model::ModelError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Calibration {
    /// `p = sigmoid(slope * score + offset)`.
    Platt {
        /// The slope.
        slope: f64,
        /// The offset.
        offset: f64,
    },
    /// Linear between knots, constant beyond them.
    Isotonic {
        /// Scores, rising.
        scores: Vec<f64>,
        /// Probabilities at them, never falling.
        values: Vec<f64>,
    },
}

impl Default for Calibration {
    /// For scores that are log-odds of an error already.
    fn default() -> Self {
        Self::LOG_ODDS
    }
}

impl Calibration {
    /// `p = sigmoid(score)`.
    pub const LOG_ODDS: Self = Self::Platt { slope: 1.0, offset: 0.0 };

    /// Fits by a method.
    ///
    /// # Errors
    /// [`ModelError::InvalidPredictions`](crate::ModelError::InvalidPredictions) for nothing, or a score that is not
    /// finite.
    pub fn fit(method: Method, scores: &[f64], wrong: &[bool]) -> Result<Self> {
        match method {
            Method::Temperature => Self::temperature(scores, wrong),
            Method::Platt => Self::platt(scores, wrong),
            Method::Isotonic => Self::isotonic(scores, wrong),
        }
    }

    /// Fits slope and offset by the likelihood (Newton's method).
    ///
    /// ```text
    /// least  - sum t_i ln p_i + (1 - t_i) ln(1 - p_i),   p_i = sigmoid(slope s_i + offset)
    /// t_i = (w + 1) / (w + 2) for the w wrong predictions, 1 / (r + 2) for the r right ones
    /// ```
    ///
    /// The targets are Platt's: they keep the fit finite where the scores separate right from wrong.
    ///
    /// # Errors
    /// As [`Calibration::fit`].
    ///
    /// # References
    /// Platt 1999; Lin, Lin and Weng 2007.
    pub fn platt(scores: &[f64], wrong: &[bool]) -> Result<Self> {
        let (slope, offset) = newton(scores, wrong, Free::SlopeAndOffset)?;
        Ok(Self::Platt { slope, offset })
    }

    /// Fits the temperature of scores that are log-odds: `p = sigmoid(score / temperature)`, with Platt's targets.
    ///
    /// # Errors
    /// As [`Calibration::fit`].
    ///
    /// # References
    /// Guo et al. 2017, [arXiv:1706.04599](https://arxiv.org/abs/1706.04599).
    pub fn temperature(scores: &[f64], wrong: &[bool]) -> Result<Self> {
        let (slope, offset) = newton(scores, wrong, Free::Slope)?;
        Ok(Self::Platt { slope, offset })
    }

    /// Fits the never falling function with the least squared error, by pooling adjacent violators.
    ///
    /// # Errors
    /// As [`Calibration::fit`].
    ///
    /// # References
    /// Zadrozny and Elkan 2002; Ayer et al. 1955.
    pub fn isotonic(scores: &[f64], wrong: &[bool]) -> Result<Self> {
        check_finite(scores, wrong)?;
        let mut all: Vec<(f64, f64)> =
            scores.iter().zip(wrong).map(|(s, w)| (*s, f64::from(u8::from(*w)))).collect();
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut blocks: Vec<Block> = Vec::new();
        for group in all.chunk_by(|a, b| a.0 == b.0) {
            let Some(&(score, _)) = group.first() else { continue };
            let sum = group.iter().map(|(_, wrong)| wrong).sum();
            let mut block = Block { first: score, last: score, sum, count: group.len() as f64 };
            while let Some(before) = blocks.pop_if(|before| before.mean() >= block.mean()) {
                block = before.with(&block);
            }
            blocks.push(block);
        }
        // A block is constant from its first score to its last.
        let (mut knots, mut values) = (Vec::new(), Vec::new());
        for block in blocks {
            knots.push(block.first);
            values.push(block.mean());
            if block.last > block.first {
                knots.push(block.last);
                values.push(block.mean());
            }
        }
        Ok(Self::Isotonic { scores: knots, values })
    }

    /// The probability of an error, from 0 to 1; NaN for NaN.
    pub fn apply(&self, score: f64) -> f64 {
        match self {
            Self::Platt { slope, offset } => sigmoid(slope * score + offset),
            Self::Isotonic { scores, values } => interpolate(scores, values, score),
        }
    }

    /// Whether it is a function from numbers to probabilities; says what is wrong.
    pub(super) fn problem(&self) -> Option<String> {
        match self {
            Self::Platt { slope, offset } => {
                let finite = slope.is_finite() && offset.is_finite();
                (!finite).then(|| format!("slope {slope} and offset {offset}, expected finite numbers"))
            }
            Self::Isotonic { scores, values } => {
                let rising = scores.is_sorted_by(|a, b| a < b) && scores.iter().all(|s| s.is_finite());
                let valid = values.is_sorted() && values.iter().all(|v| (0.0..=1.0).contains(v));
                let good = !scores.is_empty() && scores.len() == values.len() && rising && valid;
                (!good).then(|| {
                    "isotonic knots, expected rising scores with a probability each that does not fall".into()
                })
            }
        }
    }
}

/// `1 / (1 + exp(-x))` without overflow.
pub(super) fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}

/// The log-odds of a probability, kept finite.
pub(super) fn log_odds(p: f64) -> f64 {
    let p = p.clamp(1e-9, 1.0 - 1e-9);
    (p / (1.0 - p)).ln()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Free {
    Slope,
    SlopeAndOffset,
}

/// Slope and offset of the largest likelihood.
fn newton(scores: &[f64], wrong: &[bool], free: Free) -> Result<(f64, f64)> {
    check_finite(scores, wrong)?;
    let n = scores.len() as f64;
    let w = wrong.iter().filter(|wrong| **wrong).count() as f64;
    let targets = [1.0 / (n - w + 2.0), (w + 1.0) / (w + 2.0)];
    // Scores of mean 0 and deviation 1 make the problem well conditioned.
    let mean = if free == Free::Slope { 0.0 } else { scores.iter().sum::<f64>() / n };
    let deviation = (scores.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / n).sqrt();
    let deviation = if deviation > 0.0 { deviation } else { 1.0 };
    let loss = |a: f64, b: f64| -> f64 {
        let terms = scores.iter().zip(wrong).map(|(s, wrong)| {
            let (z, t) = (a * (s - mean) / deviation + b, targets[usize::from(*wrong)]);
            // - t ln p - (1 - t) ln(1 - p) = ln(1 + exp(-|z|)) + max(z, 0) - t z
            (-z.abs()).exp().ln_1p() + z.max(0.0) - t * z
        });
        terms.sum::<f64>() / n
    };
    let (mut a, mut b) = (0.0, 0.0);
    let mut current = loss(a, b);
    for _ in 0..100 {
        let (mut ga, mut gb, mut haa, mut hab, mut hbb) = (0.0, 0.0, 1e-12, 0.0, 1e-12);
        for (s, wrong) in scores.iter().zip(wrong) {
            let x = (s - mean) / deviation;
            let p = sigmoid(a * x + b);
            let (d, h) = ((p - targets[usize::from(*wrong)]) / n, p * (1.0 - p) / n);
            ga += d * x;
            gb += d;
            haa += h * x * x;
            hab += h * x;
            hbb += h;
        }
        let (da, db) = if free == Free::Slope {
            (-ga / haa, 0.0)
        } else {
            let determinant = haa * hbb - hab * hab;
            if determinant > 1e-18 {
                ((hab * gb - hbb * ga) / determinant, (hab * ga - haa * gb) / determinant)
            } else {
                (-ga / haa, -gb / hbb) // all scores are equal, or nearly
            }
        };
        // Halve the step until it does not make things worse.
        let mut step = 1.0;
        let mut next = loss(a + da, b + db);
        while next > current && step > 1e-6 {
            step /= 2.0;
            next = loss(a + step * da, b + step * db);
        }
        let gained = current - next;
        if gained > 0.0 {
            (a, b, current) = (a + step * da, b + step * db, next);
        }
        if gained <= 1e-13 {
            break;
        }
    }
    Ok((a / deviation, b - a * mean / deviation))
}

fn check_finite(scores: &[f64], wrong: &[bool]) -> Result<()> {
    check("scores to calibrate on", scores, wrong)?;
    match scores.iter().position(|score| score.is_infinite()) {
        Some(i) => Err(invalid(format!("score {i} to calibrate on is infinite"))),
        None => Ok(()),
    }
}

/// Scores that share a value.
struct Block {
    first: f64,
    last: f64,
    sum: f64,
    count: f64,
}

impl Block {
    fn mean(&self) -> f64 {
        self.sum / self.count
    }

    fn with(self, next: &Self) -> Self {
        Self { first: self.first, last: next.last, sum: self.sum + next.sum, count: self.count + next.count }
    }
}

fn interpolate(scores: &[f64], values: &[f64], score: f64) -> f64 {
    if score.is_nan() {
        return f64::NAN;
    }
    let after = scores.partition_point(|knot| *knot <= score);
    let knot = |i: usize| Some((*scores.get(i)?, *values.get(i)?));
    match (after.checked_sub(1).and_then(knot), knot(after)) {
        (Some((x, y)), Some((x2, y2))) => y + (y2 - y) * (score - x) / (x2 - x),
        (Some((_, y)), None) | (None, Some((_, y))) => y,
        (None, None) => f64::NAN,
    }
}

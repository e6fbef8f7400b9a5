//! [`Schedule`]: the learning rate as a function of the step.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// A number of steps, or a fraction of the whole run.
///
/// A fraction is not rounded: `Fraction(0.3)` of 97 steps is 29.1 steps, and formulas are evaluated there.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Span {
    /// So many steps.
    Steps(u64),
    /// This fraction of all steps, in [0, 1].
    Fraction(f64),
}

impl Span {
    const NONE: Self = Self::Steps(0);
    const ALL: Self = Self::Fraction(1.0);

    /// The number of steps, in a run of `total`.
    fn of(self, total: f64) -> f64 {
        match self {
            Self::Steps(steps) => steps as f64,
            Self::Fraction(fraction) => fraction * total,
        }
    }
}

impl Default for Span {
    /// No steps.
    fn default() -> Self {
        Self::NONE
    }
}

/// How a factor goes from one value to another, by `y(x)` with x from 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Curve {
    /// `y = 1 - x`.
    #[default]
    Linear,
    /// `y = (1 + cos(pi x)) / 2`.
    Cosine,
    /// `y = 1 - sqrt(x)`, which Hägele et al. (arXiv 2405.18392) found best for the decay of [`Schedule::Wsd`].
    Sqrt,
}

impl Curve {
    /// From `from` at x <= 0 to `to` at x >= 1.
    fn between(self, from: f64, to: f64, x: f64) -> f64 {
        let x = x.clamp(0.0, 1.0);
        let y = match self {
            Self::Linear => 1.0 - x,
            Self::Cosine => f64::midpoint(1.0, (std::f64::consts::PI * x).cos()),
            Self::Sqrt => 1.0 - x.sqrt(),
        };
        to + (from - to) * y
    }
}

/// A learning-rate schedule: a pure function from the step to a factor on the base learning rate.
///
/// Steps are counted from 0, and the last of `total` steps is `total - 1`. With w the warm-up in steps and d the decay:
///
/// ```text
/// warm-up, while t + 1 < w    factor(t) = (t + 1) / w
/// Constant                    1
/// Linear, Cosine, Wsd         end + (1 - end) * y((t - s) / (total - s)) from t = s on, 1 before it
///                             s = max(w, total - d); Cosine decays over all steps after the warm-up
/// OneCycle, r = rise          start to 1 over t = 0 .. r - 1, then 1 to end over t = r - 1 .. total - 1
/// InverseSqrt, T = timescale  max(min, sqrt(T / (T + t - w)))
/// ```
///
/// So the first step never has a learning rate of zero: its factor is 1 / w, or 1 without a warm-up, or `start`.
/// A decay reaches `end` at step `total`, the first after the run, as in PyTorch: with `end` 0 the last step still has
/// the factor y(1 - 1 / (total - s)), which for a linear decay is 1 / (total - s), and none is wasted. `OneCycle`
/// alone reaches `end` in the last step, also as in PyTorch.
///
/// **Past the end**, from step `total` on, schedules that have an `end` stay there; `Constant` and `InverseSqrt` do
/// not depend on `total` (but for spans that are fractions) and go on. A warm-up of the run's length or longer leaves
/// no decay. Every factor of a valid schedule is in [0, 1].
///
/// The same calls in PyTorch: `LinearLR(start_factor=1, end_factor=end, total_iters=total)`,
/// `CosineAnnealingLR(T_max=total, eta_min=end * lr)`,
/// `OneCycleLR(total_steps=total, pct_start=rise, div_factor=1 / start, final_div_factor=start / end)`.
///
/// # Examples
/// ```
/// use candle_core::{Device, Var};
/// use velvet_optim::{Optimizer, Schedule, Span, Velvet, VelvetConfig};
///
/// let schedule = Schedule::Cosine { warm_up: Span::Steps(10), end: 0.1 };
/// schedule.validate()?;
/// assert_eq!(schedule.factor(0, 100), 0.1); // 1 / 10
/// assert_eq!(schedule.factor(9, 100), 1.0);
/// assert_eq!(schedule.factor(55, 100), 0.55); // half-way between 1 and .1
/// assert_eq!(schedule.factor(100, 100), 0.1);
///
/// let x = Var::new(&[3f32, -2.0], &Device::Cpu)?;
/// let mut opt = Velvet::new(vec![x.clone()], VelvetConfig::default())?;
/// for step in 0..100 {
///     opt.set_learning_rate(schedule.lr(0.1, step, 100));
///     opt.backward_step(&x.sqr()?.sum_all()?)?;
/// }
///
/// let read: Schedule = serde_json::from_str(r#"{"wsd": {"decay": {"fraction": 0.2}, "shape": "sqrt"}}"#)?;
/// assert_eq!(read.factor(79, 100), 1.0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # References
/// Cosine: Loshchilov and Hutter, arXiv 1608.03983. One cycle: Smith and Topin, arXiv 1708.07120. Inverse square root:
/// Vaswani et al., arXiv 1706.03762. WSD: Hu et al., arXiv 2404.06395.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Schedule {
    /// The base learning rate throughout, after the warm-up.
    Constant {
        /// The warm-up (default: none).
        #[serde(default)]
        warm_up: Span,
    },
    /// A linear decay over all of the run after the warm-up, or over its last part.
    Linear {
        /// The warm-up (default: none).
        #[serde(default)]
        warm_up: Span,
        /// The last steps, over which it decays (default: all).
        #[serde(default = "all")]
        decay: Span,
        /// The factor past the last step, in [0, 1] (default 0).
        #[serde(default)]
        end: f64,
    },
    /// Half a cosine wave over all of the run after the warm-up.
    Cosine {
        /// The warm-up (default: none).
        #[serde(default)]
        warm_up: Span,
        /// The factor past the last step, in [0, 1] (default 0).
        #[serde(default)]
        end: f64,
    },
    /// Warm-up, stable, decay: the stable part can be prolonged and branched, and only the decay knows the end.
    Wsd {
        /// The warm-up (default: none).
        #[serde(default)]
        warm_up: Span,
        /// The last steps, over which it decays (default: the last fifth).
        #[serde(default = "last_fifth")]
        decay: Span,
        /// How it decays (default: linearly).
        #[serde(default)]
        shape: Curve,
        /// The factor past the last step, in [0, 1] (default 0).
        #[serde(default)]
        end: f64,
    },
    /// Up to the base learning rate and down again, over the whole run.
    OneCycle {
        /// The part over which it rises (default: three tenths).
        #[serde(default = "three_tenths")]
        rise: Span,
        /// The factor of the first step, in (0, 1] (default 1/25).
        #[serde(default = "one_cycle_start")]
        start: f64,
        /// The factor of the last step, in [0, 1] (default 1/250000).
        #[serde(default = "one_cycle_end")]
        end: f64,
        /// How it rises and falls (default: as a cosine).
        #[serde(default = "cosine")]
        shape: Curve,
    },
    /// A decay with the root of the step, that needs no end: a run can go on for ever.
    InverseSqrt {
        /// The warm-up (default: none).
        #[serde(default)]
        warm_up: Span,
        /// The steps after the warm-up in which the factor falls to sqrt(1/2), more than 0. Equal to the warm-up it
        /// gives the schedule of the Transformer, sqrt(w / t).
        timescale: Span,
        /// The smallest factor, in [0, 1] (default 0).
        #[serde(default)]
        min: f64,
    },
}

fn all() -> Span {
    Span::ALL
}

fn last_fifth() -> Span {
    Span::Fraction(0.2)
}

fn three_tenths() -> Span {
    Span::Fraction(0.3)
}

fn one_cycle_start() -> f64 {
    1.0 / 25.0
}

fn one_cycle_end() -> f64 {
    one_cycle_start() / 1e4
}

fn cosine() -> Curve {
    Curve::Cosine
}

impl Default for Schedule {
    /// Constant, without a warm-up.
    fn default() -> Self {
        Self::Constant { warm_up: Span::NONE }
    }
}

impl Schedule {
    /// Checks every field against its range.
    ///
    /// # Errors
    /// A fraction or factor is outside [0, 1] or is NaN; `start` or `timescale` is 0.
    ///
    /// ```
    /// use velvet_optim::{Schedule, Span};
    /// let schedule = Schedule::Cosine { warm_up: Span::Fraction(5.0), end: 0.0 };
    /// let message = schedule.validate().unwrap_err().to_string();
    /// assert!(message.ends_with("`schedule.cosine.warm_up`: expected a fraction in [0, 1], got 5"), "{message}");
    /// ```
    pub fn validate(&self) -> Result<()> {
        match *self {
            Self::Constant { warm_up } => span("schedule.constant.warm_up", warm_up),
            Self::Linear { warm_up, decay, end } => {
                span("schedule.linear.warm_up", warm_up)?;
                span("schedule.linear.decay", decay)?;
                factor("schedule.linear.end", end)
            }
            Self::Cosine { warm_up, end } => {
                span("schedule.cosine.warm_up", warm_up)?;
                factor("schedule.cosine.end", end)
            }
            Self::Wsd { warm_up, decay, shape: _, end } => {
                span("schedule.wsd.warm_up", warm_up)?;
                span("schedule.wsd.decay", decay)?;
                factor("schedule.wsd.end", end)
            }
            Self::OneCycle { rise, start, end, shape: _ } => {
                span("schedule.one_cycle.rise", rise)?;
                check("schedule.one_cycle.start", "a factor in (0, 1]", start, start > 0.0 && start <= 1.0)?;
                factor("schedule.one_cycle.end", end)
            }
            Self::InverseSqrt { warm_up, timescale, min } => {
                span("schedule.inverse_sqrt.warm_up", warm_up)?;
                span("schedule.inverse_sqrt.timescale", timescale)?;
                let steps = timescale.of(1.0);
                check("schedule.inverse_sqrt.timescale", "more than 0", steps, steps > 0.0)?;
                factor("schedule.inverse_sqrt.min", min)
            }
        }
    }

    /// The factor on the base learning rate in step `step` (the first is 0) of a run of `total` steps.
    ///
    /// Total over all inputs: no step, total or field makes it panic.
    pub fn factor(&self, step: u64, total: u64) -> f64 {
        let (t, n) = (step as f64, total as f64);
        let past_the_end = step >= total;
        match *self {
            Self::Constant { warm_up } => warming(warm_up.of(n), t).unwrap_or(1.0),
            Self::Linear { end, .. }
            | Self::Cosine { end, .. }
            | Self::Wsd { end, .. }
            | Self::OneCycle { end, .. }
                if past_the_end =>
            {
                end
            }
            Self::Linear { warm_up, decay, end } => decaying(warm_up, decay, Curve::Linear, end, t, n),
            Self::Cosine { warm_up, end } => decaying(warm_up, Span::ALL, Curve::Cosine, end, t, n),
            Self::Wsd { warm_up, decay, shape, end } => decaying(warm_up, decay, shape, end, t, n),
            Self::OneCycle { rise, start, end, shape } => {
                let (peak, last) = ((rise.of(n) - 1.0).max(0.0), n - 1.0);
                if t < peak {
                    shape.between(start, 1.0, t / peak)
                } else if last > peak {
                    shape.between(1.0, end, (t - peak) / (last - peak))
                } else {
                    1.0
                }
            }
            Self::InverseSqrt { warm_up, timescale, min } => {
                let (w, scale) = (warm_up.of(n), timescale.of(n));
                // A fraction of no steps at all is 0 / 0 in the first of them.
                let root = |past: f64| if past > 0.0 { (scale / (scale + past)).sqrt() } else { 1.0 };
                warming(w, t).unwrap_or_else(|| root(t - w).max(min))
            }
        }
    }

    /// The learning rate in step `step` of a run of `total` steps: `base * factor(step, total)`.
    ///
    /// ```
    /// use velvet_optim::{Schedule, Span};
    /// let schedule = Schedule::Linear { warm_up: Span::Steps(0), decay: Span::Fraction(0.5), end: 0.0 };
    /// assert_eq!(schedule.lr(1e-3, 20, 100), 1e-3);
    /// assert_eq!(schedule.lr(1e-3, 75, 100), 5e-4);
    /// ```
    pub fn lr(&self, base: f64, step: u64, total: u64) -> f64 {
        base * self.factor(step, total)
    }
}

/// The factor of a warm-up of `steps` steps, while it lasts.
fn warming(steps: f64, t: f64) -> Option<f64> {
    (t + 1.0 < steps).then(|| (t + 1.0) / steps)
}

fn decaying(warm_up: Span, decay: Span, shape: Curve, end: f64, t: f64, n: f64) -> f64 {
    let w = warm_up.of(n);
    warming(w, t).unwrap_or_else(|| {
        let start = w.max(n - decay.of(n));
        if t > start { shape.between(1.0, end, (t - start) / (n - start)) } else { 1.0 }
    })
}

fn span(field: &'static str, span: Span) -> Result<()> {
    match span {
        Span::Steps(_) => Ok(()),
        Span::Fraction(x) => check(field, "a fraction in [0, 1]", x, (0.0..=1.0).contains(&x)),
    }
}

fn factor(field: &'static str, x: f64) -> Result<()> {
    check(field, "a factor in [0, 1]", x, (0.0..=1.0).contains(&x))
}

fn check(field: &'static str, expected: &'static str, got: f64, is_valid: bool) -> Result<()> {
    if is_valid { Ok(()) } else { Err(Error::Config { field: field.into(), expected, got }) }
}

//! The average both adaptive parts keep of the loss.

/// An exponential moving average whose first value is the first observation.
///
/// ```text
/// value = x                                  at the first observation
/// value = decay * value + (1 - decay) * x    after it
/// ```
///
/// NaN and infinity are not taken in.
///
/// ```
/// let mut ema = velvet_optim::adaptive::Ema::new(0.8);
/// assert_eq!(ema.observe(10.0), Some(10.0));
/// assert_eq!(ema.observe(f64::NAN), Some(10.0));
/// assert_eq!(ema.observe(5.0), Some(0.8 * 10.0 + (1.0 - 0.8) * 5.0));
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ema {
    decay: f64,
    value: Option<f64>,
}

impl Ema {
    /// An average without a value yet; `decay` in [0, 1) is the weight of the past.
    pub fn new(decay: f64) -> Self {
        Self { decay, value: None }
    }

    /// An average that goes on from a saved value.
    pub fn with_value(decay: f64, value: Option<f64>) -> Self {
        Self { decay, value: value.filter(|v| v.is_finite()) }
    }

    /// Takes one observation in and returns the average.
    pub fn observe(&mut self, x: f64) -> Option<f64> {
        if x.is_finite() {
            self.value = Some(match self.value {
                None => x,
                Some(value) => self.decay * value + (1.0 - self.decay) * x,
            });
        }
        self.value
    }

    /// The average, `None` before the first finite observation.
    pub fn value(&self) -> Option<f64> {
        self.value
    }
}

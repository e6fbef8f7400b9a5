//! [`WeightAverage`]: an average of the weights along the run, to evaluate and ship in place of the last ones.

mod file;

use crate::error::{Error, Result};
use candle_core::{DType, Tensor, Var};
use candle_nn::VarMap;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// Which average of the weights is kept. Updates are counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Averaging {
    /// An exponential moving average:
    ///
    /// ```text
    /// average = weights                                     in update start + 1
    /// average = decay * average + (1 - decay) * weights     after it
    /// ```
    Ema {
        /// The weight of the past in one update, in [0, 1).
        decay: f64,
        /// The updates that are left out before it begins (default 0).
        #[serde(default)]
        start: u64,
    },
    /// The mean of the weights after each update from `start + 1` on: `average += (weights - average) / n`.
    Tail {
        /// The updates that are left out before it begins.
        start: u64,
    },
}

impl Averaging {
    fn start(self) -> u64 {
        match self {
            Self::Ema { start, .. } | Self::Tail { start } => start,
        }
    }

    fn kind(self) -> &'static str {
        match self {
            Self::Ema { .. } => "ema",
            Self::Tail { .. } => "tail",
        }
    }

    /// The weight of the newest of `count` weights.
    fn share(self, count: u64) -> f64 {
        match self {
            Self::Ema { decay, .. } => 1.0 - decay,
            Self::Tail { .. } => 1.0 / count.max(1) as f64,
        }
    }
}

/// An average of the weights, in f32 (f64 for f64 parameters) whatever the parameters' type.
///
/// Call [`update`](Self::update) after each optimizer step, and [`swap`](Self::swap) around an evaluation. One array a
/// parameter is kept from the first update that counts, and during a swap one more of the parameter's own type.
/// An f32 average holds what a bf16 one would lose: with a decay of .999 a step moves it by less than half of
/// bf16's last place.
///
/// How much it helps depends on the schedule: with a learning rate that decays to zero the last weights are themselves
/// an average of sorts. This crate has not measured a gain.
///
/// It knows nothing of [`Velvet::set_mask`](crate::Velvet::set_mask): elements that are masked after it has begun
/// keep what was averaged before, which fades (`Ema`) or stays (`Tail`). Begin it after the masks are set.
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use velvet_optim::{Averaging, WeightAverage};
/// let w = Var::new(&[0f32, 8.0], &Device::Cpu)?;
/// let mut average = WeightAverage::new(vec![w.clone()], Averaging::Ema { decay: 0.75, start: 0 })?;
/// average.update()?;
/// w.set(&Tensor::new(&[4f32, 0.0], &Device::Cpu)?)?; // a step
/// average.update()?;
/// {
///     let _swapped = average.swap()?;
///     assert_eq!(w.to_vec1::<f32>()?, [1.0, 6.0]); // evaluate here
/// }
/// assert_eq!(w.to_vec1::<f32>()?, [4.0, 0.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct WeightAverage {
    averaging: Averaging,
    entries: Vec<Entry>,
    /// All updates, those before the start too.
    updates: u64,
    /// The weights in the average.
    count: u64,
}

#[derive(Debug)]
struct Entry {
    name: String,
    var: Var,
    average: Option<Tensor>,
    /// The trained value, while the variable holds the average.
    trained: Option<Tensor>,
}

impl WeightAverage {
    /// An average of variables without names: they are `param.00000`, ... by position. A file of them fits only
    /// where the order is the same; `VarMap::all_vars` gives another order in every process.
    ///
    /// # Errors
    /// `decay` is outside [0, 1), or a variable is given twice.
    pub fn new(vars: Vec<Var>, averaging: Averaging) -> Result<Self> {
        let named = vars.into_iter().enumerate().map(|(i, var)| (format!("param.{i:05}"), var));
        Self::named(named, averaging)
    }

    /// An average of named variables; their order does not matter. Variables of integers are left out.
    ///
    /// # Errors
    /// `decay` is outside [0, 1), a name or a variable is given twice, or a floating-point type is none of f32, f64,
    /// bf16 and f16.
    pub fn named(vars: impl IntoIterator<Item = (String, Var)>, averaging: Averaging) -> Result<Self> {
        if let Averaging::Ema { decay, .. } = averaging
            && !(0.0..1.0).contains(&decay)
        {
            let (field, expected) = ("averaging.ema.decay", "a number in [0, 1)");
            return Err(Error::Config { field: field.into(), expected, got: decay });
        }
        let mut vars: Vec<_> = vars.into_iter().filter(|(_, var)| var.dtype().is_float()).collect();
        vars.sort_by(|a, b| a.0.cmp(&b.0));
        if let Some(pair) = vars.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(Error::DuplicateName { name: pair[0].0.clone() });
        }
        let mut seen = HashMap::new();
        for (name, var) in &vars {
            if !matches!(var.dtype(), DType::F32 | DType::F64 | DType::BF16 | DType::F16) {
                let dtype = var.dtype().as_str().to_owned();
                return Err(Error::UnsupportedDType { name: name.clone(), dtype });
            }
            if let Some(first) = seen.insert(var.id(), name.clone()) {
                return Err(Error::DuplicateVariable { first, second: name.clone() });
            }
        }
        let entries =
            vars.into_iter().map(|(name, var)| Entry { name, var, average: None, trained: None }).collect();
        Ok(Self { averaging, entries, updates: 0, count: 0 })
    }

    /// An average of all variables of a `VarMap`, under their names there.
    ///
    /// # Errors
    /// As [`WeightAverage::named`].
    pub fn from_varmap(varmap: &VarMap, averaging: Averaging) -> Result<Self> {
        // A map whose lock is poisoned still holds its variables.
        let data = varmap.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Self::named(data.iter().map(|(name, var)| (name.clone(), var.clone())), averaging)
    }

    /// Takes the weights as they are now into the average; call it after each optimizer step.
    ///
    /// # Errors
    /// The variables hold the average (a swap was not undone): nothing changes. Or candle fails, out of memory as a
    /// rule: some parameters' averages then have these weights in them and others have not.
    pub fn update(&mut self) -> Result<()> {
        self.require_trained("update")?;
        if self.count > 0 || self.updates >= self.averaging.start() {
            let share = self.averaging.share(self.count + 1);
            // One by one, so that the old and the new average of one parameter only are in memory at a time.
            for entry in &mut self.entries {
                entry.average = Some(entry.averaged(share)?);
            }
            self.count += 1;
        }
        self.updates += 1;
        Ok(())
    }

    /// Writes the average into the variables until the guard is dropped, which writes the trained weights back.
    ///
    /// Before the average has begun the variables keep the trained weights, so that an evaluation in the middle of the
    /// run works throughout; [`has_begun`](Self::has_begun) tells. Values are rounded to the parameters' type.
    ///
    /// # Errors
    /// A swap was not undone (its guard was leaked): call [`restore`](Self::restore). Or candle fails to copy; the
    /// variables then hold the trained weights.
    pub fn swap(&mut self) -> Result<Swapped<'_>> {
        self.require_trained("swap")?;
        // From here on dropping the guard undoes what has been done, after an error too.
        let guard = Swapped { average: self };
        for entry in &mut guard.average.entries {
            if let Some(average) = &entry.average {
                let value = average.to_dtype(entry.var.dtype())?;
                entry.trained = Some(entry.var.as_tensor().copy()?);
                entry.var.set(&value)?;
            }
        }
        Ok(guard)
    }

    /// Writes the trained weights back, if the variables hold the average.
    ///
    /// Only needed after a guard that was leaked or failed to write back, as a device may: the trained weights
    /// are kept until they have been written.
    ///
    /// # Errors
    /// candle fails to copy; the weights not yet written back are still kept.
    pub fn restore(&mut self) -> Result<()> {
        for entry in &mut self.entries {
            if let Some(trained) = &entry.trained {
                entry.var.set(trained)?;
                entry.trained = None;
            }
        }
        Ok(())
    }

    /// Whether any weights have been averaged yet.
    pub fn has_begun(&self) -> bool {
        self.count > 0
    }

    /// The number of updates, with those before the start.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Which average it is.
    pub fn averaging(&self) -> Averaging {
        self.averaging
    }

    /// The averages by name, in its order; nothing before it has begun.
    pub fn averages(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.entries.iter().filter_map(|entry| Some((entry.name.as_str(), entry.average.as_ref()?)))
    }

    fn require_trained(&self, what: &str) -> Result<()> {
        if self.entries.iter().all(|entry| entry.trained.is_none()) {
            return Ok(());
        }
        Err(Error::StateMismatch {
            origin: "weight average".to_owned(),
            key: what.to_owned(),
            what: "variables with",
            expected: "the trained weights".to_owned(),
            got: "the average: a swap was not undone, call restore".to_owned(),
        })
    }
}

impl Drop for WeightAverage {
    fn drop(&mut self) {
        // After a leaked guard this is the last place where the trained weights are.
        let _ = self.restore();
    }
}

impl Entry {
    fn dtype(&self) -> DType {
        if self.var.dtype() == DType::F64 { DType::F64 } else { DType::F32 }
    }

    /// The average with the variable's value in it.
    fn averaged(&self, share: f64) -> Result<Tensor> {
        let value = self.var.as_detached_tensor().to_dtype(self.dtype())?;
        Ok(match &self.average {
            // The variable's own storage changes with the next step.
            None => value.copy()?,
            // Not average + share * (value - average): that reads and writes as much, and is not exact for share 1.
            Some(average) => ((average * (1.0 - share))? + (value * share)?)?,
        })
    }
}

/// While it lives, the variables hold the average; [`WeightAverage::swap`] makes it.
#[derive(Debug)]
#[must_use = "the trained weights are written back when this is dropped"]
pub struct Swapped<'a> {
    average: &'a mut WeightAverage,
}

impl Swapped<'_> {
    /// Writes the trained weights back, as a drop does, and reports whether that failed.
    ///
    /// # Errors
    /// candle fails to copy: [`WeightAverage::restore`] can be called again.
    pub fn restore(self) -> Result<()> {
        self.average.restore()
    }
}

impl Drop for Swapped<'_> {
    fn drop(&mut self) {
        // A drop has no way to report a failure: the weights are kept then, and the next update or swap refuses.
        let _ = self.average.restore();
    }
}

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{D, DType, Tensor, Var};
use serde::{Deserialize, Serialize};

use super::{AdaLoraAdapter, Adapter, Step};
use crate::{Error, Result};

/// How the ranks of AdaLoRA adapters shrink during a run, and what they end at.
///
/// The total starts at the sum of the adapters' ranks. A run must be longer than its two phases without allocations. After `warm_up` steps it falls, by the cube of the way that is
/// left, to `target_r` times the number of adapters; the last `final_steps` train with the ranks found. Within the
/// total, a layer keeps as many ranks as its own are worth, from `min_r` to `max_r`.
///
/// # Examples
///
/// ```
/// use flylora::RankBudgetConfig;
///
/// // From what the adapters start with to 8 ranks a layer on average, at least 2 and at most 12.
/// let config = RankBudgetConfig::default().with_target_r(8).with_bounds(2, 12);
/// assert!(config.validate().is_ok());
/// assert!(config.with_bounds(9, 12).validate().is_err()); // the least is over the average
/// ```
///
/// # References
///
/// Zhang et al. 2023 (AdaLoRA), [arXiv:2303.10512](https://arxiv.org/abs/2303.10512).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RankBudgetConfig {
    /// The rank that a layer ends with on average: at least 1, 8 by default.
    pub target_r: usize,
    /// The least that a layer ends with: at most `target_r`, 0 by default.
    pub min_r: usize,
    /// The most that a layer ends with, no less than `target_r`; `None`, the default, is no bound but its first rank.
    pub max_r: Option<usize>,
    /// Steps before the first rank is taken away, 0 by default; PEFT's `tinit`.
    pub warm_up: u64,
    /// Steps at the end with ranks that no longer change, 0 by default; PEFT's `tfinal`.
    pub final_steps: u64,
    /// Steps from one allocation to the next: at least 1, which is the default; PEFT's `deltaT`.
    pub every: u64,
    /// The share of the past in the smoothed sensitivity: in (0, 1), 0.85 by default.
    pub beta1: f64,
    /// The share of the past in the smoothed uncertainty: in (0, 1), 0.85 by default.
    pub beta2: f64,
}

impl Default for RankBudgetConfig {
    fn default() -> Self {
        Self {
            target_r: 8,
            min_r: 0,
            max_r: None,
            warm_up: 0,
            final_steps: 0,
            every: 1,
            beta1: 0.85,
            beta2: 0.85,
        }
    }
}

impl RankBudgetConfig {
    /// Sets the average rank at the end.
    pub fn with_target_r(mut self, target_r: usize) -> Self {
        self.target_r = target_r;
        self
    }

    /// Sets the least and the most that a layer ends with.
    pub fn with_bounds(mut self, min_r: usize, max_r: usize) -> Self {
        (self.min_r, self.max_r) = (min_r, Some(max_r));
        self
    }

    /// Sets the steps before the first and after the last allocation.
    pub fn with_phases(mut self, warm_up: u64, final_steps: u64) -> Self {
        (self.warm_up, self.final_steps) = (warm_up, final_steps);
        self
    }

    /// Sets the steps from one allocation to the next.
    pub fn with_every(mut self, every: u64) -> Self {
        self.every = every;
        self
    }

    /// Checks that every field is in its range.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] names the first one that is not.
    pub fn validate(&self) -> Result<()> {
        let fail =
            |field, expected: &str, got: String| Err(Error::Config { field, expected: expected.into(), got });
        if self.target_r == 0 {
            return fail("target_r", "at least 1", self.target_r.to_string());
        }
        if self.min_r > self.target_r {
            return fail("min_r", "at most target_r", self.min_r.to_string());
        }
        if let Some(max_r) = self.max_r.filter(|max_r| *max_r < self.target_r) {
            return fail("max_r", "at least target_r", max_r.to_string());
        }
        if self.every == 0 {
            return fail("every", "at least 1", self.every.to_string());
        }
        for (field, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(beta > 0.0 && beta < 1.0) {
                return fail(field, "between 0 and 1", beta.to_string());
            }
        }
        Ok(())
    }

    /// The total of the ranks after a step, from `first` to `last`.
    fn total(&self, step: Step, first: usize, last: usize) -> usize {
        let end = step.total.saturating_sub(self.final_steps);
        if step.index <= self.warm_up {
            return first;
        }
        if step.index >= end {
            return last;
        }
        // warm_up < index < end
        let left = 1.0 - (step.index - self.warm_up) as f64 / (end - self.warm_up) as f64;
        (first.saturating_sub(last) as f64 * left.powi(3)) as usize + last
    }
}

/// Takes ranks away from AdaLoRA adapters where they matter least.
///
/// ```text
/// sensitivity = |w dL/dw|,  s = beta1 s + (1 - beta1) sensitivity,  u = beta2 u + (1 - beta2) |sensitivity - s|
/// importance of a rank = s u of its E + the mean of s u over its row of A + the mean over its column of B
/// ```
///
/// The state of the smoothing is not kept in files: a run that is interrupted gathers it anew.
///
/// # Examples
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Optimizer, SGD};
/// use flylora::{AdaLoraAdapter, AdaLoraConfig, Adapter, Place, RankBudget, RankBudgetConfig, Step};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let place = Place::alone("q_proj", DType::F32, &Device::Cpu);
/// let adapter = AdaLoraAdapter::new(12, 6, &AdaLoraConfig::default().with_init_r(6), &place)?;
/// let mut budget = RankBudget::new(RankBudgetConfig::default().with_target_r(2))?;
/// let vars = adapter.parameters().into_iter().map(|(_, var)| var).collect();
/// let mut optimizer = SGD::new(vars, 0.1)?;
/// let x = Tensor::randn(0f32, 1.0, (32, 12), &Device::Cpu)?;
/// for index in 1..=10 {
///     let loss = (adapter.delta(&x)? - 1.0)?.sqr()?.mean_all()?;
///     let grads = loss.backward()?;
///     optimizer.step(&grads)?;
///     budget.update(Step { index, total: 10 }, &grads, &[("q_proj", &adapter)])?;
/// }
/// assert_eq!(adapter.rank(), 2);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct RankBudget {
    config: RankBudgetConfig,
    smoothed: BTreeMap<String, Smoothed>,
}

#[derive(Clone, Debug)]
struct Smoothed {
    sensitivity: Tensor,
    uncertainty: Tensor,
}

/// A rank of a layer, and what it is worth.
struct Rank {
    layer: usize,
    index: usize,
    importance: f64,
}

impl RankBudget {
    /// Starts with nothing known.
    ///
    /// # Errors
    ///
    /// Those of [`RankBudgetConfig::validate`].
    pub fn new(config: RankBudgetConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self { config, smoothed: BTreeMap::new() })
    }

    /// The configuration.
    pub fn config(&self) -> &RankBudgetConfig {
        &self.config
    }

    /// Takes note of the gradients of a step, and takes ranks away where it is time to; after the optimizer's step.
    ///
    /// # Errors
    ///
    /// [`Error::Config`] where the run is too short for its phases, so that the total would never be reached;
    /// [`Error::NoGradient`] for a variable without a gradient, while ranks are still being allocated; and candle's own.
    pub fn update(
        &mut self,
        step: Step,
        grads: &GradStore,
        adapters: &[(&str, &AdaLoraAdapter)],
    ) -> Result<()> {
        let end = step.total.saturating_sub(self.config.final_steps);
        if self.config.warm_up >= end {
            let expected =
                format!("less than the {end} steps before the last phase of a run of {}", step.total);
            return Err(Error::Config { field: "warm_up", expected, got: self.config.warm_up.to_string() });
        }
        if step.index > end {
            // What the optimizer has put back.
            for (_, adapter) in adapters {
                adapter.keep(adapter.kept())?;
            }
            return Ok(());
        }
        for (path, adapter) in adapters {
            for (name, var) in adapter.parameters() {
                let key = format!("{path}.{name}");
                let Some(grad) = grads.get(&var) else {
                    return Err(Error::NoGradient { parameter: key, why: None });
                };
                self.smooth(key, &var, grad)?;
            }
        }
        let due = step.index > self.config.warm_up && step.index.is_multiple_of(self.config.every);
        if due || step.index == end { self.allocate(step, adapters) } else { Ok(()) }
    }

    fn smooth(&mut self, key: String, var: &Var, grad: &Tensor) -> Result<()> {
        let (beta1, beta2) = (self.config.beta1, self.config.beta2);
        let now = (var.as_detached_tensor() * grad.detach())?.abs()?.to_dtype(DType::F32)?;
        let before = self.smoothed.get(&key);
        let mix = |old: Option<&Tensor>, new: &Tensor, beta: f64| match old {
            None => new * (1.0 - beta),
            Some(old) => (old * beta)? + (new * (1.0 - beta))?,
        };
        let sensitivity = mix(before.map(|b| &b.sensitivity), &now, beta1)?;
        let distance = (now - &sensitivity)?.abs()?;
        let uncertainty = mix(before.map(|b| &b.uncertainty), &distance, beta2)?;
        self.smoothed.insert(key, Smoothed { sensitivity, uncertainty });
        Ok(())
    }

    /// What each rank of an adapter is worth.
    fn importance(&self, path: &str, adapter: &AdaLoraAdapter) -> Result<Vec<f64>> {
        let score = |name: &str| -> Result<Tensor> {
            match self.smoothed.get(&format!("{path}.{name}")) {
                Some(s) => Ok((&s.sensitivity * &s.uncertainty)?),
                None => Err(Error::NoGradient { parameter: format!("{path}.{name}"), why: None }),
            }
        };
        let e = score(super::ada_lora::E)?.squeeze(D::Minus1)?; // (r)
        let a = score(super::ada_lora::A)?.mean(D::Minus1)?; // (r)
        let b = score(super::ada_lora::B)?.mean(0)?; // (r)
        let importance = ((e + a)? + b)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        debug_assert_eq!(importance.len(), adapter.kept().len());
        Ok(importance)
    }

    fn allocate(&self, step: Step, adapters: &[(&str, &AdaLoraAdapter)]) -> Result<()> {
        let first: usize = adapters.iter().map(|(_, adapter)| adapter.kept().len()).sum();
        let last = (self.config.target_r * adapters.len()).min(first);
        let mut left = self.config.total(step, first, last);
        let mut ranks = Vec::with_capacity(first);
        let mut kept = Vec::with_capacity(adapters.len());
        for (layer, (path, adapter)) in adapters.iter().enumerate() {
            let importance = self.importance(path, adapter)?;
            kept.push(vec![false; importance.len()]);
            ranks.extend(importance.into_iter().enumerate().map(|(index, importance)| Rank {
                layer,
                index,
                importance,
            }));
        }
        // The most important first; of equals the first one, so that runs repeat.
        ranks.sort_by(|a, b| b.importance.total_cmp(&a.importance));
        // Bounds hold at the end; on the way there a layer may have more.
        let max_r = self.config.max_r.filter(|_| left == last).unwrap_or(usize::MAX);
        let mut counts = vec![0usize; adapters.len()];
        for least in [true, false] {
            for rank in &ranks {
                let (Some(count), Some(flags)) = (counts.get_mut(rank.layer), kept.get_mut(rank.layer))
                else {
                    continue;
                };
                let bound = if least { self.config.min_r } else { max_r };
                match flags.get_mut(rank.index) {
                    Some(flag) if !*flag && *count < bound && left > 0 => {
                        *flag = true;
                        *count += 1;
                        left -= 1;
                    }
                    _ => {}
                }
            }
        }
        for ((_, adapter), kept) in adapters.iter().zip(kept) {
            adapter.keep(kept)?;
        }
        Ok(())
    }
}

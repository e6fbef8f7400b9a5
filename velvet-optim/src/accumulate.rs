//! [`Accumulator`]: one step's gradient out of several micro-batches.

use crate::error::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarMap;
use std::collections::HashMap;

/// Sums gradients over micro-batches, for a batch that does not fit into memory at once.
///
/// ```text
/// mean = sum over micro-batches of weight * gradient / sum of weights
/// ```
///
/// which is the gradient of the whole batch's mean loss, where each micro-batch's loss is a mean over its tokens (or
/// examples) and the weight is their number. Micro-batches of equal size need no weights.
///
/// **Memory**: one array a parameter, and no activation. A gradient as candle hands it out is still attached to the
/// graph it was computed in, so that a `GradStore` that is kept keeps every activation of its micro-batch; here
/// gradients are detached, and the graph is freed with the loss and the `GradStore`.
///
/// **Precision**: sums are f32, for bf16 and f16 gradients too (f64 for f64 ones): in bf16 a sum stops growing after
/// some 256 terms of one size. The mean is of the sum's type; [`Velvet`](crate::Velvet) takes it as it is.
///
/// **Missing gradients**: a parameter that gets none in some micro-batch gets a zero from it, as its loss does not
/// depend on the parameter. One without a gradient in all micro-batches has none in the mean either, so that the
/// optimizer still sees, and reports, that it is missing.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use velvet_optim::{Accumulator, Optimizer, Velvet, VelvetConfig};
/// let w = Var::new(&[1f32, -1.0], &Device::Cpu)?;
/// let mut opt = Velvet::new(vec![w.clone()], VelvetConfig::default())?;
/// let mut accumulator = Accumulator::new(vec![w.clone()])?;
///
/// for tokens in [3.0, 1.0] {
///     let loss = (w.sqr()?.sum_all()? * tokens)?; // its gradient is 2 * tokens * w
///     accumulator.add_weighted(&loss.backward()?, tokens)?;
/// }
/// let grads = accumulator.take()?; // (3 * 6 + 1 * 2) / 4 * w
/// assert_eq!(grads.get(&w).unwrap().to_vec1::<f32>()?, [5.0, -5.0]);
/// opt.step(&grads)?;
/// assert_eq!(accumulator.micro_batches(), 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Accumulator {
    entries: Vec<Entry>,
    weight: f64,
    micro_batches: u64,
}

#[derive(Debug)]
struct Entry {
    name: String,
    var: Var,
    sum: Option<Tensor>,
}

impl Accumulator {
    /// An accumulator for variables without names; messages name them by position: `param.00000`, ...
    ///
    /// # Errors
    /// A variable is given twice.
    pub fn new(vars: Vec<Var>) -> Result<Self> {
        Self::named(vars.into_iter().enumerate().map(|(i, var)| (format!("param.{i:05}"), var)))
    }

    /// An accumulator for named variables. Variables of integers are left out.
    ///
    /// # Errors
    /// A name or a variable is given twice.
    pub fn named(vars: impl IntoIterator<Item = (String, Var)>) -> Result<Self> {
        let mut vars: Vec<_> = vars.into_iter().filter(|(_, var)| var.dtype().is_float()).collect();
        vars.sort_by(|a, b| a.0.cmp(&b.0));
        if let Some(pair) = vars.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(Error::DuplicateName { name: pair[0].0.clone() });
        }
        let mut seen = HashMap::new();
        for (name, var) in &vars {
            if let Some(first) = seen.insert(var.id(), name.clone()) {
                return Err(Error::DuplicateVariable { first, second: name.clone() });
            }
        }
        let entries = vars.into_iter().map(|(name, var)| Entry { name, var, sum: None }).collect();
        Ok(Self { entries, weight: 0.0, micro_batches: 0 })
    }

    /// An accumulator for all variables of a `VarMap`, under their names there.
    ///
    /// # Errors
    /// As [`Accumulator::named`].
    pub fn from_varmap(varmap: &VarMap) -> Result<Self> {
        // A map whose lock is poisoned still holds its variables.
        let data = varmap.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Self::named(data.iter().map(|(name, var)| (name.clone(), var.clone())))
    }

    /// Adds the gradients of one micro-batch, with a weight of 1.
    ///
    /// # Errors
    /// A gradient is of another shape or on another device than its parameter, or is not of a floating-point type;
    /// the message names the parameter, and nothing is added. Or candle fails, out of memory as a rule; sums of half a
    /// micro-batch are of no use, and the accumulator is reset.
    pub fn add(&mut self, grads: &GradStore) -> Result<()> {
        self.add_weighted(grads, 1.0)
    }

    /// Adds the gradients of one micro-batch with a weight, such as the number of its tokens.
    ///
    /// A micro-batch of weight 0 adds nothing, whatever its gradients are: the mean over no tokens is NaN.
    ///
    /// # Errors
    /// As [`Accumulator::add`], and where the weight is negative, infinite or NaN.
    pub fn add_weighted(&mut self, grads: &GradStore, weight: f64) -> Result<()> {
        if !(weight.is_finite() && weight >= 0.0) {
            let (field, expected) = ("accumulator.weight", "a finite number of at least 0");
            return Err(Error::Config { field: field.into(), expected, got: weight });
        }
        for entry in &self.entries {
            if let Some(grad) = grads.get(&entry.var) {
                entry.check(grad)?;
            }
        }
        if weight > 0.0 {
            // One by one, so that the old and the new sum of one parameter only are in memory at a time.
            let added = self.entries.iter_mut().try_for_each(|entry| match grads.get(&entry.var) {
                Some(grad) => entry.add(grad, weight),
                None => Ok(()),
            });
            if added.is_err() {
                self.reset();
                return added;
            }
        }
        self.weight += weight;
        self.micro_batches += 1;
        Ok(())
    }

    /// The weighted mean of the gradients added so far, as a store for [`Optimizer::step`](crate::Optimizer::step).
    ///
    /// Without micro-batches, and where all weights are 0, the store is empty.
    ///
    /// # Errors
    /// candle fails to compute it.
    pub fn mean(&self) -> Result<GradStore> {
        let mut store = empty_store()?;
        for entry in &self.entries {
            if let Some(sum) = &entry.sum {
                // No pass over the memory where there is nothing to divide.
                let mean = if self.weight == 1.0 { sum.clone() } else { (sum / self.weight)? };
                store.insert(&entry.var, mean);
            }
        }
        Ok(store)
    }

    /// The mean, as [`Accumulator::mean`] gives it, and a fresh start.
    ///
    /// # Errors
    /// As [`Accumulator::mean`]; the sums then stay.
    pub fn take(&mut self) -> Result<GradStore> {
        let mean = self.mean()?;
        self.reset();
        Ok(mean)
    }

    /// Forgets everything added so far and frees its memory.
    pub fn reset(&mut self) {
        for entry in &mut self.entries {
            entry.sum = None;
        }
        self.weight = 0.0;
        self.micro_batches = 0;
    }

    /// The number of micro-batches added since the last reset.
    pub fn micro_batches(&self) -> u64 {
        self.micro_batches
    }

    /// The sum of their weights.
    pub fn weight(&self) -> f64 {
        self.weight
    }

    /// The parameters, by name, that got no gradient from any micro-batch since the last reset.
    pub fn missing(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().filter(|entry| entry.sum.is_none()).map(|entry| entry.name.as_str())
    }
}

impl Entry {
    fn check(&self, grad: &Tensor) -> Result<()> {
        let error = |what, expected: String, got: String| {
            Err(Error::Gradient { name: self.name.clone(), what, expected, got })
        };
        if grad.dims() != self.var.dims() {
            return error("shape", format!("{:?}", self.var.dims()), format!("{:?}", grad.dims()));
        }
        if !grad.device().same_device(self.var.device()) {
            let location = |t: &Tensor| format!("{:?}", t.device().location());
            return error("device", location(&self.var), location(grad));
        }
        if !matches!(grad.dtype(), DType::F32 | DType::F64 | DType::BF16 | DType::F16) {
            return error("dtype", "f32, f64, bf16 or f16".to_owned(), grad.dtype().as_str().to_owned());
        }
        Ok(())
    }

    fn add(&mut self, grad: &Tensor, weight: f64) -> Result<()> {
        // The sum's type is that of the first gradient's, so that one parameter's sum never changes its type.
        let dtype = match &self.sum {
            Some(sum) => sum.dtype(),
            None if grad.dtype() == DType::F64 => DType::F64,
            None => DType::F32,
        };
        // Nothing below is written in place, so a gradient of the right type is taken as it is, without a copy.
        let grad = grad.detach().to_dtype(dtype)?;
        let grad = if weight == 1.0 { grad } else { (grad * weight)? };
        self.sum = Some(match &self.sum {
            Some(sum) => (sum + grad)?,
            None => grad,
        });
        Ok(())
    }
}

/// A store with nothing in it: candle makes one only by a backward pass.
fn empty_store() -> Result<GradStore> {
    let seed = Tensor::zeros((), DType::F32, &Device::Cpu)?;
    let mut store = seed.backward()?;
    store.remove(&seed);
    Ok(store)
}
